"""Q2's protocol: what the results files say, against a plain loop written with torch alone.

The loop shares only the network with hw2-q2.py. The splits differ in size and in how often each
class occurs. Only the first test images are labelled as in training, so the network that learns
best is the worst on the test split: a rate chosen by test accuracy would be another one.
"""

import hashlib
import math
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import runs
import utils

import numpy as np
import pytest
import torch
from test_q2 import BOTH, call, in_turn, q2, results

PLACES = ((6, 7), (7, 13), (12, 7), (13, 14))  # row and column of each class's bright spot
SIZES = {"train": 84, "val": 35, "test": 60}
SHARES = {"train": (0.3, 0.3, 0.2, 0.2), "val": (0.4, 0.3, 0.2, 0.1), "test": (0.1, 0.2, 0.3, 0.4)}
N_RIGHT = 15  # so many test images are labelled as in training
SUBSET = (1, 3, 5, 6)  # in place of the course's 529 images
EVALUATION_BATCH = 16

EPOCHS, BATCH, DROPOUT, DECAY = 3, 10, 0.3, 0.01  # the last batch has 4 images
FLAGS = ("-epochs", EPOCHS, "-batch_size", BATCH, "-dropout", DROPOUT, "-l2_decay", DECAY)
ENDING = "-epochs3-batch_size10-l2_decay0.01-dropout0.3"  # of the runs' names
PARAMETERS = 224_892
PRODUCTS = {False: 445_536, True: 278_784}  # with max-pooling, with strides

COMMAND = "python hw2-q2.py -data 'my images'"
STARTED = "2026-01-02 03:04:05 +0000"
ENVIRONMENT = ("python", "torch", "device", "threads", "processor", "commit")


# -------------------------------------------------------------------------------------------- data
def make_split(split, rng):
    """Images (N, 28, 28) and labels (N, 1), uint8; later images have more noise."""
    places = rng.choice(4, SIZES[split], p=SHARES[split])
    images = rng.integers(0, 30, (len(places), 28, 28))
    for i, (row, column) in enumerate(PLACES[place] for place in places):
        images[i, row : row + 9, column : column + 9] += 200
        images[i] += rng.integers(0, 1 + i, (28, 28))
    labels = places.copy()
    if split == "test":
        labels[N_RIGHT:] = (places[N_RIGHT:] + 1) % 4
    return images.clip(0, 255).astype(np.uint8), labels.astype(np.uint8)[:, None]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with octmnist.npz; for time there is a clock that counts the images seen.

    All runs train in this process, and no figure is saved.
    """
    rng = np.random.default_rng(0)
    arrays = {}
    for split in SIZES:
        arrays[f"{split}_images"], arrays[f"{split}_labels"] = make_split(split, rng)
    np.savez(tmp_path / "octmnist.npz", source="spots", **arrays)
    q2.load_data.cache_clear()

    n_seen = 0
    forward = q2.CNN.forward

    def count(model, X):
        nonlocal n_seen
        n_seen += len(X)
        return forward(model, X)

    monkeypatch.setattr(q2.CNN, "forward", count)
    clock = SimpleNamespace(perf_counter=lambda: n_seen, strftime=lambda form: STARTED)
    monkeypatch.setattr(q2, "time", clock)
    monkeypatch.setattr(q2, "EVALUATION_BATCH", EVALUATION_BATCH)
    monkeypatch.setattr(q2, "COURSE_SUBSET", SUBSET)
    monkeypatch.setattr(runs, "side_by_side", in_turn)
    monkeypatch.setattr(runs, "git_commit", lambda: "a commit")
    monkeypatch.setattr(utils, "save_figure", Mock())
    monkeypatch.setattr(sys, "argv", ["hw2-q2.py", "-data", "my images"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    return tmp_path


def read_splits(folder):
    """{split: images (N, 1, 28, 28) in [0, 1] and labels (N,)}, and the `data` entry."""
    path = folder / "octmnist.npz"
    splits, class_counts = {}, {}
    with np.load(path) as file:
        for split in SIZES:
            labels = torch.tensor(file[f"{split}_labels"].astype(int)).flatten()
            images = torch.tensor(file[f"{split}_images"].astype(np.float32) / 255)
            splits[split] = (images[:, None], labels)
            class_counts[split] = [int((labels == label).sum()) for label in range(4)]
    data = {
        "source": "spots",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "classes": ["CNV", "DME", "drusen", "normal"],
        "counts": SIZES,
        "class_counts": class_counts,
    }
    return splits, data


# -------------------------------------------------------------------------------------- plain loop
def make_plain_optimizer(model, name, rate):
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=rate, weight_decay=DECAY)
    return torch.optim.SGD(model.parameters(), lr=rate, weight_decay=DECAY)


def plain_epoch(model, optimizer, X, y, batch_size=BATCH):
    """One epoch in random order; returns the mean loss per image."""
    model.train()
    total = 0
    order = torch.randperm(len(X))
    for first in range(0, len(X), batch_size):
        batch = order[first : first + batch_size]
        log_probabilities = model(X[batch])
        loss = -log_probabilities[torch.arange(len(batch)), y[batch]].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * len(batch)
    return total / len(X)


def plain_probabilities(model, X):
    """The probabilities of all images, in one pass without dropout, as lists."""
    model.eval()
    with torch.no_grad():
        return model(X).exp().tolist()


def plain_guesses(model, X):
    return [row.index(max(row)) for row in plain_probabilities(model, X)]


def plain_accuracy(model, X, y):
    guesses = plain_guesses(model, X)
    return sum(guess == label for guess, label in zip(guesses, y.tolist(), strict=True)) / len(y)


def plain_auc(probabilities, truth):
    """The share of pairs in the right order, each class against the rest; the mean over classes."""
    areas = []
    for label in range(4):
        inside = [
            row[label] for row, true in zip(probabilities, truth, strict=True) if true == label
        ]
        outside = [
            row[label] for row, true in zip(probabilities, truth, strict=True) if true != label
        ]
        wins = [(a > b) + (a == b) / 2 for a in inside for b in outside]
        areas.append(sum(wins) / len(wins))
    return sum(areas) / 4


def moved(X, pixels, axis):
    """X moved by so many pixels along one axis, forwards or backwards; its edge is repeated."""
    pieces = list(X.unbind(axis))
    n = abs(pixels)
    if pixels > 0:
        pieces = [pieces[0]] * n + pieces[: 28 - n]
    else:
        pieces = pieces[n:] + [pieces[-1]] * n
    return torch.stack(pieces, axis)


def four_moves(X, pixels):
    return [moved(X, sign * pixels, axis) for axis in (2, 3) for sign in (-1, 1)]


def plain_test(model, X, y):
    """The `test` entry of a results file."""
    truth = y.tolist()
    confusion = [[0] * 4 for _ in range(4)]
    hits_of_class = [[] for _ in range(4)]
    for label, guess in zip(truth, plain_guesses(model, X), strict=True):
        confusion[label][guess] += 1
        hits_of_class[label].append(label == guess)
    shifted = [plain_accuracy(model, X, y)]
    for pixels in (1, 2, 3):
        of_moves = [plain_accuracy(model, moved_X, y) for moved_X in four_moves(X, pixels)]
        shifted.append(sum(of_moves) / 4)
    in_subset = sum(sum(hits[:n]) for hits, n in zip(hits_of_class, SUBSET, strict=True))
    return {
        "accuracy": sum(confusion[label][label] for label in range(4)) / len(y),
        "auc": plain_auc(plain_probabilities(model, X), truth),
        "accuracy_course_subset": in_subset / sum(SUBSET),
        "confusion": confusion,
        "accuracy_shifted": shifted,
    }


def plain_run(splits, data, config, **others):
    """What the results file of one run should hold, and its trained network."""
    torch.manual_seed(config["seed"])
    model = q2.CNN(DROPOUT, config["no_maxpool"])
    optimizer = make_plain_optimizer(model, config["optimizer"], config["learning_rate"])
    seconds = SIZES["train"] + SIZES["val"]
    epochs = []
    for epoch in range(1, EPOCHS + 1):
        loss = plain_epoch(model, optimizer, *splits["train"])
        accuracy = plain_accuracy(model, *splits["val"])
        row = {"epoch": epoch, "train_loss": loss, "val_accuracy": accuracy, "seconds": seconds}
        epochs.append(row)
    result = {
        "question": "q2",
        "command": COMMAND,
        "started": STARTED,
        "search": None,
        "config": config,
        "seed": config["seed"],
        "status": "finished",
        "data": data,
        "parameters": PARAMETERS,
        "multiply_accumulates": PRODUCTS[config["no_maxpool"]],
        "seconds": EPOCHS * seconds,
        "epochs": epochs,
        "test": plain_test(model, *splits["test"]),
        **others,
    }
    return result, model


def make_config(folder, rate, seed, no_maxpool=False, optimizer="sgd"):
    return {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "learning_rate": rate,
        "l2_decay": DECAY,
        "dropout": DROPOUT,
        "optimizer": optimizer,
        "no_maxpool": no_maxpool,
        "data": str(folder),
        "seed": seed,
        "device": "cpu",
    }


# -------------------------------------------------------------------------------------- comparison
def assert_same(found, expected, place="result"):
    """Equal, field by field; numbers up to a relative 1e-5."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key in expected:
            assert_same(found[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{place}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-5), place
    else:
        assert found == expected, place


def assert_result(found, expected):
    """Compare every field; of the environment only what is known beforehand."""
    environment = found.pop("environment")
    assert tuple(environment) == ENVIRONMENT
    assert environment["device"] == "cpu" and environment["threads"] == 1
    assert environment["torch"] == torch.__version__
    assert environment["commit"] == "a commit"
    assert_same(found, expected)


def curves(figure):
    """What is drawn: {label: (means, least, greatest)} for the losses and for the accuracies."""
    panels = []
    for axes in figure.axes:
        panel = {}
        for line, band in zip(axes.lines, axes.collections, strict=True):
            epochs, means = line.get_data()
            assert list(epochs) == list(range(1, len(means) + 1))
            corners = band.get_paths()[0].vertices
            at = [corners[corners[:, 0] == epoch, 1] for epoch in epochs]
            bounds = [min(y) for y in at], [max(y) for y in at]
            panel[line.get_label()] = [list(map(float, values)) for values in (means, *bounds)]
        panels.append(panel)
    return panels


def plain_curves(groups):
    """What should be drawn for {label: results}, in the form of `curves`."""
    panels = []
    for key in ("train_loss", "val_accuracy"):
        panel = {}
        for label, group in groups.items():
            of_epochs = list(
                zip(*[[row[key] for row in run["epochs"]] for run in group], strict=True)
            )
            means = [sum(values) / len(values) for values in of_epochs]
            panel[label] = [means, list(map(min, of_epochs)), list(map(max, of_epochs))]
        panels.append(panel)
    return panels


# ----------------------------------------------------------------------------------------- one run
@BOTH
@pytest.mark.parametrize("optimizer, rate", [("sgd", 0.2), ("adam", 0.001)])
def test_a_results_file_says_what_a_plain_loop_finds(folder, capsys, no_maxpool, optimizer, rate):
    flags = ["-data", folder, "-out", folder / "out", *FLAGS, "-device", "cpu", "-seed", 7]
    flags += ["-optimizer", optimizer, "-learning_rate", rate, *["-no_maxpool"][:no_maxpool]]
    call(*flags)
    ((name, found),) = results(folder / "out").items()
    network = "strided" if no_maxpool else "maxpool"
    ending = "-optimizeradam" if optimizer == "adam" else ""
    assert name == f"q2-{network}-lr{rate}-seed7{ENDING}{ending}"

    splits, data = read_splits(folder)
    config = make_config(folder, rate, 7, no_maxpool, optimizer)
    expected, model = plain_run(splits, data, config, run=name)
    assert_result(found, expected)

    said = capsys.readouterr().out
    for row in expected["epochs"]:
        line = f"loss {row['train_loss']:.4f}  val accuracy {row['val_accuracy']:.4f}   119.0 s"
        assert f"{name}  epoch   {row['epoch']}  {line}" in said
    label = "strides" if no_maxpool else "max-pooling"
    figure, *_ = utils.save_figure.call_args.args
    assert_same(curves(figure), plain_curves({label: [expected]}))
    assert_data_tell_things_apart(expected, model, *splits["test"])


def assert_data_tell_things_apart(result, model, X, y):
    """Numbers that a mistake could confuse are not equal by accident."""
    test = result["test"]
    assert sum(any(row[guess] for row in test["confusion"]) for guess in range(4)) >= 3
    last = result["epochs"][-1]["val_accuracy"]
    assert len({last, test["accuracy"], test["accuracy_course_subset"]}) == 3
    assert len({plain_accuracy(model, moved_X, y) for moved_X in four_moves(X, 3)}) >= 3


# ---------------------------------------------------------------------------------------- a search
def mean_and_deviation(values):
    mean = sum(values) / len(values)
    return [mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))]


def plain_table(groups):
    """The table of a search, of {rate: results}."""
    table = []
    for rate, group in groups.items():
        row = {"learning_rate": rate, "finished": 2, "diverged": 0}
        row["val_accuracy"] = mean_and_deviation([r["epochs"][-1]["val_accuracy"] for r in group])
        for key in ("accuracy", "auc", "accuracy_course_subset"):
            row[key] = mean_and_deviation([result["test"][key] for result in group])
        table.append(row)
    return table


def plain_search(folder, data, groups, best):
    """What the results file of the search should hold."""
    all_runs = [result for group in groups.values() for result in group]
    return {
        "question": "q2",
        "run": SEARCH,
        "command": COMMAND,
        "started": STARTED,
        "config": make_config(folder, [1.0, 0.25, 0.001], [1, 7]),
        "status": "finished",
        "data": data,
        "parameters": PARAMETERS,
        "runs": [result["run"] for result in all_runs],
        "table": plain_table(groups),
        "chosen_by": "val_accuracy",
        "best": best,
    }


def assert_table_is_printed(table, said):
    for row in table:
        words = [f"{row['learning_rate']}", "2", "of", "2"]
        for key in ("val_accuracy", "accuracy", "auc", "accuracy_course_subset"):
            words += [f"{row[key][0]:.4f}", "±", f"{row[key][1]:.4f}"]
        assert words in [line.split() for line in said.splitlines()]


SEARCH = "q2-search"


def test_a_search_says_what_plain_loops_find_and_its_best_rate_is_trained(folder, capsys):
    out = folder / "out"
    flags = ["-data", folder, "-out", out, *FLAGS, "-device", "cpu", "-seed", 7, 1]
    search_flags = [*flags, "-learning_rate", 0.001, 1.0, 0.25]
    best_flags = [*flags, "-learning_rate", "best", "-no_maxpool"]
    splits, data = read_splits(folder)

    call(*search_flags)
    said = capsys.readouterr().out
    found = results(out)
    search = found.pop(SEARCH)
    groups = {1.0: [], 0.25: [], 0.001: []}
    for rate, group in groups.items():
        for seed in (1, 7):
            run = f"q2-maxpool-lr{rate}-seed{seed}{ENDING}"
            result, _ = plain_run(splits, data, make_config(folder, rate, seed), run=run)
            assert_result(found.pop(run), result)
            group.append(result)
    assert not found

    table = plain_table(groups)
    best = table[1]
    assert best["val_accuracy"][0] == max(row["val_accuracy"][0] for row in table)
    # by test accuracy another rate would win
    assert best["accuracy"][0] < max(row["accuracy"][0] for row in table)
    assert_result(search, plain_search(folder, data, groups, best))
    assert_table_is_printed(table, said)
    assert "best by validation accuracy: learning rate 0.25\n" in said

    call(*best_flags)
    found = results(out, "q2-strided*")
    strided = []
    for seed in (1, 7):
        run = f"q2-strided-lr0.25-seed{seed}{ENDING}"
        config = make_config(folder, 0.25, seed, no_maxpool=True)
        facts = "rates 1.0, 0.25, 0.001; seeds 1, 7; spots; commit {}; started {}"
        commit = (runs.git_commit() or "unknown")[:10]
        search = f"q2-search ({facts.format(commit, STARTED)})"
        result, _ = plain_run(splits, data, config, run=run, search=search)
        assert_result(found.pop(run), result)
        strided.append(result)
    assert not found

    before = {path: path.read_bytes() for path in (out / "results").iterdir()}
    (folder / "octmnist.npz").unlink()  # drawing needs no data
    call(*search_flags, "-plot_only")
    call(*best_flags, "-plot_only")
    assert {path: path.read_bytes() for path in (out / "results").iterdir()} == before
    rates = plain_curves({str(rate): group for rate, group in groups.items()})
    networks = plain_curves({"max-pooling": groups[0.25], "strides": strided})
    wanted = [(f"CNN-rates{ENDING}", rates), (f"CNN-networks{ENDING}", networks)] * 2
    for drawn, (name, lines) in zip(utils.save_figure.call_args_list, wanted, strict=True):
        figure, *others = drawn.args
        assert others == [str(out), name, "spots"]
        assert_same(curves(figure), lines)


def test_a_band_holds_all_seeds_and_ends_where_the_first_diverged(monkeypatch):
    monkeypatch.setattr(utils, "save_figure", Mock())
    group = []
    for losses in ([3, 2, 1], [4, 4], [9, 0, 5]):
        epochs = [{"train_loss": loss, "val_accuracy": loss / 10} for loss in losses]
        group.append({"epochs": epochs})
    q2.plot({0.1: group}, "learning rate", "CNN-rates", "out", "spots")
    ((figure, *_), _) = utils.save_figure.call_args
    drawn = [[16 / 3, 2.0], [3.0, 0.0], [9.0, 4.0]]
    as_accuracies = [[value / 10 for value in values] for values in drawn]
    assert_same(curves(figure), [{"0.1": drawn}, {"0.1": as_accuracies}])
