"""README.md and CONTRIBUTING.md: the commands exist, and the links lead somewhere."""

import importlib
import re
import shlex

from conftest import ROOT

import pytest

README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
LIBRARIES = ("pip", "pytest", "venv")  # modules that are not this project's


def commands():
    """Every `make ...` and `python ...` that the two pages show."""
    found = set()
    for text in (README, CONTRIBUTING):
        lines = "\n".join(BLOCK.findall(text)).splitlines()
        spans = re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
        for line in [*lines, *spans]:
            words = line.split("  #")[0].strip()
            words = re.sub(r"^\S*(python3?) ", "python ", words)
            if re.match(r"(make|python) [\w.-]", words):
                found.add(words)
    return sorted(found)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_a_target_exists(command):
    for target in shlex.split(command)[1:]:
        assert "=" in target or re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("python ")])
def test_a_script_takes_these_flags(command):
    _, first, *flags = shlex.split(command)
    if first == "-m":
        name, *flags = flags
    else:
        name = first.removesuffix(".py")
    if name in LIBRARIES:
        return
    module = importlib.import_module(name)
    if flags:
        module.make_parser().parse_args(flags)


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README + CONTRIBUTING))
def test_links_lead_somewhere(link):
    path, _, part = link.partition("#")
    assert not path or (ROOT / path).exists()
    if part and not path:
        headings = [line.strip("# ").lower() for line in README.splitlines() if line[:1] == "#"]
        assert part in [heading.replace(" ", "-") for heading in headings]
