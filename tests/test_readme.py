"""README.md: its commands are commands that exist, its flags are all there are, its error sentences are the code's."""

import re
import shlex

import nbformat
import pytest
from conftest import ROOT, load_script

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
SPANS = [
    " ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", README, flags=re.S | re.M))
]
LINES = [line.split("  #")[0].split("   ")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = sorted({text for text in LINES + SPANS if text.startswith(("make ", "python "))})


def settings_of_the_notebook():
    cells = nbformat.read(ROOT / "hw2-q3.ipynb", as_version=4).cells
    return set(re.findall(r'setting\("(\w+)"', "".join(cell.source for cell in cells)))


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists_and_takes_these_words(command):
    program, first, *rest = shlex.split(command)
    if program == "python":
        load_script(first.removesuffix(".py")).make_parser().parse_args(rest)
    else:
        settings, makefile = settings_of_the_notebook() | {"PYTHON"}, (ROOT / "Makefile").read_text()
        for word in (first, *rest):
            name, equals, _ = word.partition("=")
            assert name in settings if equals else re.search(rf"^{word}:", makefile, re.MULTILINE), word


def test_there_are_commands():
    assert {"make run", "make test", "make report"} <= set(COMMANDS) and len(COMMANDS) > 15


@pytest.mark.parametrize("script", ["q1_linear_attention", "hw2-q2"])
def test_every_flag_is_named(script):
    actions = load_script(script).make_parser()._actions
    flags = {action.option_strings[0] for action in actions} - {"-h"}
    assert flags <= {span for text in SPANS for span in text.split()} | set(" ".join(COMMANDS).split())


def test_error_sentences_are_those_of_the_code():
    table = README.split("| the sentence says | do this |")[1].split("\n\n")[0]
    code = " ".join(path.read_text() for path in [*ROOT.glob("*.py"), ROOT / "hw2-q3.ipynb"])
    sentences = re.findall(r"`([^`]+)`", "".join(row.split("|")[1] for row in table.splitlines()[2:]))
    assert len(sentences) >= 8
    for sentence in sentences:
        parts = re.split(r"…|\bN\b|/metadata\.csv|octmnist\.npz|LJSpeech-1\.1|config", sentence)
        for part in (part.strip() for part in parts if len(part.strip()) > 4):
            assert part in code, sentence
