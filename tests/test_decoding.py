"""decoding.py: the CTC layer's vote and the beam search. (The KV cache: test_q3.py.)"""

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
    """The log-probability of this text, or of all texts that begin so: a sum over alignments."""
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
        """scores (V,): of `text` with each token appended."""
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


VOTERS = pytest.mark.parametrize("with_letters", [False, True])
FOUR = (9, 10, 11, 12)  # a b c d


def opinionated_model(seed):
    """A model and a model of letters that write only four letters, and disagree strongly about
    which of these comes next.
    """
    torch.manual_seed(seed)
    model = small_model()
    torch.manual_seed(seed)
    english = decoding.LetterModel().double().eval()
    with torch.no_grad():
        for layer in (model.decoder.to_logits, model.ctc, english.to_logits):
            nn.init.normal_(layer.weight, std=0.4)
            layer.bias.fill_(-60.0)
            layer.bias[[STOP, PAD, *FOUR]] = torch.randn(6).double()
        for weights in english.gru.parameters():
            weights *= 8
    return model, english


def log_p_of(logits, text):
    """The log-probability of a text (1, L), after its START, by these logits (1, L - 1, V)."""
    return -nn.functional.cross_entropy(logits[0], text[0, 1:], reduction="sum").item()


@torch.no_grad()
def votes_of_all_texts(model, english, features, longest):
    """{letters: (decoder's, CTC's, English's log-probability)} of every text of four letters."""
    z, mask = model.encoder(features[None], torch.tensor([len(features)]))
    ctc_log_p = model.ctc(z)[0].log_softmax(dim=-1)[:, None]  # (S, 1, V)
    votes = {}
    for n_letters in range(longest + 1):
        for letters in itertools.product(FOUR, repeat=n_letters):
            text = torch.tensor([[START, *letters, STOP]])
            decoder = log_p_of(model.decoder(text[:, :-1], z, mask), text)
            lengths = [len(ctc_log_p)], [n_letters]
            ctc = -nn.functional.ctc_loss(ctc_log_p, text[:, 1:-1], *lengths, PAD, "sum").item()
            votes[letters] = decoder, ctc, log_p_of(english(text[:, :-1])[0], text)
    return votes


@VOTERS
def test_a_wide_beam_finds_the_likeliest_text(with_letters):
    """Every text of up to three letters is scored, one by one, for eight models and clips.

    Every vote must matter: without one of them, other texts would have been likeliest.
    """
    found, without = [], {"decoder": [], "CTC": [], "letters": [], "bonus": []}
    for seed in range(8):
        model, english = opinionated_model(seed)
        features = torch.randn(14, utils.N_MELS, dtype=torch.float64)
        votes = votes_of_all_texts(model, english, features, longest=3)

        def likeliest(decoder=0.6, ctc=0.4, letters=0.4, bonus=1.5, votes=votes):
            def total(text):
                a, b, c = votes[text]
                return decoder * a + ctc * b + letters * (c + bonus * (len(text) + 1))

            return max(votes, key=total)

        heard = {} if with_letters else {"letters": 0.0}
        letters = english if with_letters else None
        written = decoding.beam_search(model, features, 4, beam=1000, letters=letters)
        assert tuple(written) == likeliest(**heard)
        found.append(likeliest(**heard))
        without["decoder"].append(likeliest(decoder=0.0, **heard))
        without["CTC"].append(likeliest(ctc=0.0, **heard))
        without["letters"].append(likeliest(letters=0.0))
        without["bonus"].append(likeliest(bonus=0.0, **heard))
    assert len(set(found)) > 2
    counted = set(without) if with_letters else {"decoder", "CTC"}
    assert all(without[vote] != found for vote in counted)


def test_a_text_that_falls_behind_at_first_may_still_win():
    """To the model of letters "a" is unlikely as the first letter, but likely after another one."""
    model = small_model()
    with torch.no_grad():
        model.decoder.to_logits.weight.zero_()
        model.decoder.to_logits.bias.fill_(-60.0)
        model.decoder.to_logits.bias[[STOP, 9]] = torch.tensor([0.1, 0.9]).log().double()

    def letters(last, state):
        logits = torch.full((len(last), 1, 35), -60.0)
        logits[:, 0, STOP] = 0.0
        logits[:, 0, 9] = torch.where(last[:, 0] == START, -6.0, 0.0)
        return logits, torch.zeros(1, len(last), 1)

    features = torch.randn(90, utils.N_MELS, dtype=torch.float64)
    written = decoding.beam_search(model, features, 20, ctc_share=0.0, letters=letters)
    assert written == [9] * 19
