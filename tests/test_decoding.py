"""decoding.py: the CTC layer's vote, and the search. (test_q3.py has the fast decoder.)"""

import itertools
import math

import decoding
import runs
import utils
from conftest import ROOT
from utils import PAD, START, STOP

import pytest
import torch
from torch import nn

Q3 = runs.load_definitions(ROOT / "hw2-q3.ipynb", device="cpu")


def small_model():
    torch.manual_seed(0)
    sizes = Q3.ModelSizes("transformer", 60, 2.0, d=16, n_blocks=1, dropout=0.0)
    return Q3.SpeechToText(sizes).double().eval()


# ------------------------------------------------------------------------------------ the CTC vote
def merged(alignment):
    """The text of an alignment: repetitions merged, blanks removed."""
    return [token for token, _ in itertools.groupby(alignment) if token != PAD]


def by_enumeration(log_p, text, goes_on):
    """The log of the sum over all alignments whose text is this one, or that begin with it."""
    n_frames, n_tokens = log_p.shape
    total = 0.0
    for alignment in itertools.product(range(n_tokens), repeat=n_frames):
        whole = merged(alignment)
        if whole == text or (goes_on and whole[: len(text)] == text):
            total += math.exp(sum(log_p[s, token] for s, token in enumerate(alignment)))
    return pytest.approx(math.log(total))


def test_prefix_scores_are_sums_over_alignments():
    torch.manual_seed(0)
    log_p = torch.randn(5, 6).double().log_softmax(dim=-1)  # 7,776 alignments

    def check(scores, text):
        """scores (V,) of `text` with each token behind it."""
        assert scores[STOP].item() == by_enumeration(log_p, text, goes_on=False)
        for token in (3, 4, 5):
            assert scores[token].item() == by_enumeration(log_p, [*text, token], goes_on=True)

    prefix_score = decoding.PrefixScore(log_p)
    scores, sums = prefix_score.continuations(torch.tensor([START]))
    check(scores[0], [])
    prefix_score.keep(sums, torch.tensor([0, 0]), torch.tensor([3, 4]))
    scores, _ = prefix_score.continuations(torch.tensor([3, 4]))
    check(scores[0], [3])  # 3 after 3 needs a blank between
    check(scores[1], [4])


# --------------------------------------------------------------------------------------- the search
def test_a_beam_of_one_without_ctc_is_greedy_decoding():
    model = small_model()
    for _ in range(3):
        features = torch.randn(40, utils.N_MELS, dtype=torch.float64)
        written = decoding.beam_search(model, features, 20, beam=1, ctc_share=0.0)
        z, mask = model.encoder(features[None], torch.tensor([40]))
        greedy = Q3.greedy_decode(model.decoder, z, mask, 20)[0, 1:].tolist()
        assert written == greedy[: len(written)]


def log_p_of(logits, text):
    """The log-probability of a text (1, L), after its START, by these logits (1, L - 1, V)."""
    return -nn.functional.cross_entropy(logits[0], text[0, 1:], reduction="sum").item()


@pytest.mark.parametrize("with_letters", [False, True])
def test_a_wide_beam_finds_the_likeliest_text(with_letters):
    """All texts of at most two of three letters, scored one by one."""
    model = small_model()
    with torch.no_grad():
        for layer in (model.decoder.to_logits, model.ctc):
            layer.bias[:] = -50.0
            layer.bias[[STOP, PAD, 9, 10, 11]] = torch.tensor([0.5, 0.0, 0.0, 0.2, 0.1]).double()
    features = torch.randn(12, utils.N_MELS, dtype=torch.float64)
    z, mask = model.encoder(features[None], torch.tensor([12]))
    log_p = model.ctc(z)[0].log_softmax(dim=-1)
    letters_model = decoding.LetterModel().double().eval() if with_letters else None
    votes = {}
    for n_letters in range(3):
        for letters in itertools.product([9, 10, 11], repeat=n_letters):
            text = torch.tensor([[START, *letters, STOP]])
            ctc = -nn.functional.ctc_loss(
                log_p[:, None], text[:, 1:-1], [6], [n_letters], blank=PAD, reduction="sum"
            ).item()
            votes[letters] = 0.6 * log_p_of(model.decoder(text[:, :-1], z, mask), text) + 0.4 * ctc
            if with_letters:
                english = log_p_of(letters_model(text[:, :-1])[0], text)
                votes[letters] += 0.4 * (english + 1.5 * (n_letters + 1))
    written = decoding.beam_search(model, features, 3, 1000, ctc_share=0.4, letters=letters_model)
    assert tuple(written) == max(votes, key=votes.get)
