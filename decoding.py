"""Decoding with a KV cache, checked by the plain decoder on every use, and beam search.

A decoder's `forward` reads a whole text. But while a text is being written, all of it except the
newest letter has been read before: the keys and values of its letters and of the clip, and the
state of an LSTM, stay as they are. `CachedDecoder` keeps them and reads the newest letter only. It
recognises layers called `W_K` and `W_V`, a matrix `positions`, and recurrent layers; a decoder that
was edited in another way would be cached wrongly. So what was written with the cache counts only if
the plain decoder, which reads the finished text once, agrees with it.

`greedy_decode_with_cache` takes the place of the notebook's greedy decoding in evaluation;
`beam_search` is what transcribe.py uses. Shapes: B texts, T letters, S frames of z, D hidden size,
V tokens, W hypotheses of a beam.
"""

import copy
import math
import sys
import weakref
from collections.abc import Callable

from utils import PAD, START, STOP, VOCABULARY

import torch
from torch import Tensor, nn


# ------------------------------------------------------------------------------------ the KV cache
class CachedLinear(nn.Module):
    """A linear map to keys or values that is applied once to each letter, and once to the clip.

    Calls within a step are numbered, because a decoder may use the same layer twice.
    """

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear
        self.cache: list[Tensor] = []  # for each call: (B, letters so far, D) or (1, S, D)
        self.is_text: list[bool] = []  # for each call: of letters, or of the clip
        self.n_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """The newest letter x (B, 1, D), or the clip (B, S, D) -> all keys or values so far."""
        i = self.n_calls
        self.n_calls += 1
        if i == len(self.cache):
            self.cache.append(self.linear(x))
            self.is_text.append(x.shape[1] == 1)
        elif x.shape[1] == 1:
            self.cache[i] = torch.cat([self.cache[i], self.linear(x)], dim=1)
        return self.cache[i]

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the texts."""
        pairs = zip(self.cache, self.is_text, strict=True)
        self.cache = [cached[rows] if is_text else cached for cached, is_text in pairs]


State = Tensor | tuple[Tensor, Tensor]  # of a GRU h, of an LSTM (h, c), each (layers, B, D)


class CachedRNN(nn.Module):
    """An LSTM, GRU or RNN that goes on from the state in which the last letter left it."""

    def __init__(self, rnn: nn.RNNBase):
        super().__init__()
        self.rnn = rnn
        self.states: list[State | None] = []  # for each call
        self.n_calls = 0

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """x (B, 1, D) -> (B, 1, D), and the state after it."""
        i = self.n_calls
        self.n_calls += 1
        if i == len(self.states):
            self.states.append(state)
        x, state = self.rnn(x, self.states[i])
        self.states[i] = state
        return x, state

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the texts."""
        self.states = [_rows_of_state(state, rows) for state in self.states]


def _rows_of_state(state, rows):
    """The state of these texts only."""
    if isinstance(state, tuple):
        return tuple(part[:, rows] for part in state)
    return state[:, rows]


class CachedDecoder:
    """A decoder that reads only the newest letter, for one batch of clips z (B, S, D).

    The first `step` takes START alone, each later one the same text with one more letter.
    """

    def __init__(self, decoder: nn.Module, z: Tensor, mask: Tensor):
        parameters = {id(parameter): parameter for parameter in decoder.parameters()}
        self.decoder = copy.deepcopy(decoder, parameters)  # layers of its own, shared parameters
        self.z, self.mask = z, mask
        self.positions = getattr(decoder, "positions", None)
        self.cached_layers: list[CachedLinear | CachedRNN] = []
        for layer in list(self.decoder.modules()):
            for name, child in list(layer.named_children()):
                if name in ("W_K", "W_V"):
                    self.replace(layer, name, CachedLinear(child))
                elif isinstance(child, nn.RNNBase):
                    self.replace(layer, name, CachedRNN(child))

    def replace(self, layer: nn.Module, name: str, cached_layer: CachedLinear | CachedRNN) -> None:
        setattr(layer, name, cached_layer)
        self.cached_layers.append(cached_layer)

    def step(self, text: Tensor) -> Tensor:
        """text (B, T) -> logits (B, V) of the letter after it."""
        for layer in self.cached_layers:
            layer.n_calls = 0
        if self.positions is not None:  # its row 0 is for the first letter read: the newest one
            del self.decoder.positions  # else only another nn.Parameter could take its place
            self.decoder.positions = self.positions[text.shape[1] - 1 :]
        return self.decoder(text[:, -1:], self.z, self.mask)[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these texts only, (W,) indices; all are of one clip, z (1, S, D)."""
        for layer in self.cached_layers:
            layer.keep(rows)


class PlainDecoder:
    """The same two methods without a cache: each step reads the whole text."""

    def __init__(self, decoder: nn.Module, z: Tensor, mask: Tensor):
        self.decoder, self.z, self.mask = decoder, z, mask

    def step(self, text: Tensor) -> Tensor:
        """text (B, T) -> logits (B, V) of the letter after it."""
        z = self.z.expand(len(text), -1, -1)
        mask = self.mask.expand(len(text), -1, -1, -1)
        return self.decoder(text, z, mask)[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Nothing to do: there is no cache."""


# ----------------------------------------------------------- greedy decoding, checked on every use
# Read letter by letter or at once, the same text gives logits that differ by rounding. The largest
# difference allowed, as a share of the largest logit, is about twice the largest that was measured
# (2.8e-15 in float64, 1.2e-6 in float32; 12 models, both decoders). In bfloat16 it is two steps of
# the format. A cache that did not fit its decoder was off by 8e-3 of it and more.
ROUNDING = {torch.float64: 6e-15, torch.float32: 2.4e-6, torch.bfloat16: 2**-7}
NOT_CACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # decoders whose cache was wrong once


@torch.inference_mode()
def greedy_decode_with_cache(
    greedy_decode: Callable, decoder: nn.Module, z: Tensor, mask: Tensor, max_tokens: int
) -> Tensor:
    """What `greedy_decode(decoder, z, mask, max_tokens)` returns, several times as fast.

    The text is written with a KV cache, then read once by the decoder itself. If the decoder would
    have written another text, or cannot be cached at all, one line says so, and `greedy_decode`
    writes this text and all later ones.
    """

    def decode_with_cache():
        text = _greedy_decode_cached(decoder, z, mask, max_tokens)
        return text, _greedy_mismatch(decoder, z, mask, text)

    def decode_plainly():
        return greedy_decode(decoder, z, mask, max_tokens)

    return cached_or_plain(decoder, decode_with_cache, decode_plainly)


def cached_or_plain(
    decoder: nn.Module,
    decode_with_cache: Callable[[], tuple[Tensor, str | None]],
    decode_plainly: Callable[[], Tensor],
) -> Tensor:
    """What was decoded with the cache if the plain decoder agrees with it, else decoded plainly.

    decode_with_cache: returns a text, and in what the plain decoder disagrees, or None. A decoder
    that was cached wrongly once is not cached again; one line says so.
    """
    if decoder not in NOT_CACHED:
        try:
            text, problem = decode_with_cache()
        except Exception as error:  # if it is the decoder's own fault, it is raised again below
            problem = f"it raises {type(error).__name__}: {error}"
        if problem is None:
            return text
        NOT_CACHED.add(decoder)
        reason = " ".join(problem.split())[:200]
        print(
            f"the KV cache does not fit this decoder ({reason}): decoding plainly", file=sys.stderr
        )
    return decode_plainly()


def _greedy_decode_cached(decoder, z, mask, max_tokens):
    """Greedy decoding, one cached step per letter: (B, up to 1 + max_tokens), PAD after STOP."""
    cached = CachedDecoder(decoder, z, mask)
    text = torch.full((len(z), 1), START, device=z.device)  # (B, 1)
    has_stopped = torch.zeros_like(text, dtype=torch.bool)  # (B, 1)
    for _ in range(max_tokens):
        logits = cached.step(text)  # (B, V)
        logits[:, [START, PAD]] = -math.inf
        letter = logits.argmax(dim=-1, keepdim=True).masked_fill(has_stopped, PAD)  # (B, 1)
        text = torch.cat([text, letter], dim=1)
        has_stopped |= letter == STOP
        if has_stopped.all():
            break
    return text


def _greedy_mismatch(decoder, z, mask, text):
    """None if greedy decoding by the plain decoder writes `text` (B, L); else what differs.

    As in speculative decoding (Leviathan, Kalman and Matias 2023), the decoder reads the finished
    text once, all letters in parallel, and each letter must be the likeliest one after those before
    it. Only a causal decoder says in parallel what it would say step by step, so three prefixes of
    the text are also read alone.
    """
    logits = decoder(text[:, :-1], z, mask)  # (B, L - 1, V): of all letters after START
    tolerance = ROUNDING[logits.dtype] * logits.abs().max()
    is_letter = text[:, 1:] != PAD  # (B, L - 1)

    n_letters = logits.shape[1]
    for n in sorted({1, n_letters // 3, 2 * n_letters // 3} - {0}):
        alone = decoder(text[:, :n], z, mask)[:, -1]  # (B, V)
        difference = (alone - logits[:, n - 1])[is_letter[:, n - 1]].abs().max()
        if not difference <= tolerance:
            return f"the logits of letter {n} change by {difference:.2g} with letters after it"

    logits[..., [START, PAD]] = -math.inf
    chosen = logits.gather(-1, text[:, 1:, None]).squeeze(-1)  # (B, L - 1)
    behind = (logits.amax(dim=-1) - chosen)[is_letter].max()
    if not behind <= tolerance:
        return f"a letter that it wrote is {behind:.2g} behind the likeliest"
    return None


# ------------------------------------------------------------------------------------- beam search
class PrefixScore:
    """CTC prefix scores: how likely the CTC layer finds each continuation of some prefixes.

    A prefix's score is the log-probability that the text begins with it, summed over alignments.
    For every prefix and every s, two sums over the alignments of its letters to the first s frames
    are kept: of those that end in its last letter, and of those that end in a blank.
    """

    def __init__(self, log_p: Tensor):
        """log_p (S, V): the layer's log-probabilities; PAD is the blank."""
        self.log_p = log_p.T.double()  # (V, S)
        self.cumulative = nn.functional.pad(self.log_p.cumsum(dim=1), (1, 0))  # (V, S + 1)
        only_blanks = self.cumulative[None, PAD]  # (1, S + 1): the empty prefix
        self.sums = torch.full_like(only_blanks, -math.inf), only_blanks  # each (W, S + 1)

    def continuations(self, last: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Scores (W, V) of every prefix with every token appended, and the sums of the results.

        last (W,): the last token of each prefix. With STOP the score is that of the whole text.
        """
        in_letter, in_blank = (sums[:, None, :] for sums in self.sums)  # (W, 1, S + 1)
        is_repeated = last[:, None] == torch.arange(len(self.log_p))  # (W, V)
        before = in_letter.masked_fill(is_repeated[:, :, None], -math.inf)  # needs a blank between
        before = before.logaddexp(in_blank)  # (W, V, S + 1)

        # letter(s + 1) = p(s) (letter(s) + before(s)): the letter goes on, or begins in frame s
        # blank(s + 1) = p_blank(s) (blank(s) + letter(s))
        letter = _solve_recursion(before, self.cumulative)  # (W, V, S + 1)
        blank = _solve_recursion(letter, self.cumulative[PAD])
        scores = (before[:, :, :-1] + self.log_p).logsumexp(dim=-1)  # over its first frame, s
        scores[:, STOP] = torch.logaddexp(*self.sums)[:, -1]
        return scores, (letter, blank)

    def keep(self, sums: tuple[Tensor, Tensor], parents: Tensor, tokens: Tensor) -> None:
        """Go on with these prefixes, each with its token appended."""
        letter, blank = sums
        self.sums = letter[parents, tokens], blank[parents, tokens]


def _solve_recursion(y, cumulative):
    """The log of x, where x(0) = 0 and x(s + 1) = p(s) (x(s) + y(s)), from that of y (..., S + 1).

    With P(s) = p(0) ... p(s - 1), whose log is `cumulative`: x(s) = P(s) Σ y(r) / P(r) over r < s.
    """
    sums = (y - cumulative)[..., :-1].logcumsumexp(dim=-1)  # for s = 1 ... S
    return cumulative + nn.functional.pad(sums, (1, 0), value=-math.inf)


class LetterModel(nn.Module):
    """A language model of English: which letter comes next in a text, without hearing anything."""

    def __init__(self, d: int = 64, n_hidden: int = 256, dropout: float = 0.2):
        super().__init__()
        n_tokens = len(VOCABULARY)
        self.embedding = nn.Embedding(n_tokens, d)
        self.gru = nn.GRU(d, n_hidden, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.to_logits = nn.Linear(n_hidden, n_tokens)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (B, T), state (1, B, n_hidden) or None -> logits (B, T, V) and the state after."""
        x, state = self.gru(self.dropout(self.embedding(tokens)), state)
        return self.to_logits(self.dropout(x)), state


# chosen on 22 validation clips
LETTER_SHARE = 0.4  # weight of the letter model's vote, where a model's file has no other
LETTER_BONUS = 1.5  # added for every letter: a letter model prefers short texts


@torch.inference_mode()
def beam_search(
    model: nn.Module,
    features: Tensor,
    max_tokens: int,
    beam: int = 8,
    ctc_share: float = 0.4,
    letters: LetterModel | None = None,
    letter_share: float = LETTER_SHARE,
) -> list[int]:
    """The likeliest text of one clip (T, n_mels), as tokens without START and STOP.

    The decoder and the CTC layer vote together (Hori, Watanabe and Hershey 2017); a CTC layer that
    was not trained has no vote. beam: how many hypotheses are kept at each step. ctc_share: weight
    of the CTC layer's vote. letters: a `LetterModel` on the CPU that votes, too, with the weight
    letter_share.

    The search uses a KV cache. Afterwards the plain decoder reads the text that was found; if it
    gives it another score, the search is repeated without the cache.
    """
    decoder = model.decoder
    z, mask = model.encoder(features[None], torch.tensor([len(features)], device=features.device))
    if not model.sizes.ctc:
        ctc_share = 0.0
    ctc_log_p = model.ctc(z)[0].float().log_softmax(dim=-1).cpu()  # (S, V)

    def search(stepwise):
        return _search(stepwise, max_tokens, beam, ctc_log_p, ctc_share, letters, letter_share)

    def search_with_cache():
        text, score = search(CachedDecoder(decoder, z, mask))
        return text, _score_mismatch(decoder, z, mask, text, score)

    def search_plainly():
        return search(PlainDecoder(decoder, z, mask))[0]

    return cached_or_plain(decoder, search_with_cache, search_plainly)[1:].tolist()


def _score_mismatch(decoder, z, mask, text, score):
    """None if the decoder gives `text` (L,) and a STOP this log-probability; else what differs."""
    logits = decoder(text[None].to(z.device), z, mask)[0]  # (L, V)
    targets = torch.cat([text[1:], torch.tensor([STOP])])  # (L,)
    log_p = logits.cpu().double().log_softmax(dim=-1)
    plain = log_p.gather(-1, targets[:, None]).sum().item()
    tolerance = len(targets) * ROUNDING[logits.dtype] * logits.abs().max().item()
    if abs(score - plain) <= tolerance:
        return None
    return f"it scores a text {score:.2f} that the decoder scores {plain:.2f}"


def _search(decoder, max_tokens, beam, ctc_log_p, ctc_share, letters, letter_share):
    """The best text (L,), with START and without STOP, and its log-probability by the decoder.

    decoder: a CachedDecoder or PlainDecoder. The votes of decoder and CTC only fall as a text
    grows, so the search ends when no unfinished hypothesis is better than the best finished one.
    With the letter model's bonus a score may rise again; then it ends when all are 5 behind.
    """
    device = decoder.z.device
    prefix_score = PrefixScore(ctc_log_p) if ctc_share else None
    hypotheses = torch.tensor([[START]])  # (W, L)
    decoder_scores, letter_scores = torch.zeros(1), torch.zeros(1)  # (W,)
    letter_state, slack = None, 5.0 if letters else 0.0
    best, best_score, best_decoder_score = hypotheses[0], -math.inf, 0.0
    for _ in range(max_tokens):
        logits = decoder.step(hypotheses.to(device)).cpu()  # (W, V)
        of_decoder = decoder_scores[:, None] + logits.double().log_softmax(dim=-1)
        scores = (1 - ctc_share) * of_decoder
        if ctc_share:
            of_ctc, sums = prefix_score.continuations(hypotheses[:, -1])
            scores = scores + ctc_share * of_ctc
        if letters:
            logits, letter_state = letters(hypotheses[:, -1:], letter_state)
            log_p = logits[:, -1].double().log_softmax(dim=-1)
            of_letters = letter_scores[:, None] + log_p + LETTER_BONUS
            scores = scores + letter_share * of_letters
        scores[:, [START, PAD]] = -math.inf

        finished = scores[:, STOP].argmax()
        if scores[finished, STOP] > best_score:
            best, best_score = hypotheses[finished], scores[finished, STOP].item()
            best_decoder_score = of_decoder[finished, STOP].item()
        scores[:, STOP] = -math.inf
        kept = scores.flatten().topk(min(beam, scores.numel()))
        kept = kept.indices[kept.values > best_score - slack]
        if len(kept) == 0:
            break
        parents, tokens = kept // scores.shape[1], kept % scores.shape[1]
        hypotheses = torch.cat([hypotheses[parents], tokens[:, None]], dim=1)
        decoder_scores = of_decoder[parents, tokens]
        decoder.keep(parents.to(device))
        if ctc_share:
            prefix_score.keep(sums, parents, tokens)
        if letters:
            letter_scores, letter_state = of_letters[parents, tokens], letter_state[:, parents]
    return best, best_decoder_score
