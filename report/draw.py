"""The report's figures that several runs share, drawn from report/results: python -m report.draw

Lines are means over the seeds, bands reach from the least to the greatest of them.
"""

import json
import re
from pathlib import Path

import utils
from report import evidence
from report.evidence import DECODERS

import numpy as np
from matplotlib.colors import PowerNorm

REPORT = Path(__file__).resolve().parent
COLOURS = {"lstm": "C0", "transformer": "C1"}
LEGEND = {"frameon": False, "fontsize": 7, "handlelength": 1.8, "ncols": 2, "columnspacing": 1}


def band(axis, x, rows, **options):
    """A line for the mean of `rows`, one row a seed, and a band around it."""
    rows = np.array(rows)
    axis.plot(x, rows.mean(axis=0), **options)
    axis.fill_between(
        x, rows.min(axis=0), rows.max(axis=0), color=options["color"], alpha=0.25, lw=0
    )


def source_of(run):
    """The data's label, without the name of a file."""
    return run["data"]["source"].replace("ljspeech_metadata_full.csv", "LJ Speech")


def draw_rates(results):
    """Q2.1: 150 epochs at three rates; validation accuracy a panel for each rate, a line a seed."""
    rates = {"0.1": "C0", "0.01": "C1", "0.001": "C2"}
    figure, axes = utils.pyplot().subplots(1, 4, figsize=(6.8, 1.9), layout="constrained")
    for rate, colour in rates.items():
        runs = evidence.network(results, "maxpool", rate, "-epochs150")
        losses = [[row["train_loss"] for row in run["epochs"]] for run in runs]
        band(axes[0], range(1, 151), losses, color=colour)
    axes[0].set(xlabel="Epoch", ylim=(0, None))
    axes[0].set_ylabel("Training loss", fontsize=7)
    for axis, (rate, colour) in zip(axes[1:], rates.items()):
        for run in evidence.network(results, "maxpool", rate, "-epochs150"):
            accuracies = [row["val_accuracy"] for row in run["epochs"]]
            axis.plot(range(1, 151), accuracies, color=colour, linewidth=0.5)
        axis.set(xlabel="Epoch", ylim=(0.1, 1))
        axis.set_title(f"rate {rate}", fontsize=8, color=colour)
    axes[1].set_ylabel("Validation accuracy", fontsize=7)
    for axis in axes:
        axis.grid(alpha=0.3)
    utils.save_figure(figure, REPORT, "CNN-rates-epochs150-seeds", source_of(runs[0]))


def draw_curves(results, decoder):
    """Q3.1, Q3.2: losses, similarities and error rates after each epoch."""
    runs = evidence.full_runs(results, decoder)
    handed_out = results[f"q3-{decoder}-full-handed-out"]
    panels = {
        "Cross-entropy (nats per token)": {"val_loss": "validation", "train_loss": "training"},
        "Similarity on validation": {
            "damerau_levenshtein": "Damerau–Levenshtein",
            "jaccard": "Jaccard",
            "cosine": "cosine",
        },
        "Error rate on validation": {"wer": "WER", "cer": "CER"},
    }
    figure, axes = utils.pyplot().subplots(1, 3, figsize=(6.8, 2.6), layout="constrained")
    for axis, (ylabel, curves) in zip(axes, panels.items()):
        for (key, label), style in zip(curves.items(), ("-", "--", ":")):
            rows = [[epoch[key] for epoch in run["epochs"]] for run in runs]
            epochs = range(1, len(rows[0]) + 1)
            options = {
                "color": COLOURS[decoder],
                "linestyle": style,
                "marker": ".",
                "markersize": 3,
            }
            band(axis, epochs, rows, **options, label=label)
        first = next(iter(curves))
        if first != "wer":
            values = [epoch[first] for epoch in handed_out["epochs"]]
            axis.plot(epochs, values, color="gray", linewidth=0.8, label="without CTC, clock")
        axis.set(xlabel="Epoch", ylabel=ylabel, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), **LEGEND)
    axes[1].set(ylim=(0, 1.02))
    utils.save_figure(figure, REPORT, f"q3-full-{decoder}", source_of(runs[0]))


def draw_clips(results):
    """Q3.3: how the test clips fall out for both decoders."""
    axes_of = utils.pyplot().subplots(1, 3, figsize=(6.8, 2.35), layout="constrained")
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
        band(middle, limits, shares, color=COLOURS[decoder], label=title)
    middle.set(
        yscale="log", xlabel="Similarity", ylabel="Share of clips below it", ylim=(1e-4, 1.3)
    )
    middle.legend(frameon=False)

    for decoder, title in DECODERS.items():
        runs = evidence.full_runs(results, decoder)
        order = np.array_split(np.sort(runs[0]["clips"]["seconds"]), 8)
        seconds = [part.mean() for part in order]
        rows = [evidence.by_length(run, 8) for run in runs]
        band(right, seconds, rows, color=COLOURS[decoder], marker="o", markersize=3, label=title)
    right.set(xlabel="Length of the clip (s)", ylabel="Mean similarity")
    right.legend(frameon=False)
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
    source = source_of(results["q3-lstm-full-seed42"])
    utils.save_figure(figure, REPORT, "q3-full-clips", source)


def labels_of(text, n_labels=24):
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
    figure, axes = utils.pyplot().subplots(1, 4, figsize=(7.2, 3.1), layout="constrained")
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
        axis.set(xlabel="Time in the clip (s)")
        axis.set_title(title, fontsize=8)
    source = source_of(results["q3-derailed"])
    utils.save_figure(figure, REPORT, "q3-full-derailed", source)


def main():
    paths = (REPORT / "results").glob("*.json")
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    draw_rates(results)
    for decoder in DECODERS:
        draw_curves(results, decoder)
    draw_clips(results)
    draw_derailed(results)


if __name__ == "__main__":
    main()
