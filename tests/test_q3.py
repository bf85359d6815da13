"""hw2-q3.ipynb: the layers, both decoders, scores, training, checkpoints, and a student's edits."""

import json
import math
import os
import re
import shutil

import decoding
import plots
import runs
import utils
from conftest import ROOT, letter_by_letter, run_python, write_corpus
from runs import UserError
from utils import PAD, START, STOP, VOCABULARY

import nbformat
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

NOTEBOOK = ROOT / "hw2-q3.ipynb"
BOTH = pytest.mark.parametrize("decoder_name", ["lstm", "transformer"])

q3 = runs.load_definitions(NOTEBOOK, data="nowhere", out="nowhere", bf16=0, device="cpu")


def new_model(decoder_name, **changed):
    """A small model without dropout."""
    small = {"d": 16, "n_heads": 2, "n_blocks": 2, "dropout": 0.0, **changed}
    return q3.SpeechToText(q3.ModelSizes(decoder_name, 64, 2.0, **small)).eval()


def random_batch(*n_frames, n_tokens=12):
    torch.manual_seed(0)
    x, lengths = utils.pad([torch.randn(n, utils.N_MELS) for n in n_frames], 0.0)
    text = torch.randint(4, len(VOCABULARY), (len(n_frames), n_tokens))
    text[:, 0] = START
    return x, lengths, text


# -------------------------------------------------------------------------- Appendices A, B and C
def test_attention_equals_torchs():
    torch.manual_seed(0)
    mine = q3.MultiHeadAttention(24, 3).double()
    theirs = nn.MultiheadAttention(24, 3, bias=False, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([mine.W_Q.weight, mine.W_K.weight, mine.W_V.weight]))
        theirs.out_proj.weight.copy_(mine.W_O.weight)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    z = torch.randn(2, 5, 24, dtype=torch.float64)

    padding = torch.arange(5) >= torch.tensor([[5], [4]])
    expected, weights = theirs(x, z, z, key_padding_mask=padding)
    with plots.keeping_weights(mine):
        found = mine(x, z, z, q3.padding_mask(torch.tensor([5, 4]), 5))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(mine.weights.mean(dim=1), weights, atol=1e-12, rtol=0)

    later = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected, _ = theirs(x, x, x, attn_mask=later)
    found = mine(x, x, x, q3.causal_mask(9))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_sub_blocks_equal_their_formulas():
    torch.manual_seed(0)
    block = q3.ResidualAttentionBlock(8, 2, 0.0)
    layer, mha = block.attention_layer, block.attention_layer.attention
    x, z = torch.randn(2, 5, 8), torch.randn(2, 7, 8)

    def mlp_sub_block(x):
        return block.norm_out(x + block.mlp(block.norm_in(x)))

    own = layer.norm_in(x)
    appendix_a = layer.norm_out(x + mha(own, own, own))
    appendix_c = layer.norm_out(x + mha(own, z, z))
    torch.testing.assert_close(layer(x), appendix_a)
    torch.testing.assert_close(block(x), mlp_sub_block(appendix_a))
    torch.testing.assert_close(block(x, z), mlp_sub_block(appendix_c))


def test_sinusoids_by_hand():
    table = q3.sinusoids(torch.tensor([0.0, 3.0]), 4)
    expected = [[0, 1, 0, 1], [math.sin(3), math.cos(3), math.sin(3 / 100), math.cos(3 / 100)]]
    torch.testing.assert_close(table, torch.tensor(expected))


# -------------------------------------------------------------------------------- Q3.1 and Q3.2
def test_sizes_of_the_assignment():
    model = q3.SpeechToText(q3.ModelSizes("lstm", 200, 2.0))
    assert len(model.encoder.blocks) == 4 and model.encoder.conv1.out_channels == 200
    assert model.encoder.conv1.stride == (1,) and model.encoder.conv2.stride == (2,)
    assert model.encoder.blocks[0].mlp[0].out_features == 400
    assert {m.n_heads for m in model.modules() if isinstance(m, q3.MultiHeadAttention)} == {2}
    assert len(VOCABULARY) == len(set(VOCABULARY)) == model.decoder.to_logits.out_features == 35


def test_the_five_steps_of_the_lstm_decoder():
    decoder = new_model("lstm").decoder
    tokens, z = torch.tensor([[0, 9, 20, 5]]), torch.randn(1, 6, 16)
    x, _ = decoder.lstm(decoder.norm_in(decoder.embedding.weight[tokens]))
    x = decoder.cross_attention(x, z)
    expected = decoder.norm_out(x) @ decoder.to_logits.weight.T + decoder.to_logits.bias
    torch.testing.assert_close(decoder._forward(tokens, z), expected, atol=1e-5, rtol=0)


def test_the_six_steps_of_the_transformer_decoder():
    decoder = new_model("transformer").decoder
    tokens, z = torch.tensor([[0, 9, 20, 5]]), torch.randn(1, 6, 16)
    x = decoder.embedding.weight[tokens] + decoder.positions[:4]
    seen = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    x = decoder.cross_attention(decoder.self_attention(x, mask=seen), z)
    expected = decoder.norm_out(x) @ decoder.to_logits.weight.T + decoder.to_logits.bias
    torch.testing.assert_close(decoder(tokens, z), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_frames", [1, 40])
@BOTH
def test_padding_changes_nothing(decoder_name, n_frames):
    model = new_model(decoder_name)
    x, lengths, text = random_batch(n_frames, 57)
    alone = model(x[:1, :n_frames], lengths[:1], text[:1])[0]
    torch.testing.assert_close(model(x, lengths, text)[0], alone, atol=1e-5, rtol=0)
    x[0, n_frames:] = 100.0  # whatever stands in the padding
    torch.testing.assert_close(model(x, lengths, text)[0], alone, atol=1e-5, rtol=0)


@BOTH
def test_no_token_sees_a_later_one(decoder_name):
    model = new_model(decoder_name)
    x, lengths, text = random_batch(30, 44)
    logits = model(x, lengths, text)
    for t in range(1, 11):
        changed = text.clone()
        changed[:, t] = 4 + (changed[:, t] - 3) % 31
        difference = (model(x, lengths, changed) - logits).abs().amax(dim=(0, 2))
        assert difference[:t].max() < 1e-6 < difference[t]


def test_positions_beyond_the_matrix_are_refused():
    x, lengths, text = random_batch(30, n_tokens=66)
    with pytest.raises(ValueError, match="65 tokens, but only 64 positions"):
        new_model("transformer")(x, lengths, text)


@BOTH
@torch.no_grad()
def test_greedy_decoding(decoder_name):
    model = new_model(decoder_name)
    x, lengths, _ = random_batch(30, 44, 9)
    z, mask = model.encoder(x, lengths)
    text = q3.greedy_decode(model.decoder, z, mask, 12)
    for t in range(1, text.shape[1]):  # every letter is the likeliest after those before it
        logits = model.decoder(text[:, :t], z, mask)[:, -1]
        logits[:, [START, PAD]] = -math.inf
        has_stopped = (text[:, :t] == STOP).any(dim=1)
        expected = torch.where(has_stopped, PAD, logits.argmax(dim=-1))
        assert torch.equal(text[:, t], expected)
    model.decoder.to_logits.bias[STOP] = 100.0
    assert q3.greedy_decode(model.decoder, z, mask, 12).tolist() == [[START, STOP]] * 3


@BOTH
def test_everything_lies_on_the_device_of_the_model(decoder_name, monkeypatch):
    """Tensors that hold no numbers, on a CUDA device that is not there: shapes and devices only."""
    monkeypatch.setattr(q3, "DEVICE", torch.device("cuda"))
    with FakeTensorMode(), torch.backends.cudnn.flags(enabled=False):  # it would ask the driver
        with torch.device("cuda"):
            model = new_model(decoder_name)
            x, lengths = torch.randn(2, 40, utils.N_MELS), torch.tensor([40, 31])
            text = torch.zeros(2, 9, dtype=torch.long)
        z, mask = model.encoder(x, lengths)
        logits = model.decoder(text[:, :-1], z, mask)
        loss = q3.cross_entropy(logits, text, label_smoothing=0.1)
        cached = decoding.CachedDecoder(model.decoder, z, mask)
        cached.step(text[:, :1])
        newest = cached.step(text[:, :2])
    for tensor in (z, mask, logits, loss, newest):
        assert tensor.device.type == "cuda"
    assert newest.shape == (2, 35)


# ------------------------------------------------------------------------------------------ scores
def test_scores_by_hand():
    swap = q3.score(["the cat"], ["teh cat"])
    assert swap["damerau_levenshtein"] == pytest.approx(1 - 1 / 7)  # one swap of neighbours
    assert (swap["jaccard"], swap["cosine"]) == (1.0, 1.0) and swap["wer"] == 1 / 2
    assert swap["cer"] == pytest.approx(2 / 7)  # without swaps: two substitutions
    assert q3.jaccard("aab", "abb") == 2 / 4 and q3.cosine("aab", "abb") == pytest.approx(2 / 3)
    assert q3.jaccard("", "") == q3.cosine("", "") == 1
    assert q3.jaccard("a", "") == q3.cosine("a", "") == 0


# ---------------------------------------------------------------------------------------- training
def test_reported_loss_leaves_out_padding_and_smoothing():
    torch.manual_seed(0)
    logits, text = torch.randn(2, 3, 35), torch.tensor([[0, 9, 10, 1], [0, 11, 1, PAD]])
    p = logits.log_softmax(dim=-1)
    terms = [p[0, 0, 9], p[0, 1, 10], p[0, 2, 1], p[1, 0, 11], p[1, 1, 1]]
    assert q3.cross_entropy(logits, text).item() == pytest.approx(-sum(terms).item() / 5)


def test_ctc_loss_equals_torchs_clip_by_clip():
    torch.manual_seed(0)
    logits = torch.randn(2, 12, 35)
    text = torch.tensor([utils.encode("aab"), [*utils.encode("b"), PAD, PAD]])
    n_frames = torch.tensor([12, 5])
    expected = []
    for row, n, letters in zip(logits, n_frames, ("aab", "b"), strict=True):
        target = torch.tensor(utils.encode(letters)[1:-1])
        log_p = row[:n].log_softmax(dim=-1)
        loss = nn.CTCLoss(blank=PAD, reduction="sum")(log_p, target, n, torch.tensor(len(target)))
        expected.append(loss.item() / len(target))
    assert q3.ctc_loss(logits, n_frames, text).item() == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_schedule_rises_then_falls_to_zero():
    rates = [q3.rate_at(step, 100, 0.2) for step in range(101)]
    assert rates[0] == 1 / 20 and max(rates) == rates[19] == rates[20] == 1.0
    assert rates[60] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0)
    assert rates[20:] == sorted(rates[20:], reverse=True)


def test_spec_augment_hides_bands_and_frames_of_each_clip():
    torch.manual_seed(0)
    x = torch.ones(2, 200, 80)
    hidden = q3.spec_augment(x, q3.settings) == 0
    assert hidden.any() and (hidden[0] != hidden[1]).any()
    assert hidden.all(dim=1).sum(dim=1).max() <= 12 and hidden.all(dim=2).sum(dim=1).max() <= 12
    assert torch.equal(q3.spec_augment(x, runs.changed(q3.settings, freq_mask=0, time_mask=0)), x)


def test_bootstrap_interval_of_many_clips_is_that_of_a_normal_mean():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)).double().numpy()
    low, high = q3.bootstrap_interval(values)
    spread = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - spread, abs=0.1 * spread)
    assert high == pytest.approx(values.mean() + spread, abs=0.1 * spread)


def space_for(folder, notebook=NOTEBOOK, n_clips=12, **settings):
    """The notebook's definitions with a tiny corpus loaded and small models, ready for `train`."""
    if not (folder / "LJSpeech-1.1").exists():
        write_corpus(folder, n_clips)
    small = {"d": 16, "n_blocks": 1, "batch_size": 4, "epochs": 3, "device": "cpu"}
    space = runs.load_definitions(
        notebook, data=str(folder), out=str(folder / "out"), **{**small, **settings}
    )
    space.longest_output = lambda corpus: 10
    space.corpus = space.load_corpus(space.settings)
    return space


def train(space, decoder_name):
    """The model and the result of a run that `space` trained."""
    run = space.train(decoder_name, space.corpus, space.settings)
    return run.model, run.result


def numbers(result):
    """The epochs of a result without its times."""
    rows = result["epochs"]
    return [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]


def test_resumed_training_equals_uninterrupted(tmp_path, monkeypatch):
    model, result = train(space_for(tmp_path / "whole"), "transformer")
    n_parameters = q3.n_parameters(model.encoder) + q3.n_parameters(model.decoder)
    assert len(result["epochs"]) == 3 and result["parameters"] == n_parameters

    def interrupt(name, row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    cut = space_for(tmp_path / "cut")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cut, "print_epoch", interrupt)
        train(cut, "transformer")
    saved = runs.load_result(tmp_path / "cut" / "out", "q3-transformer")
    assert saved["status"] == "interrupted" and len(saved["epochs"]) == 2
    cut.settings.resume = 1
    resumed_model, resumed = train(cut, "transformer")
    assert numbers(resumed) == numbers(result) and resumed["resumed"][0]["after_epoch"] == 2
    for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True):
        assert torch.equal(a, b)
    _, again = train(cut, "transformer")  # complete by now: nothing is trained, and it is told
    assert [part["after_epoch"] for part in again["resumed"]] == [2, 3]
    assert numbers(again) == numbers(result)


def edited_notebook(folder, *edits):
    """A copy of the notebook with these (old, new) texts in its cells."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for old, new in edits:
        cells = [cell for cell in notebook.cells if old in cell.source]
        assert cells, old
        for cell in cells:
            cell.source = cell.source.replace(old, new)
    path = folder / "edited.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a transformer's checkpoint, after an epoch; nobody trains into it again."""
    folder = tmp_path_factory.mktemp("trained")
    train(space_for(folder, epochs=1), "transformer")
    return folder


def checkpoint_in(folder):
    return folder / "out" / "checkpoints" / "q3-transformer.pt"


def test_without_resume_a_run_starts_anew_and_keeps_the_old_one(tmp_path, trained, capsys):
    """Of other sizes and epochs, too, and by settings that were changed in a cell."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    space = space_for(tmp_path)
    changed = {"d": 32, "n_heads": 4, "epochs": 2}
    vars(space.settings).update(changed)
    _, result = train(space, "transformer")
    assert "kept as q3-transformer-old1.pt" in capsys.readouterr().out
    assert len(result["epochs"]) == 2 and "resumed" not in result
    assert {key: result["config"][key] for key in changed} == changed
    kept = checkpoint_in(tmp_path).with_name("q3-transformer-old1.pt")
    assert kept.read_bytes() == checkpoint_in(trained).read_bytes()


OTHER_CODE = ("x + self.positions[:n_letters]", "x + 2 * self.positions[:n_letters]")


def test_resume_with_other_settings_or_code_is_refused(tmp_path, trained):
    with pytest.raises(UserError, match="of a run with other d, layers, learning_rate;"):
        train(space_for(trained, epochs=1, resume=1, d=32, learning_rate=0.1), "transformer")
    edited = edited_notebook(tmp_path, OTHER_CODE)
    with pytest.raises(UserError, match="is of other code"):
        train(space_for(trained, edited, epochs=1, resume=1), "transformer")


def test_resume_on_other_data_is_refused(tmp_path):
    """In the folder of the same name."""
    train(space_for(tmp_path, epochs=1), "transformer")
    table = tmp_path / "LJSpeech-1.1" / "metadata.csv"
    table.write_text(table.read_text().replace("yes", "no"))
    with pytest.raises(UserError, match="of a run with other data;"):
        train(space_for(tmp_path, epochs=1, resume=1), "transformer")


@pytest.mark.parametrize("edit", [("nn.GELU()", "nn.ReLU()"), OTHER_CODE])
def test_a_checkpoint_of_other_code_is_refused(tmp_path, trained, edit):
    q3.load_model(checkpoint_in(trained))
    edited = runs.load_definitions(edited_notebook(tmp_path, edit))
    with pytest.raises(UserError, match="is of other code"):
        edited.load_model(checkpoint_in(trained))


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (utils, "HOP", 275),
        (torch.Tensor, "log10", torch.Tensor.log),
        (utils, "VOCABULARY", VOCABULARY[:9] + "1" + VOCABULARY[9:-1]),  # as many, but shifted
    ],
)
def test_a_checkpoint_of_other_features_or_letters_is_refused(
    trained, monkeypatch, owner, name, value
):
    monkeypatch.setattr(owner, name, value)
    utils._mel_spectrogram.cache_clear()
    with pytest.raises(UserError, match="is of other code"):
        q3.load_model(checkpoint_in(trained))
    monkeypatch.undo()
    utils._mel_spectrogram.cache_clear()
    assert q3.load_model(checkpoint_in(trained)).training is False


# ------------------------------------------------------------------------------ a student's edits
SECOND_LAYER = (
    "        self.cross_attention = ResidualAttentionBlock(d, n_heads, dropout)",
    "        self.cross_attention = ResidualAttentionBlock(d, n_heads, dropout)\n"
    "        self.second = ResidualAttentionLayer(d, n_heads, dropout)",
)
LOOK_BACK = (
    "        x = self.self_attention(x, mask=causal_mask(n_letters, x.device))  # (B, T, D)\n"
)
LOOK_ACROSS = "        x = self.cross_attention(x, z, mask)  # (B, T, D)\n"
TWO_LAYERS = [
    SECOND_LAYER,
    (LOOK_ACROSS, LOOK_ACROSS + LOOK_ACROSS.replace("cross_attention(", "second(")),
]
ADD_POSITIONS = "        x = x + self.positions[:n_letters]  # (B, T, D)\n"
CAN_BE_CACHED = [  # the decoder, what is done to it, and how
    ("lstm", "nothing", []),
    ("lstm", "GRU", [("nn.LSTM(d, d,", "nn.GRU(d, d,")]),
    ("lstm", "two LSTM layers", [("nn.LSTM(d, d,", "nn.LSTM(d, d, 2,")]),
    ("lstm", "a second cross-attention", TWO_LAYERS),
    ("transformer", "nothing", []),
    ("transformer", "no positions", [(ADD_POSITIONS, "")]),
    ("transformer", "a line copied", [(LOOK_BACK, LOOK_BACK + "\n" + LOOK_BACK)]),
    (
        "transformer",
        "a second self-attention",
        [
            SECOND_LAYER,
            (LOOK_BACK, LOOK_BACK.replace("self_attention", "second") + "\n" + LOOK_BACK),
        ],
    ),
    ("transformer", "a second cross-attention", TWO_LAYERS),
]


def look_back_by(call):
    """An edit: masked self-attention in place by `call` on Q, K and V, (B, H, T, D / H) each."""
    lines = f"""
        layer = self.self_attention
        own = layer.attention
        x_norm = layer.norm_in(x)
        Q, K, V = (own.split(W(x_norm)) for W in (own.W_Q, own.W_K, own.W_V))
        T = x.shape[1]
        places = torch.arange(T)
        distance = (places[:, None] - places).float()
        heads = {call}
        x = layer.norm_out(x + own.W_O(heads.transpose(1, 2).flatten(2)))
    """
    return (LOOK_BACK, lines.rstrip() + "\n")


def convolution_before_the_lstm(before, after):
    """An edit: a convolution over three letters, of which so many stand before and after."""
    norm = "        self.norm_in = nn.LayerNorm(d)\n        self.dropout = nn.Dropout(dropout)\n"
    lstm = "        with torch.autocast(x.device.type, enabled=False):  # its steps"
    convolve = (
        f"        x = self.mix(F.pad(x.transpose(1, 2), ({before}, {after}))).transpose(1, 2)\n"
    )
    return [
        (
            f"{norm}        self.lstm",
            f"{norm}        self.mix = nn.Conv1d(d, d, 3)\n        self.lstm",
        ),
        (lstm, convolve + lstm),
    ]


MATRIX = """        if frames_per_token:
            on_the_clock = frames_per_token * torch.arange(n_positions)
            self.positions = nn.Parameter(sinusoids(on_the_clock, d))  # (n_positions, D)
        else:
            self.positions = nn.Parameter(torch.randn(n_positions, d))
"""
SINUSOIDS = "x + sinusoids(torch.arange(n_letters, device=x.device), x.shape[2])"
CANNOT_BE_CACHED = [
    ("transformer", "sinusoids", [("x + self.positions[:n_letters]", SINUSOIDS)]),
    (
        "transformer",
        "positions as an embedding",
        [
            (MATRIX, "        self.positions = nn.Embedding(n_positions, d)\n"),
            ("self.positions[:n_letters]", "self.positions(torch.arange(n_letters))"),
            ("n_letters > len(self.positions)", "n_letters > self.positions.num_embeddings"),
        ],
    ),
    (
        "transformer",
        "is_causal",
        [look_back_by("F.scaled_dot_product_attention(Q, K, V, is_causal=True)")],
    ),
    (
        "transformer",
        "ALiBi",
        [
            look_back_by(
                "F.scaled_dot_product_attention(Q, K, V, "
                "(-distance).masked_fill(distance < 0, -math.inf))"
            )
        ],
    ),
    (
        "transformer",
        "a sliding window",
        [("mask=causal_mask(n_letters, x.device))", "mask=causal_mask(n_letters).triu(-2))")],
    ),
    (
        "transformer",
        "torch's own module",
        [
            (
                SECOND_LAYER[0],
                SECOND_LAYER[1].replace(
                    "ResidualAttentionLayer(d, n_heads, dropout)",
                    "nn.MultiheadAttention(d, n_heads, batch_first=True)",
                ),
            ),
            (
                LOOK_BACK,
                "        hidden = ~causal_mask(n_letters)\n"
                "        x = x + self.second(x, x, x, attn_mask=hidden)[0]\n",
            ),
        ],
    ),
    ("lstm", "a causal convolution", convolution_before_the_lstm(2, 0)),
    # not causal: what they write letter by letter is not what they read in parallel
    ("lstm", "a convolution over the whole text", convolution_before_the_lstm(1, 1)),
    ("lstm", "both directions", [("nn.LSTM(d, d,", "nn.LSTM(d, d // 2, bidirectional=True,")]),
    ("transformer", "no mask", [("mask=causal_mask(n_letters, x.device))", "mask=None)")]),
]


def sharp_space(folder, decoder_name, edits):
    """A notebook with these edits whose models say much: every letter depends on those before."""
    seed = {"lstm": 42, "transformer": 49}[decoder_name]  # whose texts show a wrong cache
    sizes = {"epochs": 1, "seed": seed, "learning_rate": 1e-5}
    space = space_for(folder, edited_notebook(folder, *edits), **sizes)
    plain = space.SpeechToText

    def build(sizes):
        model = plain(sizes)
        with torch.no_grad():
            for name, weights in model.decoder.named_parameters():
                if weights.ndim > 1 and "positions" not in name:
                    weights *= 0.4 if "cross_attention" in name else 6
            model.decoder.to_logits.bias[STOP] += 2
        return model

    space.SpeechToText = build
    space.longest_output = lambda corpus: 16
    return space


@torch.no_grad()
def texts_by_the_decoder_itself(space, model, split):
    """Every clip of a split alone, every letter by reading the whole text so far."""
    texts = []
    for clip in space.corpus.features[split]:
        z, _ = model.encoder(utils.centre(clip.float())[None], torch.tensor([len(clip)]))
        tokens = letter_by_letter(model.decoder, z, space.longest_output(space.corpus))
        texts.append(utils.decode(tokens))
    return texts


@pytest.mark.parametrize(
    ("decoder_name", "name", "edits", "is_cached"),
    [
        *((*edit, True) for edit in CAN_BE_CACHED),
        *((*edit, False) for edit in CANNOT_BE_CACHED),
    ],
)
def test_an_edited_decoder_trains_decodes_and_is_recorded(
    tmp_path, capsys, decoder_name, name, edits, is_cached
):
    """What is scored is what the decoder itself writes, whether or not a cache fits it."""
    space = sharp_space(tmp_path, decoder_name, edits)
    run = space.train(decoder_name, space.corpus, space.settings)
    space.test(run, space.corpus, space.settings)
    model, result = run.model, run.result
    assert result["status"] == "finished" and result["layers"] == str(model.decoder).splitlines()
    said = capsys.readouterr().err.count("the KV cache does not fit this decoder")
    assert said == (0 if is_cached else 1)
    for split in space.corpus.rows:
        _, _, written = space.evaluate(model, space.corpus, split, space.settings)
        assert written == texts_by_the_decoder_itself(space, model, split)
    if name == "no positions":
        n_idle = model.decoder.positions.numel()  # they are there, but nothing moves them
        n_all = q3.n_parameters(model.encoder) + q3.n_parameters(model.decoder)
        assert result["parameters"] == n_all - n_idle and result["untrained"] == ["positions"]
    read = space.load_model(tmp_path / "out" / "checkpoints" / f"q3-{decoder_name}.pt")
    clip, text = space.corpus.features["test"][0], space.corpus.tokens["test"][0]
    plots.attention_maps({"read again": read}, clip, text)
    check_search(space, read, is_cached)


def test_slow_motion_writes_what_evaluation_writes(tmp_path):
    """Letter by letter, on the features that the model was trained with."""
    space = sharp_space(tmp_path, "transformer", [])
    model, _ = train(space, "transformer")
    model.requires_grad_(False)
    assert plots.FRAME == pytest.approx(2 * 256 / 22_050)  # seconds: z has every other frame
    for split in space.corpus.rows:
        written = texts_by_the_decoder_itself(space, model, split)
        for clip, text in zip(space.corpus.features[split], written, strict=True):
            steps = plots.slow_motion(model, clip, 17)
            last, likeliest, weights = steps[-1]
            final = last + likeliest[0][0]
            assert final.removeprefix("<").removesuffix(">") == text
            assert weights.sum().item() == pytest.approx(1, abs=1e-5)
            z, mask = model.encoder(utils.centre(clip.float())[None], torch.tensor([len(clip)]))
            logits = model.decoder(torch.tensor([[START]]), z, mask)[0, -1]
            logits[[START, PAD]] = -math.inf
            expected = logits.softmax(dim=-1).topk(3).values.tolist()
            assert [p for _, p in steps[0][1]] == pytest.approx(expected, rel=1e-5)


@torch.inference_mode()
def check_search(space, model, is_cached):
    """The search with a cache finds what the search without one finds."""
    features = utils.centre(space.corpus.features["test"][0].float())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "CachedDecoder", decoding.PlainDecoder)
        expected = decoding.beam_search(model, features, 16)
        assert model.decoder not in decoding.NOT_CACHED or not is_cached
    decoding.NOT_CACHED.discard(model.decoder)
    assert decoding.beam_search(model, features, 16) == expected
    assert (model.decoder in decoding.NOT_CACHED) != is_cached


def test_a_vocabulary_with_digits(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "VOCABULARY", VOCABULARY + "0123456789")
    space = space_for(tmp_path, epochs=1)
    model, _ = train(space, "transformer")
    assert model.decoder.to_logits.out_features == 45


def test_a_corpus_of_five_clips(tmp_path):
    space = space_for(tmp_path, n_clips=5, epochs=1)
    run = space.train("transformer", space.corpus, space.settings)
    space.test(run, space.corpus, space.settings)
    assert run.result["status"] == "finished"


def test_a_checkpoint_of_a_smaller_vocabulary_is_one_sentence(trained, monkeypatch):
    monkeypatch.setattr(q3, "VOCABULARY", VOCABULARY + "0")
    with pytest.raises(UserError, match="it knows 35 tokens, and the vocabulary has 36; train"):
        q3.load_model(checkpoint_in(trained))


def test_a_ctc_layer_that_nothing_trained_has_no_vote(tmp_path):
    """The checkpoint knows: with the vote of a random layer other texts would be found."""
    space = space_for(tmp_path, epochs=1, ctc_weight=0)
    train(space, "transformer")
    model = space.load_model(checkpoint_in(tmp_path))
    with torch.no_grad():
        model.ctc.weight *= 100
    clips = [utils.centre(clip.float()) for clip in space.corpus.features["train"]]
    found = [decoding.beam_search(model, clip, 10) for clip in clips]
    assert found == [decoding.beam_search(model, clip, 10, ctc_share=0.0) for clip in clips]
    with torch.inference_mode():
        with_its_vote = [decoding._search(*search_inputs(model, clip))[0][1:] for clip in clips]
    assert found != [text.tolist() for text in with_its_vote]


def search_inputs(model, clip):
    """What a search gets when CTC has 0.4 of the vote."""
    z, mask = model.encoder(clip[None], torch.tensor([len(clip)]))
    log_p = model.ctc(z)[0].log_softmax(dim=-1)
    return decoding.PlainDecoder(model.decoder, z, mask), 10, 8, log_p, 0.4, None, 0.0


def test_numbers_of_numpy_and_torch_in_an_epochs_row_are_saved_and_resumed(tmp_path, monkeypatch):
    """A checkpoint that holds them could not be read with weights_only=True."""
    space = space_for(tmp_path, epochs=2)
    evaluate = space.evaluate

    def with_more(*arguments):
        metrics, references, hypotheses = evaluate(*arguments)
        letters = np.mean([len(text) for text in hypotheses])
        return {**metrics, "letters": letters, "t": torch.tensor(0.5)}, references, hypotheses

    def interrupt(name, row):
        raise KeyboardInterrupt

    monkeypatch.setattr(space, "evaluate", with_more)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(space, "print_epoch", interrupt)
        train(space, "lstm")
    space.settings.resume = 1
    _, result = train(space, "lstm")
    saved = runs.load_result(tmp_path / "out", "q3-lstm")
    assert len(saved["epochs"]) == 2 and len(result["resumed"]) == 1
    assert [row["t"] for row in saved["epochs"]] == [0.5, 0.5]
    assert all(type(row["letters"]) is float for row in saved["epochs"])


# -------------------------------------------------------------------------- the cells, all of them
def sources_of(notebook, parameters):
    """The sources of all code cells, with a cell of parameters behind the notebook's own."""
    sources = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            sources.append(cell.source)
        if "parameters" in cell.metadata.get("tags", []):
            sources.append("\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
    return sources


RERUN = """
def printed(number):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(SOURCES[number], f"cell {number}", "exec"), globals())
    return out.getvalue()


first = {number: printed(number) for number in range(len(SOURCES))}
print("".join(first.values()))
for cell_number in range(len(SOURCES)):
    source = SOURCES[cell_number]
    if "time.perf_counter()" not in source and "train_and_test(" not in source:
        assert printed(cell_number) == first[cell_number], SOURCES[cell_number]
print("the same again")
"""


def test_all_cells_run_from_top_to_bottom_and_again(tmp_path):
    """As a script, with an edit of all layers, which the model that comes with the clone then does
    not fit; and each cell once more after all others, when names may have been used again.
    """
    notebook = nbformat.read(edited_notebook(tmp_path, ("nn.GELU()", "nn.ReLU()")), as_version=4)
    write_corpus(tmp_path)
    out = tmp_path / "out"
    places = {"data": str(tmp_path), "out": str(out), "device": "cpu"}
    small = {"d": 16, "n_blocks": 1, "epochs": 1, "batch_size": 4}
    sources = sources_of(notebook, {**places, **small})
    script = tmp_path / "notebook.py"
    script.write_text(f"import contextlib, io\nSOURCES = {sources!r}\n{RERUN}", encoding="utf-8")
    process = run_python(script, env={**os.environ, "PYTHONPATH": str(ROOT), "EPOCHS": "9"})
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("the same again\n")
    assert "is of other code" in process.stdout and "So the transformer decoder" in process.stdout
    for decoder_name in ("lstm", "transformer"):
        result = runs.load_result(out, f"q3-{decoder_name}")
        assert result["status"] == "finished" and len(result["epochs"]) == 1
        assert result["config"]["d"] == 16

    script.write_text(sources[0], encoding="utf-8")
    process = run_python(script, cwd=tmp_path)
    assert "start in the folder that holds this notebook" in process.stderr


# -------------------------------------------------------------------------------------- parameters
BAD_PARAMETERS = {
    "decoders": ["gru", (), ("lstm", "gru")],
    "d": [15, 0, "200"],
    "n_heads": [3],
    "epochs": [0, 2.5, "three"],
    "dropout": [1, -0.1, "0.1"],
    "learning_rate": [0, float("nan")],
    "warmup": [1.5],
    "max_text_len": [2],
    "seed": [-1, 2**32],
    "clock": [2],
    "ctc_weight": [-1],
    "device": ["tpu"],
    "tag": ["a/b", 3],
    "show": ["both"],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in BAD_PARAMETERS for value in BAD_PARAMETERS[name]]
)
def test_a_bad_parameter_is_one_sentence(name, value):
    with pytest.raises(UserError, match=name):
        runs.load_definitions(NOTEBOOK, **{name: value})


def test_a_tag_stands_behind_the_name_of_a_run(tmp_path):
    space = space_for(tmp_path, epochs=1, tag="-a")
    run = space.train("lstm", space.corpus, space.settings)
    assert run.checkpoint.name == "q3-lstm-a.pt" and "tag" not in run.result["config"]
    assert runs.load_result(tmp_path / "out", "q3-lstm-a")["run"] == "q3-lstm-a"


def test_one_decoder_may_be_given_by_its_name():
    assert runs.load_definitions(NOTEBOOK, decoders="lstm").settings.decoders == ("lstm",)


def test_without_out_results_go_to_a_folder_named_after_the_data():
    assert runs.load_definitions(NOTEBOOK, data="/there/data").settings.out == "build/data"


# ----------------------------------------------------------------------- the notebook as committed
def test_committed_notebook_is_one_clean_execution():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not re.search(r"\d+%\|", json.dumps(outputs)), "a progress bar was saved"
    assert len(json.dumps(outputs)) < 2_000_000

    # a cell that a program put in would beat an edit; an output says with which parameters it ran
    assert not [cell for cell in code if "injected-parameters" in cell.metadata.get("tags", [])]
    (settings,) = (cell for cell in code if cell.source.startswith("runs.check_writable("))
    assert "epochs = " in settings.outputs[0].text and "data = 'sample'" in settings.outputs[0].text
