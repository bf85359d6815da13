"""Install what a notebook needs and lacks. Imports nothing that might be missing itself."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def is_missing(requirement):
    """Whether the package of a line such as `numpy==2.4.6` is not installed, in any version."""
    name = requirement.partition("==")[0]
    try:
        version(name)
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
    if missing:
        print("installing", *missing)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)
