"""How fast Q2's training is: processes one after the other in this one run, against a plain reference loop.

    python tests/bench_q2.py        about two minutes

The reference is what one writes first: a Dataset of single items in a DataLoader, the layers in the assignment's order
(ReLU, then pooling), images as floats, and each split evaluated in one pass with gradients on. Both train the same
network for one epoch on the same OCTMNIST-sized random images (97,477 for training, batches of 16). Prints the seconds
of the epoch (training and validation) and of the whole process, peak memory and ratios, and the largest difference
between the two after one optimiser step from the same weights.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent))
from conftest import ROOT, load_script

import utils

BATCH_SIZE, RATES = 16, (0.1, 0.01, 0.001)


def reference_network():
    """The max-pool network as the assignment lists it, in torch's default memory layout."""
    features = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    features += [nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    affine = [nn.Linear(576, 320), nn.ReLU(), nn.Dropout(0.7), nn.Linear(320, 120), nn.ReLU(), nn.Linear(120, 4)]
    return nn.Sequential(*features, *affine, nn.LogSoftmax(dim=1))


def reference_run(folder):
    """One epoch of the plain loop, then validation and test; writes the epoch's seconds to folder/reference-seconds."""
    utils.configure_seed(42)
    splits = {split: (X.float() / 255, y) for split, (X, y) in utils.load_oct_data(folder)[0].items()}
    model = reference_network()
    started = time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for X, y in DataLoader(TensorDataset(*splits["train"]), batch_size=BATCH_SIZE, shuffle=True):
        optimizer.zero_grad()
        F.nll_loss(model(X), y).backward()
        optimizer.step()
    model.eval()
    for split in ("val", "test"):
        X, y = splits[split]
        print(f"reference: {split} accuracy {(model(X).argmax(1) == y).double().mean():.3f}")
        if split == "val":
            (Path(folder) / "reference-seconds").write_text(str(time.perf_counter() - started))


def write_images(folder):
    """OCTMNIST-sized random images."""
    rng, arrays = np.random.default_rng(0), {"source": "random images (synthetic)"}
    for split, n in (("train", 97_477), ("val", 10_832), ("test", 1_000)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(n) % 4).astype(np.uint8)[:, None]
    np.savez(Path(folder) / "octmnist.npz", **arrays)


def run(*command):
    """Run a Python command as a process of its own: (seconds, peak memory in GB)."""
    started = time.perf_counter()
    pid = os.posix_spawn(sys.executable, [sys.executable, *map(str, command)], os.environ)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{command} failed")
    return time.perf_counter() - started, usage.ru_maxrss / 1e6


def difference_after_one_step():
    """Largest difference between the two networks' weights after one step from the same weights, without dropout."""
    torch.manual_seed(0)
    q2 = load_script("hw2-q2")
    models = q2.CNN(0.0), reference_network()
    models[1][9].p = 0.0
    X, y = torch.rand(BATCH_SIZE, 1, 28, 28), torch.randint(4, (BATCH_SIZE,))
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        theirs.data.copy_(mine.data)
    for model in models:
        q2.train_batch(X, y, model, torch.optim.SGD(model.parameters(), 0.01), F.nll_loss)
    pairs = zip(*(model.parameters() for model in models))
    return max((mine - theirs).abs().max().item() for mine, theirs in pairs)


def main():
    machine, name = utils.environment(), f"q2-maxpool-lr0.01-seed42-epochs1-batch_size{BATCH_SIZE}"
    with tempfile.TemporaryDirectory() as folder:
        write_images(folder)
        ours = (ROOT / "hw2-q2.py", "-data", folder, "-out", folder, "-epochs", 1, "-batch_size", BATCH_SIZE)
        whole, memory = run(*ours)
        epoch = utils.load_result(folder, name)["seconds"]
        reference_whole, reference_memory = run(__file__, folder)
        reference_epoch = float((Path(folder) / "reference-seconds").read_text())
        search, _ = run(*ours, "-learning_rate", *RATES)
    print(
        f"\n{machine['processor']}, torch {machine['torch']}; 97,477 images, batch {BATCH_SIZE}, one epoch, once each"
    )
    print("                           ours  reference   ratio")
    for what, mine, theirs, aim in (
        ("epoch (s)", epoch, reference_epoch, 0.45),
        ("whole process (s)", whole, reference_whole, 0.45),
        ("peak memory (GB)", memory, reference_memory, 0.5),
        ("three rates, against 3 (s)", search, 3 * reference_whole, 0.3),
    ):
        print(f"{what:26}{mine:5.2f}{theirs:11.2f}{mine / theirs:8.2f}   (aim: at most {aim})")
    print(f"largest difference of a weight after one step: {difference_after_one_step():.1e}   (aim: below 1e-5)")


if __name__ == "__main__":
    reference_run(sys.argv[1]) if len(sys.argv) > 1 else main()
