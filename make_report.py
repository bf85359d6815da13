"""The report: report/report.typ, with the results and figures that are in OUT, becomes OUT/report.pdf.

    python make_report.py -out report                  the report that is handed in, about the committed results
    python make_report.py -out build/sample            the same text about the sample's results
    python make_report.py -out report -submission      the report, then <group>.zip: the PDF, the code and its tests

Takes a few seconds and prints the number of pages and what was not run (those places show a box). The Typst compiler
and its fonts come with the package `typst`; the same results give the same PDF, byte for byte.
"""

import json
import os
import re
import tomllib
import zipfile
from pathlib import Path

import typst

import utils

ROOT = Path(__file__).resolve().parent
PLACEHOLDER = "TO BE FILLED IN"
CODE = ("*.py", "hw2-q3.ipynb", "requirements.txt", "Makefile", "README.md", "pyproject.toml")
CODE += ("report/*.typ", "report/group.toml", "tests/*.py")


def read_group():
    """The entries of report/group.toml; UserError when it is damaged."""
    path = ROOT / "report" / "group.toml"
    try:
        group = tomllib.loads(path.read_text(encoding="utf-8"))
        texts = [group[key] for key in ("course", "title", "group", "contributions")]
        if not all(isinstance(text, str) for text in texts + group["members"]):
            raise TypeError("every entry is text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise utils.UserError(f"{path} is missing or damaged ({error}); restore it and fill it in again.") from error
    return group


def read_results(out):
    """{run: its result} for every OUT/results/*.json; UserError for one that is damaged or cut short."""
    results = {}
    for path in sorted((out / "results").glob("[!.]*.json")):
        results[path.stem] = utils.load_result(out, path.stem)
        if not isinstance(results[path.stem], dict):
            raise utils.UserError(f"{path} holds no result; run the command that makes it again.")
    return results


def find_figures(out, root):
    """{name: path from `root`, as Typst wants it} for every figure in OUT/figures, as PDF where there is one."""
    paths = [path for suffix in ("png", "pdf") for path in sorted((out / "figures").glob(f"[!.]*.{suffix}"))]
    return {path.stem: "/" + path.relative_to(root).as_posix() for path in paths}


def report_inputs(out):
    """What Typst needs to compile report/report.typ about OUT: keyword arguments of `typst.compile` and `typst.query`.

    Typst cannot ask which files exist, so it is handed an index: the results themselves and the paths of the figures.
    """
    out = Path(out).resolve()
    root = Path(os.path.commonpath([ROOT, out]))
    index = {"results": read_results(out), "figures": find_figures(out, root)}
    options = {"root": str(root), "ignore_system_fonts": True, "sys_inputs": {"index": json.dumps(index)}}
    return {"input": str(ROOT / "report" / "report.typ")} | options


def compile_report(out):
    """(PDF as bytes, metadata of the document by label) for the results in OUT; UserError when they do not fit."""
    inputs, labels = report_inputs(out), {"pages": [], "missing": [], "check": [], "claim": []}
    try:
        pdf = typst.compile(**inputs, format="pdf")
        for item in json.loads(typst.query(selector="metadata", **inputs)):
            labels.get(item.get("label", "").strip("<>"), []).append(item["value"])
    except RuntimeError as error:  # a key that a result lacks, or a damaged figure
        place = re.search(r"(\w+\.typ):(\d+)", getattr(error, "diagnostic", "") or "")
        where = f"report/{place[1]}, line {place[2]}: " if place else ""
        problem = str(getattr(error, "message", error)).splitlines()[0]
        raise utils.UserError(
            f"{where}{problem}; a result or figure in {out} is damaged or of another version: run its command again."
        ) from error
    return pdf, labels


def results_table(results):
    """README's table of what to expect: a Markdown line per network of the finished results."""
    lines = ["| question | result | data | made on |", "|---|---|---|---|"]

    def add(question, text, result):
        machine = f"{result['environment']['processor']}, {result['environment']['device']}"
        lines.append(f"| {question} | {text} | {result['data']['source']} | {machine} |")

    if q1 := results.get("q1"):
        for row in (row for row in q1["crossover"] if row["against"] == "softmax, fused" and row["measured"]):
            add(f"Q1, D = {row['D']}", f"linear attention wins from L = {row['measured']:,}", q1)
    for name, result in sorted(results.items()):
        if name.startswith("q2-search"):
            (value, spread), (test, test_spread) = result["best"]["val_accuracy"], result["best"]["accuracy"]
            seeds = f"mean ± standard deviation of {result['best']['finished']} seeds" if spread else "one seed"
            network = "strided" if result["config"]["no_maxpool"] else "max-pool"
            question = f"Q2, {network}, {result['config']['epochs']} epochs, rate {result['best']['learning_rate']:g}"
            spreads = [f" ± {s:.3f}" if s else "" for s in (spread, test_spread)]
            add(question, f"accuracy {value:.3f}{spreads[0]} validation, {test:.3f}{spreads[1]} test ({seeds})", result)
        elif result["question"] == "q3" and result["status"] == "finished" and "-tried" not in name:
            test, epochs = result["test"], result["config"]["epochs"]
            scores = f"test similarity {test['damerau_levenshtein']:.3f}, WER {test['wer']:.3f}"
            text = f"{scores}; trained {result['seconds'] / 60:.0f} minutes" if epochs else f"{scores}; only tested"
            add(f"Q3, {name.removeprefix('q3-')}, {epochs} epochs", text, result)
    return "\n".join(lines)


def update_readme(name, command, text):
    """Write `text` between README's markers for what `command` keeps up to date there."""
    path = ROOT / "README.md"
    before, begin, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name}: written by {command} -->\n")
    _, end, after = rest.partition(f"\n<!-- end of {name} -->")
    if not (begin and end):
        raise utils.UserError(f"README.md has lost the markers around its {name}; restore it.")
    with utils.write_atomically(path) as temporary:
        temporary.write_text(before + begin + text + end + after, encoding="utf-8")


def write_submission(pdf, group):
    """Write <group>.zip beside this script, with the PDF and the code and nothing else; UserError until the group has
    filled in report/group.toml."""
    files = [("report.pdf", pdf)]
    for pattern in CODE:
        paths = sorted(ROOT.glob(pattern))
        if not paths:
            raise utils.UserError(f"{pattern} belongs to the submission but is not there; restore it.")
        files += [(path.relative_to(ROOT).as_posix(), path.read_bytes()) for path in paths]
    archive = ROOT / f"{group['group']}.zip"
    with utils.write_atomically(archive) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files:
            entry = zipfile.ZipInfo(name)  # dated 1980: the same files give the same archive
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            file.writestr(entry, content)
    print(f"{archive.name}: {len(files)} files")


def check_group(group):
    """Raise UserError for what the group has not filled in yet."""
    texts = {"group": [group["group"]], "members": group["members"], "contributions": [group["contributions"]]}
    for key, values in texts.items():
        if not values or any(PLACEHOLDER in value or not value.strip() for value in values):
            raise utils.UserError(
                f"'{key}' in report/group.toml has not been filled in; write it, then run this again."
            )
    if not re.fullmatch(r"[\w-]+", group["group"]):
        raise utils.UserError("'group' in report/group.toml names the zip file; use letters, digits, - and _ only.")


def make_parser():
    """Where the results are, and whether to pack the submission."""
    parser = utils.ArgumentParser(__doc__.splitlines()[0])
    parser.flag("out", default="report", help="folder that holds results/ and figures/, and gets report.pdf")
    parser.flag("submission", action="store_true", help="also write <group>.zip, with the PDF and the code")
    return parser


def main(args):
    """Compile, save and summarise; returns the document's metadata."""
    out, group = Path(args.out), read_group()
    if not out.is_dir():
        raise utils.UserError(f"{out} does not exist; name the folder that holds results/ and figures/.")
    if args.submission:
        check_group(group)
    pdf, labels = compile_report(out)
    with utils.write_atomically(out / "report.pdf") as temporary:
        temporary.write_bytes(pdf)
    if out.resolve() == ROOT / "report":
        update_readme("results", "make report", results_table(read_results(out)))
    missing = ", ".join(dict.fromkeys(labels["missing"])) or "nothing"
    print(f"{out / 'report.pdf'}: {labels['pages'][0]} pages; not run: {missing}")
    if args.submission:
        write_submission(pdf, group)
    return labels


if __name__ == "__main__":
    utils.run_script(main, make_parser())
