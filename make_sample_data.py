"""Write offline stand-ins for both datasets, in the real file formats, for machines without the real data.

    python make_sample_data.py                                     both, into sample/
    python make_sample_data.py -only ljspeech -metadata FILE       speak another corpus's transcripts

Writes OUT/octmnist.npz (MedMNIST's format: B-scans drawn by a small procedural model) and OUT/LJSpeech-1.1/ (LJ Speech's
format: short sentences spoken by eSpeak NG), both labelled as synthetic, the same for the same seed. Prints one line for
each. Takes about 15 s on two cores, and about a minute for the 13,100 transcripts (19 hours, 3 GB) of LJ Speech; a second
call with the same settings finds them complete and does nothing.
"""

import _ctypes
import ctypes
import hashlib
import io
import itertools
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import espeakng_loader
import joblib
import numpy as np
import soundfile
from tqdm import tqdm

import utils
from utils import UserError

EDITION = 1  # raise it when a change here changes the data, so that samples already written are made again


# ------------------------------------------------------------------------------------------------------- sentences
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
    ids = (f"SY{i // 100 + 1:03}-{i % 100 + 1:04}" for i in range(n_clips))
    return [(clip, sentences[i], sentences[i]) for clip, i in zip(ids, order)]


def read_metadata(path):
    """The rows (id, transcript, normalised transcript) of an LJ Speech metadata file; UserError where one is wrong."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            rows = [tuple(line.rstrip("\n").split("|")) for line in file]
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); give -metadata an LJ Speech metadata file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; give -metadata an LJ Speech metadata file.") from error
    seen = set()
    for line, row in enumerate(rows, 1):
        if len(row) != 3:
            fault = f"{len(row)} column{'s' * (len(row) > 1)}, not the three id|transcript|normalised"
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
    if not rows:
        raise UserError(f"{path} is empty; give -metadata an LJ Speech metadata file.")
    return rows


# ---------------------------------------------------------------------------------------------------------- speech
SAMPLE_RATE = 22_050  # Hz, of eSpeak NG and of LJ Speech
RATES = (150, 200)  # words per minute
PITCHES = (30, 70)  # on eSpeak NG's scale of 0 to 99
CHUNK = 25  # clips that one freshly loaded library speaks
SYNCHRONOUS, NO_EXIT, UTF8 = 2, 0x8000, 1  # espeak_AUDIO_OUTPUT, espeakINITIALIZE_DONT_EXIT, espeakCHARS_UTF8
RATE, PITCH = 1, 3  # espeak_PARAMETER


@contextmanager
def espeak_data():
    """Yield the path of eSpeak NG's data, through a link in a short folder when it is too long for its C code."""
    path = espeakng_loader.get_data_path()
    if len(os.fsencode(path)) <= 120:  # its buffers hold 160 bytes, and names of files are appended
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "espeak-ng-data"
        link.symlink_to(path)
        yield str(link)


def speak(jobs, data_path):
    """Write clips (path, text, rate, pitch) as 16-bit mono wav files; returns their number and their length in seconds.

    eSpeak NG remembers what it said (its noise and intonation go on from clip to clip), and only unloading the library
    clears that: each call loads it anew, so that the sound does not depend on how calls are spread over workers.
    Raises OSError when a file cannot be written, RuntimeError when a text cannot be spoken.
    """
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    heard = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def listen(samples, n_samples, _):
        if samples and n_samples > 0:
            heard.append(np.ctypeslib.as_array(samples, (n_samples,)).copy())  # eSpeak NG reuses the memory
        return 0

    try:
        if library.espeak_Initialize(SYNCHRONOUS, 0, os.fsencode(data_path), NO_EXIT) != SAMPLE_RATE:
            raise RuntimeError(f"eSpeak NG cannot read its data in {data_path}")
        library.espeak_SetSynthCallback(listen)
        library.espeak_SetVoiceByName(b"en-us")
        n_samples = 0
        for path, text, rate, pitch in jobs:
            heard.clear()
            library.espeak_SetParameter(RATE, rate, 0)
            library.espeak_SetParameter(PITCH, pitch, 0)
            text = text.encode()
            failed = library.espeak_Synth(text, ctypes.c_size_t(len(text) + 1), 0, 0, 0, UTF8, None, None)
            if failed or not heard:
                raise RuntimeError(f"eSpeak NG makes no sound of the transcript of {Path(path).stem}")
            sound, wav = np.concatenate(heard), io.BytesIO()
            soundfile.write(wav, sound, SAMPLE_RATE, "PCM_16", format="WAV")
            Path(path).write_bytes(wav.getbuffer())  # a full disk is an OSError here, not in libsndfile
            n_samples += len(sound)
        library.espeak_Terminate()
    finally:
        _ctypes.dlclose(library._handle)
    return len(jobs), n_samples / SAMPLE_RATE


def speak_all(rows, folder, seed, workers):
    """Speak every row into `folder`/<id>.wav on `workers` processes, with a progress bar; returns the seconds of sound."""
    random = np.random.default_rng([seed, 1])
    rates, pitches = (random.integers(low, high, len(rows), endpoint=True) for low, high in (RATES, PITCHES))
    jobs = [(folder / f"{row[0]}.wav", row[2], int(r), int(p)) for row, r, p in zip(rows, rates, pitches)]
    chunks = [jobs[i : i + CHUNK] for i in range(0, len(jobs), CHUNK)]
    parallel = joblib.Parallel(n_jobs=min(workers, len(chunks)), return_as="generator_unordered")
    seconds = 0.0
    with espeak_data() as data_path, tqdm(total=len(jobs), desc="speaking", leave=False, disable=None) as progress:
        for n_clips, length in parallel(joblib.delayed(speak)(chunk, data_path) for chunk in chunks):
            progress.update(n_clips)
            seconds += length
    return seconds


def make_ljspeech(out, seed, n_clips, metadata, workers):
    """Write `out`/LJSpeech-1.1/, whole or not at all; returns a one-line summary."""
    if metadata:
        rows = read_metadata(metadata)[:n_clips]
        label = f"synthetic stand-in: transcripts of {Path(metadata).name}, spoken by eSpeak NG"
    else:
        rows = grammar(n_clips or 2_000, seed)
        label = "synthetic sample: sentences from a small grammar, spoken by eSpeak NG"
    table = "".join("|".join(row) + "\n" for row in rows)
    digest = hashlib.sha256(table.encode()).hexdigest()
    readme = f"{label}\nby make_sample_data.py, edition {EDITION}, seed {seed}, {len(rows)} clips\nmetadata.csv: sha256 {digest}\n"

    final, part, old = (out / name for name in ("LJSpeech-1.1", ".LJSpeech-1.1.part", ".LJSpeech-1.1.old"))
    try:
        found = (final / "README").read_text(errors="replace") if (final / "README").is_file() else ""
        if found == readme and len(list((final / "wavs").glob("*.wav"))) == len(rows):
            return f"{final}: complete already ({len(rows):,} clips; {label})"
        if final.exists() and "make_sample_data.py" not in found:
            raise UserError(f"{final} was not written by this script and is left alone; name another folder with -out.")
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
        (part / "wavs").mkdir(parents=True)
        (part / "metadata.csv").write_text(table, encoding="utf-8", newline="\n")
        seconds = speak_all(rows, part / "wavs", seed, workers)
        (part / "README").write_text(readme)
        if final.exists():
            final.rename(old)
        part.rename(final)
    except OSError as error:
        raise UserError(f"cannot write {final} ({error.strerror}); free some space or name another folder.") from error
    except RuntimeError as error:
        raise UserError(f"{error}; correct that, then run this again.") from error
    finally:
        for leftover in (part, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return f"{final}: {len(rows):,} clips, {seconds / 60:.1f} minutes ({label})"


# ---------------------------------------------------------------------------------------------------- command line
def make_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0])
    parser.flag("out", default="sample", help="folder to write to")
    parser.flag("seed", type=utils.number(int, 0, 2**32 - 1), default=42, help="the same seed makes the same data")
    parser.flag("n_clips", type=utils.number(int, 1), help="spoken clips: 2,000 sentences, or all rows of -metadata")
    parser.flag("metadata", help="speak the normalised transcripts of this file (id|transcript|normalised) instead")
    parser.flag("only", choices=("octmnist", "ljspeech"), help="write only this one")
    parser.flag("workers", type=utils.number(int, 1), default=os.cpu_count(), help="processes that speak")
    return parser


def main(args):
    """Write what was asked for; prints one line for each dataset."""
    out = Path(args.out)
    if args.only != "octmnist":
        print(make_ljspeech(out, args.seed, args.n_clips, args.metadata, args.workers))


if __name__ == "__main__":
    utils.run_script(main, make_parser())
