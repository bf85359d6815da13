"""The committed results, and the commands that make them again.

    python -m tools.evidence                        lists them, with what each takes
    python -m tools.evidence q1 q2-rates            makes these, from what lies in data/
    make evidence DATA=data                         makes all of them, the short ones first

A command runs in build/evidence; what it has finished is then copied to report/results, which
`make report` reads. Data: DATA/retina/octmnist.npz (a subset of the collection behind OCTMNIST),
DATA/clips (real clips, from tools.part_of_ljspeech) and build/spoken (the transcripts of LJ Speech,
spoken by the sample's voice, as `make model` does; where it was spoken on another kind of
processor, its network rounded otherwise, and the hash is another one: then give -any_data).
Results that are older than this list are named in report/results/README.md.
"""

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass

import runs
import utils
from runs import UserError

OUT = "build/evidence"
RESULTS = runs.ROOT / "report" / "results"
SEEDS = (42, 43, 44, 45, 46)
RATES = (0.1, 0.01, 0.001)


@dataclass(frozen=True)
class Entry:
    name: str
    command: str  # what stands behind `python`; " && python " between two
    makes: tuple[str, ...]  # the results' names
    data: str | None  # one of DATA_SETS, or two with a space between
    minutes: int  # on two cores without bfloat16, about
    on_a_gpu: int | None = None  # minutes on an H200, about; None: it gains nothing there
    is_in_place: bool = False  # the command itself writes to report/results


DATA_SETS = {  # where it lies, and the hash in the results
    "retina": ("{data}/retina", "9feefa22"),
    "spoken": ("build/spoken", "cbb2bbb9"),
    "real": ("{data}/clips", "9e057d66"),
}


def q2_entry(name, network, rates, flags, minutes, search=None):
    """Runs of hw2-q2.py, five seeds each; search: the name of the results file of a search."""
    seeds = " ".join(map(str, SEEDS))
    command = f"hw2-q2.py -data {{data}}/retina -out {OUT} -seed {seeds} {flags}"
    epochs = "-epochs150" if "-epochs 150" in flags else ""
    makes = [f"q2-{network}-lr{rate}-seed{seed}{epochs}" for rate in rates for seed in SEEDS]
    return Entry(name, command, (*makes, *([search] if search else [])), "retina", minutes)


def control_entry(name, rate, flags, epochs, minutes):
    """Runs of the network with average pooling."""
    command = f"-m tools.pooling_control -data {{data}}/retina -out {OUT} {flags}".strip()
    makes = tuple(f"q2-avgpool-lr{rate}-seed{seed}{epochs}" for seed in SEEDS)
    return Entry(name, command, makes, "retina", minutes)


def q3_entry(name, decoder, flags, minutes, on_a_gpu):
    """One full-size training of the notebook, which goes on where it was interrupted."""
    words = f"data=build/spoken out={OUT} decoders={decoder} tag=-{name} resume=1 {flags}"
    run = f"q3-{decoder}-{name}"
    return Entry(run, f"-m tools.run_notebook {words}", (run,), "spoken", minutes, on_a_gpu)


def model_entry(decoder, on_a_gpu):
    """Both trainings of a model that comes with the clone, and its scores."""
    out = f"{OUT}/model"
    checkpoint = f"{out}/finetuned/checkpoints/q3-{decoder}.pt"
    flags = f"-spoken build/spoken -data {{data}}/clips -out {out} -decoder {decoder} -resume"
    score = f"-m tools.make_model -data {{data}}/clips -checkpoint {checkpoint}"
    command, run = f"-m tools.finetune {flags} && python {score}", f"q3-model-{decoder}"
    return Entry(run, command, (run,), "spoken real", 300, on_a_gpu, is_in_place=True)


RATE_FLAGS = "-learning_rate " + " ".join(map(str, RATES))
LONG = "-epochs 150 -name search-epochs150"
BEST = "-learning_rate best -no_maxpool"
HANDED_OUT = "ctc_weight=0 clock=0"
ENTRIES = (
    Entry("q1", f"q1_measure.py -out {OUT}", ("q1",), None, 4),
    q2_entry("q2-rates", "maxpool", RATES, RATE_FLAGS, 2, "q2-search"),
    q2_entry("q2-strided", "strided", [0.1], BEST, 1),
    control_entry("q2-control", 0.1, "-epochs 15 -learning_rate 0.1", "", 1),
    q2_entry("q2-rates-150", "maxpool", RATES, f"{LONG} {RATE_FLAGS}", 20, "q2-search-epochs150"),
    q2_entry("q2-strided-150", "strided", [0.01], f"{LONG} {BEST}", 4),
    q2_entry("q2-strided-150-0.1", "strided", [0.1], f"{LONG} -no_maxpool -learning_rate 0.1", 4),
    control_entry("q2-control-150", 0.01, "", "-epochs150", 6),
    control_entry("q2-control-150-0.1", 0.1, "-learning_rate 0.1", "-epochs150", 6),
    Entry("times", "-m bench.commands", ("times",), None, 10, is_in_place=True),
    q3_entry("full-noclock", "transformer", "clock=0", 240, 5),
    q3_entry("full-seed42", "transformer", "seed=42", 240, 5),
    q3_entry("full-seed42", "lstm", "seed=42", 240, 6),
    q3_entry("full-noctc", "transformer", "ctc_weight=0", 240, 5),
    q3_entry("full-handed-out", "transformer", HANDED_OUT, 240, 5),
    q3_entry("full-handed-out", "lstm", HANDED_OUT, 240, 5),
    q3_entry("full-seed43", "transformer", "seed=43", 240, 5),
    q3_entry("full-seed43", "lstm", "seed=43", 240, 6),
    q3_entry("full-seed44", "transformer", "seed=44", 240, 5),
    q3_entry("full-seed44", "lstm", "seed=44", 240, 6),
    model_entry("lstm", 60),
    model_entry("transformer", 60),
    # last, because it edits EXERCISES.md: what is made after that would name an edited tree
    Entry("exercises", "-m tools.exercises", ("exercises",), None, 30, is_in_place=True),
)


# ----------------------------------------------------------------------------------------- making
def hash_of(name, data):
    """The hash of one of DATA_SETS as it lies there today, as results files have it."""
    folder = DATA_SETS[name][0].format(data=data)
    load = utils.load_oct_data if name == "retina" else utils.load_ljspeech
    return load(folder)[1]["sha256"]


def make(entry, data, takes_any_data):
    """Run an entry's command and copy its results to report/results."""
    data_sets = entry.data.split() if entry.data and not takes_any_data else []
    for name in data_sets:
        found, expected = hash_of(name, data), DATA_SETS[name][1]
        if not found.startswith(expected):
            problem = f"the data {name} of {entry.name} have the hash {found[:8]}, not {expected}"
            advice = "take the same data, or give -any_data"
            if name == "spoken":
                advice += ": speech spoken on another kind of processor has another hash"
            raise UserError(f"{problem}; {advice}.")
    command = entry.command.format(data=data)
    print(f"{entry.name}: python {command}", flush=True)
    for step in command.split(" && python "):
        done = subprocess.run([sys.executable, *shlex.split(step)], cwd=runs.ROOT, check=False)
        if done.returncode:
            raise UserError(f"{entry.name} was not made; what its command said stands above.")
    if entry.is_in_place:
        return
    for name in entry.makes:
        result = runs.load_result(runs.ROOT / OUT, name, f"entry {entry.name}")
        if result["status"] == "interrupted":
            raise UserError(f"{name} was interrupted; make {entry.name} again.")
        if result["command"] != shlex.join(["python", *shlex.split(command)]):
            raise UserError(f"{name} in {OUT} was made by another command; delete it first.")
    for name in entry.makes:
        source = runs.ROOT / OUT / "results" / f"{name}.json"
        with runs.write_atomically(RESULTS / source.name) as temporary:
            shutil.copyfile(source, temporary)


def print_list():
    """One entry after the other, the short ones first."""
    for entry in ENTRIES:
        gpu = f", {entry.on_a_gpu} on an H200" if entry.on_a_gpu else ""
        n = len(entry.makes)
        results = entry.makes[0] if n == 1 else f"{n} results, such as {entry.makes[0]}"
        print(f"{entry.name} (about {entry.minutes} min on two cores{gpu}): {results}")
        print(f"    python {entry.command.format(data='data')}")


# ----------------------------------------------------------------------------------- command line
def make_parser():
    parser = runs.ArgumentParser(__doc__)
    names = [entry.name for entry in ENTRIES]
    parser.add_argument("names", nargs="*", help="of the entries that are made; none: list them")
    parser.flag("all", action="store_true", help=f"make all {len(names)}")
    parser.flag("data", default="data", help="folder that holds retina/ and clips/")
    parser.flag("any_data", action="store_true", help="also from data with another hash")
    parser.flag("dirty", action="store_true", help="also where files were edited since the commit")
    return parser


def main(args):
    """List the entries, or make those that are named."""
    known = {entry.name: entry for entry in ENTRIES}
    for name in args.names:
        if name not in known:
            raise UserError(f"there is no entry {name}; without a name all of them are listed.")
    chosen = ENTRIES if args.all else [known[name] for name in args.names]
    if not chosen:
        print_list()
        return
    if not args.dirty and (runs.git_commit() or "-dirty").endswith("-dirty"):
        raise UserError("files were edited since the last commit; commit them, or give -dirty.")
    for entry in chosen:
        make(entry, args.data, args.any_data)


if __name__ == "__main__":
    again = "give the command again: trainings of Question 3 go on where they stopped"
    runs.run_script(main, make_parser(), after_interrupt=again)
