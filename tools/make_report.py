"""The report about the committed results, and for any other folder a sheet of its results.

    python -m tools.make_report -out report               report/report.pdf: the answers
    python -m tools.make_report -out build/sample         build/sample/results.pdf: tables, figures
    python -m tools.make_report -out report -submission   the report, then <group>.zip: PDF and code
    python -m tools.make_report -readme                   README's table of the committed results

The report's sentences speak of the results in report/; those that rest on a comparison carry its
condition. Takes a few seconds and prints the number of pages, what was not run (those places show a
box) and which sentences the results contradict (they are marked in red). The Typst compiler and its
fonts come with the package `typst`. The same results give the same PDF, byte for byte.
"""

import json
import os
import re
import tomllib
import zipfile
from pathlib import Path

import runs
from runs import UserError

import typst

ROOT = Path(__file__).resolve().parent.parent
PLACEHOLDER = "TO BE FILLED IN"
CODE = (  # what the submission holds beside the PDF
    "*.py",
    "hw2-q3.ipynb",
    "requirements.txt",
    "Makefile",
    "README.md",
    "LICENSE",
    "pyproject.toml",
    "tools/*.py",
    "tests/*.py",
    "report/*.typ",
    "report/group.toml",
)


# ------------------------------------------------------------------------------------- reading OUT
def read_results(out):
    """{run: its result} for every `out`/results/*.json; UserError for one that is damaged."""
    results = {}
    for path in sorted((out / "results").glob("[!.]*.json")):
        question = path.stem.partition("-")[0]  # of q1, q2-search, q3-lstm, ...
        results[path.stem] = runs.load_result(out, path.stem, f"`make {question}`")
    return results


def find_figures(out):
    """{name: path} for every figure in `out`/figures, as PDF where there is one."""
    figures = {}
    for suffix in ("png", "pdf"):
        for path in sorted((out / "figures").glob(f"[!.]*.{suffix}")):
            figures[path.stem] = path
    return figures


# -------------------------------------------------------------------------------------- the report
def document_for(out):
    """Which document tells of the results in `out`: the report, or the sheet of results."""
    if Path(out).resolve() == ROOT / "report":
        return "report"
    return "results"


def report_inputs(out, document):
    """What Typst needs for report/`document`.typ about `out`: arguments of `typst.compile`.

    Typst cannot ask which files exist, so it is handed an index: the results themselves and the
    paths of the figures, which begin at the folder that it may read.
    """
    out = Path(out).resolve()
    try:
        root = Path(os.path.commonpath([ROOT, out]))
    except ValueError as error:  # on Windows
        raise UserError(f"{out} is on another drive than this repository; copy it here.") from error
    figures = {}
    for name, path in find_figures(out).items():
        figures[name] = "/" + path.relative_to(root).as_posix()
    index = {"results": read_results(out), "figures": figures, "group": read_group()}
    return {
        "input": str(ROOT / "report" / f"{document}.typ"),
        "root": str(root),
        "ignore_system_fonts": True,
        "sys_inputs": {"index": json.dumps(index)},
    }


def compile_report(out, document):
    """(PDF as bytes, what the document says about itself) for the results in `out`.

    The second has lists: "pages" (their number), "missing" (runs without a result), "check"
    (numbers that the text derives) and "holds" (comparisons that a sentence rests on). UserError
    where a result or a figure does not fit.
    """
    inputs = report_inputs(out, document)
    labels = {"pages": [], "missing": [], "check": [], "holds": []}
    try:
        pdf = typst.compile(**inputs, format="pdf")
        metadata = json.loads(typst.query(selector="metadata", **inputs))
    except RuntimeError as error:  # a key that a result lacks, or a damaged figure
        problem = str(getattr(error, "message", error)).splitlines()[0]
        place = re.search(r"(\w+\.typ):(\d+)", getattr(error, "diagnostic", "") or "")
        if place:
            problem = f"report/{place[1]}, line {place[2]}: {problem}"
        cause = f"a result or figure in {out} is damaged or of another version"
        raise UserError(f"{problem}; {cause}: run its command again.") from error
    for item in metadata:
        label = item.get("label", "").strip("<>")
        if label in labels:
            labels[label].append(item["value"])
    return pdf, labels


# ---------------------------------------------------------------------------------- README's table
def table_row(question, text, result):
    """A line of README's table, with the data that a result is about."""
    return f"| {question} | {text} | {result['data']['source']} |"


def q1_rows(result):
    """Where linear attention becomes faster than torch's fused attention: a line for each D."""
    rows = []
    for crossover in result["crossover"]:
        if crossover["against"] == "softmax, fused" and crossover["measured"]:
            text = f"linear attention wins from L = {crossover['measured']:,}"
            rows.append(table_row(f"Q1, D = {crossover['D']}", text, result))
    return rows


def mean_and_spread(values):
    """`values` = (mean, standard deviation or None) of an accuracy, as text."""
    mean, spread = values
    return f"{mean:.3f} ± {spread:.3f}" if spread else f"{mean:.3f}"


def q2_row(result):
    """The accuracies of one network at the best learning rate."""
    best = result["best"]
    network = "strided" if result["config"]["no_maxpool"] else "max-pool"
    epochs = result["config"]["epochs"]
    validation = mean_and_spread(best["val_accuracy"])
    test = mean_and_spread(best["accuracy"])
    seeds = "one seed" if best["finished"] == 1 else f"{best['finished']} seeds"
    question = f"Q2, {network}, {epochs} epochs, rate {best['learning_rate']:g}"
    return table_row(question, f"accuracy {validation} validation, {test} test; {seeds}", result)


def model_row(result):
    """The scores of the model that comes with the clone, as transcribe.py decodes."""
    scores = result["test"]["beam"]
    low, high = scores["interval"]
    similarity = f"similarity {scores['damerau_levenshtein']:.3f} ({low:.3f} to {high:.3f})"
    text = f"{similarity}, WER {scores['wer']:.3f}, on clips that it never heard"
    return table_row("Q3, the model of `transcribe.py`", text, result)


def q3_row(result):
    """The test scores of one decoder."""
    epochs = result["config"]["epochs"]
    similarity = result["test"]["damerau_levenshtein"]
    scores = f"test similarity {similarity:.3f}, WER {result['test']['wer']:.3f}"
    effort = f"trained {result['seconds'] / 60:.0f} minutes" if epochs else "only tested"
    name = result["run"].removeprefix("q3-")
    return table_row(f"Q3, {name}, {epochs} epochs", f"{scores}; {effort}", result)


def results_table(results):
    """README's table of what to expect, in Markdown: every network that the text speaks of.

    The trials and the other controls are in the report.
    """
    rows = []
    machines = {}  # {question: those that its results were made on}
    for name, result in sorted(results.items()):
        is_decoder = re.fullmatch(r"q3-(lstm|transformer)(-finetuned)?", name)
        if name == "q1":
            rows += q1_rows(result)
        elif name.startswith("q2-search"):
            rows.append(q2_row(result))
        elif is_decoder and result["status"] == "finished":
            rows.append(q3_row(result))
        else:
            continue
        machine = f"{result['environment']['processor']}, {result['environment']['device']}"
        machines.setdefault(result["question"].upper(), set()).add(machine)
    if "q3-model" in results:
        rows.append(model_row(results["q3-model"]))
    header = ["| question | result | data |", "|---|---|---|"]
    made_on = []
    for question, names in machines.items():
        made_on.append(f"{question} on {' and '.join(sorted(names))}")
    return "\n".join([*header, *rows, "", f"Measured: {'; '.join(made_on)}."])


def transcript(result):
    """What the model that comes with the clone wrote for the test clip of median similarity."""
    ranked = sorted(result["clips"], key=lambda clip: clip["damerau_levenshtein"])
    clip = ranked[len(ranked) // 2]
    lines = ["```", f"said:     {clip['reference']}", f"written:  {clip['hypothesis']}", "```"]
    return "\n".join(lines)


def update_readme(name, command, text):
    """Write `text` between README's markers for what `command` keeps up to date there."""
    path = ROOT / "README.md"
    begin = f"<!-- {name}: written by {command} -->\n"
    end = f"\n<!-- end of {name} -->"
    before, found_begin, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise UserError(f"README.md has lost the markers around its {name}; restore it.")
    with runs.write_atomically(path) as temporary:
        temporary.write_text(before + begin + text + end + after, encoding="utf-8", newline="\n")


def write_results_table():
    """Bring README's table up to date with the results in report/."""
    results = read_results(ROOT / "report")
    try:
        table = results_table(results)
    except (KeyError, TypeError) as error:
        problem = f"a result in report/results is damaged or of another version ({error})"
        raise UserError(f"{problem}; run its command again.") from error
    update_readme("results", "make readme", table)
    if "q3-model" in results:
        update_readme("transcript", "make readme", transcript(results["q3-model"]))


# ---------------------------------------------------------------------------------- the submission
def read_group():
    """The entries of report/group.toml; UserError when it is damaged."""
    path = ROOT / "report" / "group.toml"
    try:
        group = tomllib.loads(runs.read_text(path))
        texts = [group[key] for key in ("course", "title", "group", "contributions")]
        if not all(isinstance(text, str) for text in texts + group["members"]):
            raise TypeError("every entry is text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is missing or damaged ({error})"
        raise UserError(f"{path} {problem}; restore it and fill it in again.") from error
    return group


def check_group(group):
    """UserError for what the group has not filled in yet."""
    entries = {
        "group": [group["group"]],
        "members": group["members"],
        "contributions": [group["contributions"]],
    }
    for key, texts in entries.items():
        blank = [text for text in texts if PLACEHOLDER in text or not text.strip()]
        if blank or not texts:
            problem = f"'{key}' in report/group.toml has not been filled in"
            raise UserError(f"{problem}; write it, then run this again.")
    if not re.fullmatch(r"[\w-]+", group["group"]):
        problem = "'group' in report/group.toml names the zip file"
        raise UserError(f"{problem}; use letters, digits, - and _ only.")


def submitted_files(pdf):
    """[(name, content as bytes)] of the PDF and the code; UserError where code is missing."""
    files = [("report.pdf", pdf)]
    for pattern in CODE:
        paths = sorted(ROOT.glob(pattern))
        if not paths:
            raise UserError(f"{pattern} belongs to the submission but is not there; restore it.")
        for path in paths:
            files.append((path.relative_to(ROOT).as_posix(), path.read_bytes()))
    return files


def write_submission(pdf, group):
    """Write <group>.zip into the repository's folder: the PDF and the code, and nothing else."""
    files = submitted_files(pdf)
    archive = ROOT / f"{group['group']}.zip"
    with runs.write_atomically(archive) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for name, content in files:
            entry = zipfile.ZipInfo(name)  # dated 1980: the same files give the same archive
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            file.writestr(entry, content)
    print(f"{archive.name}: {len(files)} files")


# ------------------------------------------------------------------------------------ command line
def make_parser():
    """Where the results are, and what to make of them."""
    parser = runs.ArgumentParser(__doc__)
    out = "folder that holds results/ and figures/, and gets the PDF"
    submission = "also write <group>.zip, with the PDF and the code"
    readme = "write README's table of the committed results, and no report"
    parser.flag("out", default="report", help=out)
    parser.flag("submission", action="store_true", help=submission)
    parser.flag("readme", action="store_true", help=readme)
    return parser


def main(args):
    """Compile, save and summarise; returns what the document says about itself."""
    if args.readme:
        write_results_table()
        return None
    out = Path(args.out)
    group = read_group()
    if not out.is_dir():
        raise UserError(f"{out} does not exist; name the folder with results/ and figures/.")
    if args.submission:
        check_group(group)
    document = "report" if args.submission else document_for(out)
    pdf, labels = compile_report(out, document)
    path = out / f"{document}.pdf"
    with runs.write_atomically(path) as temporary:
        temporary.write_bytes(pdf)
    missing = ", ".join(dict.fromkeys(labels["missing"])) or "nothing"
    print(f"{path}: {labels['pages'][0]} pages; not run: {missing}")
    for sentence in labels["holds"]:
        if not sentence["holds"]:
            print(f"not so in these results: {sentence['name']}")
    for number in labels["check"]:
        if not number["equal"]:
            print(f"differs from its derivation: {number['name']}")
    if args.submission:
        write_submission(pdf, group)
    return labels


if __name__ == "__main__":
    runs.run_script(main, make_parser())
