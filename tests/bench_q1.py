"""How fast Q1's linear attention is, as ratios against plain reference code measured side by side in this one run.

    python tests/bench_q1.py        about half a minute

Prints the machine, then at D = 64, K = 3, float32: the ratio to the straightforward linear attention (every feature of
every position at once, D^2 products) and to torch's fused exact attention, the share of the machine's matrix-product
rate, the slope of time against length, and the extra memory at two lengths. Asserts nothing: times are a machine's.
"""

import sys
import timeit
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import q1_linear_attention as q1
import utils

D, L, ROUNDS = 64, 16384, 7


def straightforward(Q, K, V):
    """The formula as written: Phi(Q) and Phi(K) in full, one product after the other."""
    phi_q, phi_k = q1.taylor_feature_map(Q), q1.taylor_feature_map(K)  # (L, 1 + D + D^2)
    return phi_q @ (phi_k.T @ V) / (phi_q @ phi_k.sum(0))[:, None]


def side_by_side(calls, rounds=ROUNDS):
    """Best seconds of each call, taking turns, so that a busy moment of the machine hits all of them alike."""
    for call in calls.values():
        call()  # the first call of each pays for allocation
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timeit.timeit(call, number=1))
    return {name: min(seconds) for name, seconds in times.items()}


def inputs(length):
    return torch.randn(3, length, D) * D**-0.25


@torch.inference_mode()
def main():
    machine = utils.environment()
    print(f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}; D = {D}, K = 3, float32")
    utils.configure_seed(42)
    Q, K, V = inputs(L)
    A, B = torch.randn(2, 2048, 2048)
    error = (q1.linear_attention(Q, K, V) - straightforward(Q, K, V)).abs().max()
    seconds = side_by_side(
        {
            "linear": lambda: q1.linear_attention(Q, K, V),
            "straightforward": lambda: straightforward(Q, K, V),
            "fused": lambda: F.scaled_dot_product_attention(Q[None, None], K[None, None], V[None, None], scale=1.0),
            "product": lambda: A @ B,
        }
    )
    linear, rate = seconds["linear"], 2 * 2048**3 / seconds["product"]
    flops = 4 * L * q1.feature_dim(D, 3, reduced=True) * (D + 1)  # two products of (L, M) with (D + 1) columns
    print(f"L = {L:,}: linear attention {linear * 1e3:.0f} ms; largest difference to straightforward {error:.1e}")
    print(f"  straightforward / linear   {seconds['straightforward'] / linear:5.2f}   (aim: at least 4)")
    print(f"  fused exact / linear       {seconds['fused'] / linear:5.2f}   (aim: at least 2.5)")
    print(f"  share of matrix-product rate {flops / linear / rate:4.0%}  of {rate / 1e9:.0f} GFLOP/s (aim: 40 %)")

    lengths = [2**n for n in range(12, 17)]
    curve = side_by_side({length: partial(q1.linear_attention, *inputs(length)) for length in lengths}, rounds=5)
    slope = np.polyfit(np.log(lengths), np.log([curve[length] for length in lengths]), 1)[0]
    print(f"  slope of log time, L = {lengths[0]:,} to {lengths[-1]:,}: {slope:.2f}   (aim: at most 1.05)")
    memory = [utils.measure(q1.linear_attention, *inputs(length))[1] / 1e6 for length in (L, 4 * L)]
    print(f"  extra memory at L = {L:,} and {4 * L:,}: {memory[0]:.2f} and {memory[1]:.2f} MB (aim: equal)")


if __name__ == "__main__":
    main()
