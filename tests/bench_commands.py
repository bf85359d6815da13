"""How long README's two commands take a new user: from a fresh clone, installation included.

    python tests/bench_commands.py        a quarter of an hour, on a machine that does nothing else

The package caches are empty. Writes report/results/times.json, which `make readme` shows.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runs

import torch


def seconds_of(target):
    """What `make <target>` takes in a new clone of the last commit."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "--quiet", runs.ROOT, clone], check=True)
        caches = {"UV_CACHE_DIR": f"{folder}/uv", "PIP_CACHE_DIR": f"{folder}/pip"}
        started = time.perf_counter()
        subprocess.run(["make", target], cwd=clone, env={**os.environ, **caches}, check=True)
        return time.perf_counter() - started


def main():
    result = {"question": "times", "run": "times", "environment": runs.environment()}
    result["bf16"] = torch.cpu._is_avx512_bf16_supported()
    result["seconds"] = {}
    for target in ("run", "test"):
        result["seconds"][target] = seconds_of(target)
        print(f"make {target}: {result['seconds'][target]:.0f} s", flush=True)
    runs.save_result(runs.ROOT / "report", result)


if __name__ == "__main__":
    main()
