"""How long README's two commands take from a fresh clone, installation included.

    python -m bench.commands        a quarter of an hour, on a machine that does nothing else

Packages are downloaded again. Writes report/results/times.json, which `make readme` shows.
"""

import os
import subprocess
import tempfile
import time
from pathlib import Path

import runs

import torch


def seconds_of(target):
    """How long `make <target>` takes in a new clone of the last commit."""
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
