"""Question 3 from corpus to results file, against a plain loop: torch's own functions, one clip
at a time wherever padding must not matter, and nothing of ours but the model.
"""

import itertools
import math
from collections import Counter

import runs
import utils
from conftest import ROOT, letter_by_letter, write_corpus
from utils import PAD, STOP, VOCABULARY

import jiwer
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rapidfuzz.distance import DamerauLevenshtein

SMALL = {"d": 16, "n_blocks": 1, "epochs": 2, "batch_size": 4, "learning_rate": 0.005}
q3 = runs.load_definitions(
    ROOT / "hw2-q3.ipynb", data="nowhere", out="nowhere", bf16=0, device="cpu", **SMALL
)
BOTH = pytest.mark.parametrize("decoder_name", ["lstm", "transformer"])


LETTERS = utils.encode("abcdefgh ")[1:-1]  # those of the tiny corpus


class SharpModel(q3.SpeechToText):
    """A model that says much from the start: its texts differ, end early and late, and its
    gradients are long enough to be clipped.
    """

    def __init__(self, sizes):
        super().__init__(sizes)
        with torch.no_grad():
            for name, weights in self.named_parameters():
                if weights.ndim > 1 and name != "decoder.positions":
                    weights *= 4
            self.decoder.to_logits.bias[LETTERS] += 4
            self.decoder.to_logits.bias[STOP] += 9


@pytest.fixture(autouse=True)
def sharp(monkeypatch):
    """The notebook builds this model; one thread, as the tensors are small."""
    monkeypatch.setattr(q3, "SpeechToText", SharpModel)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_corpus(sizes=(("train", 13), ("val", 70), ("test", 67))):
    """Clips in memory, a loud band for each letter; every split has letters and lengths of its own.

    More validation and test clips than one batch of evaluation holds.
    """
    generator = torch.Generator().manual_seed(0)
    letters = {"train": "abcd ", "val": "bcde ", "test": "hfga "}
    corpus = q3.Corpus({"source": "tones", "sha256": "f", "counts": dict(sizes)}, {}, {}, {})
    for split, n_clips in sizes:
        rows, features, tokens = [], [], []
        for i in range(n_clips):
            picked = torch.randint(5, (2 + i % 5,), generator=generator).tolist()
            text = "a" + "".join(letters[split][j] for j in picked) + "b"
            clip = torch.randn(7 + 5 * len(text) + i % 3, 80, generator=generator)
            for place, letter in enumerate(text):
                band = 9 * (letters[split] + "ab").index(letter)
                clip[5 * place : 5 * place + 4, band : band + 9] += 4
            rows.append((f"{split}-{i}", text, None))
            features.append((clip / 4).half())
            tokens.append(torch.tensor(utils.encode(text)))
        corpus.rows[split], corpus.features[split] = rows, features
        corpus.tokens[split] = tokens
    return corpus


# ------------------------------------------------------------------------------- the plain loop
def centred(clip):
    return clip.float() - clip.float().mean(dim=0)


def padded_batch(corpus, indices):
    """Features (B, T, 80), frames and tokens, with T and L rounded up to multiples of 32 and 8."""
    clips = [centred(corpus.features["train"][i]) for i in indices]
    texts = [corpus.tokens["train"][i] for i in indices]
    n_frames = 32 * math.ceil(max(map(len, clips)) / 32)
    n_tokens = 8 * math.ceil(max(map(len, texts)) / 8)
    features = torch.zeros(len(clips), n_frames, 80)
    text = torch.full((len(clips), n_tokens), VOCABULARY.index("@"))
    for row, (clip, tokens) in enumerate(zip(clips, texts, strict=True)):
        features[row, : len(clip)] = clip
        text[row, : len(tokens)] = tokens
    return features, torch.tensor([len(clip) for clip in clips]), text, texts


def hide(features, freq_mask, time_mask):
    """SpecAugment: a start and a width for each clip, first of bands, then of frames."""
    features = features.clone()
    n_clips, n_frames, n_bands = features.shape
    time_mask = min(time_mask, n_frames // 10)
    for axis, size, largest in ((2, n_bands, freq_mask), (1, n_frames, time_mask)):
        if largest < 1:
            continue
        widths = torch.rand(n_clips, 1)[:, 0] * largest
        starts = torch.rand(n_clips, 1)[:, 0] * (size - widths)
        for clip, start, width in zip(features, starts.long(), widths.long(), strict=True):
            clip.narrow(axis - 1, int(start), int(width)).zero_()
    return features


def rate(step, n_steps, settings):
    """The rate of a step, counted from 0: rises for a share of the steps, then half a cosine."""
    n_rising = round(settings.warmup * n_steps)
    if step < n_rising:
        return settings.learning_rate * (step + 1) / n_rising
    share = (step - n_rising) / (n_steps - n_rising)
    return settings.learning_rate * (1 + math.cos(math.pi * share)) / 2


def negative_log_p(logits, tokens):
    """For each token but the first, -log of its probability: logits (L - 1, V), tokens (L,)."""
    log_p = logits.log_softmax(dim=-1)
    return -log_p[range(len(tokens) - 1), tokens[1:]], -log_p.mean(dim=-1)


def train_plainly(decoder_name, corpus, settings):
    """Yield (model, mean loss per token, gradient norms) after every epoch."""
    torch.manual_seed(settings.seed)
    model = SharpModel(q3.sizes_for(corpus, decoder_name, settings))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    lengths = torch.tensor([float(len(clip)) for clip in corpus.features["train"]])
    n_steps = settings.epochs * math.ceil(len(lengths) / settings.batch_size)
    step = 0
    for _ in range(settings.epochs):
        model.train()
        order = (lengths * (1 + 0.05 * torch.rand(len(lengths)))).argsort()
        batches = order.split(settings.batch_size)
        total, n_tokens, norms = 0.0, 0, []
        for place in torch.randperm(len(batches)):
            features, n_frames, text, texts = padded_batch(corpus, batches[place])
            features = hide(features, settings.freq_mask, settings.time_mask)
            z, mask = model.encoder(features, n_frames)
            logits = model.decoder(text[:, :-1], z, mask)
            ctc = model.ctc(z).log_softmax(dim=-1)
            smooth, ctc_losses, plain = [], [], []
            for row, tokens in enumerate(texts):
                of_truth, of_all = negative_log_p(logits[row, : len(tokens) - 1], tokens)
                share = settings.label_smoothing
                smooth.append((1 - share) * of_truth + share * of_all)
                plain.append(of_truth.detach())
                n = (int(n_frames[row]) + 1) // 2
                letters = tokens[1:-1]
                loss = F.ctc_loss(ctc[row, :n], letters, [n], [len(letters)], PAD, "sum")
                ctc_losses.append(loss / len(letters))
            loss = torch.cat(smooth).mean()
            if settings.ctc_weight:
                loss = loss + settings.ctc_weight * torch.stack(ctc_losses).mean()
            model.zero_grad()
            loss.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            for gradient in gradients:
                gradient *= min(1, 1 / (norm + 1e-6))
            optimizer.param_groups[0]["lr"] = rate(step, n_steps, settings)
            optimizer.step()
            step += 1
            norms.append(norm.item())
            total += torch.cat(plain).sum().item()
            n_tokens += len(torch.cat(plain))
        yield model, total / n_tokens, norms


@torch.no_grad()
def evaluate_plainly(model, corpus, split):
    """Loss per token, true and written texts: each clip alone, without padding."""
    model.eval()
    longest = math.ceil(1.2 * max(map(len, corpus.tokens["train"])))
    total, n_tokens, references, hypotheses = 0.0, 0, [], []
    for clip, tokens in zip(corpus.features[split], corpus.tokens[split], strict=True):
        z, _ = model.encoder(centred(clip)[None], torch.tensor([len(clip)]))
        losses, _ = negative_log_p(model.decoder(tokens[None, :-1], z)[0], tokens)
        total += losses.sum().item()
        n_tokens += len(losses)
        written = letter_by_letter(model.decoder, z, longest)
        hypotheses.append("".join(VOCABULARY[token] for token in written[1:] if token != STOP))
        references.append("".join(VOCABULARY[token] for token in tokens[1:-1]))
    return total / n_tokens, references, hypotheses


def similarities(a, b):
    """Damerau-Levenshtein, Jaccard and cosine of two texts."""
    count_a, count_b = Counter(a), Counter(b)
    both = sum(min(count_a[letter], count_b[letter]) for letter in VOCABULARY)
    either = sum(max(count_a[letter], count_b[letter]) for letter in VOCABULARY)
    edits = DamerauLevenshtein.distance(a, b) / max(len(a), len(b))
    return 1 - edits, both / either, both / math.sqrt(len(a) * len(b)) if a and b else 0.0


def scores(references, hypotheses):
    pairs = zip(references, hypotheses, strict=True)
    means = np.mean([similarities(a, b) for a, b in pairs], axis=0)
    return {
        **dict(zip(("damerau_levenshtein", "jaccard", "cosine"), means, strict=True)),
        "wer": jiwer.wer(references, hypotheses),
        "cer": jiwer.cer(references, hypotheses),
    }


def is_about(expected):
    """`expected`, its numbers within rounding, at any depth of dicts and lists."""
    if isinstance(expected, dict):
        return {key: is_about(value) for key, value in expected.items()}
    if isinstance(expected, list):
        return [is_about(value) for value in expected]
    if isinstance(expected, float):
        return pytest.approx(expected, rel=1e-5, abs=1e-7)
    return expected


# --------------------------------------------------------------------------- the whole protocol
@pytest.mark.parametrize("masks", [0, 12])
@BOTH
def test_training_evaluation_and_results_equal_the_plain_loop(
    decoder_name, masks, tmp_path, monkeypatch
):
    """Every field of the results file; without SpecAugment, and with it."""
    clock = itertools.count()
    monkeypatch.setattr(runs.time, "perf_counter", lambda: float(next(clock)))
    corpus = tiny_corpus()
    changed = {"out": str(tmp_path), "freq_mask": masks, "time_mask": masks, "dropout": 0.2}
    settings = runs.changed(q3.settings, **changed)

    epochs, all_norms = [], []
    for epoch, (model, loss, norms) in enumerate(train_plainly(decoder_name, corpus, settings), 1):
        val_loss, references, hypotheses = evaluate_plainly(model, corpus, "val")
        row = {"epoch": epoch, "train_loss": loss, "val_loss": val_loss}
        epochs.append({**row, **scores(references, hypotheses), "seconds": 1.0})
        all_norms += norms
    test_loss, references, hypotheses = evaluate_plainly(model, corpus, "test")
    similarity = [similarities(a, b)[0] for a, b in zip(references, hypotheses, strict=True)]
    assert max(all_norms) > 1 and len({len(text) for text in hypotheses}) > 2  # as promised
    assert len(set(hypotheses)) > 10 and len(set(similarity)) > 5

    shifted = references[33:] + references[:33]
    n_trained = sum(p.numel() for p in [*model.encoder.parameters(), *model.decoder.parameters()])
    expected = {
        "question": "q3",
        "run": f"q3-{decoder_name}",
        "seed": 42,
        "status": "finished",
        "data": corpus.info,
        "seconds": 2.0,
        "epochs": epochs,
        "test": {"loss": test_loss, **scores(references, hypotheses), "seconds_per_clip": 1 / 67},
        "layers": str(model.decoder).splitlines(),
        "parameters": n_trained,
        "untrained": [],
        "unrelated": scores(references, shifted),
        "clips": {
            "seconds": [round(len(c) * 256 / 22_050, 2) for c in corpus.features["test"]],
            "letters": [len(text) for text in references],
            "written": [len(text) for text in hypotheses],
            "damerau_levenshtein": [round(value, 4) for value in similarity],
            "reference": references,
            "hypothesis": hypotheses,
        },
    }
    run = q3.train(decoder_name, corpus, settings)
    assert run.result["status"] == "interrupted"  # until it was tested
    q3.test(run, corpus, settings)
    found = runs.load_result(tmp_path, f"q3-{decoder_name}")
    assert {key: found[key] for key in expected} == is_about(expected)
    others = {"command", "config", "environment", "intervals", "examples"}
    assert set(found) == {*expected, *others}

    config = {**SMALL, "dropout": 0.2, "freq_mask": masks, "time_mask": masks, "bf16": 0}
    given = {key: value for key, value in vars(settings).items() if key in found["config"]}
    assert found["config"] == {**given, **config}
    assert {"seed", "warmup", "label_smoothing", "ctc_weight", "clock"} <= set(found["config"])
    form = {"python": str, "torch": str, "device": str, "threads": int, "processor": str}
    assert {key: type(found["environment"][key]) for key in form} == form
    low, high = found["intervals"]["damerau_levenshtein"]
    assert low < np.mean(similarity) < high
    check_examples(found["examples"], references, hypotheses, similarity)


def check_examples(examples, references, hypotheses, similarity):
    """Each rank's clip, with its own true and written text and its own scores."""
    ranked = sorted(similarity)
    ranks = {"worst": 0, "lower quartile": 67 // 4, "median": 67 // 2, "best": 66}
    for rank, place in ranks.items():
        assert examples[rank]["damerau_levenshtein"] == pytest.approx(ranked[place])
    pairs = list(zip(references, hypotheses, strict=True))
    excess = [similarities(a, b)[2] - similarities(a, b)[0] for a, b in pairs]
    misleading = examples["most misleading cosine"]
    gap = misleading["cosine"] - misleading["damerau_levenshtein"]
    assert gap == pytest.approx(max(excess))
    for example in examples.values():
        i = int(example["clip"].removeprefix("test-"))
        assert (example["reference"], example["hypothesis"]) == pairs[i]
        expected = scores([references[i]], [hypotheses[i]])
        assert {key: example[key] for key in expected} == is_about(expected)


@BOTH
def test_the_order_of_clips_changes_no_score(decoder_name):
    torch.manual_seed(0)
    corpus = tiny_corpus()
    model = SharpModel(q3.sizes_for(corpus, decoder_name, q3.settings))
    metrics, references, hypotheses = q3.evaluate(model, corpus, "val", q3.settings)
    for lists in (corpus.rows, corpus.features, corpus.tokens):
        lists["val"] = lists["val"][::-1]
    again, *texts = q3.evaluate(model, corpus, "val", q3.settings)
    assert again == is_about(metrics) and texts == [references[::-1], hypotheses[::-1]]


# ------------------------------------------------------------------------- what each setting does
STAGES = ("tokens", "weights", "order", "inputs", "first loss", "second loss")
TRAINING = {"second loss"}
EVERYTHING = set(STAGES) - {"tokens"}
CHANGES = {  # setting: (another value, the stages at which something differs)
    "d": (24, EVERYTHING),
    "n_heads": (4, {"first loss", "second loss"}),
    "n_blocks": (2, EVERYTHING),
    "epochs": (3, TRAINING),
    "batch_size": (5, {"order", "inputs", "first loss", "second loss"}),
    "learning_rate": (0.01, TRAINING),
    "warmup": (0.5, TRAINING),
    "dropout": (0.3, {"first loss", "second loss"}),
    "label_smoothing": (0.2, TRAINING),
    "ctc_weight": (0.2, TRAINING),
    "freq_mask": (0, {"inputs", "first loss", "second loss"}),
    "time_mask": (0, {"inputs", "first loss", "second loss"}),
    "clock": (0, EVERYTHING),
    "max_text_len": (5, {"tokens", "weights", "first loss", "second loss"}),  # and the clock
    "seed": (43, EVERYTHING),
    # where and how, not what: tested with what they are for
    **dict.fromkeys(("data", "out", "decoders", "bf16", "device", "resume", "tag", "show")),
}


def stages_of(corpus, settings, monkeypatch):
    """What two steps of a transformer's training begin with, see and give: {stage: tensor}."""
    found = {"tokens": torch.cat(corpus.tokens["train"])}
    with monkeypatch.context() as patch:
        batches, inputs, losses = [], [], []
        make, hide, step = q3.get_batch, q3.spec_augment, q3.train_batch

        def get_batch(corpus, split, indices):
            batches.append(torch.as_tensor(indices))
            return make(corpus, split, indices)

        def spec_augment(features, settings):
            inputs.append(hide(features, settings))
            return inputs[-1]

        def train_batch(*arguments):
            losses.append(step(*arguments))
            return losses[-1]

        patch.setattr(q3, "get_batch", get_batch)
        patch.setattr(q3, "spec_augment", spec_augment)
        patch.setattr(q3, "train_batch", train_batch)
        run = q3.new_run("transformer", corpus, settings)
        found["weights"] = torch.cat([p.detach().flatten() for p in run.model.parameters()])
        q3.train_epoch(run.model, run.optimizer, run.schedule, corpus, settings, 1)
    found["order"] = torch.cat(batches)
    found["inputs"] = inputs[0]
    found["first loss"], found["second loss"] = losses[:2]
    return found


def differing(a, b):
    return {stage for stage in STAGES if not torch.equal(a[stage], b[stage])}


def test_every_setting_changes_what_it_says_and_nothing_else(tmp_path, monkeypatch):
    assert set(CHANGES) == set(runs.parameters_of(ROOT / "hw2-q3.ipynb"))
    write_corpus(tmp_path, 30)
    places = {"data": str(tmp_path), "out": str(tmp_path / "out")}
    settings = runs.changed(q3.settings, **places)
    corpus = q3.load_corpus(settings)
    usual = stages_of(corpus, settings, monkeypatch)
    assert not differing(usual, stages_of(corpus, settings, monkeypatch))
    for name, change in CHANGES.items():
        if change:
            value, stages = change
            other = runs.changed(settings, **{name: value})
            corpus = q3.load_corpus(other)
            found = stages_of(corpus, other, monkeypatch)
            assert differing(usual, found) == stages, name


def test_the_steps_of_the_schedule_are_those_of_all_epochs():
    """The first, the rising, the highest and the last one."""
    corpus = tiny_corpus()
    run = q3.new_run("lstm", corpus, runs.changed(q3.settings, epochs=5, warmup=0.3))
    rates = []
    for _ in range(20):  # five epochs of four batches
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        run.schedule.step()
    expected = [0.005 * (step + 1) / 6 for step in range(6)]
    expected += [0.0025 * (1 + math.cos(math.pi * step / 14)) for step in range(14)]
    assert rates == pytest.approx(expected)


def test_positions_start_on_the_encoders_clock():
    corpus = tiny_corpus()
    decoder = q3.SpeechToText(q3.sizes_for(corpus, "transformer", q3.settings)).decoder
    n_frames = sum(len(clip) for clip in corpus.features["train"]) / 2  # of z
    n_tokens = sum(len(tokens) for tokens in corpus.tokens["train"])
    for t in (0, 1, 9):
        for i in (0, 3):
            angle = t * n_frames / n_tokens / 10_000 ** (2 * i / 16)
            assert decoder.positions[t, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-5)


# ------------------------------------------------------------------------------- corpus and kernels
def test_the_corpus_is_what_is_said_and_heard_of_each_split(tmp_path):
    write_corpus(tmp_path, 20)
    corpus = q3.load_corpus(runs.changed(q3.settings, data=str(tmp_path), out=str(tmp_path)))
    first = {split: rows[0][0] for split, rows in corpus.rows.items()}
    assert first == {"train": "LJ001-0000", "val": "LJ001-0015", "test": "LJ001-0016"}
    for split, rows in corpus.rows.items():
        for (_, text, path), clip, tokens in zip(
            rows, corpus.features[split], corpus.tokens[split], strict=True
        ):
            assert torch.equal(clip, utils.log_mel(utils.read_audio(path)).half())
            assert tokens.tolist() == utils.encode(text)


@BOTH
def test_the_fused_kernel_gives_the_same(decoder_name, monkeypatch):
    """What runs on a GPU, run here: with padding and causal masks."""
    torch.manual_seed(0)
    corpus = tiny_corpus()
    model = SharpModel(q3.sizes_for(corpus, decoder_name, q3.settings)).eval()
    batch = q3.get_batch(corpus, "val", range(9))
    with torch.no_grad():
        plain = model(*batch)
        monkeypatch.setattr(q3, "is_fused_faster", lambda Q: True)
        monkeypatch.setattr(q3, "attention", None)  # nobody calls it now
        torch.testing.assert_close(model(*batch), plain, atol=1e-4, rtol=1e-5)


@BOTH
def test_bfloat16_gives_about_the_same(decoder_name, monkeypatch):
    corpus = tiny_corpus()
    losses = []
    for uses_it in (False, True):
        monkeypatch.setattr(q3, "uses_bf16", lambda settings, uses_it=uses_it: uses_it)
        run = q3.new_run(decoder_name, corpus, q3.settings)
        batch = q3.get_batch(corpus, "train", range(4))
        losses.append(q3.train_batch(run.model, run.optimizer, batch, q3.settings).item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]


@pytest.mark.parametrize("is_used", [False, True])
def test_bfloat16_is_recorded_as_it_was_used(is_used, monkeypatch):
    """Not as it was asked for: most processors do not have it."""
    monkeypatch.setattr(q3, "uses_bf16", lambda settings: is_used)
    for asked in (0, 1):
        settings = runs.changed(q3.settings, bf16=asked)
        assert q3.new_run("lstm", tiny_corpus(), settings).result["config"]["bf16"] == is_used
