"""The evidence for Q3.3: short trainings of both decoders on a small grammar, with several seeds.

    python -m tools.trials -data sample -out report

Trains the LSTM decoder, the transformer decoder, and the transformer with its positions at random
as they were handed out, each with the auxiliary CTC loss and without, each with five seeds; saves
OUT/results/q3-<decoder>-trial-*.json. Several train at once, one to a processor. What was finished
before, of as many epochs and the same clips, is not trained again. (The committed results are of
2,000 sentences of the sample's earlier, larger grammar.)
"""

import os
from pathlib import Path

import runs

import torch

NOTEBOOK = runs.ROOT / "hw2-q3.ipynb"
TRIALS = [  # decoder, what its name says, settings
    ("lstm", "ctc", {}),
    ("lstm", "noctc", {"ctc_weight": 0}),
    ("transformer", "ctc", {}),
    ("transformer", "noctc", {"ctc_weight": 0}),
    ("transformer", "ctc-random", {"clock": 0}),
    ("transformer", "noctc-random", {"ctc_weight": 0, "clock": 0}),
]


def train(decoder, settings):
    """Train and test one model, on one thread, by the notebook's own functions."""
    torch.set_num_threads(1)
    q3 = runs.load_definitions(NOTEBOOK, **settings)
    corpus = q3.load_corpus(q3.settings)
    model, result = q3.train(decoder, corpus, q3.settings)
    q3.test(model, result, corpus, q3.settings)
    (Path(q3.settings.out) / "checkpoints" / f"{result['run']}.pt").unlink()


def is_trained(name, q3, corpus):
    """Whether there is a finished result of that name, of as many epochs and the same data."""
    out = Path(q3.settings.out)
    if not (out / "results" / f"{name}.json").exists():
        return False
    result = runs.load_result(out, name)
    asked = (q3.settings.epochs, corpus.info["sha256"])
    is_same = (result["config"]["epochs"], result["data"]["sha256"]) == asked
    return is_same and result["status"] == "finished"


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("data", default="sample", help="folder that holds LJSpeech-1.1/")
    parser.flag("out", default="report", help="folder for results/")
    parser.flag("epochs", type=runs.number(int, 1), default=15, help="passes over training clips")
    parser.flag("seed", type=runs.SEED, nargs="+", default=range(42, 47), help="one or several")
    return parser


def main(args):
    """Train what is not finished yet, side by side."""
    os.environ["COMMAND"] = runs.command_line()  # the results files record it
    common = {"data": args.data, "out": args.out, "epochs": args.epochs}
    q3 = runs.load_definitions(NOTEBOOK, **common)
    corpus = q3.load_corpus(q3.settings)  # features are made once, before many need them

    jobs = []
    for seed in args.seed:
        for decoder, name, settings in TRIALS:
            tag = f"-trial-{name}-seed{seed}"
            if not is_trained(f"q3-{decoder}{tag}", q3, corpus):
                jobs.append((decoder, {**common, **settings, "seed": seed, "tag": tag}))
    torch.set_num_threads(1)  # before it is forked
    for _ in runs.side_by_side(train, jobs):
        pass
    print(f"{len(jobs)} runs; results are in {args.out}/")


if __name__ == "__main__":
    again = "the same command trains what is not finished yet"
    runs.run_script(main, make_parser(), after_interrupt=again)
