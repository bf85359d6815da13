"""Question 1: attention in time linear in the sequence length, from the Taylor series of exp.

    python q1_linear_attention.py               measures time and memory
    python q1_linear_attention.py -plot_only    figures and summary of saved numbers

The file answers in the order of the question: exact attention (Q1.1), the feature map (Q1.2), the
approximation of attention by it (Q1.3), the order of products that makes it linear (Q1.4), and
what that means for a decoder. Then a second answer: half as many features, in bounded memory.
What the command measures, draws and prints is in q1_measure.py.

Letters: L length of the sequence, D size of a head, M number of features, n_terms the K of the
question; "..." stands for any leading sizes, such as (batch, heads). Every attention takes Q, K
and V, each (..., L, D), and returns Z (..., L, D). All but the causal one also take more or fewer
queries than keys, and all of them values of another size.

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
from itertools import combinations_with_replacement

import numpy as np
import torch

# For how many features there is room at once in bounded memory, by the type of the device.
FEATURES_AT_ONCE = {
    "cpu": 2**20,  # 4 MB of float32, which stay in a processor's cache
    "cuda": 2**27,  # 512 MB: few large kernels; on an H200, 16,384 positions of 32 heads at D = 64
    # take 42 ms (72 ms with half of it, the fused kernel 61 ms)
    "mps": 2**26,
}


# ---------------------------------------------------------------------------- Q1.1 exact attention
def softmax_attention(Q, K, V):
    """Q1.1: Z = softmax(QKᵀ)V, without 1/√D, as in the question.

    O(L²D) time and O(L²) memory: twice the length takes four times as long.
    """
    check_inputs(Q, K, V)
    # Z = softmax(QKᵀ) V
    weights = (Q @ K.mT).softmax(dim=-1)  # (..., L, L): L²D products, L² numbers to keep
    return weights @ V  # (..., L, D): L²D products


# ---------------------------------------------------------------------------- Q1.2 the feature map
def taylor_exp(t, n_terms=3):
    """exp(t) ≈ 1 + t + t²/2! + ... + t^(K-1)/(K-1)!, elementwise."""
    check_count("n_terms", n_terms)
    return sum(t**n / math.factorial(n) for n in range(n_terms))


def three_term_feature_map(x):
    """Q1.2: φ(x) = (1, x, x⊗x / √2), so that φ(q)ᵀφ(k) = 1 + qᵀk + (qᵀk)²/2.

    x (..., D) -> (..., M), M = 1 + D + D². The squares: Σ_i Σ_j (q_i q_j)(k_i k_j) = (qᵀk)².
    """
    x0 = torch.ones_like(x[..., :1])  # (..., 1)
    x1 = x  # (..., D)
    x2 = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2)  # (..., D²)
    return torch.cat([x0, x1, x2], dim=-1)


def taylor_feature_map(x, n_terms=3):
    """Q1.2 for K terms: φ(x) = (1, x, x⊗x / √2!, x⊗x⊗x / √3!, ...), up to K - 1 factors.

    φ(q)ᵀφ(k) = taylor_exp(qᵀk), exactly. x (..., D) -> (..., M), M = `feature_dim`.
    """
    check_floats(x)
    check_count("n_terms", n_terms)
    power = torch.ones_like(x[..., :1])  # x⊗...⊗x with n factors, flat: (..., Dⁿ); n = 0
    features = [power]
    for n in range(1, n_terms):
        power = (power[..., :, None] * x[..., None, :]).flatten(-2)  # (..., Dⁿ)
        features.append(power / math.sqrt(math.factorial(n)))
    return torch.cat(features, dim=-1)  # (..., M)


def feature_dim(D, n_terms=3):
    """Q1.2: M = 1 + D + D² for three terms, 1 + D + ... + D^(K-1) = (D^K - 1)/(D - 1) for K."""
    check_count("n_terms", n_terms)
    return sum(D**n for n in range(n_terms))


# --------------------------------------------------------------- Q1.3 the approximation, quadratic
def in_float32(attention):
    """Decorator: the attention is computed in float32 at least, and returned in the dtype of V.

    A sum over a whole sequence needs all of these digits, so float16 and bfloat16 become float32
    and autocast is off. Q, K and V are checked.
    """

    @functools.wraps(attention)
    def attention_in_float32(Q, K, V, *args, **options):
        check_inputs(Q, K, V)
        dtype = torch.promote_types(V.dtype, torch.float32)  # float64 stays float64
        with torch.autocast(V.device.type, enabled=False):
            Z = attention(Q.to(dtype), K.to(dtype), V.to(dtype), *args, **options)
        return Z.to(V.dtype)

    return attention_in_float32


@in_float32
def taylor_attention(Q, K, V, n_terms=3):
    """Q1.3: Z ≈ D⁻¹ Φ(Q)Φ(K)ᵀ V with D = Diag(Φ(Q)Φ(K)ᵀ 1), not the head size.

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
def linear_attention(Q, K, V, n_terms=3):
    """Q1.4: Z ≈ D⁻¹ Φ(Q)(Φ(K)ᵀV), the same from the right: never an L x L matrix.

    O(LMD) time and O(LM + MD) memory: linear in L, in M and in D; as M = O(D²) for three terms,
    O(LD³). Differentiable.

    Rounding: the features of long q and k cancel in φ(q)ᵀφ(k), which is wrong by up to about
    ε (|q||k|)^(K-1)/(K-1)!, with ε = 6e-8 in float32; for three terms it is at least 1/2.
    """
    phi_Q = taylor_feature_map(Q, n_terms)  # (..., L, M): LM products, LM numbers to keep
    phi_K = taylor_feature_map(K, n_terms)  # (..., L, M): the same
    # Φ(K)ᵀV and Φ(K)ᵀ1: all that the queries need to know of keys and values
    sum_kv = phi_K.mT @ V  # (..., M, D): LMD products, MD numbers to keep
    sum_k = phi_K.sum(dim=-2)[..., None]  # (..., M, 1): LM additions
    # the diagonal of D: Φ(Q) (Φ(K)ᵀ1)
    normaliser = phi_Q @ sum_k  # (..., L, 1): LM products
    check_normaliser(normaliser, n_terms)
    # Z ≈ D⁻¹ Φ(Q) (Φ(K)ᵀV)
    return phi_Q @ sum_kv / normaliser  # (..., L, D): LMD products


# ---------------------------------------------------------------- Q1.4 for a decoder: causal order
@in_float32
def causal_linear_attention(Q, K, V, n_terms=3, chunk=None):
    """Query t sees keys 0 to t only: the two sums over keys become running sums.

    They are a state of M(D + 1) numbers, however long the past. The sequence is taken in chunks:
    earlier ones count through the sums, the keys of the same chunk through their masked weights.

    O(LMD + L chunk D) time. Without gradients the extra memory is O(MD + chunk M + chunk²), or the
    size of the output again, where that is more; with them, all features are kept, O(LM).
    """
    if Q.shape[-2] != K.shape[-2]:
        raise shape_error(Q, K, V)
    M = reduced_feature_dim(Q.shape[-1], n_terms)
    longest = max(512, M)  # beyond, a chunk's scores cost more than its features
    chunk = chunk_length(chunk, Q, n_terms, longest)
    sum_kv = V.new_zeros(*V.shape[:-2], M, V.shape[-1])  # (..., M, D): of all earlier chunks
    sum_k = V.new_zeros(*V.shape[:-2], M, 1)  # (..., M, 1)
    outputs = []
    for q, k, v in zip(*(x.split(chunk, dim=-2) for x in (Q, K, V))):
        phi_q = reduced_feature_map(q, n_terms)  # (..., chunk, M): φ without repetitions, below
        phi_k = reduced_feature_map(k, n_terms)
        weights = taylor_exp(q @ k.mT, n_terms).tril()  # (..., chunk, chunk): keys up to t
        normaliser = phi_q @ sum_k + weights.sum(dim=-1, keepdim=True)  # (..., chunk, 1)
        check_normaliser(normaliser, n_terms)
        outputs.append((phi_q @ sum_kv + weights @ v) / normaliser)  # (..., chunk, D)
        sum_kv = sum_kv + phi_k.mT @ v  # a new tensor: autograd may need the earlier one
        sum_k = sum_k + phi_k.sum(dim=-2)[..., None]
    return torch.cat(outputs, dim=-2)  # (..., L, D)


# --------------------------------------------- Q1.2, a second answer: no feature is there twice
def reduced_feature_dim(D, n_terms=3):
    """M = (D + 1)(D + 2)/2 for three terms, C(D + K - 1, K - 1) for K: about 1/(K-1)! of Q1.2's M.

    With x_0 = 1 beside x_1, ..., x_D, a monomial of degree at most K - 1 has degree exactly K - 1.
    """
    check_count("n_terms", n_terms)
    return n_monomials(D + 1, n_terms - 1)


def n_monomials(n_variables, degree):
    """How many monomials of exactly this degree: `degree` equal balls in `n_variables` boxes."""
    return math.comb(n_variables + degree - 1, degree)


def reduced_feature_map(x, n_terms=3):
    """φ with every monomial once (x_1 x_2 = x_2 x_1): the same φ(q)ᵀφ(k) from fewer features.

    By the multinomial theorem (qᵀk)ⁿ/n! = Σ q^α k^α / α!, α of degree n, where
    x^α = Π x_i^α_i and α! = Π α_i!; so the features are x^α / √α!.

    x (..., L, D) -> (..., L, M), M = `reduced_feature_dim`.
    """
    x_alpha = monomials_up_to(x, n_terms).mT  # (..., L, M)
    return x_alpha / alpha_factorials(x, n_terms).sqrt()


def monomials_up_to(x, n_terms, out=None):
    """Every monomial x^α of degree < n_terms: x (..., L, D) -> (..., M, L).

    out: memory (M, ..., at least L) that may be used.
    """
    check_floats(x)
    check_count("n_terms", n_terms)
    ones = torch.ones_like(x[..., 0])
    rows = torch.stack([ones, *x.unbind(-1)])  # (D + 1, ..., L): 1, x_1, ..., x_D
    if out is not None:
        out = out[..., : x.shape[-2]]  # the last chunk may be shorter
    return monomials(rows, n_terms - 1, out).movedim(0, -2)


def monomials(rows, degree, out=None):
    """All products of `degree` of the rows, each once: (R, ...) -> (n_monomials(R, degree), ...).

    Factors stand in the order of the rows, and products in lexicographic order: of rows 1, a, b
    and degree 2 they are 11, 1a, 1b, aa, ab, bb. `out` is filled where degree >= 2.
    """
    if degree == 0:
        return torch.ones_like(rows[:1])
    products = rows
    for n in range(1, degree):
        # row i times the products of rows i, i + 1, ..., which come last
        n_last = [n_monomials(len(rows) - i, n) for i in range(len(rows))]
        if out is None or n < degree - 1:
            products = torch.cat([row * products[-m:] for row, m in zip(rows, n_last)])
        else:
            for row, m, place in zip(rows, n_last, out.split(n_last)):
                torch.mul(row, products[-m:], out=place)
            products = out
    return products


def alpha_factorials(x, n_terms):
    """α! of every monomial of `monomials_up_to`: (M,), in the dtype and on the device of x."""
    factorials = _alpha_factorials(x.shape[-1], n_terms)
    return torch.tensor(factorials, dtype=x.dtype, device=x.device)


@functools.cache
def _alpha_factorials(D, n_terms):
    factorials = []
    for factors in combinations_with_replacement(range(D + 1), n_terms - 1):
        exponents = [factors.count(i) for i in set(factors) if i > 0]  # factor 0 is the 1
        factorials.append(math.prod(math.factorial(n) for n in exponents))
    return np.array(factorials, dtype=np.float64)


# ------------------------------------------------------ Q1.4, a second answer: in bounded memory
# Also faster: on an AMD EPYC (Zen 3) at D = 64 and L = 16,384 `linear_attention` takes 6 times as
# long. One buffer for all chunks (`out=`) saves 29 % of the time, and dividing the sums by α!
# instead of every feature by its root 29 % before that.
@in_float32
def linear_attention_chunked(Q, K, V, n_terms=3, chunk=None):
    """`linear_attention` with the features of only `chunk` positions at a time: for inference.

    O(LMD) time; the extra memory is O(MD + chunk M), whatever L is. Without `chunk`, as many
    positions as fit into FEATURES_AT_ONCE.
    """
    chunk = chunk_length(chunk, Q, n_terms)
    M = reduced_feature_dim(Q.shape[-1], n_terms)
    longest = min(chunk, max(Q.shape[-2], K.shape[-2]))
    buffer = V.new_empty(M, *V.shape[:-2], longest)  # one chunk's features after the other

    # φ(q)ᵀφ(k) = Σ q^α k^α / α!: the sums of k^α vᵀ and of k^α, each divided by α!
    sum_kv = V.new_zeros(*V.shape[:-2], M, V.shape[-1])  # (..., M, D)
    sum_k = V.new_zeros(*V.shape[:-2], M, 1)  # (..., M, 1)
    for k, v in zip(K.split(chunk, dim=-2), V.split(chunk, dim=-2)):
        k_alpha = monomials_up_to(k, n_terms, buffer)  # (..., M, chunk)
        sum_kv += k_alpha @ v
        sum_k += k_alpha.sum(dim=-1, keepdim=True)
    alpha_factorial = alpha_factorials(K, n_terms)[:, None]  # (M, 1)
    sum_kv /= alpha_factorial
    sum_k /= alpha_factorial

    Z = V.new_empty(*Q.shape[:-1], V.shape[-1])  # (..., L, D)
    for q, z in zip(Q.split(chunk, dim=-2), Z.split(chunk, dim=-2)):
        q_alpha = monomials_up_to(q, n_terms, buffer).mT  # (..., chunk, M)
        normaliser = q_alpha @ sum_k  # (..., chunk, 1)
        check_normaliser(normaliser, n_terms)
        z.copy_(q_alpha @ sum_kv / normaliser)
    return Z


def chunk_length(chunk, Q, n_terms, longest=math.inf):
    """`chunk`, or if it is None, how many positions FEATURES_AT_ONCE has room for (64 at least)."""
    if chunk is not None:
        check_count("chunk", chunk)
        return chunk
    n_sequences = math.prod(Q.shape[:-2])
    of_one_position = n_sequences * reduced_feature_dim(Q.shape[-1], n_terms)
    return min(max(FEATURES_AT_ONCE[Q.device.type] // of_one_position, 64), longest)


# -------------------------------------------------------------------------------- what is refused
def check_count(name, value):
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}.")


def check_floats(*tensors):
    """TypeError unless these are tensors of one floating dtype."""
    for x in tensors:
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"torch tensors are needed; got {type(x).__name__} (torch.as_tensor).")
    dtypes = sorted({str(x.dtype) for x in tensors})
    if len(dtypes) > 1 or not tensors[0].is_floating_point():
        raise TypeError(f"tensors of one floating dtype are needed; got {', '.join(dtypes)}.")


def check_inputs(Q, K, V):
    """TypeError or ValueError, in one sentence, where attention is not defined."""
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


def shape_error(Q, K, V):
    wanted = "(..., T, D), (..., S, D), (..., S, E), causal T = S, sizes >= 1"
    got = [tuple(Q.shape), tuple(K.shape), tuple(V.shape)]
    return ValueError(f"Q, K, V must be {wanted}; got {got}.")


@torch.no_grad()
def check_normaliser(normaliser, n_terms):
    """ValueError unless the sum of each query's weights is positive and finite.

    For odd n_terms every weight is positive, for three 1 + t + t²/2 = ((1 + t)² + 1)/2 >= 1/2;
    then only overflow, rounding, NaN and infinity are refused.
    """
    bad = normaliser[~((normaliser > 0) & (normaliser < math.inf))]
    if len(bad) > 0:
        advice = "use finite and shorter Q and K"
        if n_terms % 2 == 0:
            advice += ", or an odd n_terms, whose weights are positive"
        got = f"with n_terms={n_terms} the weights of a query sum to {bad[0].item():.3g}"
        raise ValueError(f"{got}, not to a positive number; {advice}.")


if __name__ == "__main__":
    import q1_measure  # the floor above, which measures what is defined here

    q1_measure.run()
