"""What the tests share: the scripts as modules, a tiny OCTMNIST file, and running a script as a person would."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"  # real data, where this checkout has it beside it
sys.path.insert(0, str(ROOT))


def load_script(name):
    """Import a script whose file name is no module name, such as hw2-q2.py."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name, *arguments, cwd=ROOT, **options):
    """Run a script of the project with this Python; returns the completed process, output as text."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)


def assert_one_sentence(process):
    """The house rule for bad input: exit status 2 and one sentence on stderr, no traceback."""
    assert process.returncode == 2, process.stderr
    assert len(process.stderr.strip().splitlines()) == 1, process.stderr
    assert "Traceback" not in process.stdout + process.stderr


def oct_arrays(n_train=60, n_val=20, n_test=20, seed=0):
    """MedMNIST's six arrays with easy classes: a bright band whose height is the class."""
    rng, arrays = np.random.default_rng(seed), {}
    for split, n in (("train", n_train), ("val", n_val), ("test", n_test)):
        labels = (np.arange(n) % 4).astype(np.uint8)[:, None]
        images = rng.integers(0, 60, (n, 28, 28), dtype=np.uint8)
        for image, label in zip(images, labels[:, 0]):
            image[7 * label : 7 * label + 6] += 150
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    return arrays


@pytest.fixture
def oct_folder(tmp_path):
    """A folder with a small, valid octmnist.npz."""
    folder = tmp_path / "data"
    folder.mkdir()
    np.savez_compressed(folder / "octmnist.npz", source="synthetic test images", **oct_arrays())
    return folder
