"""Exercises: change a line, predict, run, compare. This script makes their outcomes.

    python -m tools.exercises               all of them, about half an hour on two cores
    python -m tools.exercises -only gru     one of them
    python -m tools.exercises -page         write EXERCISES.md from report/results/exercises.json

Each exercise is done in a copy of this folder, on the synthetic sample. Where a check of the
notebook stops it first, that is recorded, the check is taken away, and it is run again.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import runs

NOTEBOOK, CNN = "hw2-q3.ipynb", "hw2-q2.py"
TRANSFORMER = "-m tools.run_notebook data=sample out=out decoders=transformer epochs=7 batch_size=8"
LSTM = TRANSFORMER.replace("transformer", "lstm")
USUAL = {  # what an exercise is compared with: the command and the name of its result
    "lstm": (LSTM, "q3-lstm"),
    "transformer": (TRANSFORMER, "q3-transformer"),
    "cnn": (f"{CNN} -data sample -out out -epochs 5", "q2-maxpool-lr0.01-seed42-epochs5"),
}


@dataclass
class Exercise:
    name: str
    title: str
    file: str
    old: str  # this text, which stands in the file once,
    new: str  # is replaced by this one
    usual: str  # the run that it is compared with
    predict: str
    why: str
    go_on: tuple = ()  # (old, new): takes away the check that stops it first


EXERCISES = (
    Exercise(
        "gru",
        "A GRU in place of the LSTM",
        NOTEBOOK,
        "self.lstm = nn.LSTM(d, d, batch_first=True)",
        "self.lstm = nn.GRU(d, d, batch_first=True)",
        "lstm",
        "How many parameters less, and does it write worse?",
        "A GRU has three affine maps where the LSTM has four, so this layer has a quarter fewer "
        "parameters: 2 · (200² + 200) = 80,400. Both carry a state of fixed size from letter to "
        "letter, and the words of the sample are short, so the scores are about the same.",
    ),
    Exercise(
        "positions",
        "No position matrix",
        NOTEBOOK,
        "        x = x + self.positions[:n_letters]  # (B, T, D)\n",
        "",
        "transformer",
        "What can the decoder still tell about the order of the letters it has written?",
        "Masked self-attention knows the set of the earlier letters and not their order, and the "
        "cross-attention no longer knows how far the text has come. What it can still do is "
        "listen for what fits the letters so far, so on short sentences it loses less than one "
        "might fear.",
    ),
    Exercise(
        "head",
        "One head of attention",
        NOTEBOOK,
        "n_heads = 2\n",
        "n_heads = 1\n",
        "transformer",
        "How many parameters does the second head cost? What does it add?",
        "None: the matrices W are D by D for any number of heads, which only share the columns "
        "among them. With one head there is one softmax instead of two, so a frame is looked at "
        "from one point of view.",
    ),
    Exercise(
        "padding",
        "No padding mask in the encoder",
        NOTEBOOK,
        "            x = block(x, mask=mask)\n",
        "            x = block(x)\n",
        "transformer",
        "Which check notices it? Does the model still learn?",
        "The check behind the encoder compares a clip alone with the same clip beside a longer "
        "one. Training still works, as clips of a batch are of similar length; but what is "
        "written for a clip now depends on its neighbours in the batch.",
        (
            'beside a longer one: largest difference {difference:.1e}")\n'
            "    assert difference < 1e-12\n",
            'beside a longer one: largest difference {difference:.1e}")\n',
        ),
    ),
    Exercise(
        "inverted",
        "The mask inverted",
        NOTEBOOK,
        "scores = scores.masked_fill(~mask, -math.inf)",
        "scores = scores.masked_fill(mask, -math.inf)",
        "transformer",
        "What does the softmax of a row give in which every score is −∞?",
        "0/0, which is NaN: for the last letter of a text, which may look at all, every key is "
        "masked now. The check with the pencil stops it.",
    ),
    Exercise(
        "shift",
        "Targets that are not shifted",
        NOTEBOOK,
        "        text[:, 1:].flatten(),  # (B * (L - 1),)\n",
        "        text[:, :-1].flatten(),  # (B * (L - 1),)\n",
        "transformer",
        "What is the easiest way to a loss of 0? What will it write?",
        "Each position now has to predict the letter that it is given, so copying the input is "
        "enough, and the loss falls to almost nothing without a look at the sound. When it writes, "
        "it repeats its own first letter.",
    ),
    Exercise(
        "axis",
        "Softmax over the wrong axis",
        NOTEBOOK,
        "weights = scores.softmax(dim=-1)",
        "weights = scores.softmax(dim=-2)",
        "transformer",
        "Which sums are 1 now? Is that still causal?",
        "The columns: the weights with which all queries look at one key. A row can sum to "
        "anything, and it depends on the later queries, so the future leaks in. The check with "
        "the pencil stops it.",
    ),
    Exercise(
        "causal",
        "No causal mask",
        NOTEBOOK,
        "mask=causal_mask(n_letters, x.device))",
        "mask=None)",
        "transformer",
        "What happens to the loss in training, and what when it writes?",
        "Each letter now sees the next one, which is its target, so the loss says little; when it "
        "writes there is no later letter to look at. The check of causality stops it.",
        ('    assert difference[:12].max() < 1e-12, "it sees a letter that comes later"\n', ""),
    ),
    Exercise(
        "rate",
        "A learning rate of 1",
        NOTEBOOK,
        "learning_rate = 1e-3  # at",
        "learning_rate = 1.0  # at",
        "transformer",
        "Does the loss become NaN? AdamW moves each weight by about the rate in a step.",
        "It does not have to: gradients are clipped and LayerNorm keeps numbers in bounds. But a "
        "step of 1 is many times the size of a weight, so nothing that is learned stays.",
    ),
    Exercise(
        "order",
        "Training images in the order of the file",
        CNN,
        "order = torch.randperm(len(X)).to(device)",
        "order = torch.arange(len(X)).to(device)",
        "cnn",
        "When would this be harmful, and when is it not?",
        "Where the file is sorted by class it is: each batch then holds one class. The sample's "
        "images (like OCTMNIST's) are in mixed order, so little is lost; the same batches come in "
        "each epoch.",
    ),
)


def source_of(path):
    """The text in which old lines are looked up: of a notebook, that of its cells."""
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    notebook = json.loads(path.read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return "\n".join(source + "\n" for source in sources)


def replace_once(path, old, new):
    """Replace `old`, which must stand in the file once, by `new`."""
    if path.suffix != ".ipynb":
        path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
        return
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            source = ("".join(cell["source"]) + "\n").replace(old, new)
            cell["source"] = source.removesuffix("\n").splitlines(keepends=True)
    path.write_text(json.dumps(notebook), encoding="utf-8")


def run(command, name, *edits):
    """Do a command in an edited copy of this folder; returns its result, or what stopped it.

    edits: (file, old, new).
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        left_out = shutil.ignore_patterns(".git", ".venv", "build", "data", "__pycache__")
        shutil.copytree(runs.ROOT, copy, ignore=left_out)
        for file, old, new in edits:
            replace_once(copy / file, old, new)
        words = [sys.executable, *shlex.split(command)]
        done = subprocess.run(words, cwd=copy, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"stopped": last_error(done.stderr)}
        result = runs.load_result(copy / "out", name)
    row = result["epochs"][-1]
    return {
        "parameters": result["parameters"],
        "train_loss": row["train_loss"],
        "val_loss": row.get("val_loss"),
        "test": {key: value for key, value in result["test"].items() if is_score(key)},
    }


def is_score(key):
    return key in ("loss", "damerau_levenshtein", "jaccard", "cosine", "wer", "cer", "accuracy")


def last_error(stderr):
    """The last line of an error, without colours: of a cell's exception, or a sentence."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", stderr).strip().splitlines()
    if lines[-1].startswith("run_notebook.py: a cell failed"):
        lines.pop()
    return next(line for line in reversed(lines) if line.strip())


def outcome_of(exercise):
    """What came out: with the change, and where a check stops it, without that check as well."""
    command, name = USUAL[exercise.usual]
    edits = [(exercise.file, exercise.old, exercise.new)]
    outcome = run(command, name, *edits)
    if "stopped" in outcome and exercise.go_on:
        outcome |= run(command, name, *edits, (exercise.file, *exercise.go_on))
    return outcome


# ---------------------------------------------------------------------------------------- the page
def numbers_of(outcome):
    """The cells of a table: parameters, training loss and what the test gave."""
    if "test" not in outcome:
        return ["–"] * 4
    test = outcome["test"]
    loss = outcome["val_loss"]
    score = test.get("damerau_levenshtein", test.get("accuracy"))
    losses = [f"{outcome['train_loss']:.3f}", "–" if loss is None else f"{loss:.3f}"]
    return [f"{outcome['parameters']:,}", *losses, f"{score:.3f}"]


def section(number, exercise, outcomes):
    """One exercise, its outcome folded away."""
    score = "accuracy" if exercise.usual == "cnn" else "similarity"
    usual, changed = numbers_of(outcomes[exercise.usual]), numbers_of(outcomes[exercise.name])
    new = exercise.new.strip() or "(the line is deleted)"
    lines = [
        f"## {number}. {exercise.title}",
        "",
        f"In `{exercise.file}`:",
        "",
        "```diff",
        f"- {exercise.old.strip()}",
        f"+ {new}",
        "```",
        "",
        f"**Predict.** {exercise.predict}",
        "",
        f"**Run.** `python {USUAL[exercise.usual][0]}`",
        "",
        "<details><summary>Compare: what one should expect, and what came out here</summary>",
        "",
        exercise.why,
        "",
    ]
    stopped = outcomes[exercise.name].get("stopped")
    if stopped:
        lines += [f"It stopped with `{stopped}`.", ""]
    if exercise.go_on:
        lines += ["To go on, delete that `assert`.", ""]
    if "test" in outcomes[exercise.name]:
        header = ["", "parameters", "training loss", "validation loss", f"test {score}"]
        rows = [header, ["---"] * 5, ["as it is", *usual], ["changed", *changed]]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines.append("")
    return [*lines, "</details>", ""]


def write_page(result):
    """EXERCISES.md, from the exercises and their outcomes."""
    environment = result["environment"]
    lines = [
        "# Exercises: predict, run, compare",
        "",
        "Each changes one line. Predict what happens, run it, and compare. The outcomes folded "
        "away below are of one run each (seed 42) on the synthetic sample "
        f"({environment['processor']}, torch {environment['torch']}); `python -m tools.exercises` "
        "makes them again. Differences of a few thousandths mean nothing.",
        "",
    ]
    for number, exercise in enumerate(EXERCISES, start=1):
        lines += section(number, exercise, result["outcomes"])
    path = runs.ROOT / "EXERCISES.md"
    with runs.write_atomically(path) as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------ command line
def make_parser():
    parser = runs.ArgumentParser(__doc__)
    names = [*USUAL, *(exercise.name for exercise in EXERCISES)]
    parser.flag("only", nargs="+", choices=names, default=names, help="some of them")
    parser.flag("page", action="store_true", help="only write EXERCISES.md")
    return parser


def main(args):
    """Run what is asked for, save its outcomes beside the others, write the page."""
    path = runs.ROOT / "report" / "results" / "exercises.json"
    if args.page:
        write_page(runs.load_result("report", "exercises"))
        return
    info = {"source": "synthetic sample"}
    result = runs.new_result("exercises", "exercises", "", {"seed": 42}, info, "cpu")
    result["outcomes"] = runs.load_result("report", path.stem)["outcomes"] if path.exists() else {}
    result["command"] = runs.command_line()
    for name in args.only:
        started = time.perf_counter()
        if name in USUAL:
            outcome = run(*USUAL[name])
        else:
            outcome = outcome_of(next(e for e in EXERCISES if e.name == name))
        result["outcomes"][name] = outcome
        result["seconds"] += time.perf_counter() - started
        print(f"{name}: {outcome}", flush=True)
        runs.save_result("report", result)
    result["status"] = "finished"
    runs.save_result("report", result)
    write_page(result)


if __name__ == "__main__":
    runs.run_script(main, make_parser())
