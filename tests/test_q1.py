"""Q1: the feature map, the three attentions, their gradients and refusals, the experiments and the command line."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_one_sentence, run_script
from hypothesis import given, settings
from hypothesis import strategies as st

import q1_linear_attention as q1
import utils


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small: a second thread would only wait, for long where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape, dtype=torch.float64, seed=0, scale=0.5):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * scale


def series(s, n_terms):
    """The truncated exponential written out, independent of the module's."""
    return sum(s**n / math.factorial(n) for n in range(n_terms))


def masked_quadratic(Q, K, V, n_terms=3):
    """Causal Taylor attention one position at a time: what a decoder would do."""
    rows = []
    for t in range(Q.shape[-2]):
        weights = series(Q[..., t : t + 1, :] @ K[..., : t + 1, :].mT, n_terms)
        rows.append(weights @ V[..., : t + 1, :] / weights.sum(-1, keepdim=True))
    return torch.cat(rows, dim=-2)


# ------------------------------------------------------------------------------------------------- the feature map
@pytest.mark.parametrize("reduced", [False, True])
@given(st.sampled_from([1, 2, 3, 7]), st.integers(1, 6), st.integers(0, 2**16))
@settings(max_examples=60, deadline=None)
def test_features_multiply_to_the_series(reduced, D, n_terms, seed):
    q, k = normal(2, 5, D, seed=seed, scale=1.0)
    phi_q, phi_k = (q1.taylor_feature_map(x, n_terms, reduced) for x in (q, k))
    assert phi_q.shape == (5, q1.feature_dim(D, n_terms, reduced))
    expected = series(q @ k.T, n_terms)
    size = series(q.norm(dim=1)[:, None] * k.norm(dim=1), n_terms)
    assert ((phi_q @ phi_k.T - expected).abs() <= 1e-10 * size).all()


def test_the_assignments_feature_map_by_hand():
    """Q1.2 for K = 3: 1, the coordinates, and all products of two over sqrt(2)."""
    half = 1 / math.sqrt(2)
    expected = torch.tensor([1.0, 2.0, 3.0, 4 * half, 6 * half, 6 * half, 9 * half])
    torch.testing.assert_close(q1.taylor_feature_map(torch.tensor([2.0, 3.0])), expected)
    assert q1.feature_dim(64, 3) == 1 + 64 + 64**2


@pytest.mark.parametrize("D", [1, 2, 3, 5])
@pytest.mark.parametrize("n_terms", range(1, 7))
def test_feature_counts_against_enumeration(D, n_terms):
    exponents = [e for e in itertools.product(range(n_terms), repeat=D) if sum(e) < n_terms]
    assert q1.feature_dim(D, n_terms, reduced=True) == len(exponents)
    tuples = sum(1 for n in range(n_terms) for _ in itertools.product(range(D), repeat=n))
    assert q1.feature_dim(D, n_terms) == tuples
    # every monomial occurs exactly once: primes tell products apart
    primes = torch.tensor([[2.0], [3.0], [5.0], [7.0], [11.0]], dtype=torch.float64)[:D]
    found = q1.products(primes[None], n_terms, block=1).flatten().tolist()
    expected = [math.prod(int(p) ** n for p, n in zip(primes, e)) for e in exponents]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("n_terms", range(1, 6))
def test_products_in_blocks_of_any_size_make_the_series(block, n_terms):
    x = normal(2, 7, 6, scale=1.0)
    phi = q1.products(x.mT, n_terms, block).mT  # (2, 7, M)
    weights = q1.product_weights(6, n_terms, block)
    assert phi.shape[-1] == len(weights) >= q1.feature_dim(6, n_terms, reduced=True)
    torch.testing.assert_close(phi[0] * weights @ phi[1].T, series(x[0] @ x[1].T, n_terms), atol=1e-10, rtol=1e-10)


def test_feature_map_keeps_leading_sizes_and_dtype():
    x = normal(2, 3, 4, 5, dtype=torch.float32)
    for reduced in (False, True):
        phi = q1.taylor_feature_map(x, 3, reduced)
        assert phi.shape == (2, 3, 4, q1.feature_dim(5, 3, reduced)) and phi.dtype == torch.float32
        torch.testing.assert_close(phi[1, 2, 3], q1.taylor_feature_map(x[1, 2, 3], 3, reduced))


# ------------------------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("L", [1, 63, 111, 257])
@pytest.mark.parametrize("n_terms", [1, 2, 3, 5])
def test_linear_equals_quadratic_for_every_chunk(L, n_terms):
    Q, K, V = normal(3, L, 4, scale=0.3)
    weights = series(Q @ K.T, n_terms)
    expected = weights @ V / weights.sum(1, keepdim=True)
    torch.testing.assert_close(q1.taylor_attention(Q, K, V, n_terms), expected, atol=1e-12, rtol=0)
    for chunk in {1, 2, 32, 64, L // 2 + 1, max(L - 1, 1), L, L + 1, None}:
        result = q1.linear_attention(Q, K, V, n_terms, chunk)
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=0, msg=f"chunk {chunk}")


@pytest.mark.parametrize("L", [1, 63, 111])
def test_causal_equals_masked_quadratic_for_every_chunk(L):
    Q, K, V = normal(3, 2, L, 4)
    expected = masked_quadratic(Q, K, V)
    for chunk in (1, 2, 32, L, L + 1, None):
        result = q1.causal_linear_attention(Q, K, V, 3, chunk)
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=0, msg=f"chunk {chunk}")


@pytest.mark.parametrize("chunk", [1, 7, 16, 40])
def test_causal_does_not_see_the_future(chunk):
    Q, K, V = normal(3, 40, 3)
    K2, V2 = K.clone(), V.clone()
    K2[20:], V2[20:] = normal(20, 3, seed=1), normal(20, 3, seed=2)
    before, after = q1.causal_linear_attention(Q, K, V, 3, chunk), q1.causal_linear_attention(Q, K2, V2, 3, chunk)
    assert torch.equal(before[:20], after[:20])
    assert not torch.allclose(before[20:], after[20:])


def test_batches_cross_attention_and_other_value_sizes():
    Q, K, V = normal(2, 3, 9, 4), normal(2, 3, 14, 4, seed=1), normal(2, 3, 14, 6, seed=2)
    expected = series(Q @ K.mT, 3)
    expected = expected @ V / expected.sum(-1, keepdim=True)
    for result in (q1.linear_attention(Q, K, V, chunk=5), q1.taylor_attention(Q, K, V)):
        torch.testing.assert_close(result, expected, atol=1e-12, rtol=0)
    heads = Q.transpose(0, 1)  # not contiguous, as heads are after a split
    result = q1.linear_attention(heads, K.transpose(0, 1), V.transpose(0, 1))
    torch.testing.assert_close(result.transpose(0, 1), expected, atol=1e-12, rtol=0)


def test_softmax_attention_is_torchs_without_scaling():
    Q, K, V = normal(3, 2, 1, 20, 8)
    expected = F.scaled_dot_product_attention(Q, K, V, scale=1.0)
    torch.testing.assert_close(q1.softmax_attention(Q, K, V), expected, atol=1e-12, rtol=0)


def test_permutations():
    Q, K, V = normal(3, 50, 4)
    rows, columns = torch.randperm(50), torch.randperm(50)
    expected = q1.linear_attention(Q, K, V, chunk=16)
    torch.testing.assert_close(q1.linear_attention(Q[rows], K, V, chunk=16), expected[rows], atol=1e-12, rtol=0)
    torch.testing.assert_close(q1.linear_attention(Q, K[columns], V[columns], chunk=16), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal):
    inputs = [x.requires_grad_() for x in normal(3, 2, 5, 3)]
    assert torch.autograd.gradcheck(lambda *x: q1.linear_attention(*x, 3, 2, causal), inputs)
    assert torch.autograd.gradcheck(lambda *x: q1.linear_attention(*x, 4, 4, causal), [x[:1, :, :2] for x in inputs])
    reference = masked_quadratic if causal else q1.taylor_attention
    mine = torch.autograd.grad(q1.linear_attention(*inputs, 3, 2, causal).square().sum(), inputs)
    theirs = torch.autograd.grad(reference(*inputs).square().sum(), inputs)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def test_gradients_do_not_keep_the_features():
    """What is saved for the backward pass is near the inputs' size; features of Q and K would be four times that."""
    L, D, saved = 2000, 10, {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    Q, K, V = (x.requires_grad_() for x in normal(3, L, D))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = q1.linear_attention(Q, K, V, chunk=100)
    assert sum(saved.values()) < L * q1.feature_dim(D, 3, reduced=True) * 8
    assert torch.isfinite(torch.autograd.grad(out.sum(), Q)[0]).all()


def test_weights_cached_in_inference_mode_serve_training():
    with torch.inference_mode():
        q1.linear_attention(*normal(3, 6, 9))
    Q, K, V = (x.requires_grad_() for x in normal(3, 6, 9))
    q1.linear_attention(Q, K, V).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_is_accumulated_in_float32(dtype, causal):
    """3,000 weights near 1 sum to more than float16 resolves, and bfloat16 stops counting at 256."""
    Q, K, V = normal(3, 3000, 4, scale=0.2).to(dtype)
    V = V + 1
    result = q1.linear_attention(Q, K, V, 3, 128, causal)
    assert result.dtype == dtype
    exact = q1.linear_attention(Q.double(), K.double(), V.double(), 3, 128, causal)
    assert (result.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    assert (
        q1.taylor_attention(Q[:50], K, V).double() - q1.taylor_attention(*(x.double() for x in (Q[:50], K, V)))
    ).abs().max() <= 2 * torch.finfo(dtype).eps


def test_autocast_does_not_lower_the_precision():
    Q, K, V = normal(3, 300, 8, dtype=torch.float32)
    expected = q1.linear_attention(Q, K, V)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q1.linear_attention(Q, K, V), expected)


@pytest.mark.parametrize("causal", [False, True])
def test_extra_memory_does_not_grow_with_the_length(causal):
    bytes_used = []
    for L in (4096, 16384):
        Q, K, V = normal(3, 1, L, 16, dtype=torch.float32)
        bytes_used.append(utils.measure(lambda *x: q1.linear_attention(*x, 3, 256, causal), Q, K, V)[1])
    assert bytes_used[0] > 153 * 256 * 4  # the features of a chunk: the measurement sees something
    assert bytes_used[1] < 1.5 * bytes_used[0]
    assert bytes_used[1] < 16384 * 153 * 4 / 4  # all features would be four times this


def test_default_chunk_bounds_the_features():
    Q, K, V = normal(3, 4096, 64, dtype=torch.float32)
    _, peak = utils.measure(q1.linear_attention, Q, K, V)
    assert peak < 1.5 * 4 * q1.FEATURE_BUFFER < 4 * 4096 * q1.feature_dim(64, 3, reduced=True)


def test_measured_memory_is_what_was_allocated():
    x = torch.ones(500_000)
    seconds, peak = utils.measure(lambda x: (x + 1) * 2, x)
    assert 2_000_000 <= peak < 2_001_000 and seconds > 0


# -------------------------------------------------------------------------------------------------------- refusals
ATTENTIONS = [q1.softmax_attention, q1.taylor_attention, q1.linear_attention, q1.causal_linear_attention]


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
        lambda: q1.taylor_attention(Q, K, V, 0),
        lambda: q1.linear_attention(Q, K, V, 0),
        lambda: q1.linear_attention(Q, K, V, 3, 0),
        lambda: q1.causal_linear_attention(Q, K, V, -1),
    ):
        with pytest.raises(ValueError, match="at least 1"):
            call()


@pytest.mark.parametrize("attention", ATTENTIONS[1:])
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
    torch.testing.assert_close(attention(one * root, one, one, n_terms + 1), one)  # an even degree has no real root


def test_a_normaliser_lost_in_rounding_is_refused():
    """Scores 1 and -3 cancel in the sum of 1 + s, but not to an exact zero in floating point."""
    Q, K = torch.tensor([[0.1]]), torch.tensor([[10.0], [-30.0]])
    with pytest.raises(ValueError, match="not positive beyond rounding"):
        q1.linear_attention(Q, K, torch.ones(2, 1), n_terms=2)


@given(st.integers(0, 2**16), st.sampled_from([1, 3, 5]), st.floats(0.1, 30))
@settings(max_examples=30, deadline=None)
def test_odd_n_terms_average_the_values(seed, n_terms, scale):
    """Positive weights: every output lies between the smallest and the largest value."""
    Q, K, V = normal(3, 20, 3, seed=seed)
    for attention in ATTENTIONS[1:]:
        out = attention(scale * Q, K, V, n_terms)
        assert (out <= V.max() + 1e-9).all() and (out >= V.min() - 1e-9).all()


# ----------------------------------------------------------------------------------------------------- experiments
@pytest.mark.parametrize("n_terms", range(2, 7))
def test_the_bound_holds_and_is_not_idle(n_terms):
    Q, K, V = normal(3, 40, 6)
    row = q1.approximation(n_terms, Q / (Q @ K.T).abs().max(), K, V)
    measured = [(error, bound) for error, bound in zip(row["error"], row["bound"]) if error is not None]
    assert all(error <= bound for error, bound in measured) and len(measured) >= 5
    assert measured[0][1] < 1e4 * measured[0][0]  # small scores: the bound is of the error's order
    small = row["score_scale"].index(0.05), row["score_scale"].index(0.1)
    order = math.log2(row["error"][small[1]] / row["error"][small[0]])
    assert abs(order - n_terms) < 0.3  # the first term left out decides
    assert max(row["negative_weights"]) == 0 if n_terms % 2 else max(row["negative_weights"]) > 0


def test_crossover_is_interpolated():
    lengths = [100, 200, 400, 800]
    exact = {"D": 4, "method": "softmax, plain", "seq_lens": lengths, "seconds": [L**2 / 300 for L in lengths]}
    linear = {"D": 4, "method": "linear", "seq_lens": lengths, "seconds": lengths}
    (row,) = q1.crossovers([exact, linear], 3)
    assert row == {"D": 4, "against": "softmax, plain", "predicted": 15, "measured": 300}
    (row,) = q1.crossovers([exact | {"seconds": []}, linear], 3)
    assert row["measured"] is None


def test_script(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["-seq_lens", 64, 128, 256, "-dims", 4, 8, "-out", tmp_path, "-device", "cpu", "-max_memory", 3e-4]
    process = run_script("q1_linear_attention.py", *flags)
    assert process.returncode == 0 and "synthetic" in process.stdout, process.stderr
    result = json.loads((tmp_path / "results" / "q1.json").read_text())
    assert result["question"] == "q1" and result["status"] == "finished" and result["seed"] == 42
    assert all(row["full"] < 1e-13 and row["reduced"] < 1e-13 for row in result["identities"])
    assert result["linear_vs_quadratic"]["float64"] < 1e-14 and result["linear_vs_quadratic"]["float32"] < 1e-5
    assert [(row["D"], row["method"]) for row in result["scaling"]] == [
        (D, method) for D in (4, 8) for method in ("linear", "softmax, fused", "softmax, plain")
    ]
    plain = result["scaling"][2]
    assert plain["seq_lens"] == [64, 128] and plain["skipped"] == [{"seq_len": 256, "reason": "needs 0.0 GB"}]
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


@pytest.mark.parametrize("flags", ["-n_terms 0", "-n_terms 4", "-seq_lens 0", "-dims x", "-seed -1", "-device warp"])
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
