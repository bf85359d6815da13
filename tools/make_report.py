"""The report about the committed results, and for any other folder a sheet of its results.

    python -m tools.make_report -out report               report/report.pdf: the answers
    python -m tools.make_report -out build/sample         build/sample/results.pdf: tables, figures
    python -m tools.make_report -out report -submission   the report, then <group>.zip: PDF and code
    python -m tools.make_report -readme                   README's numbers, and the model's card's

The report's text is report/*.typ, its numbers come from report/evidence.py, and what its sentences
claim beyond numbers is in report/claims.py; claims that the results no longer bear out are listed.
The Typst compiler and its fonts come with the package `typst`. The same results give the same PDF,
byte for byte.
"""

import json
import os
import re
import tomllib
import zipfile
from pathlib import Path

import runs
from report import claims, draw, evidence
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
    "CONTRIBUTING.md",
    "LICENSE",
    "pyproject.toml",
    "tools/*.py",
    "tests/*.py",
    "report/*.py",
    "report/*.typ",
    "report/group.toml",
)


# ------------------------------------------------------------------------------ what Typst is given
class Results(dict):
    """{run: its result}; one that is asked for and not there is a UserError."""

    def __missing__(self, name):
        raise UserError(f"there is no result {name}.json to report on; run what makes it.")


def read_results(out):
    """The results in `out`/results/*.json."""
    names = sorted(path.stem for path in (out / "results").glob("[!.]*.json"))
    return Results({name: runs.load_result(out, name) for name in names})


def read_group():
    """The entries of report/group.toml, each as it must be."""
    try:
        group = tomllib.loads(runs.read_text(ROOT / "report" / "group.toml"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"report/group.toml has a mistake: {error}; correct it.") from error
    for name in ("course", "title", "group", "contributions"):
        if not isinstance(group.get(name), str):
            problem = f'{name} must be text in quotes, as in {name} = "..."'
            raise UserError(f"report/group.toml: {problem}; correct it.")
    members = group.get("members")
    if not isinstance(members, list) or not all(isinstance(one, str) for one in members):
        problem = 'members must be a list of texts, as in members = ["Ana (1)", "Rui (2)"]'
        raise UserError(f"report/group.toml: {problem}; correct it.")
    return group


def needs_other_fonts(group):
    """Whether a name has letters beyond Latin, Greek and Cyrillic, which the report's fonts lack.

    Then the fonts of this machine are used, too.
    """
    text = str(group)
    beyond = sorted({letter for letter in text if ord(letter) > 0x52F and letter.isalpha()})
    if beyond:
        letters = " ".join(beyond)
        print(f"the fonts that come with the report lack {letters}: those of this machine are used")
    return bool(beyond)


def compile_document(name, numbers, out):
    """(PDF as bytes, number of pages) of report/`name`.typ about `numbers` and `out`'s figures."""
    root = Path(os.path.commonpath([ROOT, out.resolve()]))  # Typst reads nothing outside of it
    figures = {}
    for path in sorted((out / "figures").glob("[!.]*.pdf")):
        figures[path.stem] = "/" + path.resolve().relative_to(root).as_posix()
    group = read_group()
    given = {"numbers": numbers, "figures": figures, "group": group}
    inputs = {
        "input": str(ROOT / "report" / f"{name}.typ"),
        "root": str(root),
        "ignore_system_fonts": not needs_other_fonts(group),
        "sys_inputs": {"evidence": json.dumps(given)},
    }
    pdf = typst.compile(**inputs, format="pdf")
    (pages,) = json.loads(typst.query(selector="<pages>", field="value", **inputs))
    return pdf, pages


def compile_report(results, out):
    """The answers, about these results of `out`; UserError where one of them is missing."""
    numbers = evidence.numbers(results)
    for claim in claims.no_longer_true(results):
        print(f"no longer true, write it anew: {claim}")
    return compile_document("report", numbers, out)


def compile_sheet(results, out):
    """Tables and figures of whatever `out` holds, without conclusions."""
    return compile_document("results", evidence.sheet(results), out)


# ------------------------------------------------------------------------- numbers of other pages
def write_readme():
    """Write what the committed results say between the markers of README and the model's card."""
    results = read_results(ROOT / "report")
    times = [evidence.readme_times(results["times"])]
    rows = table(["question", "result", "data"], evidence.readme_rows(results))
    write_between(ROOT / "README.md", times=times, results=rows)

    model = results["q3-model"]
    header = ["recordings", "how many", "similarity", "word error rate", "letter error rate"]
    scores = table(header, evidence.model_rows(model))
    facts = table(["", ""], evidence.model_facts(model))
    write_between(ROOT / "report" / "models" / "README.md", facts=facts, scores=scores)


def table(header, rows):
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def write_between(path, **blocks):
    """Write {name: lines} into a Markdown file, each between its two markers of that name."""
    text = path.read_text(encoding="utf-8")
    for name, lines in blocks.items():
        begin, end = f"<!-- {name}: written by make readme -->", f"<!-- end of {name} -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not found_begin or not found_end:
            raise UserError(f"{path} has lost the markers around its {name}; restore them.")
        text = "\n".join([before + begin, *lines, end + after])
    with runs.write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


# ---------------------------------------------------------------------------------- the submission
def check_group(group):
    """UserError for what the group has not filled in yet."""
    for key in ("group", "members", "contributions"):
        text = str(group.get(key) or PLACEHOLDER)
        if PLACEHOLDER in text or not text.strip():
            problem = f"'{key}' in report/group.toml has not been filled in"
            raise UserError(f"{problem}; write it, then run this again.")
    if not re.fullmatch(r"[\w-]+", group["group"]):
        problem = "'group' in report/group.toml names the zip file"
        raise UserError(f"{problem}; use letters, digits, - and _ only.")


def write_submission(pdf, group):
    """Write <group>.zip into the repository's folder: the PDF and the code, and nothing else."""
    files = {"report.pdf": pdf}
    for pattern in CODE:
        for path in sorted(ROOT.glob(pattern)):
            files[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    archive = ROOT / f"{group['group']}.zip"
    with runs.write_atomically(archive) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)  # dated 1980: the same files give the same archive
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            file.writestr(entry, content)
    print(f"{archive.name}: {len(files)} files")


# ------------------------------------------------------------------------------------ command line
def make_parser():
    parser = runs.ArgumentParser(__doc__)
    out = "folder that holds results/ and figures/, and gets the PDF"
    submission = "also write <group>.zip, with the PDF and the code"
    readme = "write the committed results into README and the model's card, and no report"
    parser.flag("out", default="report", help=out)
    parser.flag("submission", action="store_true", help=submission)
    parser.flag("readme", action="store_true", help=readme)
    return parser


def main(args):
    """Compile, save and summarise."""
    if args.readme:
        return write_readme()
    out, group = Path(args.out), read_group()
    if not (out / "results").is_dir():
        raise UserError(f"{out} holds no results; name a folder with results/ and figures/.")
    if args.submission:
        check_group(group)
    results = read_results(out)
    if args.submission or out.resolve() == ROOT / "report":
        path = out / "report.pdf"
        if not args.submission:
            draw.main(results)  # the figures that several runs share
        pdf, pages = compile_report(results, out)
    else:
        path = out / "results.pdf"
        pdf, pages = compile_sheet(results, out)
    with runs.write_atomically(path) as temporary:
        temporary.write_bytes(pdf)
    print(f"{path}: {pages} pages")
    if args.submission:
        write_submission(pdf, group)


if __name__ == "__main__":
    runs.run_script(main, make_parser())
