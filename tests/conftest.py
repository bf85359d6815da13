"""What the tests share: running scripts as a person would, tiny datasets, plain decoding."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import utils
from utils import PAD, START, STOP

import numpy as np
import pytest
import soundfile
import torch

ROOT = Path(__file__).resolve().parent.parent
POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has other signals and streams")


def pytest_addoption(parser):
    about = "folder with real data: some clips in LJSpeech-1.1/, ljspeech_metadata_full.csv"
    parser.addoption("--real-data", type=Path, metavar="FOLDER", help=about)


@pytest.fixture
def real_data(request):
    """The folder that --real-data names; without it the test is skipped."""
    folder = request.config.getoption("--real-data")
    if folder is None:
        pytest.skip("needs real data: --real-data=FOLDER")
    return (request.config.invocation_params.dir / folder).resolve()


def run_python(*words, cwd=ROOT, **options):
    """Run Python with these words; returns the completed process, with its output as text.

    Interrupts reach it even where the tests run in the background and ignore them themselves.
    """
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
        preexec_fn=restore_interrupts if os.name == "posix" else None,
        **options,
    )


def restore_interrupts():
    """In the child process: handle signals as usual, even those that a shell or `nohup` ignores."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def run_script(name, *arguments, **options):
    """Run a script in the root, such as hw2-q2.py."""
    return run_python(ROOT / name, *arguments, **options)


def assert_one_sentence(process):
    """Bad input ends with exit status 2 and one sentence on stderr, without a traceback."""
    assert process.returncode == 2, process.stderr
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    assert "Traceback" not in process.stdout + process.stderr


# ---------------------------------------------------------------------------------- tiny datasets
def oct_arrays(n_train=60, n_val=20, n_test=20, seed=0):
    """MedMNIST's six arrays; the height of a bright band is the class."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, n in (("train", n_train), ("val", n_val), ("test", n_test)):
        labels = (np.arange(n) % 4).astype(np.uint8)[:, None]
        images = rng.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels[:, 0], strict=True):
            image[7 * label : 7 * label + 6] += 150
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = labels
    return arrays


@pytest.fixture
def oct_folder(tmp_path):
    """A folder with a small, valid octmnist.npz."""
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez_compressed(folder / "octmnist.npz", source="synthetic test images", **oct_arrays())
    return folder


def write_corpus(folder, n_clips=12):
    """Write a corpus in LJ Speech's format, with tones for clips; returns its folder."""
    root = folder / "LJSpeech-1.1"
    (root / "wavs").mkdir(parents=True)
    rows = []
    for i in range(n_clips):
        time = np.arange(6000 + 300 * (i % 5)) / utils.SAMPLE_RATE
        tone = 0.5 * np.sin(2 * np.pi * (200 + 50 * i) * time)
        soundfile.write(root / "wavs" / f"LJ001-{i:04}.wav", tone, utils.SAMPLE_RATE)
        rows.append(f"LJ001-{i:04}|Text {i}|{'abcdefghijkl'[i % 12] * (2 + i % 3)}, yes")
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    (root / "README").write_text("synthetic test tones\nmore\n")
    return root


# ------------------------------------------------------------------------------ plain decoding
@torch.no_grad()
def letter_by_letter(decoder, z, longest):
    """Greedy decoding of one clip, z (1, S, D), that reads the whole text again for each letter."""
    tokens = [START]
    while len(tokens) <= longest and tokens[-1] != STOP:
        logits = decoder(torch.tensor([tokens]), z)[0, -1]
        logits[START] = logits[PAD] = -math.inf
        tokens.append(int(logits.argmax()))
    return tokens
