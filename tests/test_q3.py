"""hw2-q3.ipynb: the layers of the model, decoding, scores, training, the notebook as a whole."""

import contextlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from types import SimpleNamespace

import runs
import utils
from conftest import ROOT, SHARED, run_tool, write_corpus
from runs import UserError
from tools import install
from tools.definitions import NOTEBOOK, load_definitions
from utils import PAD, START, STOP, VOCABULARY

import nbformat
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

BOTH = pytest.mark.parametrize("decoder_name", ["lstm", "transformer"])


definitions = load_definitions(DATA="nowhere", OUT="nowhere", BF16="0", DEVICE="cpu")
q3 = SimpleNamespace(**definitions)


def new_model(decoder_name, **changed):
    """A small model without dropout."""
    small = {"d": 16, "n_heads": 2, "n_blocks": 2, "dropout": 0.0, **changed}
    return q3.SpeechToText(q3.ModelSizes(decoder_name, 60, 2.0, **small))


def random_batch(*n_frames, n_tokens=12, seed=0):
    torch.manual_seed(seed)
    x, lengths = utils.pad([torch.randn(n, utils.N_MELS) for n in n_frames], 0.0)
    text = torch.randint(4, len(VOCABULARY), (len(n_frames), n_tokens))
    text[:, 0] = START
    return x, lengths, text


# --------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("kind", ["self", "padding", "causal", "cross"])
def test_attention_equals_torchs(kind):
    torch.manual_seed(0)
    mine = q3.MultiHeadAttention(24, 3).double()
    theirs = nn.MultiheadAttention(24, 3, bias=False, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([mine.W_Q.weight, mine.W_K.weight, mine.W_V.weight]))
        theirs.out_proj.weight.copy_(mine.W_O.weight)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    z = torch.randn(2, 5, 24, dtype=torch.float64)
    key = z if kind == "cross" else x
    mask, later, padding = None, None, None
    if kind == "padding":
        mask = q3.padding_mask(torch.tensor([9, 4]), 9)
        padding = torch.arange(9) >= torch.tensor([[9], [4]])
    if kind == "causal":
        mask = q3.causal_mask(9, 9)
        later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected, _ = theirs(x, key, key, attn_mask=later, key_padding_mask=padding)
    torch.testing.assert_close(mine(x, key, key, mask), expected, atol=1e-12, rtol=0)


def test_attention_equals_the_written_formula():
    torch.manual_seed(0)
    attention = q3.MultiHeadAttention(6, 2)
    attention.keeps_weights = True
    x, z = torch.randn(1, 4, 6), torch.randn(1, 3, 6)
    heads = []
    for rows in (slice(0, 3), slice(3, 6)):  # head i uses rows of W^Q, W^K, W^V
        Q = x @ attention.W_Q.weight[rows].T
        K = z @ attention.W_K.weight[rows].T
        V = z @ attention.W_V.weight[rows].T
        scores = Q @ K.transpose(1, 2) / math.sqrt(3)
        heads.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ V)
    expected = torch.cat(heads, dim=-1) @ attention.W_O.weight.T
    torch.testing.assert_close(attention(x, z, z), expected, atol=1e-6, rtol=0)
    assert attention.weights.shape == (1, 2, 4, 3)
    assert torch.allclose(attention.weights.sum(-1), torch.ones(()))


def test_causal_mask_of_the_last_queries():
    whole = q3.causal_mask(5, 5)
    assert torch.equal(whole, torch.ones(5, 5, dtype=torch.bool).tril())
    assert torch.equal(q3.causal_mask(2, 5), whole[3:])
    assert q3.causal_mask(1, 5).all()


def test_sub_blocks_equal_their_formulas():
    torch.manual_seed(0)
    block = q3.ResidualAttentionBlock(8, 2, 0.0)
    layer, mha = block.attention_layer, block.attention_layer.attention
    x, z = torch.randn(2, 5, 8), torch.randn(2, 7, 8)

    def norm(x, parameters):
        centred = x - x.mean(-1, keepdim=True)
        return (
            centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * parameters.weight
            + parameters.bias
        )

    def mlp_sub_block(x):
        return norm(x + block.mlp(norm(x, block.norm_in)), block.norm_out)

    own = norm(x, layer.norm_in)
    appendix_a = norm(x + mha(own, own, own), layer.norm_out)
    appendix_c = norm(x + mha(own, z, z), layer.norm_out)
    torch.testing.assert_close(layer(x), appendix_a, atol=1e-5, rtol=0)
    torch.testing.assert_close(block(x), mlp_sub_block(appendix_a), atol=1e-5, rtol=0)
    torch.testing.assert_close(block(x, z), mlp_sub_block(appendix_c), atol=1e-5, rtol=0)
    assert [type(module) for module in block.mlp][:3] == [nn.Linear, nn.GELU, nn.Linear]
    assert block.mlp[0].out_features == 16


def test_sinusoids_by_hand():
    table = q3.sinusoids(torch.tensor([0.0, 3.0]), 4)
    expected = [[0, 1, 0, 1], [math.sin(3), math.cos(3), math.sin(3 / 100), math.cos(3 / 100)]]
    torch.testing.assert_close(table, torch.tensor(expected))


# ------------------------------------------------------------------------------------------- model
def test_sizes_of_the_assignment():
    sizes = q3.ModelSizes("lstm", 200, 2.0)
    assert (sizes.d, sizes.n_heads, sizes.n_blocks) == (200, 2, 4)
    model = q3.SpeechToText(sizes)
    assert len(model.encoder.blocks) == 4 and model.encoder.conv1.out_channels == 200
    assert len(VOCABULARY) == len(set(VOCABULARY)) == model.decoder.to_logits.out_features == 35
    assert model.encoder.conv1.stride == (1,) and model.encoder.conv2.stride == (2,)


@pytest.mark.parametrize("n_frames", [1, 2, 21, 40])
@BOTH
def test_padding_changes_nothing(decoder_name, n_frames):
    model = new_model(decoder_name).eval()
    x, lengths, text = random_batch(n_frames, 57)
    together = model(x, lengths, text)[0]
    alone = model(x[:1, :n_frames], lengths[:1], text[:1])[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    x[0, n_frames:] = 100.0  # whatever stands in the padding
    torch.testing.assert_close(model(x, lengths, text)[0], alone, atol=1e-5, rtol=0)


@BOTH
def test_no_token_sees_a_later_one(decoder_name):
    model = new_model(decoder_name).eval()
    x, lengths, text = random_batch(30, 44)
    logits = model(x, lengths, text)
    for t in range(1, 11):
        changed = text.clone()
        changed[:, t] = 4 + (changed[:, t] - 3) % 31
        difference = (model(x, lengths, changed) - logits).abs().amax(dim=(0, 2))
        assert difference[:t].max() < 1e-6 < difference[t]


@BOTH
def test_step_by_step_equals_all_at_once(decoder_name):
    model = new_model(decoder_name).eval()
    x, lengths, text = random_batch(30, 44)
    z, mask = model.encoder(x, lengths)
    expected = model(x, lengths, text)
    for parts in ([1] * 11, [4, 1, 6], [11]):  # one letter at a time, several, all
        state = q3.DecoderState()
        logits = [model.decoder(part, z, mask, state) for part in text[:, :11].split(parts, dim=1)]
        torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-5, rtol=0)


def test_positions_beyond_the_matrix_are_refused():
    model = new_model("transformer").eval()
    x, lengths, text = random_batch(30, n_tokens=62)
    assert model(x, lengths, text[:, :61]).shape[1] == 60
    with pytest.raises(ValueError, match="61 letters, but only 60 positions"):
        model(x, lengths, text)
    with torch.no_grad():
        model.decoder.to_logits.bias[STOP] = -100.0
    with pytest.raises(ValueError, match="only 60 positions"):
        model.greedy_decode(x, lengths, 80)


@BOTH
def test_cached_decoding_equals_uncached(decoder_name):
    model = new_model(decoder_name).eval()
    x, lengths, _ = random_batch(30, 44, 9)
    cached, plain = (model.greedy_decode(x, lengths, 40, use_cache) for use_cache in (True, False))
    assert torch.equal(cached, plain) and cached.shape[1] > 2


@BOTH
def test_decoding_stops_when_every_row_has_stopped(decoder_name):
    model = new_model(decoder_name).eval()
    x, lengths, _ = random_batch(30, 44)
    with torch.no_grad():
        model.decoder.to_logits.bias[STOP] = 100.0
    assert model.greedy_decode(x, lengths, 40).tolist() == [[START, STOP]] * 2


def fit(model, x, lengths, text, n_steps, rate=3e-3):
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98))
    for _ in range(n_steps):
        loss = q3.cross_entropy(model(x, lengths, text), text)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss < 0.01:
            break
    return [
        utils.decode(row)
        for row in model.eval().greedy_decode(x, lengths, text.shape[1] + 5).tolist()
    ]


@BOTH
def test_learns_eight_clips_by_heart(decoder_name):
    x, lengths, _ = random_batch(*range(30, 62, 4))
    texts = ["a bad cat", "no", "what, now?", "it is late.", "ten men", "x-ray", "yes yes", "zoo"]
    text, _ = utils.pad([torch.tensor(utils.encode(t)) for t in texts], PAD)
    torch.manual_seed(1)
    assert fit(new_model(decoder_name, d=48, n_blocks=1), x, lengths, text, 200) == texts


@pytest.mark.skipif(
    not (SHARED / "LJSpeech-1.1").exists(), reason="no real LJ Speech clips beside this checkout"
)
def test_learns_sixteen_real_clips_by_heart():
    splits, info = utils.load_ljspeech(SHARED)
    assert sum(info["counts"].values()) == 535 and "535 of 13,100" in info["source"]
    shortest = sorted(splits["train"], key=lambda row: row[2].stat().st_size)[:16]
    x, lengths = utils.pad([utils.log_mel(utils.read_audio(path)) for _, _, path in shortest], 0.0)
    text, _ = utils.pad([torch.tensor(utils.encode(text)) for _, text, _ in shortest], PAD)
    torch.manual_seed(1)
    written = fit(new_model("lstm", d=64, n_blocks=1), x, lengths, text, 300)
    assert written == [utils.decode(row) for row in text.tolist()]


def test_scores_by_hand():
    swap = q3.score(["the cat"], ["teh cat"])
    assert swap["damerau_levenshtein"] == pytest.approx(
        1 - 1 / 7
    )  # one swap of neighbours, length 7
    assert (swap["jaccard"], swap["cosine"]) == (1.0, 1.0) and swap["wer"] == 1 / 2
    assert swap["cer"] == pytest.approx(2 / 7)  # without swaps: two substitutions
    assert q3.jaccard("aab", "abb") == 2 / 4 and q3.cosine("aab", "abb") == pytest.approx(2 / 3)
    assert (
        q3.jaccard("", "") == q3.cosine("", "") == 1
        and q3.cosine("a", "") == q3.jaccard("a", "") == 0
    )
    perfect = q3.score(["a b", "c"], ["a b", "c"])
    assert perfect == {"damerau_levenshtein": 1, "jaccard": 1, "cosine": 1, "wer": 0, "cer": 0}


@given(st.text("abc ", min_size=1).filter(str.strip), st.text("abc "))
@settings(max_examples=50)
def test_scores_stay_in_their_ranges(reference, hypothesis):
    scores = q3.score([reference], [hypothesis])
    assert all(
        -1e-9 <= scores[key] <= 1 + 1e-9 for key in ("damerau_levenshtein", "jaccard", "cosine")
    )
    assert (
        scores["damerau_levenshtein"]
        <= 1 - abs(len(reference) - len(hypothesis)) / max(len(reference), len(hypothesis)) + 1e-9
    )


# ---------------------------------------------------------------------------------------- training
SMALL = {"d": 16, "n_blocks": 1, "n_positions": 40, "frames_per_token": 2.0}


def training_space(folder, **environment):
    """The notebook's definitions with a tiny corpus loaded and small models, ready for `train`."""
    small = {"BATCH_SIZE": "4", "EPOCHS": "3", "DEVICE": "cpu"}
    space = load_definitions(DATA=str(folder), OUT=str(folder / "out"), **{**small, **environment})
    full_sizes = space["sizes_for"]
    space["sizes_for"] = lambda *arguments: replace(full_sizes(*arguments), **SMALL)
    space["longest_output"] = lambda corpus: 10
    space["corpus"] = space["load_corpus"](space["settings"])
    return space


def run_training(space, decoder_name):
    return space["train"](decoder_name, space["corpus"], space["settings"])


def without_times(result):
    return [
        {key: value for key, value in row.items() if "seconds" not in key}
        for row in result["epochs"]
    ]


@BOTH
def test_resumed_training_equals_uninterrupted(tmp_path, decoder_name):
    for name in ("whole", "cut"):
        write_corpus(tmp_path / name)
    whole = training_space(tmp_path / "whole")
    model, result = run_training(whole, decoder_name)

    def interrupt(name, row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    cut = training_space(tmp_path / "cut")
    printed = cut["print_epoch"]
    cut["print_epoch"] = interrupt
    with contextlib.suppress(KeyboardInterrupt):
        run_training(cut, decoder_name)
    saved = json.loads(
        (tmp_path / "cut" / "out" / "results" / f"q3-{decoder_name}.json").read_text()
    )
    assert saved["status"] == "interrupted" and len(saved["epochs"]) == 2
    cut["print_epoch"] = printed
    resumed_model, resumed = run_training(cut, decoder_name)
    assert without_times(resumed) == without_times(result) and len(result["epochs"]) == 3
    for a, b in zip(model.parameters(), resumed_model.parameters()):
        assert torch.equal(a, b)


def test_reported_loss_leaves_out_padding_and_smoothing():
    logits, text = torch.randn(2, 3, 35), torch.tensor([[0, 9, 10, 1], [0, 11, 1, PAD]])
    log_p = logits.log_softmax(-1)
    picked = [log_p[0, 0, 9], log_p[0, 1, 10], log_p[0, 2, 1], log_p[1, 0, 11], log_p[1, 1, 1]]
    assert q3.cross_entropy(logits, text).item() == pytest.approx(-sum(picked).item() / 5, abs=1e-5)
    assert q3.cross_entropy(logits, text, 0.1) != q3.cross_entropy(logits, text)


def test_schedule_rises_then_falls_to_zero():
    rates = [q3.rate_at(step, 100, warmup=0.2) for step in range(100)]
    peak = rates.index(max(rates))
    assert max(rates) == 1 and peak == 20 - 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak + 1 :] == sorted(rates[peak + 1 :], reverse=True)
    assert 0 <= rates[-1] < 0.01
    for n in (1, 2, 3):
        assert all(0 <= q3.rate_at(step, n, 0.2) <= 1 for step in range(n))


def test_the_optimiser_follows_the_schedule():
    chosen = replace(q3.settings, learning_rate=0.5, warmup=0.25)
    optimizer, schedule = q3.new_optimizer(nn.Linear(2, 2), chosen, n_steps=20)
    for step in range(20):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * q3.rate_at(step, 20, 0.25))
        optimizer.step()
        schedule.step()


def test_spec_augment_hides_bands_and_frames_of_each_clip():
    torch.manual_seed(0)
    features = torch.ones(6, 300, 80)
    masked = q3.spec_augment(features, q3.settings) == 0  # (B, T, 80)
    bands, frames = masked.all(dim=1).sum(1), masked.all(dim=2).sum(1)
    assert bands.max() <= q3.settings.freq_mask and frames.max() <= q3.settings.time_mask
    assert masked.any() and features.all()
    assert len({tuple(clip.flatten().nonzero().flatten().tolist()) for clip in masked}) > 1


def test_ctc_loss_is_the_sum_over_alignments():
    """Two clips of 4 and 3 frames, texts of 2 and 1 letters: every path, merged by hand."""
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 35, dtype=torch.float64)
    text = torch.tensor([[START, 9, 9, STOP], [START, 7, STOP, PAD]])  # "aa" needs a blank
    expected = []
    for clip, n_frames, letters in ((0, 4, [9, 9]), (1, 3, [7])):
        p = logits[clip].softmax(-1)
        total = 0.0
        for path in itertools.product([PAD, *set(letters)], repeat=n_frames):
            merged = [token for token, _ in itertools.groupby(path)]
            if [token for token in merged if token != PAD] == letters:
                total += math.prod(p[frame, token].item() for frame, token in enumerate(path))
        expected.append(-math.log(total) / len(letters))
    loss = q3.ctc_loss(logits, torch.tensor([4, 3]), text).item()
    assert loss == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_without_its_weight_the_ctc_loss_changes_nothing():
    """CTC_WEIGHT=0 is the handed-out training: the extra layer gets no gradient."""
    for weight in (0.0, 0.3):
        model = new_model("lstm")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        batch = random_batch(40, 44)
        before = model.ctc.weight.clone()
        q3.train_batch(model, optimizer, batch, replace(q3.settings, ctc_weight=weight))
        assert torch.equal(before, model.ctc.weight) == (weight == 0)


def test_augmentation_by_hand():
    """A ramp over time and bands tells where every frame and band came from."""
    frames = torch.arange(100.0)[:, None].expand(100, 80)
    assert torch.equal(q3.change_speed(frames, 1.0), frames)
    faster = q3.change_speed(frames, 2.0)  # frame t is the mean of frames 2 t and 2 t + 1
    assert torch.allclose(faster[:, 0], 2 * torch.arange(50.0) + 0.5)

    bands = torch.arange(80.0).expand(5, 80)
    assert torch.equal(q3.warp_bands(bands, 1.0, 0.0), bands)
    assert torch.allclose(q3.warp_bands(bands, 0.5, 3.0), 0.5 * bands + 3.0)
    assert q3.warp_bands(bands, 2.0, 0.0)[0, 50:].eq(79).all()  # there is no band beyond the last

    clip = torch.full((60, 80), -1.0)  # in units of four decades
    clip[10] = 0.0  # one loud frame
    power = 10 ** (4 * q3.add_echo(clip, strength=0.5, decay=4.0))
    heard = (
        1e-4
        + 0.5 * math.exp(-3 / 4)
        + 0.5e-4 * (sum(math.exp(-k / 4) for k in range(1, 14)) - math.exp(-3 / 4))
    )
    assert power[9].max() < 1e-3 and power[10, 0] == pytest.approx(1, abs=1e-3)
    assert power[13, 0] == pytest.approx(heard, rel=1e-4)

    clip = torch.full((20_000, 80), -0.5)
    noisy = q3.add_noise(clip, level=-0.5, tilt=0.25)
    power = (10 ** (4 * noisy)).mean(dim=0)
    expected = 10**-2 + 10 ** (4 * torch.linspace(-0.75, -0.25, 80))
    assert torch.allclose(power, expected, rtol=0.05)

    assert torch.equal(q3.vary(frames, q3.settings), frames)  # by default there is none
    on = replace(q3.settings, speed=0.1, warp=0.1, reverb=0.5, noise=0.5)
    varied = q3.vary(frames, on)
    assert 100 / 1.12 < len(varied) < 100 / 0.88 and varied.shape[1] == 80


def test_centred_features_do_not_know_the_microphone():
    clip, colour = torch.randn(50, 80), torch.randn(80)
    assert torch.allclose(utils.centre(clip + colour), utils.centre(clip), atol=1e-6)


def test_validation_clips_are_not_varied(tmp_path):
    write_corpus(tmp_path)
    space = training_space(tmp_path, SPEED="0.5", WARP="0.5", NOISE="1")
    first, again = (space["get_batch"](space["corpus"], "val", [0])[0] for _ in range(2))
    clip = space["corpus"].features["val"][0].float()
    assert torch.equal(first, again)
    assert torch.equal(first[0, : len(clip)], utils.centre(clip))


def test_positions_at_random():
    sizes = replace(q3.ModelSizes("transformer", 500, 0.0), n_blocks=1)
    torch.manual_seed(0)
    positions = q3.SpeechToText(sizes).decoder.positions
    assert abs(positions.mean()) < 0.02 and abs(positions.std() - 1) < 0.02


def test_the_best_epoch_is_kept(tmp_path):
    """KEEP_BEST tests the weights of the epoch that was best on validation, in one go or two."""
    write_corpus(tmp_path)
    space = training_space(tmp_path, KEEP_BEST="1")
    similarities = iter((0.2, 0.6, 0.4))
    weights = []

    def evaluate(model, corpus, split, settings):
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
        return {"loss": 1.0, "damerau_levenshtein": next(similarities), "wer": 1.0}, [], []

    space["evaluate"] = evaluate
    model, result = run_training(space, "lstm")
    assert result["kept_epoch"] == 2
    for kept, second in zip(model.parameters(), weights[1]):
        assert torch.equal(kept, second)
    model, _ = run_training(space, "lstm")  # from the checkpoint, without any further epoch
    for kept, second in zip(model.parameters(), weights[1]):
        assert torch.equal(kept, second)


def test_bootstrap_interval_of_many_clips_is_that_of_a_normal_mean():
    values = np.random.default_rng(1).normal(0.7, 0.2, 400)
    low, high = q3.bootstrap_interval(values)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.003)
    assert high == pytest.approx(values.mean() + error, abs=0.003)


def test_fine_tuning_starts_from_the_given_checkpoint(tmp_path):
    write_corpus(tmp_path)
    trained, _ = run_training(training_space(tmp_path), "transformer")
    folder = tmp_path / "out" / "checkpoints"
    space = training_space(tmp_path, INIT_FROM=str(folder), TAG="-tuned")
    sizes = space["sizes_for"](space["corpus"], "transformer", space["settings"])
    longer = space["SpeechToText"](replace(sizes, n_positions=50))
    own = longer.decoder.positions[40:].clone()
    space["load_weights"](longer, folder)
    for (name, a), b in zip(trained.named_parameters(), longer.parameters()):
        assert torch.equal(a, b[: len(a)]), name
    assert torch.equal(longer.decoder.positions[40:], own)  # what the checkpoint lacks
    lstm = space["SpeechToText"](replace(sizes, decoder="lstm"))
    with pytest.raises(UserError, match="no q3-lstm"):
        space["load_weights"](lstm, folder)
    (folder / "q3-transformer.pt").rename(folder / "q3-lstm.pt")
    with pytest.raises(UserError, match="is of other code"):
        space["load_weights"](lstm, folder)


def test_a_base_that_was_trained_again_is_fine_tuned_again(tmp_path):
    """The start of a fine-tuned run is what its base holds, however its folder is written."""
    write_corpus(tmp_path)
    base = training_space(tmp_path)
    run_training(base, "lstm")
    folder = tmp_path / "out" / "checkpoints"
    tuned = {"INIT_FROM": str(folder), "TAG": "-tuned", "EPOCHS": "1"}
    run_training(training_space(tmp_path, **tuned), "lstm")
    again = {**tuned, "INIT_FROM": f"{folder}/../checkpoints/"}
    run_training(training_space(tmp_path, **again), "lstm")  # goes on
    (folder / "q3-lstm.pt").unlink()
    run_training(training_space(tmp_path, SEED="7"), "lstm")
    with pytest.raises(UserError, match="other config"):
        run_training(training_space(tmp_path, **tuned), "lstm")


def test_an_edit_of_one_decoder_leaves_the_other_trained(tmp_path, capsys):
    write_corpus(tmp_path)
    run_training(training_space(tmp_path), "lstm")
    space = training_space(tmp_path)
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if "class TextDecoderTransformer" in cell.source:
            exec(cell.source.replace("sinusoids(on_the_clock, d)", "torch.zeros(9, 9)"), space)
    run_training(space, "lstm")
    assert "was trained before" in capsys.readouterr().out
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if "class ClipCache" in cell.source:
            exec(cell.source.replace("if self.k is None", "if True"), space)
        if "class TextDecoderRecurrent" in cell.source:
            exec(cell.source, space)
    run_training(space, "lstm")
    assert "has changed, so it starts anew" in capsys.readouterr().out


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    write_corpus(tmp_path)
    run_training(training_space(tmp_path), "lstm")
    with pytest.raises(UserError, match="other config"):
        run_training(training_space(tmp_path, LEARNING_RATE="0.5"), "lstm")


def test_the_folder_may_be_written_in_another_way(tmp_path, capsys, monkeypatch):
    write_corpus(tmp_path)
    run_training(training_space(tmp_path), "lstm")
    monkeypatch.chdir(tmp_path.parent)
    _, result = run_training(training_space(Path(tmp_path.name)), "lstm")
    assert len(result["epochs"]) == 3
    assert "q3-lstm: was trained before, all 3 epochs" in capsys.readouterr().out


def test_an_edited_model_is_trained_again(tmp_path, capsys):
    """What a student does: change a line of a decoder, run its cell, run on."""
    write_corpus(tmp_path)
    _, before = run_training(training_space(tmp_path), "transformer")
    space = training_space(tmp_path)
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if "class TextDecoderTransformer" in cell.source:
            line = "self.positions = nn.Parameter(sinusoids(on_the_clock, d))"
            assert line in cell.source
            edited = cell.source.replace(
                line, "self.positions = nn.Parameter(0 * sinusoids(on_the_clock, d))"
            )
            exec(edited, space)
    capsys.readouterr()
    _, after = run_training(space, "transformer")
    assert "has changed, so it starts anew" in capsys.readouterr().out
    assert len(after["epochs"]) == 3
    assert [row["train_loss"] for row in after["epochs"]] != [
        row["train_loss"] for row in before["epochs"]
    ]
    kept = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert len(kept) == 2 and kept[0].startswith("q3-transformer-code-")


def test_a_resumed_run_keeps_the_environment_of_each_part(tmp_path, monkeypatch):
    write_corpus(tmp_path)
    space = training_space(tmp_path)

    def interrupt(name, row):
        raise KeyboardInterrupt

    printed, space["print_epoch"] = space["print_epoch"], interrupt
    with contextlib.suppress(KeyboardInterrupt):
        run_training(space, "lstm")
    space["print_epoch"] = printed
    monkeypatch.setattr(runs, "environment", lambda device: {"device": "another machine"})
    _, result = run_training(space, "lstm")
    assert result["environment"]["device"] == "cpu"
    later = {"after_epoch": 1, "environment": {"device": "another machine"}}
    assert result["resumed"] == [later]


def test_what_was_used_is_recorded_not_what_was_asked():
    asked = replace(q3.settings, bf16=1)
    with pytest.MonkeyPatch.context() as patch:
        for has_it in (True, False):
            patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
            config = q3.config_of(asked, q3.ModelSizes("lstm", 60, 2.0))
            assert config["bf16"] == int(has_it)
    with pytest.raises(FrozenInstanceError):
        q3.settings.batch_size = 40  # a setting cannot change between two training cells


@pytest.mark.parametrize(
    "name, value", [("EPOCHS", "many"), ("LEARNING_RATE", "-1"), ("DROPOUT", "nan")]
)
def test_bad_settings_are_one_sentence(name, value):
    with pytest.raises(UserError, match=name):
        load_definitions(**{name: value})


# ------------------------------------------------------------------------------ the whole notebook
def run_notebook(**environment):
    names = ("DATA", "OUT", "EPOCHS")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    return run_tool("run_notebook", env={**clean, **environment}, timeout=600)


def test_notebook_runs_from_top_to_bottom_on_a_tiny_corpus(tmp_path):
    write_corpus(tmp_path, 20)
    out = tmp_path / "out"
    process = run_notebook(DATA=str(tmp_path), OUT=str(out), EPOCHS="2")
    assert process.returncode == 0, process.stderr[-3000:]
    executed = nbformat.read(out / "hw2-q3.ipynb", as_version=4)
    check_structure(executed)
    for name in ("lstm", "transformer"):
        result = json.loads((out / "results" / f"q3-{name}.json").read_text())
        assert result["status"] == "finished" and result["data"]["source"] == "synthetic test tones"
        assert {"loss", "damerau_levenshtein", "jaccard", "cosine", "wer", "cer"} <= set(
            result["test"]
        )
        assert len(result["epochs"]) == 2 and {"train_loss", "val_loss", "wer"} <= set(
            result["epochs"][0]
        )
    names = {path.stem for path in (out / "figures").iterdir()}
    figures = "model clip masks varied curves-lstm curves-transformer loss scores attention"
    figures += " by-length recording"
    assert names == {f"q3-{name}" for name in figures.split()}


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_bars_on_a_terminal_and_none_in_the_copy(tmp_path):
    import pty

    write_corpus(tmp_path, 20)
    out = tmp_path / "out"
    settings = {"DATA": str(tmp_path), "OUT": str(out), "EPOCHS": "1", "DECODERS": "lstm"}
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.run_notebook"],
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=subprocess.DEVNULL,
        stderr=end,
    )
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # Linux says that the other end was closed
        while part := os.read(terminal, 10_000):
            shown += part
    os.close(terminal)
    assert process.wait() == 0, shown
    assert b"epoch 1:" in shown and b"it/s]" in shown
    check_structure(nbformat.read(out / "hw2-q3.ipynb", as_version=4))


def test_installs_exactly_what_is_missing(tmp_path, monkeypatch, capsys):
    path = tmp_path / "requirements.txt"
    path.write_text("# pinned\nnumpy==0.0\nno-such-package==1.2\n")
    installed = []

    def run(command, check):
        installed.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    install.install_missing_packages(path)
    assert [command[-1] for command in installed] == ["no-such-package==1.2"]
    assert installed[0][2:4] == ["pip", "install"]
    path.write_text("numpy==0.0\n")
    install.install_missing_packages(path)
    assert len(installed) == 1 and capsys.readouterr().out == "installing no-such-package==1.2\n"


def test_first_cell_wants_the_repository(tmp_path, monkeypatch):
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    first = next(cell for cell in cells if cell.cell_type == "code")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="clone the repository"):
        exec(first.source, {})


@pytest.mark.parametrize("wrong", [{"DATA": "nowhere"}, {"DECODERS": "gru"}, {"EPOCHS": "several"}])
def test_bad_settings_of_the_notebook_end_in_one_sentence(tmp_path, wrong):
    process = run_notebook(OUT=str(tmp_path / "out"), **wrong)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    sentences = [line for line in process.stderr.splitlines() if "hw2-q3.ipynb:" in line]
    assert len(sentences) == 1 and next(iter(wrong.values())) in sentences[0]


def check_structure(notebook):
    """Counts 1..N, no errors, no progress bars, short cells."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output for output in outputs if "it/s]" in output.get("text", "")]
    assert max(cell.source.count("\n") + 1 for cell in cells) <= 60


def test_committed_notebook_is_one_clean_execution():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    check_structure(notebook)
    assert NOTEBOOK.stat().st_size < 2_000_000
    text = io.StringIO()
    nbformat.write(notebook, text)
    assert not re.search(r'["\s](/home|/Users|/root|/work|/tmp|[A-Z]:\\\\)', text.getvalue())
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    assert ["define", "parameters"] in tags and tags.count(["define"]) > 5
