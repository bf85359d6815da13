"""How every script here is started and recorded: command lines, errors in one sentence, seeds and
devices, results files, checkpoints, training runs that can be interrupted, work spread over
processes, and a notebook's definitions.

The ground floor: it imports nothing of the project and knows nothing of images or speech.

A failure that a person can put right is a `UserError`, raised where the file is read, the flag is
checked, the disk is written. Its text is one sentence that says what to do next; `run_script`
prints it on stderr and ends with exit status 2. Any other exception is a fault in code and keeps
Python's traceback.
"""

import argparse
import ast
import errno
import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import random
import shlex
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # torch is imported where it is needed: some scripts do without
    import torch

    Answer = Callable[..., torch.Tensor]

ROOT = Path(__file__).resolve().parent

os.environ.setdefault("USER", "nobody")  # torch asks for a name, which not every account has
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks: on the CPU

IN_NOTEBOOK = "ipykernel" in sys.modules
QUIET = False if IN_NOTEBOOK else None  # tqdm's `disable`: None draws bars on terminals only
COMMAND = None  # filled in by the program that runs a notebook's code, if one does


# ----------------------------------------------------------------------------------- command lines
class UserError(Exception):
    """Something the person at the keyboard can put right; the message says how, in a sentence."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the course's single-dash flags (`-epochs`, also `--epochs`).

    doc: the docstring of the script, whose first line describes it.
    """

    def __init__(self, doc: str | None):
        super().__init__(
            description=(doc or "").partition("\n")[0],
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def flag(self, name: str, **options) -> None:
        """Add the flag `-name`, alias `--name`; the options are those of `add_argument`."""
        self.add_argument(f"-{name}", f"--{name}", **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; -h explains all flags.\n")


def number(
    kind: type,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    or_word: str | None = None,
) -> Callable[[str], Any]:
    """A type for argparse: a finite `int` or `float` within these limits, or the word `or_word`.

    `low` and `high` belong to the range, `above` and `below` do not.
    """
    limits = {"at least": low, "above": above, "at most": high, "below": below}
    stated = [f"{word} {limit:.15g}" for word, limit in limits.items() if math.isfinite(limit)]

    def parse(text):
        if text == or_word:
            return text
        value = kind(text)
        is_inside = low <= value <= high and above < value < below
        if not math.isfinite(value) or not is_inside:
            allowed = " and ".join(stated) or "finite"
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return value

    names = {int: "whole number", float: "number"}
    parse.__name__ = names[kind]  # argparse says: «invalid number value: 'ten'»
    return parse


SEED = number(int, low=0, high=2**32 - 1)  # what NumPy and torch both take


def sentence_of(
    error: BaseException,
    if_memory_runs_out: str = "closing other programs",
    after_interrupt: str = "",
) -> str | None:
    """What to tell a person about this exception; None for a fault in code."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; {after_interrupt}."
    if is_out_of_memory(error):
        return f"there is too little memory; try {if_memory_runs_out}."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # also of what is printed
        return "the disk is full; make room on it, then run it again."
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on any device, found no memory."""
    is_gpu = type(error).__name__ == "OutOfMemoryError"
    is_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    is_python = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    return is_python or is_gpu or is_system


@contextmanager
def file_errors(path: str | Path) -> Iterator[None]:
    """In this block a file is opened, read or written: an OSError there is a UserError."""
    try:
        yield
    except OSError as error:
        if sentence_of(error):  # a full disk, or memory
            raise
        reason = error.strerror or str(error)
        advice = "check that path and its disk, then run it again"
        raise UserError(f"{error.filename or path}: {reason}; {advice}.") from error


def run_script(
    main: Callable[[argparse.Namespace], Any],
    parser: ArgumentParser,
    if_memory_runs_out: str = "closing other programs",
    after_interrupt: str = "give the command again",
) -> None:
    """Call `main(args)`; what a person can put right ends it in one sentence, exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not under %run in a notebook
            stream.reconfigure(errors="replace")  # letters that a terminal does not have
    try:
        main(parser.parse_args())
        sys.stdout.flush()  # a full disk shows here at the latest
    except BrokenPipeError:  # `| head` has read enough: not a word
        discard_stdout()
        sys.exit(2)
    except BaseException as error:
        sentence = sentence_of(error, if_memory_runs_out, after_interrupt)
        if sentence is None:
            raise
        print(f"{parser.prog}: {sentence}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            discard_stdout()
        sys.exit(2)


def discard_stdout() -> None:
    """What could not be written is not tried again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command_line() -> str:
    """The command that is running, as one would type it: `python hw2-q2.py -epochs 3`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name] if spec else [sys.argv[0]]  # started as `python -m tools.letters`
    return shlex.join(["python", *program, *sys.argv[1:]])


# ------------------------------------------------------------------------ a notebook's settings
def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def is_whole(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def check_settings(
    settings: SimpleNamespace, names: str, wanted: str, is_right: Callable[[Any], bool]
) -> None:
    """UserError for the first of these settings, named in one text, that is not what is wanted."""
    for name in names.split():
        value = getattr(settings, name)
        if not is_right(value):
            raise UserError(f"{name} must be {wanted}, not {value!r}; correct it.")


# -------------------------------------------------------------------- a notebook's definitions
def changed(settings: SimpleNamespace, **values) -> SimpleNamespace:
    """A copy of the settings with these values."""
    return SimpleNamespace(**{**vars(settings), **values})


def read_cells(path: str | Path) -> list[tuple[list[str], str]]:
    """[(tags, source)] of a notebook's code cells, without magics (% and !)."""
    with file_errors(path):
        notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            lines = "".join(cell["source"]).splitlines()
            python = [line for line in lines if not line.lstrip().startswith(("%", "!"))]
            is_python = not lines or not lines[0].startswith("%%") or lines[0].startswith("%%time")
            tags = cell["metadata"].get("tags", [])
            cells.append((tags, "\n".join(python) if is_python else ""))
    return cells


def parameters_of(path: str | Path) -> dict[str, Any]:
    """{name: default} of a notebook's parameters: what its cell tagged "parameters" assigns."""
    sources = [source for tags, source in read_cells(path) if "parameters" in tags]
    if len(sources) != 1:
        problem = f'{path} has {len(sources)} cells tagged "parameters"'
        raise UserError(f"{problem}; give that tag to the cell of settings and to no other.")
    values = {}
    exec(sources[0], values)
    return {name: value for name, value in values.items() if not name.startswith("__")}


def refuse_unknown_parameters(path: str | Path, given: Iterable[str]) -> None:
    """UserError unless the notebook has all parameters of these names."""
    known = parameters_of(path)
    for name in given:
        if name not in known:
            names = ", ".join(known)
            raise UserError(f"{Path(path).name} has no parameter {name}; it has {names}.")


def load_definitions(path: str | Path, **parameters) -> ModuleType:
    """What a notebook defines, as a module, with these values in place of its own parameters.

    Of cells tagged "define" and "parameters" everything is executed, of the others only imports,
    functions and classes, and assignments that call nothing: so a helper in a new cell is found,
    and nothing is computed.
    """
    refuse_unknown_parameters(path, parameters)
    module = ModuleType(Path(path).stem)
    for number, (tags, source) in enumerate(read_cells(path)):
        tree = ast.parse(source)
        if not {"define", "parameters"} & set(tags):
            tree.body = [line for line in tree.body if _only_defines(line, vars(module))]
        exec(compile(tree, f"{path}, code cell {number}", "exec"), vars(module))
        if "parameters" in tags:
            vars(module).update(parameters)
    return module


def _only_defines(line, names):
    """Whether a statement imports or defines, or assigns something without calling anything."""
    if isinstance(line, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
        return True
    if not isinstance(line, ast.Assign):
        return False
    nodes = list(ast.walk(line.value))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    return used <= names.keys() and not any(isinstance(node, ast.Call) for node in nodes)


def say_errors_in_one_sentence(name: str) -> None:
    """In a notebook: a UserError prints its sentence instead of a traceback."""

    def say(shell, kind, error, traceback, tb_offset=None):
        print(f"{name}: {error}", file=sys.stderr)

    if IN_NOTEBOOK:  # not where the cells were saved as a script
        from IPython import get_ipython

        get_ipython().set_custom_exc((UserError,), say)


# ------------------------------------------------------------------------------- devices and seeds
def pick_device(name: str) -> "torch.device":
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` -> torch.device; UserError where there is none such.

    `auto` never means mps: nobody has tried it yet.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if has_usable_gpu() else "cpu")
    kind, colon, index = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    is_named = index.isdecimal() if colon else True
    if kind not in counts or not is_named or int(index or 0) >= counts[kind]:
        raise UserError(f"this machine has no usable device '{name}'; choose auto or cpu.")
    return torch.device(name)


def has_usable_gpu() -> bool:
    """Whether there is a GPU and a first operation on it succeeds.

    It does not where this torch has no kernels for it, as for a GTX 1080 or a P100.
    """
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        (torch.ones(2, device="cuda") + 1).sum().item()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        print(f"the GPU cannot be used ({reason}); the CPU is taken instead", file=sys.stderr)
        return False
    return True


def configure_seed(seed: int) -> None:
    """Seed Python, NumPy and torch (every device), and make cuDNN deterministic."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries still draw from it)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def random_state() -> dict[str, Any]:
    """The state of torch's generators, the only ones that training draws from."""
    import torch

    state = {"cpu": torch.get_rng_state(), "cuda": []}
    if torch.cuda.is_initialized():  # asking would initialise every GPU
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what `random_state` returned."""
    import torch

    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


# ----------------------------------------------------------------------------------- results files
@contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it gets its name only when the block succeeds.

    So a file is whole or not there. UserError where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def check_writable(folder: str | Path) -> None:
    """UserError now, not after an hour of training, if results cannot be written to `folder`."""
    trial = Path(folder) / "results" / "write-test"
    with write_atomically(trial) as temporary:
        temporary.touch()
    with file_errors(trial):
        trial.unlink(missing_ok=True)


def default_out(data: str | Path) -> str:
    """Where results on the data in this folder go unless something else is said."""
    return f"build/{Path(data).resolve().name}"


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark; UserError for another one."""
    try:
        with file_errors(path):
            return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it in the encoding UTF-8.") from error


def usable_cpus() -> int:
    """How many processors this process may use: fewer than the machine has, under a limit."""
    import joblib

    return joblib.cpu_count()


def processor_name() -> str:
    """The processor's name as the system has it, and how many of its cores may be used."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    return f"{name}, {usable_cpus()} cores"


def git_commit() -> str | None:
    """The commit of this checkout; None without git.

    "-dirty" stands behind it where files were edited, other than the committed results and models.
    """
    name = ["git", "describe", "--always", "--exclude=*", "--abbrev=40"]
    edits = ["git", "status", "--porcelain", "--untracked-files=no", "."]
    edits += [":!report/results", ":!report/models/q3-*.pt"]
    with suppress(OSError):
        commit, edited = (
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
            for command in (name, edits)
        )
        return commit.strip() + "-dirty" * bool(edited.strip()) or None
    return None


def environment(device: "str | torch.device" = "cpu") -> dict[str, Any]:
    """What numbers were made with: versions, device, threads, processor, commit."""
    import torch

    is_cuda = torch.device(device).type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if is_cuda else str(device),
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "commit": git_commit(),
    }


def new_result(
    question: str, run: str, command: str, config: dict, data: dict, device: "str | torch.device"
) -> dict[str, Any]:
    """The start of a results file, which CONTRIBUTING.md describes: nothing has finished yet."""
    return {
        "question": question,
        "run": run,
        "command": command,
        "config": config,
        "seed": config["seed"],
        "status": "interrupted",
        "data": data,
        "environment": environment(device),
        "seconds": 0.0,
        "epochs": [],
        "test": {},
    }


def plain_values(value: Any) -> Any:
    """`value` as JSON and checkpoints hold it, at any depth.

    Numbers of NumPy and torch become Python's own; NaN and infinity, which JSON lacks, None.
    """
    if hasattr(value, "tolist"):  # NumPy's and torch's
        value = value.tolist()
    if isinstance(value, dict):
        return {plain_values(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def save_result(out: str | Path, result: dict) -> None:
    """Write `result`, a dict that starts as `new_result`, to `out`/results/<run>.json."""
    text = json.dumps(plain_values(result), indent=1, allow_nan=False) + "\n"
    with write_atomically(Path(out) / "results" / f"{result['run']}.json") as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_result(out: str | Path, run: str, command: str = "the command that makes it") -> dict:
    """Read `out`/results/`run`.json; UserError, naming `command`, if it is missing or damaged."""
    path = Path(out) / "results" / f"{run}.json"
    if not path.exists():
        raise UserError(f"{path} does not exist; run {command} first.")
    try:
        with file_errors(path):
            result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged; delete it, then run {command}.") from error
    if not isinstance(result, dict) or "question" not in result:
        raise UserError(f"{path} is no results file; delete it, then run {command}.")
    return result


# ------------------------------------------------------------------------------------- checkpoints
def is_whole_zip(path: str | Path) -> bool:
    """Whether a zip file, as npz files and torch's checkpoints are, is undamaged: its checksums."""
    try:
        with file_errors(path), zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError):
        return False


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Save `state`, a dict of tensors and plain values, whole or not at all.

    Its entry "result", if it has one, may hold numbers of NumPy and torch.
    """
    import torch

    if "result" in state:  # loading takes tensors and Python's own types only
        state = {**state, "result": plain_values(state["result"])}
    buffer = io.BytesIO()  # a full disk then fails in one place, as an OSError
    torch.save(state, buffer)
    with write_atomically(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path: str | Path) -> dict:
    """The state saved at `path`, on the CPU; UserError where there is none, or it is damaged."""
    import torch

    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no checkpoint {path}; train it first, or name another.")
    if not is_whole_zip(path):
        raise UserError(f"{path} is damaged or no checkpoint; delete it, or name another.")
    try:
        with file_errors(path):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:  # a zip of something else
        raise UserError(f"{path} is no checkpoint; name another.") from error


def load_weights(
    model: "torch.nn.Module", weights: "dict[str, torch.Tensor]", path: str | Path
) -> None:
    """Put all `weights` of the checkpoint `path` into `model`; UserError unless all of them fit."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    differing = sorted(n for n in {*wanted, *found} if wanted.get(n) != found.get(n))
    if differing:
        layers = ", ".join(differing[:3]) + (", ..." if len(differing) > 3 else "")
        raise UserError(f"the checkpoint {path} is of another model: it differs in {layers}.")
    model.load_state_dict(weights)


def set_aside(path: str | Path) -> Path:
    """Rename a file that would be overwritten, say so in a line, and return its new path."""
    path = Path(path)
    for n in range(1, 10_000):
        kept = path.with_name(f"{path.stem}-old{n}{path.suffix}")
        if not kept.exists():
            break
    with file_errors(path):
        path.replace(kept)
    print(f"{path.name} is written anew; the one of before is kept as {kept.name}", flush=True)
    return kept


# ----------------------------------------------------- a model that belongs to the code at hand
# A checkpoint holds a *probe*: some input, and what the model answered to it when it was saved.
# Whoever loads the model asks again. `answer(model, **question)` returns a tensor on the CPU.


def make_probe(model: "torch.nn.Module", answer: "Answer", question: dict) -> dict:
    """The question and the model's answer, to be saved with the model."""
    return {**question, "answer": answer(model, **question)}


def check_probe(model: "torch.nn.Module", answer: "Answer", probe: dict, path: str | Path) -> None:
    """UserError if the code of today answers otherwise than the code that trained this model."""
    question = {name: value for name, value in probe.items() if name != "answer"}
    expected, today = probe["answer"], answer(model, **question)
    tolerance = 1e-3 * expected.abs().max().item()  # rounding, which differs between machines
    is_same = today.shape == expected.shape and (today - expected).abs().max() <= tolerance
    if not is_same:
        problem = "features, vocabulary or model are not those that it was trained with"
        raise UserError(f"the checkpoint {path} is of other code: {problem}; train it anew.")


def load_model(
    path: str | Path, build: "Callable[[dict], torch.nn.Module]", answer: "Answer"
) -> "torch.nn.Module":
    """The model of a checkpoint, on the CPU; UserError where it is not of the code of today.

    build: a function of the sizes that were saved, which returns a new model. Its attribute
    `search` holds what was chosen for its beam search, if anything was.
    """
    saved = load_checkpoint(path)
    if not {"sizes", "model", "probe"} <= saved.keys():
        raise UserError(f"{path} is no checkpoint of this notebook; name another.")
    model = build(saved["sizes"])
    weights = {name: tensor.float() for name, tensor in saved["model"].items()}
    load_weights(model, weights, path)
    check_probe(model, answer, saved["probe"], path)
    model.search = saved.get("search", {})
    return model


# ------------------------------------------------------------- a training run, saved epoch by epoch
class Run:
    """A training run that can be interrupted, and gone on with.

    model, optimizer and schedule are torch's. sizes: what `build` of `load_model` needs. result:
    the results file, as `new_result` begins it. answer and question: those of the probe.
    """

    def __init__(
        self,
        model: "torch.nn.Module",
        sizes: dict,
        optimizer: "torch.optim.Optimizer",
        schedule: "torch.optim.lr_scheduler.LRScheduler",
        result: dict,
        out: str | Path,
        answer: "Answer",
        question: dict,
    ):
        self.model, self.sizes = model, sizes
        self.optimizer, self.schedule = optimizer, schedule
        self.result, self.out = result, out
        self.answer, self.question = answer, question
        self.checkpoint = Path(out) / "checkpoints" / f"{result['run']}.pt"
        self.started = time.perf_counter()

    def start(self, resume: bool) -> range:
        """Start anew, an older checkpoint being kept; or, with `resume`, go on from it.

        Returns the numbers of the epochs that are left.
        """
        if self.checkpoint.exists() and resume:
            self._resume()
        elif self.checkpoint.exists():
            set_aside(self.checkpoint)
        self.started = time.perf_counter()
        return range(len(self.result["epochs"]) + 1, self.result["config"]["epochs"] + 1)

    def after_epoch(self, train_loss: float, metrics: dict[str, float], **entries) -> dict:
        """Record an epoch and save everything; returns its row of the results file.

        metrics: of validation, {name: value} with "loss". entries: more of the results file.
        UserError where the training loss is no longer a number.
        """
        if not math.isfinite(train_loss):
            save_result(self.out, {**self.result, "status": "diverged"})
            problem = f"the loss of {self.result['run']} became infinite or NaN"
            raise UserError(f"{problem}; try a smaller learning_rate.")
        row = {"epoch": len(self.result["epochs"]) + 1, "train_loss": train_loss}
        row |= {"val_loss" if name == "loss" else name: value for name, value in metrics.items()}
        now = time.perf_counter()
        row["seconds"] = now - self.started
        self.started = now
        self.result["epochs"].append(row)
        self.result["seconds"] += row["seconds"]
        self.result.update(entries)
        self.save()
        return row

    def finish(self, **entries) -> None:
        """Add these entries to the results file, which is finished then."""
        self.result.update(entries, status="finished")
        save_result(self.out, self.result)

    def save(self) -> None:
        """Save results file and checkpoint; of a complete run only what is needed to use it."""
        state = {
            "sizes": self.sizes,
            "model": self.model.state_dict(),
            "probe": make_probe(self.model, self.answer, self.question),
            "result": self.result,
        }
        if len(self.result["epochs"]) < self.result["config"]["epochs"]:
            state["optimizer"] = self.optimizer.state_dict()
            state["schedule"] = self.schedule.state_dict()
            state["random_state"] = random_state()
        save_checkpoint(self.checkpoint, state)
        save_result(self.out, self.result)

    def _resume(self):
        """Go on from the checkpoint; UserError where it is of other settings, data or code."""
        path = self.checkpoint
        saved = load_checkpoint(path)
        before, now = saved["result"], self.result
        was = {**before["config"], "data": before["data"], "layers": before["layers"]}
        wanted = {**now["config"], "data": now["data"], "layers": now["layers"]}
        differing = sorted(key for key in wanted if wanted[key] != was.get(key))
        if differing:
            advice = "go on with the same settings and code, or leave resume at 0 to start anew"
            raise UserError(f"{path} is of a run with other {', '.join(differing)}; {advice}.")
        load_weights(self.model, saved["model"], path)
        check_probe(self.model, self.answer, saved["probe"], path)
        n_done = len(before["epochs"])
        if "optimizer" in saved:
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            set_random_state(saved["random_state"])
            print(f"{before['run']}: goes on after epoch {n_done}", flush=True)
        else:
            print(f"{before['run']}: was trained before, all {n_done} epochs", flush=True)
        part = {"after_epoch": n_done, "environment": now["environment"]}
        self.result = {**before, "resumed": [*before.get("resumed", []), part]}


# ---------------------------------------------------------------------------------- many processes
def side_by_side(
    function: Callable, jobs: list[tuple], n_processes: int | None = None
) -> Iterator[Any]:
    """Yield `function(*job)` for every job, in order, computed on several processes.

    By default as many as processors may be used, and never more than there are jobs. UserError
    when a process was killed, as happens when memory runs out.
    """
    n_processes = max(1, min(n_processes or usable_cpus(), len(jobs)))
    # On Linux they are forked: they start at once, with all that is imported and loaded.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)  # they are for the parent
    pool = ProcessPoolExecutor(n_processes, context, signal.signal, ignore_interrupts)
    try:
        for result in [pool.submit(function, *job) for job in jobs]:
            yield result.result()
    except BaseException as error:
        for worker in multiprocessing.active_children():
            worker.terminate()  # nobody waits for its result any more
        if isinstance(error, BrokenProcessPool):
            reason = "a worker process was killed, mostly for want of memory"
            raise UserError(f"{reason}; close other programs and run it again.") from error
        raise
    finally:
        pool.shutdown()
