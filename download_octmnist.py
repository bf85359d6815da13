"""Fetch the real OCTMNIST (55 MB, 109,309 retinal images, CC BY 4.0) and check it.

    python download_octmnist.py -root data

Writes ROOT/octmnist.npz. If the file is there already, it is only checked.
"""

import hashlib
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import runs
from runs import UserError

from medmnist import INFO

MD5 = INFO["octmnist"]["MD5"]
TIMEOUT = 30  # seconds without a byte, after which the connection counts as lost
TRY_AGAIN = "try again, or name a mirror with -url"


def fetch(url):
    """The bytes at `url`; UserError where it cannot be read."""
    try:
        request = Request(url, headers={"User-Agent": "Mozilla/5.0"})  # Zenodo refuses Python's own
        with urlopen(request, timeout=TIMEOUT) as answer:
            return answer.read()
    except (OSError, HTTPException, ValueError) as error:
        raise UserError(f"cannot fetch {url} ({error}); {TRY_AGAIN}.") from error


def check(content, source, advice):
    """UserError unless these bytes are OCTMNIST's file."""
    found = hashlib.md5(content).hexdigest()
    if found != MD5:
        raise UserError(f"{source} is not OCTMNIST (its MD5 is {found}, not {MD5}); {advice}.")


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("root", type=Path, default="data", help="folder for octmnist.npz")
    parser.flag("url", default=INFO["octmnist"]["url"], help="where to fetch it, such as a mirror")
    return parser


def main(args):
    """Write ROOT/octmnist.npz unless it is there; check it in either case."""
    path = args.root / "octmnist.npz"
    if path.exists():
        with runs.file_errors(path):
            check(path.read_bytes(), path, "delete it and run this again")
    else:
        with runs.write_atomically(path) as temporary:
            print(f"fetching {args.url} (55 MB)", flush=True)
            content = fetch(args.url)
            check(content, args.url, TRY_AGAIN)
            temporary.write_bytes(content)
    print(f"{path} is OCTMNIST: its MD5 is right")


if __name__ == "__main__":
    runs.run_script(main, make_parser())
