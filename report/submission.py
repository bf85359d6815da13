"""The zip to hand in: <group>.zip, with the report and the code, and nothing else."""

import re
import zipfile

import runs
from report import lib, make
from runs import UserError

PLACEHOLDER = "TO BE FILLED IN"
CODE = (  # what goes into it beside the PDF
    "*.py",
    "hw2-q3.ipynb",
    "requirements*.txt",
    "Makefile",
    "README.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "pyproject.toml",
    "bench/*.py",
    "tools/*.csv",
    "tools/*.py",
    "tests/*.py",
    "report/*.py",
    "report/*.typ",
    "report/group.toml",
)


def check_group(group):
    """UserError for what the group has not filled in yet."""
    for key in ("group", "members", "contributions"):
        text = str(group[key] or PLACEHOLDER)
        if PLACEHOLDER in text or not text.strip():
            problem = f"'{key}' in report/group.toml has not been filled in"
            raise UserError(f"{problem}; write it, then run this again.")
    if not re.fullmatch(r"[\w-]+", group["group"]):
        problem = "'group' in report/group.toml names the zip file"
        raise UserError(f"{problem}; use letters, digits, - and _ only.")


def write_zip(pdf, group):
    """Write <group>.zip into the repository's folder."""
    files = {"report.pdf": pdf}
    for pattern in CODE:
        for path in sorted(lib.ROOT.glob(pattern)):
            files[path.relative_to(lib.ROOT).as_posix()] = path.read_bytes()
    archive = lib.ROOT / f"{group['group']}.zip"
    with runs.write_atomically(archive) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name)  # dated 1980: the same files give the same archive
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            file.writestr(entry, content)
    print(f"{archive.name}: {len(files)} files")


def main(args):
    group = make.read_group()
    check_group(group)
    write_zip(make.write_report(lib.read_results(lib.ROOT / "report")), group)


if __name__ == "__main__":
    runs.run_script(main, runs.ArgumentParser(__doc__))
