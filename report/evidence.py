"""Every number that the report shows, by name, computed from the results.

The text in report/*.typ asks for them by these names (`#n.best_rate`) and gets them as text, ready
to print. Nothing here is a sentence: what the sentences say beyond numbers is in claims.py.

A cell of a table is Typst markup: *bold*, $D$.
"""

import functools
import math
import re
from collections import Counter
from itertools import pairwise
from statistics import mean, stdev

from runs import UserError

import jiwer
import numpy as np
from rapidfuzz.distance import DamerauLevenshtein
from scipy import stats


# --------------------------------------------------------------------------------- numbers as text
def spread(values, digits=3):
    """[0.54, 0.58] -> "0.560 ± 0.028", unbroken: mean and standard deviation."""
    if len(values) < 2:
        return average(values, digits)
    return f"{mean(values):.{digits}f}\u00a0±\u00a0{stdev(values):.{digits}f}"


def average(values, digits=3):
    """The mean as text; a dash where there is nothing."""
    return f"{mean(values):.{digits}f}" if values else "–"


def whole(n):
    """46620 -> "46,620"."""
    return f"{n:,}" if n else "not found"


def percent(share):
    return f"{100 * share:.0f} %"


def signed(x, digits=3):
    """With a minus as long as a plus."""
    return f"{x:.{digits}f}".replace("-", "−")


def power(x):
    """4.7e-14 -> "4.7 × 10⁻¹⁴"."""
    digits, exponent = f"{x:.1e}".split("e")
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"{digits} × 10{str(int(exponent)).translate(raised)}"


def time_text(seconds):
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min"


def bytes_text(n):
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 1e3:.0f} kB"


def listing(items):
    """["a", "b", "c"] -> "a, b and c"; "none" for nothing."""
    *first, last = map(str, list(items) or ["none"])
    return f"{', '.join(first)} and {last}" if first else last


def extent(values):
    """[5, 3, 4] -> "3 to 5"."""
    values = list(values)
    low, high = min(values), max(values)
    return f"{low:,} to {high:,}" if low < high else f"{low:,}"


def interval(low, high, digits=3):
    return f"{signed(low, digits)} to {signed(high, digits)}"


# -------------------------------------------------------------------------------------- statistics
def welch(a, b):
    """The difference of two means, and its 95 % interval, for unequal variances."""
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return mean(a) - mean(b), float(low), float(high)


def difference(a, b, digits=3):
    """ "0.130 (95 % interval 0.097 to 0.163)"."""
    size, low, high = welch(a, b)
    return f"{signed(size, digits)} (95 % interval {interval(low, high, digits)})"


def paired(a, b):
    """The mean of a - b, one value a seed each, and its 95 % t interval."""
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    return mean(a) - mean(b), float(low), float(high)


def share_with_interval(parts, wholes):
    """The share mean(parts) / mean(wholes) of paired values, and Fieller's 95 % interval for it.

    The interval holds every share r that a paired t test of parts - r * wholes does not reject:

        mean(parts - r wholes)^2 <= t^2 / n * variance(parts - r wholes),

    which is a r^2 - 2 b r + c <= 0 with the a, b and c below.
    """
    n = len(parts)
    part, whole = np.mean(parts), np.mean(wholes)
    variances = np.cov(parts, wholes)  # (2, 2)
    k = stats.t.ppf(0.975, n - 1) ** 2 / n
    a = whole**2 - k * variances[1, 1]
    b = part * whole - k * variances[0, 1]
    c = part**2 - k * variances[0, 0]
    width = math.sqrt(b**2 - a * c)
    return part / whole, ((b - width) / a, (b + width) / a)


def over_images(a, b, n):
    """95 % interval of the difference of two accuracies that the choice of n images leaves, the two
    networks' answers taken as independent.
    """
    error = math.sqrt(a * (1 - a) / n + b * (1 - b) / n)
    return a - b - 1.96 * error, a - b + 1.96 * error


def matching(results, pattern):
    """The results whose names match, in the order of their names; UserError where there is none."""
    found = [results[name] for name in sorted(results) if re.fullmatch(pattern, name)]
    if not found:
        raise UserError(f"there is no result {pattern} to report on; run what makes it.")
    return found


# -------------------------------------------------------------------------------------- Question 1
def curve(q1, method, D):
    """The measurement of one method at one head size."""
    return next(row for row in q1["scaling"] if (row["method"], row["D"]) == (method, D))


def at_length(row, L, key):
    return row[key][row["seq_lens"].index(L)]


def common_length(q1):
    """The longest length that every method was measured at."""
    return min(row["seq_lens"][-1] for row in q1["scaling"] if row["seq_lens"])


def q1_numbers(results):
    q1 = results["q1"]
    dims = q1["config"]["dims"]
    D, L = dims[-1], common_length(q1)
    linear, fused = curve(q1, "linear", D), curve(q1, "softmax, fused", D)
    longest = fused["seq_lens"][-1]
    three = next(row for row in q1["approximation"] if row["n_terms"] == 3)
    errors = list(zip(three["score_scale"], three["error"]))
    even = [row for row in q1["approximation"] if row["n_terms"] % 2 == 0]
    crossings = [row for row in q1["crossover"] if row["against"] == "softmax, fused"]
    (many_heads,) = q1["many_heads_crossover"]
    near = within_a_tenth(3)

    def slopes(method):
        return listing(fitted_slope(curve(q1, method, D)) for D in dims)

    return {
        "processor": q1["environment"]["processor"],
        "threads": q1["environment"]["threads"],
        "rounds": q1["config"]["rounds"],
        "dims": listing(dims),
        "D": D,
        "L": f"{L:,}",
        "longest": f"{longest:,}",
        "near_from": signed(min(near), 1),
        "near_to": signed(max(near), 1),
        "small_scores": q1["weights"][0]["score_scale"],
        "large_scores": q1["weights"][1]["score_scale"],
        "n_identities": len({row["D"] for row in q1["identities"]}),
        "identity_error": power(max(max(r["full"], r["reduced"]) for r in q1["identities"])),
        "features_reduced": f"{reduced(D):,}",
        "smallest_score": errors[0][0],
        "smallest_error": power(errors[0][1]),
        "good_until": max(scale for scale, error in errors if error < 0.01),
        "fair_until": max(scale for scale, error in errors if error < 0.1),
        "largest_score": f"{errors[-1][0]:g}",
        "largest_error": f"{errors[-1][1]:.1f}",
        "most_negative": percent(max(max(row["negative_weights"]) for row in even)),
        "refused": listing(row["n_terms"] for row in even if None in row["error"]),
        "slopes_linear": slopes("linear"),
        "slopes_fused": slopes("softmax, fused"),
        "slope_lengths": extent(linear["slope_lengths"]),
        "slope_lengths_plain": extent(curve(q1, "softmax, plain", D)["slope_lengths"]),
        "growth_by_D": [extent_of(row) for row in growth_by_D(q1)],
        "growth_by_count": [f"{b * reduced(b) / (a * reduced(a)):.1f}" for a, b in pairwise(dims)],
        "fused_bytes": bytes_text(at_length(fused, L, "peak_bytes")),
        "memory_row": bytes_text(4 * D * reduced(D)),
        "floor_of_five": f"{least_of_series(5):.2f}",
        "faults": whole(round(faults(results)["given_back"])),
        "faults_kept": f"{faults(results)['kept']:.0f}",
        "faults_at": f"{faults(results)['L']:,}",
        "faster": f"{at_length(fused, L, 'seconds') / at_length(linear, L, 'seconds'):.1f}",
        "faster_by_count": f"{L / reduced(D):.1f}",
        "fused_longest": time_text(fused["seconds"][-1]),
        "linear_longest": time_text(linear["seconds"][-1]),
        "crossings": listing(whole(row["measured"]) for row in crossings),
        "crossings_by_count": listing(whole(row["predicted"]) for row in crossings),
        "many_heads": many_heads["heads"],
        "many_heads_crossing": whole(many_heads["measured"]),
        "many_heads_L": f"{many_heads['seq_len']:,}",
        "many_heads_faster": f"{many_heads['gain']:.1f}",
        "linear_bytes": bytes_text(linear["peak_bytes"][-1]),
        "state": f"{reduced(D) * (D + 1):,}",
        "rows": q1_rows(q1, L),
    }


def faults(results):
    """Page faults in a call of the plain formula, at the longest length that was counted."""
    return results["q1-faults"]["rows"][-1]


def fitted_slope(row):
    """The slope of log time against log length, and the standard error of its fit."""
    n = len(row["slope_lengths"])
    fit = stats.linregress(np.log(row["slope_lengths"]), np.log(row["seconds"][-n:]))
    return f"{fit.slope:.2f}\u00a0±\u00a0{fit.stderr:.2f}"


def growth_by_D(q1):
    """By which factors linear attention's time grows from one head size to the next, a row for each
    step, a factor for each length that the slope is fitted on.
    """
    rows = []
    for small, big in pairwise(curve(q1, "linear", D) for D in q1["config"]["dims"]):
        lengths = small["slope_lengths"]
        times = [[at_length(row, L, "seconds") for L in lengths] for row in (small, big)]
        rows.append([b / a for a, b in zip(*times)])
    return rows


def extent_of(factors):
    return f"{min(factors):.1f} to {max(factors):.1f}"


def least_of_series(n_terms):
    """The least value of the exponential's series with an odd number of terms."""
    t = np.linspace(-5, 5, 100_001)
    return min(sum(t**n / math.factorial(n) for n in range(n_terms)))


def within_a_tenth(n_terms):
    """The scores t for which the series with so many terms is within 10 % of exp(t)."""
    t = np.linspace(-3, 3, 60_001)
    found = sum(t**n / math.factorial(n) for n in range(n_terms))
    return t[np.abs(found - np.exp(t)) <= 0.1 * np.exp(t)]


def reduced(D):
    """M without repeated products, for three terms."""
    return (D + 1) * (D + 2) // 2


def q1_rows(q1, L):
    """The table of measurements: method, D, slope, time, memory, wins from, by count."""
    rows = []
    for D in q1["config"]["dims"]:
        for method in ("linear", "softmax, fused", "softmax, plain"):
            row = curve(q1, method, D)
            cells = [method, str(D), fitted_slope(row) if row["slope"] else "–"]
            if L in row["seq_lens"]:
                cells.append(time_text(at_length(row, L, "seconds")))
                cells.append(bytes_text(at_length(row, L, "peak_bytes")))
            else:
                cells += ["–", "–"]
            for crossing in q1["crossover"]:
                if (crossing["against"], crossing["D"]) == (method, D):
                    cells += [whole(crossing["measured"]), whole(crossing["predicted"])]
            rows.append(cells + [""] * (7 - len(cells)))
    return rows


# -------------------------------------------------------------------------------------- Question 2
CLASSES = ("CNV", "DME", "drusen", "normal")


def search(results, epochs=""):
    """The search over learning rates; `epochs`: the end of its name, "" or "-epochs150"."""
    return results[f"q2-search{epochs}"]


def network(results, name, rate, epochs=""):
    """The runs of one network at one rate, in the order of their seeds."""
    return matching(results, rf"q2-{name}-lr{rate}-seed\d+{epochs}")


def last(runs, key):
    """The values of the last epoch."""
    return [run["epochs"][-1][key] for run in runs]


def test(runs, key="accuracy"):
    return [run["test"][key] for run in runs]


def class_shares(search, split):
    counts = search["data"]["class_counts"][split]
    return [count / sum(counts) for count in counts]


def loss_of_shares(search):
    """The loss of a network that looks at no image and gives each class its share."""
    return -sum(share * math.log(share) for share in class_shares(search, "train"))


def recall(runs, k):
    """The share of the test images of class k that each run finds."""
    return [run["test"]["confusion"][k][k] / sum(run["test"]["confusion"][k]) for run in runs]


def reweighted(search, runs):
    """The accuracy that the recalls on test give with the validation split's mix of classes, and
    the standard error that so few images leave.
    """
    shares = class_shares(search, "val")
    accuracy = sum(share * mean(recall(runs, k)) for k, share in enumerate(shares))
    n_images = search["data"]["counts"]["val"]
    return accuracy, math.sqrt(accuracy * (1 - accuracy) / n_images)


def updates(search):
    batches = math.ceil(search["data"]["counts"]["train"] / search["config"]["batch_size"])
    return search["config"]["epochs"] * batches


def collapsed(runs, search):
    """The runs that had learned and ended at the loss of naming a class without looking."""
    floor = loss_of_shares(search)
    found = []
    for run in runs:
        losses = [row["train_loss"] for row in run["epochs"]]
        if losses[-1] > 0.9 * floor and min(losses) < floor / 2:
            found.append(run)
    return found


def shifted(runs, n):
    """Each run's test accuracy where all images are moved by n pixels."""
    return [run["test"]["accuracy_shifted"][n] for run in runs]


def shift_change(runs, n):
    """By how much max-pooling's lead over strides changes where all images are moved."""
    pool, strided = (
        [moved - still for moved, still in zip(shifted(group, n), shifted(group, 0))]
        for group in (runs["pool150"], runs["strided150"])
    )
    return difference(pool, strided)


def q2_networks(results):
    """The runs that Q2.2 and Q2.3 compare, at the rates that were chosen with max-pooling."""
    short, long = search(results), search(results, "-epochs150")
    rate, long_rate = (s["best"]["learning_rate"] for s in (short, long))
    return {
        "pool": network(results, "maxpool", rate),
        "strided": network(results, "strided", rate),
        "average": network(results, "avgpool", rate),
        "pool150": network(results, "maxpool", long_rate, "-epochs150"),
        "strided150": network(results, "strided", long_rate, "-epochs150"),
        "average150": network(results, "avgpool", long_rate, "-epochs150"),
        "pool150_fast": network(results, "maxpool", "0.1", "-epochs150"),
        "strided150_fast": network(results, "strided", "0.1", "-epochs150"),
    }


def class_rows(search):
    """The number of images of each class, a row for each split."""
    rows = []
    for split, title in (("train", "training"), ("val", "validation"), ("test", "test")):
        found = search["data"]["class_counts"][split]
        rows.append([title, *map(str, found), f"{sum(found):,}"])
    return rows


def compared_rows(runs):
    """Q2.2: both networks after 15 epochs, and after 150 at two rates; Q2.3's control after 15."""
    titles = {"pool": "max-pool", "strided": "strided", "average": "average pooling (Q2.3)"}
    rows = []
    for epochs, end in ((15, ""), (150, "150"), (150, "150_fast")):
        for name, title in titles.items():
            group = runs.get(name + end, [])
            if not group or (name, epochs) == ("average", 150):  # that is in network_rows
                continue
            rate = f"{group[0]['config']['learning_rate']:g}"
            losses, accuracies = last(group, "train_loss"), last(group, "val_accuracy")
            scores = spread(test(group)), spread(test(group, "auc"))
            rows.append([f"{epochs}, {rate}", title, spread(losses), spread(accuracies), *scores])
    return rows


def q2_numbers(results):
    short, long = search(results), search(results, "-epochs150")
    runs = q2_networks(results)
    pool, average, strided = (np.array(test(runs[name])) for name in NETWORKS)
    share, interval_of_share = share_with_interval(pool - average, pool - strided)
    numbers = {
        "source": short["data"]["source"],
        "n_seeds": len(runs["pool"]),
        "n_train": f"{short['data']['counts']['train']:,}",
        "n_val": short["data"]["counts"]["val"],
        "n_test": short["data"]["counts"]["test"],
        "n_images": f"{sum(short['data']['counts'].values()):,}",
        "batch_size": short["config"]["batch_size"],
        "updates_an_epoch": f"{updates(short) / short['config']['epochs']:.0f}",
        "parameters": f"{short['parameters']:,}",
        "products_pool": f"{runs['pool'][0]['multiply_accumulates']:,}",
        "products_strided": f"{runs['strided'][0]['multiply_accumulates']:,}",
        "loss_of_shares": f"{loss_of_shares(short):.3f}",
        "largest_share_val": f"{max(class_shares(short, 'val')):.3f}",
        "percent_normal_val": percent(max(class_shares(short, "val"))),
        "largest_share_test": f"{max(class_shares(short, 'test')):.3f}",
        "rows": q2_rows(results, ""),
        "rows150": q2_rows(results, "-epochs150"),
        "network_rows": network_rows(runs),
        "class_rows": class_rows(short),
        "compared_rows": compared_rows(runs),
        "shift_changes": [shift_change(runs, n) for n in (1, 2, 3)],
        "reversed": difference(test(runs["strided150_fast"]), test(runs["pool150_fast"])),
        "recalls": listing(f"{mean(recall(runs['pool'], k)):.3f}" for k in range(len(CLASSES))),
        "selecting_short_size": f"{welch(test(runs['pool']), test(runs['average']))[0]:.3f}",
        "share_selecting": percent(share),
        "share_interval": " to ".join(map(percent, interval_of_share)),
    }
    for name, found in (("short", short), ("long", long)):
        numbers[f"rate_{name}"] = f"{found['best']['learning_rate']:g}"
        numbers[f"updates_{name}"] = f"{updates(found):,}"
    for name, rate in (("high", "0.1"), ("middle", "0.01"), ("low", "0.001")):
        numbers[name] = scores_of(network(results, "maxpool", rate))
        numbers[f"{name}150"] = scores_of(network(results, "maxpool", rate, "-epochs150"))

    high = network(results, "maxpool", "0.1", "-epochs150")
    fallen = collapsed(high, long)
    others = [run for run in high if run not in fallen]
    middle = network(results, "maxpool", "0.01", "-epochs150")
    numbers["middle_over_high"] = difference(
        last(middle, "val_accuracy"), last(high, "val_accuracy")
    )
    numbers["n_fallen"] = len(fallen)
    numbers["val_of_fallen"] = listing(f"{value:.3f}" for value in last(fallen, "val_accuracy"))
    numbers["lowest_of_fallen"] = listing(
        f"{min(row['train_loss'] for row in run['epochs']):.2f}" for run in fallen
    )
    numbers["others"] = scores_of(others)

    for name, found in runs.items():
        numbers[name] = scores_of(found)
    numbers["lead_size"] = f"{welch(test(runs['pool']), test(runs['strided']))[0]:.3f}"
    numbers["lead"] = difference(test(runs["pool"]), test(runs["strided"]))
    numbers["lead_val"] = difference(
        last(runs["pool"], "val_accuracy"), last(runs["strided"], "val_accuracy")
    )
    accuracies = mean(test(runs["pool"])), mean(test(runs["strided"]))
    numbers["lead_over_images"] = interval(*over_images(*accuracies, numbers["n_test"]))
    numbers["lead150"] = difference(test(runs["pool150"]), test(runs["strided150"]))
    numbers["selecting"] = difference(test(runs["pool150"]), test(runs["average150"]))
    numbers["selecting_short"] = difference(test(runs["pool"]), test(runs["average"]))
    numbers["looking_short"] = difference(test(runs["average"]), test(runs["strided"]))
    numbers["looking"] = difference(test(runs["average150"]), test(runs["strided150"]))
    expected, error = reweighted(short, runs["pool"])
    return {**numbers, "reweighted": f"{expected:.3f}", "error_of_val": f"{error:.3f}"}


def scores_of(runs):
    """What the text says of a network's runs."""
    return {
        "loss": average(last(runs, "train_loss")),
        "val": spread(last(runs, "val_accuracy")),
        "val_mean": average(last(runs, "val_accuracy")),
        "test": spread(test(runs)),
        "test_mean": average(test(runs)),
        "drusen_as_normal": average([run["test"]["confusion"][2][3] for run in runs], 0),
    }


def q2_rows(results, epochs):
    """The search over the rates, Q2.1's answer in bold; last the network that does not look."""
    found = search(results, epochs)
    rows = []
    for rate in found["config"]["learning_rate"]:
        runs = network(results, "maxpool", f"{rate:g}", epochs)
        cells = [str(found["config"]["epochs"]), f"{rate:g}", spread(last(runs, "train_loss"))]
        cells += [spread(last(runs, "val_accuracy")), spread(test(runs)), spread(test(runs, "auc"))]
        if not epochs and rate == found["best"]["learning_rate"]:
            cells = [f"*{cell}*" for cell in cells]
        rows.append(cells)
    naming = [f"{max(class_shares(found, split)):.3f}" for split in ("val", "test")]
    rows.append(["", "_image not seen_", f"{loss_of_shares(found):.3f}", *naming, "0.500"])
    return rows


NETWORKS = ("pool150", "average150", "strided150")


def network_rows(runs):
    """Q2.3: what is measured, for each of the three networks."""
    found = [runs[name] for name in NETWORKS]
    measures = {
        "training loss": lambda group: last(group, "train_loss"),
        "validation": lambda group: last(group, "val_accuracy"),
        "test": test,
        "test AUC": lambda group: test(group, "auc"),
    }
    for k, name in enumerate(CLASSES):
        measures[name] = functools.partial(recall, k=k)
    rows = [["products", *(f"{group[0]['multiply_accumulates']:,}" for group in found), ""]]
    for title, measure in measures.items():
        values = [measure(group) for group in found]
        size, *ends = welch(values[0], values[2])
        lead = f"{signed(size)} ({interval(*ends)})"
        rows.append([title, *map(spread, values), lead])
    return rows


# -------------------------------------------------------------------------------------- Question 3
DECODERS = {"lstm": "LSTM", "transformer": "transformer"}
SCORES = {
    "damerau_levenshtein": "DL",
    "jaccard": "Jaccard",
    "cosine": "cosine",
    "wer": "WER",
    "cer": "CER",
}
SEEDS = (42, 43, 44)


def full_runs(results, decoder):
    """The trainings on all of the corpus, one for each seed."""
    return [results[f"q3-{decoder}-full-seed{seed}"] for seed in SEEDS]


def similarity(run):
    return run["test"]["damerau_levenshtein"]


def clip_pairs(results):
    """For each seed (n, 2): the similarity of the LSTM and of the transformer on every clip."""
    both = [full_runs(results, decoder) for decoder in DECODERS]
    columns = [[run["clips"]["damerau_levenshtein"] for run in runs] for runs in both]
    return [np.column_stack(pair) for pair in zip(*columns)]


def mean_lead(pairs):
    """The transformer's mean lead over the clips of one seed, and its 95 % interval."""
    lead = pairs[:, 1] - pairs[:, 0]
    error = lead.std(ddof=1) / math.sqrt(len(lead))
    return lead.mean(), lead.mean() - 1.96 * error, lead.mean() + 1.96 * error


def counts_of(pairs):
    """How the clips of one seed fall out."""
    lstm, transformer = pairs.T
    lead = transformer - lstm
    lost = is_derailed(pairs).any(axis=1)  # by one of the two, or by both
    return {
        "lstm_better": int((lead < 0).sum()),
        "transformer_better": int((lead > 0).sum()),
        "median": float(np.median(lead)),
        "lstm_exact": int(is_exact(lstm).sum()),
        "transformer_exact": int(is_exact(transformer).sum()),
        "lstm_derailed": int(is_derailed(lstm).sum()),
        "transformer_derailed": int(is_derailed(transformer).sum()),
        "lost": int(lost.sum()),
        "lead_of_lost": float(lead[lost].sum() / len(lead)),
        "lead_of_kept": float(lead[~lost].sum() / len(lead)),
    }


def n_running_on(run):
    """The clips whose text is longer than the true one by more than a quarter."""
    clips = run["clips"]
    return sum(written > 1.25 * n for n, written in zip(clips["letters"], clips["written"]))


def ends_in_a_loop(text, n=36):
    """Whether the last `n` letters repeat something of a third of that length or less."""
    tail = text[-n:]
    periods = range(1, n // 3 + 1)
    return len(tail) == n and any(tail[period:] == tail[:-period] for period in periods)


def kinds_of_failure(results, decoder):
    """How the texts below 0.7 go wrong: in a loop, too long otherwise, too short, or else."""
    texts = results["q3-derailed"]["texts"]
    kinds = Counter()
    for seed in SEEDS:
        for row in texts[f"q3-{decoder}-full-seed{seed}"]:
            written, n = row["hypothesis"], len(row["reference"])
            if ends_in_a_loop(written):
                kinds["loop"] += 1
            elif len(written) > 1.25 * n:
                kinds["long"] += 1
            elif len(written) < 0.75 * n:
                kinds["short"] += 1
            else:
                kinds["other"] += 1
    return kinds


def derailed_counts(results, decoder):
    """What q3-derailed.json counted in all texts of each seed."""
    counts = results["q3-derailed"]["derails"]["counts"]
    return [counts[f"q3-{decoder}-full-seed{seed}"] for seed in SEEDS]


def discordant(pairs, is_so):
    """McNemar's test of a yes-or-no question about clips: how many say yes for the LSTM alone, how
    many for the transformer alone, and the p-value that this is chance.
    """
    lstm, transformer = is_so(pairs).T
    alone = int((lstm & ~transformer).sum()), int((transformer & ~lstm).sum())
    return *alone, float(stats.binomtest(alone[0], sum(alone)).pvalue)


def sign_test(pairs):
    """p-value that as many clips are written better by one as by the other."""
    lead = pairs[:, 1] - pairs[:, 0]
    p = stats.binomtest(int((lead < 0).sum()), int((lead != 0).sum())).pvalue
    return f"{p:.2f}" if p >= 0.001 else "< 0.001"


def trial_p(results):
    """Fisher's test of the small grammar's runs that align with neither CTC loss nor clock."""
    table = []
    for name in ("lstm-trial-noctc", "transformer-trial-noctc-random"):
        found = trials(results, name)
        aligned = sum(passes_half(run) is not None for run in found)
        table.append([aligned, len(found) - aligned])
    return f"{stats.fisher_exact(table).pvalue:.2f}"


def is_exact(similarities):
    return similarities == 1


def is_derailed(similarities):
    return similarities < 0.7


def by_length(run, n_parts):
    """Mean similarity in `n_parts` equally many clips each, from the shortest to the longest."""
    seconds = np.array(run["clips"]["seconds"])
    values = np.array(run["clips"]["damerau_levenshtein"])
    order = seconds.argsort(kind="stable")
    return [float(values[part].mean()) for part in np.array_split(order, n_parts)]


def passes_half(run):
    """The epoch in which a run first passes one half in similarity on validation, or None."""
    for row in run["epochs"]:
        if row["damerau_levenshtein"] > 0.5:
            return row["epoch"]
    return None


TRIALS = {  # short trainings on a small grammar: decoder, what is given: the end of their names
    ("LSTM", "CTC"): "lstm-trial-ctc",
    ("LSTM", "nothing"): "lstm-trial-noctc",
    ("transformer", "CTC, clock"): "transformer-trial-ctc",
    ("transformer", "clock"): "transformer-trial-noctc",
    ("transformer", "CTC"): "transformer-trial-ctc-random",
    ("transformer", "nothing"): "transformer-trial-noctc-random",
}


def trials(results, name):
    return matching(results, rf"q3-{name}-seed\d+")


def trial_rows(results):
    rows = []
    for (decoder, given), name in TRIALS.items():
        found = trials(results, name)
        epochs = [passes_half(run) for run in found]
        aligned = [epoch for epoch in epochs if epoch]
        rows.append(
            [
                decoder,
                given,
                f"{len(aligned)} of {len(found)}",
                extent(aligned) if aligned else "–",
                spread([similarity(run) for run in found]),
            ]
        )
    return rows


REAL = {  # what a decoder was trained on before it met the real clips of the test part
    "asis-plain": "synthetic voice",
    "asis": "synthetic voice, varied",
    "realonly": "real clips only",
    "finetuned": "synthetic voice, varied; then real clips",
}


def real_runs(results, decoder, kind):
    return matching(results, rf"q3-{decoder}-{kind}(-seed\d+)?")


def real_rows(results):
    rows = []
    for kind, title in REAL.items():
        cells = [title]
        for decoder in DECODERS:
            found = real_runs(results, decoder, kind)
            cells += [spread([similarity(run) for run in found])]
            cells += [f"{mean(run['test']['wer'] for run in found):.3f}"]
        rows.append(cells)
    return rows


def score_rows(results):
    """Loss and every score of both decoders on the test clips."""
    rows = []
    for decoder, title in DECODERS.items():
        runs = full_runs(results, decoder)
        rows.append([title, *(spread(test(runs, key)) for key in ("loss", *SCORES))])
    single = {
        "LSTM, no CTC": "q3-lstm-full-handed-out",
        "transformer, clock only": "q3-transformer-full-noctc",
        "transformer, neither": "q3-transformer-full-handed-out",
    }
    for title, name in single.items():
        rows.append([title, *(f"{results[name]['test'][key]:.3f}" for key in ("loss", *SCORES))])
    return rows


def seed_rows(results):
    """Transformer less LSTM, paired over the seeds: the difference and its 95 % interval."""
    lstm, transformer = (full_runs(results, decoder) for decoder in DECODERS)
    rows = []
    for key, title in (
        ("loss", "loss"),
        ("damerau_levenshtein", "DL"),
        ("wer", "WER"),
        ("cer", "CER"),
    ):
        size, *ends = paired(test(transformer, key), test(lstm, key))
        rows.append([title, signed(size, 4), interval(*ends, 4)])
    return rows


def lead_rows(results):
    """The transformer's mean lead in similarity over the clips, a column for each seed."""
    pairs = clip_pairs(results)
    counts = [counts_of(p) for p in pairs]
    leads = [mean_lead(p) for p in pairs]
    return [
        ["mean lead", *(signed(size, 4) for size, *_ in leads)],
        ["95 % interval", *(interval(*ends) for _, *ends in leads)],
        ["lost clips", *(str(count["lost"]) for count in counts)],
        ["their part of it", *(signed(count["lead_of_lost"], 4) for count in counts)],
        ["the others' part", *(signed(count["lead_of_kept"], 4) for count in counts)],
        ["sign test, $p$", *(sign_test(p) for p in pairs)],
    ]


def handed_out_cells(results, decoder):
    """The test scores of the one run without CTC loss and clock."""
    run = results[f"q3-{decoder}-full-handed-out"]
    return [f"{run['test'][key]:.3f}" for key in ("loss", *SCORES)]


def clip_rows(results):
    """Counts over the test clips, a row for each, a column for each seed and decoder."""
    counts = [counts_of(pairs) for pairs in clip_pairs(results)]
    running = {name: [n_running_on(run) for run in full_runs(results, name)] for name in DECODERS}
    rows = []
    titles = {
        "better": "written better than by the other",
        "exact": "written without an error",
        "derailed": "below a similarity of 0.7",
    }
    for key, title in titles.items():
        cells = [f"{count[f'{name}_{key}']:,}" for count in counts for name in DECODERS]
        rows.append([title, *cells])
    pairs = zip(running["lstm"], running["transformer"])
    rows.append(["more than a quarter too long", *(str(n) for pair in pairs for n in pair)])
    return rows


EXAMPLES = {  # ways to write "his visas": what happened
    "his vises": "one letter replaced",
    "his visa s": "one letter more, a space",
    "visas his": "the words exchanged",
    "his": "cut",
    "his visas visas visas": "running on",
}


def example_rows():
    """Q3.4: the scores of some texts."""
    a = "his visas"
    rows = []
    for b, title in EXAMPLES.items():
        A, B = Counter(a), Counter(b)
        both, either = (A & B).total(), (A | B).total()
        values = [
            DamerauLevenshtein.normalized_similarity(a, b),
            both / either,
            both / math.sqrt(len(a) * len(b)),
            jiwer.wer(a, b),
            jiwer.cer(a, b),
        ]
        rows.append([f"_{b}_", title, *(f"{value:.2f}" for value in values)])
    return rows


def text_rows(results, longest=112):
    """Q3.3: what was said and written in some clips; the middle of long texts is left out."""
    rows = []
    for example in results["q3-derailed"]["examples"]:
        for key, title in {"said": "_said_", **DECODERS}.items():
            text = example[key]
            cut = f"{text[: longest - 28]} … {text[-24:]}" if len(text) > longest else text
            rows.append([title, f"`{cut}`"])
    return rows


def dl_less_jaccard(runs, gaps):
    """DL less Jaccard for texts with a DL of at least 0.9, between, and below 0.7: of each group
    (its share of the clips, its mean difference), means over the seeds. What lies between follows
    from the mean over all clips.
    """
    rows = []
    for run, gap in zip(runs, gaps, strict=True):
        values = np.array(run["clips"]["damerau_levenshtein"])
        high, low = (values >= 0.9).mean(), is_derailed(values).mean()
        total = run["test"]["damerau_levenshtein"] - run["test"]["jaccard"]
        rest = total - high * gap["at least 0.9"] - low * gap["below 0.7"]
        middle = 1 - high - low
        rows.append([high, gap["at least 0.9"], middle, rest / middle, low, gap["below 0.7"]])
    shares_and_gaps = np.mean(rows, axis=0).reshape(3, 2)
    return [[f"{100 * share:.1f} %", signed(size)] for share, size in shares_and_gaps]


def q3_decoder(results, decoder):
    """What the text says of one decoder."""
    runs = full_runs(results, decoder)
    handed_out = results[f"q3-{decoder}-full-handed-out"]
    counts = [counts_of(pairs) for pairs in clip_pairs(results)]
    numbers = {key: spread(test(runs, key)) for key in ("loss", *SCORES)}
    similarities = ("damerau_levenshtein", "jaccard", "cosine")
    numbers |= {f"val_{key}": spread(last(runs, key)) for key in similarities}
    derailed = derailed_counts(results, decoder)
    kinds = kinds_of_failure(results, decoder)
    eighths = np.mean([by_length(run, 8) for run in runs], axis=0)
    gaps = [row["dl_less_jaccard"] for row in derailed]
    numbers |= {
        "first_val_loss": spread([run["epochs"][0]["val_loss"] for run in runs]),
        "val_loss": spread(last(runs, "val_loss")),
        "parameters": f"{runs[0]['parameters']:,}",
        "best_eighth": f"{max(eighths):.3f}",
        "longest_eighth": f"{eighths[-1]:.3f}",
        "train_loss": spread(last(runs, "train_loss")),
        "kinds": {**kinds, "all": kinds.total()},
        "derails": extent(row["derails"] for row in derailed),
        "share_of_letter_errors": extent(
            round(100 * row["share_of_letter_errors"]) for row in derailed
        ),
        "words_to_letters": f"{mean(test(runs, 'wer')) / mean(test(runs, 'cer')):.1f}",
        "dl_less_jaccard": dl_less_jaccard(runs, gaps),
        "handed_out": f"{similarity(handed_out):.3f}",
        "handed_out_cells": handed_out_cells(results, decoder),
        "handed_out_aligned": passes_half(handed_out),
        "aligned": listing(sorted({passes_half(run) for run in runs})),
        "exact": extent(count[f"{decoder}_exact"] for count in counts),
        "derailed": extent(count[f"{decoder}_derailed"] for count in counts),
    }
    return numbers


def q3_numbers(results):
    lstm, transformer = (full_runs(results, decoder) for decoder in DECODERS)
    config = lstm[0]["config"]
    model = results["q3-model"]
    unrelated = lstm[0]["unrelated"]
    real_run = real_runs(results, "lstm", "finetuned")[0]
    real = real_run["data"]["counts"]
    return {
        "source": lstm[0]["data"]["source"],
        "n_train": f"{lstm[0]['data']['counts']['train']:,}",
        "n_val": f"{lstm[0]['data']['counts']['val']:,}",
        "n_test": f"{lstm[0]['data']['counts']['test']:,}",
        "n_seeds": len(lstm),
        "config": config,
        "warmup": percent(config["warmup"]),
        "lstm": q3_decoder(results, "lstm"),
        "transformer": q3_decoder(results, "transformer"),
        "score_rows": score_rows(results),
        "seed_rows": seed_rows(results),
        "lead_rows": lead_rows(results),
        "clip_rows": clip_rows(results),
        "trial_p": trial_p(results),
        "more_parameters": f"{lstm[0]['parameters'] - transformer[0]['parameters']:,}",
        "clock_only": f"{similarity(results['q3-transformer-full-noctc']):.3f}",
        "longest_clip": f"{max(lstm[0]['clips']['seconds']):.1f}",
        "trial_rows": trial_rows(results),
        "n_trials": len(trials(results, "lstm-trial-ctc")),
        "n_sentences": f"{sum(trials(results, 'lstm-trial-ctc')[0]['data']['counts'].values()):,}",
        "unrelated": {key: f"{value:.3f}" for key, value in unrelated.items()},
        "example_rows": example_rows(),
        "text_rows": text_rows(results),
        "unrelated_real": f"{real_run['unrelated']['damerau_levenshtein']:.3f}",
        "n_real": f"{sum(real.values()):,}",
        "n_real_train": real["train"],
        "n_real_val": real["val"],
        "n_real_test": real["test"],
        "real_rows": real_rows(results),
        "greedy": f"{model['test']['greedy']['damerau_levenshtein']:.3f}",
        "greedy_wer": f"{model['test']['greedy']['wer']:.3f}",
        "greedy_interval": interval(*model["test"]["greedy"]["interval"]),
        "beam": f"{model['test']['beam']['damerau_levenshtein']:.3f}",
        "beam_wer": f"{model['test']['beam']['wer']:.3f}",
        "beam_interval": interval(*model["test"]["beam"]["interval"]),
    }


# --------------------------------------------------------------------------------- all of the above
def readme_rows(results):
    """README's table: question, result, data."""
    q1, q2, q3 = q1_numbers(results), q2_numbers(results), q3_numbers(results)
    rows = [
        [
            "Q1",
            f"`linear_attention` {q1['faster']} times as fast as fused softmax attention "
            f"(one head, D = {q1['D']}, L = {q1['L']})",
            "random numbers",
        ]
    ]
    for name, title in (("pool", "max-pooling"), ("strided", "strides")):
        result = f"{title}, rate {q2['rate_short']}: accuracy {q2[name]['val']} validation, "
        rows.append(["Q2", result + f"{q2[name]['test']} test", q2["source"]])
    for decoder, title in DECODERS.items():
        result = f"{title}: similarity {q3[decoder]['damerau_levenshtein']}, "
        rows.append(["Q3", result + f"WER {q3[decoder]['wer']}", q3["source"]])
    model = results["q3-model"]["recordings"]["clips as they are"]
    scores = f"similarity {model['damerau_levenshtein']:.3f}, WER {model['wer']:.3f}"
    result = f"the model of `transcribe.py`: {scores}"
    rows.append(["Q3", result, results["q3-model"]["data"]["source"]])
    return rows


def model_rows(model):
    """The model's card: scores on each kind of recordings."""
    named = {
        "clips as they are, greedy as the assignment asks": model["test"]["greedy"],
        "clips as they are, search without the model of letters": model["test"]["beam"],
        **model["recordings"],
    }
    rows = []
    for name, scores in named.items():
        similarity = f"{scores['damerau_levenshtein']:.3f} ({interval(*scores['interval'])})"
        rates = f"{scores['wer']:.3f}", f"{scores['cer']:.3f}"
        rows.append([name, str(scores["n"]), similarity, *rates])
    return rows


def model_facts(model):
    """The model's card: what it is, what it learned from, and how it was made."""
    trained, machine = model["trained"], model["environment"]
    start = trained["started_from"]["data"]
    threads = f"threads: {machine['threads']}"
    return [
        ["parameters, without the CTC layer", whole(trained["parameters"])],
        ["size", bytes_text(model["bytes"])],
        ["trained first on", f"{whole(start['counts']['train'])} clips ({start['source']})"],
        ["then on", f"{trained['data']['counts']['train']} clips ({trained['data']['source']})"],
        ["scored on", model["data"]["source"]],
        [
            "a minute of speech takes",
            f"{model['seconds_per_minute']:.0f} s ({machine['processor']}; {threads})",
        ],
        ["trained by", f"`{trained['command']}`"],
        ["scored by", f"`{model['command']}`"],
    ]


def readme_times(times):
    """README's sentence on how long its two commands take."""
    run, test = (f"{times['seconds'][name] / 60:.1f}" for name in ("run", "test"))
    kind = "with" if times["bf16"] else "without"
    return (
        f"From a fresh clone, installation included, `make run` took {run} minutes and `make test` "
        f"{test} (one run each; {times['environment']['processor']}, {kind} bfloat16 products)."
    )


def numbers(results):
    """What report.typ is given; UserError for a result that is not there."""
    return {"q1": q1_numbers(results), "q2": q2_numbers(results), "q3": q3_numbers(results)}


def sheet(results):
    """What results.typ is given: a table of every run that `results` hold, by question."""
    q1 = results.get("q1")
    header = ("method", "$D$", "slope", "time", "extra memory", "linear wins from", "by count")
    tables = [(header, q1_rows(q1, common_length(q1)))] if q1 else []
    parts = {"q1": {"tables": tables, "figures": "q1-"}}

    keys = {"train_loss": "training loss", "val_accuracy": "validation accuracy"}
    header = ("run", "status", *keys.values(), "test accuracy", "test AUC")
    rows = run_rows(results, "q2-(?!search)", keys, ("accuracy", "auc"))
    parts["q2"] = {"tables": [(header, rows)], "figures": "CNN-"}

    keys = {"train_loss": "training loss", "val_loss": "validation loss"}
    header = ("run", "status", *keys.values(), "test loss", *SCORES.values())
    rows = run_rows(results, "q3-(lstm|transformer)", keys, ("loss", *SCORES))
    parts["q3"] = {"tables": [(header, rows)], "figures": "q3-"}

    expected = {
        "q1": ("q1",),
        "q2": ("q2-maxpool", "q2-strided"),
        "q3": ("q3-lstm", "q3-transformer"),
    }
    for question, prefixes in expected.items():
        is_there = {prefix: any(run.startswith(prefix) for run in results) for prefix in prefixes}
        sources = {r["data"]["source"] for name, r in results.items() if name.startswith(question)}
        parts[question]["sources"] = sorted(sources)
        parts[question]["missing"] = [prefix for prefix in prefixes if not is_there[prefix]]
    return parts


def run_rows(results, pattern, epoch_keys, test_keys):
    """A row a run: its status, the last epoch's values, the test split's."""
    rows = []
    for name in sorted(results):
        run = results[name]
        if re.match(pattern, name) and "epochs" in run:
            final = run["epochs"][-1] if run["epochs"] else {}
            values = [final.get(key) for key in epoch_keys]
            values += [run["test"].get(key) for key in test_keys]
            cells = ["–" if value is None else f"{value:.3f}" for value in values]
            rows.append([f"`{name}`", run["status"], *cells])
    return rows
