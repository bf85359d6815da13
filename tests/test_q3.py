"""Q3: data, tokens, scores, every layer of the model, training, and the notebook as a whole."""

import contextlib
import io
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import utils
from utils import PAD, START, STOP, VOCABULARY

NOTEBOOK = ROOT / "hw2-q3.ipynb"
BOTH = pytest.mark.parametrize("decoder_name", ["lstm", "transformer"])


def define(**environment):
    """The notebook's definitions (cells tagged `define`) as a namespace, with settings from `environment`."""
    space, before = {}, dict(os.environ)
    os.environ |= environment
    try:
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
            if "define" in cell.metadata.get("tags", []):
                exec(compile(cell.source, str(NOTEBOOK), "exec"), space)
    finally:
        os.environ.clear()
        os.environ |= before
    return space


q3 = define(DATA="nowhere", OUT="nowhere", BF16="0", DEVICE="cpu")


def new_model(decoder_name, **sizes):
    sizes = {"d": 16, "n_heads": 2, "n_blocks": 2, "dropout": 0.0} | sizes
    return q3["build_model"](decoder_name, n_positions=60, frames_per_token=2.0, **sizes)


def random_batch(*n_frames, n_tokens=12, seed=0):
    torch.manual_seed(seed)
    x, lengths = utils.pad([torch.randn(n, utils.N_MELS) for n in n_frames], 0.0)
    text = torch.randint(4, len(VOCABULARY), (len(n_frames), n_tokens))
    text[:, 0] = START
    return x, lengths, text


# ------------------------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("kind", ["self", "padding", "causal", "cross"])
def test_attention_equals_torchs(kind):
    torch.manual_seed(0)
    mine, theirs = q3["MultiHeadAttention"](24, 3), nn.MultiheadAttention(24, 3, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([mine.W_Q.weight, mine.W_K.weight, mine.W_V.weight]))
        theirs.out_proj.weight.copy_(mine.W_O.weight)
    x, z = torch.randn(2, 9, 24), torch.randn(2, 5, 24)
    key = z if kind == "cross" else x
    visible = q3["padding_mask"](torch.tensor([9, 4]), 9) if kind == "padding" else None
    later = torch.ones(9, 9, dtype=torch.bool).triu(1) if kind == "causal" else None
    padding = None if visible is None else ~visible[:, 0, 0]
    expected, _ = theirs(x, key, key, attn_mask=later, key_padding_mask=padding)
    torch.testing.assert_close(mine(x, key, key, visible, is_causal=kind == "causal"), expected, atol=1e-5, rtol=0)


def test_attention_equals_the_written_formula():
    torch.manual_seed(0)
    attention, x, z = q3["MultiHeadAttention"](6, 2), torch.randn(1, 4, 6), torch.randn(1, 3, 6)
    heads = []
    for rows in (slice(0, 3), slice(3, 6)):  # head i uses rows of W^Q, W^K, W^V
        Q, K, V = (s @ W.weight[rows].T for s, W in ((x, attention.W_Q), (z, attention.W_K), (z, attention.W_V)))
        scores = Q @ K.transpose(1, 2) / math.sqrt(3)
        heads.append(scores.exp() / scores.exp().sum(-1, keepdim=True) @ V)
    expected = torch.cat(heads, dim=-1) @ attention.W_O.weight.T
    torch.testing.assert_close(attention(x, z, z), expected, atol=1e-6, rtol=0)
    assert torch.allclose(attention.weights(x, z).sum(-1), torch.ones(()))


def test_sub_blocks_equal_their_formulas():
    torch.manual_seed(0)
    block = q3["ResidualAttentionBlock"](8, 2, 0.0)
    layer, mha = block.attention_layer, block.attention_layer.attention
    x, z = torch.randn(2, 5, 8), torch.randn(2, 7, 8)

    def norm(x, parameters):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * parameters.weight + parameters.bias

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
    table = q3["sinusoids"](torch.tensor([0.0, 3.0]), 4)
    expected = [[0, 1, 0, 1], [math.sin(3), math.cos(3), math.sin(3 / 100), math.cos(3 / 100)]]
    torch.testing.assert_close(table, torch.tensor(expected))


# ----------------------------------------------------------------------------------------------------------- model
def test_sizes_of_the_assignment():
    model = q3["build_model"]("lstm", 200, 2.0)
    blocks = model.encoder.blocks
    assert (q3["D"], q3["N_HEADS"], len(blocks)) == (200, 2, 4)
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
    cache = {}
    steps = [model.decoder(text[:, t : t + 1], z, mask, cache) for t in range(11)]
    torch.testing.assert_close(torch.cat(steps, dim=1), model(x, lengths, text), atol=1e-5, rtol=0)


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
        loss = q3["cross_entropy"](model(x, lengths, text), text)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if loss < 0.01:
            break
    return [utils.decode(row) for row in model.eval().greedy_decode(x, lengths, text.shape[1] + 5).tolist()]


@BOTH
def test_learns_eight_clips_by_heart(decoder_name):
    x, lengths, _ = random_batch(*range(30, 62, 4))
    texts = ["a bad cat", "no", "what, now?", "it is late.", "ten men", "x-ray", "yes yes", "zoo"]
    text, _ = utils.pad([torch.tensor(utils.encode(t)) for t in texts], PAD)
    torch.manual_seed(1)
    assert fit(new_model(decoder_name, d=48, n_blocks=1), x, lengths, text, 200) == texts


@pytest.mark.skipif(not (SHARED / "LJSpeech-1.1").exists(), reason="no real LJ Speech clips beside this checkout")
def test_learns_sixteen_real_clips_by_heart():
    splits, info = utils.load_ljspeech(SHARED)
    assert info["counts"] == {"train": 401, "val": 27, "test": 107} and "535 of 13,100" in info["source"]
    shortest = sorted(splits["train"], key=lambda row: row[2].stat().st_size)[:16]
    x, lengths = utils.pad([utils.log_mel(utils.read_audio(path)) for _, _, path in shortest], 0.0)
    text, _ = utils.pad([torch.tensor(utils.encode(text)) for _, text, _ in shortest], PAD)
    torch.manual_seed(1)
    written = fit(new_model("lstm", d=64, n_blocks=1), x, lengths, text, 300)
    assert written == [utils.decode(row) for row in text.tolist()]


# ------------------------------------------------------------------------------------------------- tokens and scores
@given(st.text())
def test_tokens_round_trip(text):
    tokens = utils.encode(text)
    assert tokens[0] == START and tokens[-1] == STOP and START not in tokens[1:] and STOP not in tokens[:-1]
    expected = "".join(letter if letter in VOCABULARY[4:] else "#" for letter in text.lower())
    assert utils.decode(tokens) == expected
    assert utils.decode([*tokens, PAD, PAD]) == expected
    assert utils.encode(expected) == tokens


def test_tokens_by_hand():
    assert utils.encode("A z, é") == [0, 9, 4, 34, 5, 4, 3, 1]
    assert utils.encode("abcdef", max_len=5) == [0, 9, 10, 11, 1]


def test_scores_by_hand():
    swap = q3["score"](["the cat"], ["teh cat"])
    assert swap["damerau_levenshtein"] == pytest.approx(1 - 1 / 7)  # one swap of neighbours, length 7
    assert (swap["jaccard"], swap["cosine"]) == (1.0, 1.0) and swap["wer"] == 1 / 2
    assert swap["cer"] == pytest.approx(2 / 7)  # without swaps: two substitutions
    assert q3["jaccard"]("aab", "abb") == 2 / 4 and q3["cosine"]("aab", "abb") == pytest.approx(2 / 3)
    assert q3["jaccard"]("", "") == q3["cosine"]("", "") == 1 and q3["cosine"]("a", "") == q3["jaccard"]("a", "") == 0
    perfect = q3["score"](["a b", "c"], ["a b", "c"])
    assert perfect == {"damerau_levenshtein": 1, "jaccard": 1, "cosine": 1, "wer": 0, "cer": 0}


@given(st.text("abc ", min_size=1).filter(str.strip), st.text("abc "))
@settings(max_examples=50)
def test_scores_stay_in_their_ranges(reference, hypothesis):
    scores = q3["score"]([reference], [hypothesis])
    assert all(-1e-9 <= scores[key] <= 1 + 1e-9 for key in ("damerau_levenshtein", "jaccard", "cosine"))
    assert (
        scores["damerau_levenshtein"]
        <= 1 - abs(len(reference) - len(hypothesis)) / max(len(reference), len(hypothesis)) + 1e-9
    )


# ------------------------------------------------------------------------------------------------------------ audio
def slaney_filters():
    """80 triangular filters on Slaney's mel scale with unit area, written from its definition: (80, 513)."""

    def to_hz(mel):
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    top = 15 + 27 * np.log(utils.SAMPLE_RATE / 2 / 1000) / np.log(6.4)
    edges, bins = to_hz(np.linspace(0, top, 82)), np.linspace(0, utils.SAMPLE_RATE / 2, 513)
    up = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    down = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(up, down)) * 2 / (edges[2:] - edges[:-2])[:, None]


def test_log_mel_equals_its_definition_in_numpy():
    rng = np.random.default_rng(0)
    samples = rng.normal(size=5000).astype(np.float32) * np.linspace(0, 1, 5000, dtype=np.float32)
    padded = np.pad(samples, 512, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(1024) / 1024)
    frames = np.stack([padded[i : i + 1024] * window for i in range(0, 5001, 256)])
    power = np.abs(np.fft.rfft(frames)) ** 2 @ slaney_filters().T
    decades = np.log10(np.maximum(power, 1e-10))
    expected = (np.maximum(decades, decades.max() - 8) + 4) / 4
    features = utils.log_mel(torch.from_numpy(samples))
    assert features.shape == (1 + 5000 // 256, 80)
    np.testing.assert_allclose(features.numpy(), expected, atol=1e-3)


@pytest.mark.parametrize(
    "rate, channels, subtype", [(22_050, 1, "PCM_16"), (48_000, 2, "PCM_16"), (22_050, 1, "PCM_U8")]
)
def test_other_sample_rates_channels_and_widths(tmp_path, rate, channels, subtype):
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    soundfile.write(tmp_path / "tone.wav", np.stack([tone] * channels, axis=1), rate, subtype=subtype)
    samples = utils.read_audio(tmp_path / "tone.wav")
    assert abs(len(samples) - 22_050) <= 1 and samples.ndim == 1
    assert np.abs(np.fft.rfft(samples.numpy())).argmax() == 440


@pytest.mark.parametrize("content", [b"", b"not a sound", "empty", "short"])
def test_unreadable_sound_is_one_sentence(tmp_path, content):
    path = tmp_path / "clip.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        soundfile.write(path, np.zeros({"empty": 0, "short": 500}[content]), 22_050)
    with pytest.raises(utils.UserError, match=r"clip\.wav"):
        utils.read_audio(path)


# ------------------------------------------------------------------------------------------------------------ corpus
def write_corpus(folder, n_clips=12):
    """A corpus in LJ Speech's format: tones that stand for short texts."""
    root = folder / "LJSpeech-1.1"
    (root / "wavs").mkdir(parents=True)
    rows = []
    for i in range(n_clips):
        tone = np.sin(2 * np.pi * (200 + 50 * i) * np.arange(6000 + 300 * (i % 5)) / utils.SAMPLE_RATE)
        soundfile.write(root / "wavs" / f"LJ001-{i:04}.wav", 0.5 * tone, utils.SAMPLE_RATE)
        rows.append(f"LJ001-{i:04}|Text {i}|{'abcdefghijkl'[i % 12] * (2 + i % 3)}, yes")
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    (root / "README").write_text("synthetic test tones\nmore\n")
    return root


def test_corpus_is_split_in_order_and_labelled(tmp_path):
    root = write_corpus(tmp_path, 40)
    splits, info = utils.load_ljspeech(tmp_path)
    assert info["counts"] == {"train": 30, "val": 2, "test": 8} and info["source"] == "synthetic test tones"
    ids = [row[0] for split in ("train", "val", "test") for row in splits[split]]
    assert ids == [f"LJ001-{i:04}" for i in range(40)]
    windows = "﻿" + (root / "metadata.csv").read_text().replace("\n", "\r\n")
    (root / "metadata.csv").write_bytes(windows.encode())
    assert utils.load_ljspeech(tmp_path)[0] == splits  # a byte-order mark and CRLF change nothing


@pytest.mark.parametrize("n_clips", [4, 5, 6, 7, 20])
def test_small_corpora_have_no_empty_split(tmp_path, n_clips):
    write_corpus(tmp_path, n_clips)
    _, info = utils.load_ljspeech(tmp_path)
    assert min(info["counts"].values()) >= 1 and sum(info["counts"].values()) == n_clips


def test_official_split_of_the_full_corpus():
    n = 13_100
    assert (round(0.75 * n), round(0.05 * n), n - round(0.75 * n) - round(0.05 * n)) == (9_825, 655, 2_620)


BAD_ROWS = {
    "2 columns": "LJ001-0003|only",
    "no clip in wavs/": "LJ009-0001|x|x",
    "no text": "LJ001-0003|x|",
    "an id seen before": "LJ001-0000|x|x",
}


@pytest.mark.parametrize("problem", BAD_ROWS)
def test_bad_metadata_names_the_row(tmp_path, problem):
    root = write_corpus(tmp_path)
    rows = (root / "metadata.csv").read_text().splitlines()
    rows[3] = BAD_ROWS[problem]
    (root / "metadata.csv").write_text("\n".join(rows))
    with pytest.raises(utils.UserError, match="row 4") as error:
        utils.load_ljspeech(tmp_path)
    assert problem in str(error.value)


def test_missing_or_undecodable_corpus(tmp_path):
    with pytest.raises(utils.UserError, match="does not exist"):
        utils.load_ljspeech(tmp_path)
    root = write_corpus(tmp_path)
    (root / "metadata.csv").write_bytes(b"LJ001-0000|x|caf\xe9\n")
    with pytest.raises(utils.UserError, match="UTF-8"):
        utils.load_ljspeech(tmp_path)


def silent_corpus(folder, n_clips, metadata):
    """Clips 0, 1, … that are empty files, and this metadata.csv (bytes)."""
    root = Path(folder) / "LJSpeech-1.1"
    (root / "wavs").mkdir(parents=True)
    for i in range(n_clips):
        (root / "wavs" / f"{i}.wav").touch()
    (root / "metadata.csv").write_bytes(metadata)


LETTERS = st.characters(exclude_characters="|\n", exclude_categories=["Cs"])


@given(st.lists(st.text(LETTERS).filter(str.strip), min_size=4, max_size=9))
@settings(max_examples=50, deadline=None)
def test_any_transcript_is_read_as_it_stands(texts):  # quotes, other scripts, control characters
    with tempfile.TemporaryDirectory() as folder:
        silent_corpus(folder, len(texts), "\n".join(f"{i}|raw|{text}" for i, text in enumerate(texts)).encode())
        splits, info = utils.load_ljspeech(folder)
    assert [row[1] for rows in splits.values() for row in rows] == [text.strip() for text in texts]
    assert "LJ Speech" not in info["source"]


@given(st.binary() | st.text("0123|x\r\n\"'\ufeff").map(str.encode))
@settings(max_examples=200, deadline=None)
def test_any_metadata_is_read_or_refused_in_one_sentence(content):
    with tempfile.TemporaryDirectory() as folder:
        silent_corpus(folder, 4, content)
        try:
            utils.load_ljspeech(folder)
        except utils.UserError as error:
            assert "\n" not in str(error) and str(error).endswith((".", "by hand"))


def test_download_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    """torchaudio unpacks in place and takes any folder of that name for whole; ours appears once it is whole."""
    calls = []

    def fetch(root, download):
        calls.append(sorted(path.name for path in Path(root).iterdir()))
        (Path(root) / "archive").touch()
        write_corpus(Path(root), 4)
        if len(calls) == 1:
            raise RuntimeError("connection\nlost")

    monkeypatch.setattr("torchaudio.datasets.LJSPEECH", fetch)
    with pytest.raises(utils.UserError, match=r"connection lost.*by hand"):
        utils.download_ljspeech(tmp_path / "data")
    assert not (tmp_path / "data" / "LJSpeech-1.1").exists()
    utils.download_ljspeech(tmp_path / "data")
    assert calls == [[], ["archive"]] and os.listdir(tmp_path / "data") == ["LJSpeech-1.1"]
    assert utils.load_ljspeech(tmp_path / "data")[1]["counts"]["train"] == 2


@pytest.mark.parametrize("name", ["../escaped", "{absolute}/escaped", None])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, name):
    (tmp_path / "LJSpeech-download").mkdir()
    archive = tmp_path / "LJSpeech-download" / "LJSpeech-1.1.tar.bz2"
    if name is None:
        archive.write_bytes(b"BZh9 cut short")
    else:
        with tarfile.open(archive, "w:bz2") as tar:
            tar.addfile(tarfile.TarInfo(name.format(absolute=tmp_path)))
    with pytest.raises(utils.UserError, match="LJSpeech-download, or place"):
        utils.download_ljspeech(tmp_path)
    assert os.listdir(tmp_path) == ["LJSpeech-download"]


def test_features_are_cached_and_a_damaged_cache_is_made_again(tmp_path):
    write_corpus(tmp_path)
    splits, _ = utils.load_ljspeech(tmp_path)
    first = utils.load_features(splits, tmp_path / "out")
    (cache,) = (tmp_path / "out" / "features").iterdir()
    before = cache.stat().st_mtime_ns
    again = utils.load_features(splits, tmp_path / "out")
    assert cache.stat().st_mtime_ns == before
    cache.write_bytes(cache.read_bytes()[:1000])
    repaired = utils.load_features(splits, tmp_path / "out")
    for split in first:
        assert len(first[split]) == len(splits[split])
        for a, b, c in zip(first[split], again[split], repaired[split]):
            assert torch.equal(a, b) and torch.equal(a, c) and a.dtype == torch.float16


def test_batches_hold_every_clip_once_and_similar_lengths():
    torch.manual_seed(0)
    lengths = torch.randint(50, 900, (203,)).tolist()
    batches = utils.batches_by_length(lengths, 16)
    assert sorted(torch.cat(batches).tolist()) == list(range(203))
    spread = [max(lengths[i] for i in batch) / min(lengths[i] for i in batch) for batch in batches]
    assert sorted(spread)[len(spread) // 2] < 1.4
    assert [b.tolist() for b in utils.batches_by_length(lengths, 16)] != [b.tolist() for b in batches]
    ordered = torch.cat(utils.batches_by_length(lengths, 16, shuffle=False))
    assert [lengths[i] for i in ordered] == sorted(lengths)


# --------------------------------------------------------------------------------------------------------- training
def training_space(folder, **environment):
    """The notebook's definitions with a tiny corpus loaded, ready for `train`."""
    space = define(DATA=str(folder), OUT=str(folder / "out"), BATCH_SIZE="4", EPOCHS="3", DEVICE="cpu", **environment)
    splits, info = utils.load_ljspeech(folder)
    features = utils.load_features(splits, folder / "out")
    tokens = {split: [torch.tensor(utils.encode(text)) for _, text, _ in rows] for split, rows in splits.items()}
    sizes = {"d": 16, "n_blocks": 1, "n_positions": 40, "frames_per_token": 2.0}
    space |= {"splits": splits, "info": info, "features": features, "tokens": tokens, "max_tokens": 10}
    space["new_model"] = lambda name: space["build_model"](name, **sizes)
    return space


def without_times(result):
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in result["epochs"]]


@BOTH
def test_resumed_training_equals_uninterrupted(tmp_path, decoder_name):
    for name in ("whole", "cut"):
        write_corpus(tmp_path / name)
    whole = training_space(tmp_path / "whole")
    model, result = whole["train"](decoder_name)

    def interrupt(name, row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    cut = training_space(tmp_path / "cut")
    printed = cut["print_epoch"]
    cut["print_epoch"] = interrupt
    with contextlib.suppress(KeyboardInterrupt):
        cut["train"](decoder_name)
    saved = json.loads((tmp_path / "cut" / "out" / "results" / f"q3-{decoder_name}.json").read_text())
    assert saved["status"] == "interrupted" and len(saved["epochs"]) == 2
    cut["print_epoch"] = printed
    resumed_model, resumed = cut["train"](decoder_name)
    assert without_times(resumed) == without_times(result) and len(result["epochs"]) == 3
    for a, b in zip(model.parameters(), resumed_model.parameters()):
        assert torch.equal(a, b)


def test_reported_loss_leaves_out_padding_and_smoothing():
    logits, text = torch.randn(2, 3, 35), torch.tensor([[0, 9, 10, 1], [0, 11, 1, PAD]])
    log_p = logits.log_softmax(-1)
    picked = [log_p[0, 0, 9], log_p[0, 1, 10], log_p[0, 2, 1], log_p[1, 0, 11], log_p[1, 1, 1]]
    assert q3["cross_entropy"](logits, text).item() == pytest.approx(-sum(picked).item() / 5, abs=1e-5)
    assert q3["cross_entropy"](logits, text, 0.1) != q3["cross_entropy"](logits, text)


def test_schedule_rises_then_falls_to_zero():
    rates = [q3["rate_at"](step, 100) for step in range(100)]
    peak = rates.index(max(rates))
    assert max(rates) == 1 and peak == round(q3["WARMUP"] * 100) - 1
    assert rates[: peak + 1] == sorted(rates[: peak + 1]) and rates[peak + 1 :] == sorted(
        rates[peak + 1 :], reverse=True
    )
    assert 0 <= rates[-1] < 0.01
    assert all(0 <= q3["rate_at"](step, n) <= 1 for n in (1, 2, 3) for step in range(n))


def test_spec_augment_hides_bands_and_frames_of_each_clip():
    torch.manual_seed(0)
    masked = q3["spec_augment"](torch.ones(6, 1, 80, 300))[:, 0] == 0  # (B, 80, T)
    bands, frames = masked.all(dim=2).sum(1), masked.all(dim=1).sum(1)
    assert bands.max() <= q3["FREQ_MASK"] and frames.max() <= q3["TIME_MASK"] and masked.any()
    assert len({tuple(clip.flatten().nonzero().flatten().tolist()) for clip in masked}) > 1


def test_fine_tuning_starts_from_the_given_checkpoint(tmp_path):
    write_corpus(tmp_path)
    trained, _ = training_space(tmp_path)["train"]("transformer")
    space = training_space(tmp_path, INIT_FROM=str(tmp_path / "out" / "checkpoints"), TAG="-tuned")
    fresh = space["new_model"]("transformer")
    space["load_weights"](fresh, "transformer")
    for a, b in zip(trained.parameters(), fresh.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(utils.UserError, match="no q3-lstm"):
        space["load_weights"](space["new_model"]("lstm"), "lstm")


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    write_corpus(tmp_path)
    training_space(tmp_path)["train"]("lstm")
    with pytest.raises(utils.UserError, match="other config"):
        training_space(tmp_path, LEARNING_RATE="0.5")["train"]("lstm")


def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "run.pt"
    utils.save_checkpoint(path, {"config": 1}, {"epoch": 1})

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(utils.UserError, match="No space left"):
        utils.save_checkpoint(path, {"config": 1}, {"epoch": 2})
    assert utils.load_checkpoint(path, {"config": 1}) == {"epoch": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name, value", [("EPOCHS", "many"), ("LEARNING_RATE", "-1"), ("DROPOUT", "nan")])
def test_bad_settings_are_one_sentence(name, value):
    with pytest.raises(utils.UserError, match=name):
        define(**{name: value})


# ----------------------------------------------------------------------------------------------- the whole notebook
def run_notebook(**environment):
    command = [sys.executable, str(ROOT / "run_notebook.py")]
    clean = {key: value for key, value in os.environ.items() if key not in ("DATA", "OUT", "EPOCHS")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=clean | environment)


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
        assert {"loss", "damerau_levenshtein", "jaccard", "cosine", "wer", "cer"} <= set(result["test"])
        assert len(result["epochs"]) == 2 and {"train_loss", "val_loss", "wer"} <= set(result["epochs"][0])
    names = {path.stem for path in (out / "figures").iterdir()}
    figures = "clip masks loss-lstm loss-transformer loss-comparison scores attention by-length"
    assert names == {f"q3-{name}" for name in figures.split()}


def test_first_cell_installs_exactly_what_is_missing(tmp_path, monkeypatch, capsys):
    first = next(cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="clone the repository"):
        exec(first.source, {})
    Path("utils.py").touch()
    Path("requirements.txt").write_text("# pinned\nnumpy==0.0\nno-such-package==1.2\n")
    installed = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: installed.append(command))
    exec(first.source, {})
    assert [command[-1] for command in installed] == ["no-such-package==1.2"] and installed[0][2:4] == [
        "pip",
        "install",
    ]
    Path("requirements.txt").write_text("numpy==0.0\n")
    exec(first.source, {})
    assert len(installed) == 1 and capsys.readouterr().out == "installing no-such-package==1.2\n"


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
