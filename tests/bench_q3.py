"""How fast Q3's training and decoding are, per clip, against plain reference code measured in this one run.

    python tests/bench_q3.py        about a minute and a half

Clips have LJ Speech's lengths (random features, 6.6 s on average; texts of 15 letters a second). The reference for
training is the same model in float32 as one writes it first: every clip padded to 2,754 frames (hop 160), attention by
the formula, no masks. The reference for decoding is that same code, which computes the whole prefix, and the
projections of the encoder's output, again at each step; the second number is ours on our own batches, without the
cache. Prints milliseconds per clip and ratios.
"""

import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ |= {"DATA": "nowhere", "OUT": "nowhere"}
from test_q3 import define

import utils

N_CLIPS, BATCH_SIZE, REFERENCE_FRAMES = 128, 32, 2_754
q3 = define()


def formula_attention(self, query, key, value, mask=None, is_causal=False, cache=None):
    """Multi-head attention as the formula has it: all weights in memory, padding attended to."""
    q, k, v = self.split(self.W_Q(query)), self.split(self.W_K(key)), self.split(self.W_V(value))
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    return self.W_O((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def seconds_per_clip(step, batches):
    """Mean time of `step` over batches, after one to warm up."""
    step(batches[0])
    started = time.perf_counter()
    for batch in batches:
        step(batch)
    return (time.perf_counter() - started) / sum(map(len, batches))


def training(name, features, tokens, batches):
    model = q3["build_model"](name, n_positions=256, frames_per_token=2.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = q3["train_batch"]
    return seconds_per_clip(lambda batch: step(model, optimizer, *q3["get_batch"](batch, features, tokens)), batches)


def decoding(name, batch, use_cache):
    """Seconds per clip of writing 100 letters for a batch of clips; the stop token is ruled out: all write 100."""
    torch.manual_seed(0)
    model = q3["build_model"](name, n_positions=256, frames_per_token=2.0).eval()
    with torch.no_grad():
        model.decoder.to_logits.bias[utils.STOP] = -100.0
    with q3["autocast"]():
        return seconds_per_clip(lambda _: model.greedy_decode(*batch, 100, use_cache), [range(len(batch[0]))])


def print_row(name, what, ours, reference):
    ratio = f"ratio {reference / ours:5.1f}   (aim: 15)"
    print(f"{name:12} {what:9} {1e3 * ours:6.1f} ms   reference {1e3 * reference:6.1f} ms   {ratio}", flush=True)


def main():
    torch.manual_seed(0)
    seconds = (6.6 + 2.2 * torch.randn(N_CLIPS)).clamp(1.1, 10.1)
    tokens = [torch.randint(4, 35, (int(15 * s),)) for s in seconds]
    features = [torch.randn(int(s * utils.SAMPLE_RATE / utils.HOP), utils.N_MELS) for s in seconds]
    padded = [torch.cat([f, torch.zeros(REFERENCE_FRAMES - len(f), utils.N_MELS)]) for f in features[:16]]
    machine = utils.environment()
    print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}")
    print(f"mean clip {seconds.mean():.1f} s")
    ours = {}
    for name in ("lstm", "transformer"):
        ours[name] = training(name, features, tokens, utils.batches_by_length(list(map(len, features)), BATCH_SIZE))
    batch, plain_batch = (
        q3["get_batch"](range(64), features, tokens)[:2],
        q3["get_batch"](range(16), padded, tokens)[:2],
    )
    cached, uncached = ({name: decoding(name, batch, use_cache) for name in ours} for use_cache in (True, False))
    q3["MultiHeadAttention"].forward, q3["autocast"] = formula_attention, lambda: torch.autocast("cpu", enabled=False)
    for name in ours:
        reference = training(name, padded, tokens, [torch.arange(8), torch.arange(8, 16)])
        print_row(name, "training", ours[name], reference)
        print_row(name, "decoding", cached[name], decoding(name, plain_batch, use_cache=False))
        ratio = uncached[name] / cached[name]
        print(f"{name:12} decoding on the same batch, with the cache and without: ratio {ratio:.1f}")


if __name__ == "__main__":
    main()
