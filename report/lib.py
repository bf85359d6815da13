"""What the report's questions share: results, numbers as text, tables, intervals, bands."""

import re
from statistics import mean, stdev

import runs
from runs import UserError

import numpy as np
from scipy import stats

ROOT = runs.ROOT  # the repository's folder


# ----------------------------------------------------------------------------------------- results
class Results(dict):
    """{run: its result}; one that is asked for and not there is a UserError."""

    def __missing__(self, name):
        raise UserError(f"there is no result {name}.json to report on; run what makes it.")


def read_results(out):
    """The results in `out`/results/*.json."""
    if not (out / "results").is_dir():
        raise UserError(f"{out} holds no results; name a folder with results/ and figures/.")
    names = sorted(path.stem for path in (out / "results").glob("[!.]*.json"))
    return Results({name: runs.load_result(out, name) for name in names})


def matching(results, pattern):
    """The results whose names match, in the order of their names; UserError where there is none."""
    found = [results[name] for name in sorted(results) if re.fullmatch(pattern, name)]
    if not found:
        raise UserError(f"there is no result {pattern} to report on; run what makes it.")
    return found


def last(group, key):
    """What each run measured after its last epoch."""
    return [run["epochs"][-1][key] for run in group]


def test(group, key):
    """What each run measured on the test split."""
    return [run["test"][key] for run in group]


# --------------------------------------------------------------------------------- numbers as text
def spread(values, digits=3):
    """[0.54, 0.58] -> "0.560 ± 0.028", unbroken: mean and standard deviation."""
    if len(values) < 2:
        return average(values, digits)
    return f"{mean(values):.{digits}f}\u00a0±\u00a0{stdev(values):.{digits}f}"


def average(values, digits=3):
    """The mean as text; a dash where there is nothing."""
    return f"{mean(values):.{digits}f}" if values else "–"


def whole(n):
    """46620 -> "46,620"."""
    return f"{n:,}" if n else "not found"


def percent(share):
    return f"{100 * share:.0f} %"


def signed(x, digits=3):
    """-0.5 -> "−0.500", with a minus as wide as a plus."""
    return f"{x:.{digits}f}".replace("-", "−")


def bytes_text(n):
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if n >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n / 1e3:.0f} kB"


def listing(items):
    """["a", "b", "c"] -> "a, b and c"; "none" for nothing."""
    *first, last = map(str, list(items) or ["none"])
    return f"{', '.join(first)} and {last}" if first else last


def extent(values, form=","):
    """[5, 3, 4] -> "3 to 5"."""
    values = list(values)
    low, high = min(values), max(values)
    return f"{low:{form}} to {high:{form}}" if low < high else f"{low:{form}}"


def interval(low, high, digits=3):
    """(-0.5, 1) -> "[−0.500, 1.000]", unbroken."""
    return f"[{signed(low, digits)},\u00a0{signed(high, digits)}]"


# ---------------------------------------------------------------------------------------- Markdown
def table(header, rows):
    """The lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


BEGIN, END = "<!-- {}: written by make readme -->", "<!-- end of {} -->"


def write_between(path, blocks, begin=BEGIN, end=END):
    """Write {name: lines} into a Markdown file, each between its two markers of that name."""
    text = path.read_text(encoding="utf-8")
    for name, lines in blocks.items():
        before, found_begin, rest = text.partition(begin.format(name))
        _, found_end, after = rest.partition(end.format(name))
        if not found_begin or not found_end:
            raise UserError(f"{path} has lost the markers around its {name}; restore them.")
        text = "\n".join([before + found_begin, *lines, found_end + after])
    with runs.write_atomically(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


# --------------------------------------------------------------------------------------- intervals
def welch(a, b):
    """The difference of two means, and its 95 % interval, for unequal variances."""
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return np.mean(a) - np.mean(b), low, high


def difference(a, b):
    """Welch's as text: "0.130 [0.097, 0.163]"."""
    size, low, high = welch(a, b)
    return f"{signed(size)} {interval(low, high)}"


# ----------------------------------------------------------------------------------------- figures
def band(axes, x, rows, colour, **options):
    """A line for the mean of `rows`, one row a seed, and a band from the least to the greatest."""
    rows = np.array(rows)
    axes.plot(x, rows.mean(axis=0), color=colour, **options)
    axes.fill_between(x, rows.min(axis=0), rows.max(axis=0), color=colour, alpha=0.25, lw=0)


def source_of(run):
    """Where a run's data is from, in words."""
    return run["data"]["source"].replace("ljspeech_metadata_full.csv", "LJ Speech")
