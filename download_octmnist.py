"""Fetch the real OCTMNIST (55 MB, 109,309 retinal images, CC BY 4.0) through MedMNIST; check it.

    python download_octmnist.py -root data

Writes ROOT/octmnist.npz, whole or not at all, and prints its path and size. Takes as long as 55 MB
take; a second call only verifies the checksum. Whatever goes wrong ends in one sentence that says
what to do.
"""

import io
import socket
import ssl
import sys
from contextlib import contextmanager, nullcontext, redirect_stderr
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import runs
from runs import UserError

from medmnist import INFO
from torchvision.datasets.utils import calculate_md5, download_url

TIMEOUT = 30  # seconds without a byte, after which the connection counts as lost
FAILURES = (
    URLError,
    HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
    RuntimeError,
    ValueError,
)


@contextmanager
def connection_timeout(seconds):
    """Let connections fail after so long a silence; the library would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def no_progress_bar_in_a_log():
    """Drop what the library writes to stderr, its progress bar, unless that is a terminal."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())


def reason_of(error):
    """What went wrong, in one line."""
    reason = str(getattr(error, "reason", error))
    return " ".join(reason.split()) or type(error).__name__


def download(url, md5, path):
    """Fetch `url` to `path` by MedMNIST's own means; UserError unless its MD5 is `md5`.

    The file gets its name last. Before that it is .octmnist-<process>.npz beside it, which the next
    call clears away if it was left there.
    """
    for leftover in path.parent.glob(".octmnist-*.npz"):
        leftover.unlink(missing_ok=True)

    place = f"fetch {url} by hand and place it as {path}"
    advice = f"{place}, or use the stand-in that `make sample` writes."
    with runs.write_atomically(path) as temporary:
        try:
            with connection_timeout(TIMEOUT), no_progress_bar_in_a_log():
                download_url(url, temporary.parent, temporary.name)
        except FAILURES as error:
            problem = f"cannot fetch octmnist.npz ({reason_of(error)})"
            raise UserError(f"{problem}; {advice}") from error

        found = calculate_md5(temporary)
        if found != md5:
            fault = f"{temporary.stat().st_size:,} bytes with MD5 {found}, not {md5}"
            problem = f"what arrived is cut short or another file ({fault})"
            raise UserError(f"{problem}; run this again, or {advice}")


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
