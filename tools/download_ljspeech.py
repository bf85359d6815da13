"""Fetch LJ Speech 1.1 (2.6 GB) into a folder, data/ by default; one that is there stays.

python -m tools.download_ljspeech -root data
"""

import shutil
import tarfile
from pathlib import Path

import runs
from runs import UserError


def download_ljspeech(folder):
    """Fetch LJ Speech 1.1 (2.6 GB) into `folder` through torchaudio, which verifies its checksum.

    `folder`/LJSpeech-1.1 appears only when it is complete; if it is there already, nothing is done.
    An archive that was fetched before a failure is used again. If it cannot be fetched, UserError
    says what to do.
    """
    import torchaudio

    if (Path(folder) / "LJSpeech-1.1").exists():
        return
    unfinished = Path(folder) / "LJSpeech-download"
    unfinished.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unfinished / "LJSpeech-1.1", ignore_errors=True)  # unpacked in part
    try:
        torchaudio.datasets.LJSPEECH(unfinished, download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        reason = f"cannot fetch LJ Speech ({' '.join(str(error).split())})"
        advice = f"delete {unfinished}, or place LJSpeech-1.1/ in {folder} by hand"
        raise UserError(f"{reason}; {advice}.") from error
    (unfinished / "LJSpeech-1.1").replace(Path(folder) / "LJSpeech-1.1")
    shutil.rmtree(unfinished)


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("root", default="data", help="folder for LJSpeech-1.1/")
    return parser


def main(args):
    download_ljspeech(args.root)


if __name__ == "__main__":
    runs.run_script(main, make_parser())
