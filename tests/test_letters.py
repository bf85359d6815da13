"""tools/letters.py: which transcripts the model of English letters may read, and that it learns."""

import math

import decoding
import runs
import utils
from conftest import write_corpus
from tools import letters

import pytest
import torch


def write_metadata(path, texts):
    """LJ Speech's table for these texts: {clip: normalised text}."""
    rows = [f"{clip}|as printed|{text}\n" for clip, text in texts.items()]
    path.write_text("".join(rows))


def test_only_training_transcripts_are_read(tmp_path):
    write_corpus(tmp_path)
    rows, _ = utils.load_ljspeech(tmp_path)
    held_out = {clip: "held out" for clip, _, _ in (*rows["val"], *rows["test"])}
    assert len(held_out) == len(rows["val"]) + len(rows["test"]) > 1
    texts = {
        **held_out,
        "LJ002-0001": "the first that may be read",
        "LJ002-0002": rows["val"][0][1],  # a held-out sentence, read once more
        "LJ037-0212": "the last",
        "LJ037-0213": "the first of validation",
        "LJ040-0046": "its last",
        "LJ040-0047": "the first of the test",
    }
    write_metadata(tmp_path / "all.csv", texts)
    training, validation = letters.split_texts(tmp_path / "all.csv", tmp_path)
    training, validation = (
        [utils.decode(tokens.tolist()) for tokens in split] for split in (training, validation)
    )
    assert training == ["the first that may be read", "the last"]
    assert validation == ["the first of validation", "its last"]


def test_it_learns_what_comes_next(tmp_path, capsys):
    write_corpus(tmp_path)
    texts = {f"LJ00{i}-0001": "abcde" * (1 + i) for i in range(1, 9)}
    texts["LJ037-0300"] = "abcdeabcde"  # a validation clip
    write_metadata(tmp_path / "all.csv", texts)
    flags = ["-metadata", tmp_path / "all.csv", "-data", tmp_path, "-out", tmp_path / "out"]
    letters.main(letters.make_parser().parse_args([*map(str, flags), "-epochs", "60"]))

    lines = [line for line in capsys.readouterr().out.splitlines() if "bits" in line]
    bits = [float(line.split()[2]) for line in lines]
    assert bits[-1] < 1 < bits[0]
    saved = runs.load_checkpoint(tmp_path / "out" / "models" / "letters.pt")
    assert saved["vocabulary"] == utils.VOCABULARY
    assert saved["model"]["to_logits.bias"].dtype == torch.float16

    model = decoding.LetterModel().eval()
    model.load_state_dict({name: weights.float() for name, weights in saved["model"].items()})
    tokens = torch.tensor([utils.encode("abcdeabcde")])
    log_p = model(tokens[:, :-1])[0].log_softmax(dim=-1)[0]
    nats = -log_p[range(11), tokens[0, 1:]].mean().item()
    assert bits[-1] == pytest.approx(nats / math.log(2), rel=0.02, abs=0.002)
