"""tools/make_model.py: weights in half precision, their scores, and what the card says."""

from dataclasses import asdict

import runs
import transcribe
import utils
from conftest import write_corpus
from report import readme
from runs import UserError
from tools import make_model

import numpy as np
import pytest
import soundfile
import torch

Q3 = runs.load_definitions(transcribe.NOTEBOOK, device="cpu")
SCORES = {"n": 300, "damerau_levenshtein": 0.75, "wer": 0.5, "cer": 0.25, "interval": [0.7, 0.8]}


@pytest.fixture(params=["lstm", "transformer"])
def decoder(request):
    return request.param


@pytest.fixture
def checkpoint(tmp_path, decoder):
    """A checkpoint of a tiny model, as fine-tuning leaves it."""
    torch.manual_seed(0)
    sizes = Q3.ModelSizes(decoder, 60, 2.0, d=16, n_blocks=1)
    model = Q3.SpeechToText(sizes)
    result = {
        "run": f"q3-{decoder}",
        "config": {"seed": 42, "epochs": 3, "d": 16, "n_blocks": 1},
        "data": {"source": "tones", "counts": {"train": 7}},
        "parameters": 1234,
        "command": "make model",
        "status": "finished",
        "started_from": {
            "data": {"source": "synthetic tones", "counts": {"train": 9}},
            "spoken": {"search": SCORES},
        },
    }
    weights = {"model": model.state_dict(), "sizes": asdict(sizes)}
    path = tmp_path / "checkpoints" / "tuned.pt"
    probe = runs.make_probe(model, Q3.answer, Q3.QUESTION)
    runs.save_checkpoint(path, {**weights, "probe": probe, "result": result})
    return path


def make(*flags):
    make_model.main(make_model.make_parser().parse_args(list(map(str, flags))))


def test_model_scores_and_card(tmp_path, checkpoint, decoder, monkeypatch):
    write_corpus(tmp_path)
    (tmp_path / "joe").mkdir()
    tone = 0.1 * np.sin(np.arange(20_000) / 9)
    soundfile.write(tmp_path / "joe" / "LJ001-0011.wav", tone, utils.SAMPLE_RATE)
    (tmp_path / "joe" / "README").write_text("Joe, a tone\n")
    monkeypatch.chdir(tmp_path)  # features are kept in build/model
    flags = ["-data", tmp_path, "-out", tmp_path / "out", "-speakers", tmp_path / "joe"]
    make("-checkpoint", checkpoint, *flags)

    exact = runs.load_checkpoint(checkpoint)["model"]
    path = tmp_path / "out" / "models" / f"q3-{decoder}.pt"
    model = Q3.load_model(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, exact[name].half().float())
    result = runs.load_result(tmp_path / "out", f"q3-model-{decoder}")
    low, high = result["test"]["beam"]["interval"]
    assert low <= result["test"]["beam"]["damerau_levenshtein"] <= high
    assert result["test"]["greedy"]["n"] == result["test"]["beam"]["n"] == 2  # of the test split
    assert {scores["n"] for scores in result["validation"].values()} == {1}
    similarity = {
        float(share): scores["damerau_levenshtein"]
        for share, scores in result["validation"].items()
    }
    assert tuple(similarity) == make_model.LETTER_SHARES
    share = result["search"]["letter_share"]
    assert similarity[share] == max(similarity.values())
    assert model.search == result["search"] == runs.load_checkpoint(path)["search"]
    assert result["spoken"] == {"search": SCORES}
    counts = [scores["n"] for scores in result["recordings"].values()]
    assert counts == [2, 1, 2, 1]  # two clips; both in one recording; by telephone; one of Joe's
    assert [row[0] for row in readme.model_rows(result)][-1] == "Joe, a tone"
    facts = str(readme.model_facts(result))
    assert readme.model_rows(result)[0][1:3] == ["300", "0.750 [0.700,\u00a00.800]"]  # spoken
    assert facts.count("(chosen)") == 1
    for said in ("1,234", "9 clips (synthetic tones)", "7 clips (tones)", "`make model`"):
        assert said in facts

    checkpoint.unlink()
    make(*flags)  # now the model that was written is scored again
    again = runs.load_result(tmp_path / "out", f"q3-model-{decoder}")
    assert again["test"] == result["test"] and again["trained"] == result["trained"]


def test_a_checkpoint_that_was_not_fine_tuned_is_one_sentence(tmp_path, checkpoint):
    state = runs.load_checkpoint(checkpoint)
    del state["result"]["started_from"]
    runs.save_checkpoint(checkpoint, state)
    with pytest.raises(UserError, match="was not fine-tuned"):
        make_model.write_weights(Q3, checkpoint, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_a_folder_without_models_is_one_sentence(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="holds no model"):
        make("-data", tmp_path, "-out", tmp_path / "out")


def test_the_telephone_takes_low_and_high_tones_away():
    def loudness_of(frequency):
        seconds = torch.arange(utils.SAMPLE_RATE) / utils.SAMPLE_RATE
        heard = make_model.by_telephone([torch.sin(2 * torch.pi * frequency * seconds)])
        return heard.square().mean().sqrt().item()

    assert loudness_of(1_000) == pytest.approx(0.5**0.5, rel=0.02)
    assert loudness_of(60) < 0.01 and loudness_of(6_000) < 0.05
