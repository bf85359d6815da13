"""EXERCISES.md and tools/exercises.py: each exercise changes a line that is there once."""

import json

from conftest import ROOT
from tools import exercises

import pytest

ALL = exercises.read_exercises(exercises.PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("exercise", ALL.values(), ids=ALL)
def test_each_old_line_stands_in_its_file_once(exercise):
    assert exercise.usual in exercises.USUAL
    for file, old, _ in exercise.edits:
        assert sum(source.count(old) for source in exercises.sources_of(ROOT / file)) == 1


def test_a_line_is_replaced_in_a_notebook_and_in_a_file(tmp_path):
    cells = [{"cell_type": "code", "source": ["a = 1\n", "b = 2"]}, {"cell_type": "markdown"}]
    path = tmp_path / "a.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    exercises.replace_lines(path, "b = 2\n", "b = 3\n")
    assert json.loads(path.read_text())["cells"][0]["source"] == ["a = 1\n", "b = 3"]
    exercises.replace_lines(path, "b = 3\n", "")
    assert json.loads(path.read_text())["cells"][0]["source"] == ["a = 1"]


def test_the_page_shows_the_kept_outcomes(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(exercises.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(exercises, "PAGE", page)
    exercises.main(exercises.make_parser().parse_args(["-page"]))
    assert page.read_text(encoding="utf-8") == (ROOT / "EXERCISES.md").read_text(encoding="utf-8")
