"""transcribe.py: the CTC layer's vote, the beam search, long recordings, and the command line."""

import itertools
import math
from dataclasses import asdict

import runs
import transcribe
import utils
from conftest import SHARED, run_script
from runs import UserError
from tools import sample_speech
from tools.definitions import load_definitions
from utils import PAD, START, STOP

import numpy as np
import pytest
import soundfile
import torch

DEFINITIONS = load_definitions(DEVICE="cpu")


# ---------------------------------------------------------------------------------- the CTC vote
def merged(path):
    """The text of an alignment: repetitions merged, blanks removed."""
    return [token for token, _ in itertools.groupby(path) if token != PAD]


def by_hand(log_p, is_counted):
    """log of the sum over all alignments that are counted."""
    n_frames, n_tokens = log_p.shape
    total = 0.0
    for path in itertools.product(range(n_tokens), repeat=n_frames):
        if is_counted(merged(path)):
            total += math.exp(sum(log_p[s, token] for s, token in enumerate(path)))
    return math.log(total)


@pytest.fixture
def log_p():
    rng = np.random.default_rng(0)
    return np.log(rng.dirichlet(np.ones(6), size=5))  # 5 frames, 6 tokens: 7,776 alignments


def test_prefix_scores_are_sums_over_alignments(log_p):
    score = transcribe.PrefixScore(log_p)
    scores, sums = score.continuations(np.array([START]))
    for token in (3, 4, 5):
        assert scores[0, token] == pytest.approx(by_hand(log_p, lambda g, t=token: g[:1] == [t]))
    assert scores[0, STOP] == pytest.approx(by_hand(log_p, lambda g: g == []))

    score.keep(sums, np.array([0, 0]), np.array([3, 4]))  # go on with the texts "3" and "4"
    scores, _ = score.continuations(np.array([3, 4]))
    for row, first in enumerate((3, 4)):
        for token in (3, 4, 5):  # 3 after 3 needs a blank between
            text = [first, token]
            expected = by_hand(log_p, lambda g, text=text: g[:2] == text)
            assert scores[row, token] == pytest.approx(expected)
        expected = by_hand(log_p, lambda g, first=first: g == [first])
        assert scores[row, STOP] == pytest.approx(expected)


# ------------------------------------------------------------------------------- the beam search
def small_model(decoder_name="lstm", seed=0):
    torch.manual_seed(seed)
    sizes = DEFINITIONS["ModelSizes"](decoder_name, 60, 2.0, d=16, n_blocks=1, dropout=0.0)
    return DEFINITIONS["SpeechToText"](sizes).eval(), sizes


@pytest.mark.parametrize("decoder_name", ["lstm", "transformer"])
def test_a_beam_of_one_without_ctc_is_greedy_decoding(decoder_name):
    model, _ = small_model(decoder_name)
    for seed in range(3):
        features = torch.randn(40, utils.N_MELS, generator=torch.Generator().manual_seed(seed))
        written = transcribe.beam_search(model, features, 20, beam=1, ctc_share=0.0)
        greedy = model.greedy_decode(features[None], torch.tensor([40]), 20)[0].tolist()
        n = min(len(written), len(greedy) - 1)
        assert written[:n] == greedy[1 : n + 1]


def test_a_wide_beam_finds_the_likeliest_text():
    """All texts of at most two of three letters, scored one by one."""
    model, _ = small_model()
    with torch.no_grad():
        for layer in (model.decoder.to_logits, model.ctc):
            layer.bias[:] = -50.0
            layer.bias[[STOP, PAD, 9, 10, 11]] = torch.tensor([0.5, 0.0, 0.0, 0.2, 0.1])
    features = torch.randn(12, utils.N_MELS)
    z, mask = model.encoder(features[None], torch.tensor([12]))
    log_p = model.ctc(z)[0].log_softmax(-1).detach()
    best = {}
    for length in range(3):
        for letters in itertools.product([9, 10, 11], repeat=length):
            text = torch.tensor([[START, *letters, STOP]])
            decoder = model.decoder(text[:, :-1], z, mask)[0].log_softmax(-1)
            decoder = sum(decoder[i, token] for i, token in enumerate(text[0, 1:])).item()
            target = text[:, 1:-1] if letters else torch.zeros(1, 0, dtype=torch.long)
            ctc = -torch.nn.functional.ctc_loss(
                log_p[:, None], target, [6], [length], blank=PAD, reduction="sum"
            ).item()
            best[letters] = 0.6 * decoder + 0.4 * ctc
    expected = max(best, key=best.get)
    written = transcribe.beam_search(model, features, max_tokens=3, beam=1000, ctc_share=0.4)
    assert tuple(written) == expected


# ------------------------------------------------------------------------------------ recordings
def test_long_recordings_are_cut_where_it_is_quiet():
    rate = utils.SAMPLE_RATE
    samples = torch.sin(torch.arange(25 * rate) / 20)
    for second in (8, 15):
        samples[second * rate : second * rate + rate // 2] *= 0.01
    pieces = transcribe.cut_at_silences(samples)
    assert torch.equal(torch.cat(pieces), samples)  # nothing is lost
    assert max(map(len, pieces)) <= 10 * rate
    cuts = np.cumsum([len(piece) for piece in pieces[:-1]]) / rate
    assert 8 <= cuts[0] <= 8.5 and 15 <= cuts[1] <= 15.5
    short = torch.randn(rate)
    assert [len(piece) for piece in transcribe.cut_at_silences(short)] == [rate]


# ---------------------------------------------------------------------------------- command line
@pytest.fixture
def model_file(tmp_path):
    model, sizes = small_model()
    state = {"model": {k: v.half() for k, v in model.state_dict().items()}, "sizes": asdict(sizes)}
    runs.save_checkpoint(tmp_path / "model.pt", {}, state)
    return tmp_path / "model.pt"


def test_one_line_for_each_file_in_order(tmp_path, model_file):
    paths = []
    for name, rate, seconds in (
        ("b.wav", 44_100, 1),
        ("a b.flac", 16_000, 12),
        ("c.ogg", 8_000, 1),
    ):
        paths.append(tmp_path / name)
        sound = 0.1 * np.random.default_rng(0).normal(size=rate * seconds)
        soundfile.write(paths[-1], sound, rate)
    (tmp_path / "broken.wav").write_bytes(b"RIFF and no more")
    files = [paths[0], tmp_path / "missing.wav", paths[1], tmp_path / "broken.wav", paths[2]]
    process = run_script("transcribe.py", *files, "-model", model_file)
    lines = process.stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == list(map(str, paths))
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert "missing.wav does not exist; name another sound file." in process.stderr
    assert "broken.wav is no readable sound file; name another sound file." in process.stderr


def test_no_model_is_one_sentence(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(22_050), 22_050)
    process = run_script("transcribe.py", tmp_path / "a.wav", "-model", tmp_path / "none.pt")
    assert process.returncode == 2 and "none.pt" in process.stderr
    with pytest.raises(UserError, match="there is no model"):
        transcribe.load_model(tmp_path / "none.pt")


# -------------------------------------------------------------- the model that comes with the clone
def similarity_of(reference, written):
    return DEFINITIONS["damerau_levenshtein"](reference, written)


def test_the_model_that_comes_with_the_clone_understands_the_voice(tmp_path):
    text = "The commission also recommends that the sailor sold the letter."
    samples = sample_speech.say(text, speed=0.9, seed=1)
    soundfile.write(tmp_path / "a.wav", samples, sample_speech.SAMPLE_RATE)
    assert transcribe.MODEL.stat().st_size < 5_000_000
    written = transcribe.transcribe(transcribe.load_model(transcribe.MODEL), tmp_path / "a.wav")
    assert similarity_of(text.lower(), written) > 0.6


@pytest.mark.skipif(
    not (SHARED / "LJSpeech-1.1").exists(), reason="no real LJ Speech clips beside this checkout"
)
def test_the_model_that_comes_with_the_clone_understands_real_clips():
    splits, _ = utils.load_ljspeech(SHARED)
    model = transcribe.load_model(transcribe.MODEL)
    similarities = []
    for _, text, path in splits["test"][:4]:
        reference = utils.decode(utils.encode(text))
        similarities.append(similarity_of(reference, transcribe.transcribe(model, path)))
    assert np.mean(similarities) > 0.6
