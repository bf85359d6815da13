"""Fetch the real OCTMNIST (55 MB, 109,309 retinal images, CC BY 4.0) through MedMNIST, and check it.

    python download_octmnist.py -root data

Writes ROOT/octmnist.npz, whole or not at all, and prints its path and size. Takes as long as 55 MB take; a second call
only verifies the checksum. Whatever goes wrong ends as one sentence that says what to do.
"""

import io
import socket
import ssl
import sys
from contextlib import nullcontext, redirect_stderr
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

from medmnist import INFO
from torchvision.datasets.utils import calculate_md5, download_url

import utils
from utils import UserError

TIMEOUT = 30  # seconds without a byte, after which the connection counts as lost
FAILURES = (URLError, HTTPException, ssl.SSLError, ConnectionError, TimeoutError, RuntimeError, ValueError)


def download(url, md5, path):
    """Fetch `url` to `path` by MedMNIST's own means, keeping it only if its MD5 is `md5`; raises UserError otherwise.

    The file gets its name last: before that it is .octmnist-<process>.npz beside it, which the next call clears away.
    """
    for leftover in path.parent.glob(".octmnist-*.npz"):
        leftover.unlink(missing_ok=True)
    by_hand = f"fetch {url} by hand and place it as {path}, or use the stand-in that `make sample` writes."
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())  # the library's progress bar
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # the library sets none: a silent firewall would hold it for ever
    try:
        with utils.write_atomically(path) as temporary:
            try:
                with quiet:
                    download_url(url, temporary.parent, temporary.name)
            except FAILURES as error:
                reason = " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
                raise UserError(f"cannot fetch octmnist.npz ({reason}); {by_hand}") from error
            found = calculate_md5(temporary)
            if found != md5:
                fault = f"{temporary.stat().st_size:,} bytes with MD5 {found}, not {md5}"
                raise UserError(f"what arrived is cut short or another file ({fault}); run this again, or {by_hand}")
    finally:
        socket.setdefaulttimeout(before)


def make_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0])
    parser.flag("root", type=Path, default="data", help="folder for octmnist.npz")
    parser.flag("url", default=INFO["octmnist"]["url"], help="where to fetch it, such as a mirror")
    parser.flag("md5", default=INFO["octmnist"]["MD5"], help="the checksum that it must have")
    return parser


def main(args):
    """Fetch and check ROOT/octmnist.npz, or only check it where it is already; returns its path."""
    path = args.root / "octmnist.npz"
    if path.is_file():
        found = calculate_md5(path)
        if found != args.md5:
            fault = f"damaged or another file: its MD5 is {found}, not {args.md5}"
            raise UserError(f"{path} is {fault}; delete it, then run this again.")
        print(f"{path}: here already, checksum right ({path.stat().st_size:,} bytes)")
    else:
        download(args.url, args.md5, path)
        print(f"{path}: fetched, checksum right ({path.stat().st_size:,} bytes)")
    return path


if __name__ == "__main__":
    utils.run_script(main, make_parser())
