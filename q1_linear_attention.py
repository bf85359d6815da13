"""Question 1: attention in time linear in the sequence length, from the Taylor series of exp; derived, then measured.

    python q1_linear_attention.py -out build              about a minute on 2 cores; with -quick under 20 s
    python q1_linear_attention.py -out build -plot_only   figures and summary again, from the saved numbers

Prints the errors of the identities (rounding only) and of the approximation, the slopes of time against length (2 is
quadratic, 1 linear) and the crossover; saves OUT/results/q1.json and OUT/figures/q1-*.{pdf,png}.
Letters: D head size, E value size, M features, T queries, S keys (L if equal), N sequences; n_terms is the text's K.
"""

import math
import timeit
from collections import Counter
from contextlib import suppress
from functools import lru_cache, partial
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import utils

FEATURE_BUFFER = 2**22  # features held at once: 16 MB of float32, near a processor's cache, in few long products
SCALES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 24.0)  # largest |q . k| when compared with exact attention


# -------------------------------------------------------------------------------------------- the feature map (Q1.2)
def feature_dim(D, n_terms, reduced=False):
    """M: (D^K - 1)/(D - 1) = 1 + D + ... + D^(K-1), or C(D + K - 1, K - 1) where no monomial is repeated."""
    return math.comb(D + n_terms - 1, n_terms - 1) if reduced else sum(D**n for n in range(n_terms))


def taylor_exp(s, n_terms=3):
    """sum of s^n / n! for n < n_terms, elementwise."""
    return sum(s**n / math.factorial(n) for n in range(n_terms))


def taylor_feature_map(x, n_terms=3, reduced=False):
    """phi of Q1.2: floats (..., D) -> (..., M) with phi(q) . phi(k) = sum of (q . k)^n / n! for n < n_terms, exactly.

    `reduced=False`: the D^n products of n coordinates, over sqrt(n!). `reduced=True`: each monomial once, over the root
    of its exponents' factorials (multinomial theorem). ValueError for n_terms < 1, D = 0 or an x of integers.
    """
    if n_terms < 1 or not x.is_floating_point() or x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"n_terms must be at least 1 and x floats (..., D); got {n_terms} and {x.dtype} {(*x.shape,)}."
        )
    D, block = x.shape[-1], 1 if reduced else x.shape[-1]
    features = products(x.reshape(1, math.prod(x.shape[:-1]), D).mT, n_terms, block)[0].mT  # (positions, M)
    return features.reshape(*x.shape[:-1], -1) * product_weights(D, n_terms, block).sqrt().to(x)


def products(x, n_terms, block):
    """Products of fewer than n_terms coordinates: (N, D, L) -> (N, M, L), as those of n_terms - 1 entries of (1, x).

    Coordinates come in blocks, and the factors of a product in the order of their blocks: those that may follow block b
    are the last rows of the products one shorter, so each step is a block times one contiguous tail. Blocks of 1 give
    every monomial once, one block of D all D^n products, and 8 blocks nearly the fewest products in few, long steps.
    """
    ones, grad = x.new_ones(len(x), 1, x.shape[2]), torch.is_grad_enabled() and x.requires_grad
    blocks = [ones, *x.contiguous().split(block, dim=1)]  # features are rows: every step runs along memory
    rows, tails = ones, [1] * len(blocks)
    for _ in range(1, n_terms):
        factors = [(b[:, :, None], rows[:, None, -tail:]) for b, tail in zip(blocks, tails)]
        sizes = [b.shape[1] * tail for b, tail in zip(blocks, tails)]
        tails = [sum(sizes[i:]) for i in range(len(sizes))]
        if grad:
            rows = torch.cat([(a * b).flatten(1, 2) for a, b in factors], dim=1)
        else:  # half the memory traffic, but autograd refuses `out`
            rows = x.new_empty(len(x), tails[0], x.shape[2])
            for (a, b), out in zip(factors, rows.split(sizes, dim=1)):
                torch.mul(a, b, out=out.unflatten(1, (a.shape[1], b.shape[2])))  # (N, size, tail, L)
    return rows


@lru_cache
@torch.inference_mode(False)  # the cached tensor must also serve calls that record gradients
def product_weights(D, n_terms, block):
    """(M,) float64: how many orderings each of `products` stands for, over n!: 1 / product of (uses of a block)!."""
    rows, blocks = [()], [0] + [1 + i // block for i in range(D)]  # the blocks of each product's factors; 0 is the one
    for _ in range(1, n_terms):
        rows = [(b, *row) for b in blocks for row in rows if not row or b <= row[0]]
    uses = (Counter(b for b in row if b).values() for row in rows)
    return torch.tensor([1 / math.prod(map(math.factorial, counts)) for counts in uses], dtype=torch.float64)


# ------------------------------------------------------------------------------------------- attention (Q1.1, Q1.3)
def softmax_attention(Q, K, V):
    """softmax(Q K^T) V as the question has it, without 1/sqrt(D); shapes, dtypes and errors as `linear_attention`."""
    q, k, v = checked(Q, K, V)
    return ((q @ k.mT).softmax(dim=-1) @ v).to(V.dtype)


def taylor_attention(Q, K, V, n_terms=3):
    """`linear_attention` the quadratic way: the truncated series of the (..., T, S) scores, each row over its sum."""
    q, k, v = checked(Q, K, V, n_terms)
    weights = taylor_exp(q @ k.mT, n_terms)  # (..., T, S)
    sums = weights.sum(dim=-1, keepdim=True)  # (..., T, 1)
    check_normaliser(sums, q, k.detach().norm(dim=-1).amax(dim=-1)[..., None, None], k.shape[-2], n_terms)
    return (weights @ v / sums).to(V.dtype)


def linear_attention(Q, K, V, n_terms=3, chunk=None, causal=False):
    """D^-1 Phi(Q) (Phi(K)^T V) of Q1.3: what `taylor_attention` gives, in O((T + S) M E) and never T x S.

    Q (..., T, D), K (..., S, D), V (..., S, E) of one floating dtype -> (..., T, E) of that dtype; float16 and bfloat16
    are computed in float32. Only `chunk` positions (default: what stays in cache) have their features at a time, so the
    extra memory is O(M E + chunk M), also with gradients. `causal`: position t sees keys 0..t (needs T = S).
    ValueError for empty, non-finite or mismatched inputs, n_terms or chunk < 1, and weights whose sum is not positive.
    """
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in checked(Q, K, V, n_terms, 1 if chunk is None else chunk, causal))
    weights = product_weights(Q.shape[-1], n_terms, block := -(-Q.shape[-1] // 8)).to(q)
    if chunk is None:  # a causal chunk's own scores are quadratic: 512 keeps them cheaper than the features
        chunk = min(max(FEATURE_BUFFER // (len(q) * len(weights)), 64), 512 if causal else FEATURE_BUFFER)
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (Q, K, V))
    call = partial(checkpoint, use_reentrant=False) if grad else lambda f, *x: f(*x)  # kept, features would pile up

    def summed(k, v):  # Phi(K)^T V, transposed; the column of ones makes the normaliser come with the numerator
        return weights * (F.pad(v, (0, 1), value=1).mT @ products(k.mT, n_terms, block).mT)  # (N, E + 1, M)

    state, k_norm = q.new_zeros(len(q), V.shape[-1] + 1, len(weights)), k.detach().norm(dim=-1).amax(-1)[:, None, None]
    out = V.new_empty(*q.shape[:2], V.shape[-1])  # (N, T, E)
    with torch.autocast(q.device.type, enabled=False):  # sums over a whole sequence need all of float32's digits
        for part in () if causal else zip(k.split(chunk, dim=1), v.split(chunk, dim=1)):
            state = state + call(summed, *part)
        for start, here in ((i, slice(i, i + chunk)) for i in range(0, q.shape[1], chunk)):
            sums = call(lambda q, s: s @ products(q.mT, n_terms, block), q[:, here], state).mT  # (N, chunk, E + 1)
            if causal:
                own = taylor_exp(q[:, here] @ k[:, here].mT, n_terms).tril()  # (N, chunk, chunk)
                sums = sums + own @ F.pad(v[:, here], (0, 1), value=1)
                state = state + call(summed, k[:, here], v[:, here])
            check_normaliser(sums[..., -1:], q[:, here], k_norm, start + 1 if causal else k.shape[1], n_terms)
            out[:, here] = sums[..., :-1] / sums[..., -1:]
    return out.reshape(*Q.shape[:-1], -1)


def causal_linear_attention(Q, K, V, n_terms=3, chunk=None):
    """`linear_attention` for decoders: running sums of Phi(k) v^T over earlier chunks, the masked series inside one."""
    return linear_attention(Q, K, V, n_terms, chunk, causal=True)


def checked(Q, K, V, n_terms=1, chunk=1, causal=False):
    """Q, K and V in the dtype to compute in; ValueError, in one sentence, where attention is undefined."""
    fits = Q.shape[:-2] == K.shape[:-2] == V.shape[:-2] and Q.shape[-1:] == K.shape[-1:]
    fits = fits and K.shape[-2:-1] == V.shape[-2:-1] and (not causal or Q.shape == K.shape)
    if not fits or min(Q.ndim, K.ndim, V.ndim) < 2 or 0 in (*Q.shape, *K.shape, *V.shape):
        got = [tuple(x.shape) for x in (Q, K, V)]
        raise ValueError(f"Q, K, V must be (..., T, D), (..., S, D), (..., S, E), causal T = S, sizes >= 1; got {got}.")
    if min(n_terms, chunk) < 1 or not Q.is_floating_point() or not Q.dtype == K.dtype == V.dtype:
        got = f"{n_terms}, {chunk}, {Q.dtype}, {K.dtype} and {V.dtype}"
        raise ValueError(f"n_terms and chunk must be at least 1 and Q, K, V of one floating dtype; got {got}.")
    if not all(torch.stack(x.detach().aminmax()).isfinite().all() for x in (Q, K, V)):  # aminmax passes NaN on
        raise ValueError("Q, K and V must be finite; one of them holds NaN or infinity.")
    return [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (Q, K, V)]


@torch.no_grad()
def check_normaliser(sums, q, k_norm, n_keys, n_terms):
    """ValueError unless `sums` (..., T, 1) of `n_keys` weights each are finite, and positive beyond rounding."""
    largest = taylor_exp(q.norm(dim=-1, keepdim=True) * k_norm, n_terms)  # |q . k| <= |q| |k|: what may have cancelled
    if not ((sums > torch.finfo(sums.dtype).eps * n_keys * largest) & sums.isfinite()).all():
        got = f"with n_terms={n_terms} the weights of a row sum to {sums.min():.3g}: not positive beyond rounding"
        raise ValueError(f"{got}; use smaller scores, or an odd n_terms, whose weights are always positive.")


# ------------------------------------------------------------------------------------------------------ experiments
def identity_errors(D, n_terms):
    """Largest errors of phi(q) . phi(k) = series for 50 x 50 pairs, in float64 and relative to the terms' size."""
    q, k = torch.randn(2, 50, D, dtype=torch.float64)
    size, row = taylor_exp(q.norm(dim=1)[:, None] * k.norm(dim=1), n_terms), {"D": D, "n_terms": n_terms}
    for form in ("full", "reduced"):
        phi_q, phi_k = taylor_feature_map(torch.stack([q, k]), n_terms, form == "reduced")  # (50, M) each
        row[form] = ((phi_q @ phi_k.T - taylor_exp(q @ k.T, n_terms)) / size).abs().max().item()
    return row


def approximation(n_terms, Q, K, V):
    """Largest error of linear attention as the scores grow (None: refused), and its bound: Lagrange's remainder
    max(1, e^s) |s|^n / n! carried through the normalisation. Also the share of negative weights."""
    rows = []
    for scale in SCALES:
        scores, error = scale * Q @ K.T, None  # (T, S)
        weights, remainder = taylor_exp(scores, n_terms), scores.abs() ** n_terms / math.factorial(n_terms)
        relative = (remainder * scores.exp().clamp(min=1)).sum(1) / scores.exp().sum(1)  # (T,)
        bound = V.abs().max() * (relative * (1 + weights.abs().sum(1) / weights.sum(1).abs())).max()
        with suppress(ValueError):
            error = (linear_attention(scale * Q, K, V, n_terms) - softmax_attention(scale * Q, K, V)).abs().max().item()
        rows.append((scale, error, bound.item(), (weights < 0).double().mean().item()))
    return {"n_terms": n_terms} | dict(zip(("score_scale", "error", "bound", "negative_weights"), zip(*rows)))


def scaling(D, method, args):
    """Seconds and peak bytes of one method against L, and the slope of log seconds over the last three octaves."""
    linear, fused = partial(linear_attention, n_terms=args.n_terms), partial(F.scaled_dot_product_attention, scale=1.0)
    function = {"linear": linear, "softmax, fused": fused, "softmax, plain": softmax_attention}[method]
    bytes_of_state = feature_dim(D, args.n_terms, reduced=True) * (8 * D + 1000)
    curve = {"method": method, "D": D, "seq_lens": [], "seconds": [], "peak_bytes": [], "skipped": [], "slope": None}
    for L in sorted({min(L, 4096) if args.quick else L for L in args.seq_lens}):
        gigabytes = {"softmax, plain": 8e-9 * L**2, "linear": 1e-9 * bytes_of_state}.get(method, 0)
        if gigabytes > args.max_memory:
            curve["skipped"].append({"seq_len": L, "reason": f"needs {gigabytes:.1f} GB"})
            continue
        Q, K, V = torch.randn(3, 1, 1, L, D, device=utils.pick_device(args.device)) * D**-0.25  # scores of variance 1
        for key, value in zip(("seq_lens", "seconds", "peak_bytes"), (L, *utils.measure(function, Q, K, V))):
            curve[key].append(value)
    octaves = np.log([curve["seq_lens"][-4:], curve["seconds"][-4:]])
    return curve | {"slope": np.polyfit(*octaves, 1)[0] if octaves.shape[1] > 1 else None}


def crossovers(curves, n_terms):
    """Yield the length from which linear attention is faster: measured, and predicted by counting products, L = M."""
    for exact, linear in product(curves, curves):
        if exact["D"] == linear["D"] and exact["method"] != linear["method"] == "linear":
            gain = np.maximum.accumulate([math.log(a / b) for a, b in zip(exact["seconds"], linear["seconds"])] or [0])
            known = gain[0] < 0 < gain[-1]  # otherwise one of the two is faster at every length
            L = math.exp(np.interp(0, gain, np.log(linear["seq_lens"])[: len(gain)])) if known else None
            M = feature_dim(exact["D"], n_terms, reduced=True)
            yield {"D": exact["D"], "against": exact["method"], "predicted": M, "measured": L and round(L)}


# ---------------------------------------------------------------------------------------------- figures and command
def draw(result, out):
    """One figure, axes logarithmic, for each of: approximation error, number of features, seconds, memory."""
    lines = {"softmax, fused": "--", "softmax, plain": ":", "bound": "--", "reduced": "--"}
    for name, table, x, keys, xlabel, ylabel in (
        ("approximation", "approximation", "score_scale", ("error", "bound"), "Largest score |q·k|", "Largest error"),
        ("features", "feature_counts", "D", ("full", "reduced"), "Head size D", "Features M"),
        ("seconds", "scaling", "seq_lens", ("seconds",), "Sequence length L", "Seconds"),
        ("memory", "scaling", "seq_lens", ("peak_bytes",), "Sequence length L", "Peak extra memory (bytes)"),
    ):
        curves, colours = [], {}
        for row, key in product(result[table], keys):
            group, kind = (f"D = {row['D']}", row["method"]) if table == "scaling" else (f"K = {row['n_terms']}", key)
            style = {"color": colours.setdefault(group, f"C{len(colours)}"), "linestyle": lines.get(kind, "-")}
            curves.append((row[key], style | {"x": row[x], "label": f"{group}, {kind}"}))
        utils.plot(curves, ylabel, f"q1-{name}", out, result["data"]["source"], "", xlabel)


def make_parser():
    parser = utils.ArgumentParser(__doc__.splitlines()[0])
    parser.flag("seq_lens", type=utils.number(int, 1), nargs="+", default=[2**n for n in range(8, 17)], help="lengths")
    parser.flag("dims", type=utils.number(int, 1), nargs="+", default=[16, 32, 64], help="head sizes D")
    parser.flag("n_terms", type=int, choices=(1, 3, 5, 7), default=3, help="terms of the series when measuring time")
    parser.flag("quick", action="store_true", help="no length above 4,096")
    parser.flag("max_memory", type=utils.number(float, 0), default=6.0, help="GB; what would need more is skipped")
    parser.flag("out", default="build", help="folder for results/ and figures/")
    parser.flag("seed", type=utils.number(int, 0, 2**32 - 1), default=42, help="of the random Q, K and V")
    parser.flag("device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to measure")
    parser.flag("plot_only", action="store_true", help="draw the results in OUT again, without measuring")
    return parser


def measure_all(args):
    """Every measurement, as the result that is saved."""
    started, config = timeit.default_timer(), {k: v for k, v in vars(args).items() if k not in ("out", "plot_only")}
    data, device = {"source": "random normal Q, K, V (synthetic)"}, utils.pick_device(args.device)
    result = utils.new_result("q1", "q1", utils.command_line(), config, data, device)
    utils.configure_seed(args.seed)
    result["identities"] = [identity_errors(D, n) for D, n in product((1, 2, 3, 7), range(1, 7))]
    Q, K, V = torch.randn(3, 111, 16, dtype=torch.float64)
    Q = Q / (Q @ K.T).abs().max()
    inputs = {"float64": (Q, K, V), "float32": (Q.float(), K.float(), V.float())}
    equal = {d: (linear_attention(*x, chunk=32) - taylor_attention(*x)).abs().max().item() for d, x in inputs.items()}
    result |= {"linear_vs_quadratic": equal, "approximation": [approximation(n, Q, K, V) for n in range(2, 7)]}
    D, forms = [2**n for n in range(2, 8)], {"full": False, "reduced": True}.items()
    counts = [{"n_terms": n, "D": D} | {f: [feature_dim(d, n, r) for d in D] for f, r in forms} for n in range(2, 7)]
    cases = list(product(args.dims, ("linear", "softmax, fused", "softmax, plain")))
    curves = [scaling(*case, args) for case in tqdm(cases, desc="time and memory", leave=False, disable=None)]
    result |= {"feature_counts": counts, "scaling": curves, "crossover": list(crossovers(curves, args.n_terms))}
    return result | {"status": "finished", "seconds": timeit.default_timer() - started}


def main(args):
    """Measure (or read what was measured), save, draw and summarise."""
    utils.check_writable(args.out)
    if not args.plot_only:
        utils.save_result(args.out, measure_all(args))
    result = utils.load_result(args.out, "q1")
    draw(result, args.out)
    identity = max(max(row["full"], row["reduced"]) for row in result["identities"])
    print(f"largest errors: phi(q).phi(k) = series {identity:.1e}; linear = quadratic {result['linear_vs_quadratic']}")
    for row in result["approximation"]:
        errors = "  ".join("refused" if error is None else f"{error:7.1e}" for error in row["error"])
        scales = f"{row['score_scale'][0]} ... {row['score_scale'][-1]:g}"
        print(f"K = {row['n_terms']}: error for scores up to {scales}: {errors}")
    for row in result["scaling"]:
        seconds = "  ".join(f"{s:7.4f}" for s in row["seconds"])
        print(f"D = {row['D']:3}  {row['method']:14}  slope {row['slope'] or math.nan:.2f}  seconds {seconds}")
    for row in result["crossover"]:
        text = "faster from L = {measured}" if row["measured"] else "no crossover at these lengths"
        print(("D = {D:3}  against {against}: " + text + " (predicted: L = {predicted})").format(**row))
    print(f"data: {result['data']['source']}; results and figures are in {args.out}/")


if __name__ == "__main__":
    utils.run_script(main, make_parser())
