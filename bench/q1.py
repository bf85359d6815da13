"""How fast Q1's linear attention is, on four shapes, against exact attention.

    python -m bench.q1        about a minute

Prints, for each shape, the milliseconds of `linear_attention` (three terms, float32), of torch's
fused exact attention, of the formula as written, and of its matrix products alone, which are the
limit; then how many times as long as `linear_attention` the second and third take. The functions
run in turn; each number is the median over the rounds, with the least and the greatest. Measure on
a machine that does nothing else: the threads wait for each other after every small step.
"""

import functools
import statistics

import q1_linear_attention as q1
import q1_measure
import runs

import torch
import torch.nn.functional as F

ROUNDS = 9
SHAPES = {  # (heads, L, D): how many times as long as linear_attention it should take at least
    (1, 16384, 64): {"fused": 4, "as written": 5},
    (1, 16384, 32): {"fused": 10, "as written": 5},
    (1, 16384, 16): {"fused": 25, "as written": 5},
    (8, 4096, 64): {"fused": 1.1, "as written": 5},
}
CHUNK = 512  # positions: few enough that their features stay in the processor's cache


def products_alone(features, sums, V):
    """The matrix products of linear attention, with features and sums computed beforehand."""
    for _ in range(V.shape[-2] // CHUNK):
        features @ V[..., :CHUNK, :]
        last = features.mT @ sums
    return last


def functions(Q, K, V):
    """{name: function without arguments} for inputs (1, heads, L, D)."""
    M = q1.reduced_feature_dim(Q.shape[-1])
    features = torch.randn(*Q.shape[:-2], M, CHUNK)
    sums = torch.randn(*Q.shape[:-2], M, Q.shape[-1])
    return {
        "linear_attention": functools.partial(q1.linear_attention, Q, K, V),
        "fused": functools.partial(F.scaled_dot_product_attention, Q, K, V, scale=1.0),
        "as written": functools.partial(q1.linear_attention_as_written, Q, K, V),
        "products alone": functools.partial(products_alone, features, sums, V),
    }


def spread(values, form):
    """The median, and the smallest and the largest in brackets."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


@torch.inference_mode()
def main():
    runs.configure_seed(42)
    machine = runs.environment()
    name = f"{machine['processor']}, {machine['threads']} threads, torch {machine['torch']}"
    print(f"{name}; K = 3, float32, {ROUNDS} rounds")
    for (n_heads, L, D), aims in SHAPES.items():
        calls = functions(*torch.randn(3, 1, n_heads, L, D) * D**-0.25)
        seconds = q1_measure.time_in_turn(calls, ROUNDS + 1)
        seconds = {name: times[1:] for name, times in seconds.items()}  # the first one allocates
        print(f"\nheads: {n_heads}, L = {L:,}, D = {D}")
        for name, times in seconds.items():
            line = f"  {name:18}{spread([1e3 * t for t in times], '.1f') + ' ms':32}"
            if name in aims:
                pairs = zip(times, seconds["linear_attention"], strict=True)  # round by round
                ratios = spread([slow / fast for slow, fast in pairs], ".1f")
                line += f"{ratios} times linear_attention's (aim: at least {aims[name]})"
            print(line)


if __name__ == "__main__":
    main()
