"""Write stand-ins for both datasets, in the real files' formats.

    python -m tools.make_sample_data                                   both, into sample/
    python -m tools.make_sample_data -only ljspeech -metadata FILE     another corpus's transcripts

Writes OUT/octmnist.npz (drawn B-scans), OUT/LJSpeech-1.1/ (sentences of a small grammar, spoken by
a neural voice) and, unless -n_clips or -metadata is given, OUT/sentences/LJSpeech-1.1/ (twenty
others), all labelled as synthetic. Data that are complete are left as they are; what was
interrupted is gone on with.
"""

from pathlib import Path

import runs
from tools.sample_images import make_octmnist
from tools.sample_speech import N_CLIPS, make_ljspeech

SENTENCES = Path(__file__).with_name("sentences.csv")


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("out", type=Path, default=Path("sample"), help="folder to write to")
    parser.flag("seed", type=runs.SEED, default=42, help="same seed, same data")
    n_clips = f"spoken clips ({N_CLIPS:,}, or all rows of -metadata)"
    parser.flag("n_clips", type=runs.number(int, 1), help=n_clips)
    parser.flag("metadata", help="speak the normalised transcripts of this table of LJ Speech's")
    parser.flag("only", choices=("octmnist", "ljspeech"), help="write only this one")
    return parser


def main(args):
    if args.only != "ljspeech":
        print(make_octmnist(args.out, args.seed))
    if args.only != "octmnist":
        print(make_ljspeech(args.out, args.seed, args.n_clips, args.metadata))
        if not args.metadata and not args.n_clips:
            # sentences outside the grammar, on which the notebook shows maps
            print(make_ljspeech(args.out / "sentences", args.seed, None, SENTENCES))


if __name__ == "__main__":
    again = "give the command again, and it goes on with what is there"
    runs.run_script(main, make_parser(), after_interrupt=again)
