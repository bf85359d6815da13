"""tools/make_model.py: half the precision, scores of the file as it is, and a card made of them."""

import json
from dataclasses import asdict, replace

import runs
import transcribe
from conftest import write_corpus
from runs import UserError
from tools import make_model
from tools.definitions import load_definitions

import numpy as np
import pytest
import soundfile
import torch

Q3 = load_definitions(DEVICE="cpu")


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of a tiny model, as a fine-tuning run of the notebook leaves it."""
    sizes = replace(Q3["ModelSizes"]("transformer", 40, 2.0), d=16, n_blocks=1)
    torch.manual_seed(0)
    model = Q3["SpeechToText"](sizes)
    result = {
        "run": "q3-transformer-finetuned",
        "config": {"seed": 42, "epochs": 3},
        "data": {"source": "tones"},
        "parameters": 1234,
        "command": "make q3",
        "started_from": {"data": {"source": "synthetic tones"}},
    }
    state = {"model": model.state_dict(), "sizes": asdict(sizes), "result": result}
    path = tmp_path / "checkpoints" / "q3-transformer-finetuned.pt"
    runs.save_checkpoint(path, {}, state)
    return path


def test_model_scores_and_card(tmp_path, checkpoint):
    write_corpus(tmp_path)
    soundfile.write(tmp_path / "Front.wav", 0.1 * np.sin(np.arange(20_000) / 9), 22_050)
    out = tmp_path / "out"
    flags = ["-checkpoint", checkpoint, "-data", tmp_path, "-out", out]
    flags += ["-also", tmp_path / "Front.wav"]
    make_model.main(make_model.make_parser().parse_args(list(map(str, flags))))

    exact = runs.load_checkpoint(checkpoint)["model"]
    model = transcribe.load_model(out / "models" / "q3.pt")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, exact[name].half().float())
    result = json.loads((out / "results" / "q3-model.json").read_text())
    assert result["status"] == "finished"
    low, high = result["test"]["beam"]["interval"]
    assert low <= result["test"]["beam"]["damerau_levenshtein"] <= high
    assert result["bytes"] == (out / "models" / "q3.pt").stat().st_size
    text = (out / "models" / "README.md").read_text()
    for said in ("1,234 parameters", "synthetic tones", "Front.wav", "hidden size 16"):
        assert said in text
    for row in ("greedy", "beam"):
        assert f"{result['test'][row]['wer']:.3f}" in text


def test_no_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="train it first"):
        make_model.write_weights(tmp_path / "none.pt", tmp_path / "q3.pt")


def test_a_checkpoint_that_was_not_fine_tuned_is_one_sentence(tmp_path, checkpoint):
    state = runs.load_checkpoint(checkpoint)
    del state["result"]["started_from"]
    runs.save_checkpoint(checkpoint, {}, state)
    with pytest.raises(UserError, match="was not fine-tuned"):
        make_model.write_weights(checkpoint, tmp_path / "q3.pt")
    assert not (tmp_path / "q3.pt").exists()
