"""What results.typ shows: tables and figures of any folder of results, without conclusions."""

import re

from report import q1
from report.q3 import SCORES

CAPTIONS = {  # of the figures that the sheet shows, by the beginning of their names
    "q1": {
        "q1-series": "The exponential function and the first terms of its series.",
        "q1-approximation": "Largest difference from exact attention as the scores grow, and its "
        "bound (dotted).",
        "q1-seconds": "Time of each method against the length of the sequence.",
        "q1-memory": "Memory of each method beyond inputs and output, against the length.",
    },
    "q2": {
        "CNN-rates-strided": "The strided network at each learning rate.",
        "CNN-rates": "The network with max-pooling at each learning rate.",
        "CNN-networks": "Both networks at the same learning rate.",
        "CNN-maxpool": "The network with max-pooling at one learning rate.",
        "CNN-strided": "The strided network at one learning rate.",
    },
    "q3": {
        "q3-curves-lstm": "The LSTM decoder after each epoch.",
        "q3-curves-transformer": "The transformer decoder after each epoch.",
        "q3-attention-success": "Where a decoder listens while it writes a text without loops.",
        "q3-attention-failure": "The same for a text with a loop, or for the worst one.",
        "q3-attention": "Where in a clip each decoder listens while it reads the true text.",
        "q3-clip": "A clip: its samples, and the features that the encoder reads.",
    },
}
RUNS = {  # the beginnings of the names of runs that each question should have
    "q1": ("q1",),
    "q2": ("q2-maxpool", "q2-strided"),
    "q3": ("q3-lstm", "q3-transformer"),
}


def contents(results, figures):
    """{question: its data, tables, figures with captions, and what was not run}; `figures`: names.

    Figures without a caption stay in the folder: drawings of the architecture, and those that need
    many test clips to show anything.
    """
    parts = {}
    for question, table in (("q1", q1_table), ("q2", q2_table), ("q3", q3_table)):
        own = [run for name, run in results.items() if name.startswith(question)]
        parts[question] = {
            "sources": sorted({run["data"]["source"] for run in own}),
            "missing": [start for start in RUNS[question] if not any_starts(results, start)],
            "table": table(results),
            "figures": with_captions(figures, CAPTIONS[question]),
        }
    return parts


def any_starts(names, start):
    return any(name.startswith(start) for name in names)


def with_captions(figures, captions):
    """[(figure, caption)] in the order of the captions; flags that a name ends in are added."""
    found = []
    for name in figures:
        start = next((key for key in captions if f"{name}-".startswith(f"{key}-")), None)
        if start:
            flags = name.removeprefix(start).strip("-")
            caption = f"{captions[start]} (`{flags}`)" if flags else captions[start]
            found.append((list(captions).index(start), name, caption))
    return [(name, caption) for _, name, caption in sorted(found)]


def q1_table(results):
    header = ["method", "$D$", "slope", "time", "extra memory", "linear wins from", "by count"]
    return header, q1.table_rows(results["q1"]) if "q1" in results else []


def q2_table(results):
    keys = {"train_loss": "training loss", "val_accuracy": "validation accuracy"}
    header = ["run", "status", *keys.values(), "test accuracy", "test AUC"]
    return header, run_rows(results, "q2-(?!search)", keys, ("accuracy", "auc"))


def q3_table(results):
    keys = {"train_loss": "training loss", "val_loss": "validation loss"}
    header = ["run", "status", *keys.values(), "test loss", *SCORES.values()]
    return header, run_rows(results, "q3-(lstm|transformer)", keys, ("loss", *SCORES))


def run_rows(results, pattern, epoch_keys, test_keys):
    """A row a run: its status, the last epoch's values, the test split's."""
    rows = []
    for name, run in results.items():
        if re.match(pattern, name) and "epochs" in run:
            final = run["epochs"][-1] if run["epochs"] else {}
            values = [final.get(key) for key in epoch_keys]
            values += [run["test"].get(key) for key in test_keys]
            cells = ["–" if value is None else f"{value:.3f}" for value in values]
            rows.append([f"`{name}`", run["status"], *cells])
    return rows
