"""Install what a notebook needs and lacks. Imports nothing that might be missing itself."""

import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def name_of(requirement):
    """numpy, of a line such as `numpy==2.4.6`."""
    return requirement.partition("==")[0]


def is_missing(requirement):
    """Whether the package of such a line is not installed, in any version."""
    try:
        version(name_of(requirement))
    except PackageNotFoundError:
        return True
    return False


def install_missing_packages(path):
    """Install the packages that the requirements file `path` names and that are not here.

    A package that is here in another version is left alone: on a hosted service, replacing what
    has been imported already would need a restart.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    missing = [requirement for requirement in requirements if is_missing(requirement)]
    if not missing:
        return
    print("installing", *missing)
    kept = [
        f"{name_of(line)}=={version(name_of(line))}" for line in requirements if line not in missing
    ]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(kept), encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
        done = subprocess.run([*pip, *missing], check=False)
    if done.returncode:
        raise SystemExit(f"pip could not install {' '.join(missing)}; its reason stands above.")
