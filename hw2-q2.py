"""Question 2: image classification on OCTMNIST with a CNN, with max-pooling (2.1) and with strides instead (2.2).

    python hw2-q2.py -data sample -out build/sample                                    one network
    python hw2-q2.py -data sample -out build/sample -learning_rate 0.1 0.01 0.001      search (2.1)
    python hw2-q2.py -data sample -out build/sample -learning_rate best -no_maxpool    strided, at its best rate (2.2)

Prints the epoch's mean training loss and the validation accuracy, then the test metrics, and saves
OUT/results/q2-*.json and OUT/figures/CNN-*.{pdf,png}. About 30 s a network on the sample, 5 minutes on OCTMNIST.
"""

import itertools
import math
import os
import signal
import time
from pathlib import Path
from statistics import mean, stdev

import joblib
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from tqdm import tqdm

import utils

EVALUATION_BATCH = 500  # images in one forward pass: bounds the memory of evaluating a whole split
COURSE_SUBSET = (182, 55, 42, 250)  # the first images of classes 0..3 that make the course's 529-image test set
METRICS = ("val_accuracy", "accuracy", "auc", "accuracy_course_subset")  # the columns of a search's table
SHIFTS = (0, 1, 2, 3)  # pixels by which the test images are moved, to measure tolerance to translation (2.3)


# --------------------------------------------------------------------------------------------------------- network
class CNN(nn.Module):
    """The network of Q2.1 (max-pooling) and Q2.2 (`no_maxpool`: convolutions with stride 2, no pooling).

    Images (B, 784), (B, 28, 28) or (B, 1, 28, 28), uint8 or float in [0, 1] -> (B, n_classes) log-probabilities.
    """

    def __init__(self, dropout_prob, no_maxpool=False, n_classes=4):
        super().__init__()
        self.no_maxpool = no_maxpool
        stride = 2 if no_maxpool else 1
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, stride=stride, padding=0)
        with torch.no_grad():
            n_features = self.features(torch.zeros(1, 1, 28, 28)).numel()
        self.fc1 = nn.Linear(n_features, 320)
        self.fc2 = nn.Linear(320, 120)
        self.fc3 = nn.Linear(120, n_classes)
        self.dropout = nn.Dropout(dropout_prob)
        self.to(memory_format=torch.channels_last)  # the layout that the convolution kernels want

    def features(self, x):
        """(B, 1, 28, 28) -> (B, 16, 6, 6). As ReLU is increasing, pooling first changes nothing but its cost."""
        for convolution in (self.conv1, self.conv2):
            x = convolution(x)
            if not self.no_maxpool:
                x = F.max_pool2d(x, kernel_size=2, stride=2)
            x = F.relu(x)
        return x

    def forward(self, x):
        if x.dtype == torch.uint8:  # scaled batch by batch: the whole training split as floats would fill 300 MB
            x = x.float() / 255
        x = self.features(x.reshape(-1, 1, 28, 28)).flatten(1)  # (B, 576)
        x = self.dropout(F.relu(self.fc1(x)))  # (B, 320)
        x = F.relu(self.fc2(x))  # (B, 120)
        return F.log_softmax(self.fc3(x), dim=1)  # (B, n_classes)


def get_number_trainable_params(model):
    """Number of trainable parameters (Q2.3)."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_multiply_accumulates(model):
    """Multiply-accumulates of one image's forward pass, over the convolutions and affine maps (Q2.3)."""
    counts = []

    def count(layer, _, output):
        if hasattr(layer, "weight"):  # weight[0] makes one value of the output's first channel, and so on
            counts.append(layer.weight[0].numel() * output.numel())

    with register_module_forward_hook(count):
        predict(model, torch.zeros(1, 1, 28, 28, device=next(model.parameters()).device))
    return sum(counts)


# ------------------------------------------------------------------------------------------ training and evaluation
def train_batch(X, y, model, optimizer, criterion):
    """One optimiser step on X (B, 1, 28, 28) and y (B,); returns the batch's mean loss, a 0-d tensor."""
    optimizer.zero_grad()
    loss = criterion(model(X), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def train_epoch(X, y, model, optimizer, criterion, batch_size, progress):
    """One pass in a new random order; returns the mean loss over this epoch's images."""
    model.train()
    total = torch.zeros((), device=X.device)
    for batch in torch.randperm(len(X)).to(X.device).split(batch_size):
        total += train_batch(X[batch], y[batch], model, optimizer, criterion) * len(batch)
        progress.update()
    return total.item() / len(X)


@torch.inference_mode()
def predict(model, X):
    """Log-probabilities (N, n_classes) of images X (N, 1, 28, 28), in chunks that bound the memory."""
    model.eval()
    return torch.cat([model(chunk) for chunk in X.split(EVALUATION_BATCH)])


def evaluate(model, X, y):
    """Accuracy in [0, 1] on X (N, 1, 28, 28) and y (N,)."""
    return (predict(model, X).argmax(dim=1) == y).sum().item() / len(y)


def test_metrics(model, X, y):
    """Accuracy and AUC as medmnist.Evaluator has them; the course's subset; confusion; accuracy under translation.

    A metric that these images X (N, 1, 28, 28) do not allow (too few, a class missing) is None.
    """
    from medmnist.evaluator import getACC, getAUC  # brings pandas and scikit-learn: 1 s that training need not wait for

    log_probabilities = predict(model, X)
    predicted, n_classes = log_probabilities.argmax(dim=1), log_probabilities.shape[1]
    truth, probabilities = y.cpu().numpy(), log_probabilities.exp().cpu().numpy()
    hits = torch.cat([(predicted == y)[y == label][:size] for label, size in enumerate(COURSE_SUBSET)]).double()
    return {
        "accuracy": getACC(truth, probabilities, "multi-class"),
        "auc": getAUC(truth, probabilities, "multi-class") if len(y.unique()) == n_classes else None,
        "accuracy_course_subset": hits.mean().item() if len(hits) == sum(COURSE_SUBSET) else None,
        "confusion": torch.bincount(n_classes * y + predicted, minlength=n_classes**2).view(n_classes, -1).tolist(),
        "accuracy_shifted": [accuracy_shifted(model, X, y, pixels) for pixels in SHIFTS],
    }


def accuracy_shifted(model, X, y, pixels):
    """Mean accuracy on X (N, 1, 28, 28) moved left, up, down and right by `pixels`, edges repeated."""
    i, steps = torch.arange(28), {(0, -pixels), (0, pixels), (-pixels, 0), (pixels, 0)}  # a single one for 0 pixels
    return mean(evaluate(model, X[..., (i + dy).clamp(0, 27), :][..., (i + dx).clamp(0, 27)], y) for dy, dx in steps)


# ------------------------------------------------------------------------------------------------------------ runs
def run_name(config, name):
    """`name` with every flag that differs from its default appended, e.g. q2-maxpool-lr0.01-seed42-epochs150."""
    default, flags = make_parser().get_default, ("epochs", "batch_size", "l2_decay", "dropout", "optimizer")
    return name + "".join(f"-{flag}{config[flag]}" for flag in flags if config[flag] != default(flag))


def train_run(name, config, out, command, position):
    """Train and test one network on one CPU thread; returns its result, saved as OUT/results/<name>.json.

    The file is written after every epoch, with status "interrupted" until the last one: whatever ends the run, it tells
    the truth, and the same command goes on from the checkpoint. `position`: the line of its progress bar.
    """
    torch.set_num_threads(1)  # a second thread gains nothing at batch 8
    utils.configure_seed(config["seed"])
    device = utils.pick_device(config["device"])
    splits, info = utils.load_oct_data(config["data"])
    splits = {split: (X.to(device), y.to(device)) for split, (X, y) in splits.items()}
    model = CNN(config["dropout"], config["no_maxpool"]).to(device)
    optimizer_class = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[config["optimizer"]]
    optimizer = optimizer_class(model.parameters(), lr=config["learning_rate"], weight_decay=config["l2_decay"])

    result = utils.new_result("q2", name, command, config, info, device)
    result["parameters"] = get_number_trainable_params(model)
    result["multiply_accumulates"] = count_multiply_accumulates(model)
    checkpoint, identity = Path(out) / "checkpoints" / f"{name}.pt", {"config": config, "data": info}
    if saved := utils.load_checkpoint(checkpoint, identity):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        utils.set_random_state(saved["random_state"])
        result = saved["result"] | {"environment": utils.environment(device)}

    done = len(result["epochs"])
    batches = (config["epochs"] - done) * math.ceil(len(splits["train"][0]) / config["batch_size"])
    with tqdm(total=batches, desc=name, position=position, leave=False, disable=None) as progress:
        for epoch in range(done + 1, config["epochs"] + 1):
            started = time.perf_counter()
            loss = train_epoch(*splits["train"], model, optimizer, F.nll_loss, config["batch_size"], progress)
            if not math.isfinite(loss):
                result["status"] = "diverged"
                progress.write(f"{name}  epoch {epoch:3}  the loss became infinite or NaN")
                break
            accuracy, seconds = evaluate(model, *splits["val"]), time.perf_counter() - started
            progress.write(f"{name}  epoch {epoch:3}  loss {loss:.4f}  val accuracy {accuracy:.4f}  {seconds:6.1f} s")
            result["epochs"].append({"epoch": epoch, "train_loss": loss, "val_accuracy": accuracy, "seconds": seconds})
            result["seconds"] += seconds
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "result": result}
            utils.save_checkpoint(checkpoint, identity, state | {"random_state": utils.random_state()})
            utils.save_result(out, result)
    if result["status"] != "diverged":
        result |= {"status": "finished", "test": test_metrics(model, *splits["test"])}
    utils.save_result(out, result)
    return result


def by_rate(results):
    """Group results by learning rate, each group in the order of its final validation accuracy."""
    results = sorted(results, key=lambda result: [epoch["val_accuracy"] for epoch in result["epochs"]][-1:])
    rates = sorted({result["config"]["learning_rate"] for result in results}, reverse=True)
    return {rate: [result for result in results if result["config"]["learning_rate"] == rate] for rate in rates}


def summarise(results):
    """Print and return a row per learning rate: [mean, standard deviation] of each final metric over finished seeds."""
    rows = []
    print("\nlearning_rate" + "".join(f"{key:>24}" for key in METRICS))
    for rate, runs in by_rate(results).items():
        finished = [run["epochs"][-1] | run["test"] for run in runs if run["status"] == "finished"]
        rows.append(row := {"learning_rate": rate, "finished": len(finished), "diverged": len(runs) - len(finished)})
        for key in METRICS:
            values = [run[key] for run in finished if run[key] is not None]
            row[key] = [mean(values), stdev(values) if len(values) > 1 else None] if values else []
        cells = [" ± ".join(f"{value:.4f}" for value in row[key] if value is not None) or "-" for key in METRICS]
        print(f"{rate:13g}" + "".join(f"{cell:>24}" for cell in cells))
    return rows


def draw(results, out):
    """Plot training loss and validation accuracy, a colour per learning rate and the seed of median accuracy bold."""
    config, groups, n = results[0]["config"], by_rate(results), len({result["seed"] for result in results})
    suffix = "_".join(f"{rate:g}" for rate in groups) + f"-{config['dropout']:g}-{config['l2_decay']:g}"
    suffix += f"-{config['optimizer']}-{config['no_maxpool']}" + run_name(config, "")
    title = ("Strided CNN" if config["no_maxpool"] else "Max-pool CNN") + f" (bold: median of {n} seeds)" * (n > 1)
    for key, ylabel in (("train_loss", "Training loss"), ("val_accuracy", "Validation accuracy")):
        curves = []
        for colour, (rate, runs) in enumerate(groups.items()):
            values = [[epoch[key] for epoch in run["epochs"]] for run in runs]
            curves += [(thin, {"color": f"C{colour}", "linewidth": 0.6, "alpha": 0.6, "marker": ""}) for thin in values]
            bold = {"color": f"C{colour}", "linewidth": 2, "label": f"learning rate {rate:g}"}
            curves.append((values[(len(runs) - 1) // 2], bold))
        name, source = f"CNN-{ylabel.lower().replace(' ', '-')}-{suffix}", results[0]["data"]["source"]
        utils.plot(curves, ylabel, name, out, source, title)


# ---------------------------------------------------------------------------------------------------- command line
def make_parser():
    """The course's flags, and where data and results are."""
    whole, positive = utils.number(int, 1), utils.number(float, above=0, or_word="best")
    parser = utils.ArgumentParser(__doc__.splitlines()[0])
    parser.flag("epochs", type=whole, default=15, help="passes over the training images")
    parser.flag("batch_size", type=whole, default=8, help="images per optimiser step")
    parser.flag("learning_rate", type=positive, nargs="+", default=[0.01], help="one, several, or best (of a search)")
    parser.flag("l2_decay", type=utils.number(float, 0), default=0.0, help="weight decay")
    parser.flag("dropout", type=utils.number(float, 0, below=1), default=0.7, help="dropout probability")
    parser.flag("optimizer", choices=("sgd", "adam"), default="sgd", help="optimiser")
    parser.flag("no_maxpool", action="store_true", help="stride 2 in the convolutions instead of pooling (Q2.2)")
    parser.flag("data", default="data", help="folder that holds octmnist.npz")
    parser.flag("out", default="build", help="folder for results/ and figures/")
    parser.flag("seed", type=utils.number(int, 0, 2**32 - 1), nargs="+", default=[42], help="one or several")
    parser.flag("device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    parser.flag("plot_only", action="store_true", help="draw the results in OUT again, without training")
    return parser


def main(args):
    """Train every learning rate with every seed, side by side on the cores there are."""
    flags = {key: value for key, value in vars(args).items() if key not in ("out", "plot_only")}
    utils.check_writable(args.out)
    if "best" in args.learning_rate:
        flags["learning_rate"] = [utils.load_result(args.out, run_name(flags, "q2-search"))["best"]["learning_rate"]]
    runs, kind = {}, "strided" if args.no_maxpool else "maxpool"
    for rate, seed in itertools.product(flags["learning_rate"], flags["seed"]):
        runs[run_name(flags, f"q2-{kind}-lr{rate:g}-seed{seed}")] = flags | {"learning_rate": rate, "seed": seed}
    if args.plot_only:
        results = [utils.load_result(args.out, name) for name in runs]
        if "interrupted" in (result["status"] for result in results):
            raise utils.UserError("a run was interrupted; finish it by the same command without -plot_only.")
    else:  # Ctrl-C is for this process, which then ends its workers: they ignore it
        ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
        jobs = [(name, config, args.out, utils.command_line(), i) for i, (name, config) in enumerate(runs.items())]
        n_jobs = len(runs) if len(runs) <= 2 * os.cpu_count() else os.cpu_count()  # few runs: no core waits at the end
        results = joblib.Parallel(n_jobs, **ignore)(joblib.delayed(train_run)(*job) for job in jobs)
        for name in runs:  # only now: a search that is interrupted keeps what it has
            (Path(args.out) / "checkpoints" / f"{name}.pt").unlink(missing_ok=True)

    draw(results, args.out)
    rows = summarise(results)
    if not (finished := [row for row in rows if row["finished"]]):
        raise utils.UserError("the loss became infinite or NaN in every run; try a smaller -learning_rate.")
    if len(rows) > 1 or (args.no_maxpool and "best" in args.learning_rate):
        best = max(finished, key=lambda row: row["val_accuracy"][0])
        print(f"best by validation accuracy: learning rate {best['learning_rate']:g}")
        search = {key: results[0][key] for key in ("question", "command", "data", "environment", "parameters")}
        search |= {"run": run_name(flags, "q2-search" + "-strided" * args.no_maxpool), "runs": list(runs)}
        search |= {"config": flags, "table": rows, "chosen_by": "val_accuracy", "best": best}
        utils.save_result(args.out, search)
    print(f"data: {results[0]['data']['source']}; results and figures are in {args.out}/")


if __name__ == "__main__":
    utils.run_script(main, make_parser(), "finished epochs are saved; the same command goes on from there")
