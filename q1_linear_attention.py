"""Question 1: attention in time linear in the sequence length, from the Taylor series of exp.

    python q1_linear_attention.py -out build              about a minute on 2 cores
    python q1_linear_attention.py -out build -quick       under 20 s
    python q1_linear_attention.py -out build -plot_only   figures and summary of saved numbers

The file reads as the question does: the feature map φ (Q1.2), exact attention (Q1.1), its
approximation by φ (Q1.3) and the order of products that makes it linear (Q1.4); then the same in
bounded memory and for decoders; then what is measured. It prints the errors of the identities
(rounding only) and of the approximation, the slopes of time against length (2 is quadratic, 1 is
linear) and the crossover, and saves OUT/results/q1.json and OUT/figures/q1-*.{pdf,png}.

Letters: D head size, E size of a value, M number of features, T queries, S keys (both L where they
are equal); n_terms is the K of the text, "..." any leading sizes, such as (batch, heads).
"""

import functools
import math
import os
import sys
import timeit
from itertools import combinations_with_replacement, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # PYTHONSAFEPATH leaves it out
import runs
import utils

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

FEATURES_AT_ONCE = 2**20  # in bounded memory: 4 MB of float32, which stays in a processor's cache
SCALES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 24.0)  # largest |q·k| of an approximation
METHODS = ("linear", "softmax, fused", "softmax, plain")  # whose time and memory are measured


# ---------------------------------------------------------------------------- Q1.2 the feature map
def taylor_exp(t, n_terms=3):
    """exp(t) ≈ 1 + t + t²/2! + ... + t^(K-1)/(K-1)!, elementwise."""
    check_n_terms(n_terms)
    return sum(t**n / math.factorial(n) for n in range(n_terms))


def feature_dim(D, n_terms=3):
    """Q1.2: M = 1 + D + D² for three terms, 1 + D + ... + D^(K-1) = (D^K - 1)/(D - 1) for K."""
    return sum(D**n for n in range(n_terms))


def taylor_feature_map(x, n_terms=3):
    """Q1.2: φ, for which φ(q)ᵀφ(k) = taylor_exp(qᵀk), exactly.

    Three terms:  φ(x) = (1,  x,  x⊗x / √2!)
    K terms:      φ(x) = (1,  x,  x⊗x / √2!,  x⊗x⊗x / √3!,  ...),  up to K - 1 factors

    x: floats (..., D) -> (..., M), M = `feature_dim`. ValueError for n_terms < 1, D = 0 or
    integers.
    """
    check_map_input(x, n_terms)
    power = torch.ones_like(x[..., :1])  # x⊗...⊗x with n factors, flat: (..., Dⁿ); n = 0
    features = [power]
    for n in range(1, n_terms):
        power = (power[..., :, None] * x[..., None, :]).flatten(-2)  # (..., Dⁿ)
        features.append(power / math.sqrt(math.factorial(n)))
    return torch.cat(features, dim=-1)  # (..., M)


# -------------------------------------------------------- Q1.2 the feature map without repetitions
def n_monomials(n_variables, degree):
    """How many monomials of exactly this degree: `degree` equal balls in `n_variables` boxes."""
    return math.comb(n_variables + degree - 1, degree)


def reduced_feature_dim(D, n_terms=3):
    """M = (D + 1)(D + 2)/2 for three terms, C(D + K - 1, K - 1) for K: about 1/(K-1)! of Q1.2's M.

    With x_0 = 1 beside x_1, ..., x_D, a monomial of degree at most K - 1 has degree exactly K - 1.
    """
    check_n_terms(n_terms)
    return n_monomials(D + 1, n_terms - 1)


def reduced_feature_map(x, n_terms=3):
    """φ with every monomial once (x_1 x_2 = x_2 x_1): the same φ(q)ᵀφ(k) from fewer features.

    By the multinomial theorem (qᵀk)ⁿ/n! = Σ q^α k^α / α!, α of degree n, where
    x^α = Π x_i^α_i and α! = Π α_i!; so the features are x^α / √α!.

    x: floats (..., D) -> (..., M), M = `reduced_feature_dim`; errors as `taylor_feature_map`.
    """
    check_map_input(x, n_terms)
    ones = torch.ones_like(x[..., 0])
    rows = torch.stack([ones, *x.unbind(-1)])  # (D + 1, ...): 1, x_1, ..., x_D, each contiguous
    x_alpha = monomials(rows, n_terms - 1).movedim(0, -1)  # (..., M)
    weights = monomial_weights(x.shape[-1], n_terms)  # (M,)
    return x_alpha * torch.from_numpy(weights).to(x)


def monomials(rows, degree):
    """All products of `degree` of the rows, each once: (R, ...) -> (n_monomials(R, degree), ...).

    Factors stand in the order of the rows, and products in lexicographic order: of rows 1, a, b
    and degree 2 they are 11, 1a, 1b, aa, ab, bb.
    """
    if degree == 0:
        return torch.ones_like(rows[:1])
    products = rows
    for n in range(1, degree):
        longer = []
        for i, row in enumerate(rows):
            tail = n_monomials(len(rows) - i, n)  # the products of rows i, i + 1, ... come last
            longer.append(row * products[-tail:])
        products = torch.cat(longer)
    return products


@functools.cache
def monomial_weights(D, n_terms):
    """1 / √α! of every monomial x^α, in the order of `monomials`: NumPy (M,) float64."""
    weights = []
    for factors in combinations_with_replacement(range(D + 1), n_terms - 1):
        exponents = [factors.count(i) for i in set(factors) if i > 0]  # factor 0 is the 1
        weights.append(1 / math.sqrt(math.prod(math.factorial(n) for n in exponents)))
    return np.array(weights)


# --------------------------------------------------------------------- Q1.1, Q1.3, Q1.4 attention
def guarded(attention):
    """Decorator of every attention here: Q, K and V are checked and computed in float32 at least.

    float16 and bfloat16 become float32 and autocast is off, since a sum over a whole sequence
    needs all of these digits; the result has the dtype of V.
    """

    @functools.wraps(attention)
    def guarded_attention(Q, K, V, *args, **options):
        check_inputs(Q, K, V)
        dtype = torch.promote_types(V.dtype, torch.float32)  # float64 stays float64
        with torch.autocast(V.device.type, enabled=False):
            out = attention(Q.to(dtype), K.to(dtype), V.to(dtype), *args, **options)
        return out.to(V.dtype)

    return guarded_attention


@guarded
def softmax_attention(Q, K, V):
    """Q1.1: softmax(QKᵀ)V, without 1/√D as in the question; O(T S D) time, O(T S) memory.

    Shapes, dtypes and errors as `linear_attention`.
    """
    weights = (Q @ K.mT).softmax(dim=-1)  # (..., T, S)
    return weights @ V  # (..., T, E)


@guarded
def taylor_attention(Q, K, V, n_terms=3):
    """Q1.3 in the quadratic order, (Φ(Q)Φ(K)ᵀ)V: a weight is the truncated series of its score.

    Shapes, dtypes and errors as `linear_attention`, which gives the same.
    """
    weights = taylor_exp(Q @ K.mT, n_terms)  # (..., T, S): Φ(Q)Φ(K)ᵀ
    normaliser = weights.sum(dim=-1, keepdim=True)  # (..., T, 1)
    check_normaliser(normaliser, Q, largest_norm(K), K.shape[-2], n_terms)
    return weights @ V / normaliser  # (..., T, E)


@guarded
def linear_attention(Q, K, V, n_terms=3):
    """Q1.3: Z ≈ D⁻¹ Φ(Q)Φ(K)ᵀV; D = Diag(Φ(Q)Φ(K)ᵀ1), not the head size here.

    Q1.4: products are taken from the right, Φ(Q)(Φ(K)ᵀV), so there is never a T x S matrix:
    O((T + S) M E) time and O((T + S) M) memory. Differentiable.

    Q (..., T, D), K (..., S, D), V (..., S, E) of one floating dtype -> (..., T, E) of that dtype.
    ValueError for empty, non-finite or mismatched inputs, for n_terms < 1, and where the weights
    of a query have no positive sum (which may happen for even n_terms).
    """
    phi_Q = taylor_feature_map(Q, n_terms)  # (..., T, M)
    phi_K = taylor_feature_map(K, n_terms)  # (..., S, M)
    sum_kv = phi_K.mT @ V  # (..., M, E): Φ(K)ᵀV
    sum_k = phi_K.mT @ torch.ones_like(K[..., :1])  # (..., M, 1): Φ(K)ᵀ1
    normaliser = phi_Q @ sum_k  # (..., T, 1): the diagonal of D
    check_normaliser(normaliser, Q, largest_norm(K), K.shape[-2], n_terms)
    return phi_Q @ sum_kv / normaliser  # (..., T, E)


# -------------------------------------------------------------------- Q1.4 again, in bounded memory
# Why it is also faster (D = 64, L = 16,384, two threads of an AMD EPYC): `linear_attention` takes
# 550 ms, chunks whose features stay in the cache 145 ms, and with `reduced_feature_map` 95 ms.
@guarded
def linear_attention_chunked(Q, K, V, n_terms=3, chunk=None):
    """`linear_attention` with the features of only `chunk` positions at a time: for inference.

    The extra memory is O(M E + chunk M), whatever T and S are; without `chunk`, so many positions
    that their features stay in a processor's cache.
    Shapes, dtypes and errors as `linear_attention`; ValueError also for chunk < 1, and where
    gradients are asked for: a backward pass would need the features of all positions.
    """
    refuse_gradients(Q, K, V)
    chunk = chunk_length(chunk, Q, n_terms)
    sum_kv, sum_k = empty_sums(K, V, n_terms)
    for k, v in zip(K.split(chunk, dim=-2), V.split(chunk, dim=-2)):
        chunk_kv, chunk_k = sums_over_keys(k, v, n_terms)
        sum_kv += chunk_kv
        sum_k += chunk_k

    out = V.new_empty(*Q.shape[:-1], V.shape[-1])  # (..., T, E)
    key_norm = largest_norm(K)
    for q, rows in zip(Q.split(chunk, dim=-2), out.split(chunk, dim=-2)):
        numerator, normaliser = sums_for_queries(q, sum_kv, sum_k, n_terms)
        check_normaliser(normaliser, q, key_norm, K.shape[-2], n_terms)
        rows.copy_(numerator / normaliser)
    return out


@guarded
def causal_linear_attention(Q, K, V, n_terms=3, chunk=None):
    """Q1.4 for a decoder: query t sees keys 0 to t only.

    Keys of earlier chunks count through running sums of φ(k)vᵀ and φ(k), a state of fixed size;
    keys of the same chunk through their scores, masked.

    Differentiable; a backward pass then keeps the features of all positions, O(L M). Without
    gradients, the extra memory is O(M E + chunk M + chunk²) or, where that is more, a second copy
    of the output, made when its chunks are joined.
    Shapes, dtypes and errors as `linear_attention`, with T = S; ValueError also for chunk < 1.
    """
    if Q.shape[-2] != K.shape[-2]:
        raise shape_error(Q, K, V)
    chunk = chunk_length(chunk, Q, n_terms, longest=512)  # longer: the scores cost more than φ
    sum_kv, sum_k = empty_sums(K, V, n_terms)
    key_norm = largest_norm(K)
    n_earlier = 0
    outputs = []
    parts = (x.split(chunk, dim=-2) for x in (Q, K, V))
    for q, k, v in zip(*parts):
        numerator, normaliser = sums_for_queries(q, sum_kv, sum_k, n_terms)  # earlier chunks
        weights = taylor_exp(q @ k.mT, n_terms).tril()  # (..., chunk, chunk): this chunk, up to t
        numerator = numerator + weights @ v  # (..., chunk, E)
        normaliser = normaliser + weights.sum(dim=-1, keepdim=True)  # (..., chunk, 1)
        check_normaliser(normaliser, q, key_norm, n_earlier + 1, n_terms)
        outputs.append(numerator / normaliser)
        chunk_kv, chunk_k = sums_over_keys(k, v, n_terms)
        sum_kv = sum_kv + chunk_kv  # a new tensor: autograd may need the earlier one
        sum_k = sum_k + chunk_k
        n_earlier += q.shape[-2]
    return torch.cat(outputs, dim=-2)  # (..., L, E)


def sums_over_keys(k, v, n_terms):
    """Φ(K)ᵀV, (..., M, E), and Φ(K)ᵀ1, (..., M, 1), of some of the keys."""
    phi_k = reduced_feature_map(k, n_terms)  # (..., chunk, M)
    return phi_k.mT @ v, phi_k.sum(dim=-2, keepdim=True).mT


def sums_for_queries(q, sum_kv, sum_k, n_terms):
    """Φ(Q)Φ(K)ᵀV, (..., T, E), and Φ(Q)Φ(K)ᵀ1, (..., T, 1), of some of the queries."""
    phi_q = reduced_feature_map(q, n_terms)  # (..., chunk, M)
    return phi_q @ sum_kv, phi_q @ sum_k


def empty_sums(K, V, n_terms):
    """Φ(K)ᵀV and Φ(K)ᵀ1 before the first key: zeros (..., M, E) and (..., M, 1)."""
    M = reduced_feature_dim(K.shape[-1], n_terms)
    return V.new_zeros(*V.shape[:-2], M, V.shape[-1]), V.new_zeros(*V.shape[:-2], M, 1)


def chunk_length(chunk, Q, n_terms, longest=math.inf):
    """`chunk`, or if it is None, for how many positions FEATURES_AT_ONCE suffices (at least 64)."""
    if chunk is None:
        n_sequences = math.prod(Q.shape[:-2])
        n_features = n_sequences * reduced_feature_dim(Q.shape[-1], n_terms)  # of one position
        return min(max(FEATURES_AT_ONCE // n_features, 64), longest)
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1; got {chunk}.")
    return chunk


# -------------------------------------------------------------------------------- what is refused
def check_n_terms(n_terms):
    if n_terms < 1:
        raise ValueError(f"n_terms must be at least 1; got {n_terms}.")


def check_map_input(x, n_terms):
    """ValueError, in one sentence, where a feature map is undefined."""
    if n_terms < 1 or not x.is_floating_point() or x.ndim == 0 or x.shape[-1] == 0:
        got = f"{n_terms} and {x.dtype} {tuple(x.shape)}"
        raise ValueError(f"n_terms must be at least 1 and x floats (..., D); got {got}.")


def check_inputs(Q, K, V):
    """ValueError, in one sentence, where attention is undefined."""
    fits = (
        min(Q.ndim, K.ndim, V.ndim) >= 2
        and Q.shape[:-2] == K.shape[:-2] == V.shape[:-2]  # the leading sizes
        and Q.shape[-1] == K.shape[-1]  # D
        and K.shape[-2] == V.shape[-2]  # S
        and 0 not in (*Q.shape, *K.shape, *V.shape)
    )
    if not fits:
        raise shape_error(Q, K, V)
    if not Q.is_floating_point() or not Q.dtype == K.dtype == V.dtype:
        got = f"{Q.dtype}, {K.dtype} and {V.dtype}"
        raise ValueError(f"Q, K and V must be of one floating dtype; got {got}.")
    if not (is_finite(Q) and is_finite(K) and is_finite(V)):
        raise ValueError("Q, K and V must be finite; one of them holds NaN or infinity.")


def shape_error(Q, K, V):
    wanted = "(..., T, D), (..., S, D), (..., S, E), causal T = S, sizes >= 1"
    got = [tuple(Q.shape), tuple(K.shape), tuple(V.shape)]
    return ValueError(f"Q, K, V must be {wanted}; got {got}.")


def is_finite(x):
    """Whether x holds neither NaN nor infinity, without a copy of it as `x.isfinite()` makes."""
    smallest, largest = x.detach().aminmax()  # NaN where there is one
    return bool(smallest.isfinite() and largest.isfinite())


def refuse_gradients(Q, K, V):
    wanted = Q.requires_grad or K.requires_grad or V.requires_grad
    if wanted and torch.is_grad_enabled():
        raise ValueError(
            "linear_attention_chunked is for inference; call it under torch.no_grad(), or "
            "linear_attention for gradients."
        )


@torch.no_grad()
def largest_norm(K):
    """The length of the longest key: (..., S, D) -> (..., 1, 1)."""
    return K.norm(dim=-1).amax(dim=-1)[..., None, None]


@torch.no_grad()
def check_normaliser(normaliser, q, key_norm, n_keys, n_terms):
    """ValueError unless sums of `n_keys` weights are finite, and positive beyond rounding.

    normaliser (..., T, 1), of queries q (..., T, D); key_norm: `largest_norm` of the keys.
    """
    largest_score = q.norm(dim=-1, keepdim=True) * key_norm  # |qᵀk| ≤ |q||k|
    largest_weight = taylor_exp(largest_score, n_terms)  # what may have cancelled
    rounding = torch.finfo(normaliser.dtype).eps * n_keys * largest_weight
    if not ((normaliser > rounding) & normaliser.isfinite()).all():
        raise ValueError(
            f"with n_terms={n_terms} the weights of a row sum to {normaliser.min():.3g}: not "
            "positive beyond rounding; use smaller scores, or an odd n_terms, whose weights are "
            "always positive."
        )


# ---------------------------------------------------------------- experiments: are the sums right?
def identity_errors(D, n_terms):
    """Largest errors of φ(q)ᵀφ(k) = series for 50 x 50 pairs, in float64.

    Errors are relative to the size of the series' terms, |q||k| instead of qᵀk.
    """
    q, k = torch.randn(2, 50, D, dtype=torch.float64)
    series = taylor_exp(q @ k.T, n_terms)  # (50, 50)
    norms = q.norm(dim=1)[:, None] * k.norm(dim=1)
    size = taylor_exp(norms, n_terms)

    def error(feature_map):
        products = feature_map(q, n_terms) @ feature_map(k, n_terms).T
        return ((products - series) / size).abs().max().item()

    return {
        "D": D,
        "n_terms": n_terms,
        "full": error(taylor_feature_map),
        "reduced": error(reduced_feature_map),
    }


def linear_vs_quadratic(Q, K, V):
    """Largest difference between the linear and the quadratic order of products."""
    errors = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        q, k, v = Q.to(dtype), K.to(dtype), V.to(dtype)
        difference = linear_attention_chunked(q, k, v, chunk=32) - taylor_attention(q, k, v)
        errors[name] = difference.abs().max().item()
    return errors


def count_features(n_terms):
    """M against D, with and without repeated monomials."""
    dims = [4, 8, 16, 32, 64, 128]
    return {
        "n_terms": n_terms,
        "D": dims,
        "full": [feature_dim(D, n_terms) for D in dims],
        "reduced": [reduced_feature_dim(D, n_terms) for D in dims],
    }


# ----------------------------------------------------- experiments: how good is the approximation?
def approximation(n_terms, Q, K, V):
    """The error of linear attention as the scores grow; they are at most 1 for the given Q and K.

    For each of SCALES: the largest error against exact attention (None where linear attention
    refuses), its bound, and the share of negative weights.
    """
    row = {"n_terms": n_terms, "score_scale": [], "error": [], "bound": [], "negative_weights": []}
    for scale in SCALES:
        scores = scale * Q @ K.T  # (T, S)
        is_negative = taylor_exp(scores, n_terms) < 0
        row["score_scale"].append(scale)
        row["error"].append(approximation_error(scale * Q, K, V, n_terms))
        row["bound"].append(error_bound(scores, V, n_terms))
        row["negative_weights"].append(is_negative.double().mean().item())
    return row


def approximation_error(Q, K, V, n_terms):
    """Largest difference between linear and exact attention, or None where linear refuses."""
    try:
        approximate = linear_attention_chunked(Q, K, V, n_terms)
    except ValueError:  # the weights of a row have no positive sum
        return None
    return (approximate - softmax_attention(Q, K, V)).abs().max().item()


def error_bound(scores, V, n_terms):
    """What that difference cannot exceed: max |V| R_i/S_i (1 + Σ_j |w_ij| / |W_i|), for all i.

    scores (T, S), of the exact weights A = e^t and the approximate w; S_i and W_i their sums over
    row i; R_i the sum of Lagrange's remainders, |e^t - series| ≤ max(1, e^t) |t|^K / K!.
    """
    A = scores.exp()
    w = taylor_exp(scores, n_terms)
    remainder = A.clamp(min=1) * scores.abs() ** n_terms / math.factorial(n_terms)
    relative = remainder.sum(dim=1) / A.sum(dim=1)  # (T,): R_i/S_i
    cancellation = w.abs().sum(dim=1) / w.sum(dim=1).abs()  # (T,): 1 for positive weights
    bound = V.abs().max() * (relative * (1 + cancellation)).max()
    return bound.item()


# --------------------------------------------------------------- experiments: is the time linear?
def measure(function, *inputs):
    """(seconds, bytes) of function(*inputs): the best of three calls, and its peak memory."""
    n_bytes = peak_memory(function, *inputs)  # first: it also warms up

    def call():
        function(*inputs).flatten()[0].item()  # item() waits for a GPU

    return min(timeit.repeat(call, number=1, repeat=3)), n_bytes


def peak_memory(function, *inputs):
    """The peak of torch's allocator, in bytes, beyond the inputs and the output."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else no GPU is reported as an error
    with torch.profiler.profile(profile_memory=True, acc_events=True) as trace:
        output = function(*inputs)
    changes = []  # (time, bytes): positive where memory is taken, negative where it is returned
    for event in trace.profiler.kineto_results.events():
        is_on_device = event.device_type().name.lower() == output.device.type
        if event.name() == "[memory]" and is_on_device:
            changes.append((event.start_ns(), event.nbytes()))
    changes.sort(key=lambda change: change[0])
    held = peak = 0
    for _, n_bytes in changes:
        held += n_bytes
        peak = max(peak, held)
    return max(0, peak - output.nbytes)


def scaling(D, method, args):
    """Seconds and peak bytes of one of METHODS against the length."""
    lengths = args.seq_lens
    if args.quick:
        lengths = [min(L, 4096) for L in lengths]
    function = attention_of(method, args.n_terms)
    device = runs.pick_device(args.device)
    curve = {"method": method, "D": D}
    curve.update(seq_lens=[], seconds=[], peak_bytes=[], skipped=[])
    for L in sorted(set(lengths)):
        gigabytes = gigabytes_needed(method, L, D, args.n_terms)
        if gigabytes > args.max_memory:
            curve["skipped"].append({"seq_len": L, "reason": f"needs {gigabytes:.1f} GB"})
            continue
        Q, K, V = torch.randn(3, 1, 1, L, D, device=device) * D**-0.25  # scores of variance 1
        seconds, n_bytes = measure(function, Q, K, V)
        curve["seq_lens"].append(L)
        curve["seconds"].append(seconds)
        curve["peak_bytes"].append(n_bytes)
    curve["slope"] = log_slope(curve["seq_lens"][-3:], curve["seconds"][-3:])  # the last 2 octaves
    return curve


def attention_of(method, n_terms):
    """The function of (Q, K, V) that a name in METHODS stands for."""
    if method == "linear":
        return functools.partial(linear_attention_chunked, n_terms=n_terms)
    if method == "softmax, fused":
        return functools.partial(F.scaled_dot_product_attention, scale=1.0)
    return softmax_attention


def gigabytes_needed(method, L, D, n_terms):
    """About how much memory a measurement takes, so that one that would not fit is skipped."""
    if method == "linear":  # the sums over keys, and the features of at least 64 positions
        return 1e-9 * reduced_feature_dim(D, n_terms) * (8 * D + 1000)
    if method == "softmax, plain":  # the scores and the weights
        return 8e-9 * L**2
    return 0.0


def log_slope(lengths, seconds):
    """The power of the length with which time grows, by least squares; None for one length."""
    if len(lengths) < 2:
        return None
    slope, _ = np.polyfit(np.log(lengths), np.log(seconds), 1)
    return float(slope)


def crossovers(curves, n_terms):
    """From which length linear attention is faster than each exact one: measured and predicted.

    Predicted by counting: 2 L² D products against 2 L M D, equal at L = M.
    """
    linear = {curve["D"]: curve for curve in curves if curve["method"] == "linear"}
    rows = []
    for exact in curves:
        D = exact["D"]
        if exact["method"] == "linear":
            continue
        row = {"D": D, "against": exact["method"]}
        row["predicted"] = reduced_feature_dim(D, n_terms)
        row["measured"] = crossover_length(exact, linear[D])
        rows.append(row)
    return rows


def crossover_length(exact, linear):
    """The length at which two curves meet, between lengths measured, or None if they do not."""
    pairs = zip(exact["seconds"], linear["seconds"])  # as many as both have
    gains = [math.log(slow / fast) for slow, fast in pairs]  # positive: linear is faster
    if not gains or not gains[0] < 0 < max(gains):
        return None
    rising = np.maximum.accumulate(gains)  # np.interp needs this; only noise lets a gain fall
    log_length = np.interp(0, rising, np.log(linear["seq_lens"][: len(gains)]))
    return round(math.exp(log_length))


# ----------------------------------------------------------------------------------------- figures
def draw(result, out):
    """All figures of a result, as `out`/figures/q1-*.{pdf,png}."""
    draw_approximation(result, out)
    draw_features(result, out)
    draw_seconds(result, out)
    draw_memory(result, out)


def draw_approximation(result, out):
    """The error of linear attention against the size of the scores, and its bound."""
    curves = curves_of_terms(result["approximation"], "score_scale", solid="error", dashed="bound")
    labels = ("Largest score |q·k|", "Largest error")
    source = result["data"]["source"]
    utils.plot_logarithmic(curves, *labels, "q1-approximation", out, source)


def draw_features(result, out):
    """The number of features against the head size."""
    curves = curves_of_terms(result["feature_counts"], "D", solid="full", dashed="reduced")
    labels = ("Head size D", "Features M")
    source = result["data"]["source"]
    utils.plot_logarithmic(curves, *labels, "q1-features", out, source)


def draw_seconds(result, out):
    """The time of every method against the length."""
    curves = curves_of_methods(result["scaling"], "seconds")
    labels = ("Sequence length L", "Seconds")
    source = result["data"]["source"]
    utils.plot_logarithmic(curves, *labels, "q1-seconds", out, source)


def draw_memory(result, out):
    """The extra memory of every method against the length."""
    curves = curves_of_methods(result["scaling"], "peak_bytes")
    labels = ("Sequence length L", "Peak extra memory (bytes)")
    source = result["data"]["source"]
    utils.plot_logarithmic(curves, *labels, "q1-memory", out, source)


def curves_of_terms(rows, x, solid, dashed):
    """Two curves a row against its entry `x`, in one colour for each number of terms."""
    curves = []
    for i, row in enumerate(rows):
        for key, line in ((solid, "-"), (dashed, "--")):
            label = f"K = {row['n_terms']}, {key}"
            style = {"color": f"C{i}", "linestyle": line, "label": label}
            curves.append((row[x], row[key], style))
    return curves


def curves_of_methods(rows, key):
    """One curve a row against the length: a colour for each D, a kind of line for each method."""
    lines = {"linear": "-", "softmax, fused": "--", "softmax, plain": ":"}
    dims = sorted({row["D"] for row in rows})
    curves = []
    for row in rows:
        style = {
            "color": f"C{dims.index(row['D'])}",
            "linestyle": lines[row["method"]],
            "label": f"D = {row['D']}, {row['method']}",
        }
        curves.append((row["seq_lens"], row[key], style))
    return curves


# ------------------------------------------------------------------------------------ command line
def make_parser():
    parser = runs.ArgumentParser(__doc__)
    lengths = [2**n for n in range(8, 17)]
    positive = runs.number(int, 1)
    parser.flag("seq_lens", type=positive, nargs="+", default=lengths, help="lengths")
    parser.flag("dims", type=positive, nargs="+", default=[16, 32, 64], help="head sizes D")
    parser.flag(
        "n_terms",
        type=int,
        choices=(1, 3, 5, 7),
        default=3,
        help="terms of the series when measuring time",
    )
    parser.flag("quick", action="store_true", help="no length above 4,096")
    parser.flag(
        "max_memory",
        type=runs.number(float, 0),
        default=6.0,
        help="GB; what would need more is skipped",
    )
    parser.flag("out", default="build", help="folder for results/ and figures/")
    parser.flag("seed", type=runs.SEED, default=42, help="of the random Q, K and V")
    parser.flag(
        "device", type=runs.device_name, default="auto", help="auto, cpu, cuda, cuda:1 or mps"
    )
    parser.flag(
        "plot_only",
        action="store_true",
        help="draw the results in OUT again, without measuring",
    )
    return parser


def start_result(args):
    """What a results file says before anything was measured."""
    config = {name: value for name, value in vars(args).items() if name not in ("out", "plot_only")}
    data = {"source": "random normal Q, K, V (synthetic)"}
    device = runs.pick_device(args.device)
    return runs.new_result("q1", "q1", runs.command_line(), config, data, device)


def measure_all(args):
    """Every experiment, as the result that is saved."""
    started = timeit.default_timer()
    result = start_result(args)
    runs.configure_seed(args.seed)

    cases = product((1, 2, 3, 7), range(1, 7))
    result["identities"] = [identity_errors(D, n_terms) for D, n_terms in cases]

    Q, K, V = torch.randn(3, 111, 16, dtype=torch.float64)
    Q = Q / (Q @ K.T).abs().max()  # the largest score is 1
    result["linear_vs_quadratic"] = linear_vs_quadratic(Q, K, V)
    result["approximation"] = [approximation(n_terms, Q, K, V) for n_terms in range(2, 7)]
    result["feature_counts"] = [count_features(n_terms) for n_terms in range(2, 7)]

    cases = list(product(args.dims, METHODS))
    bar = tqdm(cases, desc="time and memory", leave=False, disable=runs.QUIET)
    result["scaling"] = [scaling(D, method, args) for D, method in bar]
    result["crossover"] = crossovers(result["scaling"], args.n_terms)

    result["status"] = "finished"
    result["seconds"] = timeit.default_timer() - started
    return result


def print_summary(result):
    """What was found, a line for each experiment's row."""
    worst = max(max(row["full"], row["reduced"]) for row in result["identities"])
    difference = result["linear_vs_quadratic"]
    print(f"largest errors: phi(q).phi(k) = series {worst:.1e}; linear = quadratic {difference}")
    for row in result["approximation"]:
        texts = ["refused" if error is None else f"{error:7.1e}" for error in row["error"]]
        smallest, largest = row["score_scale"][0], row["score_scale"][-1]
        scales = f"{smallest} ... {largest:g}"
        print(f"K = {row['n_terms']}: error for scores up to {scales}: {'  '.join(texts)}")
    for row in result["scaling"]:
        name = f"D = {row['D']:3}  {row['method']:14}"
        slope = row["slope"] or math.nan
        seconds = "  ".join(f"{t:7.4f}" for t in row["seconds"])
        print(f"{name}  slope {slope:.2f}  seconds {seconds}")
    for row in result["crossover"]:
        found = "no crossover at these lengths"
        if row["measured"]:
            found = f"faster from L = {row['measured']}"
        name = f"D = {row['D']:3}  against {row['against']}"
        print(f"{name}: {found} (predicted: L = {row['predicted']})")


def main(args):
    """Measure (or read what was measured), save, draw and summarise."""
    runs.check_writable(args.out)
    if not args.plot_only:
        runs.save_result(args.out, measure_all(args))
    command = f"`python q1_linear_attention.py -out {args.out}`"
    result = runs.load_result(args.out, "q1", command)
    draw(result, args.out)
    print_summary(result)
    print(f"data: {result['data']['source']}; results and figures are in {args.out}/")


if __name__ == "__main__":
    runs.run_script(main, make_parser())
