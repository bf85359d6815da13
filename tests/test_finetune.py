"""tools/finetune.py: how clips are varied, by hand, and both trainings on a tiny corpus."""

import math

import runs
from conftest import write_corpus
from tools import finetune

import pytest
import torch


def test_pace_and_bands_by_hand():
    """The clip is a ramp over time or bands, so each value tells where it came from."""
    frames = torch.arange(100.0)[:, None].expand(100, 80)
    assert torch.equal(finetune.change_speed(frames, 1.0), frames)
    faster = finetune.change_speed(frames, 2.0)  # frame t is the mean of frames 2 t and 2 t + 1
    assert torch.allclose(faster[:, 0], 2 * torch.arange(50.0) + 0.5)

    bands = torch.arange(80.0).expand(5, 80)
    assert torch.equal(finetune.warp_bands(bands, 1.0, 0.0), bands)
    assert torch.allclose(finetune.warp_bands(bands, 0.5, 3.0), 0.5 * bands + 3.0)
    assert finetune.warp_bands(bands, 2.0, 0.0)[0, 50:].eq(79).all()  # the last one, again


def test_echo_by_hand():
    clip = torch.full((60, 80), -1.0)  # in units of four decades
    clip[10] = 0.0  # one loud frame
    power = 10 ** (4 * finetune.add_echo(clip, strength=0.5, decay=4.0))
    fading = [0.5 * math.exp(-k / 4) for k in range(14)]  # frame 13 hears the 13 before it
    heard = 1e-4 + fading[3] + 1e-4 * (sum(fading[1:]) - fading[3])
    assert power[9].max() < 1e-3 and power[10, 0] == pytest.approx(1, abs=1e-3)
    assert power[13, 0] == pytest.approx(heard, rel=1e-4)


def test_noise_has_the_power_that_was_asked_for():
    torch.manual_seed(0)
    noisy = finetune.add_noise(torch.full((20_000, 80), -0.5), level=-0.5, tilt=0.25)
    power = (10 ** (4 * noisy)).mean(dim=0)
    expected = 10**-2 + 10 ** (4 * torch.linspace(-0.75, -0.25, 80))
    assert torch.allclose(power, expected, rtol=0.05)


def test_training_clips_vary_and_the_others_do_not(tmp_path):
    write_corpus(tmp_path)
    q3 = runs.load_definitions(finetune.NOTEBOOK, data=str(tmp_path), out=str(tmp_path / "out"))
    corpus = q3.load_corpus(q3.settings)
    varied = finetune.varied(corpus)
    first, again = (varied.features["train"][0] for _ in range(2))
    assert first.shape[1] == 80 and not (first.shape == again.shape and torch.equal(first, again))
    assert list(map(len, varied.features["train"])) == list(map(len, corpus.features["train"]))
    assert torch.equal(varied.features["test"][0], corpus.features["test"][0])


def test_both_trainings(tmp_path, monkeypatch):
    """The fine-tuning starts from the first training's weights, and keeps its best epoch."""
    write_corpus(tmp_path / "spoken")
    write_corpus(tmp_path / "real", n_clips=8)
    small = {"d": 16, "n_blocks": 1, "device": "cpu"}
    load = runs.load_definitions
    monkeypatch.setattr(runs, "load_definitions", lambda *a, **k: load(*a, **k, **small))
    out = tmp_path / "out"
    flags = ["-spoken", tmp_path / "spoken", "-data", tmp_path / "real", "-out", out]
    flags += ["-epochs", 1, "-tuning_epochs", 2]
    finetune.main(finetune.make_parser().parse_args(list(map(str, flags))))

    tuned = runs.load_checkpoint(out / "finetuned" / "checkpoints" / "q3-transformer.pt")
    result = tuned["result"]
    similarity = [row["damerau_levenshtein"] for row in result["epochs"]]
    assert result["kept_epoch"] == 1 + similarity.index(max(similarity)) and len(similarity) == 2
    assert result["status"] == "finished" and result["varied"]["noise"] == 0.5
    assert result["started_from"]["data"]["counts"]["train"] == 9  # of 12 clips, not of 8

    first = out / "varied" / "checkpoints" / "q3-transformer.pt"
    q3 = runs.load_definitions(finetune.NOTEBOOK, data=str(tmp_path / "real"), out=str(out))
    corpus = q3.load_corpus(q3.settings)
    run = finetune.start_from(first, q3, corpus)
    weights = run.model.state_dict()
    for name, tensor in runs.load_checkpoint(first)["model"].items():
        assert torch.equal(tensor, weights[name])
    assert not torch.equal(tuned["model"]["ctc.weight"], weights["ctc.weight"])
    kept = q3.load_model(out / "finetuned" / "checkpoints" / "q3-transformer.pt")  # asks the probe
    for split, told in (
        ("val", result["epochs"][result["kept_epoch"] - 1]),
        ("test", result["test"]),
    ):
        metrics, _, _ = q3.evaluate(kept, corpus, split, q3.settings)
        assert metrics["damerau_levenshtein"] == pytest.approx(told["damerau_levenshtein"])
        assert metrics["loss"] == pytest.approx(
            told["loss" if split == "test" else "val_loss"], rel=1e-4
        )
