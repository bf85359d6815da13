"""How every script here is started, recorded and resumed: command lines, errors in one sentence,
seeds and devices, results files, checkpoints, and work spread over processes.

The ground floor: it imports nothing of the project and knows nothing of images, speech or
questions. Import it first: it prepares the process for what is imported after it.

A failure that a person can put right is a `UserError`. Its text is one sentence that says what to
do next; `run_script` prints it on stderr and ends with exit status 2, without a traceback.
"""

import argparse
import atexit
import codecs
import dataclasses
import dis
import getpass
import hashlib
import inspect
import io
import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

IN_NOTEBOOK = "ipykernel" in sys.modules

QUIET = None  # what tqdm's `disable` wants: None draws bars on terminals only
if IN_NOTEBOOK:
    QUIET = False
if os.environ.get("QUIET", "0") != "0":
    QUIET = True


# --------------------------------------------------------------------- before anything is imported
PLAIN = {"±": "+-", "…": "...", "–": "-", "—": "-", "“": '"', "”": '"', "×": "x"}


def _plain_text(error):
    """What to write instead of letters that a terminal cannot show (a handler for `codecs`)."""
    letters = error.object[error.start : error.end]
    return "".join(PLAIN.get(letter, "?") for letter in letters), error.end


class PatientStream:
    """A stream that may break: its reader goes away (`| head`), its terminal is closed, its disk is
    full. What is written after that is dropped, and the program goes on.
    """

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def _unless_broken(self, action, *arguments):
        try:
            return action(*arguments)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # also for what Python flushes at its end
            return None

    def write(self, text):
        return self._unless_broken(self._stream.write, text)

    def writelines(self, lines):
        return self._unless_broken(self._stream.writelines, lines)

    def flush(self):
        return self._unless_broken(self._stream.flush)


def _open_nowhere(number):
    """A stream that drops what is written, under this number, also for processes started here."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)
    os.set_inheritable(number, True)
    return open(number, "w", encoding="utf-8", closefd=False)


def _end_at_once(number_of_signal, frame):
    """What Ctrl-C does during the imports, where an exception could end anywhere."""
    name = Path(sys.argv[0]).name
    print(f"{name}: interrupted; give the command again.", file=sys.stderr, flush=True)
    os._exit(2)


def _end_without_a_folder():
    """End in a sentence where the current folder has been deleted: torch's libraries do not."""
    try:
        os.getcwd()
    except OSError:
        name = Path(sys.argv[0]).name
        print(f"{name}: the current folder is gone; change to another one.", file=sys.stderr)
        sys.exit(2)


def program_name():
    """What is running: the name of a script, or `-m tools.<name>`."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec and sys.argv[0] == main.__file__:
        return f"-m {spec.name}"
    return Path(sys.argv[0]).name


SCRIPTS = ("q1_linear_attention.py", "hw2-q2.py", "download_octmnist.py", "transcribe.py")


def _is_ours():
    """Whether a script or tool of this repository runs: no test runner, worker or other program."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:
        return False
    file, here = Path(file).resolve(), Path(__file__).resolve().parent
    return file.parent == here / "tools" or (file.parent == here and file.name in SCRIPTS)


def _use_temporary_home():
    """Where the home folder cannot be written: caches go to a folder that goes when we end."""
    with suppress(RuntimeError, OSError):  # no home at all, no folder, or not ours
        with tempfile.TemporaryFile(dir=Path.home()):
            return
    if "MPLCONFIGDIR" in os.environ:  # a worker takes its parent's
        return
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["MPLCONFIGDIR"] = folder
    os.environ.setdefault("IPYTHONDIR", folder)
    os.environ.setdefault("HOME", folder)  # else medmnist makes a folder named "~" where we are


def _on_interrupt(handler):
    """Call `handler` on Ctrl-C, a stop button and a closed terminal, unless they are ignored.

    `nohup` and shells ignore some of them for what runs in the background.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number_of_signal = getattr(signal, name, None)  # Windows has no SIGHUP
        if number_of_signal and signal.getsignal(number_of_signal) is not signal.SIG_IGN:
            signal.signal(number_of_signal, handler)


def prepare_process():
    """Make the surroundings harmless: nameless users, old terminals, readers that go away."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # joblib's, after Ctrl-C
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what a Mac's GPU lacks: on the CPU
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # an account without an entry, as in a container
        os.environ["USER"] = "nobody"  # torch asks for a name
    _use_temporary_home()
    warnings.filterwarnings("ignore", "Failed to setup default root")  # medmnist's, without a home
    warnings.filterwarnings("ignore", ".*joblib will operate in serial mode")  # no /dev/shm
    if IN_NOTEBOOK:
        return
    codecs.register_error("plain_text", _plain_text)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell: 2>&-
            setattr(sys, name, _open_nowhere(number))
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain_text")
            setattr(sys, name, PatientStream(stream))
    if _is_ours():
        _on_interrupt(_end_at_once)
        _end_without_a_folder()


prepare_process()

import torch  # noqa: E402  (it needs the name of the user)


# ----------------------------------------------------------------------------------- command lines
class UserError(Exception):
    """Something the person at the keyboard can put right; the message says how, in a sentence."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the course's single-dash flags (`-epochs`, also `--epochs`).

    doc: the docstring of the script, whose first line describes it; `python -OO` leaves none.
    """

    def __init__(self, doc):
        super().__init__(
            description=(doc or "").partition("\n")[0],
            allow_abbrev=False,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )

    def flag(self, name, **options):
        """Add the flag `-name`, alias `--name`; the options are those of `add_argument`."""
        self.add_argument(f"-{name}", f"--{name}", **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; `python {program_name()} -h` explains all flags.\n")


def number(kind, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf, or_word=None):
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


def run_script(main, parser, after_interrupt="give the command again"):
    """Call `main(args)`; a `UserError` or Ctrl-C ends it in one sentence, exit status 2."""
    _on_interrupt(signal.default_int_handler)  # KeyboardInterrupt
    try:
        main(parser.parse_args())
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(2, f"{parser.prog}: interrupted; {after_interrupt}.\n")


def command_line(without=()):
    """The command that is running, as one would type it, `without` some of its words."""
    words = [word for word in sys.argv[1:] if word not in without]
    return f"python {program_name()} {shlex.join(words)}".strip()


# -------------------------------------------------------------------------- settings of a notebook
def read_settings(kind, **parsers):
    """An instance of the dataclass `kind`, its fields read from the environment where set there.

    The field `batch_size` is the variable BATCH_SIZE. `parsers` has a type as argparse takes it
    (text -> value, ValueError or ArgumentTypeError) for fields that need more than the type of
    their default. UserError for a value that does not fit.
    """
    values = {}
    for field in dataclasses.fields(kind):
        name = field.name.upper()
        if name not in os.environ:
            continue
        text = os.environ[name]
        parse = parsers.get(field.name, type(field.default))
        try:
            values[field.name] = parse(text)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{name}: {error}; correct it and run again.") from error
        except ValueError as error:
            example = f"must be like {field.default}, not '{text}'"
            raise UserError(f"{name} {example}; correct it and run again.") from error
    return kind(**values)


def words(*allowed):
    """A type for `read_settings`: one or several of the `allowed` words, with commas between."""

    def parse(text):
        chosen = tuple(text.split(","))
        for word in chosen:
            if word not in allowed:
                known = f"{', '.join(allowed)} or several of them with a comma between"
                raise argparse.ArgumentTypeError(f"there is no '{word}'; it takes {known}")
        return chosen

    return parse


def say_errors_in_one_sentence(name):
    """In a notebook: a `UserError` prints its sentence, after `name`, instead of a traceback."""

    def say(shell, kind, error, traceback, tb_offset=None):
        print(f"{name}: {error}", file=sys.stderr)

    from IPython import get_ipython

    get_ipython().set_custom_exc((UserError,), say)


# ------------------------------------------------------------------------------- devices and seeds
def pick_device(name):
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps` -> torch.device; UserError where there is none such.

    `auto` never means mps: nobody has tried it yet.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, index = name.partition(":")
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available()}
    is_named = index.isdecimal() if colon else True
    if kind not in counts or not is_named or int(index or 0) >= counts[kind]:
        raise UserError(f"this machine has no usable device '{name}'; choose auto or cpu.")
    return torch.device(name)


def device_name(text):
    """A type for argparse: the name of a device that this machine has."""
    try:
        pick_device(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error
    return text


def configure_seed(seed):
    """Seed Python, NumPy and torch (every device), and make cuDNN deterministic."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries still draw from it)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


def random_state():
    """The state of torch's generators, the only ones that training draws from."""
    state = {"cpu": torch.get_rng_state(), "cuda": []}
    if torch.cuda.is_initialized():  # asking would initialise every GPU
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state):
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


# ----------------------------------------------------------------------------------- results files
@contextmanager
def write_atomically(path):
    """Yield a temporary path beside `path`; it gets its name only when the block succeeds.

    So a file is whole or not there. UserError when it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "free some space or name another folder"
        raise UserError(f"cannot write {path} ({reason}); {advice}.") from error
    finally:
        with suppress(OSError):  # renamed already, or never written
            temporary.unlink()


def check_writable(folder):
    """UserError now, not after an hour of training, if results cannot be written to `folder`."""
    trial = Path(folder) / "results" / "write-test"
    with write_atomically(trial) as temporary:
        temporary.touch()
    trial.unlink(missing_ok=True)


def read_text(path, advice="correct it"):
    """The text of a file in UTF-8 or, where it says so itself, UTF-16; any kind of line end.

    UserError, which names the trouble and gives the advice, where it cannot be read.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot read {path} ({reason}); {advice}.") from error
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it in the encoding UTF-8.") from error
    if text.count("\0") > len(text) // 4:
        raise UserError(f"{path} looks like UTF-16; save it in the encoding UTF-8.")
    text = text.replace("\r\n", "\n")
    if "\n" not in text:
        text = text.replace("\r", "\n")  # line ends of the old Mac
    return text


def processor_name():
    """The processor's name as the system has it, and how many of its cores may be used."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    return f"{name}, {usable_cpus()} cores"


def environment(device="cpu"):
    """What numbers were made with: versions, device, threads and processor."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name(device) if is_cuda else str(device),
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
    }


def new_result(question, run, command, config, data, device):
    """The start of a results file, which README.md describes: nothing has finished yet."""
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


def resumed_result(result, n_epochs, device):
    """The result of an earlier, interrupted part, to go on with; a line says from where.

    `environment` stays that of the first part, `resumed` lists those of the later ones.
    """
    n_done = len(result["epochs"])
    if n_done >= n_epochs:
        print(f"{result['run']}: was trained before, all {n_done} epochs", flush=True)
        return result
    print(f"{result['run']}: goes on after epoch {n_done}", flush=True)
    part = {"after_epoch": n_done, "environment": environment(device)}
    return {**result, "resumed": [*result.get("resumed", []), part]}


def _finite(value):
    """`value` with null in place of NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def save_result(out, result):
    """Write `result`, a dict that starts as `new_result`, to `out`/results/<run>.json."""
    text = json.dumps(_finite(result), indent=1, allow_nan=False) + "\n"
    with write_atomically(Path(out) / "results" / f"{result['run']}.json") as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_result(out, run, command="the command that makes it"):
    """Read `out`/results/`run`.json; UserError, naming `command`, if it is missing or damaged."""
    path = Path(out) / "results" / f"{run}.json"
    if not path.exists():
        raise UserError(f"{path} does not exist; run {command} first.")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}).") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged; run {command} again.") from error
    if not isinstance(result, dict) or "question" not in result:
        raise UserError(f"{path} is no results file; run {command} again.")
    return result


# ------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(path, identity, state):
    """Save `state` (tensors and plain values), whole or not at all.

    `identity` says what the state belongs to: the config, the data, the hash of the code.
    """
    buffer = io.BytesIO()  # a full disk then fails in one place, as an OSError
    torch.save({"identity": identity, "state": state}, buffer)
    with write_atomically(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path, identity=None):
    """The state saved at `path`, on the CPU; None where there is none to go on from.

    `identity` None: whatever it belongs to. Where only the "code" of the identity differs, the
    definitions were edited: the file is kept under another name, one line says so, and the result
    is None. UserError for another config or other data, and for a file that is damaged or none of
    ours.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot read the checkpoint {path} ({reason}).") from error
    except Exception as error:  # a damaged file raises a dozen types
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            reason = "too little memory"
            raise UserError(f"cannot read the checkpoint {path} ({reason}).") from error
        advice = "delete it, or name another file"
        raise UserError(f"the checkpoint {path} is damaged or none; {advice}.") from error
    if not isinstance(saved, dict) or not {"identity", "state"} <= saved.keys():
        raise UserError(f"{path} is no checkpoint of this repository; name another file.")
    found, state = saved["identity"], saved["state"]
    if identity is None:
        return state
    changed = sorted(key for key in identity if identity[key] != found.get(key))
    if changed == ["code"]:
        kept = path.with_name(f"{path.stem}-code-{str(found.get('code'))[:8]}{path.suffix}")
        path.replace(kept)
        reason = "its code (or Python) has changed"
        print(f"{path.stem}: {reason}, so it starts anew (old checkpoint: {kept.name})", flush=True)
        return None
    if changed:
        other = " and ".join(changed)
        advice = "name another folder to keep it, or delete it to start again"
        raise UserError(f"the checkpoint {path} is of a run with other {other}; {advice}.")
    return state


# ------------------------------------------------------------------------ has the code been edited?
def code_hash(*definitions, without=()):
    """A hash of what these functions and classes do: 16 hexadecimal digits.

    Whatever else of the same module they name counts too, `without` excepted: functions, classes,
    and constants in capitals. Comments, docstrings and layout do not count. It hashes byte code
    rather than text, because the cell of a notebook may have been edited after it was run.
    """
    texts = [f"Python {sys.version_info.major}.{sys.version_info.minor}"]
    waiting = list(definitions)
    seen = list(without)
    while waiting:
        definition = waiting.pop(0)
        if any(definition is other for other in seen):
            continue
        seen.append(definition)
        if inspect.isclass(definition):
            texts.append(_constants_of_class(definition))
            waiting += _classes_and_factories_of_class(definition)
        for function in _functions_of(definition):
            texts.append(f"{function.__qualname__} {_defaults_of(function)}")
            texts.append(_text_of_code(function.__code__))
            for name in sorted(_names_in(function.__code__)):
                value = function.__globals__.get(name)
                if name.isupper() and _is_simple(value):
                    texts.append(f"{name} = {value!r}")
                elif getattr(value, "__module__", None) == function.__module__:
                    waiting.append(value)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _is_simple(value):
    """Whether the repr of a value says all of it, and the same in every process."""
    if isinstance(value, dict):
        return _is_simple([*value.keys(), *value.values()])
    if isinstance(value, (tuple, list)):
        return all(_is_simple(item) for item in value)
    return value is None or isinstance(value, (int, float, str))


def _defaults_of(function):
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items()]
    return [value for value in defaults if _is_simple(value)]


def _constants_of_class(definition):
    constants = {}
    for name, value in vars(definition).items():
        if _is_simple(value) and not name.startswith("__"):
            constants[name] = value
    return f"{definition.__name__} {[base.__name__ for base in definition.__bases__]} {constants}"


def _classes_and_factories_of_class(definition):
    """Its base classes of the same module and, of a dataclass, what makes its default values."""
    found = [base for base in definition.__bases__ if base.__module__ == definition.__module__]
    for field in getattr(definition, "__dataclass_fields__", {}).values():
        if field.default_factory is not dataclasses.MISSING:
            found.append(field.default_factory)
    return found


def _functions_of(definition):
    """The functions that a class or a (decorated) function consists of."""
    members = vars(definition).values() if inspect.isclass(definition) else [definition]
    functions = []
    for member in members:
        if isinstance(member, property):
            member = member.fget
        if isinstance(member, (classmethod, staticmethod)):
            member = member.__func__
        member = inspect.unwrap(member) if callable(member) else member
        if inspect.isfunction(member):
            functions.append(member)
    return functions


def _text_of_code(code):
    """The instructions and constants of a code object, those of inner functions included."""
    constants = list(code.co_consts)
    is_named = not code.co_name.startswith("<")  # no lambda, no comprehension
    if is_named and constants and isinstance(constants[0], str):
        del constants[0]  # the docstring
    texts = []
    for constant in constants:
        if inspect.iscode(constant):
            texts.append(_text_of_code(constant))
        elif isinstance(constant, frozenset):
            texts.append(str(sorted(map(repr, constant))))  # its own order varies
        else:
            texts.append(repr(constant))
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {texts}"


def _names_in(code):
    """The global names that a code object and its inner functions use."""
    instructions = dis.get_instructions(code)
    names = {step.argval for step in instructions if step.opname == "LOAD_GLOBAL"}
    for constant in code.co_consts:
        if inspect.iscode(constant):
            names |= _names_in(constant)
    return names


# ---------------------------------------------------------------------------------- many processes
def usable_cpus():
    """How many processors this process may use: fewer than the machine has, under a limit."""
    import joblib

    return joblib.cpu_count()


def _begin_worker(parent):
    """Start a worker process: Ctrl-C is for its parent alone, and it ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        import psutil

        # on Windows the number of the parent never changes, elsewhere its entry may outlive it
        while os.getppid() == parent and psutil.pid_exists(parent):
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start_quiet_tracker():
    """Start joblib's helper process so that a closed terminal does not make it print traces."""
    if not hasattr(signal, "SIGHUP") or threading.current_thread() is not threading.main_thread():
        return
    from joblib.externals.loky.backend import resource_tracker

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the new process inherits
    resource_tracker.ensure_running()
    signal.signal(signal.SIGHUP, before)


def side_by_side(function, jobs, n_processes=None, after_a_kill="close other programs"):
    """Yield `function(*job)` for every job, in order, computed on several processes.

    By default as many as processors may be used, and never more than there are jobs. UserError
    when a process was killed, as happens when memory runs out; `after_a_kill` says what helps.
    """
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    _start_quiet_tracker()
    n_processes = max(1, min(n_processes or usable_cpus(), len(jobs)))
    start = {"initializer": _begin_worker, "initargs": (os.getpid(),)} if n_processes > 1 else {}
    parallel = joblib.Parallel(n_processes, return_as="generator", **start)
    try:
        yield from parallel(joblib.delayed(function)(*job) for job in jobs)
    except TerminatedWorkerError as error:
        cause = "a worker process was killed, mostly for want of memory"
        raise UserError(f"{cause}; {after_a_kill}.") from error
