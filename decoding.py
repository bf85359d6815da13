"""Decoding one letter at a time without computing anything twice, and a search over texts.

A decoder's `forward` reads a whole text. While a text is being written, all of it but the newest
letter has been read before: the keys and values of its letters, those of the clip and the state of
an LSTM stay as they are. `FastDecoder` remembers them and reads the newest letter alone. It knows
no decoder's layers by name, so that an edited decoder is decoded just as well.

`greedy_decode` writes what the notebook's plain loop writes; `beam_search` is what transcribe.py
uses. Shapes: B texts, S frames of z, D hidden size, V tokens.
"""

import copy
import math

from utils import PAD, START, STOP

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
    """A decoder of the notebook, for one batch of clips, that is given one letter at a time."""

    def __init__(self, decoder, z, mask):
        parameters = {id(parameter): parameter for parameter in decoder.parameters()}
        self.decoder = copy.deepcopy(decoder, parameters)  # its own layers, the same parameters
        self.z, self.mask = z, mask  # (B, S, D), (B, 1, 1, S)
        self.n_letters = 0
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

    def step(self, letters):
        """The newest letter of each text (B, 1) -> logits of the letter after it (B, V)."""
        for remembering in self.remembering:
            remembering.n_calls = 0
        if self.positions is not None:  # the newest letter stands at the beginning of the rest
            del self.decoder.positions
            self.decoder.positions = self.positions[self.n_letters :]
        self.n_letters += 1
        return self.decoder(letters, self.z, self.mask)[:, -1]

    def keep(self, rows):
        """Go on with these of the texts, (W,) indices, all of one clip: z (1, S, D)."""
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


@torch.inference_mode()
def greedy_decode(decoder, z, mask, max_tokens):
    """The notebook's greedy decoding, fast: z (B, S, D), mask -> tokens (B, up to 1 + max_tokens).

    START stands first, PAD after STOP.
    """
    fast = FastDecoder(decoder, z, mask)
    text = torch.full((len(z), 1), START, device=z.device)  # (B, 1)
    has_stopped = torch.zeros_like(text, dtype=torch.bool)  # (B, 1)
    for _ in range(max_tokens):
        logits = fast.step(text[:, -1:])  # (B, V), of the next letter
        logits[:, [START, PAD]] = -math.inf  # no text holds them
        letter = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
        letter = letter.masked_fill(has_stopped, PAD)
        text = torch.cat([text, letter], dim=1)
        has_stopped |= letter == STOP
        if has_stopped.all():
            break
    return text
