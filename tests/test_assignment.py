"""Every request of the assignment can be found, by its number, in the file that answers it."""

import json
import re

from conftest import ROOT

import pytest

ANSWERS = {
    "q1_linear_attention.py": ["Q1.1", "Q1.2", "Q1.3", "Q1.4"],
    "hw2-q2.py": ["Q2.1", "Q2.2", "Q2.3", "get_number_trainable_params", "no_maxpool"],
    "hw2-q3.ipynb": [
        *("Q3.1", "Q3.2", "Q3.3", "Q3.4"),
        *("Figure 1", "Figure 2a", "Figure 2b", "Appendix A", "Appendix B", "Appendix C"),
    ],
    "report/q1.typ": ["== Q1.1", "== Q1.2", "== Q1.3", "== Q1.4"],
    "report/q2.typ": ["== Q2.1", "== Q2.2", "== Q2.3"],
    "report/q3.typ": ["== Q3.1", "== Q3.2", "== Q3.3", "== Q3.4"],
}


def text_of(name):
    """What a reader searches: a file's text, or a notebook's cells."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    return text


@pytest.mark.parametrize("name, numbers", ANSWERS.items())
def test_every_request_is_found_by_its_number(name, numbers):
    text = text_of(name)
    assert [number for number in numbers if number not in text] == []


@pytest.mark.parametrize("decoder, n_steps", [("Q3.1", 5), ("Q3.2", 6)])
def test_the_steps_stand_in_the_assignments_order(decoder, n_steps):
    steps = re.findall(rf"# {re.escape(decoder)} step (\d)", text_of("hw2-q3.ipynb"))
    assert steps == [str(number) for number in range(1, n_steps + 1)]
