"""A stand-in for LJ Speech: sentences spoken by a neural voice, in LJ Speech's files.

The voice is the one inside the package hibari-tts (American English, female). What is said comes
from a small grammar, or from the transcripts of any metadata file of LJ Speech. Pace and noise
vary from clip to clip. A clip depends on its text, its place in the table and the seed alone, so
the same seed gives the same files on one machine, on however many processes they are spoken.
"""

import functools
import hashlib
import io
import itertools
import os
import re
import shutil
from pathlib import Path

import runs
from runs import UserError

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime would send what it is used for
import hibari
import numpy as np
import soundfile
from scipy.signal import resample_poly
from tqdm import tqdm

EDITION = 2  # raise it when the clips change: samples already written are then made again


# ----------------------------------------------------------------------------------- what is said
WORDS = {
    "person": "sailor queen doctor farmer judge singer baker king".split(),
    "quality": "old quiet brave lazy young happy".split(),
    "past": "found sold watched painted fixed moved".split(),
    "verb": "find sell watch paint fix move".split(),
    "kind": "red long dark wooden golden empty".split(),
    "thing": "ship garden letter bridge window clock jewel box".split(),
    "number": "two five seven twelve twenty-one".split(),
    "things": "ships letters maps clocks jewels horses".split(),
    "when": ["at noon", "in June", "by the sea", "after lunch", "last winter", "today"],
}
TEMPLATES = (
    "The {quality} {person} {past} the {kind} {thing}.",
    "{when}, the {person} {past} {number} {things}.",
    "Did the {quality} {person} {verb} {number} {things}?",
    "The {person} {past} the {thing}, {when}.",
    "Who {past} the {kind} {thing} {when}?",
)


def all_sentences():
    """Every sentence of the grammar, in a fixed order; none is there twice."""
    sentences = []
    for template in TEMPLATES:
        slots = re.findall(r"{(\w+)}", template)
        for words in itertools.product(*(WORDS[slot] for slot in slots)):
            sentence = template.format(**dict(zip(slots, words)))
            sentences.append(sentence[0].upper() + sentence[1:])
    return sentences


def grammar(n_clips, seed):
    """`n_clips` rows (id, transcript, normalised transcript), no sentence twice.

    So a sentence that is held out was never heard.
    """
    sentences = all_sentences()
    if n_clips > len(sentences):
        most = f"only {len(sentences):,} sentences"
        raise UserError(f"the grammar has {most}; ask for at most so many with -n_clips.")
    order = np.random.default_rng(seed).permutation(len(sentences))[:n_clips]
    rows = []
    for i, chosen in enumerate(order):
        clip = f"SY{i // 100 + 1:03}-{i % 100 + 1:04}"
        rows.append((clip, sentences[chosen], sentences[chosen]))
    return rows


def fault_of_row(row, seen):
    """What is wrong with a row of a metadata file, in a few words, or None; `seen`: earlier ids."""
    if len(row) != 3:
        return f"another number of columns ({len(row)}) than the three id|transcript|normalised"
    clip, _, normalised = row
    if not re.fullmatch(r"[A-Za-z0-9_-]+", clip):  # the id names a file: no dots or slashes
        return f"the id {clip!r}, which has other characters than letters, digits, - and _"
    if clip.lower() in seen:  # capitals make no difference to the names of files on some systems
        return f"the id {clip} for the second time"
    if not re.search(r"\w", normalised):
        return "no words in its normalised transcript"
    return None


def read_metadata(path):
    """The rows (id, transcript, normalised transcript) of an LJ Speech metadata file.

    UserError where the file or one of its rows is wrong.
    """
    text = runs.read_text(path, advice="give -metadata an LJ Speech metadata file")
    rows = []
    seen = set()
    for number_of_line, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        row = tuple(line.split("|"))
        fault = fault_of_row(row, seen)
        if fault:
            raise UserError(f"line {number_of_line} of {path} has {fault}; correct it.")
        rows.append(row)
        seen.add(row[0].lower())
    return rows


# --------------------------------------------------------------------------------- how it is said
SAMPLE_RATE = 22_050  # of LJ Speech, samples a second
UP, DOWN = 147, 160  # SAMPLE_RATE / hibari.SAMPLE_RATE = 22,050 / 24,000
SPEEDS = (0.75, 1.05)  # of the voice's own pace; so its clips are as long as LJ Speech's
SILENCE = 0.02  # of a clip's peak: nothing at either end is louder in a silence
LEAD, TAIL = 0.02, 0.10  # seconds of silence that stay at the ends, as in LJ Speech


@functools.cache
def voice():
    """The voice, loaded once a process; on one thread, so that it always rounds alike."""
    return hibari.Hibari(threads=1)


def trim(sound, rate):
    """Cut the silence at both ends of `sound` (n_samples,), but for LEAD and TAIL seconds."""
    loud = np.flatnonzero(np.abs(sound) > SILENCE * np.abs(sound).max())
    start = max(0, loud[0] - round(LEAD * rate))
    stop = loud[-1] + 1 + round(TAIL * rate)
    return sound[start:stop]


def say(text, speed, seed):
    """`text` as 16-bit samples (n_samples,) at SAMPLE_RATE; None if there is nothing to say in it.

    `speed`: of the voice's own pace; `seed`: of the noise in its consonants and its breath.
    """
    sound = voice()(text, speed=speed, seed=seed)  # (n_samples,) float32
    if not sound.any():
        return None
    sound = resample_poly(trim(sound, hibari.SAMPLE_RATE), UP, DOWN)
    sound = sound / max(1, np.abs(sound).max())  # rarely too loud for 16 bits
    return np.round(sound * 32_767).astype(np.int16)


def speak(path, text, seed):
    """Write `text` as the sound file `path`, whole or not at all; `seed` decides how it sounds.

    OSError where it cannot be written, ValueError for a text that makes no sound.
    """
    random = np.random.default_rng(seed)
    speed = random.uniform(*SPEEDS)
    sound = say(text, speed, seed=int(random.integers(2**32)))
    if sound is None:
        raise ValueError(f"the voice cannot say the transcript of {path.stem} ({text})")
    wav = io.BytesIO()
    soundfile.write(wav, sound, SAMPLE_RATE, "PCM_16", format="WAV")
    temporary = path.with_name(f".{path.stem}-{os.getpid()}")
    temporary.write_bytes(wav.getvalue())  # a full disk is an OSError here, not in libsndfile
    temporary.replace(path)


def speak_all(rows, folder, seed, workers):
    """Speak every row that has no `folder`/<id>.wav yet, with a progress bar."""
    jobs = []
    for i, (clip, _, text) in enumerate(rows):
        path = folder / f"{clip}.wav"
        if not path.exists():
            jobs.append((path, text, [seed, i]))
    advice = "close other programs, and the same command goes on from there"
    bar = tqdm(
        runs.side_by_side(speak, jobs, workers, advice),
        desc="speaking",
        initial=len(rows) - len(jobs),
        total=len(rows),
        leave=False,
        disable=runs.QUIET,
    )
    for _ in bar:
        pass


# ------------------------------------------------------------------------------------- the folder
def describe(rows, seed, metadata):
    """(label, stamp): what the folder's README says first, and all that it says."""
    text = "sample: sentences from a small grammar"
    if metadata:
        text = f"stand-in: transcripts of {Path(metadata).name}"
    label = f"synthetic {text}, spoken by a neural voice (hibari-tts)"
    digest = hashlib.sha256(table_of(rows).encode()).hexdigest()
    settings = f"edition {EDITION}, seed {seed}, {len(rows)} clips, table {digest}"
    maker = f"make_sample_data.py, hibari-tts {hibari.__version__}"
    return label, f"{label}\n{maker}, {settings}\n"


def table_of(rows):
    """The text of metadata.csv."""
    return "".join("|".join(row) + "\n" for row in rows)


def stamp_of(folder):
    """What the README in `folder` says, or an empty text."""
    readme = folder / "README"
    if not readme.is_file():
        return ""
    return readme.read_text(encoding="utf-8", errors="replace")


def clips_in(folder):
    """The sound files of a corpus; a name that begins with a dot is still being written."""
    return list((folder / "wavs").glob("[!.]*.wav"))


def write_folder(work, final, rows, stamp, seed, workers):
    """Speak into the folder `work`, or go on there; once that is whole, name it `final`."""
    for other in final.parent.glob(f".{final.name}.*"):  # of calls with other settings
        if other != work:
            shutil.rmtree(other, ignore_errors=True)
    (work / "wavs").mkdir(parents=True, exist_ok=True)
    speak_all(rows, work / "wavs", seed, workers)
    for unfinished in (work / "wavs").glob(".*"):  # of a process that was killed
        unfinished.unlink(missing_ok=True)
    if len(clips_in(work)) != len(rows):
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(f"another process is writing {final} too; let one of them do it.")
    (work / "metadata.csv").write_text(table_of(rows), encoding="utf-8", newline="\n")
    (work / "README").write_text(stamp, encoding="utf-8", newline="\n")
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(old)
    work.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def make_ljspeech(out, seed, n_clips, metadata, workers):
    """Write `out`/LJSpeech-1.1/, whole or not at all; returns a one-line summary.

    Clips are gathered in a hidden folder beside it. An interrupted call leaves that there, and the
    next one with the same settings goes on from it.
    """
    rows = read_metadata(metadata)[:n_clips] if metadata else grammar(n_clips or 2_000, seed)
    label, stamp = describe(rows, seed, metadata)
    final = out / "LJSpeech-1.1"
    work = out / f".LJSpeech-1.1.{hashlib.sha256(stamp.encode()).hexdigest()[:8]}"
    try:
        found = stamp_of(final)
        if found == stamp and len(clips_in(final)) == len(rows):
            return f"{final}: complete already ({len(rows):,} clips; {label})"
        if final.exists() and "make_sample_data.py" not in found:
            fault = "was not written by this script and is left alone"
            raise UserError(f"{final} {fault}; name another folder with -out.")
        write_folder(work, final, rows, stamp, seed, workers)
        seconds = sum(soundfile.info(path).duration for path in clips_in(final))
    except OSError as error:
        shutil.rmtree(work, ignore_errors=True)
        reason = error.strerror or error
        raise UserError(f"cannot write {final} ({reason}); free space or change -out.") from error
    except ValueError as error:
        shutil.rmtree(work, ignore_errors=True)
        raise UserError(f"{error}; correct it.") from error
    return f"{final}: {len(rows):,} clips, {seconds / 60:.1f} minutes ({label})"
