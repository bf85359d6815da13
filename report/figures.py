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
    draw_control(results, out)
    draw_curves(results, out)
    draw_clips(results, out)
    draw_lost(results, out)


def draw_rates(results, out):
    """Q2.1: training loss and validation accuracy at the three rates over 15 epochs, and validation
    accuracy over 150.
    """
    figure, panels = utils.pyplot().subplots(1, 3, figsize=(6.6, 2.2), layout="constrained")
    shown = (("train_loss", ""), ("val_accuracy", ""), ("val_accuracy", "-epochs150"))
    for axes, (key, epochs) in zip(panels, shown, strict=True):
        search = q2.search(results, epochs)
        n_epochs = search["config"]["epochs"]
        for i, rate in enumerate(q2.RATES):
            values = q2.by_epoch(q2.network(results, "maxpool", rate, epochs), key)
            colour = ("C0", "C2", "C4")[i]  # blue as in the figure of both networks at 0.1
            band(axes, range(1, n_epochs + 1), values, colour, linewidth=1.2, label=rate)
        axes.set(xlabel=f"Epoch of {n_epochs}", xticks=np.linspace(0, n_epochs, 4))
        axes.grid(alpha=0.3)
        if key == "val_accuracy":
            axes.set(ylabel="Validation accuracy", ylim=(0, 1))
            shares = q2.class_shares(search, "val")
            for share in (shares[q2.NORMAL], shares[q2.CNV]):
                axes.axhline(share, color="black", linestyle=":", linewidth=0.8)
    panels[0].set(ylabel="Training loss", ylim=(0, 1.4))
    panels[2].set(ylim=(0.6, 1))
    handles, labels = panels[0].get_legend_handles_labels()
    titles = [f"learning rate {rate}" for rate in labels]
    figure.legend(handles, titles, loc="outside upper center", ncols=3, frameon=False)
    source = source_of(q2.network(results, "maxpool", q2.RATES[0])[0])
    utils.save_figure(figure, out, "CNN-rates-seeds", source)


CONTROL = {"pool": ("max-pool", "C0"), "average": ("average", "C5"), "strided": ("strided", "C1")}


def draw_control(results, out):
    """Q2.3: the three networks' validation accuracy against their training loss at the rate chosen
    for 150 epochs, and by epoch at the largest rate.
    """
    figure, (left, right) = utils.pyplot().subplots(1, 2, figsize=(6.6, 2.2), layout="constrained")
    networks = q2.networks(results)
    lowest = q2.lowest_common_loss([networks[name] for name in q2.COMPARED])
    levels = np.arange(lowest, 1.2, 0.02)
    for name, (title, colour) in CONTROL.items():
        reached = [q2.at_training_loss(networks[f"{name}150"], level) for level in levels]
        band(left, levels, np.transpose(reached), colour, label=title)
        curves = q2.by_epoch(networks[f"{name}150_fast"], "val_accuracy")
        smooth = [np.convolve(curve, np.ones(9) / 9, "valid") for curve in curves]
        band(right, np.arange(5, 5 + len(smooth[0])), smooth, colour, label=title)
    rates = q2.search(results, "-epochs150")["best"]["learning_rate"], float(q2.RATES[0])
    for axes, rate in zip((left, right), rates, strict=True):
        axes.set(ylabel="Validation accuracy", title=f"learning rate {rate:g}", ylim=(0.65, 0.9))
        axes.grid(alpha=0.3)
    left.set(xlabel="Training loss", xlim=(levels[-1], lowest))  # training goes to the right
    right.set(xlabel="Epoch")
    left.legend(frameon=False)
    utils.save_figure(figure, out, "CNN-control", source_of(networks["pool"][0]))


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
    figure, (left, right) = utils.pyplot().subplots(
        1, 2, figsize=(6.6, 2.1), layout="constrained", width_ratios=(3, 2)
    )
    for side, (decoder, title) in zip((-0.2, 0.2), NAMES.items(), strict=True):
        runs = q3.full_runs(results, decoder)
        counts = [q3.counts_of_edits(run) for run in runs]
        rows = np.array([list(count.values()) for count in counts])  # (seeds, numbers of edits)
        least, most = rows.min(axis=0), rows.max(axis=0)
        middle = rows.mean(axis=0)
        places = np.arange(len(middle)) + side
        bars = {"width": 0.4, "color": COLOURS[decoder], "label": title}
        left.bar(places, middle, yerr=(middle - least, most - middle), capsize=2, **bars)

        groups = np.array_split(np.sort(runs[0]["clips"]["seconds"]), 8)
        seconds = [group.mean() for group in groups]
        similarities = [q3.by_length(run, 8) for run in runs]
        dots = {"marker": "o", "markersize": 3}
        band(right, seconds, similarities, COLOURS[decoder], label=title, **dots)
    left.set_xticks(range(len(counts[0])), counts[0])
    left.set(xlabel="Edits between the true text and the written one", ylabel="Clips")
    right.set(xlabel="Length of the clip (s)", ylabel="Mean similarity")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    utils.save_figure(figure, out, "q3-full-clips", source_of(runs[0]))


def draw_lost(results, out):
    """Q3.3: where cross-attention listens while a text goes wrong, and while it goes right."""
    titles = ("LSTM: a loop", "transformer: same clip", "transformer: a loop", "LSTM: a jump")
    maps = results["q3-lost"]["maps"]
    figure, panels = utils.pyplot().subplots(1, 4, figsize=(6.6, 2.25), layout="constrained")
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
    """(places, labels) along a text: its words, or in a long one some of them."""
    words = []
    for word in re.finditer(r"\S+", text):
        if not words or word.start() - words[-1].start() >= len(text) / n_labels:
            words.append(word)
    return [word.start() for word in words], [word.group() for word in words]
