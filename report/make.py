"""The report about the committed results, or a sheet of tables and figures about another folder's.

    python -m report.make                     report/report.pdf: the answers
    python -m report.make -out build/sample   build/sample/results.pdf: the sheet

The text is report/*.typ. It asks for numbers by name, `#n.rate_short`; they come from q1.py, q2.py
and q3.py. Those that the text uses are kept in report/numbers.json. When one of them changes, it is
listed with the lines that use it: read these sentences again. The Typst compiler and its fonts come
with the package `typst`; the same results give the same PDF, byte for byte.
"""

import json
import os
import re
import tomllib
from pathlib import Path

import runs
from report import figures, lib, q1, q2, q3, sheet
from runs import UserError

import typst


# ------------------------------------------------------------------------------ what Typst is given
def all_numbers(results):
    """{question: {name: number as text, or the rows of a table}}."""
    return {"q1": q1.numbers(results), "q2": q2.numbers(results), "q3": q3.numbers(results)}


def read_group():
    """The entries of report/group.toml, each as it must be."""
    try:
        group = tomllib.loads(runs.read_text(lib.ROOT / "report" / "group.toml"))
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

    Then the fonts of this machine are used as well.
    """
    beyond = sorted({letter for letter in str(group) if ord(letter) > 0x52F and letter.isalpha()})
    if beyond:
        letters = " ".join(beyond)
        print(f"the fonts that come with the report lack {letters}: those of this machine are used")
    return bool(beyond)


def paths_of_figures(out):
    """{name: path} of the figures in `out`."""
    return {path.stem: path for path in sorted((out / "figures").glob("[!.]*.pdf"))}


def compile_document(name, numbers, out):
    """report/`name`.typ about `numbers` and `out`'s figures: (PDF as bytes, number of pages,
    [first page of each chapter]).
    """
    root = Path(os.path.commonpath([lib.ROOT, out.resolve()]))  # Typst reads nothing outside of it
    paths = {
        figure: "/" + path.resolve().relative_to(root).as_posix()
        for figure, path in paths_of_figures(out).items()
    }
    group = read_group()
    inputs = {
        "input": str(lib.ROOT / "report" / f"{name}.typ"),
        "root": str(root),
        "ignore_system_fonts": not needs_other_fonts(group),
        "sys_inputs": {"given": json.dumps({"numbers": numbers, "figures": paths, "group": group})},
    }
    pdf = typst.compile(**inputs, format="pdf")
    ((n_pages, starts),) = json.loads(typst.query(selector="<pages>", field="value", **inputs))
    return pdf, n_pages, starts


# ---------------------------------------------------------------------------- numbers in the text
LET = re.compile(r"#let \(?([\w, ]+)\)? = \(?((?:numbers|n)\b[\w., ]*)\)?$")


def numbers_in_text(numbers):
    """{name: {"value": as printed, "used": "file:line, ..."}} of what the text asks for."""
    places = {}  # {name: {place: None}}: a set in the order of the text
    for path in sorted((lib.ROOT / "report").glob("*.typ")):
        for name, line in names_in(path.read_text(encoding="utf-8")):
            places.setdefault(name, {})[f"report/{path.name}:{line}"] = None
    return {
        name: {"value": value_of(numbers, name), "used": ", ".join(places[name])}
        for name in sorted(places)
    }


def names_in(text):
    """[(name, line)] of the numbers in a Typst file: ("q2.high.val", 12), ("q2.gaps.at(0)", 12).

    `#let n = numbers.q2` and `#let (a, b) = (n.x, n.y)` give them shorter names.
    """
    whole = {"numbers": ""}  # {what it is called here: its whole name}
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        called = "|".join(whole)
        uses = re.findall(rf"\b({called})\b((?:\.at\(\d+\)|\.[A-Za-z]\w*)*)", line)
        names = [(whole[first] + rest).lstrip(".") for first, rest in uses]
        if match := LET.match(line):
            whole |= zip(match[1].split(", "), names, strict=True)
        elif not line.startswith("//"):
            found += [(name, number) for name in names if "." in name]
    return found


def value_of(numbers, name):
    """A number as the text prints it; of a table a line for each row."""
    value = numbers
    for index, key in re.findall(r"at\((\d+)\)|(\w+)", name):
        value = value[key or int(index)]
    return [" | ".join(row) for row in value] if isinstance(value, list) else str(value)


def changes(before, now):
    """Which values have changed, and where they are used: a line each."""
    lines = []
    for name in sorted(before.keys() & now.keys()):
        old, new = before[name]["value"], now[name]["value"]
        pairs = [(old, new)]
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            pairs = zip(old, new, strict=True)  # a table: its rows
        used = now[name]["used"]
        lines += [f"{name}: {a} -> {b}, used in {used}" for a, b in pairs if a != b]
    return lines


# ------------------------------------------------------------------------------- both documents
def write_report(results):
    """Compile report/report.pdf and say which numbers changed; returns the PDF.

    UserError where a result is missing.
    """
    folder = lib.ROOT / "report"
    numbers = all_numbers(results)
    pdf, n_pages, _ = compile_document("report", numbers, folder)
    kept, now = folder / "numbers.json", numbers_in_text(numbers)
    before = json.loads(runs.read_text(kept)) if kept.exists() else {}
    for line in changes(before, now):
        print(line)
    save(kept, (json.dumps(now, indent=1, ensure_ascii=False) + "\n").encode())
    save(folder / "report.pdf", pdf)
    print(f"report/report.pdf: {n_pages} pages")
    return pdf


def write_sheet(results, out):
    """Compile `out`/results.pdf."""
    contents = sheet.contents(results, paths_of_figures(out))
    pdf, n_pages, _ = compile_document("results", contents, out)
    save(out / "results.pdf", pdf)
    print(f"{out / 'results.pdf'}: {n_pages} pages")


def save(path, content):
    with runs.write_atomically(path) as temporary:
        temporary.write_bytes(content)


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    out = "folder that holds results/ and figures/, and gets the PDF"
    parser.flag("out", default="report", help=out)
    return parser


def main(args):
    """Read the results, draw what several share, compile."""
    out = Path(args.out)
    results = lib.read_results(out)
    if out.resolve() == lib.ROOT / "report":
        figures.draw_all(results, out)
        write_report(results)
    else:
        write_sheet(results, out)


if __name__ == "__main__":
    runs.run_script(main, make_parser())
