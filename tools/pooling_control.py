"""A control for Q2.3: the max-pool network with *average* pooling in place of the maximum.

    python -m tools.pooling_control -data FOLDER -out report
    python -m tools.pooling_control -out report -compare_only

Like max-pooling, averages see the convolution at all positions; like strides, they select none of
them. Trains five seeds at the setting of the report's comparison, 150 epochs at learning rate 0.01,
saves OUT/results/q2-avgpool-*.json, and compares them with the two networks of hw2-q2.py, which
must be in OUT already: OUT/results/q2-control.json.
"""

import importlib
import math
from statistics import mean, stdev

import runs
from runs import UserError

from scipy.stats import t as student_t
from torch import nn

q2 = importlib.import_module("hw2-q2")
RATE = 0.01


class AveragePoolingCNN(q2.CNN):
    """hw2-q2.py's CNN, taking the mean of each 2x2 window, not its maximum."""

    def __init__(self, dropout_prob, no_maxpool=False):
        super().__init__(dropout_prob, no_maxpool)
        self.maxpool = nn.AvgPool2d(kernel_size=2, stride=2)


def plan_runs(args, network):
    """A run of hw2-q2.py's for every seed: {its name, with `network` in it: its config}."""
    flags = ["-data", args.data, "-epochs", str(args.epochs), "-seed", *map(str, args.seed)]
    if network == "strided":
        flags.append("-no_maxpool")
    planned = q2.plan_runs(q2.make_parser().parse_args(flags), [RATE])
    if network == "avgpool":
        planned = {
            name.replace("maxpool", "avgpool"): {**config, "pooling": "average"}
            for name, config in planned.items()
        }
    return planned


def share_with_interval(parts, wholes, confidence=0.95):
    """The share mean(parts) / mean(wholes) of paired values, and Fieller's interval for it.

    The interval holds every share r that a paired t test of parts - r * wholes does not reject:

        mean(parts - r wholes)^2 <= t^2 / n * variance(parts - r wholes),

    which is a r^2 - 2 b r + c <= 0 with the a, b and c below.
    """
    n = len(parts)
    part, whole = mean(parts), mean(wholes)
    covariance = sum((p - part) * (w - whole) for p, w in zip(parts, wholes)) / (n - 1)
    k = student_t.ppf((1 + confidence) / 2, n - 1) ** 2 / n
    a = whole**2 - k * stdev(wholes) ** 2
    b = part * whole - k * covariance
    c = part**2 - k * stdev(parts) ** 2
    if a <= 0:
        raise UserError("the networks differ too little from each other for a share of it.")
    width = math.sqrt(b**2 - a * c)
    return part / whole, [(b - width) / a, (b + width) / a]


def compare(args):
    """Save, as q2-control.json, which share of max-pooling's lead average pooling leaves."""
    again = "hw2-q2.py and this tool with the same -epochs and -seed"
    results, accuracies = [], {}
    for network in ("maxpool", "avgpool", "strided"):
        group = [runs.load_result(args.out, name, again) for name in plan_runs(args, network)]
        if any(result["status"] != "finished" for result in group):
            raise UserError(f"a run of {network} has not finished; run {again} first.")
        accuracies[network] = [result["test"]["accuracy"] for result in group]
        results += group
    if len({result["data"]["sha256"] for result in results}) > 1:
        raise UserError(f"the results in {args.out} are of different data; run {again} first.")

    triples = list(zip(*accuracies.values()))  # (max-pooling, average pooling, strides) per seed
    over_average = [pooled - average for pooled, average, _ in triples]
    over_strides = [pooled - strided for pooled, _, strided in triples]
    share, interval = share_with_interval(over_average, over_strides)
    result = {
        "question": "q2",
        "run": "q2-control",
        "command": runs.command_line(),
        "data": results[0]["data"],
        "config": {"learning_rate": RATE, "epochs": args.epochs, "seed": list(args.seed)},
        "status": "finished",
        "runs": [result["run"] for result in results],
        "accuracy": accuracies,
        "share_left": share,
        "interval": interval,
        "interval_method": "Fieller, 95 %, paired by seed",
    }
    runs.save_result(args.out, result)
    low, high = interval
    print(
        f"of max-pooling's lead over strides, average pooling leaves {share:.0%} "
        f"({low:.0%} to {high:.0%}, {result['interval_method']})"
    )


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    whole = runs.number(int, low=1)
    parser.flag("data", default="sample", help="folder that holds octmnist.npz")
    parser.flag("out", default="build/sample", help="folder for results/")
    parser.flag("epochs", type=whole, default=150, help="passes over the training images")
    parser.flag("seed", type=runs.SEED, nargs="+", default=[42, 43, 44, 45, 46], help="two or more")
    parser.flag("compare_only", action="store_true", help="compare what OUT holds, train nothing")
    return parser


def main(args):
    """Train the seeds side by side, print their table, and compare."""
    runs.check_writable(args.out)
    if len(args.seed) < 2:
        raise UserError("an interval needs at least two seeds; give -seed more of them.")
    if not args.compare_only:
        planned = plan_runs(args, "avgpool")
        results = q2.train_runs(planned, args.out, network=AveragePoolingCNN)
        q2.print_table(q2.summarise(results))
        print(f"data: {results[0]['data']['source']}; results are in {args.out}/")
    compare(args)


if __name__ == "__main__":
    runs.run_script(main, make_parser(), if_memory_runs_out="fewer -seed at a time")
