"""Take the clips out of LJ Speech that the committed results on real speech are of.

    python -m tools.part_of_ljspeech -data data -out data/clips

Copies the clips named in report/clips.txt, 535 of 13,100 (1.0 hour), and their rows of metadata.csv
into OUT/LJSpeech-1.1/, whole or not at all; `make model` fine-tunes on them. The committed results
were made with the same sound in FLAC files, so the hash in them is another one.
"""

import shutil
from pathlib import Path

import runs
import utils
from runs import UserError

IDS = runs.ROOT / "report" / "clips.txt"


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("data", type=Path, default=Path("data"), help="folder that holds LJSpeech-1.1/")
    parser.flag("out", type=Path, default=Path("data/clips"), help="folder for the part of it")
    return parser


def main(args):
    source, target = args.data / "LJSpeech-1.1", args.out / "LJSpeech-1.1"
    if target.exists():
        raise UserError(f"{target} is there already; name another folder with -out.")
    wanted = set(runs.read_text(IDS).split())
    rows = [row for row in utils.read_metadata(source / "metadata.csv") if row[0] in wanted]
    if len(rows) < len(wanted):
        raise UserError(f"{source} has {len(rows)} of the {len(wanted)} clips; fetch all of it.")
    unfinished = args.out / ".LJSpeech-1.1-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    with runs.file_errors(target):
        (unfinished / "wavs").mkdir(parents=True)
        for name, _, _ in rows:
            shutil.copyfile(source / "wavs" / f"{name}.wav", unfinished / "wavs" / f"{name}.wav")
        table = "".join("|".join(row) + "\n" for row in rows)
        (unfinished / "metadata.csv").write_text(table, encoding="utf-8", newline="\n")
        unfinished.rename(target)
    print(f"{target}: {len(rows)} clips")


if __name__ == "__main__":
    runs.run_script(main, make_parser())
