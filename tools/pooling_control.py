"""A control for Q2.3: the max-pool network with *average* pooling in place of the maximum.

    python -m tools.pooling_control -data ../shared/data/octmnist -out report

Like max-pooling, averages see the convolution at all positions; like strides, they select none of
them. Five seeds at the setting of the report's comparison, 150 epochs at learning rate 0.01; saves
OUT/results/q2-avgpool-*.json.
"""

import runs
from tools.definitions import load_script

from torch import nn


def with_average_pooling():
    """hw2-q2.py as a module whose CNN takes the mean of each 2x2 window, not its maximum."""
    q2 = load_script("hw2-q2")

    class AveragePoolingCNN(q2.CNN):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.maxpool = nn.AvgPool2d(kernel_size=2, stride=2)

    q2.CNN = AveragePoolingCNN
    return q2


def train_run(*arguments):
    """hw2-q2.py's `train_run`, in a process of its own, of the other network."""
    return with_average_pooling().train_run(*arguments)


def plan_runs(args):
    """A run for every seed: {its name: its config}."""
    flags = ["-data", args.data, "-epochs", str(args.epochs), "-seed", *map(str, args.seed)]
    q2 = load_script("hw2-q2")
    planned = {}
    for name, config in q2.plan_runs(q2.make_parser().parse_args(flags), [0.01]).items():
        planned[name.replace("maxpool", "avgpool")] = {**config, "pooling": "average"}
    return planned


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    whole = runs.number(int, 1)
    parser.flag("data", default="data", help="folder that holds octmnist.npz")
    parser.flag("out", default="report", help="folder for results/")
    parser.flag("epochs", type=whole, default=150, help="passes over the training images")
    parser.flag("seed", type=runs.SEED, nargs="+", default=range(42, 47), help="one or several")
    return parser


def main(args):
    """Train the seeds side by side and print their table."""
    runs.check_writable(args.out)
    planned = plan_runs(args)
    command = runs.command_line()
    jobs = []
    for position, (name, config) in enumerate(planned.items()):
        jobs.append((name, config, args.out, command, position))
    advice = "close other programs, and the same command goes on from the saved epochs"
    results = list(runs.side_by_side(train_run, jobs, runs.usable_cpus(), advice))
    q2 = load_script("hw2-q2")
    q2.delete_checkpoints(planned, args.out)
    q2.print_table(q2.summarise(results))
    print(f"data: {results[0]['data']['source']}; results are in {args.out}/")


if __name__ == "__main__":
    again = "finished epochs are saved; the same command goes on from there"
    runs.run_script(main, make_parser(), after_interrupt=again)
