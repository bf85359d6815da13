"""Write offline stand-ins for both datasets, in the real file formats, where the real data is not.

    python -m tools.make_sample_data                                   both, into sample/
    python -m tools.make_sample_data -only ljspeech -metadata FILE     another corpus's transcripts

Writes OUT/octmnist.npz (B-scans drawn by a small procedural model) and OUT/LJSpeech-1.1/ (sentences
spoken by a neural voice), labelled as synthetic, the same for the same seed; prints one line for
each. A second call with the same settings does nothing; an interrupted one goes on where it was.
"""

from pathlib import Path

import runs
from tools.sample_images import make_octmnist
from tools.sample_speech import N_CLIPS, make_ljspeech


def make_parser():
    """What to write, and where."""
    parser = runs.ArgumentParser(__doc__)
    parser.flag("out", type=Path, default=Path("sample"), help="folder to write to")
    parser.flag("seed", type=runs.SEED, default=42, help="same seed, same data")
    n_clips = f"spoken clips: {N_CLIPS:,} sentences, or all rows of -metadata"
    parser.flag("n_clips", type=runs.number(int, 1), help=n_clips)
    metadata = "speak the normalised transcripts of this file (id|transcript|normalised) instead"
    parser.flag("metadata", help=metadata)
    parser.flag("only", choices=("octmnist", "ljspeech"), help="write only this one")
    return parser


def main(args):
    """Write what was asked for; prints one line for each dataset."""
    if args.only != "ljspeech":
        print(make_octmnist(args.out, args.seed))
    if args.only != "octmnist":
        print(make_ljspeech(args.out, args.seed, args.n_clips, args.metadata))


if __name__ == "__main__":
    again = "give the command again, and it goes on with what is there"
    runs.run_script(main, make_parser(), after_interrupt=again)
