"""What Question 1 measures: how good linear attention's approximation is, and where it is faster.

    python q1_measure.py                measures time, memory and error
    python q1_measure.py -plot_only     draws and sums up the saved numbers

Saves OUT/results/q1.json and OUT/figures/q1-*.{pdf,png}. Seconds are medians over rounds in which
the methods take turns, so that a busy moment of the machine hits all of them.
"""

import functools
import math
import os
import statistics
import timeit
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence

import q1_linear_attention as q1
import runs
import utils

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

LENGTHS = [2**n for n in range(8, 17)]  # 256 to 65,536
ROUNDS = 5
HALF_PAGE = (3.2, 2.0)  # inches, of a figure, as the report prints it
SCALES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 24.0)  # largest |q·k| of an approximation
IF_MEMORY_RUNS_OUT = "a smaller -max_memory or shorter -seq_lens"
METHODS = ("linear", "softmax, fused", "softmax, plain")  # whose time and memory are measured
MANY_HEADS, MANY_HEADS_UNTIL = 8, 8192  # heads, and up to which length they are measured


# ------------------------------------------------------------- how good is the approximation? Q1.3
def approximation(n_terms: int, Q: Tensor, K: Tensor, V: Tensor) -> dict:
    """The error of linear attention as scores grow; those of the given Q and K are at most 1.

    For each of SCALES: the largest error against exact attention (None where linear attention
    refuses), its bound, and the share of negative weights.
    """
    errors, bounds, negative_shares = [], [], []
    for scale in SCALES:
        scores = scale * Q @ K.T  # (L, L)
        is_negative = q1.taylor_exp(scores, n_terms) < 0
        errors.append(approximation_error(scale * Q, K, V, n_terms))
        bounds.append(error_bound(scores, V, n_terms))
        negative_shares.append(is_negative.double().mean().item())
    return {
        "n_terms": n_terms,
        "score_scale": list(SCALES),
        "error": errors,
        "bound": bounds,
        "negative_weights": negative_shares,
    }


def approximation_error(Q: Tensor, K: Tensor, V: Tensor, n_terms: int) -> float | None:
    """Largest difference between linear and exact attention, or None where linear refuses."""
    try:
        approximate = q1.linear_attention(Q, K, V, n_terms)
    except ValueError:  # the weights of some row do not sum to a positive number
        return None
    return q1.largest(approximate - q1.softmax_attention(Q, K, V))


def error_bound(scores: Tensor, V: Tensor, n_terms: int) -> float:
    """A bound on `approximation_error`: max |V| R_i/S_i (1 + Σ_j |w_ij| / |W_i|), largest over i.

    For scores t (L, L): the exact weights are A = e^t, the approximate ones w, and S_i and W_i
    their sums over row i; R_i is the sum of Lagrange's remainders of row i, each at most
    max(1, e^t) |t|^K / K!.
    """
    A = scores.exp()
    w = q1.taylor_exp(scores, n_terms)
    remainder = A.clamp(min=1) * scores.abs() ** n_terms / math.factorial(n_terms)
    relative = remainder.sum(dim=1) / A.sum(dim=1)  # (L,): R_i/S_i
    cancellation = w.abs().sum(dim=1) / w.sum(dim=1).abs()  # (L,): 1 for positive weights
    bound = V.abs().max() * (relative * (1 + cancellation)).max()
    return bound.item()


# ------------------------------------------------------------------------- is the time linear? Q1.4
def compare_methods(
    D: int,
    args: Namespace,
    methods: Sequence[str] = METHODS,
    n_heads: int = 1,
    longest: float = math.inf,
) -> list[dict]:
    """Seconds and extra memory against the length: a curve, which is a dict, for each method."""
    device = runs.pick_device(args.device)
    curves = {method: empty_curve(method, D, n_heads) for method in methods}
    lengths = [L for L in args.seq_lens if L <= longest]
    title = f"time and memory, D = {D}, heads: {n_heads}"
    for L in tqdm(lengths, title, leave=False, disable=runs.QUIET):
        functions = {}
        for method, curve in curves.items():
            gigabytes = gigabytes_needed(method, L, D, args.n_terms, device, n_heads)
            if gigabytes <= args.max_memory:
                functions[method] = attention_of(method, args.n_terms)
            else:
                reason = f"needs about {gigabytes:.2g} GB, over -max_memory {args.max_memory:g}"
                curve["skipped"].append({"seq_len": L, "reason": reason})
        if functions:
            inputs = torch.randn(3, 1, n_heads, L, D, device=device)
            Q, K, V = inputs * D**-0.25  # scores of variance 1
            add_point(curves, functions, Q, K, V)
    for curve in curves.values():
        lengths = curve["seq_lens"]
        curve["slope_lengths"] = [L for L in lengths if L >= lengths[-1] / 8]  # three octaves
        n = len(curve["slope_lengths"])
        curve["slope"] = log_slope(lengths[-n:], curve["seconds"][-n:])
    return list(curves.values())


def empty_curve(method: str, D: int, n_heads: int) -> dict:
    lists = ("seq_lens", "seconds", "fastest", "slowest", "peak_bytes", "skipped")
    return {"method": method, "D": D, "heads": n_heads, **{name: [] for name in lists}}


def add_point(
    curves: dict[str, dict], functions: dict[str, Callable], Q: Tensor, K: Tensor, V: Tensor
) -> None:
    """Measure every function on these inputs and add the numbers to its curve."""
    n_bytes = {method: peak_memory(f, Q, K, V) for method, f in functions.items()}  # also warms up
    calls = {method: functools.partial(f, Q, K, V) for method, f in functions.items()}
    seconds = time_in_turn(calls, ROUNDS)
    for method in functions:
        curve = curves[method]
        curve["seq_lens"].append(Q.shape[-2])
        curve["seconds"].append(statistics.median(seconds[method]))
        curve["fastest"].append(min(seconds[method]))
        curve["slowest"].append(max(seconds[method]))
        curve["peak_bytes"].append(n_bytes[method])


def time_in_turn(calls: Mapping[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Call each function once per round, one after the other: {name: its seconds in each round}."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            # item() waits for a GPU
            took = timeit.timeit(lambda call=call: call().flatten()[0].item(), number=1)
            seconds[name].append(took)
    return seconds


def peak_memory(function: Callable, *inputs: Tensor) -> int:
    """The peak of torch's allocator, in bytes, beyond the inputs and the output."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports a missing GPU as an error
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


def attention_of(method: str, n_terms: int) -> Callable:
    """The function of (Q, K, V) that a name in METHODS stands for."""
    if method == "linear":
        return functools.partial(q1.linear_attention, n_terms=n_terms)
    if method == "softmax, fused":
        return functools.partial(F.scaled_dot_product_attention, scale=1.0)
    return q1.softmax_attention


def gigabytes_needed(
    method: str, L: int, D: int, n_terms: int, device: torch.device, n_heads: int = 1
) -> float:
    """About how much memory a measurement takes, to skip those that would not fit."""
    numbers = 4 * L * D  # Q, K, V and the output
    if method == "linear":  # blocks of features, the sums over keys, what is added to them
        M = q1.reduced_feature_dim(D, n_terms)
        block, n_blocks = (q1.BLOCK * D, 2) if n_terms == 3 else (M, 4)
        features = max(q1.FEATURES_AT_ONCE[device.type] // n_heads, 64 * block)
        numbers += n_blocks * min(features, L * block) + 2 * M * D
    if method == "softmax, plain":  # the scores and the weights
        numbers += 2 * L**2
    return 4e-9 * numbers * n_heads


def log_slope(lengths: list[int], seconds: list[float]) -> float | None:
    """p in time ~ length^p, by least squares; None for a single length."""
    if len(lengths) < 2:
        return None
    slope, _ = np.polyfit(np.log(lengths), np.log(seconds), 1)
    return float(slope)


def crossovers(curves: list[dict], n_terms: int) -> list[dict]:
    """From which length on linear attention beats each exact method, measured and predicted.

    The prediction counts products: 2 L² D against 2 L M D, equal at L = M. `gain`: how many times
    as fast linear attention is at `seq_len`, the longest length at which both were measured.
    """
    linear = {curve["D"]: curve for curve in curves if curve["method"] == "linear"}
    rows = []
    for exact in curves:
        D = exact["D"]
        if exact["method"] == "linear":
            continue
        gains = gains_by_length(exact, linear[D])
        longest, gain = max(gains.items(), default=(None, None))
        row = {"D": D, "heads": exact["heads"], "against": exact["method"]}
        row["predicted"] = q1.reduced_feature_dim(D, n_terms)
        row["measured"] = crossover_length(gains)
        row["seq_len"] = longest
        row["gain"] = gain
        rows.append(row)
    return rows


def gains_by_length(exact: dict, linear: dict) -> dict[int, float]:
    """{length: how many times as fast linear attention is}, for rising lengths."""
    seconds = dict(zip(exact["seq_lens"], exact["seconds"], strict=True))
    pairs = zip(linear["seq_lens"], linear["seconds"], strict=True)
    return {L: seconds[L] / fast for L, fast in pairs if L in seconds}


def crossover_length(gains: dict[int, float]) -> int | None:
    """The length at which the gain passes 1, interpolated; None if it does not."""
    if not gains or not min(gains.values()) < 1 < max(gains.values()):
        return None
    if next(iter(gains.values())) >= 1:  # faster from the first length on
        return None
    log_gains = np.log(list(gains.values()))
    rising = np.maximum.accumulate(log_gains)  # np.interp needs this; only noise lets a gain fall
    log_length = np.interp(0, rising, np.log(list(gains)))
    return round(math.exp(log_length))


# ----------------------------------------------------------------------------------------- figures
def draw(result: dict, out: str) -> None:
    """All figures of a result, as `out`/figures/q1-*.{pdf,png}."""
    draw_series(out)
    draw_approximation(result, out)
    draw_seconds(result, out)
    draw_memory(result, out)


def draw_series(out: str) -> None:
    """exp and the first K terms of its series; a dot where these begin to be 10 % off."""
    figure, axes = utils.pyplot().subplots(figsize=HALF_PAGE, layout="constrained")
    t = torch.linspace(-4, 4, 2001, dtype=torch.float64)
    exact = t.exp()
    axes.plot(t, exact, color="black", linewidth=2, label="exp(t)")
    for n_terms in range(2, 7):
        found = q1.taylor_exp(t, n_terms)
        is_off = (found - exact).abs() > 0.1 * exact
        ends = (is_off[1:] != is_off[:-1]).nonzero()[:, 0]
        positive = found.where(found > 0, math.nan)  # a logarithmic axis has no others
        (line,) = axes.plot(t, positive, linewidth=1, label=f"K = {n_terms}")
        axes.plot(t[ends], found[ends], "o", markersize=3, color=line.get_color())
    axes.set_yscale("log")
    axes.set(xlabel="Score t = q·k", xlim=(-4, 4), ylim=(5e-3, 100))
    axes.set(ylabel="Similarity", title="K terms; a dot where they are off by 10 %")
    axes.grid(alpha=0.3)
    write_ticks_out(axes.yaxis)
    axes.legend(loc="lower right", ncols=2, frameon=False, fontsize=7)
    utils.save_figure(figure, out, "q1-series", "exp and the first terms of its series")


def draw_approximation(result: dict, out: str) -> None:
    """The error of linear attention against the size of the scores, and its bound, for odd K."""
    figure, axes = utils.pyplot().subplots(figsize=HALF_PAGE, layout="constrained")
    for row in result["approximation"]:
        K = row["n_terms"]
        if K % 2 == 1:  # even K refuse some inputs
            scales, colour = row["score_scale"], f"C{K - 2}"  # as in `draw_series`
            axes.plot(scales, row["error"], "o-", markersize=3, color=colour, label=f"K = {K}")
            axes.plot(scales, row["bound"], ":", color=colour, label=f"K = {K}, bound")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="Largest score |q·k|", ylabel="Largest difference")
    axes.set(xlim=(0.08, 30), ylim=(1e-4, 1e2), yticks=[10.0**n for n in range(-4, 3)])
    axes.set_title("Error and bound")
    axes.grid(alpha=0.3)
    write_ticks_out(axes.xaxis, axes.yaxis)
    axes.legend(frameon=False, fontsize=7)
    utils.save_figure(figure, out, "q1-approximation", result["data"]["source"])


def write_ticks_out(*axes) -> None:
    """4,096 and 0.01 on logarithmic axes instead of powers, whose exponents are small in print."""
    for axis in axes:
        axis.set_major_formatter("{x:,g}")
        axis.set_minor_formatter("")


LINES = {"linear": "-", "softmax, fused": "--", "softmax, plain": ":"}


def draw_seconds(result: dict, out: str) -> None:
    """The time of every method against the length: medians, and bands from fastest to slowest."""
    figure, axes = draw_scaling(result, "seconds")
    for row, line in zip(result["scaling"], list(axes.lines), strict=True):
        band = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
        axes.fill_between(row["seq_lens"], row["fastest"], row["slowest"], **band)
    axes.set(xlabel="Sequence length L", ylabel="Seconds", title="Time of a call")
    utils.save_figure(figure, out, "q1-seconds", result["data"]["source"])


def draw_memory(result: dict, out: str) -> None:
    """The extra memory of every method against the length."""
    figure, axes = draw_scaling(result, "peak_bytes", unit=1e-6)
    axes.set(xlabel="Sequence length L", ylabel="Megabytes")
    axes.set_title("Peak memory beyond inputs and output")
    utils.save_figure(figure, out, "q1-memory", result["data"]["source"])


def draw_scaling(result: dict, key: str, unit: float = 1) -> tuple:
    """Every curve on logarithmic axes: a colour for each D, a line style for each method."""
    plt = utils.pyplot()
    width, height = HALF_PAGE
    figure, axes = plt.subplots(figsize=(width, height + 0.1), layout="constrained")
    colours: dict[str, str] = {}
    for row in result["scaling"]:
        colour = colours.setdefault(f"D = {row['D']}", f"C{len(colours)}")
        line = LINES[row["method"]]
        style = {"color": colour, "linewidth": 1.2, "marker": "o", "markersize": 2.5}
        axes.plot(row["seq_lens"], [unit * x for x in row[key]], line, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    write_ticks_out(axes.xaxis, axes.yaxis)
    handles = [plt.Line2D([], [], color=c, label=name) for name, c in colours.items()]
    for name, line in LINES.items():
        handles.append(plt.Line2D([], [], color="gray", linestyle=line, label=name))
    close = {"handlelength": 1.8, "handletextpad": 0.5, "columnspacing": 1, "fontsize": 7}
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, **close)
    return figure, axes


# ----------------------------------------------------------------------------------------- summary
def print_summary(result: dict) -> None:
    """Print what was found, a line for each row of an experiment."""
    worst = max(max(row["full"], row["reduced"]) for row in result["identities"])
    print(f"largest error of phi(q).phi(k) = series: {worst:.1e}, float64")
    for dtype, error in result["linear_vs_quadratic"].items():
        print(f"largest difference between linear and quadratic order: {error:.1e}, {dtype}")
    for row in result["approximation"]:
        texts = ["refused" if error is None else f"{error:7.1e}" for error in row["error"]]
        scales = f"{row['score_scale'][0]} ... {row['score_scale'][-1]:g}"
        print(f"K = {row['n_terms']}: error for scores up to {scales}: {'  '.join(texts)}")
    print_scaling(result["scaling"], result["crossover"])
    print_scaling(result["many_heads"], result["many_heads_crossover"])


def print_scaling(scaling: list[dict], crossover: list[dict]) -> None:
    """Print the time of every method, what was skipped, and where linear attention wins."""
    for row in scaling:
        print(f"{text_of_head(row)}  {row['method']:14}  {text_of_curve(row)}")
        for skipped in row["skipped"]:
            print(f"    skipped: L = {skipped['seq_len']:,} {skipped['reason']}")
    for row in crossover:
        print(f"{text_of_head(row)}  linear against {row['against']}: {text_of_crossover(row)}")


def text_of_head(row: dict) -> str:
    """The number and size of the heads that a curve was measured with."""
    return f"{row['heads']} x D = {row['D']:3}"


def text_of_curve(row: dict) -> str:
    """A curve in a line: its slope, and the time at its longest length."""
    if not row["seconds"]:
        return "not measured at any length"
    longest, fitted = row["seq_lens"][-1], row["slope_lengths"]
    times = [row[key][-1] * 1e3 for key in ("seconds", "fastest", "slowest")]
    text = "{:.4g} ms ({:.4g} to {:.4g})".format(*times) + f" at L = {longest:,}"
    if row["slope"] is not None:
        text += f"; slope {row['slope']:.2f} over L = {fitted[0]:,} to {longest:,}"
    return text


def text_of_crossover(row: dict) -> str:
    """Where linear attention wins, or that it does not."""
    if row["gain"] is None:
        return "never both measured"
    if row["measured"]:
        found = f"faster from L = {row['measured']:,}"
    elif row["gain"] > 1:
        found = "faster at the shortest length already"
    else:
        found = "not faster at the longest length"
    counted = f"{row['predicted']:,} by the count"
    return f"{found} ({counted}), {row['gain']:.2g} times as fast at L = {row['seq_len']:,}"


# ------------------------------------------------------------------------------------ command line
def make_parser() -> runs.ArgumentParser:
    positive = runs.number(int, 1)
    gigabytes = runs.number(float, 0)
    parser = runs.ArgumentParser(__doc__)
    parser.flag("seq_lens", type=positive, nargs="+", default=LENGTHS, help="lengths L")
    parser.flag("dims", type=positive, nargs="+", default=[16, 32, 64], help="head sizes D")
    parser.flag("n_terms", type=int, choices=(1, 3, 5, 7), default=3, help="terms that are timed")
    parser.flag("max_memory", type=gigabytes, default=6.0, help="GB; what needs more is skipped")
    parser.flag("out", default="build/data", help="folder for results/ and figures/")
    parser.flag("seed", type=runs.SEED, default=42, help="of the random Q, K and V")
    parser.flag("device", default="auto", help="auto, cpu, cuda, cuda:1 or mps")
    parser.flag("plot_only", action="store_true", help="draw the results in OUT, measure nothing")
    return parser


def start_result(args: Namespace) -> dict:
    """The result before anything was measured."""
    config = {name: value for name, value in vars(args).items() if name not in ("out", "plot_only")}
    config["rounds"] = ROUNDS
    data = {"source": "random normal Q, K, V (synthetic)"}
    device = runs.pick_device(args.device)
    return runs.new_result("q1", "q1", runs.command_line(), config, data, device)


def measure_all(args: Namespace) -> dict:
    """Run every experiment; returns the result that is saved."""
    started = timeit.default_timer()
    args.seq_lens = sorted(set(args.seq_lens))
    result = start_result(args)
    runs.configure_seed(args.seed)

    result["identities"] = [q1.identity_errors(D, K) for D in (1, 2, 3, 7) for K in range(1, 7)]

    Q, K, V = torch.randn(3, 111, 16, dtype=torch.float64)
    Q = Q / (Q @ K.T).abs().max()  # the largest score is 1
    result["linear_vs_quadratic"] = q1.linear_vs_quadratic(Q, K, V)
    result["approximation"] = [approximation(n_terms, Q, K, V) for n_terms in range(2, 7)]

    result["scaling"] = []
    for D in args.dims:
        result["scaling"] += compare_methods(D, args)
    result["crossover"] = crossovers(result["scaling"], args.n_terms)
    D = max(args.dims)
    curves = compare_methods(D, args, METHODS[:2], MANY_HEADS, MANY_HEADS_UNTIL)
    result["many_heads"] = curves
    result["many_heads_crossover"] = crossovers(curves, args.n_terms)

    result["status"] = "finished"
    result["seconds"] = timeit.default_timer() - started
    return result


@torch.inference_mode()
def main(args: Namespace) -> None:
    """Measure (or read what was measured), save, draw and summarise."""
    runs.check_writable(args.out)
    if not args.plot_only:
        runs.save_result(args.out, measure_all(args))
    command = f"`python q1_measure.py -out {args.out}`"
    result = runs.load_result(args.out, "q1", command)
    draw(result, args.out)
    print_summary(result)
    print(f"data: {result['data']['source']}; results and figures are in {args.out}/")


if __name__ == "__main__":
    runs.run_script(main, make_parser(), IF_MEMORY_RUNS_OUT)
