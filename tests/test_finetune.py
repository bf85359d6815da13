"""tools/finetune.py: how clips are varied, by hand, and both trainings on a tiny corpus."""

import math

import runs
import utils
from conftest import write_corpus
from runs import UserError
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


def test_held_out_clips_are_not_trained_on(tmp_path):
    write_corpus(tmp_path)
    q3 = runs.load_definitions(finetune.NOTEBOOK, data=str(tmp_path), out=str(tmp_path / "out"))
    corpus = q3.load_corpus(q3.settings)
    clips = corpus.rows["train"]
    clip, text = clips[0][0], clips[3][1]  # a sentence may be read in more clips than its own
    kept = finetune.without(corpus, {clip, text, corpus.rows["val"][0][0]})
    assert kept.rows["train"] == [*clips[1:3], *clips[4:]]
    assert kept.info["counts"]["train"] == len(clips) - 2 == len(kept.features["train"])
    assert kept.info["held_out"] == 2
    for (_, text, _), tokens in zip(kept.rows["train"], kept.tokens["train"], strict=True):
        assert tokens.tolist() == utils.encode(text)
    assert torch.equal(kept.features["train"][0], corpus.features["train"][1])
    assert kept.rows["val"] == corpus.rows["val"]  # nothing is trained on these


def test_a_loss_that_is_not_a_number_ends_it(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    small = {"d": 16, "n_blocks": 1, "device": "cpu", "epochs": 2}
    given = {"data": str(tmp_path), "out": str(tmp_path / "out")}
    q3 = runs.load_definitions(finetune.NOTEBOOK, **given, **small)
    corpus = q3.load_corpus(q3.settings)
    run = q3.new_run("lstm", corpus, q3.settings)
    monkeypatch.setattr(q3, "train_epoch", lambda *_: math.nan)
    with pytest.raises(UserError, match="infinite or NaN"):
        finetune.finetune(run, q3, corpus)
    assert runs.load_result(tmp_path / "out", "q3-lstm")["status"] == "diverged"


@pytest.mark.parametrize("decoder", ["lstm", "transformer"])
def test_both_trainings(decoder, tmp_path, monkeypatch):
    """The fine-tuning starts from the first training's weights, and keeps its best epoch."""
    monkeypatch.setattr(finetune, "SCORED", 1)
    write_corpus(tmp_path / "spoken")
    write_corpus(tmp_path / "real", n_clips=8)
    small = {"d": 16, "n_blocks": 1, "device": "cpu"}
    load = runs.load_definitions
    monkeypatch.setattr(runs, "load_definitions", lambda *a, **k: load(*a, **k, **small))
    out = tmp_path / "out"
    flags = ["-spoken", tmp_path / "spoken", "-data", tmp_path / "real", "-out", out]
    flags += ["-epochs", 1, "-tuning_epochs", 2, "-decoder", decoder]
    finetune.main(finetune.make_parser().parse_args(list(map(str, flags))))
    with monkeypatch.context() as later:  # the first training is not made, nor scored, again
        later.setattr(finetune.make_model, "score_recordings", None)
        finetune.main(finetune.make_parser().parse_args([*map(str, flags), "-resume"]))
    assert runs.load_result(out / "varied", f"q3-{decoder}")["status"] == "finished"

    tuned = runs.load_checkpoint(out / "finetuned" / "checkpoints" / f"q3-{decoder}.pt")
    result = tuned["result"]
    similarity = [row["damerau_levenshtein"] for row in result["epochs"]]
    assert result["kept_epoch"] == 1 + similarity.index(max(similarity)) and len(similarity) == 2
    assert result["status"] == "finished" and result["varied"]["noise"] == 0.5
    start = result["started_from"]
    assert start["data"]["counts"]["train"] == 7  # of 9: two are real val and test clips
    assert start["data"]["held_out"] == 2
    assert {scores["n"] for scores in start["spoken"].values()} == {1}
    assert set(start["spoken"]) == {"greedy", "search", "search with letters"}

    first = out / "varied" / "checkpoints" / f"q3-{decoder}.pt"
    q3 = runs.load_definitions(finetune.NOTEBOOK, data=str(tmp_path / "real"), out=str(out))
    corpus = q3.load_corpus(q3.settings)
    run = finetune.start_from(first, q3, corpus)
    weights = run.model.state_dict()
    for name, tensor in runs.load_checkpoint(first)["model"].items():
        assert torch.equal(tensor, weights[name])
    assert not torch.equal(tuned["model"]["ctc.weight"], weights["ctc.weight"])
    kept = q3.load_model(out / "finetuned" / "checkpoints" / f"q3-{decoder}.pt")  # asks the probe
    for split, told in (
        ("val", result["epochs"][result["kept_epoch"] - 1]),
        ("test", result["test"]),
    ):
        metrics, _, _ = q3.evaluate(kept, corpus, split, q3.settings)
        assert metrics["damerau_levenshtein"] == pytest.approx(told["damerau_levenshtein"])
        assert metrics["loss"] == pytest.approx(
            told["loss" if split == "test" else "val_loss"], rel=1e-4
        )


def test_a_first_training_with_other_clips_left_out_is_not_gone_on_with(tmp_path):
    write_corpus(tmp_path)
    small = {"d": 16, "n_blocks": 1, "device": "cpu", "epochs": 1, "resume": 1}
    given = {"data": str(tmp_path), "out": str(tmp_path / "out")}
    q3 = runs.load_definitions(finetune.NOTEBOOK, **given, **small)
    corpus = q3.load_corpus(q3.settings)
    q3.train("lstm", corpus, q3.settings)
    fewer = finetune.without(corpus, {corpus.rows["train"][0][0]})
    with pytest.raises(UserError, match="is of a run with other data"):
        q3.train("lstm", fewer, q3.settings)
