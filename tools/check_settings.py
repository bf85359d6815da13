"""Refuse a setting that make was given but that nobody would read, naming the one that was meant.

python -m tools.check_settings -goals q3 -given EPOCH -q1 dims -q2 epochs
    there is no setting EPOCH; did you mean EPOCHS?
"""

import runs
from runs import UserError

EVERYWHERE = ["PYTHON", "PY"]


def settings_of(q1, q2):
    """{goal of make: the settings that it reads}."""
    q3 = runs.setting_names(runs.ROOT / "hw2-q3.ipynb")
    return {
        "q1": q1,
        "q2": q2,
        "q3": q3,
        "run": [*q1, *q2, *q3],
        "notebook": q3,
        "transcribe": ["wav"],
        "model": ["data", "metadata"],
        "report": ["out"],
    }


def nearest_spelling(name, known):
    """`name` as it was meant: in capitals, or the one of which it is the initials, LR."""
    initials = {"".join(word[0] for word in setting.split("_")): setting for setting in known}
    return initials.get(name.upper(), name.upper())


def check(goals, given, q1, q2):
    """UserError for the first of the variables `given` that no goal reads."""
    read_by = settings_of(q1, q2)
    known = {goal: [name.upper() for name in names] for goal, names in read_by.items()}
    everything = sorted({name for names in known.values() for name in names})
    read = {name for goal in goals for name in known.get(goal, [])}
    for name in given:
        if name in read or name in EVERYWHERE:
            continue
        if name in everything:
            readers = [f"make {goal}" for goal in known if name in known[goal]]
            raise UserError(f"make {' '.join(goals)} does not read {name}; {readers[0]} does")
        meant = nearest_spelling(name, everything)
        if meant in everything:
            raise UserError(f"there is no setting {name}; did you mean {meant}?")
        runs.refuse_unknown([name], everything)


def main(args):
    check(args.goals or ["help"], args.given, args.q1, args.q2)


if __name__ == "__main__":
    parser = runs.ArgumentParser(__doc__)
    parser.prog = "make"
    for name in ("goals", "given", "q1", "q2"):
        parser.flag(name, nargs="*", default=[], help="names")
    runs.run_script(main, parser)
