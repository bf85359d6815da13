"""Q1: the feature maps, every attention against the formula written out, refusals, the command."""

import doctest
import json
import math
import re

import q1_linear_attention as q1
import q1_measure
import runs
from conftest import run_script

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode


def causal(*inputs, **options):
    """The causal attention's Z, without its state."""
    Z, _ = q1.causal_linear_attention(*inputs, **options)
    return Z


NOT_CAUSAL = [q1.taylor_attention, q1.linear_attention_as_written, q1.linear_attention]
APPROXIMATE = [*NOT_CAUSAL, causal]
ATTENTIONS = [q1.softmax_attention, *APPROXIMATE]


@pytest.fixture(autouse=True)
def one_thread():
    """For tensors this small one thread is faster, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape, dtype=torch.float64, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) * scale


def series(s, n_terms):
    """The truncated exponential written out, without the module."""
    return sum(s**n / math.factorial(n) for n in range(n_terms))


def quadratic(Q, K, V, n_terms=3, causal=False):
    """Taylor attention written out, without the module."""
    weights = series(Q @ K.mT, n_terms)
    if causal:
        weights = weights.tril()
    return weights @ V / weights.sum(dim=-1, keepdim=True)


def assert_close(found, expected, atol=1e-12, message=None):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0, msg=message)


# -------------------------------------------------------------------------------- the feature maps
def test_the_example_in_the_docstring():
    failed, tried = doctest.testmod(q1)
    assert failed == 0 and tried > 0


def test_the_feature_maps_by_hand():
    """Q1.2 for K = 3: 1, the coordinates, and all products of two over sqrt(2)."""
    x = torch.tensor([2.0, 3.0])
    half = 1 / math.sqrt(2)
    every = torch.tensor([1.0, 2.0, 3.0, 4 * half, 6 * half, 6 * half, 9 * half])
    assert_close(q1.three_term_feature_map(x), every, 1e-6)
    assert_close(q1.taylor_feature_map(x), every, 1e-6)
    once = torch.tensor([[1.0, 2.0, 3.0, 4 * half, 6.0, 9 * half]])
    assert_close(q1.reduced_feature_map(x[None]), once, 1e-6)
    assert q1.feature_dim(64, 3) == 1 + 64 + 64**2 and q1.reduced_feature_dim(64, 3) == 65 * 66 / 2
    assert q1.reduced_feature_dim(2, 4) == 10  # 1 a b aa ab bb aaa aab abb bbb


@pytest.mark.parametrize(
    "feature_map, n_features",
    [
        (q1.taylor_feature_map, q1.feature_dim),
        (q1.reduced_feature_map, q1.reduced_feature_dim),
    ],
)
@pytest.mark.parametrize("D", [1, 3, 7])
@pytest.mark.parametrize("n_terms", [1, 2, 3, 6])
def test_features_multiply_to_the_series(feature_map, n_features, D, n_terms):
    q, k = normal(2, 2, 3, 5, D, scale=1.0)
    phi_q, phi_k = feature_map(q, n_terms), feature_map(k, n_terms)
    assert phi_q.shape == (2, 3, 5, n_features(D, n_terms))
    expected = series(q @ k.mT, n_terms)
    size = series(q.norm(dim=-1)[..., :, None] * k.norm(dim=-1)[..., None, :], n_terms)
    assert ((phi_q @ phi_k.mT - expected).abs() <= 1e-13 * size).all()


# --------------------------------------------------------------------------------------- attention
@pytest.mark.parametrize("L", [1, 63, 111])
@pytest.mark.parametrize("n_terms", [1, 2, 3, 5])
def test_linear_equals_quadratic_for_every_chunk(L, n_terms, monkeypatch):
    Q, K, V = normal(3, L, 4, scale=0.3)
    expected = quadratic(Q, K, V, n_terms)
    for attention in NOT_CAUSAL:
        assert_close(attention(Q, K, V, n_terms), expected)
    for chunk in {1, 2, 32, L // 2 + 1, max(L - 1, 1), L, L + 1}:
        monkeypatch.setattr(q1, "chunk_length", lambda *_, chunk=chunk: chunk)
        found = q1.linear_attention(Q, K, V, n_terms)
        assert_close(found, expected, message=f"chunk {chunk}")


@pytest.mark.parametrize("D", [1, 7, 8, 9, 16, 19])
def test_pairs_in_blocks_are_the_square(D):
    """Heads of any size: the last block of coordinates may be shorter than the others."""
    q, k = normal(2, 2, 5, D)
    blocks = zip(q1.pair_products(q), q1.pair_products(k), q1.pair_weights(q), strict=True)
    found = sum(qq.mT @ (c * kk) for qq, kk, c in blocks)
    assert_close(found, (q @ k.mT) ** 2 / 2)
    V = normal(2, 5, 3)
    assert_close(q1.linear_attention(q, k, V), quadratic(q, k, V))


@pytest.mark.parametrize("n_terms", [3, 5])
def test_gradients_are_those_of_the_formula(n_terms, monkeypatch):
    """Also with respect to one input at a time."""
    monkeypatch.setattr(q1, "chunk_length", lambda *_: 4)
    wanted = [x.requires_grad_() for x in normal(3, 2, 11, 9, scale=0.3).unbind()]
    expected = torch.autograd.grad(quadratic(*wanted, n_terms).square().sum(), wanted)
    for attention in (q1.linear_attention, q1.linear_attention_as_written):
        found = torch.autograd.grad(attention(*wanted, n_terms).square().sum(), wanted)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    for i in range(3):  # only one input needs a gradient
        inputs = [x.detach() for x in wanted]
        inputs[i] = wanted[i]
        loss = q1.linear_attention(*inputs, n_terms).square().sum()
        assert_close(torch.autograd.grad(loss, inputs[i])[0], expected[i])


def causal_with_state(*inputs):
    Z, (sum_kv, sum_k) = q1.causal_linear_attention(*inputs)
    return Z, sum_kv, sum_k


@pytest.mark.parametrize("attention", [q1.linear_attention, causal_with_state])
def test_gradients_are_those_of_finite_differences(attention, monkeypatch):
    monkeypatch.setattr(q1, "chunk_length", lambda *_: 2)
    monkeypatch.setattr(q1, "CAUSAL_CHUNK", 2)
    inputs = [x.requires_grad_() for x in normal(3, 5, 3).unbind()]
    assert torch.autograd.gradcheck(attention, inputs)


def test_numpy_integers_are_taken():
    """NumPy's whole numbers are whole numbers."""
    Q, K, V = normal(3, 6, 3)
    for attention in APPROXIMATE:
        assert_close(attention(Q, K, V, np.int64(3)), attention(Q, K, V, 3))
        assert_close(attention(Q, K, V, np.int64(5)), attention(Q, K, V, 5))


@pytest.mark.parametrize("L", [1, 63])
@pytest.mark.parametrize("n_terms", [1, 3, 4])
def test_causal_equals_masked_quadratic_for_every_chunk(L, n_terms, monkeypatch):
    Q, K, V = normal(3, 2, L, 4, scale=0.3)
    expected = quadratic(Q, K, V, n_terms, causal=True)
    for chunk in (1, 2, 32, L, L + 1):
        monkeypatch.setattr(q1, "CAUSAL_CHUNK", chunk)
        assert_close(causal(Q, K, V, n_terms), expected, message=f"chunk {chunk}")


@pytest.mark.parametrize("sizes", [[300], [1, 299], [128, 128, 44], [7, 200, 93], [1] * 300])
@pytest.mark.parametrize("n_terms", [1, 3, 5])
def test_causal_goes_on_from_its_state(sizes, n_terms):
    """At once, in pieces or token by token: the same Z, and the same state at the end."""
    Q, K, V = normal(3, 2, 300, 4, scale=0.3)
    expected = quadratic(Q, K, V, n_terms, causal=True)
    _, whole = q1.causal_linear_attention(Q, K, V, n_terms)
    pieces, state = [], None
    for q, k, v in zip(*(x.split(sizes, dim=-2) for x in (Q, K, V)), strict=True):
        z, state = q1.causal_linear_attention(q, k, v, n_terms, state)
        pieces.append(z)
    assert_close(torch.cat(pieces, dim=-2), expected)
    for one, other in zip(state, whole, strict=True):
        assert_close(one, other)
    M = q1.reduced_feature_dim(4, n_terms)
    assert [x.shape for x in state] == [(2, M, 4), (2, M, 1)]  # however long the past


def test_the_state_of_bfloat16_keeps_its_digits():
    """2,000 tokens of value 1, one by one: bfloat16 would stop counting at 256."""
    Q, K, V = torch.zeros(3, 2000, 2, dtype=torch.bfloat16)
    state = None
    for q, k, v in zip(*(x.split(1) for x in (Q, K, V + 1)), strict=True):
        z, state = q1.causal_linear_attention(q, k, v, state=state)
    assert z.dtype == torch.bfloat16 and state[1][0] == 2000


def test_a_state_of_something_else_is_refused():
    Q, K, V = normal(3, 2, 6, 3)
    _, state = q1.causal_linear_attention(Q, K, V)
    for inputs, n_terms in (((Q, K, V), 5), ((Q[0], K[0], V[0]), 3), ((Q, K, V[..., :2]), 3)):
        with pytest.raises(ValueError, match="the state is of other sizes or another n_terms"):
            q1.causal_linear_attention(*inputs, n_terms, state)


@pytest.mark.parametrize("chunk", [16, 128])
def test_causal_rows_are_right_before_one_very_long_key(chunk, monkeypatch):
    """The rows before it do not see that key, so their weights are not refused."""
    monkeypatch.setattr(q1, "CAUSAL_CHUNK", chunk)
    Q, K, V = normal(3, 64, 8, dtype=torch.float32)
    K[-1] *= 30_000
    expected = quadratic(Q.double(), K.double(), V.double(), causal=True)
    assert_close(causal(Q, K, V).double(), expected, atol=1e-5)


def test_batches_cross_attention_and_other_value_sizes():
    Q, K, V = normal(2, 3, 9, 4), normal(2, 3, 14, 4, seed=1), normal(2, 3, 14, 6, seed=2)
    expected = quadratic(Q, K, V)
    heads = [x.transpose(0, 1) for x in (Q, K, V)]  # not contiguous, as heads are after a split
    for attention in NOT_CAUSAL:
        assert_close(attention(Q, K, V), expected)
        assert_close(attention(*heads).transpose(0, 1), expected)


def test_softmax_attention_is_torchs_without_scaling():
    Q, K, V = normal(3, 2, 1, 20, 8)
    expected = F.scaled_dot_product_attention(Q, K, V, scale=1.0)
    assert_close(q1.softmax_attention(Q, K, V), expected)


@pytest.mark.parametrize("attention", APPROXIMATE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype, attention):
    """2,000 weights near 1 are summed: bfloat16 would stop at 256. Autocast changes nothing."""
    Q, K, V = normal(3, 2000, 4, scale=0.2).to(dtype)
    V = V + 1
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(Q, K, V)
    assert found.dtype == dtype
    exact = attention(Q.double(), K.double(), V.double())
    assert (found.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


# ------------------------------------------------------------------------------- memory and device
@pytest.mark.parametrize("n_terms, n_features, n_blocks", [(3, 8 * 16, 2), (4, 969, 4)])
def test_extra_memory_does_not_grow_with_the_length(n_terms, n_features, n_blocks, monkeypatch):
    """A few blocks of features at a time, and no second copy of the output."""
    monkeypatch.setitem(q1.FEATURES_AT_ONCE, "cpu", 256 * n_features)
    peaks = []
    for L in (2048, 8192):
        Q, K, V = normal(3, 1, L, 16, dtype=torch.float32, scale=0.1)
        peaks.append(q1_measure.peak_memory(q1.linear_attention, Q, K, V, n_terms))
    features = 4 * 256 * n_features
    assert features < peaks[0] == peaks[1] < (n_blocks + 0.8) * features


def test_extra_memory_does_not_grow_with_the_number_of_heads(monkeypatch):
    """More heads make the chunks shorter: the sums over keys grow, the features do not."""
    monkeypatch.setitem(q1.FEATURES_AT_ONCE, "cpu", 2**17)
    peaks = {}
    for n_heads in (1, 2, 8):  # 1,024, 512 and 128 positions
        Q, K, V = normal(3, n_heads, 2048, 16, dtype=torch.float32, scale=0.1)
        sums = 4 * n_heads * 2 * q1.reduced_feature_dim(16) * 16
        peaks[n_heads] = q1_measure.peak_memory(q1.linear_attention, Q, K, V) - sums
    assert max(peaks.values()) < 1.3 * peaks[1]


def test_a_chunk_is_never_shorter_than_64():
    """Products of fewer rows, with very many heads, would take several times as long."""
    assert q1.chunk_length(torch.zeros(10_000, 5, 64), 512) == 64


def test_measured_memory_is_what_was_allocated():
    x = torch.ones(500_000)
    assert 2_000_000 <= q1_measure.peak_memory(lambda x: (x + 1) * 2, x) < 2_001_000


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_tensor_is_made_on_the_device_of_the_inputs(attention, monkeypatch):
    """With fake tensors, on a GPU that need not exist: torch refuses to mix devices."""
    monkeypatch.setattr(q1, "check_normaliser", lambda *_: None)  # they have no values to check
    with FakeTensorMode():
        Q, K, V = torch.empty(3, 2, 4, 30, 8, device="cuda", dtype=torch.float16)
        Z = attention(Q, K, V)
    assert Z.device.type == "cuda" and Z.dtype == torch.float16 and Z.shape == Q.shape


# ---------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    "q, k, v",
    [
        ((0, 4), (0, 4), (0, 4)),
        ((5, 4), (5, 3), (5, 4)),
        ((2, 5, 4), (1, 5, 4), (1, 5, 4)),
        ((5, 4), (6, 4), (5, 4)),  # 6 keys, 5 values
        ((5, 4), (1, 4), (5, 4)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(attention, q, k, v):
    with pytest.raises(ValueError, match=r"must be \(\.\.\., T, D\)"):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))


def test_causal_needs_as_many_queries_as_keys():
    with pytest.raises(ValueError, match="causal T = S"):
        q1.causal_linear_attention(torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5, 3))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_what_is_no_tensor_of_floats_is_refused(attention):
    Q, K, V = normal(3, 6, 3)
    with pytest.raises(TypeError, match="got ndarray"):
        attention(*(x.numpy() for x in (Q, K, V)))
    for inputs in ((Q.long(), K.long(), V.long()), (Q.float(), K, V)):
        with pytest.raises(TypeError, match="one floating dtype"):
            attention(*inputs)


@pytest.mark.parametrize("count", [0, 3.0])
def test_what_is_no_count_is_refused(count):
    Q, K, V = normal(3, 6, 3)
    for attention in APPROXIMATE:
        with pytest.raises(ValueError, match="n_terms must be a whole number, at least 1; got"):
            attention(Q, K, V, count)


@pytest.mark.parametrize("attention", APPROXIMATE)
@pytest.mark.parametrize("n_terms, root", [(2, -1.0), (4, -1.59607)])
def test_a_normaliser_that_is_not_positive_is_refused(attention, n_terms, root):
    """A series of n_terms has one real root here; with one term more it has none."""
    one = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"n_terms={n_terms} .* an odd n_terms, whose weights"):
        attention(one * (root - 1), one, one, n_terms)
    assert_close(attention(one * (root + 0.1), one, one, n_terms), one)
    assert_close(attention(one * (root - 1), one, one, n_terms + 1), one)


@pytest.mark.parametrize("attention", APPROXIMATE)
@pytest.mark.parametrize("number, found", [(1e20, "inf|nan"), (math.nan, "nan")])
def test_a_normaliser_that_is_not_finite_is_refused(attention, number, found):
    Q, K, V = normal(3, 5, 2, dtype=torch.float32)
    Q[3, 1] = number
    with pytest.raises(ValueError, match=f"sum to ({found}).*use finite and shorter Q and K.$"):
        attention(Q, K, V)


# ------------------------------------------------------------------------------- what is measured
@pytest.mark.parametrize("n_terms", range(2, 7))
def test_the_bound_holds_and_is_not_idle(n_terms):
    Q, K, V = normal(3, 40, 6)
    row = q1_measure.approximation(n_terms, Q / (Q @ K.T).abs().max(), K, V)
    pairs = [pair for pair in zip(row["error"], row["bound"], strict=True) if pair[0] is not None]
    assert all(error <= bound for error, bound in pairs) and len(pairs) >= 5
    assert row["bound"][0] < 1e4 * row["error"][0]  # small scores: the bound is of the same order
    order = math.log2(row["error"][1] / row["error"][0])  # scores up to 0.1 and 0.05
    assert abs(order - n_terms) < 0.3  # the first term left out decides
    assert (max(row["negative_weights"]) == 0) == (n_terms % 2 == 1)


@pytest.mark.parametrize(
    "seconds, measured, gain",
    [
        ([50, 200, 800], 200, 2),
        ([900, 900, 900], None, 2.25),  # faster at the shortest length already
        ([50, 100, 300], None, 0.75),  # not faster at the longest length
    ],
)
def test_crossovers_by_hand(seconds, measured, gain):
    lengths = [100, 200, 400]
    linear = {"D": 4, "heads": 1, "method": "linear", "seq_lens": lengths, "seconds": lengths}
    exact = {**linear, "method": "softmax, fused", "seconds": seconds}
    (row,) = q1_measure.crossovers([exact, linear], 3)
    assert (row["measured"], row["gain"], row["seq_len"]) == (measured, gain, 400)
    assert row["predicted"] == 1 + 4 + 10  # M


def test_crossover_is_the_first_where_noise_makes_more():
    """Linear attention wins from between the fourth and fifth length on; noise hides it later."""
    log_gains = [-1, -0.9, -0.3, -0.1, 0.9, 0.1, -0.5, -0.5, 2]
    gains = {100 * 2**i: math.exp(gain) for i, gain in enumerate(log_gains)}
    assert q1_measure.crossover_length(gains) == round(100 * 2**3.1)


@pytest.mark.parametrize("method", q1_measure.METHODS)
def test_memory_counts_the_inputs(method):
    """Q, K, V and Z of 10⁷ positions alone take 10 GB."""
    needed = q1_measure.gigabytes_needed(method, 10**7, 64, 3, torch.device("cpu"))
    assert needed >= 4 * 4 * 64 * 1e7 / 1e9


# ------------------------------------------------------------------------------------ the commands
def test_the_formulas_check_themselves():
    """The script prints every identity with its error, then what is fast."""
    process = run_script("q1_linear_attention.py")
    assert process.returncode == 0, process.stderr
    errors = [float(number) for number in re.findall(r" (\de-\d\d)$", process.stdout, re.M)]
    assert len(errors) == 8 and max(errors[:7]) < 1e-12 and errors[7] < 1e-5
    assert "M = 273" in process.stdout and "fused kernel" in process.stdout


@pytest.mark.parametrize(
    "name, wrong, said",
    [
        ("three_term_feature_map", lambda x: torch.cat([x, x], -1), r"= 1 \+ q\.k"),
        ("linear_attention", q1.softmax_attention, "linear_attention = the quadratic order"),
        ("causal_linear_attention", lambda *x, state=None: (x[2], state), "causal = each query"),
    ],
)
def test_a_wrong_formula_does_not_pass_its_check(monkeypatch, name, wrong, said):
    monkeypatch.setattr(q1, name, wrong)
    with pytest.raises(AssertionError, match=said):
        q1.main()


def parse(*flags):
    return q1_measure.make_parser().parse_args(flags)


def test_script(tmp_path, monkeypatch):
    """Measured in this process; then the script draws and sums up the saved numbers."""
    flags = "-seq_lens 256 64 128 -dims 4 8 -device cpu -max_memory 5e-4".split()
    monkeypatch.setattr(q1_measure, "draw", lambda *_: None)
    q1_measure.main(parse(*flags, "-out", str(tmp_path)))
    path = tmp_path / "results" / "q1.json"
    saved = path.read_text()
    result = json.loads(saved)
    assert result["status"] == "finished" and result["config"]["seq_lens"] == [64, 128, 256]
    assert all(row["full"] < 1e-13 and row["reduced"] < 1e-13 for row in result["identities"])
    assert result["linear_vs_quadratic"]["float64"] < 1e-14
    assert result["linear_vs_quadratic"]["float32"] < 1e-5
    found = [(row["D"], row["method"], row["seq_lens"]) for row in result["scaling"]]
    expected = [(D, method, [64, 128, 256]) for D in (4, 8) for method in q1_measure.METHODS]
    expected[2] = (4, "softmax, plain", [64, 128])
    expected[5] = (8, "softmax, plain", [64, 128])
    assert found == expected
    found = [(row["D"], row["heads"], row["method"]) for row in result["many_heads"]]
    assert found == [(8, 8, "linear"), (8, 8, "softmax, fused")]
    for row in result["scaling"]:
        assert row["slope_lengths"] == row["seq_lens"]
        for fastest, median, slowest in zip(
            row["fastest"], row["seconds"], row["slowest"], strict=True
        ):
            assert 0 < fastest <= median <= slowest

    process = run_script("q1_measure.py", "-plot_only", "-out", tmp_path)
    assert process.returncode == 0, process.stderr
    assert "skipped: L = 256 needs about 0.00054 GB, over -max_memory 0.0005" in process.stdout
    assert "data: random normal Q, K, V (synthetic)" in process.stdout
    figures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    names = ("approximation", "memory", "seconds", "series")
    assert figures == [f"q1-{name}.{suffix}" for name in names for suffix in ("pdf", "png")]
    assert path.read_text() == saved


def test_what_does_not_fit_into_memory_is_skipped_and_said(capsys):
    """Not that there is no crossover, where linear attention was skipped."""
    args = parse(*"-seq_lens 64 -dims 64 -n_terms 7 -max_memory 0.01".split())
    curves = q1_measure.compare_methods(64, args)
    q1_measure.print_scaling(curves, q1_measure.crossovers(curves, 7))
    printed = capsys.readouterr().out
    assert "linear          not measured at any length\n    skipped: L = 64 needs" in printed
    assert "linear against softmax, fused: never both measured" in printed


def test_memory_that_runs_out_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    """As on a GPU that is smaller than -max_memory says."""

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")

    monkeypatch.setattr(q1_measure, "measure_all", out_of_memory)
    monkeypatch.setattr("sys.argv", ["q1_measure.py", "-out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        runs.run_script(q1_measure.main, q1_measure.make_parser(), q1_measure.IF_MEMORY_RUNS_OUT)
    assert end.value.code == 2 and "smaller -max_memory" in capsys.readouterr().err
