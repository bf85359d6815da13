"""A stand-in for LJ Speech: sentences spoken by a neural voice, in LJ Speech's files.

The voice is that of the package hibari-tts (American English, female). It says sentences of a small
grammar, or the transcripts of a metadata file like LJ Speech's. Pace and noise vary from clip to
clip. A clip depends only on its text, its row in the table and the seed, so on one machine the same
seed gives the same files, however many processes share the work.
"""

import functools
import hashlib
import io
import itertools
import os
import re
import shutil
from importlib.metadata import version
from pathlib import Path

import runs
from runs import UserError

import numpy as np
from tqdm import tqdm

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime would send what it is used for

EDITION = 4  # raise it when the clips change: samples already written are then made again
N_CLIPS = 1_200  # sentences: enough for both decoders to learn the grammar well


# ----------------------------------------------------------------------------------- what is said
WORDS = {  # few, so that each is heard often; every letter of the alphabet occurs
    "person": "sailor queen doctor judge baker".split(),
    "quality": "old quiet brave lazy".split(),
    "past": "found sold watched fixed".split(),
    "verb": "find sell watch fix".split(),
    "kind": "red long wooden golden".split(),
    "thing": "ship garden letter bridge box".split(),
    "number": "two five seven twenty-one".split(),
    "things": "ships maps clocks horses".split(),
    "when": ["at noon", "in June", "by the sea", "last winter"],
}
TEMPLATES = (
    "The {quality} {person} {past} the {thing}.",
    "{when}, the {person} {past} {things}.",
    "Did the {person} {verb} {number} {things}?",
    "The {person} {past} the {kind} {thing}.",
    "Who {past} the {thing} {when}?",
)


def all_sentences():
    """Every sentence of the grammar, once each, in a fixed order."""
    sentences = []
    for template in TEMPLATES:
        slots = re.findall(r"{(\w+)}", template)
        for words in itertools.product(*(WORDS[slot] for slot in slots)):
            sentence = template.format(**dict(zip(slots, words, strict=True)))
            sentences.append(sentence[0].upper() + sentence[1:])
    return sentences


def grammar(n_clips, seed):
    """`n_clips` rows (id, transcript, normalised transcript) for the table.

    No sentence comes twice, so those held out for testing were never heard in training.
    """
    sentences = all_sentences()
    if n_clips > len(sentences):
        raise UserError(f"the grammar has only {len(sentences):,} sentences; lower -n_clips.")
    order = np.random.default_rng(seed).permutation(len(sentences))[:n_clips]
    rows = []
    for i, chosen in enumerate(order):
        clip = f"SY{i // 100 + 1:03}-{i % 100 + 1:04}"
        rows.append((clip, sentences[chosen], sentences[chosen]))
    return rows


# --------------------------------------------------------------------------------- how it is said
SAMPLE_RATE = 22_050  # of LJ Speech, samples a second
VOICE_RATE = 24_000  # of the voice
SPEEDS = (0.75, 1.05)  # times the voice's own pace: its clips are then as long as LJ Speech's
SAMPLE_SPEEDS = (0.95, 1.05)  # for the grammar: shorter clips are easier to align
SILENCE = 0.02  # of a clip's peak: what is quieter than this, at either end, is silence
LEAD, TAIL = 0.02, 0.10  # seconds of silence kept before and after, as in LJ Speech


@functools.cache
def voice():
    """The voice, loaded once per process; on one thread, so that it always rounds the same way."""
    import hibari

    return hibari.Hibari(threads=1)


def trim(sound):
    """Cut the silence at both ends of `sound` (n_samples,), except for LEAD and TAIL seconds."""
    loud = np.flatnonzero(np.abs(sound) > SILENCE * np.abs(sound).max())
    start = max(0, loud[0] - round(LEAD * VOICE_RATE))
    stop = loud[-1] + 1 + round(TAIL * VOICE_RATE)
    return sound[start:stop]


def say(text, speed, seed):
    """`text` as 16-bit samples (n_samples,) at SAMPLE_RATE; None if the voice cannot say it.

    speed: times the voice's own pace; seed: of the noise in its consonants and its breath.
    """
    from scipy.signal import resample_poly

    sound = voice()(text, speed=speed, seed=seed)  # (n_samples,) float32
    if not sound.any():
        return None
    sound = resample_poly(trim(sound), SAMPLE_RATE // 150, VOICE_RATE // 150)
    sound = sound / max(1, np.abs(sound).max())  # a few clips would be too loud for 16 bits
    return np.round(sound * 32_767).astype(np.int16)


def speak(path, text, speeds, seed):
    """Say `text` into the sound file `path`; `seed` draws the speed, within `speeds`, and noise."""
    import soundfile

    random = np.random.default_rng(seed)
    speed = random.uniform(*speeds)
    sound = say(text, speed, seed=int(random.integers(2**32)))
    if sound is None:
        raise UserError(f"the voice cannot say the transcript of {path.stem} ({text}); correct it.")
    wav = io.BytesIO()  # written by Python, so that a full disk is an OSError
    soundfile.write(wav, sound, SAMPLE_RATE, "PCM_16", format="WAV")
    with runs.write_atomically(path) as temporary:
        temporary.write_bytes(wav.getvalue())


def speak_all(rows, folder, speeds, seed):
    """Speak every row that has no file `folder`/<id>.wav yet, with a progress bar."""
    jobs = []
    for i, (clip, _, text) in enumerate(rows):
        path = folder / f"{clip}.wav"
        if not path.exists():
            jobs.append((path, text, speeds, [seed, i]))
    spoken = runs.side_by_side(speak, jobs)
    for _ in tqdm(spoken, "speaking", len(jobs), leave=False, disable=runs.QUIET):
        pass


# ------------------------------------------------------------------------------------- the folder
def make_ljspeech(out, seed, n_clips, metadata):
    """Write `out`/LJSpeech-1.1/, whole or not at all; returns a one-line summary.

    The clips are written to a hidden folder beside it, which is renamed at the end. An interrupted
    call leaves that folder, and the next call with the same settings goes on with it.
    """
    if metadata:
        import utils  # imports torch, for which a call without metadata need not wait

        what = f"stand-in: transcripts of {Path(metadata).name}"
        rows, speeds = utils.read_metadata(metadata)[:n_clips], SPEEDS
    else:
        what = "sample: sentences from a small grammar"
        rows, speeds = grammar(n_clips or N_CLIPS, seed), SAMPLE_SPEEDS
    label = f"synthetic {what}, spoken by a neural voice (hibari-tts)"
    table = "".join("|".join(row) + "\n" for row in rows)
    digest = hashlib.sha256(table.encode()).hexdigest()
    maker = f"make_sample_data.py, hibari-tts {version('hibari-tts')}"
    settings = f"{maker}, edition {EDITION}, seed {seed}, table {digest}"
    readme = f"{label}\n{settings}\n"  # two folders with the same README have the same clips

    final = out / "LJSpeech-1.1"
    summary = f"{len(rows):,} clips ({label})"
    if final.exists():
        found = (final / "README").read_text("utf-8") if (final / "README").exists() else ""
        if found == readme:
            return f"{final}: complete already, {summary}"
        if "make_sample_data.py" not in found:
            raise UserError(f"{final} is not from this script; name another folder with -out.")

    work = out / f".LJSpeech-1.1-{hashlib.sha256(readme.encode()).hexdigest()[:8]}"
    (work / "wavs").mkdir(parents=True, exist_ok=True)
    speak_all(rows, work / "wavs", speeds, seed)
    (work / "metadata.csv").write_text(table, "utf-8", newline="\n")
    (work / "README").write_text(readme, "utf-8", newline="\n")
    shutil.rmtree(final, ignore_errors=True)
    work.rename(final)
    return f"{final}: {summary}"
