"""How fast Q1's linear attention is: ratios against plain reference code, in turn in one run.

    python tests/bench_q1.py        some seconds

Prints the machine, then for D = 64, K = 3 and float32 how many times as fast it is as the
straightforward linear attention (below) and as torch's fused exact attention, each with its aim:
medians over rounds, with the smallest and the largest behind them.
"""

import math
import statistics
import sys
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
AIMS = {"straightforward": 4, "fused exact attention": 2.4}  # at least


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


def spread(values, form):
    """The median, and the smallest and the largest in brackets."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


@torch.inference_mode()
def main():
    runs.configure_seed(42)
    machine = runs.environment()
    name = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
    print(f"{name}; L = {L:,}, D = {D}, K = 3, float32, {ROUNDS} rounds")

    Q, K, V = torch.randn(3, L, D) * D**-0.25
    calls = {
        "linear_attention_chunked": lambda: q1.linear_attention_chunked(Q, K, V),
        "straightforward": lambda: straightforward(Q, K, V),
        "fused exact attention": lambda: fused(Q, K, V),
    }
    seconds = q1_measure.time_in_turn(calls, ROUNDS + 1)
    seconds = {name: times[1:] for name, times in seconds.items()}  # the first one allocates
    for name, times in seconds.items():
        print(f"  {name}: {spread([1e3 * t for t in times], '.0f')} ms")
    print("linear_attention_chunked is so many times as fast as")
    for name, aim in AIMS.items():
        pairs = zip(seconds[name], seconds["linear_attention_chunked"])  # round by round
        ratios = [slow / fast for slow, fast in pairs]
        print(f"  {name}: {spread(ratios, '.2f')}   (aim: at least {aim})")


if __name__ == "__main__":
    main()
