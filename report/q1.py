"""Question 1: the numbers that q1.typ and its table show, from results/q1.json."""

from itertools import pairwise

from q1_linear_attention import reduced_feature_dim, taylor_exp
from q1_measure import METHODS, crossover_length
from report.lib import bytes_text, extent, listing, percent, signed, whole

import numpy as np
from scipy import stats

SMALL, MIDDLE = 5, 6  # which of the measured sizes of scores the text names, beside the largest


def numbers(results):
    q1 = results["q1"]
    dims = q1["config"]["dims"]
    D, L = dims[-1], common_length(q1)
    linear, fused = curve(q1, "linear", D), curve(q1, "softmax, fused", D)
    three = next(row for row in q1["approximation"] if row["n_terms"] == 3)
    errors = list(zip(three["score_scale"], three["error"], strict=True))
    even = [row for row in q1["approximation"] if row["n_terms"] % 2 == 0]
    crossings = [row for row in q1["crossover"] if row["against"] == "softmax, fused"]
    (many_heads,) = q1["many_heads_crossover"]
    bumps = bumps_of_linear(q1)
    scores = np.linspace(-5, 5, 100_001)
    near = scores[np.abs(taylor_exp(scores, 3) / np.exp(scores) - 1) <= 0.1]

    return {
        "commit": q1["environment"]["commit"][:7],
        "processor": q1["environment"]["processor"],
        "threads": q1["environment"]["threads"],
        "rounds": q1["config"]["rounds"],
        "dims": listing(dims),
        "D": D,
        "L": whole(L),
        "longest": whole(fused["seq_lens"][-1]),
        "near_from": signed(min(near), 1),
        "near_to": signed(max(near), 1),
        "floor_of_five": f"{min(taylor_exp(scores, 5)):.2f}",
        "identity_dims": listing(sorted({row["D"] for row in q1["identities"]})),
        "identity_error": power(max(max(r["full"], r["reduced"]) for r in q1["identities"])),
        "features_reduced": whole(reduced_feature_dim(D)),
        "small_score": f"{errors[SMALL][0]:g}",
        "middle_score": f"{errors[MIDDLE][0]:g}",
        "errors_at": [f"{errors[i][1]:.3f}" for i in (SMALL, MIDDLE)],
        "level_from": whole(level_from(linear)),
        "fair_until": max(scale for scale, error in errors if error < 0.1),
        "largest_score": f"{errors[-1][0]:g}",
        "largest_error": f"{errors[-1][1]:.1f}",
        "bound_over_error": extent(bound_over_error(three, 0.1), ".0f"),
        "two_terms_error": f"{even[0]['error'][-1]:.0f}",
        "most_negative": percent(max(max(row["negative_weights"]) for row in even)),
        "negative_from": [negative_from(row) for row in even[:2]],
        "refused": listing(row["n_terms"] for row in even if None in row["error"]),
        "slope_misfit": f"{slope_misfit(q1):.1f}",
        "bump_dims": listing(D for D, _, _ in bumps),
        "bump_at": extent(L for _, L, _ in bumps),
        "bump_after": extent(L for _, _, L in bumps),
        "step_at": " or ".join(map(whole, sorted({step_of(q1, D) for D in dims}))),
        "bump_calls": calls_text(curve(q1, "linear", bumps[0][0]), bumps[0][1]),
        "slope_lengths": extent(linear["slope_lengths"]),
        "growth_by_D": [extent(factors, ".1f") for factors in growth_by_D(q1)],
        "growth_by_count": [f"{factor:.1f}" for factor in growth_by_count(q1)],
        "features_growth": [f"{factor:.1f}" for factor in features_growth(q1)],
        "fused_bytes": bytes_text(at_length(fused, L, "peak_bytes")),
        "memory_row": bytes_text(4 * D * reduced_feature_dim(D)),
        "faster": f"{at_length(fused, L, 'seconds') / at_length(linear, L, 'seconds'):.1f}",
        "faster_by_count": f"{L / reduced_feature_dim(D):.1f}",
        "fused_longest": time_text(fused["seconds"][-1]),
        "linear_longest": time_text(linear["seconds"][-1]),
        "crossings": listing(two_digits(row["measured"]) for row in crossings),
        "crossings_by_count": listing(whole(row["predicted"]) for row in crossings),
        "crossings_fastest": listing(two_digits(crossing_of_fastest(q1, d)) for d in dims),
        "many_heads_slope": f"{q1['many_heads'][0]['slope']:.2f}",
        "many_heads": many_heads["heads"],
        "many_heads_crossing": two_digits(many_heads["measured"]),
        "many_heads_L": whole(many_heads["seq_len"]),
        "many_heads_faster": f"{many_heads['gain']:.1f}",
        "linear_bytes": bytes_text(linear["peak_bytes"][-1]),
        "state": whole(reduced_feature_dim(D) * (D + 1)),
        "rows": table_rows(q1),
    }


def level_from(curve):
    """The length from which on a curve's memory is within 1 % of its last."""
    last = curve["peak_bytes"][-1]
    pairs = zip(curve["seq_lens"], curve["peak_bytes"], strict=True)
    return next(L for L, n_bytes in pairs if n_bytes > 0.99 * last)


def power(x):
    """4.7e-14 -> "4.7 × 10⁻¹⁴"."""
    digits, exponent = f"{x:.1e}".split("e")
    raised = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
    return f"{digits} × 10{str(int(exponent)).translate(raised)}"


def two_digits(n):
    """2321 -> "2,300": what is interpolated between powers of two has no more."""
    return whole(int(float(f"{n:.1e}"))) if n else whole(n)


def time_text(seconds):
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min"


def curve(q1, method, D):
    """The measurement of one method at one head size."""
    return next(row for row in q1["scaling"] if (row["method"], row["D"]) == (method, D))


def at_length(row, L, key):
    return row[key][row["seq_lens"].index(L)]


def common_length(q1):
    """The longest length that every method was measured at."""
    return min(row["seq_lens"][-1] for row in q1["scaling"] if row["seq_lens"])


def fitted_slope(row):
    """The fit of a line to log time against log length: its slope, its stderr."""
    n = len(row["slope_lengths"])
    return stats.linregress(np.log(row["slope_lengths"]), np.log(row["seconds"][-n:]))


def slope_misfit(q1):
    """How many standard errors the slopes are from those derived, at most: 1 linear, 2 fused."""
    derived = {"linear": 1, "softmax, fused": 2}
    curves = [row for row in q1["scaling"] if row["method"] in derived]
    fits = [(derived[row["method"]], fitted_slope(row)) for row in curves]
    return max(abs(fit.slope - slope) / fit.stderr for slope, fit in fits)


def bumps_of_linear(q1):
    """Where linear attention takes a fifth longer than at the next length: [(D, L, next L)]."""
    found = []
    for D in q1["config"]["dims"]:
        row = curve(q1, "linear", D)
        points = pairwise(zip(row["seq_lens"], row["seconds"], strict=True))
        found += [(D, L, after) for (L, long), (after, short) in points if long > 1.2 * short]
    return found


def step_of(q1, D):
    """The length at which the plain formula's time has grown by the largest factor."""
    row = curve(q1, "softmax, plain", D)
    factors = [b / a for a, b in pairwise(row["seconds"])]
    return row["seq_lens"][1 + int(np.argmax(factors))]


def crossing_of_fastest(q1, D):
    """From which length linear attention is faster than the fused kernel, by the fastest calls."""
    linear, fused = (curve(q1, method, D) for method in ("linear", "softmax, fused"))
    triples = zip(fused["seq_lens"], fused["fastest"], linear["fastest"], strict=True)
    return crossover_length({L: exact / fast for L, exact, fast in triples})


def calls_text(row, L):
    """From the fastest to the slowest call at a length: "1.9 to 5.0 ms"."""
    return extent((1000 * at_length(row, L, key) for key in ("fastest", "slowest")), ".1f") + " ms"


def bound_over_error(row, largest_error):
    """How many times the error its bound is, where the error is below `largest_error`."""
    pairs = zip(row["bound"], row["error"], strict=True)
    return [bound / error for bound, error in pairs if error < largest_error]


def negative_from(row):
    """The smallest of the scores' sizes at which a weight is negative."""
    pairs = zip(row["score_scale"], row["negative_weights"], strict=True)
    return next(f"{scale:g}" for scale, share in pairs if share > 0)


def growth_by_D(q1):
    """By which factors linear attention's time grows from one head size to the next: a row for each
    step, with a factor for each length that the slope is fitted to.
    """
    rows = []
    for small, big in pairwise(curve(q1, "linear", D) for D in q1["config"]["dims"]):
        lengths = small["slope_lengths"]
        times = [[at_length(row, L, "seconds") for L in lengths] for row in (small, big)]
        rows.append([b / a for a, b in zip(*times, strict=True)])
    return rows


def growth_by_count(q1):
    """The same by counting products: a factor for each step."""
    products = [D * reduced_feature_dim(D) for D in q1["config"]["dims"]]
    return [big / small for small, big in pairwise(products)]


def features_growth(q1):
    """By which factors the number of features grows from one head size to the next."""
    features = [reduced_feature_dim(D) for D in q1["config"]["dims"]]
    return [big / small for small, big in pairwise(features)]


def table_rows(q1):
    """The table of measurements: method, D, slope, time, memory, wins from, by count."""
    L = common_length(q1)
    crossings = {(row["against"], row["D"]): row for row in q1["crossover"]}
    rows = []
    for D in q1["config"]["dims"]:
        for method in METHODS:
            row = curve(q1, method, D)
            cells = [method, str(D), "–", "–", "–", "", ""]
            if row["slope"] and method != "softmax, plain":  # its time has a step
                fit = fitted_slope(row)
                cells[2] = f"{fit.slope:.2f}\u00a0±\u00a0{fit.stderr:.2f}"
            if L in row["seq_lens"]:
                cells[3] = time_text(at_length(row, L, "seconds"))
                cells[4] = bytes_text(at_length(row, L, "peak_bytes"))
            if crossing := crossings.get((method, D)):
                cells[5:] = two_digits(crossing["measured"]), whole(crossing["predicted"])
            rows.append(cells)
    return rows
