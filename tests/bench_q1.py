"""How fast Q1's linear attention is: ratios against plain reference code, in turn in one run.

    python tests/bench_q1.py        about half a minute

Prints the machine, then for D = 64, K = 3 and float32: the ratios to the straightforward linear
attention (below) and to torch's fused exact attention, the share of the machine's matrix-product
rate, the slope of time against length, and the extra memory at two lengths, each with its aim.
Every time and ratio is a median over rounds, with the smallest and the largest behind it.
"""

import math
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import q1_linear_attention as q1
import q1_measure
import runs

import torch
import torch.nn.functional as F

D = 64
L = 16384
ROUNDS = 9
LENGTHS = [2**n for n in range(12, 17)]


def straightforward(Q, K, V):
    """The reference: the formula as written, all features of all positions at once.

    Q, K, V: (L, D). Independent of the module; the feature map is that of
    lucidrains/taylor-series-linear-attention.
    """

    def phi(x):
        x0 = torch.ones_like(x[:, :1])
        x1 = x
        x2 = torch.einsum("li,lj->lij", x, x).flatten(1) / math.sqrt(2)
        return torch.cat([x0, x1, x2], dim=1)  # (L, 1 + D + D²)

    phi_q, phi_k = phi(Q), phi(K)
    normaliser = phi_q @ phi_k.sum(dim=0)  # (L,)
    return phi_q @ (phi_k.T @ V) / normaliser[:, None]


def fused(Q, K, V):
    """Exact attention by torch's fused kernel."""
    return F.scaled_dot_product_attention(Q[None, None], K[None, None], V[None, None], scale=1.0)


def seconds_in_turn(calls, rounds):
    """{name: seconds of every round}, the first, which pays for allocation, left out."""
    seconds = q1_measure.time_in_turn(calls, rounds + 1)
    return {name: times[1:] for name, times in seconds.items()}


def spread(values, form):
    """The median, and the smallest and the largest in brackets."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def random_inputs(length):
    return torch.randn(3, length, D) * D**-0.25


def print_machine():
    machine = runs.environment()
    name = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
    print(f"{name}; D = {D}, K = 3, float32, {ROUNDS} rounds")


def compare_time():
    Q, K, V = random_inputs(L)
    A, B = torch.randn(2, 2048, 2048)
    calls = {
        "linear_attention_chunked": lambda: q1.linear_attention_chunked(Q, K, V),
        "linear_attention": lambda: q1.linear_attention(Q, K, V),
        "straightforward": lambda: straightforward(Q, K, V),
        "fused": lambda: fused(Q, K, V),
        "product": lambda: A @ B,
    }
    seconds = seconds_in_turn(calls, ROUNDS)
    for name, times in seconds.items():
        print(f"  {name}: {spread([1e3 * t for t in times], '.0f')} ms")

    def times_as_fast_as(name):  # round by round
        pairs = zip(seconds[name], seconds["linear_attention_chunked"])
        return spread([slow / fast for slow, fast in pairs], ".2f")

    print(f"linear_attention_chunked, L = {L:,}, is so many times as fast as")
    print(f"  straightforward: {times_as_fast_as('straightforward')}   (aim: at least 4)")
    print(f"  fused exact attention: {times_as_fast_as('fused')}   (aim: at least 2.4)")
    print(f"  linear_attention: {times_as_fast_as('linear_attention')}")
    difference = (q1.linear_attention_chunked(Q, K, V) - straightforward(Q, K, V)).abs().max()
    print(f"  largest difference to straightforward: {difference:.1e}")

    flops = 4 * L * q1.reduced_feature_dim(D) * (D + 1)  # two products (L, M) with D + 1 columns
    rate = flops / statistics.median(seconds["linear_attention_chunked"])
    full_rate = 2 * 2048**3 / statistics.median(seconds["product"])
    of_full = f"{rate / full_rate:.0%} of {full_rate / 1e9:.0f} GFLOP/s"
    print(f"  share of the matrix-product rate: {of_full}")


def fit_slope():
    calls = {}
    for length in LENGTHS:
        calls[length] = partial(q1.linear_attention_chunked, *random_inputs(length))
    seconds = seconds_in_turn(calls, ROUNDS)
    by_round = zip(*seconds.values())
    slopes = [q1_measure.log_slope(LENGTHS, times) for times in by_round]
    lengths = f"L = {LENGTHS[0]:,} to {LENGTHS[-1]:,}"
    print(f"  slope of log time, {lengths}: {spread(slopes, '.2f')}   (aim: at most 1.05)")


def compare_memory():
    peaks = []
    for length in (L, 4 * L):
        n_bytes = q1_measure.peak_memory(q1.linear_attention_chunked, *random_inputs(length))
        peaks.append(f"{n_bytes / 1e6:.2f}")
    print(f"  extra memory at L = {L:,} and {4 * L:,}: {' and '.join(peaks)} MB   (aim: equal)")


@torch.inference_mode()
def main():
    runs.configure_seed(42)
    print_machine()
    compare_time()
    fit_slope()
    compare_memory()


if __name__ == "__main__":
    main()
