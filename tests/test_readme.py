"""README.md and the Makefile: commands exist, flags are all named, sentences are the code's."""

import importlib
import os
import re
import shlex
import shutil
import subprocess

from conftest import ROOT, load_script
from tools.run_notebook import settings_of_the_notebook

import pytest

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```\n(.*?)^```", re.DOTALL | re.MULTILINE)
PYTHONS = (".venv/bin/python ", ".venv\\Scripts\\python ")  # on POSIX, on Windows
LIBRARIES = ("jupyterlab", "pip", "pytest", "venv")  # modules that are run and not of this project


def spans():
    """What stands between backticks in the text, each in one line."""
    text = BLOCK.sub("", README)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def lines_of_blocks():
    """The lines of the blocks of commands, without comments."""
    lines = []
    for block in BLOCK.findall(README):
        for line in block.splitlines():
            lines.append(line.split("  #")[0].split("   ")[0].strip())
    return lines


def all_commands():
    """Every command that the README shows, as `make ...` or `python ...`."""
    commands = set()
    for text in lines_of_blocks() + spans():
        for python in PYTHONS:
            before, found, after = text.partition(python)
            if found:
                text = f"{before}python {after}"
        if re.match(r"([A-Z]+=\S+ )*(make|python) ", text):
            commands.add(text)
    return sorted(commands)


COMMANDS = all_commands()


def check_settings(names):
    known = {*settings_of_the_notebook(), "PYTHON", "WAV", "METADATA"}
    assert set(names) <= known, set(names) - known


def check_python(first, *rest):
    """The words after `python`: a script, or -m and a module, then flags that it takes."""
    if first != "-m":
        load_script(first.removesuffix(".py")).make_parser().parse_args(rest)
        return
    name, *flags = rest
    if name in LIBRARIES:
        return
    module = importlib.import_module(name)
    assert name.startswith("tools.")
    if flags:
        module.make_parser().parse_args(flags)


def check_make(*words):
    """The words after `make`: targets, and settings with their values."""
    targets = [word for word in words if "=" not in word]
    check_settings(word.partition("=")[0] for word in words if "=" in word)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists_and_takes_these_words(command):
    words = shlex.split(command)
    settings = []
    while "=" in words[0]:
        settings.append(words.pop(0).partition("=")[0])
    check_settings(settings)
    program, *rest = words
    if program == "python":
        check_python(*rest)
    else:
        check_make(*rest)


def test_there_are_commands():
    assert {"make run", "make test", "make report", "make notebook"} <= set(COMMANDS)
    assert len(COMMANDS) > 20


def test_without_make_is_the_same_on_both_systems():
    """The two lists of commands differ in where Python is, and in how settings are given."""
    part = README.split("## Without make")[1].split("\n## ")[0]
    posix, windows = BLOCK.findall(part)
    for block, python in ((posix, PYTHONS[0]), (windows, PYTHONS[1])):
        assert block.count(python) > 5
    assert "$env:DATA" in windows and r"\Scripts" not in posix
    settings = "DATA=sample OUT=build/sample"
    as_posix = windows.replace(PYTHONS[1], PYTHONS[0]).replace("py -3", "python3")
    as_posix = as_posix.replace('$env:DATA = "sample"; $env:OUT = "build/sample"\n', settings + " ")
    assert as_posix == posix


@pytest.mark.parametrize("script", ["q1_linear_attention", "hw2-q2"])
def test_every_flag_is_named(script):
    actions = load_script(script).make_parser()._actions
    flags = {action.option_strings[0] for action in actions} - {"-h"}
    named = set(" ".join(spans() + COMMANDS).split())
    assert flags <= named, flags - named


def test_error_sentences_are_those_of_the_code():
    table = README.split("| the sentence says | do this |")[1].split("\n\n")[0]
    files = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), ROOT / "hw2-q3.ipynb"]
    code = " ".join(path.read_text(encoding="utf-8") for path in files)
    first_columns = "".join(row.split("|")[1] for row in table.splitlines()[2:])
    sentences = re.findall(r"`([^`]+)`", first_columns)
    assert len(sentences) >= 8
    varying = r"…|\bN\b|/metadata\.csv|octmnist\.npz|LJSpeech-1\.1|config"
    for sentence in sentences:
        for part in re.split(varying, sentence):
            if len(part.strip()) > 4:
                assert part.strip() in code, sentence


def test_the_edit_that_is_suggested_is_possible():
    """README's example replaces a piece of the notebook, which must stand there."""
    notebook = (ROOT / "hw2-q3.ipynb").read_text(encoding="utf-8")
    old, new = re.search(r"replace `([^`]+)` by\s+`([^`]+)`", README).groups()
    assert notebook.count(old) == 1 and new.startswith("torch.zeros(")


def test_files_of_the_layout_exist():
    part = README.split("## Layout")[1].split("\n## ")[0]
    files = [span for span in re.findall(r"`([^`*]+)`", part) if re.fullmatch(r"[\w./-]+", span)]
    names = [name for name in files if name.endswith((".py", ".ipynb", "/"))]
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists() or (ROOT / "tests" / name).exists(), name


def test_licence():
    assert "[LICENSE](LICENSE)" in README
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n")


# ------------------------------------------------------------------------------------ the Makefile
def test_every_variable_is_quoted():
    """So that folders may have spaces in their names."""
    recipes = [line for line in MAKEFILE.splitlines() if line.startswith("\t")]
    assert len(recipes) > 20
    for line in recipes:
        for variable in re.finditer(r"\$\((DATA|OUT|PY|PYTHON)\)", line):
            before = line[: variable.start()]
            assert before.count('"') % 2 == 1, line


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
@pytest.mark.skipif(os.name != "posix", reason="the stand-in for Python is a shell script")
def test_folders_with_spaces_reach_the_scripts(tmp_path):
    """`make q3 "DATA=my data"`, with a program in Python's place that records its words."""
    recorder = tmp_path / "python"
    record = f'for word in "$@" "$DATA" "$OUT"; do echo "$word" >>"{tmp_path}/words"; done'
    recorder.write_text(f"#!/bin/sh\n{record}\n")
    recorder.chmod(0o755)
    folders = ["DATA=my sample", "OUT=my results"]
    command = ["make", "-o", ".venv/ready", f"PY={recorder}", *folders]
    subprocess.run([*command, "q2", "q3", "report"], cwd=ROOT, check=True, capture_output=True)
    words = (tmp_path / "words").read_text().splitlines()
    assert words.count("my sample") > 3 and words.count("my results") > 4
    assert "sample" not in words  # it is not made where DATA is another folder
    assert not {"my", "results"} & set(words)
