"""Shared by every question: command lines, seeds, results, plots, and the two datasets (OCTMNIST and LJ Speech).

Imports nothing of the project. Every failure that a person can put right is a `UserError`, whose text is one sentence
that says what to do next; `run_script` turns it into that sentence on stderr and exit status 2.
"""

import argparse
import functools
import hashlib
import io
import json
import math
import os
import platform
import random
import shlex
import shutil
import sys
import tarfile
import timeit
from contextlib import contextmanager, suppress
from pathlib import Path

import joblib
import matplotlib
import numpy as np
import torch
import torchaudio
from tqdm import tqdm

os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # joblib's helper process would warn after Ctrl-C
if "ipykernel" not in sys.modules:
    matplotlib.use("Agg")  # scripts only save their plots: no window system is needed
import matplotlib.pyplot as plt

QUIET = "QUIET" in os.environ or (None if "ipykernel" not in sys.modules else False)  # bars in Jupyter, on terminals


# ---------------------------------------------------------------------------------------------------- command lines
class UserError(Exception):
    """Something the person at the keyboard can put right; the message is one sentence that says how."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with the course's single-dash flags (`-epochs`, also as `--epochs`) and its errors in one line."""

    def __init__(self, description):
        formatter = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter)

    def flag(self, name, **options):
        """Add the flag `-name`, with `--name` as an alias; the options are those of `add_argument`."""
        self.add_argument(f"-{name}", f"--{name}", **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; `python {self.prog} -h` explains every flag.\n")


def number(kind, low=-math.inf, high=math.inf, above=-math.inf, below=math.inf, or_word=None):
    """An argparse type: a finite `int` or `float` in [low, high], strictly `above` and `below`; or the given word."""
    limits = {"at least": low, "above": above, "at most": high, "below": below}
    allowed = " and ".join(f"{word} {limit:.15g}" for word, limit in limits.items() if math.isfinite(limit))

    def parse(text):
        value = text if text == or_word else kind(text)
        if value != or_word and not (math.isfinite(value) and low <= value <= high and above < value < below):
            raise argparse.ArgumentTypeError(f"{text} is not {allowed}")
        return value

    parse.__name__ = {int: "whole number", float: "number"}[kind]  # argparse names it: «invalid number value: 'ten'»
    return parse


def run_script(main, parser, after_interrupt="give the command again"):
    """Call `main(args)`; end a `UserError` or Ctrl-C as one sentence on stderr and exit status 2, no traceback."""
    try:
        main(parser.parse_args())
    except UserError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(2, f"{parser.prog}: interrupted; {after_interrupt}.\n")


def pick_device(name):
    """`auto`, `cpu`, `cuda` or `mps` -> torch.device; UserError where this machine has no such device."""
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if have["cuda"] else "cpu"  # mps only when asked for: it was never tried
    if not have.get(name):
        raise UserError(f"this machine has no usable device '{name}'; choose auto or cpu.")
    return torch.device(name)


def configure_seed(seed):
    """Seed Python, NumPy and torch (every device), and make cuDNN deterministic."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (libraries still draw from it)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True


# --------------------------------------------------------------------------------------------------------- results
@contextmanager
def write_atomically(path):
    """Yield a temporary path beside `path`, renamed to it only when the block succeeds: never a half-written file."""
    temporary = (path := Path(path)).with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {path} ({reason}); free some space or name another folder.") from error
    finally:
        with suppress(OSError):  # renamed already, or never written
            temporary.unlink()


def check_writable(folder):
    """Raise UserError now, not after an hour of training, if results cannot be written to `folder`."""
    with write_atomically(Path(folder) / "results" / "write-test") as temporary:
        temporary.touch()
    (Path(folder) / "results" / "write-test").unlink(missing_ok=True)


def environment(device="cpu"):
    """What the numbers were made with: versions, device, threads and processor."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else str(device)
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "device": name}
    return versions | {"threads": torch.get_num_threads(), "processor": f"{processor}, {os.cpu_count()} cores"}


def command_line():
    """The command that is running, as one would type it."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def new_result(question, run, command, config, data, device):
    """The start of a results file, which README.md describes: nothing has finished yet."""
    result = {"question": question, "run": run, "command": command, "config": config, "seed": config["seed"]}
    result |= {"status": "interrupted", "data": data, "environment": environment(device)}
    return result | {"seconds": 0.0, "epochs": [], "test": {}}


def save_result(out, result):
    """Write `result` (a dict that starts as `new_result`) to `out`/results/<run>.json; NaN becomes null."""

    def clean(value):
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with write_atomically(Path(out) / "results" / f"{result['run']}.json") as temporary:
        temporary.write_text(json.dumps(clean(result), indent=1, allow_nan=False) + "\n")


def load_result(out, run):
    """Read `out`/results/`run`.json; UserError when it is missing or damaged."""
    path = Path(out) / "results" / f"{run}.json"
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged; run the command that makes it again.") from error


def measure(function, *inputs):
    """(seconds, bytes): the best of three calls, and the peak of torch's allocator beyond the inputs and the output."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would report every machine without a GPU as an error
    with torch.profiler.profile(profile_memory=True, acc_events=True) as trace:
        output = function(*inputs)
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    on_device = [event for event in events if event.device_type().name.lower() == output.device.type]
    changes = [0] + [event.nbytes() for event in sorted(on_device, key=lambda event: event.start_ns())]
    seconds = timeit.repeat(lambda: function(*inputs).flatten()[0].item(), number=1, repeat=3)  # item() waits for a GPU
    return min(seconds), max(0, int(np.cumsum(changes).max()) - output.nbytes)


# ----------------------------------------------------------------------------------------------------- checkpoints
def random_state():
    """The state of torch's generators (the only ones that training draws from)."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}


def set_random_state(state):
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def save_checkpoint(path, identity, state):
    """Save `state` (tensors and plain values) atomically, with the `identity` (config and data) that it belongs to."""
    buffer = io.BytesIO()  # a full disk then fails in one place, as an OSError
    torch.save({"identity": identity, "state": state}, buffer)
    with write_atomically(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def load_checkpoint(path, identity=None):
    """The state saved at `path` (on the CPU), or None where there is no file.

    UserError if the file is damaged, or belongs to another identity than the one given.
    """
    if not Path(path).exists():
        return None
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found, state = saved["identity"], saved["state"]
    except Exception as error:  # a damaged file raises a dozen types; nothing else happens in this block
        raise UserError(f"the checkpoint {path} is damaged; delete it to start this run again.") from error
    if identity is not None and found != identity:
        changed = " and ".join(sorted(key for key in identity if identity[key] != found.get(key)))
        raise UserError(f"the checkpoint {path} is of a run with other {changed}; delete it to start again.")
    return state


# ----------------------------------------------------------------------------------------------------------- plots
def save_figure(figure, out, name, source):
    """Save a figure, with its data source, as `out`/figures/`name`.pdf (for the report) and .png; return it."""
    figure.suptitle(f"data: {source}", fontsize=7, color="dimgray")
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", None)):  # no date: same result, same file
        with write_atomically(Path(out) / "figures" / f"{name}.{suffix}") as temporary:
            figure.savefig(temporary, metadata=metadata, dpi=150)
    plt.close(figure)
    return figure


def plot(curves, ylabel, name, out, source, title, xlabel="Epoch"):
    """Draw curves and save them; `curves`: (one value per epoch, options of matplotlib's plot) each.

    Against anything but epochs, give `xlabel`, and each curve's `x` among its options; both axes are then logarithmic.
    """
    figure, axes = plt.subplots(figsize=(4.6, 3.6) if xlabel == "Epoch" else (6.4, 4.6), layout="constrained")
    for values, options in curves:
        options = {"x": range(1, len(values) + 1), "marker": "o", "markersize": 3 * (len(values) <= 20)} | options
        axes.plot(options.pop("x"), values, **options)
    if xlabel == "Epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, ncols=3 if len(curves) % 3 == 0 else max(1, len(curves) // 2))
    return save_figure(figure, out, name, source)


# -------------------------------------------------------------------------------------------------------- OCTMNIST
OCT_CLASSES = ("CNV", "DME", "drusen", "normal")
OCTMNIST_MD5 = "c68d92d5b585d8d81f7112f81e2d0842"  # medmnist.INFO["octmnist"]["MD5"]


def load_oct_data(folder):
    """Load `folder`/octmnist.npz (MedMNIST's format), checking everything that can be wrong with it.

    Returns (splits, info): splits maps "train", "val" and "test" to (images, labels): uint8 (N, 1, 28, 28), which the
    network scales, and int64 (N,), 0..3 as in `OCT_CLASSES`; info is the `data` entry of a results file.
    Raises UserError for a missing, damaged or wrong file.
    """
    path = Path(folder) / "octmnist.npz"
    if not path.is_file():
        raise UserError(f"{path} does not exist; `make data` fetches it, `make sample` writes a stand-in.")
    try:
        content = path.read_bytes()
        sha256, is_official = hashlib.sha256(content).hexdigest(), hashlib.md5(content).hexdigest() == OCTMNIST_MD5
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        del content
    except Exception as error:  # a damaged zip raises half a dozen types; nothing else happens in this block
        raise UserError(f"{path} is damaged or not an npz file; delete it and fetch it again.") from error
    splits = {}
    for split in ("train", "val", "test"):
        if problem := _problem_of_split(arrays, f"{split}_images", f"{split}_labels"):
            raise UserError(f"{path} is not in MedMNIST's format: {problem}; fetch it again.")
        x = torch.from_numpy(arrays.pop(f"{split}_images")).unsqueeze(1)  # (N, 1, 28, 28)
        splits[split] = (x, torch.from_numpy(arrays[f"{split}_labels"]).flatten().long())  # (N,)
    source = "OCTMNIST" if is_official else str(arrays.get("source", "octmnist.npz of unknown origin"))
    info = {"source": source, "sha256": sha256, "classes": list(OCT_CLASSES)}
    info["counts"] = {split: len(labels) for split, (_, labels) in splits.items()}
    info["class_counts"] = {split: labels.bincount(minlength=4).tolist() for split, (_, labels) in splits.items()}
    return splits, info


def _problem_of_split(arrays, images, labels):
    """What is wrong with the entries of these two names, in a few words, or None."""
    for key, shape in ((images, (28, 28)), (labels, (1,))):
        if key not in arrays:
            return f"it has no entry '{key}'"
        array = arrays[key]
        if array.dtype.kind == "f" and np.isnan(array).any():
            return f"{key} holds NaN"
        if array.dtype != np.uint8 or array.shape[1:] != shape or array.ndim == 0:
            return f"{key} is {array.dtype} {array.shape}, not uint8 {('N', *shape)}"
        if len(array) == 0 or len(array) != len(arrays[images]):
            return f"{key} has {len(array)} entries for {len(arrays[images])} images"
    largest = arrays[labels].max()
    return f"{labels} has a label {largest}, not 0 to 3" if largest >= len(OCT_CLASSES) else None


# ------------------------------------------------------------------------------------------------------- LJ Speech
SAMPLE_RATE = 22_050  # Hz, of LJ Speech
N_FFT, HOP, N_MELS = 1024, 256, 80  # samples, samples (11.6 ms), mel bands
VOCABULARY = "<>@# ,.?-abcdefghijklmnopqrstuvwxyz"  # |V| = 35
START, STOP, PAD, UNKNOWN = range(4)


def encode(text, max_len=None):
    """Text -> token numbers: lower-cased, between START and STOP; `max_len` cuts to that many, these included."""
    tokens = [max(VOCABULARY.find(letter, UNKNOWN + 1), UNKNOWN) for letter in text.lower()]
    return [START, *tokens[: max_len - 2 if max_len else None], STOP]


def decode(tokens):
    """Token numbers -> text, from behind START to before the first STOP (or PAD, or the end)."""
    text = "".join(VOCABULARY[token] for token in tokens)
    return text.removeprefix("<").split(">")[0].split("@")[0]


def load_ljspeech(folder):
    """Read `folder`/LJSpeech-1.1: metadata.csv (id|transcript|normalised, no header) and wavs/<id>.wav or .flac.

    Returns (splits, info): splits maps "train", "val" and "test" to lists of (id, normalised transcript, path), the
    first 75 %, the next 5 % and the last 20 % in order (for all 13,100 clips the official split: 9,825, 655 and 2,620);
    info is the `data` entry of a results file. Raises UserError for anything missing or malformed.
    """
    root = Path(folder) / "LJSpeech-1.1"
    if not root.is_dir():
        raise UserError(f"{root} does not exist; set DOWNLOAD=1 to fetch it (2.6 GB), or `make sample` for a stand-in.")
    try:
        text = (root / "metadata.csv").read_bytes().decode("utf-8-sig")
        files = {path.stem: path for path in sorted((root / "wavs").iterdir()) if path.suffix in (".wav", ".flac")}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{root} has no readable metadata.csv (UTF-8) and wavs/ folder; fetch it again.") from error
    clips = {}
    for number_of_row, row in enumerate(text.removesuffix("\n").split("\n"), start=1):
        where, columns = f"row {number_of_row} of {root / 'metadata.csv'}", row.split("|")
        if len(columns) != 3:
            raise UserError(f"{where} has {len(columns)} columns, not id|transcript|normalised; correct or remove it.")
        name, _, transcript = (column.strip() for column in columns)
        if not transcript or name in clips or name not in files:
            problem = "no text" if not transcript else "an id seen before" if name in clips else "no clip in wavs/"
            raise UserError(f"{where} ('{name}') has {problem}; correct or remove it.")
        clips[name] = (name, transcript, files[name])
    if len(clips) < 4:
        raise UserError(f"{root} has {len(clips)} clips; training, validation and test need at least 4.")
    clips, n_val = list(clips.values()), max(1, round(0.05 * len(clips)))
    n_train = min(round(0.75 * len(clips)), len(clips) - n_val - 1)
    splits = {"train": clips[:n_train], "val": clips[n_train : n_train + n_val], "test": clips[n_train + n_val :]}
    readme = (root / "README").read_text(errors="replace") if (root / "README").is_file() else ""
    is_lj = all(name.startswith("LJ0") for name, _, _ in clips)
    label = f"LJ Speech 1.1, {len(clips):,} of 13,100 clips" if is_lj else f"a corpus of {len(clips):,} clips"
    label = readme.split("\n")[0] if readme.startswith("synthetic") else label
    sizes = "".join(f"{path.name} {path.stat().st_size} " for _, _, path in clips)
    sha256 = hashlib.sha256((text + sizes).encode()).hexdigest()
    counts = {split: len(rows) for split, rows in splits.items()}
    order = "official" if len(clips) == 13_100 else "first 75 %, next 5 %, last 20 % of the clips, in order"
    return splits, {"source": label, "sha256": sha256, "counts": counts, "split": order}


def download_ljspeech(folder):
    """Fetch LJ Speech 1.1 (2.6 GB) into `folder` through torchaudio, which verifies its checksum before unpacking it.

    LJSpeech-1.1 appears in `folder` once it is whole; an archive that was fetched before a failure is used again.
    """
    unfinished = Path(folder) / "LJSpeech-download"
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # nothing is written outside the folder
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished / "LJSpeech-1.1", ignore_errors=True)  # unpacked in part
        torchaudio.datasets.LJSPEECH(unfinished, download=True)
        (unfinished / "LJSpeech-1.1").replace(Path(folder) / "LJSpeech-1.1")
        shutil.rmtree(unfinished)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        reason = f"cannot fetch LJ Speech ({' '.join(str(error).split())})"
        raise UserError(f"{reason}; delete {unfinished}, or place LJSpeech-1.1/ in {folder} by hand.") from error


def read_audio(path):
    """Read a sound file as mono float32 (n_samples,) in [-1, 1] at SAMPLE_RATE, resampled and mixed down if need be."""
    import soundfile

    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (n_samples, n_channels)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} is no readable sound file; fetch it again or remove it from metadata.csv.") from error
    if len(samples) * SAMPLE_RATE < N_FFT * rate or not np.isfinite(samples).all():
        raise UserError(f"{path} is empty or damaged; fetch it again or remove its row in metadata.csv.")
    return torchaudio.functional.resample(torch.from_numpy(samples.mean(axis=1)), rate, SAMPLE_RATE)


@functools.cache
def _mel_spectrogram():
    """The transform (Slaney's mel scale and norm), built once per process."""
    sizes = {"sample_rate": SAMPLE_RATE, "n_fft": N_FFT, "hop_length": HOP, "n_mels": N_MELS}
    return torchaudio.transforms.MelSpectrogram(**sizes, norm="slaney", mel_scale="slaney")


def log_mel(samples):
    """(n_samples,) float32 -> (T, N_MELS) float32: log10 mel power, at most 8 decades below its peak, (x + 4) / 4."""
    decades = _mel_spectrogram()(samples).clamp(min=1e-10).log10().T  # (T, N_MELS), T = 1 + n_samples // HOP
    return (decades.maximum(decades.max() - 8) + 4) / 4


def _clip_features(path):
    torch.set_num_threads(1)
    return log_mel(read_audio(path)).half().numpy()


def load_features(splits, out):
    """Log-mel features of every clip, computed once: {split: [(T, N_MELS) float16 tensor per clip]}.

    Kept in `out`/features/<key>.npz, the key being a hash of the settings and of every file's name, size and time.
    """
    paths = [path for rows in splits.values() for _, _, path in rows]
    key = hashlib.sha256(repr((SAMPLE_RATE, N_FFT, HOP, N_MELS, "slaney")).encode())
    for path in paths:
        key.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns} ".encode())
    cache = Path(out) / "features" / f"{key.hexdigest()[:16]}.npz"
    try:
        with np.load(cache, allow_pickle=False) as file:
            frames, lengths = torch.from_numpy(file["frames"]), file["lengths"].tolist()
    except Exception:  # no cache yet, or a damaged one: compute it again
        parallel = joblib.Parallel(n_jobs=os.cpu_count(), return_as="generator", batch_size=16)
        clips = parallel(joblib.delayed(_clip_features)(path) for path in paths)
        clips = list(tqdm(clips, "features", len(paths), disable=QUIET))
        lengths, frames = [len(clip) for clip in clips], torch.from_numpy(np.concatenate(clips))
        with write_atomically(cache) as temporary, open(temporary, "wb") as file:
            np.savez(file, frames=frames.numpy(), lengths=np.array(lengths))
    features = iter(frames.split(lengths))
    return {split: [next(features) for _ in rows] for split, rows in splits.items()}


def batches_by_length(lengths, batch_size, shuffle=True):
    """Index batches (n,) of clips of similar length; `shuffle`: lengths jittered by 5 %, batches in random order."""
    lengths = torch.as_tensor(lengths, dtype=torch.float32)
    batches = (lengths * (1 + 0.05 * torch.rand(len(lengths)) * shuffle)).argsort().split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches))] if shuffle else list(batches)


def pad(sequences, value):
    """A list of (L_i, ...) tensors -> ((B, max L, ...) padded with `value`, lengths (B,) int64)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value), lengths
