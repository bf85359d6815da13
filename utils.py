"""Both datasets, and the style of plots.

OCTMNIST: one file, checked and turned into tensors. LJ Speech: clips and transcripts, tokens,
log-mel features, batches. Flags, errors and results files are in runs.py.
"""

import functools
import hashlib
import math
import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import runs
from runs import UserError

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


# ------------------------------------------------------------------------------------------- plots
@functools.cache
def pyplot() -> ModuleType:
    """matplotlib.pyplot, in this project's style: `plt = utils.pyplot()`."""
    if not runs.IN_NOTEBOOK:
        os.environ["MPLBACKEND"] = "Agg"  # scripts only save their plots: no window is needed
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.titlesize": 9, "legend.fontsize": 8})
    plt.rcParams.update({"figure.dpi": 120, "text.usetex": False})
    return plt


def save_figure(figure, out, name, source):
    """Save `figure`, its data's source under it, as `out`/figures/`name`.pdf and .png.

    Returns the figure. The same figure gives the same bytes: no date is written, and both files are
    laid out as the PDF, in which the width of a letter does not depend on pixels.
    """
    letters_in_a_line = int(19 * figure.get_figwidth())
    label = textwrap.fill(f"data: {source}", letters_in_a_line, break_on_hyphens=False)
    figure.supxlabel(label, fontsize=7, color="dimgray", parse_math=False)
    for suffix, metadata in (("pdf", {"CreationDate": None}), ("png", None)):
        path = Path(out) / "figures" / f"{name}.{suffix}"
        with runs.write_atomically(path) as temporary:
            figure.savefig(temporary, metadata=metadata, dpi=150)
        figure.set_layout_engine("none")  # it is laid out now
    pyplot().close(figure)
    return figure


# ---------------------------------------------------------------------------------------- OCTMNIST
OCT_CLASSES = ("CNV", "DME", "drusen", "normal")
OCTMNIST_MD5 = "c68d92d5b585d8d81f7112f81e2d0842"  # medmnist.INFO["octmnist"]["MD5"]
SPLITS = ("train", "val", "test")


def load_oct_data(folder: str | Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict]:
    """Load `folder`/octmnist.npz, which is in MedMNIST's format, and check it.

    Returns (splits, info). splits maps "train", "val" and "test" to (images, labels): uint8
    (N, 1, 28, 28), which the network scales, and int64 (N,), 0 to 3 as in `OCT_CLASSES`.
    info is the `data` entry of a results file.
    Raises UserError for a file that is missing, damaged or in another format.
    """
    path = Path(folder) / "octmnist.npz"
    if not path.exists():
        advice = "`make data` or `python download_octmnist.py` fetches the real one into data/, "
        advice += "`make sample` writes a synthetic one into sample/"
        raise UserError(f"{path} does not exist; {advice} (-data says which to read).")
    if not runs.is_whole_zip(path):
        raise UserError(f"{path} is damaged or not an npz file; delete it and fetch it again.")
    try:
        with runs.file_errors(path), np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except ValueError as error:  # pickled objects, or no arrays at all
        raise UserError(f"{path} is not in MedMNIST's format; fetch it again.") from error

    splits = {}
    for split in SPLITS:
        problem = _problem_of_split(arrays, split)
        if problem:
            raise UserError(f"{path} is not in MedMNIST's format: {problem}; fetch it again.")
        images = torch.from_numpy(arrays[f"{split}_images"]).unsqueeze(1)  # (N, 1, 28, 28)
        labels = torch.from_numpy(arrays[f"{split}_labels"]).flatten().long()  # (N,)
        splits[split] = (images, labels)
    return splits, _describe_oct_data(path, arrays, splits)


def _problem_of_split(arrays, split):
    """What is wrong with a split's images and labels, in a few words, or None."""
    images, labels = f"{split}_images", f"{split}_labels"
    for key, shape in ((images, (28, 28)), (labels, (1,))):
        if key not in arrays:
            return f"it has no entry '{key}'"
        array = arrays[key]
        if array.dtype != np.uint8 or array.shape[1:] != shape or array.ndim == 0:
            return f"{key} is {array.dtype} {array.shape}, not uint8 {('N', *shape)}"
        if len(array) == 0 or len(array) != len(arrays[images]):
            return f"{key} has {len(array)} entries for {len(arrays[images])} images"
    found = np.unique(arrays[labels]).tolist()
    if split == "train" and found != list(range(len(OCT_CLASSES))):
        return f"{labels} has the classes {found}, not 0 to 3"
    if max(found) >= len(OCT_CLASSES):
        return f"{labels} has a label {max(found)}, not 0 to 3"
    return None


def _describe_oct_data(path, arrays, splits):
    """The `data` entry of a results file: where the images are from, and how many there are."""
    with runs.file_errors(path):
        content = path.read_bytes()
    is_official = hashlib.md5(content).hexdigest() == OCTMNIST_MD5
    stated = str(arrays.get("source", "octmnist.npz of unknown origin"))
    counts, class_counts = {}, {}
    for split, (_, labels) in splits.items():
        counts[split] = len(labels)
        class_counts[split] = labels.bincount(minlength=len(OCT_CLASSES)).tolist()
    return {
        "source": "OCTMNIST" if is_official else stated,
        "sha256": hashlib.sha256(content).hexdigest(),
        "classes": list(OCT_CLASSES),
        "counts": counts,
        "class_counts": class_counts,
    }


# --------------------------------------------------------------------------------------- LJ Speech
SAMPLE_RATE = 22_050  # Hz, of LJ Speech
N_FFT = 1024  # samples of a window: 46 ms
HOP = 256  # samples from frame to frame: 11.6 ms
N_MELS = 80  # bands

VOCABULARY = "<>@# ,.?-abcdefghijklmnopqrstuvwxyz"  # 35 tokens, the course's
START, STOP, PAD, UNKNOWN = range(4)  # < > @ #


def encode(text: str, max_len: int | None = None) -> list[int]:
    """Text -> token numbers, lower-cased, between START and STOP.

    `max_len` cuts it to that many tokens, START and STOP included. Letters that the vocabulary
    lacks become UNKNOWN.

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


def decode(tokens: Iterable[int]) -> str:
    """Token numbers -> the text between START and the first STOP or PAD."""
    text = "".join(VOCABULARY[token] for token in tokens)
    return text.removeprefix("<").split(">")[0].split("@")[0]


Clip = tuple[str, str, Path]  # id, normalised transcript, sound file


def load_ljspeech(folder: str | Path) -> tuple[dict[str, list[Clip]], dict]:
    """Read `folder`/LJSpeech-1.1: metadata.csv and wavs/<id>.wav or .flac.

    A row of metadata.csv is id|transcript|normalised transcript, without a header.

    Returns (splits, info). splits maps "train", "val" and "test" to lists of (id, normalised
    transcript, path), as `split_clips` divides them. info is the `data` entry of a results file.
    Raises UserError for anything that is missing or malformed.
    """
    root = Path(folder) / "LJSpeech-1.1"
    if not root.exists():
        advice = "`make data` fetches LJ Speech into data/ (2.6 GB), "
        advice += "`make sample` speaks a synthetic corpus into sample/"
        raise UserError(f"{root} does not exist; {advice} (`data` says which to read).")
    with runs.file_errors(root):
        clips = _find_clips(read_metadata(root / "metadata.csv"), root)
        splits, how = split_clips(clips)
        info = {
            "source": _label_of_corpus(root, clips),
            "sha256": _hash_of_corpus(root, clips),
            "counts": {split: len(rows) for split, rows in splits.items()},
            "split": how,
        }
    return splits, info


def read_metadata(path: str | Path) -> list[tuple[str, str, str]]:
    """The rows [(id, transcript, normalised transcript)] of an LJ Speech metadata file.

    Raises UserError, which names the row, where one is malformed.
    """
    rows, seen = [], set()
    lines = runs.read_text(path).rstrip("\n").split("\n")
    for number_of_row, line in enumerate(lines, start=1):
        columns = tuple(column.strip() for column in line.split("|"))
        problem = None
        if len(columns) != 3:
            problem = f"{len(columns)} columns, not id|transcript|normalised"
        elif not columns[2]:
            problem = "no text"
        elif columns[0] in seen:
            problem = f"the id {columns[0]} of an earlier row"
        if problem:
            raise UserError(f"row {number_of_row} of {path} has {problem}; correct or remove it.")
        rows.append(columns)
        seen.add(columns[0])
    return rows


def _find_clips(rows, root):
    """[(id, normalised transcript, path)] of the rows of metadata.csv."""
    files = {}
    for path in sorted((root / "wavs").iterdir()):
        if path.suffix.lower() in (".wav", ".flac"):
            files[path.stem] = path
    clips = []
    for name, _, transcript in rows:
        if name not in files:
            problem = f"there is no clip of {name} in {root / 'wavs'}"
            raise UserError(f"{problem}; add it, or remove its row from metadata.csv.")
        clips.append((name, transcript, files[name]))
    return clips


FIRST_TEST_CLIP = "LJ040-0047"  # in the course's split of all of LJ Speech
N_LJSPEECH = 13_100


def split_clips(clips: list[Clip]) -> tuple[dict[str, list[Clip]], str]:
    """Divide clips, in order, into training, validation and test: (splits, how, in words).

    LJ Speech comes without a split. The course takes the first 75 %, the next 5 % and the last 20 %
    in order of the ids: 9,825, 655 and 2,620 clips. In a part of LJ Speech, the course's test clips
    stay test clips, and the last twentieth of the clips before them is for validation. Any other
    corpus is split 75, 5 and 20 %; so is a part of LJ Speech without such test clips, or with fewer
    than two clips before them.
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
        how = "the course's test part; of the clips before it, the last twentieth is validation"
    else:
        n_val = max(1, round(0.05 * n))
        n_train = min(round(0.75 * n), n - n_val - 1)
        how = "first 75 %, next 5 %, last 20 % of the clips, in order"
        if _is_ljspeech(clips) and n == N_LJSPEECH:
            how = "the course's: " + how
    splits = {
        "train": clips[:n_train],
        "val": clips[n_train : n_train + n_val],
        "test": clips[n_train + n_val :],
    }
    return splits, how


def _is_ljspeech(clips):
    return all(name.startswith("LJ0") for name, _, _ in clips)


def _hash_of_corpus(root, clips):
    """A hash of the metadata and of every clip's content (a few seconds for all of LJ Speech)."""
    digest = hashlib.sha256(runs.read_text(root / "metadata.csv").encode())
    for name, _, path in clips:
        digest.update(name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _label_of_corpus(root, clips):
    """What to call the data: a synthetic stand-in's README says it, ids tell LJ Speech."""
    readme = root / "README"
    if readme.is_file():
        first_line = readme.read_text(encoding="utf-8", errors="replace").split("\n")[0]
        if first_line.startswith("synthetic"):
            return first_line
    if _is_ljspeech(clips):
        return f"LJ Speech 1.1, {len(clips):,} of {N_LJSPEECH:,} clips"
    return f"a corpus of {len(clips):,} clips"


# --------------------------------------------------------------------------------- sound, features
def read_audio(path: str | Path, name: str | None = None) -> Tensor:
    """Read a sound file as mono float32 (n_samples,) in [-1, 1] at SAMPLE_RATE.

    Other rates are resampled and several channels mixed. Raises UserError, which calls the file
    `name`, where it is not a sound file, is cut short or holds less than one window.
    """
    import soundfile

    path = Path(path)
    name = name or str(path)
    with runs.file_errors(path), open(path, "rb") as file:
        is_cut = _is_cut_wav(file)
        file.seek(0)
        try:
            channels, rate = soundfile.read(file, dtype="float32", always_2d=True)  # (n, channels)
        except soundfile.LibsndfileError as error:
            advice = f"convert it, as with `ffmpeg -i {path.name} {path.stem}-new.wav`"
            problem = "is no readable sound file (WAV, FLAC, OGG or MP3)"
            raise UserError(f"{name} {problem}; {advice}.") from error
    if is_cut:
        problem = "is cut short: its header promises more sound"
        raise UserError(f"{name} {problem}; copy or record it again.")
    if len(channels) * SAMPLE_RATE < N_FFT * rate:
        raise UserError(f"{name} holds less sound than one window of 46 ms; record it again.")
    if not np.isfinite(channels).all():
        raise UserError(f"{name} holds samples that are no numbers; record it again.")
    return resample(torch.from_numpy(mix(channels)), rate, SAMPLE_RATE)


def mix(channels: np.ndarray) -> np.ndarray:
    """Mix channels (n, channels) into one (n,): their mean, after aligning their signs.

    Two speakers, one on each side, are both heard; and a channel that is another one inverted, as
    through a wrongly wired cable, does not cancel it.
    """
    power = np.square(channels).mean(axis=0)  # (channels,)
    loudest = channels[:, power.argmax()]  # (n,)
    signs = np.where(loudest @ channels < 0, -1, 1)  # (channels,)
    return channels @ (signs / len(signs)).astype(channels.dtype)  # (n,)


def resample(samples: Tensor, rate: int, new_rate: int) -> Tensor:
    """Samples (n,) at another sample rate: (n * new_rate / rate,)."""
    if rate == new_rate:
        return samples
    from scipy.signal import resample_poly

    divisor = math.gcd(rate, new_rate)
    samples = resample_poly(samples.numpy(), new_rate // divisor, rate // divisor)
    return torch.from_numpy(np.ascontiguousarray(samples, dtype=np.float32))


def _is_cut_wav(file):
    """Whether samples are missing at the end of an open RIFF file.

    Some headers promise a little too much: up to 4 KB, 0.1 s of 16-bit mono, are let pass. Programs
    that write to a pipe do not know the length and promise 2 or 4 GB.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(12)[:4] != b"RIFF":
        return False
    while len(header := file.read(8)) == 8:
        length = int.from_bytes(header[4:], "little")
        if header[:4] == b"data":
            missing = file.tell() + length - size
            return missing > 4096 and length < 0x7FFF_F000
        file.seek(length + length % 2, os.SEEK_CUR)
    return False


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


def log_mel(samples: Tensor) -> Tensor:
    """Log-mel features of a clip: (n_samples,) float32 -> (T, N_MELS) float32.

    T = 1 + n_samples // HOP. As in Whisper: log10 of the power in each band, cut off at 8 decades
    below the clip's peak, then (x + 4) / 4.
    """
    power = _mel_spectrogram()(samples)  # (N_MELS, T)
    decades = power.clamp(min=1e-10).log10()
    decades = decades.maximum(decades.max() - 8)
    return ((decades + 4) / 4).T  # (T, N_MELS)


def centre(clip: Tensor) -> Tensor:
    """Subtract each band's mean over the clip: (T, N_MELS) -> (T, N_MELS).

    A microphone and a room multiply the power in a band by much the same factor throughout. In its
    logarithm that is a constant, which this takes away.
    """
    return clip - clip.mean(dim=0)


def load_features(splits: dict[str, list[Clip]], out: str | Path) -> dict[str, list[Tensor]]:
    """Log-mel features of every clip: {split: [(T, N_MELS) float16 tensor per clip]}.

    Computed once and kept in `out`/features/<key>.npz (1 GB for all of LJ Speech); the key is a
    hash of every file's name, size and time. That file is used only if the first clip's features,
    computed again, are the same; so an edit of the code that computes them takes effect.
    """
    paths = [path for rows in splits.values() for _, _, path in rows]
    key = hashlib.sha256()
    for path in paths:
        with runs.file_errors(path):
            status = path.stat()
        key.update(f"{path.name} {status.st_size} {status.st_mtime_ns} ".encode())
    cache = Path(out) / "features" / f"{key.hexdigest()[:16]}.npz"

    first = log_mel(read_audio(paths[0])).half()
    clips = _read_features(cache)
    if clips is None or not torch.equal(first, clips[0]):
        clips = []
        for path in tqdm(paths, "features", leave=False, disable=runs.QUIET):
            clips.append(log_mel(read_audio(path)).half())
        lengths = [len(clip) for clip in clips]
        with runs.write_atomically(cache) as temporary, open(temporary, "wb") as file:
            np.savez(file, frames=torch.cat(clips).numpy(), lengths=lengths)
    clips = iter(clips)
    return {split: [next(clips) for _ in rows] for split, rows in splits.items()}


def _read_features(cache):
    """The features of all clips that a file holds; None if it is missing or damaged."""
    if not cache.exists() or not runs.is_whole_zip(cache):
        return None
    with runs.file_errors(cache), np.load(cache, allow_pickle=False) as file:
        return torch.from_numpy(file["frames"]).split(file["lengths"].tolist())


# ----------------------------------------------------------------------------------------- batches
def batches_by_length(
    lengths: Sequence[int], batch_size: int, shuffle: bool = True
) -> list[Tensor]:
    """The indices of clips, in batches (n,) of similar length.

    `shuffle`: lengths are jittered by up to 5 % before sorting, and the batches come in random
    order; otherwise they come in order of length.
    """
    sizes = torch.as_tensor(lengths, dtype=torch.float32)
    if not shuffle:
        return list(sizes.argsort(stable=True).split(batch_size))
    jittered = sizes * (1 + 0.05 * torch.rand(len(sizes)))
    batches = jittered.argsort().split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches))]


def pad(sequences: list[Tensor], value: float) -> tuple[Tensor, Tensor]:
    """Tensors (L_i, ...) -> one tensor (B, max L, ...) padded with `value`, and lengths (B,)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=value)
    return padded, lengths
