"""Question 2: the numbers that q2.typ and its tables show, from results/q2-*.json.

Runs of 15 epochs have plain names, such as "pool"; those of 150 epochs end in "150".
"""

import math
from statistics import mean

import utils
from report.lib import (
    average,
    difference,
    last,
    listing,
    matching,
    percent,
    spread,
    test,
    whole,
)

import numpy as np
from scipy import stats

RATES = ("0.1", "0.01", "0.001")
CNV, NORMAL = utils.OCT_CLASSES.index("CNV"), utils.OCT_CLASSES.index("normal")


def numbers(results):
    short, long = search(results), search(results, "-epochs150")
    runs = networks(results)
    n_images = short["data"]["counts"]
    shares = {split: class_shares(short, split) for split in ("train", "val", "test")}
    numbers = {
        "n_seeds": len(runs["pool"]),
        **{f"n_{split}": whole(n) for split, n in n_images.items()},
        "n_images": whole(sum(n_images.values())),
        "batch_size": short["config"]["batch_size"],
        "updates_an_epoch": updates(short) // short["config"]["epochs"],
        "updates_short": whole(updates(short)),
        "n_long": long["config"]["epochs"],
        "commit": long["environment"]["commit"][:7],
        "rate_short": f"{short['best']['learning_rate']:g}",
        "rate_long": f"{long['best']['learning_rate']:g}",
        "parameters": whole(short["parameters"]),
        "products_pool": whole(runs["pool"][0]["multiply_accumulates"]),
        "products_strided": whole(runs["strided"][0]["multiply_accumulates"]),
        "loss_of_shares": f"{loss_of_shares(short):.3f}",
        "normal_val": f"{shares['val'][NORMAL]:.3f}",
        "cnv_val": f"{shares['val'][CNV]:.3f}",
        "largest_share_test": f"{max(shares['test']):.3f}",
        "percent_normal_val": percent(shares["val"][NORMAL]),
        **{f"counts_{split}": listing(short["data"]["class_counts"][split]) for split in shares},
        "rows": rate_rows(results, ""),
        "rows150": rate_rows(results, "-epochs150"),
        "compared_rows": compared_rows(runs),
    }
    for name, rate in zip(("high", "middle", "low"), RATES, strict=True):
        for end, epochs in (("", ""), ("150", "-epochs150")):
            numbers[name + end] = scores_of(network(results, "maxpool", rate, epochs))
    numbers |= {name: scores_of(found) for name, found in runs.items()}
    return {**numbers, **break_down(results, long), **comparisons(results, runs, short)}


# ------------------------------------------------------------------------------------ runs, by name
def search(results, epochs=""):
    """The search over learning rates; `epochs`: the end of its name, "" or "-epochs150"."""
    return results[f"q2-search{epochs}"]


def network(results, name, rate, epochs=""):
    """The runs of one network at one rate, in the order of their seeds."""
    return matching(results, rf"q2-{name}-lr{rate}-seed\d+{epochs}")


def networks(results):
    """The runs that Q2.2 and Q2.3 compare, at the rates that were chosen with max-pooling; "_fast":
    at the largest rate.
    """
    found = {}
    for epochs, end in (("", ""), ("-epochs150", "150")):
        rate = search(results, epochs)["best"]["learning_rate"]
        for name, title in (("pool", "maxpool"), ("strided", "strided"), ("average", "avgpool")):
            found[name + end] = network(results, title, rate, epochs)
    found["pool150_fast"] = network(results, "maxpool", RATES[0], "-epochs150")
    found["strided150_fast"] = network(results, "strided", RATES[0], "-epochs150")
    found["average150_fast"] = network(results, "avgpool", RATES[0], "-epochs150")
    return found


# ------------------------------------------------------------------------------- what runs measured
def scores_of(runs):
    """What the text says of the runs of one network at one rate."""
    return {
        "loss": average(last(runs, "train_loss")),
        "val": spread(last(runs, "val_accuracy")),
        "val_mean": average(last(runs, "val_accuracy")),
        "test": spread(test(runs, "accuracy")),
        "test_mean": average(test(runs, "accuracy")),
    }


def measures(runs):
    """{what the tables show: its value in each run}."""
    return {
        "training loss": last(runs, "train_loss"),
        "validation": last(runs, "val_accuracy"),
        "test": test(runs, "accuracy"),
        "test AUC": test(runs, "auc"),
    }


def recalls(runs):
    """{class: the share of its test images that each run finds}."""
    tables = test(runs, "confusion")
    classes = enumerate(utils.OCT_CLASSES)
    return {name: [table[k][k] / sum(table[k]) for table in tables] for k, name in classes}


def by_epoch(runs, key):
    """What each run measured after each epoch: (seeds, epochs)."""
    return np.array([[row[key] for row in run["epochs"]] for run in runs])


def at_training_loss(runs, level):
    """Each run's validation accuracy where its training loss first falls to `level`, a mean over
    this epoch and the four before and after it; None where a run's loss stays above it.
    """
    found = []
    pairs = zip(by_epoch(runs, "train_loss"), by_epoch(runs, "val_accuracy"), strict=True)
    for losses, accuracies in pairs:
        if losses.min() > level:
            return None
        epoch = np.argmax(losses <= level)
        found.append(accuracies[max(epoch - 4, 0) : epoch + 5].mean())
    return found


def lowest_common_loss(groups):
    """The lowest training loss, in hundredths, that all runs of all groups reach."""
    reached = max(by_epoch(runs, "train_loss").min(axis=1).max() for runs in groups)
    return math.ceil(100 * reached) / 100


def shifted(runs, n):
    """Each run's test accuracy where all images are moved by n pixels."""
    return [accuracies[n] for accuracies in test(runs, "accuracy_shifted")]


def updates(search):
    batches = math.ceil(search["data"]["counts"]["train"] / search["config"]["batch_size"])
    return search["config"]["epochs"] * batches


# --------------------------------------------------------------------------------- mixes of classes
def class_shares(search, split):
    counts = np.array(search["data"]["class_counts"][split])
    return counts / counts.sum()


def loss_of_shares(search):
    """The loss of a network that looks at no image and gives each class its share."""
    return stats.entropy(class_shares(search, "train"))


def reweighted(search, runs):
    """The accuracy that the recalls on test give with the validation split's mix of classes, and
    the standard error that so few images leave.
    """
    found = [mean(values) for values in recalls(runs).values()]
    accuracy = np.average(found, weights=class_shares(search, "val"))
    return accuracy, error_of_share(accuracy, search, "val")


def error_of_share(accuracy, search, split):
    """The standard error that the number of images of a split leaves to an accuracy."""
    return math.sqrt(accuracy * (1 - accuracy) / search["data"]["counts"][split])


# ----------------------------------------------------------------------- Q2.1: runs that break down
def collapsed(runs, search):
    """The runs that had learned and then fell back to the loss of naming a class unseen."""
    floor = loss_of_shares(search)
    found = []
    for run in runs:
        losses = [row["train_loss"] for row in run["epochs"]]
        if losses[-1] > 0.9 * floor and min(losses) < floor / 2:
            found.append(run)
    return found


def earlier_runs(results):
    """The 150 epochs at the largest rate as trained before, on another processor."""
    return matching(results, r"q2-earlier-lr0.1-seed\d+-epochs150")


def break_down(results, search):
    """150 epochs at the two larger rates: which is ahead, by which rule, and which of the earlier
    runs broke down.
    """
    high, middle = (network(results, "maxpool", rate, "-epochs150") for rate in RATES[:2])
    curves = [by_epoch(runs, "val_accuracy") for runs in (high, middle)]
    leads = (curves[0] - curves[1]).mean(axis=0) > 1e-9  # ties are no leads
    earlier = earlier_runs(results)
    last_thirty = [average(list(curve[:, -30:].mean(axis=1))) for curve in curves]
    return {
        "middle_over_high_test": difference(test(middle, "accuracy"), test(high, "accuracy")),
        "high_late": last_thirty[0],
        "middle_late": last_thirty[1],
        "middle_over_high": difference(last(middle, "val_accuracy"), last(high, "val_accuracy")),
        "high_leads": int(leads.sum()),
        "high_best": average(list(curves[0].max(axis=1))),
        "middle_best": average(list(curves[1].max(axis=1))),
        "n_fallen": len(collapsed(earlier, search)),
        "n_earlier": len(earlier),
    }


# -------------------------------------------------------------------- Q2.2, Q2.3: networks compared
COMPARED = ("pool150", "average150", "strided150")  # at the rate chosen for 150 epochs


def comparisons(results, runs, search):
    """Differences between the networks, with their intervals."""
    accuracy = {name: test(found, "accuracy") for name, found in runs.items()}
    expected, error = reweighted(search, runs["pool"])
    short = {rate: last(network(results, "maxpool", rate), "val_accuracy") for rate in RATES}
    return {
        "high_over_middle": difference(short["0.1"], short["0.01"]),
        "high_over_low": difference(short["0.1"], short["0.001"]),
        "recalls": listing(average(values) for values in recalls(runs["pool"]).values()),
        **{f"{name}_dme": average(recalls(runs[name])["DME"]) for name in ("pool", "strided")},
        "reweighted": f"{expected:.3f}",
        "error_of_val": f"{error:.3f}",
        "lead": difference(accuracy["pool"], accuracy["strided"]),
        "lead_val": difference(*(last(runs[n], "val_accuracy") for n in ("pool", "strided"))),
        "lead150": difference(accuracy["pool150"], accuracy["strided150"]),
        "lead150_fast": difference(accuracy["pool150_fast"], accuracy["strided150_fast"]),
        "selecting": difference(accuracy["pool150"], accuracy["average150"]),
        "selecting_short_size": f"{mean(accuracy['pool']) - mean(accuracy['average']):.3f}",
        "looking": difference(accuracy["average150"], accuracy["strided150"]),
        "looking_short": difference(accuracy["average"], accuracy["strided"]),
        "selecting_fast": difference(accuracy["pool150_fast"], accuracy["average150_fast"]),
        "looking_fast": difference(accuracy["average150_fast"], accuracy["strided150_fast"]),
        "error_of_test": f"{error_of_share(mean(accuracy['pool']), search, 'test'):.3f}",
        "shift_changes": [shift_change(runs, n) for n in (1, 2, 3)],
        "kept": {name: percent(share_kept(runs[f"{name}150"], 3)) for name in ("pool", "strided")},
        **at_equal_loss([runs[name] for name in COMPARED], ""),
        **at_equal_loss([runs[f"{name}_fast"] for name in COMPARED], "fast_"),
        **over_fitting(runs),
    }


def at_equal_loss(groups, prefix):
    """Max-pooling's lead on validation over the average and strides, where all their runs have the
    lowest training loss that they all reach.
    """
    level = lowest_common_loss(groups)
    pool, average_, strided = (at_training_loss(runs, level) for runs in groups)
    return {
        f"{prefix}equal_loss": f"{level:.2f}",
        f"{prefix}equal_loss_average": difference(pool, average_),
        f"{prefix}equal_loss_strided": difference(pool, strided),
    }


EARLY, LATE = slice(15, 40), slice(120, 150)  # epochs 16 to 40 and 121 to 150


def over_fitting(runs):
    """How validation accuracy goes on after epoch 40, at the largest rate."""
    numbers = {}
    for name in ("pool", "average", "strided"):
        curves = by_epoch(runs[f"{name}150_fast"], "val_accuracy")
        early, late = curves[:, EARLY].mean(axis=1), curves[:, LATE].mean(axis=1)
        numbers[f"{name}_early"], numbers[f"{name}_late"] = (
            average(list(values)) for values in (early, late)
        )
        numbers[f"{name}_falls"] = int((late < early).sum())
    return numbers


def share_kept(runs, n, chance=0.25):
    """Of the accuracy above chance, the share that is left where all images are moved by n."""
    return (mean(shifted(runs, n)) - chance) / (mean(shifted(runs, 0)) - chance)


def shift_change(runs, n):
    """By how much max-pooling's lead over strides changes where all images are moved."""
    still, moved = (
        [np.array(shifted(runs[name], pixels)) for name in ("pool150", "strided150")]
        for pixels in (0, n)
    )
    return difference(moved[0] - still[0], moved[1] - still[1])


# ------------------------------------------------------------------------------------------- tables
def rate_rows(results, epochs):
    """The search over the rates, Q2.1's answer in bold; last the network that does not look."""
    found = search(results, epochs)
    rows = []
    for rate in found["config"]["learning_rate"]:
        runs = network(results, "maxpool", f"{rate:g}", epochs)
        cells = [str(found["config"]["epochs"]), f"{rate:g}"]
        cells += map(spread, measures(runs).values())
        if not epochs and rate == found["best"]["learning_rate"]:
            cells = [f"*{cell}*" for cell in cells]
        rows.append(cells)
    naming = [f"{max(class_shares(found, split)):.3f}" for split in ("val", "test")]
    rows.append(["", "_image not seen_", f"{loss_of_shares(found):.3f}", *naming, "0.500"])
    return rows


def compared_rows(runs):
    """All networks after 15 epochs, and after 150 at two rates."""
    titles = {"pool": "max-pool", "strided": "strided", "average": "average pooling (Q2.3)"}
    rows = []
    for name, found in runs.items():
        config, title = found[0]["config"], titles[name.partition("150")[0]]
        setting = f"{config['epochs']}, {config['learning_rate']:g}"
        cells = [setting, title, *map(spread, measures(found).values())]
        rows.append([f"*{cell}*" for cell in cells] if name in ("pool", "strided") else cells)
    return rows
