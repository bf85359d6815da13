"""Fetch LJ Speech 1.1 (2.6 GB) into a folder, data/ by default; one that is there stays.

python -m tools.download_ljspeech -root data
"""

import runs
import utils


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("root", default="data", help="folder for LJSpeech-1.1/")
    return parser


if __name__ == "__main__":
    runs.run_script(lambda args: utils.download_ljspeech(args.root), make_parser())
