"""The report's figures that several runs share, drawn from report/results by `make report`.

Lines are means over the seeds, bands reach from the least to the greatest of them.
"""

import re
from pathlib import Path

import utils
from report import evidence
from report.evidence import DECODERS

import numpy as np
from matplotlib.colors import PowerNorm

REPORT = Path(__file__).resolve().parent
RATES = {"0.1": "C0", "0.01": "C1", "0.001": "C2"}
COLOURS = {"lstm": "C0", "transformer": "C1"}
LEGEND = {"frameon": False, "fontsize": 7, "handlelength": 1.8, "ncols": 2, "columnspacing": 1}


def band(axis, x, rows, colour, **options):
    """A line for the mean of `rows`, one row a seed, and a band around it."""
    rows = np.array(rows)
    axis.plot(x, rows.mean(axis=0), color=colour, **options)
    axis.fill_between(x, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.25, lw=0)


def source_of(run):
    """The data's label, without the name of a file."""
    return run["data"]["source"].replace("ljspeech_metadata_full.csv", "LJ Speech")


def draw_rates(results, epochs):
    """Q2.1: training loss, and validation accuracy a panel for each rate."""
    n_epochs = evidence.search(results, epochs)["config"]["epochs"]
    x = range(1, n_epochs + 1)
    figure, axes = utils.pyplot().subplots(1, 4, figsize=(6.8, 1.75), layout="constrained")
    for axis, (rate, colour) in zip(axes[1:], RATES.items()):
        runs = evidence.network(results, "maxpool", rate, epochs)
        band(axes[0], x, [[row["train_loss"] for row in run["epochs"]] for run in runs], colour)
        accuracies = [[row["val_accuracy"] for row in run["epochs"]] for run in runs]
        band(axis, x, accuracies, colour, linewidth=1.0)
        axis.set(ylim=(0, 1))
        axis.set_title(f"rate {rate}", fontsize=8, color=colour)
    axes[0].set_ylabel("Training loss", fontsize=7)
    axes[0].set_ylim(bottom=0)
    axes[1].set_ylabel("Validation accuracy", fontsize=7)
    for axis in axes:
        axis.set(xlabel="Epoch", xticks=np.linspace(0, n_epochs, 4))
        axis.grid(alpha=0.3)
    utils.save_figure(figure, REPORT, f"CNN-rates{epochs}-seeds", source_of(runs[0]))


PANELS = {  # of Q3's curves: what is drawn, its name, colour and line
    "Loss (nats per token)": {
        "val_loss": ("validation", "C0", "-"),
        "train_loss": ("training", "C1", "--"),
    },
    "Similarity on validation": {
        "damerau_levenshtein": ("Damerau–Levenshtein", "C0", "-"),
        "jaccard": ("Jaccard", "C1", "--"),
        "cosine": ("cosine", "C2", ":"),
    },
    "Error rate on validation": {"wer": ("WER", "C3", "-"), "cer": ("CER", "C4", "--")},
}


def draw_curves(results):
    """Q3.1, Q3.2: losses, similarities and error rates after each epoch, a row for each decoder."""
    figure, rows = utils.pyplot().subplots(
        2, 3, figsize=(6.8, 3.8), sharex=True, sharey="col", layout="constrained"
    )
    for axes, (decoder, title) in zip(rows, DECODERS.items()):
        runs = evidence.full_runs(results, decoder)
        single = results[f"q3-{decoder}-full-handed-out"]
        for axis, (ylabel, curves) in zip(axes, PANELS.items()):
            for key, (label, colour, style) in curves.items():
                values = [[epoch[key] for epoch in run["epochs"]] for run in runs]
                x = range(1, len(values[0]) + 1)
                band(axis, x, values, colour, linestyle=style, label=label)
            if ylabel != "Error rate on validation":  # its error rates would hide the others
                first = [epoch[next(iter(curves))] for epoch in single["epochs"]]
                axis.plot(x, first, color="gray", linewidth=0.8, label="without the aids")
            axis.set_ylabel(ylabel, fontsize=7)
            axis.grid(alpha=0.3)
        axes[1].set_title(f"{title} decoder", fontsize=9)
    for axis in rows[1]:
        axis.set_ylim(bottom=0)  # both rows: they share it
        axis.set_xlabel("Epoch")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.36), **LEGEND)
    utils.save_figure(figure, REPORT, "q3-full-curves", source_of(runs[0]))


def draw_clips(results):
    """Q3.3: how the test clips fall out for both decoders."""
    axes_of = utils.pyplot().subplots(1, 3, figsize=(6.8, 2.05), layout="constrained")
    figure, (left, middle, right) = axes_of
    pairs = evidence.clip_pairs(results)

    edges = np.linspace(-0.525, 0.525, 22)
    leads = [np.clip(p[:, 1] - p[:, 0], -0.5, 0.5) for p in pairs]
    counts = np.array([np.histogram(lead, edges)[0] for lead in leads])
    centres = (edges[1:] + edges[:-1]) / 2
    left.bar(centres, counts.mean(axis=0), width=0.045, color="dimgray")
    left.set(yscale="log", xlabel="Transformer − LSTM", ylabel="Test clips (log scale)")
    left.axvline(0, color="black", linewidth=0.6)

    limits = np.linspace(0.2, 1, 161)
    for column, (decoder, title) in enumerate(DECODERS.items()):
        shares = [[(p[:, column] < limit).mean() for limit in limits] for p in pairs]
        band(middle, limits, shares, COLOURS[decoder], label=title)
    middle.set(
        yscale="log", xlabel="Similarity", ylabel="Share of clips below it", ylim=(1e-4, 1.3)
    )
    middle.legend(frameon=False)

    for decoder, title in DECODERS.items():
        runs = evidence.full_runs(results, decoder)
        order = np.array_split(np.sort(runs[0]["clips"]["seconds"]), 8)
        seconds = [part.mean() for part in order]
        rows = [evidence.by_length(run, 8) for run in runs]
        band(right, seconds, rows, COLOURS[decoder], marker="o", markersize=3, label=title)
    right.set(xlabel="Length of the clip (s)", ylabel="Mean similarity")
    right.legend(frameon=False)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    source = source_of(results["q3-lstm-full-seed42"])
    utils.save_figure(figure, REPORT, "q3-full-clips", source)


def labels_of(text, n_labels=20):
    """(places, labels) along a text: its letters, or where that is too many, some of its words."""
    closest = len(text) / n_labels
    if len(text) < 30:
        return range(len(text)), list(text.replace(" ", "␣"))
    words = []
    for word in re.finditer(r"\S+", text):
        if not words or word.start() - words[-1].start() >= closest:
            words.append(word)
    return [word.start() for word in words], [word.group() for word in words]


def draw_derailed(results):
    """Q3.3: where cross-attention listens while a text goes wrong, and while it goes right."""
    maps = results["q3-derailed"]["maps"]
    figure, axes = utils.pyplot().subplots(1, 4, figsize=(7.2, 2.7), layout="constrained")
    titles = (
        "LSTM: a loop",
        "transformer: the same",
        "transformer: a loop",
        "LSTM: a jump",
    )
    for axis, title, shown in zip(axes, titles, maps):
        weights = np.array(shown["percent"]) / 100  # (letters, time)
        extent = (0, shown["seconds"], -0.5, len(weights) - 0.5)
        options = {"origin": "lower", "aspect": "auto", "cmap": "Blues"}
        axis.imshow(weights, extent=extent, norm=PowerNorm(0.45, vmin=0, vmax=0.8), **options)
        places, labels = labels_of(shown["written"][: len(weights)])
        axis.set_yticks(places, labels, fontsize=6.5)
        axis.set(xlabel="Time in the clip (s)", xticks=range(0, int(shown["seconds"]) + 1, 2))
        axis.set_title(title, fontsize=8)
    source = source_of(results["q3-derailed"])
    utils.save_figure(figure, REPORT, "q3-full-derailed", source)


def main(results):
    """Draw all of them."""
    draw_rates(results, "")
    draw_rates(results, "-epochs150")
    draw_curves(results)
    draw_clips(results)
    draw_derailed(results)
