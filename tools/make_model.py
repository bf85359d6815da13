"""Score the models that come with the clone on recordings of several kinds.

    python -m tools.make_model -data FOLDER [-checkpoint FILE]

With -checkpoint, a checkpoint that `tools.finetune` saved becomes report/models/q3-<decoder>.pt, in
half precision; without, the models that are there are taken. The weight of the letter model in the
search of each is chosen on the validation clips and stored in its file; then the test clips are
scored once. report/results gets q3-model-<decoder>.json, with the scores of that choice and those
before the fine-tuning, too; `make readme` shows it on the models' card. Each folder of -speakers
holds test clips in another voice, <id>.wav, and a README whose first line says whose it is;
`make model` gives none.
"""

import time
from pathlib import Path

import runs
import transcribe
import utils
from runs import UserError

import numpy as np
import torch
from tqdm import tqdm

LETTER_SHARES = (0, 0.2, 0.4, 0.6)  # of which one is chosen on validation


# ------------------------------------------------------------------------------------- the weights
def write_weights(q3, checkpoint, folder):
    """Save the checkpoint's weights in `folder` as float16, with where they come from: the path."""
    saved = runs.load_checkpoint(checkpoint)
    trained = saved.get("result", {})
    if "started_from" not in trained or trained["status"] != "finished":
        problem = "was not fine-tuned to the end"
        raise UserError(f"{checkpoint} {problem}; name one that `make model` trained.")
    weights = {name: tensor.half() for name, tensor in saved["model"].items()}
    model = q3.load_model(checkpoint)
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    origin = ("run", "parameters", "started_from", "command", "config", "data")
    state = {
        "sizes": saved["sizes"],
        "model": weights,
        "probe": runs.make_probe(model, q3.answer, q3.QUESTION),
        "trained": {key: trained[key] for key in origin},
    }
    path = Path(folder) / f"q3-{saved['sizes']['decoder']}.pt"
    runs.save_checkpoint(path, state)
    return path


# ---------------------------------------------------------------------------------- the recordings
def room(seconds, decibels=-40):
    """Noise of a quiet room (n,): weaker at high frequencies, `decibels` below full scale."""
    n = int(seconds * utils.SAMPLE_RATE)
    white = np.fft.rfft(np.random.default_rng(0).normal(size=n))
    noise = np.fft.irfft(white / np.sqrt(np.arange(len(white)) + 50 * seconds), n)
    noise *= 10 ** (decibels / 20) / np.sqrt(np.mean(noise**2))
    return torch.from_numpy(noise.astype(np.float32))


def with_pauses(clips):
    """Two clips in one recording, with 2 s of a room before, 4 s between and 2 s after them."""
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
    """The five scores, and an interval for the mean similarity of other such clips."""
    pairs = zip(references, hypotheses, strict=True)
    similarity = [q3.damerau_levenshtein(a, b) for a, b in pairs]
    scores = q3.score(references, hypotheses)
    return {**scores, "interval": q3.bootstrap_interval(similarity), "n": len(references)}


def score_greedy(q3, model, corpus):
    """Scores of the test clips as the assignment asks for them: with greedy decoding."""
    _, references, hypotheses = q3.evaluate(model, corpus, "test", q3.settings)
    return scores_of(q3, references, hypotheses)


def score_recordings(q3, model, rows, record=as_it_is, n_clips=1, letter_share=None):
    """Scores of what transcribe.py writes for recordings of `n_clips` clips each.

    letter_share: of `transcribe.write_down`.
    """
    references, hypotheses = [], []
    groups = [rows[i : i + n_clips] for i in range(0, len(rows) - n_clips + 1, n_clips)]
    for group in tqdm(groups, record.__name__, leave=False, disable=runs.QUIET):
        samples = record([utils.read_audio(path) for _, _, path in group])
        references.append(" ".join(utils.decode(utils.encode(text)) for _, text, _ in group))
        written = transcribe.transcribe_samples(model, samples, letter_share=letter_share)
        hypotheses.append(transcribe.text_of(written))
    return scores_of(q3, references, hypotheses)


def speaker(folder, rows):
    """Whose voice it is, and the rows of those clips that are in the folder."""
    folder = Path(folder)
    name = runs.read_text(folder / "README").splitlines()[0]
    paths = [(clip, text, folder / f"{clip}.wav") for clip, text, _ in rows]
    return name, [row for row in paths if row[2].exists()]


def score_everything(q3, model, corpus, speakers):
    """The scores of the results file: greedy, by transcribe.py, and for other recordings."""
    rows = corpus.rows["test"]
    minutes = sum(map(len, corpus.features["test"])) * utils.HOP / utils.SAMPLE_RATE / 60
    started = time.perf_counter()
    as_they_are = score_recordings(q3, model, rows)
    seconds = time.perf_counter() - started
    recordings = {
        "clips as they are": as_they_are,
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
            "beam": score_recordings(q3, model, rows, letter_share=0),
        },
        "recordings": recordings,
        "seconds_per_minute": seconds / minutes,
    }


def score_letter_shares(q3, model, rows):
    """Scores of these clips with every weight of the letter model: {weight: scores}."""
    table = {}
    for share in LETTER_SHARES:
        table[share] = score_recordings(q3, model, rows, letter_share=share)
    return table


# ------------------------------------------------------------------------------------ command line
def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("data", type=Path, required=True, help="the folder of the clips that are scored")
    parser.flag("out", type=Path, default="report", help="folder to write to")
    parser.flag("checkpoint", type=Path, help="make this a model; without: score those in -out")
    parser.flag(
        "speakers", nargs="*", default=[], help="folders of the test's texts in other voices"
    )
    return parser


def score_file(q3, path, corpus, args):
    """Choose the weight of the letters on validation; score the model in a file, save the result.

    Of equally similar texts those with the smaller weight are chosen.
    """
    saved = runs.load_checkpoint(path)
    model = q3.load_model(path)
    config = {**saved["trained"]["config"], **saved["sizes"]}
    command = runs.command_line()
    name = f"q3-model-{saved['sizes']['decoder']}"
    result = runs.new_result("q3", name, command, config, corpus.info, "cpu")
    started = time.perf_counter()
    table = score_letter_shares(q3, model, corpus.rows["val"])
    best = max(table, key=lambda share: table[share]["damerau_levenshtein"])
    model.search = saved["search"] = {"letter_share": best}
    runs.save_checkpoint(path, saved)
    result["search"] = saved["search"]
    result["validation"] = {str(share): scores for share, scores in table.items()}
    result["spoken"] = saved["trained"]["started_from"].get("spoken", {})
    result.update(score_everything(q3, model, corpus, args.speakers))
    result["seconds"] = time.perf_counter() - started
    result["bytes"] = path.stat().st_size
    result["trained"] = saved["trained"]
    result["status"] = "finished"
    runs.save_result(args.out, result)
    print(f"{path}: {result['bytes'] / 1e6:.1f} MB")


def main(args):
    """Write the weights if they are new, and score what is there."""
    runs.check_writable(args.out)
    settings = {"data": str(args.data), "out": "build/model", "device": "cpu", "bf16": 0}
    q3 = runs.load_definitions(transcribe.NOTEBOOK, **settings)
    corpus = q3.load_corpus(q3.settings)
    folder = args.out / "models"
    if args.checkpoint:
        paths = [write_weights(q3, args.checkpoint, folder)]
    else:
        paths = sorted(folder.glob("q3-*.pt"))
    if not paths:
        raise UserError(f"{folder} holds no model; name one that `make model` trained.")
    for path in paths:
        score_file(q3, path, corpus, args)


if __name__ == "__main__":
    runs.run_script(main, make_parser())
