"""Q1: feature maps, attentions, their gradients and refusals, the experiments, the command line."""

import itertools
import json
import math
from functools import partial

import q1_linear_attention as q1
from conftest import assert_one_sentence, run_script

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

MAPS = [
    (q1.taylor_feature_map, q1.feature_dim),
    (q1.reduced_feature_map, q1.reduced_feature_dim),
]
LINEAR = [q1.linear_attention, q1.linear_attention_chunked]
ATTENTIONS = [
    q1.softmax_attention,
    q1.taylor_attention,
    q1.linear_attention,
    q1.linear_attention_chunked,
    q1.causal_linear_attention,
]
APPROXIMATE = ATTENTIONS[1:]


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are small: a second thread would only wait, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape, dtype=torch.float64, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) * scale


def series(s, n_terms):
    """The truncated exponential written out, independent of the module's."""
    return sum(s**n / math.factorial(n) for n in range(n_terms))


def quadratic(Q, K, V, n_terms=3):
    """Taylor attention written out, independent of the module's."""
    weights = series(Q @ K.mT, n_terms)
    return weights @ V / weights.sum(dim=-1, keepdim=True)


def masked_quadratic(Q, K, V, n_terms=3):
    """Causal Taylor attention one position at a time: what a decoder would do."""
    rows = []
    for t in range(Q.shape[-2]):
        keys, values = K[..., : t + 1, :], V[..., : t + 1, :]
        rows.append(quadratic(Q[..., t : t + 1, :], keys, values, n_terms))
    return torch.cat(rows, dim=-2)


# -------------------------------------------------------------------------------- the feature maps
@pytest.mark.parametrize("feature_map, n_features", MAPS)
@given(st.sampled_from([1, 2, 3, 7]), st.integers(1, 6), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_features_multiply_to_the_series(feature_map, n_features, D, n_terms, seed):
    q, k = normal(2, 5, D, seed=seed, scale=1.0)
    phi_q, phi_k = feature_map(q, n_terms), feature_map(k, n_terms)
    assert phi_q.shape == (5, n_features(D, n_terms))
    expected = series(q @ k.T, n_terms)
    size = series(q.norm(dim=1)[:, None] * k.norm(dim=1), n_terms)
    assert ((phi_q @ phi_k.T - expected).abs() <= 1e-10 * size).all()


def test_the_assignments_feature_map_by_hand():
    """Q1.2 for K = 3: 1, the coordinates, and all products of two over sqrt(2)."""
    half = 1 / math.sqrt(2)
    expected = torch.tensor([1.0, 2.0, 3.0, 4 * half, 6 * half, 6 * half, 9 * half])
    torch.testing.assert_close(q1.taylor_feature_map(torch.tensor([2.0, 3.0])), expected)
    assert q1.feature_dim(64, 3) == 1 + 64 + 64**2


def test_the_map_without_repetitions_by_hand():
    half = 1 / math.sqrt(2)
    expected = torch.tensor([1.0, 2.0, 3.0, 4 * half, 6.0, 9 * half])
    torch.testing.assert_close(q1.reduced_feature_map(torch.tensor([2.0, 3.0])), expected)
    assert q1.reduced_feature_dim(64, 3) == 65 * 66 / 2


@pytest.mark.parametrize("D", [1, 2, 3, 5])
@pytest.mark.parametrize("n_terms", range(1, 7))
def test_feature_counts_against_enumeration(D, n_terms):
    exponents = [e for e in itertools.product(range(n_terms), repeat=D) if sum(e) < n_terms]
    assert q1.reduced_feature_dim(D, n_terms) == len(exponents)
    tuples = sum(1 for n in range(n_terms) for _ in itertools.product(range(D), repeat=n))
    assert q1.feature_dim(D, n_terms) == tuples
    # every monomial occurs exactly once: primes tell products apart
    primes = [2, 3, 5, 7, 11][:D]
    rows = torch.tensor([1, *primes], dtype=torch.float64)
    found = q1.monomials(rows, n_terms - 1).tolist()
    expected = [math.prod(p**n for p, n in zip(primes, e)) for e in exponents]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("n_rows", [1, 2, 4, 7])
@pytest.mark.parametrize("degree", range(6))
def test_monomials_stand_in_lexicographic_order(n_rows, degree):
    """The weights rely on it."""
    rows = normal(n_rows, 2, 3, scale=1.0)
    expected = []
    for factors in itertools.combinations_with_replacement(range(n_rows), degree):
        expected.append(rows[list(factors)].prod(dim=0))
    found = q1.monomials(rows, degree)
    assert len(found) == q1.n_monomials(n_rows, degree)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("feature_map, n_features", MAPS)
def test_feature_map_keeps_leading_sizes_and_dtype(feature_map, n_features):
    x = normal(2, 3, 4, 5, dtype=torch.float32)
    phi = feature_map(x, 3)
    assert phi.shape == (2, 3, 4, n_features(5, 3)) and phi.dtype == torch.float32
    torch.testing.assert_close(phi[1, 2, 3], feature_map(x[1, 2, 3], 3))


# --------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("L", [1, 63, 111, 257])
@pytest.mark.parametrize("n_terms", [1, 2, 3, 5])
def test_linear_equals_quadratic_for_every_chunk(L, n_terms):
    Q, K, V = normal(3, L, 4, scale=0.3)
    expected = quadratic(Q, K, V, n_terms)
    for attention in (q1.taylor_attention, q1.linear_attention):
        torch.testing.assert_close(attention(Q, K, V, n_terms), expected, atol=1e-12, rtol=0)
    for chunk in {1, 2, 32, 64, L // 2 + 1, max(L - 1, 1), L, L + 1, None}:
        result = q1.linear_attention_chunked(Q, K, V, n_terms, chunk)
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=0, msg=f"chunk {chunk}")


@pytest.mark.parametrize("L", [1, 63, 111])
@pytest.mark.parametrize("n_terms", [1, 3])
def test_causal_equals_masked_quadratic_for_every_chunk(L, n_terms):
    Q, K, V = normal(3, 2, L, 4)
    expected = masked_quadratic(Q, K, V, n_terms)
    for chunk in (1, 2, 32, L, L + 1, None):
        result = q1.causal_linear_attention(Q, K, V, n_terms, chunk)
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=0, msg=f"chunk {chunk}")


@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
def test_causal_does_not_see_the_future(chunk):
    Q, K, V = normal(3, 40, 3)
    K2, V2 = K.clone(), V.clone()
    K2[20:], V2[20:] = normal(20, 3, seed=1), normal(20, 3, seed=2)
    before = q1.causal_linear_attention(Q, K, V, 3, chunk)
    after = q1.causal_linear_attention(Q, K2, V2, 3, chunk)
    assert torch.equal(before[:20], after[:20])
    assert not torch.allclose(before[20:], after[20:])


def test_batches_cross_attention_and_other_value_sizes():
    Q, K, V = normal(2, 3, 9, 4), normal(2, 3, 14, 4, seed=1), normal(2, 3, 14, 6, seed=2)
    expected = quadratic(Q, K, V)
    for result in (
        q1.taylor_attention(Q, K, V),
        q1.linear_attention(Q, K, V),
        q1.linear_attention_chunked(Q, K, V, chunk=5),
    ):
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)
    heads = [x.transpose(0, 1) for x in (Q, K, V)]  # not contiguous, as heads are after a split
    for attention in LINEAR:
        result = attention(*heads).transpose(0, 1)
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)


def test_softmax_attention_is_torchs_without_scaling():
    Q, K, V = normal(3, 2, 1, 20, 8)
    expected = F.scaled_dot_product_attention(Q, K, V, scale=1.0)
    torch.testing.assert_close(q1.softmax_attention(Q, K, V), expected, atol=1e-12, rtol=0)


def test_permutations():
    Q, K, V = normal(3, 50, 4)
    rows, columns = torch.randperm(50), torch.randperm(50)
    for attention in LINEAR:
        expected = attention(Q, K, V)
        result = attention(Q[rows], K, V)
        torch.testing.assert_close(result, expected[rows], atol=1e-12, rtol=0)
        result = attention(Q, K[columns], V[columns])
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ATTENTIONS[2:])
def test_half_precision_is_accumulated_in_float32(dtype, attention):
    """3,000 weights near 1 sum to more than float16 resolves; bfloat16 stops counting at 256."""
    Q, K, V = normal(3, 3000, 4, scale=0.2).to(dtype)
    V = V + 1
    result = attention(Q, K, V)
    assert result.dtype == dtype
    exact = attention(Q.double(), K.double(), V.double())
    assert (result.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attention", ATTENTIONS[:2])
def test_quadratic_half_precision_is_accumulated_in_float32(dtype, attention):
    Q, K, V = normal(3, 3000, 4, scale=0.2).to(dtype)
    Q, V = Q[:50], V + 1
    result = attention(Q, K, V)
    assert result.dtype == dtype
    exact = attention(Q.double(), K.double(), V.double())
    assert (result.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_autocast_does_not_lower_the_precision(attention):
    Q, K, V = normal(3, 300, 8, dtype=torch.float32)
    expected = attention(Q, K, V)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention(Q, K, V), expected)


# --------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("n_terms", [1, 3, 4])
@pytest.mark.parametrize("attention", [q1.taylor_attention, q1.linear_attention])
def test_gradients(attention, n_terms):
    inputs = [x.requires_grad_() for x in normal(3, 2, 5, 3)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, n_terms), inputs)
    mine = torch.autograd.grad(
        attention(*inputs, n_terms).square().sum(), inputs, allow_unused=True
    )
    theirs = torch.autograd.grad(quadratic(*inputs, n_terms).square().sum(), inputs)
    for x, y in zip(mine, theirs):
        x = torch.zeros_like(y) if x is None else x
        torch.testing.assert_close(x, y, atol=1e-12, rtol=0)


@pytest.mark.parametrize("chunk", [1, 2, 5, None])
def test_gradients_of_the_causal_form(chunk):
    inputs = [x.requires_grad_() for x in normal(3, 2, 5, 3)]
    assert torch.autograd.gradcheck(lambda *x: q1.causal_linear_attention(*x, 3, chunk), inputs)
    small = [x[:1, :, :2] for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: q1.causal_linear_attention(*x, 4, chunk), small)
    result = q1.causal_linear_attention(*inputs, 3, chunk)
    mine = torch.autograd.grad(result.square().sum(), inputs)
    theirs = torch.autograd.grad(masked_quadratic(*inputs).square().sum(), inputs)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_gradients_of_the_causal_form_take_linear_time():
    """No write into a shared output: autograd would copy all of its gradient for every chunk."""
    inputs = [x.requires_grad_() for x in normal(3, 8, 3)]
    unseen, seen = [q1.causal_linear_attention(*inputs, 3, 2).grad_fn], set()
    while unseen:
        node = unseen.pop()
        if node is not None and node not in seen:
            seen.add(node)
            unseen += [follower for follower, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert "CatBackward0" in names and "CopySlices" not in names


@pytest.mark.parametrize("which", range(3))
def test_the_chunked_form_refuses_gradients(which):
    inputs = [*normal(3, 6, 3)]
    expected = q1.linear_attention_chunked(*inputs)
    inputs[which].requires_grad_()
    with pytest.raises(ValueError, match=r"is for inference; call it under torch\.no_grad\(\)"):
        q1.linear_attention_chunked(*inputs)
    with torch.no_grad():
        assert torch.equal(q1.linear_attention_chunked(*inputs), expected)


def test_weights_cached_in_inference_mode_serve_training():
    with torch.inference_mode():
        q1.linear_attention_chunked(*normal(3, 6, 9))
    Q, K, V = (x.requires_grad_() for x in normal(3, 6, 9))
    q1.causal_linear_attention(Q, K, V).sum().backward()
    q1.reduced_feature_map(Q).sum().backward()


# ------------------------------------------------------------------------------------------ memory
def peaks(attention):
    """Extra memory at L = 4,096 and 16,384, D = 16 and so M = 153, in chunks of 256."""
    peaks = []
    for L in (4096, 16384):
        inputs = normal(3, 1, L, 16, dtype=torch.float32)
        peaks.append(q1.peak_memory(partial(attention, chunk=256), *inputs))
    assert peaks[0] > 153 * 256 * 4  # the features of a chunk: the measurement sees something
    assert peaks[1] < 16384 * 153 * 4 / 4  # all features would be four times this
    return peaks


def test_extra_memory_does_not_grow_with_the_length():
    short, long = peaks(q1.linear_attention_chunked)
    assert long == short


def test_extra_memory_of_the_causal_form_is_at_most_its_output_again():
    short, long = peaks(q1.causal_linear_attention)
    of_output = 16384 * 16 * 4
    assert long < max(1.5 * short, 1.1 * of_output)


def test_default_chunk_bounds_the_features():
    """Two copies of a chunk's features at a time, and the sums over the keys."""
    M = q1.reduced_feature_dim(64, 3)
    for n_sequences, L in ((1, 4096), (8, 512)):
        inputs = normal(3, n_sequences, L, 64, dtype=torch.float32)
        peak = q1.peak_memory(q1.linear_attention_chunked, *inputs)
        features = 4 * q1.FEATURES_AT_ONCE
        sums = 4 * n_sequences * M * 65
        assert peak < 2.2 * features + 3 * sums < 4 * n_sequences * L * M


def test_measured_memory_is_what_was_allocated():
    x = torch.ones(500_000)
    seconds, peak = q1.measure(lambda x: (x + 1) * 2, x)
    assert 2_000_000 <= peak < 2_001_000 and seconds > 0


# ---------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "shapes",
    [
        [(0, 4), (0, 4), (0, 4)],
        [(5, 0), (5, 0), (5, 4)],
        [(5, 4), (5, 3), (5, 4)],
        [(5, 4), (5, 4), (6, 4)],
        [(2, 5, 4), (3, 5, 4), (3, 5, 4)],
        [(2, 5, 4), (5, 4), (5, 4)],
        [(4,), (4,), (4,)],
    ],
)
def test_shapes_that_do_not_fit_are_refused(attention, shapes):
    with pytest.raises(ValueError, match=r"must be \(\.\.\., T, D\)"):
        attention(*(torch.zeros(shape) for shape in shapes))


def test_causal_needs_as_many_queries_as_keys():
    with pytest.raises(ValueError, match="causal T = S"):
        q1.causal_linear_attention(torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5, 3))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(attention, which, value):
    inputs = [*normal(3, 6, 3).clone()]
    inputs[which] = inputs[which].clone()
    inputs[which][3, 1] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        attention(*inputs)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_dtypes_that_do_not_fit_are_refused(attention):
    Q, K, V = normal(3, 6, 3)
    for inputs in ((Q.long(), K.long(), V.long()), (Q.float(), K, V)):
        with pytest.raises(ValueError, match="one floating dtype"):
            attention(*inputs)


def test_numbers_that_make_no_sense_are_refused():
    Q, K, V = normal(3, 6, 3)
    for call in (
        lambda: q1.taylor_feature_map(Q, 0),
        lambda: q1.taylor_feature_map(Q.long(), 3),
        lambda: q1.taylor_feature_map(Q[:, :0], 3),
        lambda: q1.reduced_feature_map(Q, 0),
        lambda: q1.reduced_feature_map(Q.long(), 3),
        lambda: q1.reduced_feature_map(Q[:, :0], 3),
        lambda: q1.taylor_attention(Q, K, V, 0),
        lambda: q1.linear_attention(Q, K, V, 0),
        lambda: q1.linear_attention_chunked(Q, K, V, 0),
        lambda: q1.linear_attention_chunked(Q, K, V, 0, 2),
        lambda: q1.linear_attention_chunked(Q, K, V, 3, 0),
        lambda: q1.causal_linear_attention(Q, K, V, -1),
        lambda: q1.causal_linear_attention(Q, K, V, 3, 0),
    ):
        with pytest.raises(ValueError, match="at least 1"):
            call()


@pytest.mark.parametrize("attention", APPROXIMATE)
@pytest.mark.parametrize("n_terms", [2, 4, 6])
def test_a_normaliser_that_vanishes_or_turns_negative_is_refused(attention, n_terms):
    root = -1.0  # by Newton: the one real root of the series
    for _ in range(50):
        root -= series(root, n_terms) / series(root, n_terms - 1)
    one = torch.ones(1, 1, dtype=torch.float64)
    for score in (root, root - 1):
        with pytest.raises(ValueError, match=f"n_terms={n_terms} the weights of a row sum to"):
            attention(one * score, one, one, n_terms)
    torch.testing.assert_close(attention(one * (root + 0.1), one, one, n_terms), one)
    torch.testing.assert_close(
        attention(one * root, one, one, n_terms + 1), one
    )  # an even degree has no real root


def test_a_normaliser_lost_in_rounding_is_refused():
    """Scores 1 and -3 cancel in the sum of 1 + s, but not to an exact zero in floating point."""
    Q, K = torch.tensor([[0.1]]), torch.tensor([[10.0], [-30.0]])
    with pytest.raises(ValueError, match="not positive beyond rounding"):
        q1.linear_attention(Q, K, torch.ones(2, 1), n_terms=2)


@pytest.mark.parametrize("attention", APPROXIMATE[:3])
def test_weights_whose_sum_overflows_are_refused(attention):
    """Each of the three is 1.6e38, their sum no float32."""
    Q, K = torch.tensor([[2.0]]), torch.tensor([[9e18]] * 3)
    with pytest.raises(ValueError, match="sum to inf"):
        attention(Q, K, torch.ones(3, 1))


@given(st.integers(0, 2**16), st.sampled_from([1, 3, 5]), st.floats(0.1, 30))
@settings(max_examples=30, deadline=None)
def test_odd_n_terms_average_the_values(seed, n_terms, scale):
    """Positive weights: every output lies between the smallest and the largest value."""
    Q, K, V = normal(3, 20, 3, seed=seed)
    for attention in APPROXIMATE:
        out = attention(scale * Q, K, V, n_terms)
        assert (out <= V.max() + 1e-9).all() and (out >= V.min() - 1e-9).all()


# ------------------------------------------------------------------------------------- experiments
@pytest.mark.parametrize("n_terms", range(2, 7))
def test_the_bound_holds_and_is_not_idle(n_terms):
    Q, K, V = normal(3, 40, 6)
    row = q1.approximation(n_terms, Q / (Q @ K.T).abs().max(), K, V)
    measured = [
        (error, bound) for error, bound in zip(row["error"], row["bound"]) if error is not None
    ]
    assert all(error <= bound for error, bound in measured) and len(measured) >= 5
    assert measured[0][1] < 1e4 * measured[0][0]  # small scores: the bound is of the error's order
    small = row["score_scale"].index(0.05), row["score_scale"].index(0.1)
    order = math.log2(row["error"][small[1]] / row["error"][small[0]])
    assert abs(order - n_terms) < 0.3  # the first term left out decides
    assert max(row["negative_weights"]) == 0 if n_terms % 2 else max(row["negative_weights"]) > 0


def test_the_bound_by_hand():
    """Scores 0 and -1: only the second has a remainder, 1/3!, since e^-1 < 1; both weights > 0."""
    scores = torch.tensor([[0.0, -1.0]], dtype=torch.float64)
    V = torch.tensor([[1.0], [-4.0]], dtype=torch.float64)
    expected = 4 * (1 / 6) / (1 + math.exp(-1)) * 2
    assert q1.error_bound(scores, V, 3) == pytest.approx(expected)


def test_crossover_is_interpolated():
    lengths = [100, 200, 400, 800]
    exact = {
        "D": 4,
        "method": "softmax, plain",
        "seq_lens": lengths,
        "seconds": [L**2 / 300 for L in lengths],
    }
    linear = {"D": 4, "method": "linear", "seq_lens": lengths, "seconds": lengths}
    (row,) = q1.crossovers([exact, linear], 3)
    assert row == {"D": 4, "against": "softmax, plain", "predicted": 15, "measured": 300}
    (row,) = q1.crossovers([exact | {"seconds": []}, linear], 3)
    assert row["measured"] is None


def test_crossover_is_the_first_where_noise_makes_more():
    """Linear wins from the fourth to the fifth length on, and seems to lose again later."""
    gains = [-1, -0.9, -0.3, -0.1, 0.9, 0.1, -0.5, -0.5, 2]
    linear = {"seq_lens": [100 * 2**i for i in range(9)], "seconds": [1.0] * 9}
    exact = {"seconds": [math.exp(gain) for gain in gains]}
    assert q1.crossover_length(exact, linear) == round(100 * 2**3.1)


def test_script(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = [
        "-seq_lens",
        64,
        128,
        256,
        "-dims",
        4,
        8,
        "-out",
        tmp_path,
        "-device",
        "cpu",
        "-max_memory",
        3e-4,
    ]
    process = run_script("q1_linear_attention.py", *flags)
    assert process.returncode == 0 and "synthetic" in process.stdout, process.stderr
    result = json.loads((tmp_path / "results" / "q1.json").read_text())
    assert result["question"] == "q1" and result["status"] == "finished" and result["seed"] == 42
    assert all(row["full"] < 1e-13 and row["reduced"] < 1e-13 for row in result["identities"])
    assert (
        result["linear_vs_quadratic"]["float64"] < 1e-14
        and result["linear_vs_quadratic"]["float32"] < 1e-5
    )
    assert [(row["D"], row["method"]) for row in result["scaling"]] == [
        (D, method) for D in (4, 8) for method in ("linear", "softmax, fused", "softmax, plain")
    ]
    plain = result["scaling"][2]
    assert plain["seq_lens"] == [64, 128] and plain["skipped"] == [
        {"seq_len": 256, "reason": "needs 0.0 GB"}
    ]
    figures = sorted((tmp_path / "figures").glob("*"))
    assert [path.name for path in figures] == [
        f"q1-{name}.{suffix}"
        for name in ("approximation", "features", "memory", "seconds")
        for suffix in ("pdf", "png")
    ]
    figures[0].unlink()
    process = run_script("q1_linear_attention.py", "-plot_only", "-out", tmp_path)
    assert process.returncode == 0 and figures[0].exists(), process.stderr
    assert json.loads((tmp_path / "results" / "q1.json").read_text()) == result


@pytest.mark.parametrize(
    "flags", ["-n_terms 0", "-n_terms 4", "-seq_lens 0", "-dims x", "-seed -1", "-device warp"]
)
def test_flags_that_cannot_work_end_in_one_sentence(flags, capsys):
    with pytest.raises(SystemExit) as end:
        q1.make_parser().parse_args(flags.split())
    assert end.value.code == 2 and len(capsys.readouterr().err.strip().splitlines()) == 1


def test_nothing_to_draw_ends_in_one_sentence(tmp_path):
    assert_one_sentence(run_script("q1_linear_attention.py", "-plot_only", "-out", tmp_path))


def test_memory_that_does_not_suffice_skips_every_length(tmp_path):
    flags = f"-seq_lens 4096 9000 -dims 300 -n_terms 5 -max_memory 0.01 -quick -out {tmp_path}"
    args = q1.make_parser().parse_args(flags.split())
    for method in ("linear", "softmax, plain"):
        curve = q1.scaling(300, method, args)
        assert curve["seconds"] == [] and [row["seq_len"] for row in curve["skipped"]] == [4096]
        assert curve["slope"] is None
