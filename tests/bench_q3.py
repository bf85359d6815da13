"""How fast Q3 trains and decodes, per clip, against plain reference code measured in the same run.

    python tests/bench_q3.py        about two minutes

Clips have LJ Speech's lengths (random features, 6.6 s on average; texts of 15 letters a second).

The reference is the same model as one writes it first: float32, every clip padded to the 2,754
frames of the handed-out code, no masks; decoding reads the whole text, and projects the encoder's
output, again at each step. Prints milliseconds per clip and ratios; both without the auxiliary
CTC loss and the augmentation of clips, whose cost is in a line of its own.
"""

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runs
import utils
from tools.definitions import load_definitions

import torch

N_CLIPS = 128
REFERENCE_FRAMES = 2_754
q3 = SimpleNamespace(**load_definitions(DATA="nowhere", OUT="nowhere"))
OURS = replace(q3.settings, batch_size=32, ctc_weight=0.0)
WITH_OPTIONS = replace(OURS, ctc_weight=0.3, speed=0.1, warp=0.1, reverb=0.5, noise=0.5)
PLAIN = replace(OURS, bf16=0)


# ------------------------------------------------------------------------------------- the inputs
def random_corpus(seconds):
    """Clips of random features, and random texts, of these lengths."""
    features, tokens = [], []
    for s in seconds:
        features.append(torch.randn(int(s * utils.SAMPLE_RATE / utils.HOP), utils.N_MELS))
        letters = torch.randint(4, len(utils.VOCABULARY), (int(15 * s),))
        tokens.append(torch.cat([torch.tensor([utils.START]), letters, torch.tensor([utils.STOP])]))
    rows = [None] * len(features)
    return q3.Corpus({}, {"train": rows}, {"train": features}, {"train": tokens})


def pad_to_the_reference(corpus):
    """The same clips as the handed-out code has them: all of one length, with silence."""
    longest = []
    for clip in corpus.features["train"]:
        silence = torch.zeros(REFERENCE_FRAMES - len(clip), utils.N_MELS)
        longest.append(torch.cat([clip, silence]))
    return replace(corpus, features={"train": longest})


# ---------------------------------------------------------------------------------- the reference
def plain_attention(self, query, key, value, mask=None, cache=None):
    """Multi-head attention that looks at everything, padding too; only the causal mask is kept."""
    q = self.split(self.W_Q(query))
    k, v = self.keys_and_values(key, value)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None and mask.ndim == 2:
        scores = scores.masked_fill(~mask, -math.inf)
    heads = scores.softmax(dim=-1) @ v
    return self.W_O(heads.transpose(1, 2).flatten(2))


# ----------------------------------------------------------------------------------- measurements
def seconds_per_clip(step, batches):
    """Mean time of `step` over batches, after one to warm up."""
    step(batches[0])
    started = time.perf_counter()
    for batch in batches:
        step(batch)
    return (time.perf_counter() - started) / sum(map(len, batches))


def new_model(decoder_name, corpus, settings):
    torch.manual_seed(0)
    return q3.SpeechToText(q3.sizes_for(corpus, decoder_name, settings))


def training(decoder_name, corpus, settings, batches):
    model = new_model(decoder_name, corpus, settings).train()
    optimizer, _ = q3.new_optimizer(model, settings, n_steps=100)

    def step(indices):
        batch = q3.get_batch(corpus, "train", indices, lambda clip: q3.vary(clip, settings))
        q3.train_batch(model, optimizer, batch, settings)

    return seconds_per_clip(step, batches)


def decoding(decoder_name, corpus, settings, indices, use_cache):
    """Seconds per clip of writing 100 letters; the stop token is ruled out, so all write 100."""
    model = new_model(decoder_name, corpus, settings).eval()
    with torch.no_grad():
        model.decoder.to_logits.bias[utils.STOP] = -100.0
    features, n_frames, _ = q3.get_batch(corpus, "train", indices)

    def step(indices):
        with q3.autocast(settings):
            model.greedy_decode(features, n_frames, 100, use_cache)

    return seconds_per_clip(step, [indices])


def print_row(decoder_name, what, ours, reference, aim=""):
    times = f"{1e3 * ours:6.1f} ms   reference {1e3 * reference:6.1f} ms"
    print(f"{decoder_name:12} {what:20} {times}   ratio {reference / ours:5.1f}{aim}", flush=True)


def main():
    torch.manual_seed(0)
    seconds = (6.6 + 2.2 * torch.randn(N_CLIPS)).clamp(1.1, 10.1).tolist()
    corpus = random_corpus(seconds)
    padded = pad_to_the_reference(corpus)
    machine = runs.environment()
    print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")
    print(f"clips of {sum(seconds) / N_CLIPS:.1f} s on average")

    batches = utils.batches_by_length(list(map(len, corpus.features["train"])), OURS.batch_size)
    few, many = [torch.arange(8), torch.arange(8, 16)], torch.arange(64)
    masked_attention = q3.MultiHeadAttention.forward
    for name in ("lstm", "transformer"):
        ours = training(name, corpus, OURS, batches)
        with_options = training(name, corpus, WITH_OPTIONS, batches)
        cached = decoding(name, corpus, OURS, many, use_cache=True)
        uncached = decoding(name, corpus, OURS, many, use_cache=False)

        q3.MultiHeadAttention.forward = plain_attention
        plain_training = training(name, padded, PLAIN, few)
        plain_decoding = decoding(name, padded, PLAIN, torch.arange(16), use_cache=False)
        q3.MultiHeadAttention.forward = masked_attention

        print_row(name, "training", ours, plain_training, "   (aim: 16)")
        print_row(name, "with options", with_options, plain_training)
        print_row(name, "decoding", cached, plain_decoding)
        print_row(name, "decoding, no cache", uncached, plain_decoding)


if __name__ == "__main__":
    main()
