"""Score the model that comes with the clone on recordings of several kinds, and write its card.

    python -m tools.make_model -data FOLDER [-speakers FOLDER ...] [-checkpoint FILE]

Writes report/results/q3-model.json and, beside report/models/q3.pt, README.md. With -checkpoint,
what `tools.finetune` left becomes report/models/q3.pt first, in half precision; what is scored is
that file, read anew. Each folder of -speakers has test clips in another voice, <id>.wav, and a
README whose first line says whose it is. `make model` does all of it from the data.
"""

import textwrap
import time
from pathlib import Path

import runs
import transcribe
import utils
from runs import UserError

import numpy as np
import soundfile
import torch
from tqdm import tqdm


# ------------------------------------------------------------------------------------- the weights
def write_weights(q3, checkpoint, path):
    """Save the checkpoint's weights at `path` as float16, with where they come from."""
    saved = runs.load_checkpoint(checkpoint)
    trained = saved.get("result", {})
    if "started_from" not in trained:
        raise UserError(f"{checkpoint} was not fine-tuned; name one that `make model` trained.")
    weights = {name: tensor.half() for name, tensor in saved["model"].items()}
    model = q3.load_model(checkpoint)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    origin = ("run", "parameters", "started_from", "command", "config", "data")
    state = {
        "sizes": saved["sizes"],
        "model": weights,
        "probe": q3.make_probe(model),
        "trained": {key: trained[key] for key in origin},
    }
    runs.save_checkpoint(path, state)


# ---------------------------------------------------------------------------------- the recordings
def room(seconds, decibels=-40):
    """Noise of a quiet room (n,): weaker at high frequencies, `decibels` below full scale."""
    n = int(seconds * utils.SAMPLE_RATE)
    white = np.fft.rfft(np.random.default_rng(0).normal(size=n))
    noise = np.fft.irfft(white / np.sqrt(np.arange(len(white)) + 50 * seconds), n)
    noise *= 10 ** (decibels / 20) / np.sqrt(np.mean(noise**2))
    return torch.from_numpy(noise.astype(np.float32))


def with_pauses(clips):
    """Two clips in one recording: 2 s of a room before, 4 s between, and 2 s behind."""
    first, second = clips
    return torch.cat([room(2), first, room(4), second, room(2)])


def by_telephone(clips):
    """A clip in a telephone's band, 300 to 3,400 Hz, 8,000 samples a second."""
    from scipy.signal import butter, sosfilt

    (samples,) = clips
    band = butter(4, (300, 3400), "bandpass", fs=utils.SAMPLE_RATE, output="sos")
    samples = torch.from_numpy(sosfilt(band, samples.numpy()).astype(np.float32))
    narrow = utils.resample(samples, utils.SAMPLE_RATE, 8_000)
    return utils.resample(narrow, 8_000, utils.SAMPLE_RATE)


def as_it_is(clips):
    return clips[0]


# -------------------------------------------------------------------------------------- the scores
def scores_of(q3, references, hypotheses):
    """The five scores, and in which interval the mean similarity of other clips would lie."""
    similarity = [q3.damerau_levenshtein(a, b) for a, b in zip(references, hypotheses)]
    scores = q3.score(references, hypotheses)
    return {**scores, "interval": q3.bootstrap_interval(similarity), "n": len(references)}


def score_greedy(q3, model, corpus):
    """Scores of the test clips as the assignment takes them."""
    _, references, hypotheses = q3.evaluate(model, corpus, "test", q3.settings)
    return scores_of(q3, references, hypotheses)


def score_recordings(q3, model, rows, record=as_it_is, n_clips=1, with_letters=True):
    """Scores of what transcribe.py writes for recordings of `n_clips` clips each."""
    references, hypotheses = [], []
    groups = [rows[i : i + n_clips] for i in range(0, len(rows) - n_clips + 1, n_clips)]
    for group in tqdm(groups, record.__name__, leave=False, disable=runs.QUIET):
        samples = record([utils.read_audio(path) for _, _, path in group])
        references.append(" ".join(utils.decode(utils.encode(text)) for _, text, _ in group))
        written = transcribe.transcribe_samples(model, samples, with_letters=with_letters)
        hypotheses.append(written)
    return scores_of(q3, references, hypotheses)


def speaker(folder, rows):
    """Whose voice it is, and the rows of the clips that are in the folder."""
    folder = Path(folder)
    name = runs.read_text(folder / "README").splitlines()[0]
    paths = [(clip, text, folder / f"{clip}.wav") for clip, text, _ in rows]
    return name, [row for row in paths if row[2].exists()]


def seconds_per_minute(q3, model, rows):
    """How long transcribe.py takes for a minute of speech."""
    seconds = sum(soundfile.info(path).duration for _, _, path in rows)
    started = time.perf_counter()
    score_recordings(q3, model, rows)
    return 60 * (time.perf_counter() - started) / seconds


def score_everything(q3, model, corpus, speakers):
    """The results file's scores: greedy, by transcribe.py, and of recordings that differ."""
    rows = corpus.rows["test"]
    recordings = {
        "clips as they are": score_recordings(q3, model, rows),
        "two clips with a quiet room (−40 dB) before, between and behind": score_recordings(
            q3, model, rows, with_pauses, n_clips=2
        ),
        "in the band of a telephone (300 to 3,400 Hz)": score_recordings(
            q3, model, rows, by_telephone
        ),
    }
    for folder in speakers:
        name, spoken = speaker(folder, rows)
        recordings[name] = score_recordings(q3, model, spoken)
    return {
        "test": {
            "greedy": score_greedy(q3, model, corpus),
            "beam": score_recordings(q3, model, rows, with_letters=False),
        },
        "recordings": recordings,
        "seconds_per_minute": seconds_per_minute(q3, model, rows[:10]),
    }


# ---------------------------------------------------------------------------------------- the card
def table_of_scores(result):
    named = {
        "clips as they are, greedy as the assignment asks": result["test"]["greedy"],
        "clips as they are, search without the model of letters": result["test"]["beam"],
        **result["recordings"],
    }
    lines = []
    for name, scores in named.items():
        low, high = scores["interval"]
        similarity = f"{scores['damerau_levenshtein']:.3f} ({low:.3f} to {high:.3f})"
        rates = f"{scores['wer']:.3f} | {scores['cer']:.3f}"
        lines.append(f"| {name} | {scores['n']} | {similarity} | {rates} |")
    return "\n".join(lines)


def card(result):
    """The text of the card: all numbers are the result's."""
    trained = result["trained"]
    return textwrap.dedent(CARD).format(
        config=result["config"],
        decoder=result["config"]["decoder"],
        parameters=f"{trained['parameters']:,}",
        megabytes=f"{result['bytes'] / 1e6:.1f}",
        start=trained["started_from"]["data"]["source"],
        n_train=trained["data"]["counts"]["train"],
        source=result["data"]["source"],
        table=table_of_scores(result),
        seconds=f"{result['seconds_per_minute']:.0f}",
        threads=result["environment"]["threads"],
        machine=result["environment"]["processor"],
        trained=trained["command"],
        command=result["command"],
    )


CARD = """\
    # The model that comes with the clone: q3.pt

    English speech to text, letter by letter, for `transcribe.py`, `make demo` and the last section
    of the notebook. This page is written by `tools/make_model.py` from
    `report/results/q3-model.json`.

    **Architecture.** The encoder of the notebook ({config[n_blocks]} blocks, hidden size
    {config[d]}) with the {decoder} decoder and the CTC layer: {parameters} parameters and the
    layer, in float16, {megabytes} MB. The notebook's `load_model` reads it and asks its probe.
    Beside it lies `letters.pt`, a model of English letters (one GRU, 0.5 MB) that votes in the
    search of `transcribe.py`; `tools/letters.py` trained it on transcripts of the training part.

    **Data.** First, {start}:
    the course's training part, in the voice of the package hibari-tts (Apache License 2.0). Then
    {n_train} real clips of the same part of LJ Speech 1.1 (public domain), one woman reading from
    seven books. No sentence of the test clips was read or heard in training.

    **Scores** on clips of the course's test part. Data: {source};
    other voices read the same texts. By `transcribe.py` but for the first two rows. Similarity is
    1 − Damerau–Levenshtein distance / length of the longer text, mean over recordings, with the
    interval in which a bootstrap over the recordings finds 95 % of the means.

    | recordings | how many | similarity | word error rate | letter error rate |
    |---|---|---|---|---|
    {table}

    A minute of speech takes {seconds} s ({machine}; threads: {threads}).

    **What it is bad at.** It is a model of one speaker: it has heard one synthetic and one real
    voice, both female and American, reading prose in a quiet room. Other voices, accents,
    children, noise, telephones and spontaneous speech cost many more errors. It knows words only as
    sequences of letters; names and numbers suffer. It writes lower case, and of punctuation only
    , . ? -.

    Trained by `{trained}`; scored by `{command}`.
"""


# ------------------------------------------------------------------------------------ command line
def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("data", type=Path, required=True, help="the folder of the clips that are scored")
    parser.flag("out", type=Path, default="report", help="folder to write to")
    parser.flag("checkpoint", type=Path, help="make this the model; without: score the one in -out")
    parser.flag(
        "speakers", nargs="*", default=[], help="folders of the test's texts in other voices"
    )
    return parser


def main(args):
    """Write the weights if they are new, score them, save the result, write the card."""
    runs.check_writable(args.out)
    here = {"data": str(args.data), "out": "build/model", "device": "cpu", "bf16": 0}
    q3 = runs.load_definitions(transcribe.NOTEBOOK, **here)
    path = args.out / "models" / "q3.pt"
    if args.checkpoint:
        write_weights(q3, args.checkpoint, path)
    saved = runs.load_checkpoint(path)
    model = q3.load_model(path)
    corpus = q3.load_corpus(q3.settings)

    config = {**saved["trained"]["config"], **saved["sizes"]}
    command = runs.command_line()
    result = runs.new_result("q3", "q3-model", command, config, corpus.info, "cpu")
    started = time.perf_counter()
    result.update(score_everything(q3, model, corpus, args.speakers))
    result["seconds"] = time.perf_counter() - started
    result["bytes"] = path.stat().st_size
    result["trained"] = saved["trained"]
    result["status"] = "finished"
    runs.save_result(args.out, result)
    with runs.write_atomically(args.out / "models" / "README.md") as temporary:
        temporary.write_text(card(result), encoding="utf-8")
    print(f"{path}: {result['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    runs.run_script(main, make_parser())
