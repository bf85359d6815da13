"""How fast Q2's training is, against a plain reference loop.

    python -m bench.q2        about five minutes

The reference is what one writes first: a DataLoader that fetches single items, images as floats,
each split evaluated in one pass with gradients on. Both train the max-pool network for one epoch
on the same random images, as many as OCTMNIST has, in batches of 16; each run is a process of its
own, and they take turns. Printed are three ratios, ours to the reference's: the seconds of an epoch
(training and validation), peak memory, and the seconds of a search over three learning rates
against three references one after the other; each with its median, least and greatest value.
"""

import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import runs
import utils

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

N_ROUNDS = 3
BATCH_SIZE = 16
RATES = (0.1, 0.01, 0.001)
N_IMAGES = {"train": 97_477, "val": 10_832, "test": 1_000}  # OCTMNIST's
AIMS = {"epoch": 0.90, "memory": 0.55, "three rates": 0.58}  # the ratios should not be larger


def reference_network():
    """The max-pool network, layer after layer as the assignment lists them."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(576, 320),
        nn.ReLU(),
        nn.Dropout(0.7),
        nn.Linear(320, 120),
        nn.ReLU(),
        nn.Linear(120, 4),
        nn.LogSoftmax(dim=1),
    )


def reference_run(folder):
    """One epoch of the plain loop; writes its seconds to `folder`/reference-seconds."""
    runs.configure_seed(42)
    splits, _ = utils.load_oct_data(folder)
    for split, (X, y) in splits.items():
        splits[split] = (X.float() / 255, y)
    model = reference_network()

    started = time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(TensorDataset(*splits["train"]), batch_size=BATCH_SIZE, shuffle=True)
    for X, y in loader:
        optimizer.zero_grad()
        F.nll_loss(model(X), y).backward()
        optimizer.step()
    model.eval()
    print_accuracy(model, splits, "val")
    seconds = time.perf_counter() - started
    print_accuracy(model, splits, "test")
    (Path(folder) / "reference-seconds").write_text(str(seconds))


def print_accuracy(model, splits, split):
    X, y = splits[split]
    hits = model(X).argmax(dim=1) == y
    print(f"reference: {split} accuracy {hits.double().mean():.3f}")


def write_images(folder):
    """Random images, as many as OCTMNIST has, as `folder`/octmnist.npz."""
    rng = np.random.default_rng(0)
    arrays = {"source": "random images (synthetic)"}
    for split, n in N_IMAGES.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 4).astype(np.uint8)[:, None]
    np.savez(Path(folder) / "octmnist.npz", **arrays)


def run(*command):
    """Run Python with these words in a new process; returns seconds and peak memory in GB."""
    started = time.perf_counter()
    words = [sys.executable, *map(str, command)]
    pid = os.posix_spawn(sys.executable, words, os.environ)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{command} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1e6


def one_round(folder):
    """Our run, the reference and our search, one after the other; returns {what: ratio}."""
    script = runs.ROOT / "hw2-q2.py"
    flags = ("-data", folder, "-out", folder, "-epochs", 1, "-batch_size", BATCH_SIZE)
    _, memory = run(script, *flags)
    result = runs.load_result(folder, f"q2-maxpool-lr0.01-seed42-epochs1-batch_size{BATCH_SIZE}")
    reference, reference_memory = run("-m", "bench.q2", folder)
    reference_epoch = float((Path(folder) / "reference-seconds").read_text())
    search, _ = run(script, *flags, "-learning_rate", *RATES)
    return {
        "epoch": result["seconds"] / reference_epoch,
        "memory": memory / reference_memory,
        "three rates": search / (3 * reference),
    }


def main():
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder)
        rounds = [one_round(folder) for _ in range(N_ROUNDS)]
    machine = runs.environment()
    print(f"{machine['processor']}, torch {machine['torch']}; ours / reference, {N_ROUNDS} rounds")
    for what, aim in AIMS.items():
        ratios = sorted(ratios[what] for ratios in rounds)
        spread = f"{median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"  {what}: {spread}   (aim: at most {aim:.2f})")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        reference_run(sys.argv[1])
    else:
        main()
