"""Question 2: image classification on OCTMNIST with a CNN, with max-pooling and with strides.

    python hw2-q2.py
        one network with max-pooling
    python hw2-q2.py -learning_rate 0.1 0.01 0.001
        Q2.1: one network per learning rate; the best is chosen by validation accuracy
    python hw2-q2.py -learning_rate best -no_maxpool
        Q2.2: strides in place of pooling, at the best rate of that search

Prints every epoch's mean training loss and validation accuracy, then the test metrics, and saves
OUT/results/q2-*.json and OUT/figures/CNN-*.{pdf,png}. For Q2.3 there is
`get_number_trainable_params` and, for what else differs between the networks,
`count_multiply_accumulates` and `accuracy_shifted`.

From top to bottom: the networks, training, evaluation, the choice of a learning rate, plots, runs
and their names, and the command line, where `main` is.
"""

import functools
import math
import time
from pathlib import Path
from statistics import mean, stdev

import runs
import utils
from runs import UserError

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


# ----------------------------------------------------------------------------------------- network
class CNN(nn.Module):
    """The network of Q2.1 (max-pooling) and of Q2.2 (`no_maxpool`: strides in its place).

    Takes images (B, 784), (B, 28, 28) or (B, 1, 28, 28), uint8 or float in [0, 1]; returns
    log-probabilities (B, n_classes). ValueError for images of another shape.
    """

    def __init__(self, dropout_prob, no_maxpool=False, n_classes=4):
        super().__init__()
        self.no_maxpool = no_maxpool
        if not no_maxpool:  # Q2.1
            self.conv1 = nn.Conv2d(1, 8, kernel_size=3, stride=1, padding=1)
            self.conv2 = nn.Conv2d(8, 16, kernel_size=3, stride=1, padding=0)
            self.maxpool = nn.MaxPool2d(kernel_size=2, stride=2)
        else:  # Q2.2
            self.conv1 = nn.Conv2d(1, 8, kernel_size=3, stride=2, padding=1)
            self.conv2 = nn.Conv2d(8, 16, kernel_size=3, stride=2, padding=0)

        # A layer with kernel size k, padding p and stride s turns width n into
        # floor((n + 2p - k) / s) + 1, and the height likewise:
        #   Q2.1  conv1    floor((28 + 2 - 3) / 1) + 1 = 28
        #         maxpool  floor((28 + 0 - 2) / 2) + 1 = 14
        #         conv2    floor((14 + 0 - 3) / 1) + 1 = 12
        #         maxpool  floor((12 + 0 - 2) / 2) + 1 = 6
        #   Q2.2  conv1    floor((28 + 2 - 3) / 2) + 1 = 14
        #         conv2    floor((14 + 0 - 3) / 2) + 1 = 6
        n_features = 16 * 6 * 6  # channels x width x height, the same for both networks
        self.fc1 = nn.Linear(n_features, 320)
        self.fc2 = nn.Linear(320, 120)
        self.fc3 = nn.Linear(120, n_classes)
        self.dropout = nn.Dropout(dropout_prob)

        # In this memory layout the max-pooling network trains 16 to 19 % faster (batches of 8 and
        # 16, one thread, AMD EPYC).
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        if x.shape[1:] not in ((784,), (28, 28), (1, 28, 28)):
            raise ValueError(
                f"images must be (B, 1, 28, 28) or flat (B, 784), not {tuple(x.shape)}"
            )
        if x.dtype == torch.uint8:  # scaled here: as floats the training split would fill 300 MB
            x = x.float() / 255
        x = x.reshape(-1, 1, 28, 28)

        x = F.relu(self.conv1(x))  # (B, 8, 28, 28); strided (B, 8, 14, 14)
        if not self.no_maxpool:
            x = self.maxpool(x)  # (B, 8, 14, 14)
        x = F.relu(self.conv2(x))  # (B, 16, 12, 12); strided (B, 16, 6, 6)
        if not self.no_maxpool:
            x = self.maxpool(x)  # (B, 16, 6, 6)

        x = x.flatten(start_dim=1)  # (B, 576)
        x = F.relu(self.fc1(x))  # (B, 320)
        x = self.dropout(x)
        x = F.relu(self.fc2(x))  # (B, 120)
        x = self.fc3(x)  # (B, n_classes)
        return F.log_softmax(x, dim=1)


def get_number_trainable_params(model):
    """Number of trainable parameters (Q2.3)."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_multiply_accumulates(model):
    """Multiply-accumulates of one image's forward pass: convolutions and affine maps (Q2.3)."""
    image = torch.zeros(1, 1, 28, 28, device=model.conv1.weight.device)
    with FlopCounterMode(display=False) as counter:
        predict(model, image)
    return counter.get_total_flops() // 2  # a multiply-accumulate counts as two operations there


# ---------------------------------------------------------------------------------------- training
def train_batch(X, y, model, optimizer, criterion):
    """One optimiser step on X (B, 1, 28, 28), y (B,); returns the mean loss, a 0-d tensor."""
    optimizer.zero_grad()
    loss = criterion(model(X), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def make_optimizer(model, config):
    """The optimiser that the flags ask for."""
    optimizers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    optimizer_class = optimizers[config["optimizer"]]
    return optimizer_class(
        model.parameters(), lr=config["learning_rate"], weight_decay=config["l2_decay"]
    )


@functools.cache
def load_data(folder):
    """The images of `folder`/octmnist.npz, loaded once: the runs of a command share them."""
    return utils.load_oct_data(folder)


def train(name, config, out, rate_source=None, network=CNN, position=0):
    """Q2.1, Q2.2: train one network, then test it; returns its result, saved as `name`.json.

    The file is written after every epoch, with status "interrupted" until training and test are
    over. A run whose loss becomes infinite or NaN stops there and is not tested: "diverged".
    config: the flags, with one rate and one seed. rate_source: the search that found the rate, in
    words. network: another class than CNN, as in tools/pooling_control.py. position: the line of
    the progress bar.
    """
    torch.set_num_threads(1)  # runs train side by side; alone, a second thread gains little
    runs.configure_seed(config["seed"])
    device = runs.pick_device(config["device"])
    splits, data = load_data(config["data"])
    splits = {split: (X.to(device), y.to(device)) for split, (X, y) in splits.items()}
    X, y = splits["train"]
    model = network(config["dropout"], config["no_maxpool"]).to(device)
    optimizer = make_optimizer(model, config)

    result = runs.new_result("q2", name, runs.command_line(), config, data, device)
    result["started"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    result["search"] = rate_source
    result["parameters"] = get_number_trainable_params(model)
    result["multiply_accumulates"] = count_multiply_accumulates(model)

    n_batches = config["epochs"] * math.ceil(len(X) / config["batch_size"])
    progress = tqdm(total=n_batches, desc=name, position=position, leave=False, disable=runs.QUIET)
    for epoch in range(1, config["epochs"] + 1):
        started = time.perf_counter()
        model.train()
        total_loss = torch.zeros((), device=device)
        order = torch.randperm(len(X)).to(device)  # drawn on the CPU: the same on every device
        for batch in order.split(config["batch_size"]):
            loss = train_batch(X[batch], y[batch], model, optimizer, F.nll_loss)
            total_loss += loss * len(batch)
            progress.update()
        train_loss = total_loss.item() / len(X)  # of each image when its batch came
        if not math.isfinite(train_loss):
            result["status"] = "diverged"
            progress.write(f"{name}  epoch {epoch:3}  the loss became infinite or NaN")
            break

        accuracy = evaluate(model, *splits["val"])
        seconds = time.perf_counter() - started
        progress.write(
            f"{name}  epoch {epoch:3}  "
            f"loss {train_loss:.4f}  val accuracy {accuracy:.4f}  {seconds:6.1f} s"
        )
        row = {
            "epoch": epoch,
            "train_loss": train_loss,
            "val_accuracy": accuracy,
            "seconds": seconds,
        }
        result["epochs"].append(row)
        result["seconds"] += seconds
        runs.save_result(out, result)
    progress.close()

    if result["status"] != "diverged":
        result["test"] = test_metrics(model, *splits["test"])
        result["status"] = "finished"
    runs.save_result(out, result)
    return result


# -------------------------------------------------------------------------------------- evaluation
EVALUATION_BATCH = 500  # images in one forward pass: bounds the memory of evaluating a whole split
COURSE_SUBSET = (182, 55, 42, 250)  # the course's 529 test images: the first ones of each class
SHIFTS = (0, 1, 2, 3)  # pixels by which test images are moved: tolerance to translation (Q2.3)


@torch.inference_mode()
def predict(model, X):
    """Log-probabilities (N, n_classes) of images X (N, 1, 28, 28), in chunks: bounded memory."""
    model.eval()
    return torch.cat([model(chunk) for chunk in X.split(EVALUATION_BATCH)])


def evaluate(model, X, y):
    """Accuracy in [0, 1] on X (N, 1, 28, 28), y (N,) or, as MedMNIST has them, (N, 1)."""
    if y.shape not in ((len(X),), (len(X), 1)):
        raise ValueError(f"labels must be (N,) or (N, 1) for {len(X)} images, not {tuple(y.shape)}")
    hits = predict(model, X).argmax(dim=1) == y.flatten()
    return hits.sum().item() / len(y)


def test_metrics(model, X, y):
    """All metrics on the test images X (N, 1, 28, 28), y (N,), as a results file has them.

    Accuracy and AUC are those of medmnist.Evaluator; confusion has a row per true class. A metric
    that these images do not allow (too few, or a class missing) is None.
    """
    log_probabilities = predict(model, X).cpu()  # (N, n_classes)
    predicted = log_probabilities.argmax(dim=1)
    truth = y.cpu().flatten()
    n_classes = log_probabilities.shape[1]
    confusion = (truth * n_classes + predicted).bincount(minlength=n_classes**2)
    return {
        "accuracy": (predicted == truth).sum().item() / len(truth),
        "auc": mean_auc(log_probabilities.exp(), truth),
        "accuracy_course_subset": accuracy_course_subset(predicted, truth),
        "confusion": confusion.view(n_classes, n_classes).tolist(),
        "accuracy_shifted": [accuracy_shifted(model, X, y, pixels) for pixels in SHIFTS],
    }


def mean_auc(probabilities, truth):
    """The mean over the classes of the AUC of each against the others.

    probabilities (N, n_classes), truth (N,). None if a class does not occur in `truth`, or a
    probability is NaN.
    """
    if len(truth.unique()) < probabilities.shape[1] or probabilities.isnan().any():
        return None
    return roc_auc_score(truth, probabilities, multi_class="ovr")


def accuracy_course_subset(predicted, truth):
    """Accuracy on the course's 529 of OCTMNIST's 1,000 test images; None where there are fewer."""
    n_hits = 0
    for label, size in enumerate(COURSE_SUBSET):
        hits = (predicted == truth)[truth == label]
        if len(hits) < size:
            return None
        n_hits += hits[:size].sum().item()
    return n_hits / sum(COURSE_SUBSET)


def accuracy_shifted(model, X, y, pixels):
    """Mean accuracy on X (N, 1, 28, 28), y (N,) when all images move left, up, down and right."""
    directions = {(0, -pixels), (0, pixels), (-pixels, 0), (pixels, 0)}  # 0 pixels: only one
    return mean(evaluate(model, shifted(X, dy, dx), y) for dy, dx in directions)


def shifted(X, dy, dx):
    """X (N, 1, 28, 28) moved up by dy and left by dx pixels, its edges repeated."""
    rows = (torch.arange(28) + dy).clamp(0, 27)
    columns = (torch.arange(28) + dx).clamp(0, 27)
    return X[..., rows, :][..., columns]


# ---------------------------------------------------------------------------------- learning rates
METRICS = ("val_accuracy", "accuracy", "auc", "accuracy_course_subset")
SETTINGS = ("epochs", "batch_size", "l2_decay", "dropout", "optimizer")  # equal within a search


def by_rate(results):
    """{learning rate: its results}, from the largest rate to the smallest."""
    groups = {}
    for result in results:
        groups.setdefault(result["config"]["learning_rate"], []).append(result)
    return {rate: groups[rate] for rate in sorted(groups, reverse=True)}


def mean_and_deviation(values):
    """[mean, standard deviation]; the deviation of one value is None; [] for no values."""
    if not values:
        return []
    return [mean(values), stdev(values) if len(values) > 1 else None]


def summarise(results):
    """A row per learning rate: how many runs finished, mean and deviation of each of METRICS."""
    table = []
    for rate, group in by_rate(results).items():
        finished = [result for result in group if result["status"] == "finished"]
        n_diverged = len(group) - len(finished)
        row = {"learning_rate": rate, "finished": len(finished), "diverged": n_diverged}
        values = {key: [result["test"].get(key) for result in finished] for key in METRICS}
        values["val_accuracy"] = [result["epochs"][-1]["val_accuracy"] for result in finished]
        for key in METRICS:
            row[key] = mean_and_deviation([value for value in values[key] if value is not None])
        table.append(row)
    return table


def print_table(table):
    print(f"\n{'learning_rate':>13}{'finished':>10}" + "".join(f"{key:>24}" for key in METRICS))
    for row in table:
        finished = f"{row['finished']} of {row['finished'] + row['diverged']}"
        line = f"{row['learning_rate']:>13}{finished:>10}"
        for key in METRICS:
            numbers = [f"{value:.4f}" for value in row[key] if value is not None]
            cell = " ± ".join(numbers) or "-"
            line += f"{cell:>24}"
        print(line)


def best_row(table):
    """Q2.1: the row of highest validation accuracy. The test split has no say in this.

    Only a rate at which the runs of all seeds finished can win: a mean over those that did not
    diverge would let one lucky run beat five good ones.
    """
    eligible = [row for row in table if row["diverged"] == 0]
    if not eligible:
        rates = ", ".join(f"{row['learning_rate']} ({row['diverged']})" for row in table)
        raise UserError(
            f"the loss became infinite or NaN at every learning rate (in so many runs): {rates}; "
            "try smaller ones."
        )
    return max(eligible, key=lambda row: row["val_accuracy"][0])


def save_search(args, results, table, best):
    """Save table and choice as OUT/results/q2-<name>.json, the strided network's as -strided.

    An earlier search with other flags or data is set aside under another name.
    """
    first = results[0]
    shared = ("question", "command", "started", "data", "environment", "parameters")
    search = {
        "run": f"q2-{args.name}-strided" if args.no_maxpool else f"q2-{args.name}",
        **{key: first[key] for key in shared if key in first},
        "config": {**first["config"], "learning_rate": args.learning_rate, "seed": args.seed},
        "status": "finished",
        "runs": [result["run"] for result in results],
        "table": table,
        "chosen_by": "val_accuracy",
        "best": best,
    }
    path = Path(args.out) / "results" / f"{search['run']}.json"
    if path.exists():
        before = runs.load_result(args.out, search["run"])
        flags = ("learning_rate", "seed", *SETTINGS)
        has_same_flags = all(before["config"][f] == search["config"][f] for f in flags)
        if not has_same_flags or before["data"]["sha256"] != search["data"]["sha256"]:
            runs.set_aside(path)
    runs.save_result(args.out, search)


def load_search(args):
    """The search whose best rate `-learning_rate best` takes, and the results of its runs.

    Q2.2 takes the rate that was best in Q2.1, with max-pooling. UserError unless there is a search
    of the same seeds, settings and data.
    """
    name = f"q2-{args.name}"
    again = "search with -learning_rate 0.1 0.01 0.001 and the same other flags first"
    if not (Path(args.out) / "results" / f"{name}.json").exists():
        raise UserError(f"{args.out}/results has no {name}.json; {again}.")
    search = runs.load_result(args.out, name)
    for flag in ("seed", *SETTINGS):
        had, now = search["config"][flag], getattr(args, flag)
        if had != now:
            raise UserError(f"{name} in {args.out} had {flag} {had}, not {now}; {again}.")
    if not args.plot_only:  # which needs no data
        _, data = load_data(args.data)
        if data["sha256"] != search["data"]["sha256"]:
            source = search["data"]["source"]
            raise UserError(f"{name} in {args.out} is of other data ({source}); {again}.")
    return search, load_results(args, search["runs"], f"the search {name}")


def describe(search):
    """Which search it is: its name, rates, seeds, data, commit and date."""
    config = search["config"]
    parts = [
        f"rates {', '.join(map(str, config['learning_rate']))}",
        f"seeds {', '.join(map(str, config['seed']))}",
        search["data"]["source"],
        f"commit {(search['environment'].get('commit') or 'unknown')[:10]}",
        f"started {search.get('started', 'at an unknown time')}",
    ]
    return f"{search['run']} ({'; '.join(parts)})"


# ------------------------------------------------------------------------------------------- plots
def plot(curves, legend, name, out, source):
    """Training loss and validation accuracy against the epoch, a line per label.

    curves: {label: results}; legend: its title. A line is the mean over the seeds, its band reaches
    from the least to the greatest of them, and both end where the first run diverged.
    """
    figure, panels = utils.pyplot().subplots(1, 2, figsize=(6.0, 2.2), layout="constrained")
    measures = {"train_loss": "Training loss", "val_accuracy": "Validation accuracy"}
    for axes, (key, ylabel) in zip(panels, measures.items(), strict=True):
        for label, results in curves.items():
            values = [[row[key] for row in result["epochs"]] for result in results]
            n_epochs = min(map(len, values))
            values = np.array([run[:n_epochs] for run in values])  # (seeds, epochs)
            epochs = np.arange(1, n_epochs + 1)
            axes.plot(epochs, values.mean(axis=0), label=label, linewidth=1.2)
            axes.fill_between(
                epochs, values.min(axis=0), values.max(axis=0), alpha=0.2, linewidth=0
            )
        axes.set(xlabel="Epoch", ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[1].set_ylim(0, 1)
    n_seeds = max(map(len, curves.values()))
    if n_seeds > 1:
        legend += f"; mean of {n_seeds} seeds, band: least to greatest"
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, title=legend, loc="outside upper center", ncols=len(labels), frameon=False
    )
    utils.save_figure(figure, out, name, source)


def plot_results(args, results, searched, source):
    """The figure of a command: the rates of a search, both networks at the best, or one network.

    searched: with `-learning_rate best` the results of that search.
    """
    groups = by_rate(results)
    network = network_name(results[0]["config"])
    if len(groups) > 1:
        legend = "learning rate"
        name = "CNN-rates-strided" if args.no_maxpool else "CNN-rates"
        curves = groups
    else:
        (rate,) = groups
        legend = f"learning rate {rate}"
        name = f"CNN-{network}-lr{rate}"
        curves = {"strides" if args.no_maxpool else "max-pooling": results}
        if searched and args.no_maxpool:
            name = "CNN-networks"
            curves = {"max-pooling": by_rate(searched)[rate], **curves}
    plot(curves, legend, name + name_ending(results[0]["config"]), args.out, source)


# -------------------------------------------------------------------------------------------- runs
def network_name(config):
    return "strided" if config["no_maxpool"] else "maxpool"


def name_ending(config):
    """The settings that differ from the defaults, to end a name with: "" or "-epochs150", say."""
    default = make_parser().get_default
    changed = [flag for flag in SETTINGS if config[flag] != default(flag)]
    return "".join(f"-{flag}{config[flag]}" for flag in changed)


def plan_runs(args, rates):
    """A run for every rate and seed: {its name, such as q2-maxpool-lr0.01-seed42: its config}."""
    planned = {}
    for rate in rates:
        for seed in args.seed:
            config = {**vars(args), "learning_rate": rate, "seed": seed}
            del config["out"], config["name"], config["plot_only"]  # which do not change the result
            name = f"q2-{network_name(config)}-lr{rate}-seed{seed}{name_ending(config)}"
            planned[name] = config
    return planned


def train_all(planned, out, rate_source=None, network=CNN):
    """Train the `planned` {name: config}; returns the results, in that order.

    On the CPU they train side by side, in a process each; on a GPU in turns, as each process would
    need memory of its own there.
    """
    jobs = []
    for position, (name, config) in enumerate(planned.items()):
        jobs.append((name, config, out, rate_source, network, position))
    first = jobs[0][1]
    load_data(first["data"])  # here, so that forked processes share the images
    if runs.pick_device(first["device"]).type != "cpu":
        return [train(*job) for job in jobs]
    # Two per processor, so that three rates on two processors all train at once.
    return list(runs.side_by_side(train, jobs, n_processes=2 * runs.usable_cpus()))


def load_results(args, names, command="the same command without -plot_only"):
    """The results of these runs, which `command` saved."""
    results = [runs.load_result(args.out, name, command) for name in names]
    if any(result["status"] == "interrupted" for result in results):
        raise UserError(f"a run in {args.out} was interrupted; run {command} first.")
    return results


def common_source(args, results):
    """Where the data of all these results are from; UserError unless they are the same data."""
    if len({result["data"]["sha256"] for result in results}) > 1:
        again = "train all of them again, without -plot_only"
        raise UserError(f"the results in {args.out} are not all of the same data; {again}.")
    return results[0]["data"]["source"]


# ------------------------------------------------------------------------------------ command line
def make_parser():
    """The course's flags, and where data and results are."""
    whole = runs.number(int, low=1)
    share = runs.number(float, low=0, below=1)
    decay = runs.number(float, low=0)
    rate = runs.number(float, above=0, or_word="best")
    parser = runs.ArgumentParser(__doc__)
    parser.flag("epochs", type=whole, default=15, help="passes over the training images")
    parser.flag("batch_size", type=whole, default=8, help="images per optimiser step")
    parser.flag("learning_rate", type=rate, nargs="+", default=[0.01], help="one, several, or best")
    parser.flag("l2_decay", type=decay, default=0.0, help="weight decay")
    parser.flag("dropout", type=share, default=0.7, help="dropout probability")
    parser.flag("optimizer", choices=("sgd", "adam"), default="sgd", help="optimiser")
    parser.flag("no_maxpool", action="store_true", help="strides of 2 instead of pooling (Q2.2)")
    parser.flag("data", default="data", help="folder that holds octmnist.npz")
    parser.flag("out", help="folder for results/ and figures/; by default build/ and -data's name")
    parser.flag("name", default="search", help="of the file that a search writes, and best reads")
    parser.flag("seed", type=runs.SEED, nargs="+", default=[42], help="one or several")
    parser.flag("device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.flag("plot_only", action="store_true", help="take the results in OUT; do not train")
    return parser


def check_flags(args):
    """Refuse contradictions; sort the rates, largest first, and the seeds."""
    args.out = args.out or runs.default_out(args.data)
    if "best" in args.learning_rate and len(args.learning_rate) > 1:
        raise UserError("-learning_rate best stands alone; leave out the other rates, or best.")
    for flag in ("learning_rate", "seed"):
        values = getattr(args, flag)
        if len(set(values)) < len(values):
            raise UserError(f"-{flag} {' '.join(map(str, values))} has one twice; give each once.")
    args.learning_rate.sort(reverse=True)
    args.seed.sort()


def main(args):
    """Train every learning rate with every seed, or load that; print, choose, save, draw."""
    check_flags(args)
    runs.check_writable(args.out)
    rates, rate_source, searched = args.learning_rate, None, []
    if rates == ["best"]:
        search, searched = load_search(args)
        rates, rate_source = [search["best"]["learning_rate"]], describe(search)
        print(f"learning rate {rates[0]}: the best by {rate_source}")

    planned = plan_runs(args, rates)
    if args.plot_only:
        results = load_results(args, planned)
    else:
        results = train_all(planned, args.out, rate_source)
    source = common_source(args, [*results, *searched])
    table = summarise(results)
    print_table(table)
    if len(rates) > 1:
        best = best_row(table)
        save_search(args, results, table, best)
        print(f"best by validation accuracy: learning rate {best['learning_rate']}")
    elif not table[0]["finished"]:
        raise UserError("the loss became infinite or NaN in every run; try a smaller rate.")
    plot_results(args, results, searched, source)
    print(f"data: {source}; results and figures are in {args.out}/")


if __name__ == "__main__":
    runs.run_script(main, make_parser(), if_memory_runs_out="a smaller -batch_size")
