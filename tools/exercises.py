"""Do the exercises of EXERCISES.md, and write there what came out.

    python -m tools.exercises               all of them, about half an hour on two cores
    python -m tools.exercises -only gru     one of them

An exercise is a section with a comment that names it, and a `diff` of the line that it changes. It
is done in a copy of this folder, on the synthetic sample. Where a check stops it and a second
`diff` takes that check away, it is run again. Outcomes are kept in report/results/exercises.json.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import runs
from report.lib import table, write_between

PAGE = runs.ROOT / "EXERCISES.md"
TRAINING = "-m tools.run_notebook data=sample out=out epochs=7 batch_size=8".split()
EXAMPLE = "import re, torch; torch.manual_seed(0); "  # then README's first block of Python
EXAMPLE += "exec(re.search('```python\\n(.*?)```', open('README.md').read(), re.DOTALL)[1])"
USUAL = {  # what an exercise is compared with: the words of its command, behind `python`
    "lstm": [*TRAINING, "decoders=lstm"],
    "transformer": [*TRAINING, "decoders=transformer"],
    "linear": ["-c", EXAMPLE],
}


@dataclass
class Exercise:
    name: str
    usual: str
    edits: list[tuple[str, str, str]]  # (file, old lines, new lines); a second one to go on


def read_exercises(text):
    """The exercises of the page, {name: Exercise}."""
    exercises = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        found = re.search(r"<!-- exercise: (\w+), against (\w+) -->", section)
        if found:
            edits = []
            for file, lines in re.findall(r"```diff\n--- (\S+)\n(.*?)```", section, re.DOTALL):
                old = "".join(line[1:] + "\n" for line in lines.splitlines() if line[0] == "-")
                new = "".join(line[1:] + "\n" for line in lines.splitlines() if line[0] == "+")
                edits.append((file, old, new))
            exercises[found[1]] = Exercise(*found.groups(), edits)
    return exercises


def sources_of(path):
    """The texts in which old lines are looked up: a notebook's code cells, or the whole file."""
    if path.suffix != ".ipynb":
        return [path.read_text(encoding="utf-8")]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) + "\n" for cell in cells if cell["cell_type"] == "code"]


def replace_lines(path, old, new):
    """Replace the lines `old` by `new` in a file, of a notebook in its code cells."""
    if path.suffix != ".ipynb":
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        return
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = ("".join(cell["source"]) + "\n").replace(old, new)
            cell["source"] = source.removesuffix("\n").splitlines(keepends=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")


# ------------------------------------------------------------------------------------------ running
def run(usual, edits=()):
    """What a command gives in an edited copy of this folder, or what stopped it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        left_out = shutil.ignore_patterns(".git", ".venv", "build", "data", "__pycache__")
        shutil.copytree(runs.ROOT, copy, ignore=left_out)
        for file, old, new in edits:
            replace_lines(copy / file, old, new)
        words = [sys.executable, *USUAL[usual]]
        done = subprocess.run(words, cwd=copy, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"stopped": last_error(done.stderr)}
        if usual == "linear":
            return {"error": float(re.search(r"tensor\((\S+)\)", done.stdout)[1])}
        result = runs.load_result(copy / "out", f"q3-{usual}")
    test = result["test"]
    scores = {"loss": test["loss"], "similarity": test["damerau_levenshtein"], "wer": test["wer"]}
    last = result["epochs"][-1]
    return {"parameters": result["parameters"], "train_loss": last["train_loss"], **scores}


def last_error(stderr):
    """The last line of an error, without colours: that of a cell, or a sentence."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stderr).strip().splitlines()
    told = [line for line in lines if line.strip() and "a cell failed" not in line]
    return told[-1]


def outcome_of(exercise):
    """What came out with the change, and if a check stops it, without that check as well."""
    first, *more = exercise.edits
    outcome = run(exercise.usual, [first])
    if "stopped" in outcome and more:
        outcome |= run(exercise.usual, exercise.edits)
    return outcome


# ----------------------------------------------------------------------------------------- the page
HEADER = ["", "parameters", "training loss", "test loss", "similarity", "WER"]


def row(title, outcome):
    keys = ("train_loss", "loss", "similarity", "wer")
    numbers = [f"{outcome[key]:.3f}" for key in keys]
    return [title, f"{outcome['parameters']:,}", *numbers]


def lines_of(exercise, outcomes):
    """The outcome of an exercise as it stands on the page."""
    outcome, usual = outcomes[exercise.name], outcomes[exercise.usual]
    lines = []
    if "stopped" in outcome:
        lines += [f"It stopped with `{outcome['stopped']}`.", ""]
    if "error" in outcome:
        lines += [f"Largest error: {outcome['error']:.1e}, unchanged {usual['error']:.1e}.", ""]
    if "loss" in outcome:
        lines += [*table(HEADER, [row("unchanged", usual), row("changed", outcome)]), ""]
    return ["", *lines]


def write_page(exercises, outcomes, environment):
    rows = [row(name, outcomes[name]) for name in ("lstm", "transformer")]
    machine = f"{environment['processor']}, torch {environment['torch']}"
    blocks = {"unchanged": ["", *table(HEADER, rows), "", f"({machine})", ""]}
    for exercise in exercises.values():
        blocks[exercise.name] = lines_of(exercise, outcomes)
    write_between(PAGE, blocks, begin="<!-- outcome: {} -->", end="<!-- end -->")


# ------------------------------------------------------------------------------------ command line
def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("only", nargs="+", help="names of exercises, or of what they are compared with")
    parser.flag("page", action="store_true", help="run nothing, write the outcomes that are kept")
    return parser


def main(args):
    """Run what is asked for, keep its outcomes beside the others, write them into the page."""
    exercises = read_exercises(PAGE.read_text(encoding="utf-8"))
    names = [] if args.page else args.only or [*USUAL, *exercises]
    for name in names:
        if name not in {*USUAL, *exercises}:
            raise runs.UserError(f"there is no exercise {name}; the names stand in {PAGE.name}.")
    info = {"source": "synthetic sample"}
    command = runs.command_line()
    result = runs.new_result("exercises", "exercises", command, {"seed": 42}, info, "cpu")
    if (runs.ROOT / "report" / "results" / "exercises.json").exists():
        kept = runs.load_result(runs.ROOT / "report", "exercises")
        result = kept if args.page else {**result, "outcomes": kept["outcomes"]}
    outcomes = result.setdefault("outcomes", {})
    for name in names:
        started = time.perf_counter()
        outcomes[name] = run(name) if name in USUAL else outcome_of(exercises[name])
        result["seconds"] += time.perf_counter() - started
        print(f"{name}: {outcomes[name]}", flush=True)
        runs.save_result(runs.ROOT / "report", {**result, "status": "finished"})
    write_page(exercises, outcomes, result["environment"])


if __name__ == "__main__":
    runs.run_script(main, make_parser())
