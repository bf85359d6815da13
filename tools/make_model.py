"""Make the model that comes with the clone, from a checkpoint of the notebook: its weights in half
precision, its scores on the test clips of a corpus, and the card that says what it is.

    python -m tools.make_model -checkpoint build/real/checkpoints/q3-transformer-finetuned.pt \
        -data ../shared/data [-also recording.wav ...]

Writes report/models/q3.pt and README.md beside it, and report/results/q3-model.json. What is scored
is the file as it was written, read anew. `make model` does all of it from the data.
"""

import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import runs
import transcribe
import utils
from runs import UserError
from tools.definitions import load_definitions

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------------- the weights
def write_weights(checkpoint, path):
    """Save the checkpoint's weights at `path` as float16.

    Returns the result of its training and the model's sizes.
    """
    state = runs.load_checkpoint(checkpoint)
    if state is None:
        raise UserError(f"there is no checkpoint {checkpoint}; train it first.")
    trained = state["result"]
    if "started_from" not in trained:
        raise UserError(f"{checkpoint} was not fine-tuned (INIT_FROM); name one that was.")
    weights = {name: tensor.half() for name, tensor in state["model"].items()}
    identity = {"config": trained["config"], "data": trained["data"]}
    runs.save_checkpoint(path, identity, {"sizes": state["sizes"], "model": weights})
    return trained, state["sizes"]


# -------------------------------------------------------------------------------------- the scores
def scores_of(q3, references, hypotheses):
    """The five scores, and in which interval the mean similarity of other clips would lie."""
    similarity = [q3.damerau_levenshtein(a, b) for a, b in zip(references, hypotheses)]
    scores = q3.score(references, hypotheses)
    return {**scores, "interval": q3.bootstrap_interval(similarity)}


def score_greedy(q3, model, corpus):
    """Scores of the test clips as the assignment takes them."""
    exact = replace(q3.settings, bf16=0)
    _, references, hypotheses = q3.evaluate(model, corpus, "test", exact)
    return scores_of(q3, references, hypotheses)


def score_beam(q3, model, corpus):
    """Scores of the test clips as transcribe.py writes them, and what it wrote."""
    references, hypotheses, clips = [], [], []
    rows = corpus.rows["test"]
    for name, text, path in tqdm(rows, "transcribing", leave=False, disable=runs.QUIET):
        reference = utils.decode(utils.encode(text))
        hypothesis = transcribe.transcribe(model, path)
        clip = {"clip": name, "reference": reference, "hypothesis": hypothesis}
        clip["damerau_levenshtein"] = q3.damerau_levenshtein(reference, hypothesis)
        references.append(reference)
        hypotheses.append(hypothesis)
        clips.append(clip)
    return scores_of(q3, references, hypotheses), clips


def seconds_for(files, weights):
    """How long transcribe.py takes for these files, its start included."""
    command = [sys.executable, ROOT / "transcribe.py", "-model", weights, *files]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


# ---------------------------------------------------------------------------------------- the card
def card(result):
    """The text of the card: all numbers are the result's."""
    config, test, trained = result["config"], result["test"], result["trained"]
    rows = []
    for name, how in (("greedy", "greedy, as the assignment asks"), ("beam", "`transcribe.py`")):
        scores = test[name]
        low, high = scores["interval"]
        similarity = f"{scores['damerau_levenshtein']:.3f} ({low:.3f} to {high:.3f})"
        rows.append(f"| {how} | {similarity} | {scores['wer']:.3f} | {scores['cer']:.3f} |")
    others = ""
    if result["others"]:
        lines = ["", "Another voice:", "", "| file | written |", "|---|---|"]
        for row in result["others"]:
            lines.append(f"| `{row['file']}` | {row['text']} |")
        others = "\n".join([*lines, ""])
    counts = result["data"]["counts"]
    fill = {
        "decoder": config["decoder"],
        "parameters": f"{trained['parameters']:,}",
        "megabytes": f"{result['bytes'] / 1e6:.1f}",
        "blocks": config["n_blocks"],
        "d": config["d"],
        "start": trained["started_from"]["data"]["source"],
        "n_train": counts["train"],
        "n_test": counts["test"],
        "source": result["data"]["source"],
        "rows": "\n".join(rows),
        "seconds": f"{result['seconds_for_ten_clips']:.0f}",
        "machine": result["environment"]["processor"],
        "others": others,
        "command": result["command"],
    }
    return textwrap.dedent(CARD).format(**fill)


CARD = """\
    # The model that comes with the clone: q3.pt

    English speech to text, letter by letter, for `transcribe.py` and the last section of the
    notebook. This page is written by `tools/make_model.py` from `report/results/q3-model.json`.

    **Architecture.** The encoder of the notebook ({blocks} blocks, hidden size {d}) with the
    {decoder} decoder and the CTC layer: {parameters} parameters and the layer, in float16,
    {megabytes} MB. Load it with `transcribe.load_model`, or
    `torch.load(..., weights_only=True)`.

    **Data.** First, {start}:
    the official training part, in the voice of the package hibari-tts (Apache License 2.0). Then
    {n_train} real clips of the same part of LJ Speech 1.1 (public domain), one woman reading from
    seven books. No sentence of the test clips was read or heard in training.

    **Scores** on {n_test} real clips of the official test part. Data: {source}. Similarity is
    1 − Damerau–Levenshtein distance / length of the longer text, mean over clips, with the
    interval in which a bootstrap over the clips finds 95 % of the means.

    | decoding | similarity | word error rate | letter error rate |
    |---|---|---|---|
    {rows}

    Ten clips take {seconds} s, start included ({machine}).
    {others}
    **What it is bad at.** It has heard one synthetic and one real voice, both female and American,
    reading prose in a quiet room: other voices, accents, children, noise, telephones and
    spontaneous speech cost many more errors. It knows words only as sequences of letters; names
    and numbers suffer. It writes lower case, and of punctuation only , . ? -. It writes something
    for music and silence too.

    Made by `{command}`.
"""


# ------------------------------------------------------------------------------------ command line
def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.flag("checkpoint", type=Path, required=True, help="of the notebook's training")
    parser.flag("data", type=Path, required=True, help="the folder of the clips that are scored")
    parser.flag("out", type=Path, default="report", help="folder to write to")
    parser.flag("also", nargs="*", default=[], help="other recordings, whose text the card shows")
    return parser


def main(args):
    """Write the weights, score them, save the result, write the card."""
    runs.check_writable(args.out)
    weights = args.out / "models" / "q3.pt"
    trained, sizes = write_weights(args.checkpoint, weights)
    model = transcribe.load_model(weights)
    q3 = SimpleNamespace(**load_definitions(DATA=str(args.data), OUT=str(args.out), DEVICE="cpu"))
    corpus = q3.load_corpus(q3.settings)
    config = {**trained["config"], **sizes}
    command = runs.command_line()
    result = runs.new_result("q3", "q3-model", command, config, corpus.info, "cpu")
    result["test"]["greedy"] = score_greedy(q3, model, corpus)
    result["test"]["beam"], result["clips"] = score_beam(q3, model, corpus)
    ten = [path for _, _, path in corpus.rows["test"][:10]]
    result["seconds_for_ten_clips"] = seconds_for(ten, weights)
    result["others"] = []
    for file in args.also:
        text = transcribe.transcribe(model, file)
        result["others"].append({"file": Path(file).name, "text": text})
    result["bytes"] = weights.stat().st_size
    origin = ("run", "parameters", "started_from", "command")
    result["trained"] = {key: trained[key] for key in origin}
    result["status"] = "finished"
    runs.save_result(args.out, result)
    with runs.write_atomically(args.out / "models" / "README.md") as temporary:
        temporary.write_text(card(result), encoding="utf-8")
    print(f"{weights}: {result['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    runs.run_script(main, make_parser())
