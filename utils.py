"""The data of both datasets, and plots.

OCTMNIST: one file, checked and turned into tensors. LJ Speech: clips and transcripts, tokens,
log-mel features, batches. Flags, errors and results files are in runs.py.
"""

import functools
import hashlib
import io
import math
import os
import shutil
import tarfile
import textwrap
from pathlib import Path
from zipfile import BadZipFile

import runs
from runs import UserError

import numpy as np
import torch
from tqdm import tqdm

if not runs.IN_NOTEBOOK:
    os.environ["MPLBACKEND"] = "Agg"  # scripts only save their plots: no window system is needed
import matplotlib.pyplot as plt

plt.rcParams["text.usetex"] = False  # whatever a matplotlibrc says: the labels are no LaTeX
plt.rcParams.update({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 8, "figure.dpi": 120})

HALF_PAGE = (3.4, 2.6)  # inches; the report shows figures as large as they are drawn


# ------------------------------------------------------------------------------------------- plots
def save_figure(figure, out, name, source):
    """Save `figure`, labelled with its data's source, as `out`/figures/`name`.pdf and .png.

    Returns the figure. The same figure gives the same bytes: no date is written.
    """
    letters_in_a_line = int(17 * figure.get_figwidth())
    label = textwrap.fill(f"data: {source}", letters_in_a_line, break_on_hyphens=False)
    figure.suptitle(label, fontsize=8, color="dimgray", parse_math=False)
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", None)):
        path = Path(out) / "figures" / f"{name}.{suffix}"
        with runs.write_atomically(path) as temporary:
            figure.savefig(temporary, metadata=metadata, dpi=150)
    plt.close(figure)
    return figure


def _legend_below(figure):
    """A legend under the axes, in two columns."""
    close = {"handlelength": 2.4, "handletextpad": 0.5, "columnspacing": 1}
    figure.legend(loc="outside lower center", ncols=2, frameon=False, **close)


def plot(curves, ylabel, name, out, source, title):
    """Draw curves against the epoch and save them; returns the figure.

    curves: a list of (one value per epoch, options of matplotlib's `plot`).
    """
    figure, axes = plt.subplots(figsize=HALF_PAGE, layout="constrained")
    for values, options in curves:
        markersize = 3 if len(values) <= 20 else 0
        style = {"marker": "o", "markersize": markersize, **options}
        axes.plot(range(1, len(values) + 1), values, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="Epoch", ylabel=ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    _legend_below(figure)
    return save_figure(figure, out, name, source)


def plot_logarithmic(curves, xlabel, ylabel, name, out, source, title=""):
    """Draw curves on two logarithmic axes and save them; returns the figure.

    curves: a list of (x values, y values, options of matplotlib's `plot`).
    """
    width, height = HALF_PAGE
    n_rows = math.ceil(len(curves) / 2)  # of the legend
    figure, axes = plt.subplots(figsize=(width, height + 0.15 * n_rows), layout="constrained")
    for x, y, options in curves:
        style = {"marker": "o", "markersize": 3, **options}
        axes.plot(x, y, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    _legend_below(figure)
    return save_figure(figure, out, name, source)


def draw_chain(axis, title, start, blocks, end, side=None):
    """Draw blocks one above the other, with arrows from `start` at the bottom to `end` at the top.

    side: {block: what enters it from the right}.
    """
    axis.set(xlim=(0, 1), ylim=(-1.1, len(blocks) + 0.4))
    axis.set_title(title, fontsize=9)
    axis.axis("off")
    text = {"ha": "center", "va": "center", "fontsize": 8}
    box = {"boxstyle": "round,pad=0.4", "facecolor": "#eef3fa", "edgecolor": "#33527a"}
    arrow = {"arrowstyle": "->", "linewidth": 0.8}
    axis.text(0.42, -1, start, **text)
    axis.text(0.42, len(blocks), end, **text)
    for height in range(len(blocks) + 1):
        axis.annotate("", (0.42, height - 0.2), (0.42, height - 0.8), arrowprops=arrow)
    for height, block in enumerate(blocks):
        axis.text(0.42, height, block, bbox=box, **text)
        if side and block in side:
            axis.annotate("", (0.7, height), (0.9, height), arrowprops=arrow)
            axis.text(0.93, height, side[block], **text)


# ---------------------------------------------------------------------------------------- OCTMNIST
OCT_CLASSES = ("CNV", "DME", "drusen", "normal")
OCTMNIST_MD5 = "c68d92d5b585d8d81f7112f81e2d0842"  # medmnist.INFO["octmnist"]["MD5"]
SPLITS = ("train", "val", "test")


def load_oct_data(folder):
    """Load `folder`/octmnist.npz, in MedMNIST's format, and check what can be wrong with it.

    Returns (splits, info). splits maps "train", "val" and "test" to (images, labels): uint8
    (N, 1, 28, 28), which the network scales, and int64 (N,), 0 to 3 as in `OCT_CLASSES`.
    info is the `data` entry of a results file.
    Raises UserError for a file that is missing, unreadable, damaged or another one.
    """
    path = Path(folder) / "octmnist.npz"
    content = _read_oct_file(path)
    arrays = _unpack_oct_file(path, content)

    splits = {}
    for split in SPLITS:
        problem = _problem_of_split(arrays, split)
        if problem:
            raise UserError(f"{path} is not in MedMNIST's format: {problem}; fetch it again.")
        images = torch.from_numpy(arrays[f"{split}_images"]).unsqueeze(1)  # (N, 1, 28, 28)
        labels = torch.from_numpy(arrays[f"{split}_labels"]).flatten().long()  # (N,)
        splits[split] = (images, labels)
    _check_classes(path, splits["train"][1])

    is_official = hashlib.md5(content).hexdigest() == OCTMNIST_MD5
    stated = str(arrays.get("source", "octmnist.npz of unknown origin"))
    counts, class_counts = {}, {}
    for split, (_, labels) in splits.items():
        counts[split] = len(labels)
        class_counts[split] = labels.bincount(minlength=len(OCT_CLASSES)).tolist()
    info = {
        "source": "OCTMNIST" if is_official else stated,
        "sha256": hashlib.sha256(content).hexdigest(),
        "classes": list(OCT_CLASSES),
        "counts": counts,
        "class_counts": class_counts,
    }
    return splits, info


def _read_oct_file(path):
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        advice = "`make data` fetches it, `make sample` writes a stand-in"
        raise UserError(f"{path} does not exist; {advice}.") from error
    except MemoryError as error:
        raise UserError(
            f"there is too little memory to read {path}; close other programs."
        ) from error
    except OSError as error:
        advice = "make it readable or name another folder"
        raise UserError(f"cannot read {path} ({error.strerror or error}); {advice}.") from error


def _unpack_oct_file(path, content):
    """{name: array} of an npz file's content."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except MemoryError as error:
        raise UserError(
            f"there is too little memory to load {path}; close other programs."
        ) from error
    except Exception as error:  # a damaged zip raises half a dozen types; nothing else happens here
        advice = "delete it and fetch it again"
        raise UserError(f"{path} is damaged or not an npz file; {advice}.") from error


def _problem_of_split(arrays, split):
    """What is wrong with a split's images and labels, in a few words, or None."""
    images, labels = f"{split}_images", f"{split}_labels"
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
    if largest >= len(OCT_CLASSES):
        return f"{labels} has a label {largest}, not 0 to 3"
    return None


def _check_classes(path, labels):
    """UserError if the training labels lack a class: another dataset under OCTMNIST's name."""
    missing = [name for i, name in enumerate(OCT_CLASSES) if not (labels == i).any()]
    if missing:
        lacking = f"its training images have none of {', '.join(missing)}"
        raise UserError(f"{path} is not OCTMNIST: {lacking}; name the folder of another file.")


# --------------------------------------------------------------------------------------- LJ Speech
SAMPLE_RATE = 22_050  # Hz, of LJ Speech
N_FFT = 1024  # samples of a window: 46 ms
HOP = 256  # samples from frame to frame: 11.6 ms
N_MELS = 80  # bands

VOCABULARY = "<>@# ,.?-abcdefghijklmnopqrstuvwxyz"  # 35 tokens, the course's
START, STOP, PAD, UNKNOWN = range(4)  # < > @ #


def encode(text, max_len=None):
    """Text -> token numbers, lower-cased, between START and STOP.

    `max_len` cuts it to that many tokens, START and STOP included. What the vocabulary lacks is
    UNKNOWN.

    >>> encode("A z!")
    [0, 9, 4, 34, 3, 1]
    """
    tokens = []
    for letter in text.lower():
        token = VOCABULARY.find(letter)
        tokens.append(token if token > UNKNOWN else UNKNOWN)
    if max_len:
        tokens = tokens[: max_len - 2]
    return [START, *tokens, STOP]


def decode(tokens):
    """Token numbers -> text, from behind START to before the first STOP (or PAD, or the end)."""
    text = "".join(VOCABULARY[token] for token in tokens)
    return text.removeprefix("<").split(">")[0].split("@")[0]


def load_ljspeech(folder):
    """Read `folder`/LJSpeech-1.1: metadata.csv and wavs/<id>.wav or .flac.

    A row of metadata.csv is id|transcript|normalised transcript, without a header.

    Returns (splits, info). splits maps "train", "val" and "test" to lists of (id, normalised
    transcript, path), as `split_clips` divides them. info is the `data` entry of a results file.
    Raises UserError for anything that is missing or malformed.
    """
    root = Path(folder) / "LJSpeech-1.1"
    try:
        root.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        advice = "set DOWNLOAD=1 to fetch it (2.6 GB), or `make sample` for a stand-in"
        raise UserError(f"{root} does not exist; {advice}.") from error
    except OSError as error:
        advice = "make it readable or name another folder"
        raise UserError(f"cannot read {root} ({error.strerror or error}); {advice}.") from error
    text = runs.read_text(root / "metadata.csv", advice="fetch it again or correct it")
    clips = _match_rows_to_files(text, root)
    splits, order = split_clips(clips)

    info = {
        "source": _label_of_corpus(root, clips),
        "sha256": _hash_of_corpus(text, clips),
        "counts": {split: len(rows) for split, rows in splits.items()},
        "split": order,
    }
    return splits, info


def _match_rows_to_files(text, root):
    """[(id, normalised transcript, path)] of metadata.csv; UserError names a wrong row."""
    try:
        paths = sorted((root / "wavs").iterdir())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{root} has no folder wavs/ with the clips; fetch it again.") from error
    except OSError as error:
        reason = f"cannot read {root / 'wavs'} ({error.strerror or error})"
        raise UserError(f"{reason}; make it readable or name another folder.") from error
    files = {}
    for path in paths:
        if path.suffix.lower() in (".wav", ".flac"):
            files[path.stem] = path

    clips, seen = [], set()
    for number_of_row, row in enumerate(text.rstrip("\n").split("\n"), start=1):
        where = f"row {number_of_row} of {root / 'metadata.csv'}"
        columns = [column.strip() for column in row.split("|")]
        if len(columns) != 3:
            found = f"has {len(columns)} columns, not id|transcript|normalised"
            raise UserError(f"{where} {found}; correct or remove it.")
        name, _, transcript = columns
        problem = None
        if not transcript:
            problem = "no text"
        elif name in seen:
            problem = "an id seen before"
        elif name not in files:
            problem = "no clip in wavs/"
        if problem:
            raise UserError(f"{where} ('{name}') has {problem}; correct or remove it.")
        seen.add(name)
        clips.append((name, transcript, files[name]))
    return clips


FIRST_TEST_CLIP = "LJ040-0047"  # of LJ Speech's official split; ids sort in its order
N_LJSPEECH = 13_100


def split_clips(clips):
    """Divide clips, in order, into training, validation and test: (splits, how, in words).

    LJ Speech as a whole: the official 9,825, 655 and 2,620. A part of it: what is officially test
    stays test, and of the clips before, the last twentieth is for validation. Another corpus, and
    a part of LJ Speech without any or with hardly anything but official test clips: the first
    75 %, the next 5 % and the last 20 %.
    """
    if _is_ljspeech(clips):
        clips = sorted(clips)  # whatever the order of the rows
    n = len(clips)
    if n < 4:
        raise UserError(f"the corpus has {n} clips; training, validation and test need at least 4.")
    n_before_test = sum(name < FIRST_TEST_CLIP for name, _, _ in clips)
    if _is_ljspeech(clips) and n < N_LJSPEECH and 2 <= n_before_test < n:
        n_val = max(1, round(n_before_test / 20))
        n_train = n_before_test - n_val
        how = "official test part; of the clips before it, the last twentieth is validation"
    else:
        n_val = max(1, round(0.05 * n))
        n_train = min(round(0.75 * n), n - n_val - 1)
        how = "first 75 %, next 5 %, last 20 % of the clips, in order"
        if _is_ljspeech(clips) and n == N_LJSPEECH:
            how = "official"
    splits = {
        "train": clips[:n_train],
        "val": clips[n_train : n_train + n_val],
        "test": clips[n_train + n_val :],
    }
    return splits, how


def _is_ljspeech(clips):
    return all(name.startswith("LJ0") for name, _, _ in clips)


def _hash_of_corpus(text, clips):
    """A hash of the metadata and of every clip's name, size and middle (4 kB: 13,100 files)."""
    digest = hashlib.sha256(text.encode())
    for _, _, path in clips:
        try:
            with open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(size // 2)
                digest.update(f"{path.name} {size} ".encode() + file.read(4096))
        except OSError as error:
            reason = f"cannot read {path} ({error.strerror or error})"
            raise UserError(f"{reason}; make it readable or remove its row.") from error
    return digest.hexdigest()


def _label_of_corpus(root, clips):
    """What to call the data: what a stand-in's README says of itself, or LJ Speech by its ids."""
    readme = root / "README"
    if readme.is_file():
        first_line = readme.read_text(encoding="utf-8", errors="replace").split("\n")[0]
        if first_line.startswith("synthetic"):
            return first_line
    if _is_ljspeech(clips):
        return f"LJ Speech 1.1, {len(clips):,} of {N_LJSPEECH:,} clips"
    return f"a corpus of {len(clips):,} clips"


def download_ljspeech(folder):
    """Fetch LJ Speech 1.1 (2.6 GB) into `folder` through torchaudio, which verifies its checksum.

    LJSpeech-1.1 appears in `folder` once it is whole. An archive that was fetched before a failure
    is used again. UserError says what to do when it cannot be fetched.
    """
    import torchaudio

    if not hasattr(tarfile, "data_filter"):
        advice = "update Python, or unpack LJSpeech-1.1/ there by hand"
        raise UserError(f"this Python cannot unpack archives safely; {advice} ({folder}).")
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # stays in the folder
    unfinished = Path(folder) / "LJSpeech-download"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished / "LJSpeech-1.1", ignore_errors=True)  # unpacked in part
        torchaudio.datasets.LJSPEECH(unfinished, download=True)
        (unfinished / "LJSpeech-1.1").replace(Path(folder) / "LJSpeech-1.1")
        shutil.rmtree(unfinished)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        reason = f"cannot fetch LJ Speech ({' '.join(str(error).split())})"
        advice = f"delete {unfinished}, or place LJSpeech-1.1/ in {folder} by hand"
        raise UserError(f"{reason}; {advice}.") from error


# --------------------------------------------------------------------------------- sound, features
def read_audio(path, advice="fetch it again or remove its row in metadata.csv"):
    """Read a sound file as mono float32 (n_samples,) in [-1, 1] at SAMPLE_RATE.

    Other rates are resampled and several channels averaged. UserError, which ends in `advice`, for
    a file that cannot be read, is cut short, or holds less than one window.
    """
    import soundfile
    from scipy.signal import resample_poly

    path = Path(path)
    try:
        with open(path, "rb") as file:
            is_cut = _is_cut_wav(file)
            file = io.BytesIO(_with_a_length(file.read()))
            with soundfile.SoundFile(file) as sound:
                promised, rate = sound.frames, sound.samplerate
                samples = _read_to_the_end(sound)  # (n, channels)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; {advice}.") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error}); {advice}.") from error
    except RuntimeError as error:  # soundfile's
        raise UserError(f"{path} is no readable sound file; {advice}.") from error
    if is_cut or len(samples) < promised < UNKNOWN_LENGTH:
        raise UserError(f"{path} is cut short: its header promises more sound; {advice}.")
    if not 1_000 <= rate <= 1_000_000:
        raise UserError(f"{path} has a sample rate of {rate} Hz in its header; {advice}.")
    if len(samples) * SAMPLE_RATE < N_FFT * rate:
        raise UserError(f"{path} holds less sound than one window of 46 ms; {advice}.")
    if not (np.abs(samples) <= 2**31).all():  # false for NaN, too
        raise UserError(f"{path} holds samples that are no numbers, or far too large; {advice}.")

    mono = samples.mean(axis=1)  # (n,)
    if rate != SAMPLE_RATE:
        divisor = math.gcd(rate, SAMPLE_RATE)
        mono = resample_poly(mono, SAMPLE_RATE // divisor, rate // divisor)
    return torch.from_numpy(np.ascontiguousarray(mono, dtype=np.float32))


UNKNOWN_LENGTH = 2**63 - 1  # libsndfile's: a FLAC that was written to a pipe does not say


def _read_to_the_end(sound):
    """All samples of an open SoundFile (n, channels), however many its header promises."""
    sound.seekable = lambda: False  # soundfile would seek, which fails behind the last sample
    blocks = []
    while not blocks or len(blocks[-1]) > 0:
        blocks.append(sound.read(2**16, dtype="float32", always_2d=True))
    return np.concatenate(blocks)


def _with_a_length(content):
    """A WAV file's bytes with an unknown length instead of 0, which a killed recorder leaves."""
    at = content.find(b"data", 12) + 4
    if content[:4] == b"RIFF" and at > 4 and content[at : at + 4] == bytes(4):
        return content[:at] + b"\xff" * 4 + content[at + 4 :]
    return content


def _is_cut_wav(file):
    """Whether an open RIFF file is shorter than its header says; leaves it at its beginning.

    Streams of unknown length promise 2 or 4 GB, and some recorders count the 8 bytes of the
    header twice.
    """
    header = file.read(8)
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    promised = int.from_bytes(header[4:8], "little")
    return header[:4] == b"RIFF" and size < promised < 0x7FFF_F000


@functools.cache
def _mel_spectrogram():
    """torchaudio's transform on Slaney's mel scale, built once per process."""
    import torchaudio

    return torchaudio.transforms.MelSpectrogram(
        sample_rate=SAMPLE_RATE,
        n_fft=N_FFT,
        hop_length=HOP,
        n_mels=N_MELS,
        norm="slaney",
        mel_scale="slaney",
    )


def log_mel(samples):
    """Log-mel features of a clip: (n_samples,) float32 -> (T, N_MELS) float32.

    T = 1 + n_samples // HOP. As Whisper has them: log10 of the power in each band, cut off at 8
    decades below the clip's peak, then (x + 4) / 4.
    """
    power = _mel_spectrogram()(samples)  # (N_MELS, T)
    decades = power.clamp(min=1e-10).log10()
    decades = decades.maximum(decades.max() - 8)
    return ((decades + 4) / 4).T  # (T, N_MELS)


def centre(clip):
    """A clip's features less the mean of each band over the clip: (T, N_MELS) -> (T, N_MELS).

    A microphone and a room multiply each band by much the same factor throughout, and what is
    multiplied in the power is added to its logarithm.
    """
    return clip - clip.mean(dim=0)


def _clip_features(path):
    torch.set_num_threads(1)
    return log_mel(read_audio(path)).half().numpy()


def load_features(splits, out):
    """Log-mel features of every clip: {split: [(T, N_MELS) float16 tensor per clip]}.

    Computed once and kept in `out`/features/<key>.npz (1 GB for all of LJ Speech). The key is a
    hash of the code that makes features and of every file's name, size and time; files of former
    keys are left where they are.
    """
    paths = [path for rows in splits.values() for _, _, path in rows]
    key = hashlib.sha256(runs.code_hash(_clip_features).encode())
    for path in paths:
        status = path.stat()
        key.update(f"{path.name} {status.st_size} {status.st_mtime_ns} ".encode())
    cache = Path(out) / "features" / f"{key.hexdigest()[:16]}.npz"
    try:
        frames, lengths = _read_features(cache)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # none yet, or a damaged one
        frames, lengths = _compute_features(paths)
        with runs.write_atomically(cache) as temporary, open(temporary, "wb") as file:
            np.savez(file, frames=frames, lengths=lengths)

    clips = iter(torch.from_numpy(frames).split(lengths.tolist()))
    return {split: [next(clips) for _ in rows] for split, rows in splits.items()}


def _read_features(cache):
    with np.load(cache, allow_pickle=False) as file:
        return file["frames"], file["lengths"]


def _compute_features(paths):
    """(frames of all clips one after the other, the length of each clip), on all processors."""
    jobs = [(path,) for path in paths]
    clips = runs.side_by_side(_clip_features, jobs)
    clips = list(tqdm(clips, "features", len(jobs), leave=False, disable=runs.QUIET))
    return np.concatenate(clips), np.array([len(clip) for clip in clips])


# ----------------------------------------------------------------------------------------- batches
def batches_by_length(lengths, batch_size, shuffle=True):
    """Batches of indices (n,) of clips of similar length.

    `shuffle`: lengths are jittered by up to 5 % before sorting, and the batches come in random
    order. Otherwise in order of length.
    """
    lengths = torch.as_tensor(lengths, dtype=torch.float32)
    if not shuffle:
        return list(lengths.argsort(stable=True).split(batch_size))
    jittered = lengths * (1 + 0.05 * torch.rand(len(lengths)))
    batches = jittered.argsort().split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches))]


def pad(sequences, value):
    """Tensors (L_i, ...) -> one tensor (B, max L, ...) padded with `value`, and lengths (B,)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)
    return padded, lengths
