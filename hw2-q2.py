"""Question 2: image classification on OCTMNIST with a CNN, with max-pooling and with strides.

    python hw2-q2.py -data sample -out build/sample
        one network with max-pooling
    python hw2-q2.py -data sample -out build/sample -learning_rate 0.1 0.01 0.001
        Q2.1: one network per learning rate; the best is chosen by validation accuracy
    python hw2-q2.py -data sample -out build/sample -learning_rate best -no_maxpool
        Q2.2: strides in place of pooling, at the best rate of that search

Prints every epoch's mean training loss and validation accuracy, then the test metrics, and saves
OUT/results/q2-*.json and OUT/figures/CNN-*.{pdf,png}. A network takes about 30 s on the sample and
5 minutes on OCTMNIST. Q2.3's counts are `get_number_trainable_params` and, for what else differs
between the networks, `count_multiply_accumulates` and `accuracy_shifted`.
"""

import math
import shlex
import sys
import time
from pathlib import Path
from statistics import mean, stdev

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import runs
import utils
from runs import UserError

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm


# ----------------------------------------------------------------------------------------- network
class CNN(nn.Module):
    """The network of Q2.1 (max-pooling) and of Q2.2 (`no_maxpool`: strides in its place).

    Takes images (B, 784), (B, 28, 28) or (B, 1, 28, 28), uint8 or float in [0, 1]; returns
    log-probabilities (B, n_classes).
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

        # This memory layout saves 16 to 19 % of an epoch with max-pooling (batches of 8 and 16, one
        # thread, AMD EPYC), and costs the strided network nothing.
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
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
    return counter.get_total_flops() // 2  # it counts the multiplication and the addition


# ---------------------------------------------------------------------------------------- training
def train_batch(X, y, model, optimizer, criterion):
    """One optimiser step on X (B, 1, 28, 28), y (B,); returns the mean loss, a 0-d tensor."""
    optimizer.zero_grad()
    loss = criterion(model(X), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_epoch(X, y, model, optimizer, criterion, batch_size, progress):
    """One pass over X (N, 1, 28, 28), y (N,) in random order; returns its mean loss per image.

    `progress.update()` is called after every batch.
    """
    model.train()
    total = torch.zeros((), device=X.device)
    order = torch.randperm(len(X)).to(X.device)
    for batch in order.split(batch_size):
        loss = train_batch(X[batch], y[batch], model, optimizer, criterion)
        total += loss * len(batch)
        progress.update()
    return total.item() / len(X)


def make_optimizer(model, config):
    """The optimiser that the flags ask for."""
    optimizers = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    optimizer_class = optimizers[config["optimizer"]]
    return optimizer_class(
        model.parameters(), lr=config["learning_rate"], weight_decay=config["l2_decay"]
    )


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
    """Accuracy in [0, 1] on X (N, 1, 28, 28), y (N,)."""
    hits = predict(model, X).argmax(dim=1) == y
    return hits.sum().item() / len(y)


def test_metrics(model, X, y):
    """All metrics on the test images X (N, 1, 28, 28), y (N,), as a results file has them.

    Accuracy and AUC are those of medmnist.Evaluator; confusion has a row per true class. A metric
    that these images do not allow (too few, or a class missing) is None.
    """
    # pandas and scikit-learn come with these: 1 s, for which training need not wait
    from medmnist.evaluator import getACC, getAUC
    from sklearn.metrics import confusion_matrix

    log_probabilities = predict(model, X).cpu()  # (N, n_classes)
    predicted = log_probabilities.argmax(dim=1)
    probabilities = log_probabilities.exp().numpy()
    truth = y.cpu()
    classes = range(log_probabilities.shape[1])
    has_every_class = len(truth.unique()) == len(classes)
    return {
        "accuracy": getACC(truth.numpy(), probabilities, "multi-class"),
        "auc": getAUC(truth.numpy(), probabilities, "multi-class") if has_every_class else None,
        "accuracy_course_subset": accuracy_course_subset(predicted, truth),
        "confusion": confusion_matrix(truth, predicted, labels=classes).tolist(),
        "accuracy_shifted": [accuracy_shifted(model, X, y, pixels) for pixels in SHIFTS],
    }


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
    directions = {(0, -pixels), (0, pixels), (-pixels, 0), (pixels, 0)}  # 0 pixels: a single one
    return mean(evaluate(model, shifted(X, dy, dx), y) for dy, dx in directions)


def shifted(X, dy, dx):
    """X (N, 1, 28, 28) moved up by dy and left by dx pixels, its edges repeated."""
    rows = (torch.arange(28) + dy).clamp(0, 27)
    columns = (torch.arange(28) + dx).clamp(0, 27)
    return X[..., rows, :][..., columns]


# -------------------------------------------------------------------------------------------- runs
NAMED_FLAGS = ("epochs", "batch_size", "l2_decay", "dropout", "optimizer")


def changed_flags(config):
    """The flags that a name tells because they differ from their defaults: [(flag, value), ...]."""
    default = make_parser().get_default
    return [(flag, config[flag]) for flag in NAMED_FLAGS if config[flag] != default(flag)]


def name_ending(config):
    """The end of the names of results and figures, "" or, for example, "-epochs150"."""
    return "".join(f"-{flag}{value}" for flag, value in changed_flags(config))


def run_name(config):
    """For example q2-maxpool-lr0.01-seed42, or q2-strided-lr0.01-seed42-epochs150."""
    network = "strided" if config["no_maxpool"] else "maxpool"
    name = f"q2-{network}-lr{config['learning_rate']:g}-seed{config['seed']}"
    return name + name_ending(config)


def plan_runs(args, rates):
    """A run for every learning rate and seed: {its name: its config}."""
    planned = {}
    for rate in rates:
        for seed in args.seed:
            config = {**vars(args), "learning_rate": rate, "seed": seed}
            del config["out"], config["plot_only"]  # where and how, not what
            planned[run_name(config)] = config
    return planned


def checkpoint_path(out, name):
    return Path(out) / "checkpoints" / f"{name}.pt"


def train_run(name, config, out, command, position):
    """Train and test one network on one thread; returns its result, saved as `name`.json.

    The file is written after every epoch, with status "interrupted" until the last one: whatever
    ends the run, it tells the truth, and the same command goes on from the checkpoint.
    `position`: the line of its progress bar.
    """
    torch.set_num_threads(1)  # a second thread gains nothing at batch 8
    runs.configure_seed(config["seed"])
    device = runs.pick_device(config["device"])
    splits, data = utils.load_oct_data(config["data"])
    for split, (X, y) in splits.items():
        splits[split] = (X.to(device), y.to(device))
    model = CNN(config["dropout"], config["no_maxpool"]).to(device)
    optimizer = make_optimizer(model, config)

    result = runs.new_result("q2", name, command, config, data, device)
    result["parameters"] = get_number_trainable_params(model)
    result["multiply_accumulates"] = count_multiply_accumulates(model)

    checkpoint = checkpoint_path(out, name)
    code = runs.code_hash(CNN, make_optimizer, train, utils.load_oct_data)
    what = {**config, "data": None, "device": None}  # not where the data lies and who computes
    identity = {"config": what, "data": data, "code": code}
    saved = runs.load_checkpoint(checkpoint, identity)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        runs.set_random_state(saved["random_state"])
        result = runs.resumed_result(saved["result"], config["epochs"], device)

    def save():
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random_state": runs.random_state(),
            "result": result,
        }
        runs.save_checkpoint(checkpoint, identity, state)
        runs.save_result(out, result)

    train(model, optimizer, splits, result, position, after_epoch=save)
    if result["status"] != "diverged":
        result["test"] = test_metrics(model, *splits["test"])
        result["status"] = "finished"
    runs.save_result(out, result)
    return result


def train(model, optimizer, splits, result, position, after_epoch):
    """Train until `result` has all epochs of its config, or the loss is no longer a number."""
    name = result["run"]
    config = result["config"]
    n_done = len(result["epochs"])
    n_batches = math.ceil(len(splits["train"][0]) / config["batch_size"])
    progress = tqdm(
        total=(config["epochs"] - n_done) * n_batches,
        desc=name,
        position=position,
        leave=False,
        disable=runs.QUIET,
    )
    with progress:
        for epoch in range(n_done + 1, config["epochs"] + 1):
            started = time.perf_counter()
            loss = train_epoch(
                *splits["train"], model, optimizer, F.nll_loss, config["batch_size"], progress
            )
            if not math.isfinite(loss):
                result["status"] = "diverged"
                progress.write(f"{name}  epoch {epoch:3}  the loss became infinite or NaN")
                return
            accuracy = evaluate(model, *splits["val"])
            seconds = time.perf_counter() - started
            progress.write(
                f"{name}  epoch {epoch:3}  "
                f"loss {loss:.4f}  val accuracy {accuracy:.4f}  {seconds:6.1f} s"
            )
            row = {"epoch": epoch, "train_loss": loss, "val_accuracy": accuracy, "seconds": seconds}
            result["epochs"].append(row)
            result["seconds"] += seconds
            after_epoch()


def n_processes(n_runs):
    """How many runs train at once: few runs all together, many in turns, one per processor."""
    n_cpus = runs.usable_cpus()
    if n_runs <= 2 * n_cpus:  # sharing processors, so that none waits while the last run trains
        return n_runs
    return n_cpus


def train_runs(planned, out):
    """Train `planned` ({name: config}) side by side; returns the results."""
    command = runs.command_line()
    jobs = []
    for position, (name, config) in enumerate(planned.items()):
        jobs.append((name, config, out, command, position))
    advice = "close other programs, and the same command goes on from the saved epochs"
    return list(runs.side_by_side(train_run, jobs, n_processes(len(jobs)), advice))


def delete_checkpoints(planned, out):
    """When everything is saved and drawn; a search that is interrupted before keeps what it has."""
    for name in planned:
        checkpoint_path(out, name).unlink(missing_ok=True)


def load_runs(planned, out):
    """The results of `planned` ({name: config}) as they were saved; UserError if one is missing."""
    command = runs.command_line(without=("-plot_only", "--plot_only"))
    results = [runs.load_result(out, name, f"`{command}`") for name in planned]
    if any(result["status"] == "interrupted" for result in results):
        raise UserError("a run was interrupted; finish it by the same command without -plot_only.")
    if len({result["data"]["sha256"] for result in results}) > 1:
        raise UserError(f"these runs were trained on different data; run `{command}` again.")
    return results


# ---------------------------------------------------------------------------------- learning rates
METRICS = ("val_accuracy", "accuracy", "auc", "accuracy_course_subset")  # a search's table


def final_accuracy(result):
    """Validation accuracy after the last epoch; a run that diverged in its first ranks last."""
    return result["epochs"][-1]["val_accuracy"] if result["epochs"] else -1.0


def by_rate(results):
    """{learning rate: its results}: from the largest rate, from the least final accuracy."""
    groups = {}
    for result in sorted(results, key=final_accuracy):
        groups.setdefault(result["config"]["learning_rate"], []).append(result)
    return {rate: groups[rate] for rate in sorted(groups, reverse=True)}


def median_run(group):
    """The run of median final accuracy of a group from `by_rate` (of an even number: the lower)."""
    return group[(len(group) - 1) // 2]


def final_values(results, key):
    """The metric `key` of these finished runs, without those whose data did not allow it."""
    values = []
    for result in results:
        metrics = {**result["epochs"][-1], **result["test"]}
        if metrics[key] is not None:
            values.append(metrics[key])
    return values


def mean_and_deviation(values):
    """[mean, standard deviation]: None for the deviation of one value, [] for no values."""
    if not values:
        return []
    return [mean(values), stdev(values) if len(values) > 1 else None]


def table_row(rate, group):
    """Mean and standard deviation of each of METRICS over the finished runs at one rate."""
    finished = [result for result in group if result["status"] == "finished"]
    row = {
        "learning_rate": rate,
        "finished": len(finished),
        "diverged": len(group) - len(finished),
    }
    for key in METRICS:
        row[key] = mean_and_deviation(final_values(finished, key))
    return row


def summarise(results):
    """The table of a search: a row per learning rate."""
    return [table_row(rate, group) for rate, group in by_rate(results).items()]


def print_table(rows):
    print("\nlearning_rate" + "".join(f"{key:>24}" for key in METRICS))
    for row in rows:
        line = f"{row['learning_rate']:13g}"
        for key in METRICS:
            numbers = [f"{value:.4f}" for value in row[key] if value is not None]
            cell = " ± ".join(numbers) or "-"
            line += f"{cell:>24}"
        print(line)


def best_row(rows):
    """Q2.1: the row of highest validation accuracy. The test split has no say in this."""
    finished = [row for row in rows if row["finished"]]
    if not finished:
        raise UserError(
            "the loss became infinite or NaN in every run; try a smaller -learning_rate."
        )
    return max(finished, key=lambda row: row["val_accuracy"][0])


def search_name(config):
    network = "-strided" if config["no_maxpool"] else ""
    return f"q2-search{network}{name_ending(config)}"


def save_search(results, rows, best, out):
    """Save the table and the choice as OUT/results/q2-search*.json."""
    first = results[0]
    rates = [result["config"]["learning_rate"] for result in results]
    seeds = [result["seed"] for result in results]
    config = {
        **first["config"],
        "learning_rate": list(dict.fromkeys(rates)),  # each once, in order
        "seed": list(dict.fromkeys(seeds)),
    }
    search = {
        "question": "q2",
        "command": first["command"],
        "data": first["data"],
        "environment": first["environment"],
        "parameters": first["parameters"],
        "run": search_name(config),
        "runs": [result["run"] for result in results],
        "config": config,
        "table": rows,
        "chosen_by": "val_accuracy",
        "best": best,
    }
    runs.save_result(out, search)


def rates_to_train(args):
    """The learning rates that the flags ask for; `best` is what a search on this data found."""
    if "best" not in args.learning_rate:
        return args.learning_rate
    if len(args.learning_rate) > 1:
        raise UserError("-learning_rate best stands alone; leave out the other rates, or best.")
    config = {**vars(args), "no_maxpool": False}  # Q2.2 takes the rate that was best in Q2.1
    search = runs.load_result(args.out, search_name(config), f"`{search_command(args)}`")
    if not args.plot_only:  # which needs no data
        _, data = utils.load_oct_data(args.data)
        if data["sha256"] != search["data"]["sha256"]:
            raise UserError(
                f"the search in {args.out} is of other data ({search['data']['source']}); "
                f"run `{search_command(args)}` first."
            )
    return [search["best"]["learning_rate"]]


def search_command(args):
    """The command of the search whose best rate `-learning_rate best` takes."""
    words = ["python", "hw2-q2.py", "-data", args.data, "-out", args.out]
    words += ["-learning_rate", "0.1", "0.01", "0.001"]
    for flag, value in changed_flags(vars(args)):
        words += [f"-{flag}", str(value)]
    words += ["-seed", *map(str, args.seed)]
    return shlex.join(words)


# ------------------------------------------------------------------------------------------- plots
def draw_curves(results, key, ylabel, out):
    """Plot `key` of every epoch, a colour per learning rate, the seed of median accuracy bold."""
    config = results[0]["config"]
    groups = by_rate(results)
    n_seeds = len({result["seed"] for result in results})
    title = "Strided CNN" if config["no_maxpool"] else "Max-pool CNN"
    if n_seeds > 1:
        title += " (bold: median seed)"

    curves = []
    for number, (rate, group) in enumerate(groups.items()):
        thin = {"color": f"C{number}", "linewidth": 0.6, "alpha": 0.6, "marker": ""}
        bold = {"color": f"C{number}", "linewidth": 2, "label": f"learning rate {rate:g}"}
        for result in group:
            curves.append((values_of(result, key), thin))
        curves.append((values_of(median_run(group), key), bold))

    rates = "_".join(f"{rate:g}" for rate in groups)
    settings = f"{config['dropout']:g}-{config['l2_decay']:g}-{config['optimizer']}"
    name = f"CNN-{ylabel.lower().replace(' ', '-')}-{rates}-{settings}-{config['no_maxpool']}"
    source = results[0]["data"]["source"]
    utils.plot(curves, ylabel, name + name_ending(config), out, source, title)


def values_of(result, key):
    return [row[key] for row in result["epochs"]]


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
    parser.flag("out", default="build", help="folder for results/ and figures/")
    parser.flag("seed", type=runs.SEED, nargs="+", default=[42], help="one or several")
    parser.flag(
        "device", type=runs.device_name, default="auto", help="auto, cpu, cuda, cuda:1 or mps"
    )
    parser.flag("plot_only", action="store_true", help="draw the results in OUT, without training")
    return parser


def main(args):
    """Train every learning rate with every seed, side by side; draw, choose, save."""
    runs.check_writable(args.out)
    planned = plan_runs(args, rates_to_train(args))
    if args.plot_only:
        results = load_runs(planned, args.out)
    else:
        results = train_runs(planned, args.out)

    rows = summarise(results)
    is_search = len(rows) > 1 or (args.no_maxpool and "best" in args.learning_rate)
    if is_search:
        save_search(results, rows, best_row(rows), args.out)
    draw_curves(results, "train_loss", "Training loss", args.out)
    draw_curves(results, "val_accuracy", "Validation accuracy", args.out)
    if not args.plot_only:
        delete_checkpoints(planned, args.out)

    print_table(rows)
    best = best_row(rows)
    if is_search:
        print(f"best by validation accuracy: learning rate {best['learning_rate']:g}")
    print(f"data: {results[0]['data']['source']}; results and figures are in {args.out}/")


if __name__ == "__main__":
    again = "finished epochs are saved; the same command goes on from there"
    runs.run_script(main, make_parser(), after_interrupt=again)
