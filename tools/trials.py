"""The evidence for Q3.3: short trainings of both decoders on the sample, with several seeds.

    python -m tools.trials -data sample -out report

Trains the LSTM decoder, the transformer decoder, and the transformer with its positions at random
as they were handed out, each with the auxiliary CTC loss and without, each with five seeds; saves
OUT/results/q3-<decoder>-trial-*.json. Several train at once, one to a processor. What was finished
before is not trained again, and an interrupted run goes on from its last epoch.
"""

import os
from pathlib import Path

import runs
from tools.definitions import load_definitions

import torch

KINDS = {  # what a run's name says: its settings
    "ctc": {},
    "noctc": {"CTC_WEIGHT": "0"},
    "ctc-random": {"CLOCK": "0"},
    "noctc-random": {"CTC_WEIGHT": "0", "CLOCK": "0"},
}


def plan_runs(args):
    """A run for every decoder, kind and seed: {its name: (decoder, settings of the notebook)}."""
    planned = {}
    for seed in args.seed:
        for kind, settings in KINDS.items():
            for decoder in ("lstm", "transformer"):
                if decoder == "lstm" and "random" in kind:
                    continue  # it has no positions
                tag = f"-trial-{kind}-seed{seed}"
                common = {"DATA": args.data, "OUT": args.out, "TAG": tag, "SEED": str(seed)}
                common["EPOCHS"] = str(args.epochs)
                planned[f"q3-{decoder}{tag}"] = (decoder, {**common, **settings})
    return planned


def is_finished(out, name):
    """Whether there is a result of that name already."""
    if not (Path(out) / "results" / f"{name}.json").exists():
        return False
    return runs.load_result(out, name)["status"] == "finished"


def train_run(name, decoder, settings, command):
    """Train and test one model, on one thread, by the notebook's own functions."""
    torch.set_num_threads(1)
    os.environ["COMMAND"] = command
    q3 = load_definitions(**settings)
    corpus = q3["load_corpus"](q3["settings"])
    model, result = q3["train"](decoder, corpus, q3["settings"])
    q3["test"](model, result, corpus, q3["settings"])
    (Path(settings["OUT"]) / "checkpoints" / f"{name}.pt").unlink(missing_ok=True)


def make_parser():
    whole = runs.number(int, 1)
    parser = runs.ArgumentParser(__doc__)
    parser.flag("data", default="sample", help="folder that holds LJSpeech-1.1/")
    parser.flag("out", default="report", help="folder for results/")
    parser.flag("epochs", type=whole, default=15, help="passes over the training clips")
    parser.flag("seed", type=runs.SEED, nargs="+", default=range(42, 47), help="one or several")
    return parser


def main(args):
    """Train what is not finished yet, side by side."""
    runs.check_writable(args.out)
    q3 = load_definitions(DATA=args.data, OUT=args.out)
    q3["load_corpus"](q3["settings"])  # features are made once, before many need them
    command = runs.command_line()
    jobs = []
    for name, (decoder, settings) in plan_runs(args).items():
        if not is_finished(args.out, name):
            jobs.append((name, decoder, settings, command))
    advice = "close other programs, and the same command goes on from the saved epochs"
    for _ in runs.side_by_side(train_run, jobs, runs.usable_cpus(), advice):
        pass
    print(f"{len(jobs)} runs; results are in {args.out}/")


if __name__ == "__main__":
    again = "finished epochs are saved; the same command goes on from there"
    runs.run_script(main, make_parser(), after_interrupt=again)
