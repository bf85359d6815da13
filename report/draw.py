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


def band(axis, x, rows, **options):
    """A line for the mean of `rows`, one row a seed, and a band around it."""
    rows = np.array(rows)
    axis.plot(x, rows.mean(axis=0), **options)
    axis.fill_between(
        x, rows.min(axis=0), rows.max(axis=0), color=options["color"], alpha=0.25, lw=0
    )


def draw_curves(results, decoder):
    """Q3.1, Q3.2: losses, similarities and error rates after each epoch."""
    runs = evidence.full_runs(results, decoder)
    panels = {
        "Cross-entropy (nats per token)": {"val_loss": "validation", "train_loss": "training"},
        "Similarity on validation": {
            "damerau_levenshtein": "Damerau–Levenshtein",
            "jaccard": "Jaccard",
            "cosine": "cosine",
        },
        "Error rate on validation": {"wer": "WER", "cer": "CER"},
    }
    figure, axes = utils.pyplot().subplots(1, 3, figsize=(6.8, 2.35), layout="constrained")
    places = ("upper right", "lower right", "upper right")
    for axis, where, (ylabel, curves) in zip(axes, places, panels.items()):
        for (key, label), style in zip(curves.items(), ("-", "--", ":")):
            rows = [[epoch[key] for epoch in run["epochs"]] for run in runs]
            epochs = range(1, len(rows[0]) + 1)
            band(axis, epochs, rows, color=COLOURS[decoder], linestyle=style, label=label)
        axis.set(xlabel="Epoch", ylabel=ylabel, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(loc=where, frameon=False, fontsize=7, handlelength=1.8)
    axes[1].set(ylim=(0, 1.02))
    source = runs[0]["data"]["source"]
    utils.save_figure(figure, REPORT, f"q3-full-{decoder}", source)


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
    utils.save_figure(
        figure, REPORT, "q3-full-clips", results["q3-lstm-full-seed42"]["data"]["source"]
    )


def labels_of(text, closest=5):
    """(places, labels) along a text: its letters, or where that is too many, some of its words."""
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
    figure, axes = utils.pyplot().subplots(1, 3, figsize=(6.8, 3.4), layout="constrained")
    titles = ("LSTM, goes round in circles", "transformer, the same clip", "LSTM, jumps ahead")
    for axis, title, shown in zip(axes, titles, maps):
        weights = np.array(shown["percent"]) / 100  # (letters, time)
        extent = (0, shown["seconds"], -0.5, len(weights) - 0.5)
        options = {"origin": "lower", "aspect": "auto", "cmap": "Blues"}
        axis.imshow(weights, extent=extent, norm=PowerNorm(0.45, vmin=0, vmax=0.8), **options)
        places, labels = labels_of(shown["written"][: len(weights)])
        axis.set_yticks(places, labels, fontsize=6)
        axis.set(title=title, xlabel="Time in the clip (s)")
    source = results["q3-derailed"]["data"]["source"]
    utils.save_figure(figure, REPORT, "q3-full-derailed", source)


def main():
    paths = (REPORT / "results").glob("*.json")
    results = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    for decoder in DECODERS:
        draw_curves(results, decoder)
    draw_clips(results)
    draw_derailed(results)


if __name__ == "__main__":
    main()
