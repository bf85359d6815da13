"""How fast Q1's linear attention is: ratios against plain reference code, side by side in one run.

    python tests/bench_q1.py        about half a minute

Prints the machine, then for D = 64, K = 3 and float32: the ratios to the straightforward linear
attention (below) and to torch's fused exact attention, the share of the machine's matrix-product
rate, the slope of time against length, and the extra memory at two lengths, each with its aim.
Asserts nothing: times are a machine's.
"""

import math
import sys
import timeit
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import q1_linear_attention as q1
import runs

import torch
import torch.nn.functional as F

D = 64
L = 16384
ROUNDS = 7
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


def side_by_side(calls, rounds=ROUNDS):
    """Best seconds of each call, taking turns, so that a busy moment of the machine hits all."""
    for call in calls.values():
        call()  # the first call of each pays for allocation
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timeit.timeit(call, number=1))
    return {name: min(seconds) for name, seconds in times.items()}


def random_inputs(length):
    return torch.randn(3, length, D) * D**-0.25


def print_machine():
    machine = runs.environment()
    name = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
    print(f"{name}; D = {D}, K = 3, float32")


def compare_time():
    Q, K, V = random_inputs(L)
    A, B = torch.randn(2, 2048, 2048)
    seconds = side_by_side(
        {
            "linear": lambda: q1.linear_attention_chunked(Q, K, V),
            "plain": lambda: q1.linear_attention(Q, K, V),
            "straightforward": lambda: straightforward(Q, K, V),
            "fused": lambda: fused(Q, K, V),
            "product": lambda: A @ B,
        }
    )
    linear = seconds["linear"]
    difference = (q1.linear_attention_chunked(Q, K, V) - straightforward(Q, K, V)).abs().max()
    ratio = {name: time / linear for name, time in seconds.items()}
    print(f"linear_attention_chunked, L = {L:,}: {linear * 1e3:.0f} ms")
    print(f"  {ratio['straightforward']:.2f} times as fast as straightforward   (aim: at least 4)")
    print(f"  {ratio['fused']:.2f} times as fast as fused exact attention   (aim: at least 2.4)")
    print(f"  {ratio['plain']:.2f} times as fast as linear_attention")
    print(f"  largest difference to straightforward: {difference:.1e}")

    rate = 2 * 2048**3 / seconds["product"]
    flops = 4 * L * q1.reduced_feature_dim(D) * (D + 1)  # two products (L, M) with D + 1 columns
    share = flops / linear / rate
    print(f"  share of the matrix-product rate: {share:.0%} of {rate / 1e9:.0f} GFLOP/s")


def fit_slope():
    calls = {}
    for length in LENGTHS:
        calls[length] = partial(q1.linear_attention_chunked, *random_inputs(length))
    seconds = side_by_side(calls, rounds=5)
    slope = q1.log_slope(LENGTHS, [seconds[length] for length in LENGTHS])
    lengths = f"L = {LENGTHS[0]:,} to {LENGTHS[-1]:,}"
    print(f"  slope of log time, {lengths}: {slope:.2f}   (aim: at most 1.05)")


def compare_memory():
    peaks = []
    for length in (L, 4 * L):
        n_bytes = q1.peak_memory(q1.linear_attention_chunked, *random_inputs(length))
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
