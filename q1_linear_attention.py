"""Question 1: attention in time linear in the sequence length, from the Taylor series of exp.

    python q1_linear_attention.py       checks the identities below and prints their rounding errors
    python q1_measure.py                measures time, memory and error, and draws the figures

The file follows the question: exact attention (Q1.1), the feature map φ with M features (Q1.2),
attention approximated with it (Q1.3), and the order of the products that makes this linear (Q1.4),
first as the formula is written, then as `linear_attention`, which is fast. What goes beyond the
question comes last: a map with half as many features, and causal attention with a state of fixed
size, as a decoder uses it.

Notation: L length of the sequence, D size of a head, M number of features, n_terms the K of the
question; "..." stands for any leading sizes, such as (batch, heads). Every attention takes Q, K
and V, each (..., L, D), and returns Z (..., L, D). All but the causal one also take different
numbers of queries and keys, T and S in place of L; all take values of another size, E in place
of D.

An example by hand: qᵀk = 0.3·0.5 - 0.2·0.1 = 0.13, and 1 + 0.13 + 0.13²/2 = 1.13845.

>>> q, k = torch.tensor([0.3, 0.2]), torch.tensor([0.5, -0.1])
>>> print(three_term_feature_map(q))
tensor([1.0000, 0.3000, 0.2000, 0.0636, 0.0424, 0.0424, 0.0283])
>>> print(f"{three_term_feature_map(q) @ three_term_feature_map(k):.5f}")
1.13845
>>> print(f"{taylor_exp(q @ k):.5f}, exactly {(q @ k).exp():.5f}")
1.13845, exactly 1.13883
"""

import functools
import math
from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement
from numbers import Integral

import numpy as np
import torch
from torch import Tensor


# ---------------------------------------------------------------------------- Q1.1 exact attention
def softmax_attention(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """Q1.1: Z = softmax(QKᵀ)V, without 1/√D, as in the question.

    O(L²D) time and O(L²) memory: twice the length takes four times as long.
    """
    check_inputs(Q, K, V)
    weights = (Q @ K.mT).softmax(dim=-1)  # (..., L, L): L²D products, L² numbers to keep
    return weights @ V  # (..., L, D): L²D products


# ---------------------------------------------------------------------------- Q1.2 the feature map
def taylor_exp(t: Tensor, n_terms: int = 3) -> Tensor:
    """exp(t) ≈ 1 + t + t²/2! + ... + t^(K-1)/(K-1)!, elementwise."""
    check_n_terms(n_terms)
    return sum(t**n / math.factorial(n) for n in range(n_terms))


def three_term_feature_map(x: Tensor) -> Tensor:
    """Q1.2: φ(x) = (1, x, x⊗x / √2), so that φ(q)ᵀφ(k) = 1 + qᵀk + (qᵀk)²/2.

    x (..., D) -> (..., M), M = 1 + D + D². The squares: Σ_i Σ_j (q_i q_j)(k_i k_j) = (qᵀk)².
    """
    x0 = torch.ones_like(x[..., :1])  # (..., 1)
    x1 = x  # (..., D)
    x2 = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)  # (..., D²)
    return torch.cat([x0, x1, x2], dim=-1)


def taylor_feature_map(x: Tensor, n_terms: int = 3) -> Tensor:
    """Q1.2 for K terms: φ(x) = (1, x, x⊗x / √2!, x⊗x⊗x / √3!, ...), up to K - 1 factors.

    φ(q)ᵀφ(k) = taylor_exp(qᵀk), exactly. x (..., D) -> (..., M), M = `feature_dim`.
    """
    check_floats(x)
    check_n_terms(n_terms)
    power = torch.ones_like(x[..., :1])  # x⊗...⊗x with n factors, flat: (..., Dⁿ); n = 0
    features = [power]
    for n in range(1, n_terms):
        power = (power[..., :, None] * x[..., None, :]).flatten(-2)  # (..., Dⁿ)
        features.append(power / math.sqrt(math.factorial(n)))
    return torch.cat(features, dim=-1)  # (..., M)


def feature_dim(D: int, n_terms: int = 3) -> int:
    """Q1.2: M = 1 + D + D² for three terms, 1 + D + ... + D^(K-1) for K.

    That is (D^K - 1)/(D - 1), or K where D = 1.
    """
    check_n_terms(n_terms)
    return sum(D**n for n in range(n_terms))


# --------------------------------------------------------------- Q1.3 the approximation, quadratic
def in_float32(attention: Callable) -> Callable:
    """Decorator: check Q, K and V, compute in float32 at least, return Z in the dtype of V.

    A sum over a whole sequence needs that many digits, so float16 and bfloat16 become float32, and
    autocast is off.
    """

    @functools.wraps(attention)
    def attention_in_float32(Q, K, V, *args, **options):
        check_inputs(Q, K, V)
        dtype = torch.promote_types(V.dtype, torch.float32)  # float64 stays float64
        with torch.autocast(V.device.type, enabled=False):
            found = attention(Q.to(dtype), K.to(dtype), V.to(dtype), *args, **options)
        if isinstance(found, tuple):  # from the causal one, whose state stays in float32
            Z, state = found
            return Z.to(V.dtype), state
        return found.to(V.dtype)

    return attention_in_float32


@in_float32
def taylor_attention(Q: Tensor, K: Tensor, V: Tensor, n_terms: int = 3) -> Tensor:
    """Q1.3: Z ≈ D⁻¹ Φ(Q)Φ(K)ᵀ V with D = Diag(Φ(Q)Φ(K)ᵀ 1).

    softmax divides each row of exp(QKᵀ) by its sum; so does this, with Φ(Q)Φ(K)ᵀ in place of
    exp(QKᵀ). (Here D is that diagonal matrix, as in the question, not the size of a head.)

    Products are taken from the left, (Φ(Q)Φ(K)ᵀ)V: O(L²M) time, O(L² + LM) memory.
    """
    # exp(QKᵀ) ≈ Φ(Q) Φ(K)ᵀ
    phi_Q = taylor_feature_map(Q, n_terms)  # (..., L, M)
    phi_K = taylor_feature_map(K, n_terms)  # (..., L, M)
    weights = phi_Q @ phi_K.mT  # (..., L, L): L²M products, L² numbers to keep
    # the diagonal of D: Φ(Q) Φ(K)ᵀ 1
    normaliser = weights.sum(dim=-1, keepdim=True)  # (..., L, 1)
    check_normaliser(normaliser, n_terms)
    # Z ≈ D⁻¹ Φ(Q) Φ(K)ᵀ V
    return weights @ V / normaliser  # (..., L, D): L²D products


# ------------------------------------------------------------------ Q1.4 the same in linear order
@in_float32
def linear_attention_as_written(Q: Tensor, K: Tensor, V: Tensor, n_terms: int = 3) -> Tensor:
    """Q1.4: Z ≈ D⁻¹ Φ(Q)(Φ(K)ᵀV), the same products from the right: never an L x L matrix.

    O(LMD) time and O(LM + MD) memory, linear in L; with M = O(D²) for three terms, the time is
    O(LD³). This is the form to read; the one to use is `linear_attention` below.

    Rounding: for long q and k, large terms cancel in φ(q)ᵀφ(k), whose error may reach about
    ε (|q||k|)^(K-1)/(K-1)!, with ε = 6e-8 in float32. For three terms φ(q)ᵀφ(k) itself is
    at least 1/2.
    """
    phi_Q = taylor_feature_map(Q, n_terms)  # (..., L, M): LM products, LM numbers to keep
    phi_K = taylor_feature_map(K, n_terms)  # (..., L, M): the same
    # Φ(K)ᵀV and Φ(K)ᵀ1: all that the queries need of keys and values
    sum_kv = phi_K.mT @ V  # (..., M, D): LMD products, MD numbers to keep
    sum_k = phi_K.sum(dim=-2)[..., None]  # (..., M, 1): LM additions
    # the diagonal of D: Φ(Q) (Φ(K)ᵀ1)
    normaliser = phi_Q @ sum_k  # (..., L, 1): LM products
    check_normaliser(normaliser, n_terms)
    # Z ≈ D⁻¹ Φ(Q) (Φ(K)ᵀV)
    return phi_Q @ sum_kv / normaliser  # (..., L, D): LMD products


# ------------------------------------------------------- Q1.4 the same in linear order, made fast
# How many features are held at once, by the type of the device.
FEATURES_AT_ONCE = {
    "cpu": 2**19,  # 2 MB of float32, which fit in a processor's cache
    "cuda": 2**27,  # 512 MB, so that a GPU gets few, large products (not tuned)
    "mps": 2**26,
}
BLOCK = 4  # coordinates that are multiplied with all later ones in one product


@in_float32
def linear_attention(Q: Tensor, K: Tensor, V: Tensor, n_terms: int = 3) -> Tensor:
    """Q1.4: the Z of `linear_attention_as_written`, several times as fast and in less memory.

    Three terms, sums over all S keys, with w_s = 1 + qᵀk_s + (qᵀk_s)²/2 the weight of key s:

        Σ w_s v_s = Σ v_s + qᵀ(Σ k_s v_sᵀ) + Σ_i Σ_j≥i c_ij q_i q_j (Σ k_si k_sj v_s)
        Σ w_s     = S + qᵀ(Σ k_s) + qᵀ(Σ k_s k_sᵀ)q / 2

    with c_ij = 1, and 1/2 for squares. So the only features to compute are the products x_i x_j,
    nearly all of them once instead of twice (see `pair_products`), and the sum of the weights needs
    no features at all.

    O(LMD) time. Without gradients the extra memory is O(MD) for the sums, and FEATURES_AT_ONCE for
    the features (with many heads, those of 64 positions); with gradients autograd keeps all
    features, O(LM). Other `n_terms` go through `linear_attention_by_features`, which is slower.
    """
    check_n_terms(n_terms)
    if n_terms != 3:
        return linear_attention_by_features(Q, K, V, n_terms)
    D = Q.shape[-1]
    chunk = chunk_length(Q, min(BLOCK, D) * D)  # the features of the largest block

    # the sums over keys
    sum_v = V.sum(dim=-2, keepdim=True)  # (..., 1, D)
    sum_k = K.sum(dim=-2)[..., None]  # (..., D, 1)
    sum_kv = K.mT @ V  # (..., D, D)
    sum_kk = K.mT @ K  # (..., D, D)
    totals = [0] * len(range(0, D, BLOCK))  # block by block: (..., m, D)
    for k, v in zip(K.split(chunk, dim=-2), V.split(chunk, dim=-2), strict=True):
        totals = [total + kk @ v for total, kk in zip(totals, pair_products(k), strict=True)]
    sum_kkv = [c * total for c, total in zip(pair_weights(Q), totals, strict=True)]  # c = c_ij

    def attend(q):
        normaliser = K.shape[-2] + q @ sum_k + (q @ sum_kk * q).sum(dim=-1, keepdim=True) / 2
        check_normaliser(normaliser, n_terms)
        values = sum_v + q @ sum_kv
        for qq, total in zip(pair_products(q), sum_kkv, strict=True):
            values = values + qq.mT @ total  # (..., chunk, m) @ (..., m, D)
        return values / normaliser  # (..., chunk, D)

    return join(attend, Q, K, V, chunk)


def pair_products(x: Tensor) -> Iterator[Tensor]:
    """Yield x_i x_j for all i <= j in blocks: x (..., L, D) -> blocks (..., m, L).

    A block multiplies BLOCK coordinates with themselves and all later ones. So a pair of two of
    these BLOCK is there twice, as x_i x_j and as x_j x_i.
    """
    rows = x.mT.contiguous()  # (..., D, L)
    for i in range(0, x.shape[-1], BLOCK):
        products = rows[..., i : i + BLOCK, None, :] * rows[..., None, i:, :]
        yield products.flatten(-3, -2)


def pair_weights(x: Tensor) -> Iterator[Tensor]:
    """Yield the c_ij of each block of `pair_products`, (m, 1).

    They make Σ c_ij (q_i q_j)(k_i k_j) = (qᵀk)²/2, in which a square counts 1/2 and any other
    pair 1; a pair that a block has twice counts 1/2 each time.
    """
    D = x.shape[-1]
    for i in range(0, D, BLOCK):
        n = min(BLOCK, D - i)
        c = x.new_ones(n, D - i)
        c[:, :n] = 1 / 2
        yield c.flatten()[:, None]


def chunk_length(x: Tensor, n_features: int) -> int:
    """How many positions to take at once, with `n_features` for each in every head; at least 64."""
    features_per_position = math.prod(x.shape[:-2]) * n_features
    return max(64, FEATURES_AT_ONCE[x.device.type] // features_per_position)


def join(attend: Callable, Q: Tensor, K: Tensor, V: Tensor, chunk: int) -> Tensor:
    """Z (..., L, D) from attend(q) for every chunk of Q, one after the other.

    Without gradients each piece is copied into Z at once, so that no second copy of Z is held.
    """
    pieces = map(attend, Q.split(chunk, dim=-2))
    if any(x.requires_grad for x in (Q, K, V)):
        return torch.cat(list(pieces), dim=-2)
    Z = V.new_empty(*Q.shape[:-1], V.shape[-1])
    for z, piece in zip(Z.split(chunk, dim=-2), pieces, strict=True):
        z.copy_(piece)
    return Z


# -------------------------------------------------------------------------------- what is refused
def check_n_terms(n_terms: int) -> None:
    if not isinstance(n_terms, Integral) or n_terms < 1:
        raise ValueError(f"n_terms must be a whole number, at least 1; got {n_terms!r}.")


def check_floats(*tensors: Tensor) -> None:
    """TypeError unless these are tensors of one floating dtype."""
    for x in tensors:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"torch tensors are needed; got {type(x).__name__} (torch.as_tensor).")
    dtypes = sorted({str(x.dtype) for x in tensors})
    if len(dtypes) > 1 or not tensors[0].is_floating_point():
        raise TypeError(f"tensors of one floating dtype are needed; got {', '.join(dtypes)}.")


def check_inputs(Q: Tensor, K: Tensor, V: Tensor) -> None:
    """TypeError or ValueError, in one sentence, for inputs of which there is no attention."""
    check_floats(Q, K, V)
    fits = (
        min(Q.ndim, K.ndim, V.ndim) >= 2
        and Q.shape[:-2] == K.shape[:-2] == V.shape[:-2]  # the leading sizes
        and Q.shape[-1] == K.shape[-1]  # D
        and K.shape[-2] == V.shape[-2]  # as many values as keys
        and 0 not in (*Q.shape, *K.shape, *V.shape)
    )
    if not fits:
        raise shape_error(Q, K, V)


def shape_error(Q: Tensor, K: Tensor, V: Tensor) -> ValueError:
    wanted = "(..., T, D), (..., S, D), (..., S, E), causal T = S, sizes >= 1"
    got = [tuple(Q.shape), tuple(K.shape), tuple(V.shape)]
    return ValueError(f"Q, K, V must be {wanted}; got {got}.")


@torch.no_grad()
def check_normaliser(normaliser: Tensor, n_terms: int) -> None:
    """ValueError unless the sum of each query's weights is positive and finite.

    With odd n_terms every weight is positive; for three, 1 + t + t²/2 = ((1 + t)² + 1)/2 >= 1/2.
    Then this refuses only overflow, rounding, NaN and infinity.
    """
    bad = normaliser[~((normaliser > 0) & (normaliser < math.inf))]
    if len(bad) > 0:
        advice = "use finite and shorter Q and K"
        if n_terms % 2 == 0:
            advice += ", or an odd n_terms, whose weights are positive"
        got = f"with n_terms={n_terms} the weights of a query sum to {bad[0].item():.3g}"
        raise ValueError(f"{got}, not to a positive number; {advice}.")


# ==================================================================== beyond what Question 1 asks
# A second map, with fewer features, for any number of terms; and causal attention with it.


# ----------------------------------------------------------- Q1.2 again: every monomial only once
def reduced_feature_map(x: Tensor, n_terms: int = 3) -> Tensor:
    """φ with every monomial once (x_1 x_2 = x_2 x_1): the same φ(q)ᵀφ(k) from fewer features.

    By the multinomial theorem (qᵀk)ⁿ/n! = Σ q^α k^α / α!, over all α = (α_1, ..., α_D)
    whose sum is n, where x^α = Π x_i^α_i and α! = Π α_i!. So the features are x^α / √α!.

    x (..., L, D) -> (..., L, M), M = `reduced_feature_dim`.
    """
    check_floats(x)
    check_n_terms(n_terms)
    factors, alpha_factorial = monomials(x.shape[-1], n_terms)
    weights = torch.tensor(alpha_factorial, dtype=x.dtype, device=x.device).rsqrt()  # 1/√α!
    rows = torch.cat([torch.ones_like(x[..., :1]), x], dim=-1).mT.contiguous()  # (..., D + 1, L)
    phi = weights[:, None] * rows[..., :1, :]  # row 0 is 1: (..., M, L)
    for row_numbers in torch.tensor(factors, device=x.device):  # (K - 1, M)
        phi = phi * rows.index_select(-2, row_numbers)
    return phi.mT


@functools.cache
def monomials(D: int, n_terms: int) -> tuple[np.ndarray, np.ndarray]:
    """Every monomial x^α of degree below K: the indices of its factors (K - 1, M), and α! (M,).

    Each is written with K - 1 factors, where x_0 = 1 fills up: for D = 2 and K = 3, the indices 00,
    01, 02, 11, 12 and 22 stand for 1, x_1, x_2, x_1², x_1 x_2 and x_2².
    """
    chosen = list(combinations_with_replacement(range(D + 1), n_terms - 1))
    alphas = [[factors.count(i) for i in set(factors) if i > 0] for factors in chosen]
    alpha_factorial = [math.prod(map(math.factorial, alpha)) for alpha in alphas]
    factors = np.array(chosen, dtype=np.int64).reshape(len(chosen), n_terms - 1)
    return factors.T, np.array(alpha_factorial, dtype=np.float64)


def reduced_feature_dim(D: int, n_terms: int = 3) -> int:
    """M = (D + 1)(D + 2)/2 for three terms, C(D + K - 1, K - 1) for K: about 1/(K-1)! of Q1.2's M.

    That is the number of ways to choose K - 1 factors out of D + 1, with repetition.
    """
    check_n_terms(n_terms)
    return math.comb(D + n_terms - 1, n_terms - 1)


def linear_attention_by_features(Q: Tensor, K: Tensor, V: Tensor, n_terms: int) -> Tensor:
    """`linear_attention` for any number of terms: with the map above, chunk by chunk."""
    chunk = chunk_length(Q, reduced_feature_dim(Q.shape[-1], n_terms))
    sum_kv, sum_k = empty_state(Q, V, n_terms)
    for k, v in zip(K.split(chunk, dim=-2), V.split(chunk, dim=-2), strict=True):
        phi_k = reduced_feature_map(k, n_terms)
        sum_kv = sum_kv + phi_k.mT @ v  # (..., M, D)
        sum_k = sum_k + phi_k.sum(dim=-2)[..., None]  # (..., M, 1)

    def attend(q):
        phi_q = reduced_feature_map(q, n_terms)
        normaliser = phi_q @ sum_k
        check_normaliser(normaliser, n_terms)
        return phi_q @ sum_kv / normaliser

    return join(attend, Q, K, V, chunk)


# ------------------------------------------------------ Q1.4 again: causal attention and its state
# Positions in a chunk of the causal form. With 512, on an AMD EPYC (Zen 3), four heads of D = 8 and
# K = 4 (M = 165) take 3 times as long, and one head of D = 64 and K = 3 (M = 2,145) 1.4 times.
CAUSAL_CHUNK = 128

State = tuple[Tensor, Tensor]  # the sums over the keys so far, (..., M, D) and (..., M, 1)


@in_float32
def causal_linear_attention(
    Q: Tensor, K: Tensor, V: Tensor, n_terms: int = 3, state: State | None = None
) -> tuple[Tensor, State]:
    """Query t sees keys 0 to t only: (Z, state). The two sums over keys become running sums.

    The sums are the state: M(D + 1) numbers, however long the past, where exact attention would
    have to keep all keys and values. Given the state, a later call goes on from there with a piece
    of any length; token by token, each one costs the same:

        Z, state = causal_linear_attention(Q[:900], K[:900], V[:900])
        z, state = causal_linear_attention(Q[900:901], K[900:901], V[900:901], state=state)

    Features and state are those of Heinsen and Kozachkov (2026), Self-Attention at Constant Cost
    per Token via Symmetry-Aware Taylor Approximation (arXiv:2602.00294; code: sata_attention on
    GitHub).

    A piece is taken in chunks: the keys of earlier chunks enter through the sums, those of the same
    chunk through a masked matrix of weights. O(LMD + L chunk D) time; without gradients the extra
    memory is O(MD + chunk M + chunk²), or another Z where that is more, as its chunks are joined.
    """
    if Q.shape[-2] != K.shape[-2]:
        raise shape_error(Q, K, V)
    empty = empty_state(Q, V, n_terms)
    sum_kv, sum_k = empty if state is None else state
    if (sum_kv.shape, sum_k.shape) != (empty[0].shape, empty[1].shape):
        raise ValueError("the state is of other sizes or another n_terms than Q, K and V.")
    outputs = []
    for q, k, v in zip(*(x.split(CAUSAL_CHUNK, dim=-2) for x in (Q, K, V)), strict=True):
        phi_q = reduced_feature_map(q, n_terms)  # (..., chunk, M)
        phi_k = reduced_feature_map(k, n_terms)
        weights = taylor_exp(q @ k.mT, n_terms).tril()  # (..., chunk, chunk): keys up to t
        normaliser = phi_q @ sum_k + weights.sum(dim=-1, keepdim=True)  # (..., chunk, 1)
        check_normaliser(normaliser, n_terms)
        outputs.append((phi_q @ sum_kv + weights @ v) / normaliser)  # (..., chunk, D)
        # only now, so that the sums above are those of earlier chunks
        sum_kv = sum_kv + phi_k.mT @ v
        sum_k = sum_k + phi_k.sum(dim=-2)[..., None]
    return torch.cat(outputs, dim=-2), (sum_kv, sum_k)


def empty_state(Q: Tensor, V: Tensor, n_terms: int) -> State:
    """The state before the first key: zeros (..., M, D) and (..., M, 1)."""
    M = reduced_feature_dim(Q.shape[-1], n_terms)
    return V.new_zeros(*V.shape[:-2], M, V.shape[-1]), V.new_zeros(*V.shape[:-2], M, 1)


# ===================================================================================== the checks
def identity_errors(D: int, n_terms: int) -> dict[str, float]:
    """Q1.2: largest errors of φ(q)ᵀφ(k) = series over 50 x 50 pairs, in float64, for both maps.

    They are relative to the size of the series' terms: the same series of |q||k| for qᵀk.
    """
    q, k = torch.randn(2, 50, D, dtype=torch.float64)
    series = taylor_exp(q @ k.T, n_terms)  # (50, 50)
    size = taylor_exp(q.norm(dim=1)[:, None] * k.norm(dim=1), n_terms)  # (50, 50)

    def error(feature_map):
        products = feature_map(q, n_terms) @ feature_map(k, n_terms).T
        return largest((products - series) / size)

    full, reduced = error(taylor_feature_map), error(reduced_feature_map)
    return {"D": D, "n_terms": n_terms, "full": full, "reduced": reduced}


def linear_vs_quadratic(Q: Tensor, K: Tensor, V: Tensor) -> dict[str, float]:
    """Largest difference between linear and quadratic order, Q1.4 and Q1.3, by precision."""
    errors = {}
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        q, k, v = Q.to(dtype), K.to(dtype), V.to(dtype)
        errors[name] = largest(linear_attention(q, k, v) - taylor_attention(q, k, v))
    return errors


def gradient_error(Q: Tensor, K: Tensor, V: Tensor) -> float:
    """Largest difference between the gradients of `linear_attention` and those as written."""
    gradients = []
    for attention in (linear_attention, linear_attention_as_written):
        inputs = [x.detach().clone().requires_grad_() for x in (Q, K, V)]
        loss = attention(*inputs).square().sum()
        gradients.append(torch.stack(torch.autograd.grad(loss, inputs)))
    return largest(gradients[0] - gradients[1])


def causal_error(Q: Tensor, K: Tensor, V: Tensor) -> float:
    """Largest difference between the causal form and each query with only its own keys."""
    whole, _ = causal_linear_attention(Q, K, V)
    prefixes = [taylor_attention(Q[t : t + 1], K[: t + 1], V[: t + 1]) for t in range(len(Q))]
    return largest(torch.cat(prefixes) - whole)


def state_error(Q: Tensor, K: Tensor, V: Tensor) -> float:
    """Largest difference between the causal form of a whole and the same token by token."""
    whole, _ = causal_linear_attention(Q, K, V)
    tokens, state = [], None
    for q, k, v in zip(*(x.split(1, dim=-2) for x in (Q, K, V)), strict=True):
        z, state = causal_linear_attention(q, k, v, state=state)
        tokens.append(z)
    return largest(torch.cat(tokens, dim=-2) - whole)


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def main() -> None:
    torch.manual_seed(42)
    rows = [identity_errors(D, n_terms) for D in (1, 2, 3, 7) for n_terms in range(1, 7)]
    Q, K, V = torch.randn(3, 200, 16, dtype=torch.float64) / 2
    orders = linear_vs_quadratic(Q, K, V)
    t = (Q * K).sum(dim=-1)  # (L,): the score of each query with the key of its own place
    three_terms = (three_term_feature_map(Q) * three_term_feature_map(K)).sum(dim=-1)
    errors = {
        "Q1.2  phi(q).phi(k) = 1 + q.k + (q.k)^2 / 2": largest(three_terms - 1 - t - t**2 / 2),
        "      the same for the first K terms of exp(q.k)": max(row["full"] for row in rows),
        "      the same with every monomial once": max(row["reduced"] for row in rows),
        "Q1.4  linear_attention = the quadratic order of Q1.3": orders["float64"],
        "      its gradients = those of the formula as written": gradient_error(Q, K, V),
        "      causal = each query with the keys up to its own": causal_error(Q, K, V),
        "      causal, whole = token by token from its state": state_error(Q, K, V),
    }
    full, reduced = feature_dim(16), reduced_feature_dim(16)
    print(f"D = 16, three terms: M = {full} features, {reduced} with every monomial once")
    print("Largest errors in float64, all of them rounding:")
    for identity, error in errors.items():
        print(f"  {identity:56} {error:.0e}")
        assert error < 1e-12, identity
    print(f"  {'      the order of products in float32':56} {orders['float32']:.0e}")
    print(SPEED)


SPEED = """
On long sequences linear_attention is the fast one. linear_attention_as_written gives the same and
is there to be read; softmax_attention is exact and quadratic. On short sequences, with one head as
with eight, torch's fused kernel for exact attention (F.scaled_dot_product_attention) is faster.
From which length on linear_attention wins on this machine: python q1_measure.py"""


if __name__ == "__main__":
    main()
