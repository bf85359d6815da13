"""Decoding with a KV cache, proved on every use by the plain decoder, and a search over texts.

A decoder's `forward` reads a whole text. While a text is being written, all of it but the newest
letter has been read before: the keys and values of its letters, those of the clip and the state of
an LSTM stay as they are. `CachedDecoder` keeps them and reads the newest letter alone. It knows
layers called `W_K` and `W_V`, a matrix `positions`, and recurrent layers. A decoder that was edited
in another way would be cached wrongly; so what was written with the cache counts only if the plain
decoder, which reads the finished text once, agrees with it.

`greedy_decode_with_cache` takes the place of the notebook's greedy decoding in evaluation;
`beam_search` is what transcribe.py uses. Shapes: B texts, T letters, S frames of z, D hidden size,
V tokens.
"""

import copy
import math
import weakref
from collections.abc import Callable

from utils import PAD, START, STOP, VOCABULARY

import torch
from torch import Tensor, nn


# ------------------------------------------------------------------------------------ the KV cache
class CachedLinear(nn.Module):
    """A linear map to keys or values that is applied once to each letter, and once to the clip.

    Its calls are counted within a step, because a decoder may use the same layer twice.
    """

    def __init__(self, linear: nn.Module):
        super().__init__()
        self.linear = linear
        self.cache: list[
            Tensor
        ] = []  # one for each call of a step: (B, letters so far, D) or (1, S, D)
        self.is_text: list[bool] = []  # whether it is of letters
        self.n_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 1, D), the newest letter, or (B, S, D), the clip -> all keys or values so far."""
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
        self.cache = [kept[rows] if text else kept for kept, text in pairs]


State = Tensor | tuple[Tensor, Tensor]  # of a GRU h, of an LSTM (h, c), each (layers, B, D)


class CachedRNN(nn.Module):
    """An LSTM, GRU or RNN that goes on from the state in which its last letter left it."""

    def __init__(self, rnn: nn.RNNBase):
        super().__init__()
        self.rnn = rnn
        self.states: list[State | None] = []  # one for each call of a step
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
    """These of the texts in an LSTM's (h, c) or a GRU's h, each (layers, B, D)."""
    if isinstance(state, tuple):
        return tuple(part[:, rows] for part in state)
    return state[:, rows]


class CachedDecoder:
    """A decoder that reads only the newest letter, for one batch of clips: z (B, S, D), its mask.

    Give `step` a text of START alone first, then one letter more each time.
    """

    def __init__(self, decoder: nn.Module, z: Tensor, mask: Tensor | None = None):
        parameters = {id(parameter): parameter for parameter in decoder.parameters()}
        self.decoder = copy.deepcopy(decoder, parameters)  # its own layers, the same parameters
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
        if self.positions is not None:  # what is read stands in row 0: here, the newest letter
            del self.decoder.positions
            self.decoder.positions = self.positions[text.shape[1] - 1 :]
        return self.decoder(text[:, -1:], self.z, self.mask)[:, -1]

    def keep(self, rows: Tensor) -> None:
        """Go on with these of the texts, (W,) indices, all of one clip: z is (1, S, D)."""
        for layer in self.cached_layers:
            layer.keep(rows)


class PlainDecoder:
    """The same two methods without a cache: each step reads the whole text."""

    def __init__(self, decoder: nn.Module, z: Tensor, mask: Tensor | None = None):
        self.decoder, self.z, self.mask = decoder, z, mask

    def step(self, text: Tensor) -> Tensor:
        """text (B, T) -> logits (B, V) of the letter after it."""
        z = self.z.expand(len(text), -1, -1)
        mask = None if self.mask is None else self.mask.expand(len(text), -1, -1, -1)
        return self.decoder(text, z, mask)[:, -1]

    def keep(self, rows: Tensor) -> None:
        """There is nothing to keep."""


# ------------------------------------------------------------ greedy decoding, proved on every use
# Two readings of the same letters by the same decoder differ by rounding. Measured, as a share of
# the largest logit: in float32 at most 1.2e-6 (12 models, both decoders, weights up to six times
# as large as at first; 3e-7 for the model that comes with the clone on 97 real clips), in bfloat16
# not at all (these clips, products emulated); no letter of 10,881 and 10,948 differed. Allowed is
# twice that, and in bfloat16 two steps of the format. (Edits that are to be noticed change logits
# of about 7 by 0.06 and more.)
ROUNDING = {torch.float64: 6e-15, torch.float32: 2.4e-6, torch.bfloat16: 2**-7}
NOT_CACHED: weakref.WeakSet[nn.Module] = (
    weakref.WeakSet()
)  # decoders for which the cache was wrong once


@torch.inference_mode()
def greedy_decode_with_cache(
    greedy_decode: Callable, decoder: nn.Module, z: Tensor, mask: Tensor | None, max_tokens: int
) -> Tensor:
    """What `greedy_decode(decoder, z, mask, max_tokens)` returns, several times as fast.

    The text is written with a KV cache, then read by the decoder itself. Where the decoder would
    not have written it, or cannot be cached at all, one line says so, and this text and all that
    follow are written by `greedy_decode`.
    """

    def write():
        text = _write_with_cache(decoder, z, mask, max_tokens)
        return text, why_not_written(decoder, z, mask, text)

    return cached_or_plain(decoder, write, lambda: greedy_decode(decoder, z, mask, max_tokens))


def cached_or_plain(
    decoder: nn.Module,
    write_with_cache: Callable[[], tuple[Tensor, str | None]],
    write_plainly: Callable[[], Tensor],
) -> Tensor:
    """What was written with the cache where the decoder agrees with it; else written plainly.

    write_with_cache: gives what it wrote, and why the decoder would not have written it, or None.
    Once a cache was wrong, its decoder is not cached any more, which one line says.
    """
    if decoder not in NOT_CACHED:
        try:
            written, problem = write_with_cache()
        except Exception as error:  # a fault of the decoder itself is raised again below
            problem = f"it raises {type(error).__name__}: {error}"
        if problem is None:
            return written
        NOT_CACHED.add(decoder)
        reason = " ".join(problem.split())[:200]
        print(f"the KV cache does not fit this decoder ({reason}): decoding plainly", flush=True)
    return write_plainly()


def _write_with_cache(decoder, z, mask, max_tokens):
    """Greedy decoding with a cache: tokens (B, up to 1 + max_tokens), PAD after STOP."""
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


def why_not_written(decoder: nn.Module, z: Tensor, mask: Tensor | None, text: Tensor) -> str | None:
    """None if greedy decoding by the plain decoder writes `text` (B, L); else the reason.

    As in speculative decoding (Leviathan, Kalman and Matias 2023), the decoder reads the finished
    text once, all letters in parallel, and each letter must be the likeliest one after those before
    it. What the parallel reading says of a letter is what reading step by step would say only if
    the decoder is causal. So three beginnings of the text are also read alone.
    """
    logits = decoder(text[:, :-1], z, mask)  # (B, L - 1, V), of the letters from the second on
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


# ----------------------------------------------------------------------------- a search over texts
class PrefixScore:
    """How likely the CTC layer finds each continuation of some texts.

    The score of a text g is the log of the sum over all alignments that begin with g. For every
    text two sums over the alignments of its letters to the first s frames are kept: of those that
    end in its last letter, and of those that end in a blank.
    """

    def __init__(self, log_p: Tensor, blank: int = PAD):
        """log_p (S, V): the layer's log-probabilities."""
        self.log_p = log_p.T.double()  # (V, S)
        self.so_far = nn.functional.pad(self.log_p.cumsum(dim=1), (1, 0))  # (V, S + 1)
        self.blank = blank
        only_blanks = self.so_far[None, blank]  # (1, S + 1): the empty text
        self.sums = torch.full_like(only_blanks, -math.inf), only_blanks  # of each text: (W, S + 1)

    def continuations(self, last: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
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

    def keep(self, sums: tuple[Tensor, Tensor], texts: Tensor, tokens: Tensor) -> None:
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


LETTER_SHARE = 0.4  # of the model of letters; chosen, as its bonus, on 22 validation clips
LETTER_BONUS = 1.5  # for every letter: a model of letters alone finds short texts likelier


@torch.inference_mode()
def beam_search(
    model: nn.Module,
    features: Tensor,
    max_tokens: int,
    beam: int = 8,
    ctc_share: float = 0.4,
    letters: LetterModel | None = None,
) -> list[int]:
    """The likeliest text of one clip (T, n_mels), as tokens without START and STOP.

    The decoder and the CTC layer vote together (Hori, Watanabe and Hershey 2017); a CTC layer that
    was not trained has no vote. beam: texts that are kept at each step. ctc_share: of the CTC
    layer's vote. letters: a `LetterModel` on the CPU that votes, too.

    The search uses a KV cache. The decoder reads the text that is found once more, and where it
    gives it another score, the search is made again without the cache.
    """
    decoder = model.decoder
    z, mask = model.encoder(features[None], torch.tensor([len(features)], device=features.device))
    if not model.sizes.ctc:
        ctc_share = 0.0
    ctc_log_p = model.ctc(z)[0].float().log_softmax(dim=-1).cpu()  # (S, V)

    def search(decoder_class):
        steps = decoder_class(decoder, z, mask)
        return _search(steps, max_tokens, beam, ctc_log_p, ctc_share, letters)

    def write():
        text, score = search(CachedDecoder)
        return text, _why_not_its_score(decoder, z, mask, text, score)

    text = cached_or_plain(decoder, write, lambda: search(PlainDecoder)[0])
    return text[1:].tolist()


def _why_not_its_score(decoder, z, mask, text, score):
    """None if the decoder gives `text` (L,) and its STOP this log-probability; else the reason."""
    logits = decoder(text[None].to(z.device), z, mask)[0]  # (L, V)
    targets = torch.cat([text[1:], torch.tensor([STOP])])  # (L,)
    log_p = logits.cpu().double().log_softmax(dim=-1)
    plain = log_p.gather(-1, targets[:, None]).sum().item()
    tolerance = len(targets) * ROUNDING[logits.dtype] * logits.abs().max().item()
    if abs(score - plain) <= tolerance:
        return None
    return f"it scores a text {score:.2f} that the decoder scores {plain:.2f}"


def _search(decoder, max_tokens, beam, ctc_log_p, ctc_share, letters):
    """The best text (L,), with START and without STOP, and its decoder's log-probability.

    decoder: a CachedDecoder or PlainDecoder. Decoder and CTC's votes only fall as a text grows, so
    the search is over when no unfinished text is better than the best finished one. With the bonus
    of the model of letters a text may gain again; then the search goes on until all unfinished
    texts are 5 behind.
    """
    device = decoder.z.device
    prefix_score = PrefixScore(ctc_log_p) if ctc_share else None
    texts = torch.tensor([[START]])  # (W, L)
    decoder_scores, letter_scores = torch.zeros(1), torch.zeros(1, 1)  # (W,), (W, 1)
    state, slack = None, 5.0 if letters else 0.0
    best_text, best_score, its_decoder_score = texts[0], -math.inf, 0.0
    for _ in range(max_tokens):
        log_p = decoder.step(texts.to(device)).cpu().double().log_softmax(dim=-1)  # (W, V)
        of_decoder = decoder_scores[:, None] + log_p
        scores = (1 - ctc_share) * of_decoder
        if ctc_share:
            ctc, sums = prefix_score.continuations(texts[:, -1])
            scores = scores + ctc_share * ctc
        if letters:
            logits, state = letters(texts[:, -1:], state)
            letter = letter_scores + logits[:, -1].double().log_softmax(dim=-1) + LETTER_BONUS
            scores = scores + LETTER_SHARE * letter
        scores[:, [START, PAD]] = -math.inf

        finished = scores[:, STOP].argmax()
        if scores[finished, STOP] > best_score:
            best_text, best_score = texts[finished], scores[finished, STOP].item()
            its_decoder_score = of_decoder[finished, STOP].item()
        scores[:, STOP] = -math.inf
        kept = scores.flatten().topk(min(beam, scores.numel()))
        kept = kept.indices[kept.values > best_score - slack]
        if len(kept) == 0:
            break
        parents, tokens = kept // scores.shape[1], kept % scores.shape[1]
        texts = torch.cat([texts[parents], tokens[:, None]], dim=1)
        decoder_scores = of_decoder[parents, tokens]
        if ctc_share:
            prefix_score.keep(sums, parents, tokens)
        decoder.keep(parents.to(device))
        if letters:
            letter_scores, state = letter[parents, tokens][:, None], state[:, parents]
    return best_text, its_decoder_score
