"""Fetch the real OCTMNIST (55 MB, 109,309 retinal images, CC BY 4.0) through MedMNIST; check it.

    python download_octmnist.py -root data

Writes ROOT/octmnist.npz, whole or not at all, and prints its path and size. Takes as long as 55 MB
take; a second call only verifies the checksum.
"""

import socket
from http.client import HTTPException
from pathlib import Path

import runs
from runs import UserError

from medmnist import INFO
from torchvision.datasets.utils import calculate_md5, download_url

TIMEOUT = 30  # seconds without a byte, after which the connection counts as lost


def download(url, md5, path):
    """Fetch `url` to `path` as MedMNIST does; UserError unless its MD5 is `md5`."""
    socket.setdefaulttimeout(TIMEOUT)  # the library would wait for ever
    with runs.write_atomically(path) as temporary:
        try:
            download_url(url, temporary.parent, temporary.name, md5)
        except (OSError, HTTPException, RuntimeError, ValueError) as error:
            reason = " ".join(str(getattr(error, "reason", error)).split())
            place = f"fetch {url} by hand and place it as {path}"
            raise UserError(
                f"cannot fetch octmnist.npz ({reason}); run this again, or {place}, "
                "or use the stand-in that `make sample` writes."
            ) from error


def verify(path, md5):
    """UserError unless the file's MD5 is `md5`."""
    found = calculate_md5(path)
    if found != md5:
        fault = f"damaged or another file: its MD5 is {found}, not {md5}"
        raise UserError(f"{path} is {fault}; delete it, then run this again.")


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("root", type=Path, default="data", help="folder for octmnist.npz")
    parser.flag("url", default=INFO["octmnist"]["url"], help="where to fetch it, such as a mirror")
    parser.flag("md5", default=INFO["octmnist"]["MD5"], help="the checksum that it must have")
    return parser


def main(args):
    """Fetch and check ROOT/octmnist.npz, or only check it where it is already; returns its path."""
    path = args.root / "octmnist.npz"
    if path.is_file():
        verify(path, args.md5)
        what = "here already"
    else:
        download(args.url, args.md5, path)
        what = "fetched"
    print(f"{path}: {what}, checksum right ({path.stat().st_size:,} bytes)")
    return path


if __name__ == "__main__":
    runs.run_script(main, make_parser())
