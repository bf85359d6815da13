"""Decoding one letter at a time without computing anything twice, and a search over texts.

A decoder's `forward` reads a whole text. While a text is being written, all of it but the newest
letter has been read before: the keys and values of its letters, those of the clip and the state of
an LSTM stay as they are. `FastDecoder` remembers them and reads the newest letter alone. It knows
`W_K`, `W_V`, `positions` and recurrent layers; whatever else of a decoder is edited, it follows.

It is called as the decoder is, so the notebook's greedy decoding takes either; `beam_search` is
what transcribe.py uses. Shapes: B texts, S frames of z, D hidden size, V tokens.
"""

import copy
import math

from utils import PAD, START, STOP, VOCABULARY

import torch
from torch import nn


# ------------------------------------------------------------------------------ remember, not redo
class Remember(nn.Module):
    """A linear map of keys or of values that is applied once to each letter, and once to the clip.

    Its calls are counted within a step, because a decoder may use the same layer twice.
    """

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.memories = []  # one for each call of a step: (B, letters so far, D) or (1, S, D)
        self.is_text = []  # whether it is of letters
        self.n_calls = 0

    def forward(self, x):
        """x (B, 1, D), the newest letter, or (B, S, D), the clip -> all keys or values so far."""
        i = self.n_calls
        self.n_calls += 1
        if i == len(self.memories):
            self.memories.append(self.linear(x))
            self.is_text.append(x.shape[1] == 1)
        elif x.shape[1] == 1:
            self.memories[i] = torch.cat([self.memories[i], self.linear(x)], dim=1)
        return self.memories[i]


class RememberState(nn.Module):
    """An LSTM, GRU or RNN that goes on from the state in which its last letter left it."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        self.states = []  # one for each call of a step
        self.n_calls = 0

    def forward(self, x, state=None):
        """x (B, 1, D) -> (B, 1, D), and the state after it."""
        i = self.n_calls
        self.n_calls += 1
        if i == len(self.states):
            self.states.append(state)
        x, self.states[i] = self.rnn(x, self.states[i])
        return x, self.states[i]


class FastDecoder:
    """A decoder of the notebook that reads only the newest letter, for one batch of clips.

    It is called as the decoder is, first with START alone, then with one letter more each time.
    """

    def __init__(self, decoder):
        parameters = {id(parameter): parameter for parameter in decoder.parameters()}
        self.decoder = copy.deepcopy(decoder, parameters)  # its own layers, the same parameters
        self.positions = getattr(decoder, "positions", None)
        self.remembering = []
        for layer in list(self.decoder.modules()):
            for name, child in list(layer.named_children()):
                if name in ("W_K", "W_V"):
                    self.remember(layer, name, Remember(child))
                elif isinstance(child, nn.RNNBase):
                    self.remember(layer, name, RememberState(child))

    def remember(self, layer, name, remembering):
        setattr(layer, name, remembering)
        self.remembering.append(remembering)

    def __call__(self, text, z, mask=None):
        """text (B, T), z (B, S, D), mask (B, 1, 1, S) -> logits of the next letter (B, 1, V)."""
        for remembering in self.remembering:
            remembering.n_calls = 0
        if self.positions is not None:  # the newest letter stands at the beginning of the rest
            del self.decoder.positions
            self.decoder.positions = self.positions[text.shape[1] - 1 :]
        return self.decoder(text[:, -1:], z, mask)

    def keep(self, rows):
        """Go on with these of the texts, (W,) indices, all of one clip: z is (1, S, D)."""
        for remembering in self.remembering:
            if isinstance(remembering, RememberState):
                remembering.states = [_rows_of_state(s, rows) for s in remembering.states]
            else:
                pairs = zip(remembering.memories, remembering.is_text)
                remembering.memories = [m[rows] if text else m for m, text in pairs]


def _rows_of_state(state, rows):
    """These of the texts in an LSTM's (h, c) or a GRU's h, each (layers, B, D)."""
    if isinstance(state, tuple):
        return tuple(part[:, rows] for part in state)
    return state[:, rows]


# ----------------------------------------------------------------------------- a search over texts
class PrefixScore:
    """How likely the CTC layer finds each continuation of some texts.

    The score of a text g is the log of the sum over all alignments that begin with g. For every
    text two sums over the alignments of its letters to the first s frames are kept: of those that
    end in its last letter, and of those that end in a blank.
    """

    def __init__(self, log_p, blank=PAD):
        """log_p (S, V): the layer's log-probabilities."""
        self.log_p = log_p.T.double()  # (V, S)
        self.so_far = nn.functional.pad(self.log_p.cumsum(dim=1), (1, 0))  # (V, S + 1)
        self.blank = blank
        only_blanks = self.so_far[None, blank]  # (1, S + 1): the empty text
        self.sums = torch.full_like(only_blanks, -math.inf), only_blanks  # of each text: (W, S + 1)

    def continuations(self, last):
        """Scores (W, V) of each text with each token behind it, and the sums of the longer texts.

        last (W,): the last token of each text. STOP ends a text: its score is that of the whole.
        """
        in_letter, in_blank = (sums[:, None, :] for sums in self.sums)  # (W, 1, S + 1)
        is_repeated = last[:, None] == torch.arange(len(self.log_p))  # (W, V): a blank between
        before = in_letter.masked_fill(is_repeated[:, :, None], -math.inf)
        before = before.logaddexp(in_blank)  # (W, V, S + 1)

        # letter(s + 1) = p(s) (letter(s) + before(s)): the letter goes on, or begins in frame s
        # blank(s + 1) = p_blank(s) (blank(s) + letter(s))
        letter = _unroll(before, self.so_far)  # (W, V, S + 1)
        blank = _unroll(letter, self.so_far[self.blank])
        scores = (before[:, :, :-1] + self.log_p).logsumexp(dim=-1)  # its first frame is frame s
        scores[:, STOP] = torch.logaddexp(*self.sums)[:, -1]
        return scores, (letter, blank)

    def keep(self, sums, texts, tokens):
        """Go on with these texts, each with its token behind it."""
        letter, blank = sums
        self.sums = letter[texts, tokens], blank[texts, tokens]


def _unroll(y, so_far):
    """The logs of x(0) = 0, x(s + 1) = p(s) (x(s) + y(s)), from those of y: (..., S + 1).

    With P(s) = p(0) ... p(s - 1), of which `so_far` is the log: x(s) = P(s) sum over r < s of
    y(r) / P(r).
    """
    sums = (y - so_far)[..., :-1].logcumsumexp(dim=-1)  # over r < s, for s = 1 ... S
    return so_far + nn.functional.pad(sums, (1, 0), value=-math.inf)


class LetterModel(nn.Module):
    """How English goes on: the likely next letters of a text that nobody need have said."""

    def __init__(self, d=64, n_hidden=256, dropout=0.2):
        super().__init__()
        n_tokens = len(VOCABULARY)
        self.embedding = nn.Embedding(n_tokens, d)
        self.gru = nn.GRU(d, n_hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.to_logits = nn.Linear(n_hidden, n_tokens)

    def forward(self, tokens, state=None):
        """tokens (B, T), state (1, B, n_hidden) or None -> logits (B, T, V) and the state after."""
        x, state = self.gru(self.dropout(self.embedding(tokens)), state)
        return self.to_logits(self.dropout(x)), state


LETTER_SHARE = 0.4  # of the model of letters; chosen, as its bonus, on 22 validation clips
LETTER_BONUS = 1.5  # for every letter: a model of letters alone finds short texts likelier


@torch.inference_mode()
def beam_search(model, features, max_tokens, beam=8, ctc_share=0.4, letters=None):
    """The likeliest text of one clip (T, n_mels), as tokens without START and STOP.

    The decoder and the CTC layer vote together (Hori, Watanabe and Hershey 2017). Both votes only
    fall as a text grows, so the search is over when no unfinished text is better than the best
    finished one. beam: texts that are kept at each step. ctc_share: of the CTC layer's vote.
    letters: a `LetterModel` on the CPU that votes, too; with its bonus a text may gain again, so
    the search then goes on until all unfinished texts are 5 behind.
    """
    device = features.device
    z, mask = model.encoder(features[None], torch.tensor([len(features)], device=device))
    prefix_score = PrefixScore(model.ctc(z)[0].float().log_softmax(dim=-1).cpu())
    fast = FastDecoder(model.decoder)

    texts = torch.tensor([[START]])  # (W, L)
    decoder_scores, letter_scores = torch.zeros(1), torch.zeros(1, 1)  # (W,), (W, 1)
    state, slack = None, 5.0 if letters else 0.0
    best_text, best_score = texts[0], -math.inf
    for _ in range(max_tokens):
        logits = fast(texts.to(device), z, mask)[:, -1]  # (W, V), of the next token
        log_p = logits.cpu().double().log_softmax(dim=-1)
        decoder = decoder_scores[:, None] + log_p
        ctc, sums = prefix_score.continuations(texts[:, -1])
        scores = (1 - ctc_share) * decoder + ctc_share * ctc  # (W, V)
        if letters:
            logits, state = letters(texts[:, -1:], state)
            letter = letter_scores + logits[:, -1].double().log_softmax(dim=-1) + LETTER_BONUS
            scores = scores + LETTER_SHARE * letter
        scores[:, [START, PAD]] = -math.inf

        finished = scores[:, STOP].argmax()
        if scores[finished, STOP] > best_score:
            best_text, best_score = texts[finished], scores[finished, STOP].item()
        scores[:, STOP] = -math.inf
        kept = scores.flatten().topk(min(beam, scores.numel()))
        kept = kept.indices[kept.values > best_score - slack]
        if len(kept) == 0:
            break
        parents, tokens = kept // scores.shape[1], kept % scores.shape[1]
        texts = torch.cat([texts[parents], tokens[:, None]], dim=1)
        decoder_scores = decoder[parents, tokens]
        prefix_score.keep(sums, parents, tokens)
        fast.keep(parents.to(device))
        if letters:
            letter_scores, state = letter[parents, tokens][:, None], state[:, parents]
    return best_text[1:].tolist()
