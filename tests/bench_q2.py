"""How fast Q2's training is, against a plain reference loop, one process after the other.

    python tests/bench_q2.py        about two minutes

The reference is what one writes first: a Dataset of single items in a DataLoader, images as floats,
torch's default memory layout, and each split evaluated in one pass with gradients on. Both train
the max-pool network for one epoch on the same random images, as many as OCTMNIST has (97,477 for
training), in batches of 16. Prints the seconds of the epoch (training and validation) and of the
whole process, the peak memory, the seconds of a search of three learning rates side by side, and
their ratios to the reference; then the largest difference between the two networks after one
optimiser step from the same weights. Ratios differ between processors, so its name comes with them.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import runs
import utils
from conftest import ROOT, load_script

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

BATCH_SIZE = 16
RATES = (0.1, 0.01, 0.001)
N_IMAGES = {"train": 97_477, "val": 10_832, "test": 1_000}  # OCTMNIST's


def reference_network(dropout=0.7):
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
        nn.Dropout(dropout),
        nn.Linear(320, 120),
        nn.ReLU(),
        nn.Linear(120, 4),
        nn.LogSoftmax(dim=1),
    )


def reference_run(folder):
    """One epoch of the plain loop; the epoch's seconds go to `folder`/reference-seconds."""
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
    """Run a Python command as a process of its own: (seconds, peak memory in GB)."""
    started = time.perf_counter()
    words = [sys.executable, *map(str, command)]
    pid = os.posix_spawn(sys.executable, words, os.environ)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{command} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1e6


def difference_after_one_step():
    """The largest difference of a weight after one step from the same weights, no dropout."""
    q2 = load_script("hw2-q2")
    torch.manual_seed(0)
    X = torch.rand(BATCH_SIZE, 1, 28, 28)
    y = torch.randint(4, (BATCH_SIZE,))
    ours, reference = q2.CNN(0.0), reference_network(dropout=0.0)
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        theirs.data.copy_(mine.data)
    for model in (ours, reference):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        q2.train_batch(X, y, model, optimizer, F.nll_loss)
    differences = []
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        differences.append((mine - theirs).abs().max().item())
    return max(differences)


def print_row(what, ours, reference, aim=None):
    line = f"{what:28}{ours:8.2f}{reference:11.2f}{ours / reference:8.2f}"
    print(line if aim is None else f"{line}   (aim: at most {aim:.2f})")


def main():
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder)
        folders = ("-data", folder, "-out", folder)
        ours = (ROOT / "hw2-q2.py", *folders, "-epochs", 1, "-batch_size", BATCH_SIZE)
        whole, memory = run(*ours)
        name = f"q2-maxpool-lr0.01-seed42-epochs1-batch_size{BATCH_SIZE}"
        epoch = runs.load_result(folder, name)["seconds"]

        reference_whole, reference_memory = run(__file__, folder)
        reference_epoch = float((Path(folder) / "reference-seconds").read_text())

        search, _ = run(*ours, "-learning_rate", *RATES)

    machine = runs.environment()
    print(f"\n{machine['processor']}, torch {machine['torch']}")
    print(f"one epoch of {N_IMAGES['train']:,} images, batches of {BATCH_SIZE}, each measured once")
    print(f"{'':28}{'ours':>8}{'reference':>11}{'ratio':>8}")
    print_row("epoch (s)", epoch, reference_epoch, aim=0.90)
    print_row("whole process (s)", whole, reference_whole)
    print_row("peak memory (GB)", memory, reference_memory, aim=0.55)
    print_row("three rates, against 3 (s)", search, 3 * reference_whole, aim=0.58)
    difference = difference_after_one_step()
    print(f"largest difference of a weight after one step: {difference:.1e}   (aim: below 1e-5)")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        reference_run(sys.argv[1])
    else:
        main()
