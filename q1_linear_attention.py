"""Question 1: attention linear in the sequence length, from the Taylor series of the exponential; derived, then run.

    python q1_linear_attention.py -out build            every measurement: about 2 minutes on 2 cores
    python q1_linear_attention.py -out build -quick     lengths up to 4,096: under 20 s
    python q1_linear_attention.py -out build -plot_only the figures again, without measuring

Prints the error of each identity (rounding only), where the series is good and where it fails, seconds and memory
against the sequence length with the fitted slopes (about 2 for exact attention, about 1 for linear), and from which
length linear attention is faster. Saves OUT/results/q1.json and OUT/figures/q1-*.{pdf,png}.

n_terms, the assignment's K, is the number of terms of the series: exp(s) ~ sum of s^n / n! for n < n_terms. D is the
size of a head, M the number of features, T the number of queries, S of keys, N of independent sequences.
"""

import math
import os
import time
from collections import Counter
from functools import lru_cache, partial
from itertools import combinations_with_replacement, product

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import utils
from utils import UserError

SOURCE = "random normal Q, K, V (synthetic)"
FEATURE_BUFFER = {
    "cpu": 2**21,
    "cuda": 2**27,
}  # elements of features held at once; 8 MB of float32 stay in a CPU's cache
CAUSAL_CHUNK = 512  # longest chunk whose own scores are computed the quadratic way
MEMORY_LIMIT = 6e9  # bytes: a measurement that would need more is skipped, and the result says so
QUICK_LENGTH = 4_096


# -------------------------------------------------------------------------------------------- the feature map (Q1.1)
def feature_dim(D, n_terms, reduced=False):
    """Number M of features: 1 + D + ... + D^(K-1), or C(D + K - 1, K - 1) when monomials are not repeated."""
    return math.comb(D + n_terms - 1, n_terms - 1) if reduced else sum(D**n for n in range(n_terms))


def taylor_exp(s, n_terms=3):
    """sum of s^n / n! for n < n_terms, elementwise (Horner's rule)."""
    total = torch.ones_like(s)
    for n in range(n_terms - 1, 0, -1):
        total = 1 + s * total / n
    return total


def taylor_feature_map(x, n_terms=3, reduced=False):
    """phi of Q1.1: (..., D) floats -> (..., M) such that phi(q) . phi(k) = sum of (q . k)^n / n! for n < n_terms, exactly.

    `reduced=False`: all D^n products of n coordinates, each over sqrt(n!). `reduced=True`: each monomial once, times
    sqrt(1 / product of the factorials of its exponents), by the multinomial theorem; for n_terms = 3 half the features.
    Raises ValueError for n_terms < 1 or an x that is not floating-point with D >= 1.
    """
    if n_terms < 1 or not x.is_floating_point() or x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"n_terms must be at least 1 and x floats (..., D); got {n_terms} and {x.dtype} {(*x.shape,)}."
        )
    if reduced:
        phi = monomials(x.reshape(1, -1, x.shape[-1]).mT, n_terms).mT.reshape(*x.shape[:-1], -1)  # (..., M)
        return phi * monomial_weights(x.shape[-1], n_terms).sqrt().to(x)
    powers = [torch.ones_like(x[..., :1])]
    for n in range(1, n_terms):
        powers.append((powers[-1][..., None] * x[..., None, :]).flatten(-2) / math.sqrt(n))  # (..., D^n)
    return torch.cat(powers, dim=-1)


def monomials(x, n_terms, out=None):
    """All distinct monomials of degree below n_terms: (N, D, L) -> (N, M, L), in `out` if given (not differentiable).

    Monomials of one degree are in lexicographic order, so those that may follow x_i (all indices >= i) are the last
    rows of the degree below: each step is one product of x_i with a contiguous block. Features are rows, not columns,
    so that these blocks and the matrix products that follow run along memory.
    """
    N, D, L = x.shape
    x = x.contiguous()
    blocks = [x.new_ones(N, 1, L) if out is None else out[:, :1].fill_(1)]
    row = 1
    for n in range(1, n_terms):
        start, products = row, []
        for i in range(D):
            size = math.comb(D - i + n - 2, n - 1)
            tail = blocks[-1][:, blocks[-1].shape[1] - size :]  # (N, size, L)
            target = None if out is None else out[:, row : row + size]
            products.append(torch.mul(tail, x[:, i : i + 1], out=target))
            row += size
        blocks.append(torch.cat(products, dim=1) if out is None else out[:, start:row])
    return torch.cat(blocks, dim=1) if out is None else out


@lru_cache
@torch.inference_mode(False)  # the cached tensor must also serve calls that record gradients
def monomial_weights(D, n_terms):
    """1 / product of the factorials of each monomial's exponents, in the order of `monomials`: (M,) float64."""
    rows = [m for n in range(n_terms) for m in combinations_with_replacement(range(D), n)]
    weights = [1 / math.prod(map(math.factorial, Counter(row).values())) for row in rows]
    return torch.tensor(weights, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- attention (Q1.2, Q1.3)
def softmax_attention(Q, K, V):
    """softmax(Q K^T) V as the assignment writes it, without 1/sqrt(D): (..., T, D), (..., S, D), (..., S, E) -> (..., T, E)."""
    check_inputs(Q, K, V)
    q, k, v = (x.to(computing_dtype(x)) for x in (Q, K, V))
    return ((q @ k.mT).softmax(dim=-1) @ v).to(V.dtype)


def taylor_attention(Q, K, V, n_terms=3, causal=False):
    """The truncated series applied to the T x S matrix of scores, each row normalised: quadratic, the reference for linear.

    Shapes, dtypes and errors as `linear_attention`; `causal`: position t sees keys 0..t only.
    """
    check_inputs(Q, K, V, n_terms, causal=causal)
    q, k, v = (x.to(computing_dtype(x)) for x in (Q, K, V))
    weights = taylor_exp(q @ k.mT, n_terms)  # (..., T, S)
    weights = weights.tril() if causal else weights
    normaliser = weights.sum(dim=-1, keepdim=True)  # (..., T, 1)
    n_keys = torch.arange(1, k.shape[-2] + 1, device=k.device)[:, None] if causal else k.shape[-2]
    check_normaliser(normaliser, q.norm(dim=-1, keepdim=True), largest_norm(K), n_keys, n_terms)
    return (weights @ v / normaliser).to(V.dtype)


def linear_attention(Q, K, V, n_terms=3, chunk=None):
    """D^-1 Phi(Q) (Phi(K)^T V) of Q1.3: equal to `taylor_attention`, in time O((T + S) M E) and never forming T x S.

    Q (..., T, D), K (..., S, D), V (..., S, E), one floating dtype -> (..., T, E) of that dtype; float16 and bfloat16
    are computed in float32. The features exist for `chunk` positions at a time (default: what stays in cache), so the
    extra memory is O(M E + chunk M), also for gradients. Raises ValueError for empty, non-finite or mismatched inputs,
    n_terms < 1, and a normaliser that is not positive (possible for even n_terms: the series' degree is then odd).
    """
    return attend(Q, K, V, n_terms, chunk, causal=False)


def causal_linear_attention(Q, K, V, n_terms=3, chunk=None):
    """`linear_attention` where position t sees keys 0..t only, for decoders: running sums of Phi(k) v^T over the chunks
    before, and the masked quadratic form inside a chunk. Needs T = S; gradients keep one (M, E) state per chunk."""
    return attend(Q, K, V, n_terms, chunk, causal=True)


def attend(Q, K, V, n_terms, chunk, causal):
    """Both linear forms: flatten the leading sizes to N and take as many sequences at once as the feature buffer holds."""
    check_inputs(Q, K, V, n_terms, chunk, causal)
    n_features, longest = feature_dim(K.shape[-1], n_terms, reduced=True), max(Q.shape[-2], K.shape[-2])
    buffer = FEATURE_BUFFER.get(Q.device.type, FEATURE_BUFFER["cpu"])
    if chunk is None:
        chunk = min(max(buffer // n_features // 64, 1) * 64, CAUSAL_CHUNK if causal else longest)
    chunk = min(chunk, longest)
    group = max(buffer // (chunk * max(n_features, chunk if causal else 1)), 1)
    parts = zip(*(x.reshape(-1, *x.shape[-2:]).split(group) for x in (Q, K, V)))  # each (N, length, size)
    with torch.autocast(Q.device.type, enabled=False):  # sums over a whole sequence need all of float32's digits
        return torch.cat([attend_group(*part, n_terms, chunk, causal) for part in parts]).reshape(*Q.shape[:-1], -1)


def attend_group(Q, K, V, n_terms, chunk, causal):
    """(N, T, D), (N, S, D), (N, S, E) -> (N, T, E). The state is (N, E + 1, M): its last row, the sums of the features
    themselves, makes the normaliser come out of the same matrix product as the numerator."""
    (N, T, D), S, dtype = Q.shape, K.shape[1], computing_dtype(Q)
    weights, differentiable = (
        monomial_weights(D, n_terms).to(Q.device, dtype),
        torch.is_grad_enabled() and any(x.requires_grad for x in (Q, K, V)),
    )
    features = None if differentiable else Q.new_empty(N, len(weights), chunk, dtype=dtype)
    call = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if differentiable else run

    def phi(x):  # (N, L, D) -> (N, M, L), without the weights: they are applied to the state, which is smaller
        return monomials(x.mT, n_terms, None if features is None else features[..., : x.shape[1]])

    def keys_and_values(k, v):  # -> (N, E + 1, M)
        return F.pad(v, (0, 1), value=1).mT @ phi(k).mT * weights

    def inside(q, k, v):  # -> (N, E + 1, L)
        return (taylor_exp(q @ k.mT, n_terms).tril() @ F.pad(v, (0, 1), value=1)).mT

    state, k_norm = Q.new_zeros(N, V.shape[-1] + 1, len(weights), dtype=dtype), largest_norm(K)
    if not causal:
        for k, v in zip(K.split(chunk, dim=1), V.split(chunk, dim=1)):
            state = state + call(keys_and_values, k.to(dtype), v.to(dtype))
    out = [] if differentiable else Q.new_empty(N, T, V.shape[-1])
    for start in range(0, T, chunk):
        rows = slice(start, start + chunk)
        q = Q[:, rows].to(dtype)
        sums = call(lambda q, state: state @ phi(q), q, state)  # (N, E + 1, L)
        n_keys = S
        if causal:
            k, v = K[:, rows].to(dtype), V[:, rows].to(dtype)
            sums = sums + call(inside, q, k, v)
            state = state + call(keys_and_values, k, v)
            n_keys = torch.arange(start + 1, start + 1 + q.shape[1], device=q.device)
        check_normaliser(sums[:, -1], q.norm(dim=-1), k_norm[:, :, 0], n_keys, n_terms)
        y = (sums[:, :-1] / sums[:, -1:]).mT  # (N, L, E)
        if differentiable:
            out.append(y.to(V.dtype))
        else:
            out[:, rows] = y  # a list to join at the end would hold the result twice
    return torch.cat(out, dim=1) if differentiable else out


def run(function, *arguments):
    """`function(*arguments)`: what `checkpoint` is when nothing has to be kept for a gradient."""
    return function(*arguments)


def computing_dtype(x):
    """float32 for the half precisions, whose sums over a sequence would round to nothing; otherwise x's own dtype."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def check_inputs(Q, K, V, n_terms=1, chunk=None, causal=False):
    """Raise ValueError, in one sentence, where attention is undefined."""
    shapes = f"Q {(*Q.shape,)}, K {(*K.shape,)}, V {(*V.shape,)}"
    if min(Q.ndim, K.ndim, V.ndim) < 2 or not Q.shape[:-2] == K.shape[:-2] == V.shape[:-2]:
        raise ValueError(f"Q, K and V must be (..., length, size) with the same leading sizes; got {shapes}.")
    if Q.shape[-1] != K.shape[-1] or K.shape[-2] != V.shape[-2] or (causal and Q.shape[-2] != K.shape[-2]):
        raise ValueError(f"Q and K must have one size, K and V (and a causal Q) one length; got {shapes}.")
    if min(Q.numel(), K.numel(), V.numel()) == 0:
        raise ValueError(f"attention over nothing is undefined: every size must be at least 1; got {shapes}.")
    if n_terms < 1 or (chunk is not None and chunk < 1):
        raise ValueError(f"n_terms and chunk must be at least 1; got {n_terms} and {chunk}.")
    if not (Q.is_floating_point() and Q.dtype == K.dtype == V.dtype):
        raise ValueError(f"Q, K and V must share one floating dtype; got {Q.dtype}, {K.dtype} and {V.dtype}.")
    for name, x in (("Q", Q), ("K", K), ("V", V)):
        if not torch.stack(x.detach().aminmax()).isfinite().all():  # aminmax passes NaN on and makes no copy of x
            raise ValueError(f"{name} holds NaN or infinity.")


def largest_norm(K):
    """(..., S, D) -> (..., 1, 1): the largest |k| of each sequence."""
    return torch.linalg.vector_norm(K.detach(), dim=-1, dtype=computing_dtype(K)).amax(dim=-1)[..., None, None]


@torch.no_grad()
def check_normaliser(normaliser, q_norm, k_norm, n_keys, n_terms):
    """ValueError unless every sum of `n_keys` weights is finite, and positive by more than its own rounding error: the
    terms that may have cancelled in it are bounded by |q . k| <= |q| |k|."""
    rounding = torch.finfo(normaliser.dtype).eps * n_keys * taylor_exp(q_norm * k_norm, n_terms)
    if not ((normaliser > rounding) & normaliser.isfinite()).all():
        raise ValueError(
            f"with n_terms={n_terms} the weights of a row sum to {normaliser.min():.3g}, which is not a positive number "
            "beyond rounding; use smaller scores, or an odd n_terms, whose weights are always positive."
        )
