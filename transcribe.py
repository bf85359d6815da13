"""Write down what is said in sound files, with the trained model that comes with the clone.

    python transcribe.py a.wav b.flac ...

Prints one line for each file, in the order given: its path, a tab, its text; nothing else on
stdout. The model (or, with -model, a checkpoint of the notebook) has learned from clips of at most
ten seconds that begin with their first word. So a recording is first cut at its pauses, and each
stretch of speech is written down by itself.

The text is found by a beam search in which the decoder, the encoder's CTC layer and a small model
of English letters vote together. It is in decoding.py, as is the greedy decoding that the scores of
the assignment use.
"""

import functools
import os
import sys
from pathlib import Path

import decoding
import runs
import utils
from runs import UserError

import torch
from tqdm import tqdm

NOTEBOOK = runs.ROOT / "hw2-q3.ipynb"
MODEL = runs.ROOT / "report" / "models" / "q3-transformer.pt"
LETTERS = MODEL.with_name("letters.pt")

LONGEST_STRETCH = 10.0  # seconds; no clip of LJ Speech is longer than 10.1
PAUSE = 0.5  # seconds without speech that end a stretch
MARGIN = 0.15  # seconds of sound that are kept before and after a stretch
VAD_RATE = 16_000  # Hz, which the speech detector was made for


# ------------------------------------------------------------------------------------- recordings
@functools.cache
def speech_detector():
    """Silero's speech detector and the function that runs it: (model, function)."""
    n_threads = torch.get_num_threads()
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime would send what it is used for
    import silero_vad

    torch.set_num_threads(n_threads)  # the import sets it to 1
    return silero_vad.load_silero_vad(onnx=True), silero_vad.get_speech_timestamps


def stretches_of_speech(samples):
    """[(start, stop)] in samples (n,): where somebody speaks, at most LONGEST_STRETCH each.

    Longer speech is cut at its longest pause.
    """
    model, get_speech_timestamps = speech_detector()
    found = get_speech_timestamps(
        utils.resample(samples, utils.SAMPLE_RATE, VAD_RATE),
        model,
        sampling_rate=VAD_RATE,
        max_speech_duration_s=LONGEST_STRETCH,
        min_silence_duration_ms=1000 * PAUSE,
        speech_pad_ms=1000 * MARGIN,
    )
    ratio = utils.SAMPLE_RATE / VAD_RATE
    stretches = [(round(ratio * one["start"]), round(ratio * one["end"])) for one in found]
    return [(a, min(b, len(samples))) for a, b in stretches if b - a >= utils.N_FFT]


@functools.cache
def letter_model():
    """The model of English letters that comes with the clone; None where the vocabulary differs."""
    saved = runs.load_checkpoint(LETTERS)
    if saved["vocabulary"] != utils.VOCABULARY:
        print(f"{LETTERS.name} knows another vocabulary: the search does without", file=sys.stderr)
        return None
    model = decoding.LetterModel()
    runs.load_weights(model, {name: w.float() for name, w in saved["model"].items()}, LETTERS)
    return model.eval()


def write_down(model, samples, letter_share=None):
    """What `model` writes for one stretch (n,).

    letter_share: weight of the letter model's vote; None: that of the model's file.
    """
    if letter_share is None:
        chosen = getattr(model, "search", {})  # a model that was just trained has none
        letter_share = chosen.get("letter_share", decoding.LETTER_SHARE)
    device = next(model.parameters()).device
    features = utils.centre(utils.log_mel(samples)).to(device)  # (T, 80)
    max_tokens = min(250, model.sizes.n_positions - 1)  # the transformer has no more positions
    letters = letter_model() if letter_share else None
    votes = {"letters": letters, "letter_share": letter_share}
    return utils.decode(decoding.beam_search(model, features, max_tokens, **votes)).strip()


def write_stretches(model, samples, name="recording", letter_share=None):
    """Yield what `model` writes for samples (n,): (start, stop, text) for each stretch of speech.

    A text may be empty. name: of the progress bar, which is shown for two stretches and more.
    """
    stretches = stretches_of_speech(samples)
    without_bar = len(stretches) < 2 or runs.QUIET
    for start, stop in tqdm(stretches, name, leave=False, disable=without_bar):
        yield start, stop, write_down(model, samples[start:stop], letter_share)


def transcribe_samples(model, samples, name="recording", letter_share=None):
    """`write_stretches` as a list."""
    return list(write_stretches(model, samples, name, letter_share))


def text_of(written):
    """The texts of all stretches, joined."""
    return " ".join(text for _, _, text in written if text)


def why_no_text(written):
    """Why `text_of` is empty, if it is."""
    return "the model wrote nothing" if written else "nobody speaks in it"


def transcribe(model, path):
    """`transcribe_samples` for the sound file `path`."""
    return transcribe_samples(model, utils.read_audio(path), Path(path).name)


# ----------------------------------------------------------------------------------- command line
def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.epilog = (
        "WAV, FLAC, OGG and MP3 files of any sample rate, with any number of channels, as long as "
        "memory allows (an hour takes 1.2 GB in mono at 22,050 Hz, 3.2 GB in stereo at 48,000 Hz). "
        "Convert others first: ffmpeg -i my.m4a my.wav. A minute of speech takes ten to "
        "twenty-five seconds on one core."
    )
    parser.add_argument("files", nargs="+", type=Path, help="sound files")
    parser.flag("model", type=Path, default=MODEL, help="a checkpoint of the notebook")
    parser.flag("device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    return parser


def main(args):
    """Print a line for each file; those that cannot be read are named at the end."""
    load_model = runs.load_definitions(NOTEBOOK).load_model
    model = load_model(args.model, runs.pick_device(args.device))
    problems = []
    for path in args.files:
        try:
            written = transcribe(model, path)
        except UserError as error:
            problems.append(str(error))
            continue
        text = text_of(written)
        print(f"{path}\t{text}", flush=True)
        if not text:
            print(f"{path}: {why_no_text(written)}.", file=sys.stderr)
    if problems:
        raise UserError(" ".join(problems))


if __name__ == "__main__":
    runs.run_script(main, make_parser())
