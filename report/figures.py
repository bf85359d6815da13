"""The report's figures that several runs share, drawn by `make report` from report/results.

Lines are means over the seeds, bands reach from the least to the greatest of them. The figures of
single runs are drawn by q1_measure.py and hw2-q2.py.
"""

import re

import utils
from plots import COLOURS, NAMES, SCORES
from report import q2, q3
from report.lib import band, source_of

import numpy as np
from matplotlib.colors import PowerNorm


def draw_all(results, out):
    """Draw each of them into `out`/figures."""
    draw_rates(results, out)
    draw_curves(results, out)
    draw_clips(results, out)
    draw_lost(results, out)


def draw_rates(results, out):
    """Q2.1: training loss and validation accuracy at the three rates, over 15 and 150 epochs."""
    figure, panels = utils.pyplot().subplots(1, 4, figsize=(6.6, 2.2), layout="constrained")
    for pair, epochs in zip((panels[:2], panels[2:]), ("", "-epochs150"), strict=True):
        n_epochs = q2.search(results, epochs)["config"]["epochs"]
        for i, rate in enumerate(q2.RATES):
            runs = q2.network(results, "maxpool", rate, epochs)
            colour = f"C{2 + i}"  # blue and orange are for the two networks
            for axes, key in zip(pair, ("train_loss", "val_accuracy"), strict=True):
                values = [[row[key] for row in run["epochs"]] for run in runs]
                band(axes, range(1, n_epochs + 1), values, colour, linewidth=1.0, label=rate)
        pair[0].set(ylabel="Training loss", ylim=(0, 1.5))
        pair[1].set(ylabel="Validation accuracy", ylim=(0, 1))
        shares = q2.class_shares(q2.search(results, epochs), "val")
        for share in (shares[q2.NORMAL], shares[q2.CNV]):
            pair[1].axhline(share, color="black", linestyle=":", linewidth=0.8)
        for axes in pair:
            axes.set(xlabel="Epoch", xticks=np.linspace(0, n_epochs, 4))
            axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    titles = [f"learning rate {rate}" for rate in labels]
    figure.legend(handles, titles, loc="outside upper center", ncols=3, frameon=False)
    utils.save_figure(figure, out, "CNN-rates-seeds", source_of(runs[0]))


CURVES = {  # a panel for each: what is drawn in it, and in which line
    "Loss (nats per token)": {"val_loss": "-", "train_loss": "--"},
    "Similarity on validation": {"damerau_levenshtein": "-", "jaccard": "--", "cosine": ":"},
    "Error rate on validation": {"wer": "-", "cer": "--"},
}
LABELS = {"val_loss": "validation", "train_loss": "training", **SCORES, "damerau_levenshtein": "DL"}
LEGEND = {"frameon": False, "fontsize": 7, "handlelength": 2.2, "labelspacing": 0.2}
GREYS = ("-", "--", ":")  # the lines of single runs


def draw_curves(results, out):
    """Q3.1, Q3.2: losses, similarities and error rates after each epoch, a figure for each decoder.

    Both figures have the same axes.
    """
    figures = []
    for decoder in NAMES:
        runs = q3.full_runs(results, decoder)
        figure, panels = utils.pyplot().subplots(1, 3, figsize=(6.6, 2.0), layout="constrained")
        for axes, (ylabel, curves) in zip(panels, CURVES.items(), strict=True):
            for key, style in curves.items():
                values = [[row[key] for row in run["epochs"]] for run in runs]
                x = range(1, len(values[0]) + 1)
                band(axes, x, values, COLOURS[decoder], linestyle=style, label=LABELS[key])
            if "wer" not in curves:  # the error rates without the aids would hide all others
                shown = next(iter(curves))
                for style, (name, what) in zip(GREYS, q3.ONE_SEED[decoder].items(), strict=False):
                    epochs = results[f"q3-{decoder}-{name}"]["epochs"]
                    label = what if shown == "val_loss" else None  # in one legend is enough
                    line = {"color": "gray", "linestyle": style, "linewidth": 0.8, "label": label}
                    axes.plot(x, [row[shown] for row in epochs], **line)
            axes.set(xlabel="Epoch", ylabel=ylabel)
            axes.grid(alpha=0.3)
        for axes, place in zip(panels, ("upper right", (0.45, 0.27), "upper right"), strict=True):
            axes.legend(loc=place, **LEGEND)
        figures.append((decoder, figure))
    for pair in zip(*(figure.axes for _, figure in figures), strict=True):
        top = max(axes.get_ylim()[1] for axes in pair)
        for axes in pair:
            axes.set_ylim(0, top)
    for decoder, figure in figures:
        utils.save_figure(figure, out, f"q3-full-{decoder}", source_of(runs[0]))


def draw_clips(results, out):
    """Q3.3: how the test clips fall out for both decoders."""
    figure, (left, right) = utils.pyplot().subplots(1, 2, figsize=(6.0, 1.9), layout="constrained")
    pairs = q3.clip_pairs(results)
    limits = np.linspace(0.2, 1, 161)
    for column, (decoder, title) in enumerate(NAMES.items()):
        shares = [[(p[:, column] < limit).mean() for limit in limits] for p in pairs]
        band(left, limits, shares, COLOURS[decoder], label=title)

        runs = q3.full_runs(results, decoder)
        groups = np.array_split(np.sort(runs[0]["clips"]["seconds"]), 8)
        seconds = [group.mean() for group in groups]
        similarities = [q3.by_length(run, 8) for run in runs]
        dots = {"marker": "o", "markersize": 3}
        band(right, seconds, similarities, COLOURS[decoder], label=title, **dots)
    left.axvline(q3.LOST, color="black", linestyle=":", linewidth=0.8)
    left.set(yscale="log", ylim=(1e-4, 1.3), xlabel="Similarity", ylabel="Share of clips below it")
    right.set(xlabel="Length of the clip (s)", ylabel="Mean similarity")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    utils.save_figure(figure, out, "q3-full-clips", source_of(runs[0]))


def draw_lost(results, out):
    """Q3.3: where cross-attention listens while a text goes wrong, and while it goes right."""
    titles = ("LSTM: a loop", "transformer: same clip", "transformer: a loop", "LSTM: a jump")
    maps = results["q3-lost"]["maps"]
    figure, panels = utils.pyplot().subplots(1, 4, figsize=(6.6, 2.6), layout="constrained")
    for axes, title, shown in zip(panels, titles, maps, strict=True):
        weights = np.array(shown["percent"]) / 100  # (letters, time)
        extent = (0, shown["seconds"], -0.5, len(weights) - 0.5)
        options = {"origin": "lower", "aspect": "auto", "cmap": "Greys"}
        axes.imshow(weights, extent=extent, norm=PowerNorm(0.45, vmin=0, vmax=0.8), **options)
        places, labels = labels_of(shown["written"][: len(weights)])
        axes.set_yticks(places, labels, fontsize=7)
        axes.set(xlabel="Time in the clip (s)", xticks=range(0, int(shown["seconds"]) + 1, 2))
        axes.set_title(title, fontsize=8)
    utils.save_figure(figure, out, "q3-full-lost", source_of(results["q3-lost"]))


def labels_of(text, n_labels=17):
    """(places, labels) along a text: its letters, or in a long one some of its words."""
    if len(text) < 30:
        return range(len(text)), list(text.replace(" ", "␣"))
    words = []
    for word in re.finditer(r"\S+", text):
        if not words or word.start() - words[-1].start() >= len(text) / n_labels:
            words.append(word)
    return [word.start() for word in words], [word.group() for word in words]
