"""Write offline stand-ins for both datasets, in the real file formats, where the real data is not.

    python make_sample_data.py                                     both, into sample/
    python make_sample_data.py -only ljspeech -metadata FILE       speak another corpus's transcripts

Writes OUT/octmnist.npz (B-scans drawn by a small procedural model) and OUT/LJSpeech-1.1/ (sentences spoken by eSpeak
NG), labelled as synthetic, the same for the same seed; prints one line for each. Takes about 15 s on two cores; the
13,100 transcripts of LJ Speech (19 hours, 3 GB) 80 s. A second call with the same settings does nothing.
"""

import _ctypes
import ctypes
import hashlib
import io
import itertools
import os
import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import espeakng_loader
import joblib
import numpy as np
import soundfile
from tqdm import tqdm

import utils
from utils import UserError

EDITION = 1  # raise it when a change here changes the data, so that samples already written are made again


# -------------------------------------------------------------------------------------------------------- OCTMNIST
SIZE, FINE, BATCH = 28, 2, 200  # pixels a side; points per pixel, then averaged; images drawn at a time (memory)
SPLITS = {"train": (2_750, 840, 640, 3_770), "val": (275, 84, 64, 377), "test": (250, 250, 250, 250)}  # per class
MILDEST = np.array([0.1, 0.1, 0.65, 0.0])  # severity of the mildest case of each class: sets how hard the task is
SPECKLE = 24  # shape of the gamma noise: its standard deviation is 1/sqrt(24) of the brightness


def bell(x, centre, width):
    return np.exp(-(((x - centre) / width) ** 2))


def draw_scans(labels, random):
    """Draw B-scans, uint8 (N, 28, 28), of classes `labels` (N,): surfaces of the retina, then brightness between them.

    CNV (0) raises and breaks the outer layer and leaves bright material about it; DME (1) swells the retina and fills
    it with dark cysts; drusen (2) are bumps of the outer layer; a normal retina (3) has a clean foveal dip. Lengths are
    in pixels.
    """

    def uniform(low, high, *shape):
        return random.uniform(low, high, (len(labels), *shape, 1, 1)).astype(np.float32)

    x = np.arange(0, SIZE, 1 / FINE, dtype=np.float32)  # (56,)
    depth = x[:, None]  # (56, 1)
    severity = uniform(MILDEST[labels][:, None, None], 1)  # (N, 1, 1), as are all that follow without x
    cnv, dme, drusen = (severity * (labels == label)[:, None, None] for label in range(3))

    fovea = uniform(10, 18)
    lesion = fovea + uniform(-4, 4)
    outer = uniform(15, 21) + uniform(-0.2, 0.2) * (x - SIZE / 2) - uniform(-0.002, 0.012) * (x - SIZE / 2) ** 2
    raised = cnv * uniform(4, 8) * bell(x, lesion, uniform(3, 6))
    dip = uniform(2.5, 4) * bell(x, fovea, uniform(2, 4)) * (1 - 0.5 * cnv - dme)
    swelling = dme * uniform(2, 6) * bell(x, lesion, uniform(4, 7))
    inner = outer - uniform(5.5, 7.5) - 0.7 * raised + dip - swelling
    places = fovea[:, None] + np.reshape([-7, -2.5, 2.5, 7], (4, 1, 1)) + uniform(-2.3, 2.3, 4)
    bumps = (uniform(1.5, 4, 4) * bell(x, places, uniform(1, 2.2, 4))).max(axis=1)
    outer = outer - raised - drusen * bumps  # (N, 1, 56): the pigment epithelium
    inner = np.minimum(inner, outer - 1.5)  # (N, 1, 56): the inner limiting membrane

    below = depth - outer  # (N, 56, 56)
    retina = (below < 0) / (1 + np.exp(-4 * (depth - inner)))
    image = 20 + retina * (75 - 40 * bell(below, -2.5, 1.2)) + 45 * bell(depth, inner + 0.8, 0.9)
    broken = cnv * uniform(0.6, 1) * bell(x, lesion + uniform(-4, 4), uniform(1.5, 4))
    image += (1 - broken) * 130 * bell(below, 0, 0.8)
    image += (below > 0) * uniform(50, 90) * np.exp(-np.maximum(below, 0) / uniform(3, 7))
    image += cnv * uniform(60, 140) * bell(x, lesion, uniform(2, 5)) * bell(below, uniform(-2.5, 2), uniform(1, 2))
    for share in (1, 0.6, 0.4):  # of the DME scans that have a first, a second, a third cyst
        centre = outer + uniform(0.35, 0.65) * (inner - outer)
        cyst = bell(x, lesion + uniform(-4, 4), uniform(1, 2.5)) * bell(depth, centre, uniform(1, 2))
        image *= 1 - (dme > 0) * (uniform(0, 1) < share) * retina * cyst

    image = image.reshape(len(labels), SIZE, FINE, SIZE, FINE).mean(axis=(2, 4))
    image *= uniform(0.7, 1.2) * random.gamma(SPECKLE, 1 / SPECKLE, image.shape)
    outside = uniform(-9, 3) + uniform(-0.3, 0.3) * (x[::FINE] - SIZE / 2)  # straightened scans have white corners
    image[depth[::FINE] < outside] = 255
    return np.clip(image, 0, 255).astype(np.uint8)


def make_octmnist(out, seed):
    """Write `out`/octmnist.npz, whole or not at all; returns a one-line summary."""
    path, settings = out / "octmnist.npz", f"edition {EDITION}, seed {seed}"
    label = "synthetic sample (procedural B-scans)"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {key: file[key] for key in file.files}  # reads all, so that damage is seen
        except Exception:  # a damaged zip raises half a dozen types; nothing else happens in this block
            found = {}
        if str(found.get("source")) != label:
            raise UserError(f"{path} is damaged or not from this script; delete it, or name another folder with -out.")
        if str(found.get("settings")) == settings:
            return f"{path}: complete already ({label})"

    random, arrays = np.random.default_rng(seed), {"source": np.array(label), "settings": np.array(settings)}
    for split, counts in SPLITS.items():
        labels = random.permutation(np.repeat(np.arange(len(counts), dtype=np.uint8), counts))
        batches = [labels[i : i + BATCH] for i in range(0, len(labels), BATCH)]
        scans = [draw_scans(batch, random) for batch in tqdm(batches, f"drawing {split}", leave=False, disable=None)]
        arrays |= {f"{split}_images": np.concatenate(scans), f"{split}_labels": labels[:, None]}
    with utils.write_atomically(path) as temporary:
        np.savez_compressed(temporary, **arrays)
    return f"{path}: {' + '.join(f'{sum(n):,}' for n in SPLITS.values())} images ({label})"


# ------------------------------------------------------------------------------------------- LJ Speech: sentences
WORDS = {
    "person": "sailor queen doctor farmer judge singer baker king",
    "quality": "old quiet brave lazy young happy",
    "past": "found sold watched painted fixed moved",
    "verb": "find sell watch paint fix move",
    "kind": "red long dark wooden golden empty",
    "thing": "ship garden letter bridge window clock jewel box",
    "number": "two five seven twelve twenty-one",
    "things": "ships letters maps clocks jewels horses",
    "when": "at noon/in June/by the sea/after lunch/last winter/today",
}
TEMPLATES = (
    "The {quality} {person} {past} the {kind} {thing}.",
    "{when}, the {person} {past} {number} {things}.",
    "Did the {quality} {person} {verb} {number} {things}?",
    "The {person} {past} the {thing}, {when}.",
    "Who {past} the {kind} {thing} {when}?",
)


def grammar(n_clips, seed):
    """`n_clips` rows (id, transcript, normalised transcript), no sentence twice: what is held out was never heard."""
    words = {slot: text.split("/" if "/" in text else None) for slot, text in WORDS.items()}
    sentences = []
    for template in TEMPLATES:
        slots = re.findall(r"{(\w+)}", template)
        for choice in itertools.product(*(words[slot] for slot in slots)):
            sentence = template.format(**dict(zip(slots, choice)))
            sentences.append(sentence[0].upper() + sentence[1:])
    if n_clips > len(sentences):
        raise UserError(f"the grammar has only {len(sentences):,} sentences; ask for at most so many with -n_clips.")
    order = np.random.default_rng(seed).permutation(len(sentences))[:n_clips]
    return [(f"SY{i // 100 + 1:03}-{i % 100 + 1:04}", sentences[j], sentences[j]) for i, j in enumerate(order)]


def read_metadata(path):
    """The rows (id, transcript, normalised transcript) of an LJ Speech metadata file; UserError where one is wrong."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", "it is not UTF-8 text")
        raise UserError(f"cannot read {path} ({reason}); give -metadata an LJ Speech metadata file.") from error
    rows, seen = [tuple(line.split("|")) for line in text.removesuffix("\n").split("\n")], set()
    for line, row in enumerate(rows, 1):
        if len(row) != 3:
            fault = f"another number of columns ({len(row)}) than the three id|transcript|normalised"
        elif not re.fullmatch(r"[A-Za-z0-9_-]+", row[0]):  # the id names a file: no dots or slashes
            fault = f"the id {row[0]!r}, which has other characters than letters, digits, - and _"
        elif row[0] in seen:
            fault = f"the id {row[0]} for the second time"
        elif not re.search(r"\w", row[2]):
            fault = "no words in its normalised transcript"
        else:
            seen.add(row[0])
            continue
        raise UserError(f"line {line} of {path} has {fault}; correct it.")
    return rows


# ---------------------------------------------------------------------------------------------- LJ Speech: sound
RATES, PITCHES = (150, 200), (30, 70)  # words per minute; eSpeak NG's scale of 0 to 99
CHUNK = 25  # clips that one freshly loaded library speaks
SYNCHRONOUS, NO_EXIT, UTF8, RATE, PITCH = 2, 0x8000, 1, 1, 3  # as in eSpeak NG's header speak_lib.h


def espeak_data(folder):
    """The path of eSpeak NG's data, through a link in `folder` (a short path) if it is too long for its C code."""
    path, link = espeakng_loader.get_data_path(), Path(folder) / "espeak-ng-data"
    if len(os.fsencode(path)) <= 120:  # its buffers hold 160 bytes, and names of files are appended
        return path
    link.symlink_to(path)
    return str(link)


def speak(jobs, data_path):
    """Write clips (path, text in UTF-8, rate, pitch) as 16-bit mono wav files; returns their number and total seconds.

    eSpeak NG remembers what it said (its noise and intonation go on from clip to clip), and only unloading the library
    clears that: each call loads it anew, so that the sound does not depend on how calls are spread over workers.
    Raises OSError when a file cannot be written, ValueError when a text cannot be spoken.
    """
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    heard, n_samples = [], 0

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def listen(samples, n_samples, _):
        if samples and n_samples > 0:
            heard.append(np.ctypeslib.as_array(samples, (n_samples,)).copy())  # eSpeak NG reuses the memory
        return 0

    try:
        if library.espeak_Initialize(SYNCHRONOUS, 0, os.fsencode(data_path), NO_EXIT) != utils.SAMPLE_RATE:
            raise ValueError(f"eSpeak NG cannot read its data in {data_path}")
        library.espeak_SetSynthCallback(listen)
        library.espeak_SetVoiceByName(b"en-us")
        for path, text, rate, pitch in jobs:
            heard.clear()
            library.espeak_SetParameter(RATE, rate, 0)
            library.espeak_SetParameter(PITCH, pitch, 0)
            if library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 0, 0, UTF8, None, None) or not heard:
                raise ValueError(f"eSpeak NG makes no sound of the transcript of {Path(path).stem}")
            sound, wav = np.concatenate(heard), io.BytesIO()
            soundfile.write(wav, sound, utils.SAMPLE_RATE, "PCM_16", format="WAV")
            Path(path).write_bytes(wav.getbuffer())  # a full disk is an OSError here, not in libsndfile
            n_samples += len(sound)
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    return len(jobs), n_samples / utils.SAMPLE_RATE


def speak_all(rows, folder, seed, workers):
    """Speak every row into `folder`/<id>.wav on `workers` processes, with a bar; returns the seconds of sound."""
    random = np.random.default_rng([seed, 1])
    rates, pitches = (random.integers(low, high, len(rows), endpoint=True) for low, high in (RATES, PITCHES))
    jobs = [(folder / f"{row[0]}.wav", row[2].encode(), int(r), int(p)) for row, r, p in zip(rows, rates, pitches)]
    chunks, seconds = [jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)], 0.0
    parallel = joblib.Parallel(n_jobs=min(workers, len(chunks)), return_as="generator_unordered")
    with TemporaryDirectory() as short, tqdm(desc="speaking", total=len(jobs), leave=False, disable=None) as bar:
        data_path = espeak_data(short)
        for n_clips, length in parallel(joblib.delayed(speak)(chunk, data_path) for chunk in chunks):
            bar.update(n_clips)
            seconds += length
    return seconds


def make_ljspeech(out, seed, n_clips, metadata, workers):
    """Write `out`/LJSpeech-1.1/, whole or not at all; returns a one-line summary."""
    rows = read_metadata(metadata)[:n_clips] if metadata else grammar(n_clips or 2_000, seed)
    text = f"stand-in: transcripts of {Path(metadata).name}" if metadata else "sample: sentences from a small grammar"
    label = f"synthetic {text}, spoken by eSpeak NG"
    table = "".join("|".join(row) + "\n" for row in rows)
    digest = hashlib.sha256(table.encode()).hexdigest()
    stamp = f"{label}\nmake_sample_data.py, edition {EDITION}, seed {seed}, {len(rows)} clips, table {digest}\n"
    final, work = out / "LJSpeech-1.1", out / ".LJSpeech-1.1.part"
    new, readme = work / "new", final / "README"
    try:
        found = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        if found == stamp and len(list((final / "wavs").glob("*.wav"))) == len(rows):
            return f"{final}: complete already ({len(rows):,} clips; {label})"
        if final.exists() and "make_sample_data.py" not in found:
            raise UserError(f"{final} was not written by this script and is left alone; name another folder with -out.")
        shutil.rmtree(work, ignore_errors=True)  # of a run that was killed
        (new / "wavs").mkdir(parents=True)
        (new / "metadata.csv").write_text(table, encoding="utf-8", newline="\n")
        seconds = speak_all(rows, new / "wavs", seed, workers)
        (new / "README").write_text(stamp, encoding="utf-8")
        if final.exists():
            final.rename(work / "old")
        new.rename(final)
    except OSError as error:
        raise UserError(f"cannot write {final} ({error.strerror or error}); free space or change -out.") from error
    except ValueError as error:
        raise UserError(f"{error}; correct that, then run this again.") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return f"{final}: {len(rows):,} clips, {seconds / 60:.1f} minutes ({label})"


# ---------------------------------------------------------------------------------------------------- command line
def make_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0])
    parser.flag("out", type=Path, default="sample", help="folder to write to")
    parser.flag("seed", type=utils.number(int, 0, 2**32 - 1), default=42, help="the same seed makes the same data")
    parser.flag("n_clips", type=utils.number(int, 1), help="spoken clips: 2,000 sentences, or all rows of -metadata")
    parser.flag("metadata", help="speak the normalised transcripts of this file (id|transcript|normalised) instead")
    parser.flag("only", choices=("octmnist", "ljspeech"), help="write only this one")
    parser.flag("workers", type=utils.number(int, 1), default=os.cpu_count(), help="processes that speak")
    return parser


def main(args):
    """Write what was asked for; prints one line for each dataset."""
    if args.only != "ljspeech":
        print(make_octmnist(args.out, args.seed))
    if args.only != "octmnist":
        print(make_ljspeech(args.out, args.seed, args.n_clips, args.metadata, args.workers))


if __name__ == "__main__":
    utils.run_script(main, make_parser())
