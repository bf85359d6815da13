"""A control for Q2.3: the max-pool network with *average* pooling in place of the maximum.

    python -m tools.pooling_control -data FOLDER
    python -m tools.pooling_control -data FOLDER -epochs 15 -learning_rate 0.1

Like max-pooling, averaging computes the convolution at every position; like a stride, it does not
pick the largest value. Trains five seeds, by default with the settings of the report's comparison,
and saves OUT/results/q2-avgpool-*.json.
"""

import importlib

import runs

from torch import nn

q2 = importlib.import_module("hw2-q2")


class AveragePoolingCNN(q2.CNN):
    """hw2-q2.py's CNN with the mean of each 2x2 window in place of its maximum."""

    def __init__(self, dropout_prob, no_maxpool=False):
        super().__init__(dropout_prob, no_maxpool)
        self.maxpool = nn.AvgPool2d(kernel_size=2, stride=2)


def plan_runs(args):
    """A run for every seed, as hw2-q2.py plans it: {its name: its config}."""
    flags = ["-data", args.data, "-epochs", str(args.epochs), "-seed", *map(str, args.seed)]
    planned = q2.plan_runs(q2.make_parser().parse_args(flags), [args.learning_rate])
    return {
        name.replace("maxpool", "avgpool"): {**config, "pooling": "average"}
        for name, config in planned.items()
    }


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    whole, rate = runs.number(int, low=1), runs.number(float, above=0)
    parser.flag("data", default="data", help="folder that holds octmnist.npz")
    parser.flag("out", help="folder for results/; by default build/ and -data's name")
    parser.flag("epochs", type=whole, default=150, help="passes over the training images")
    parser.flag("learning_rate", type=rate, default=0.01, help="of all of them")
    parser.flag("seed", type=runs.SEED, nargs="+", default=[42, 43, 44, 45, 46], help="one or more")
    return parser


def main(args):
    """Train the seeds side by side, and print their table."""
    args.out = args.out or runs.default_out(args.data)
    runs.check_writable(args.out)
    results = q2.train_all(plan_runs(args), args.out, network=AveragePoolingCNN)
    q2.print_table(q2.summarise(results))
    print(f"data: {results[0]['data']['source']}; results are in {args.out}/")


if __name__ == "__main__":
    runs.run_script(main, make_parser(), if_memory_runs_out="fewer -seed at a time")
