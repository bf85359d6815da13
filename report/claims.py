"""What the report's sentences claim beyond the numbers that they show: one predicate for each.

The sentences themselves are written by hand. When results change, `make report` lists the claims
that no longer hold, and the sentence has to be written anew.
"""

from statistics import mean

from report import q1, q2, q3
from report.lib import last, paired, test, welch

import numpy as np

CLAIMS = []  # in the order of the report


def claim(predicate):
    CLAIMS.append(predicate)
    return predicate


def no_longer_true(results):
    """What the report claims and these results do not bear out, as text."""
    return [p.__name__.replace("_", " ") for p in CLAIMS if not p(results)]


def is_larger(a, b):
    """Whether the mean of `a` is larger, with a 95 % interval that does not hold zero."""
    return welch(a, b)[1] > 0


def are_not_told_apart(a, b):
    return not is_larger(a, b) and not is_larger(b, a)


# -------------------------------------------------------------------------------------- Question 1
@claim
def q1_2_the_identity_holds_to_rounding(results):
    rows = results["q1"]["identities"]
    return all(max(row["full"], row["reduced"]) < 1e-12 for row in rows)


@claim
def q1_3_three_terms_are_useless_at_the_largest_scores(results):
    (three,) = (row for row in results["q1"]["approximation"] if row["n_terms"] == 3)
    return three["error"][-1] > 1


@claim
def q1_3_weights_are_negative_for_even_K_only(results):
    rows = results["q1"]["approximation"]
    most = {row["n_terms"]: max(row["negative_weights"]) for row in rows}
    return all((share > 0) == (n_terms % 2 == 0) for n_terms, share in most.items())


@claim
def q1_3_an_even_K_is_refused_somewhere(results):
    rows = results["q1"]["approximation"]
    return {row["n_terms"] % 2 for row in rows if None in row["error"]} == {0}


@claim
def q1_4_time_grows_linearly_and_quadratically_at_the_largest_head(results):
    found = results["q1"]
    D = found["config"]["dims"][-1]
    linear, fused = (q1.curve(found, m, D)["slope"] for m in ("linear", "softmax, fused"))
    return abs(linear - 1) < 0.1 and abs(fused - 2) < 0.1


@claim
def q1_4_with_smaller_heads_linear_attention_grows_more_slowly(results):
    found = results["q1"]
    slopes = [q1.curve(found, "linear", D)["slope"] for D in found["config"]["dims"]]
    return slopes == sorted(slopes) and slopes[-2] < 0.95


@claim
def q1_4_with_D_time_grows_less_than_counted(results):
    measured, counted = q1.growth_by_D(results["q1"]), q1.growth_by_count(results["q1"])
    return all(max(row) < n for row, n in zip(measured, counted, strict=True))


@claim
def q1_4_linear_attention_is_faster_at_the_longest_common_length(results):
    found = results["q1"]
    D, L = found["config"]["dims"][-1], q1.common_length(found)
    curves = (q1.curve(found, method, D) for method in ("softmax, fused", "linear"))
    slow, fast = (q1.at_length(row, L, "seconds") for row in curves)
    return slow > fast


@claim
def q1_4_it_overtakes_later_than_the_count_says(results):
    rows = [row for row in results["q1"]["crossover"] if row["against"] == "softmax, fused"]
    return all(row["measured"] and row["measured"] > row["predicted"] for row in rows)


@claim
def q1_4_with_many_heads_it_overtakes_too(results):
    (row,) = results["q1"]["many_heads_crossover"]
    return row["measured"] is not None and row["gain"] > 1


@claim
def q1_4_the_memory_of_linear_attention_stops_growing(results):
    found = results["q1"]
    peaks = [q1.curve(found, "linear", D)["peak_bytes"] for D in found["config"]["dims"]]
    return all(row[-1] < 1.01 * row[-3] for row in peaks)


# -------------------------------------------------------------------------------------- Question 2
NETWORKS = ("pool", "average", "strided")


def rates(results, epochs=""):
    """The runs of the max-pool network at each of the three rates, from the largest."""
    return [q2.network(results, "maxpool", rate, epochs) for rate in q2.RATES]


def accuracy(results, *names):
    """The test accuracies of these networks' runs."""
    runs = q2.networks(results)
    return [test(runs[name], "accuracy") for name in names]


@claim
def q2_1_the_largest_rate_is_best_after_15_epochs(results):
    return q2.search(results)["best"]["learning_rate"] == 0.1


@claim
def q2_1_only_the_largest_rate_learns_much(results):
    floor = q2.loss_of_shares(q2.search(results))
    high, middle, low = (mean(last(runs, "train_loss")) for runs in rates(results))
    return high < 0.8 * floor and min(middle, low) > 0.95 * floor


@claim
def q2_1_the_others_look_like_naming_normal(results):
    naming = max(q2.class_shares(q2.search(results), "val"))
    _, middle, low = (mean(last(runs, "val_accuracy")) for runs in rates(results))
    return max(middle, low) < naming + 0.05


@claim
def q2_1_after_150_epochs_the_middle_rate_is_best(results):
    return q2.search(results, "-epochs150")["best"]["learning_rate"] == 0.01


@claim
def q2_1_more_updates_raise_test_accuracy(results):
    (high, _, _), (_, middle, _) = rates(results), rates(results, "-epochs150")
    return is_larger(test(middle, "accuracy"), test(high, "accuracy"))


@claim
def q2_1_at_150_epochs_two_rates_are_level_and_no_run_breaks_down(results):
    high, middle, _ = rates(results, "-epochs150")
    level = abs(mean(last(high, "val_accuracy")) - mean(last(middle, "val_accuracy"))) < 0.02
    return level and not q2.collapsed(high + middle, q2.search(results, "-epochs150"))


@claim
def q2_1_some_of_the_earlier_runs_broke_down(results):
    return bool(q2.collapsed(q2.earlier_runs(results), q2.search(results, "-epochs150")))


@claim
def q2_1_the_smallest_rate_is_too_slow_for_150_epochs(results):
    floor = q2.loss_of_shares(q2.search(results))
    return mean(last(rates(results, "-epochs150")[2], "train_loss")) > 0.9 * floor


@claim
def q2_1_the_mix_of_classes_explains_validation_against_test(results):
    runs = q2.networks(results)["pool150"]
    expected, error = q2.reweighted(q2.search(results, "-epochs150"), runs)
    return abs(expected - mean(last(runs, "val_accuracy"))) < 2 * error


@claim
def q2_2_max_pooling_leads_on_test(results):
    return is_larger(*accuracy(results, "pool", "strided"))


@claim
def q2_2_validation_does_not_tell_the_networks_apart(results):
    runs = q2.networks(results)
    names = ("pool", "strided")
    return are_not_told_apart(*(last(runs[name], "val_accuracy") for name in names))


@claim
def q2_2_the_strided_network_fits_worse(results):
    runs = q2.networks(results)
    return is_larger(last(runs["strided"], "train_loss"), last(runs["pool"], "train_loss"))


@claim
def q2_2_more_updates_do_not_close_the_distance(results):
    return is_larger(*accuracy(results, "pool150", "strided150"))


@claim
def q2_3_both_networks_have_224892_parameters(results):
    groups = q2.networks(results).values()
    return {run["parameters"] for runs in groups for run in runs} == {224_892}


@claim
def q2_3_the_products_are_those_of_the_table(results):
    products = {"pool": 445_536, "average150": 445_536, "strided": 278_784}
    runs = q2.networks(results)
    return all(runs[name][0]["multiply_accumulates"] == n for name, n in products.items())


@claim
def q2_3_the_average_lies_between(results):
    pool, average, strided = accuracy(results, "pool150", "average150", "strided150")
    return is_larger(pool, average) and is_larger(average, strided)


@claim
def q2_3_after_15_epochs_the_average_is_level_with_strides(results):
    pool, average, strided = accuracy(results, "pool", "average", "strided")
    return is_larger(pool, average) and are_not_told_apart(average, strided)


@claim
def q2_2_at_the_larger_rate_strides_are_no_better_after_150_epochs(results):
    return not is_larger(*accuracy(results, "strided150_fast", "strided150"))


@claim
def q2_3_max_pooling_does_not_lead_by_more_on_moved_images(results):
    runs = q2.networks(results)
    moved = [
        [mean(q2.shifted(runs[name], n)) for n in range(4)] for name in ("pool150", "strided150")
    ]
    at_rest, *leads = (pool - strided for pool, strided in zip(*moved, strict=True))
    return max(leads) < at_rest


@claim
def q2_2_max_pooling_leads_at_the_larger_rate_as_well(results):
    return is_larger(*accuracy(results, "pool150_fast", "strided150_fast"))


@claim
def q2_3_the_lead_comes_from_dme_and_drusen(results):
    runs = q2.networks(results)
    pool, strided = (
        {name: mean(values) for name, values in q2.recalls(runs[network]).items()}
        for network in ("pool150", "strided150")
    )
    lead = {name: pool[name] - strided[name] for name in pool}
    both, total = lead["DME"] + lead["drusen"], sum(lead.values())
    hardest = [set(sorted(found, key=found.get)[:2]) for found in (pool, strided)]
    return 0.6 * total < both < 0.72 * total and hardest == [{"DME", "drusen"}] * 2


@claim
def q2_3_the_most_frequent_error_is_drusen_taken_for_normal(results):
    runs = q2.networks(results)
    for name in ("pool150", "strided150"):
        tables = [run["test"]["confusion"] for run in runs[name]]
        errors = {
            (i, j): mean(table[i][j] for table in tables)
            for i in range(4)
            for j in range(4)
            if i != j
        }
        if max(errors, key=errors.get) != (2, 3):
            return False
    return True


@claim
def q2_3_the_average_fits_worst(results):
    runs = q2.networks(results)
    losses = {name: mean(last(runs[f"{name}150"], "train_loss")) for name in NETWORKS}
    return max(losses, key=losses.get) == "average"


@claim
def q2_3_on_validation_the_average_is_not_ahead_of_strides(results):
    runs = q2.networks(results)
    average, strided = (last(runs[f"{name}150"], "val_accuracy") for name in NETWORKS[1:])
    return not is_larger(average, strided)


# -------------------------------------------------------------------------------------- Question 3
def both(results):
    """The runs of the LSTM, and of the transformer, seed by seed."""
    return [q3.full_runs(results, decoder) for decoder in q3.NAMES]


def in_every_seed(results, predicate):
    return all(
        predicate(lstm, transformer) for lstm, transformer in zip(*both(results), strict=True)
    )


@claim
def q3_1_the_validation_loss_is_lowest_at_the_last_epoch(results):
    for run in [run for runs in both(results) for run in runs]:
        losses = [row["val_loss"] for row in run["epochs"]]
        if min(losses) < losses[-1]:
            return False
    return True


@claim
def q3_1_it_has_nearly_stopped_falling(results):
    for run in [run for runs in both(results) for run in runs]:
        losses = [row["val_loss"] for row in run["epochs"]]
        if losses[-3] - losses[-1] > 0.01:
            return False
    return True


@claim
def q3_2_both_align_in_the_same_epoch(results):
    return len({q3.passes_half(run) for runs in both(results) for run in runs}) == 1


@claim
def q3_2_the_lstm_has_the_lower_loss_after_the_first_epoch(results):
    return in_every_seed(
        results, lambda a, b: a["epochs"][0]["val_loss"] < b["epochs"][0]["val_loss"]
    )


@claim
def q3_3_the_lstm_has_the_lower_loss(results):
    lower = in_every_seed(results, lambda a, b: a["test"]["loss"] < b["test"]["loss"])
    lstm, transformer = both(results)
    return lower and is_larger(test(transformer, "loss"), test(lstm, "loss"))


@claim
def q3_3_the_lstm_is_more_often_exact(results):
    for pairs in q3.clip_pairs(results):
        lstm, transformer, p = q3.discordant(pairs, q3.is_exact)
        if not (lstm > transformer and p < 0.001):
            return False
    return True


@claim
def q3_3_the_transformer_derails_more_seldom(results):
    for pairs in q3.clip_pairs(results):
        lstm, transformer, p = q3.discordant(pairs, q3.is_derailed)
        if not (transformer < lstm and p < 0.001):
            return False
    return True


@claim
def q3_3_the_transformer_has_the_higher_mean_similarity(results):
    return all(q3.mean_lead(pairs)[0] > 0 for pairs in q3.clip_pairs(results))


@claim
def q3_3_over_the_clips_its_lead_is_beyond_chance_in_two_seeds_of_three(results):
    lows = [q3.mean_lead(pairs)[1] for pairs in q3.clip_pairs(results)]
    return sum(low > 0 for low in lows) == 2


@claim
def q3_3_the_lstm_is_better_on_more_clips_beyond_chance_with_one_seed(results):
    pairs = q3.clip_pairs(results)
    leads = [q3.lead_of(p) for p in pairs]
    more = all((lead < 0).sum() > (lead > 0).sum() and np.median(lead) == 0 for lead in leads)
    return more and sum(q3.sign_test(p) < 0.001 for p in pairs) == 1


@claim
def q3_3_lost_texts_carry_more_than_half_of_the_lead(results):
    parts = [q3.parts_of_lead(pairs) for pairs in q3.clip_pairs(results)]
    return all(of_lost > max(0, of_kept) for _, of_lost, of_kept in parts)


@claim
def q3_3_words_do_not_tell_the_decoders_apart_and_letters_and_loss_do(results):
    def gap(key):
        lstm, transformer = (test(runs, key) for runs in both(results))
        return paired(transformer, lstm)[1:]

    (low, high), cer, loss = gap("wer"), gap("cer"), gap("loss")
    return low < 0 < high and cer[1] < 0 < loss[0]


@claim
def q3_3_the_lstm_more_often_runs_on(results):
    runs_on = q3.n_running_on
    return in_every_seed(results, lambda a, b: runs_on(a) > 3 * runs_on(b))


@claim
def q3_3_the_lstm_loses_more_on_long_clips(results):
    def loss(run):
        shortest, _, longest = q3.by_length(run, 3)
        return shortest - longest

    return in_every_seed(results, lambda a, b: loss(a) > loss(b) > 0)


@claim
def q3_3_exact_loops_are_rarer_in_the_transformer_and_a_fifth_of_the_lstms(results):
    kinds = [q3.kinds_of_failure(results, decoder) for decoder in q3.NAMES]
    lstm, transformer = (kind["loop"] / kind.total() for kind in kinds)
    return lstm > 3 * transformer and 0.15 < lstm < 0.25


@claim
def q3_3_the_mean_similarity_is_not_settled_over_the_seeds(results):
    lstm, transformer = both(results)
    scores = [[q3.similarity(run) for run in group] for group in (transformer, lstm)]
    _, low, high = paired(*scores)
    return low < 0 < high


@claim
def q3_3_the_lstm_derails_more_often_by_the_other_count_too(results):
    lstm, transformer = (q3.derailed_counts(results, d) for d in q3.NAMES)
    return all(a["derails"] > 2 * b["derails"] for a, b in zip(lstm, transformer, strict=True))


@claim
def q3_4_dl_is_above_jaccard_on_nearly_right_texts_and_below_on_lost_ones(results):
    rows = [row for d in q3.NAMES for row in q3.derailed_counts(results, d)]
    gaps = [row["dl_less_jaccard"] for row in rows]
    return all(gap["at least 0.9"] > 0 > gap["below 0.7"] for gap in gaps)


@claim
def q3_3_as_handed_out_the_lstm_never_aligns_and_the_transformer_does(results):
    lstm, transformer = (results[f"q3-{d}-full-handed-out"] for d in q3.NAMES)
    floor = lstm["unrelated"]["damerau_levenshtein"]
    is_lost = q3.passes_half(lstm) is None and q3.similarity(lstm) < floor + 0.02
    return is_lost and q3.passes_half(transformer) is not None


@claim
def q3_3_clock_and_ctc_help_the_transformer(results):
    names = ("handed-out", "noctc", "seed42")
    steps = [q3.similarity(results[f"q3-transformer-full-{name}"]) for name in names]
    return steps == sorted(steps)


@claim
def q3_3_on_the_small_grammar_the_lstm_always_aligns_and_the_transformer_in_three_of_five(results):
    def n_aligned(name):
        return sum(q3.passes_half(run) is not None for run in q3.trials(results, name))

    return (n_aligned("lstm-trial-noctc"), n_aligned("transformer-trial-noctc-random")) == (5, 3)


@claim
def q3_4_cosine_is_the_highest_and_wer_the_highest_error_rate(results):
    rows = [run["test"] for runs in both(results) for run in runs]
    return all(
        row["cosine"] > max(row["jaccard"], row["damerau_levenshtein"]) and row["wer"] > row["cer"]
        for row in rows
    )


@claim
def q3_4_jaccard_and_dl_are_nearly_equal(results):
    rows = [run["test"] for runs in both(results) for run in runs]
    return all(abs(row["jaccard"] - row["damerau_levenshtein"]) < 0.01 for row in rows)


def real(results, decoder, kind):
    return mean(q3.similarity(run) for run in q3.real_runs(results, decoder, kind))


@claim
def q3_5_variety_helps_most_and_fine_tuning_adds_to_it(results):
    kinds = ("asis-plain", "asis", "finetuned")
    rows = [[real(results, decoder, kind) for kind in kinds] for decoder in q3.NAMES]
    return all(varied - plain > tuned - varied > 0 for plain, varied, tuned in rows)


@claim
def q3_5_real_clips_alone_teach_hardly_anything(results):
    (run, *_) = q3.real_runs(results, "lstm", "finetuned")
    floor = run["unrelated"]["damerau_levenshtein"]
    return all(real(results, decoder, "realonly") < floor + 0.05 for decoder in q3.NAMES)


@claim
def q3_5_the_search_raises_similarity_and_lowers_wer(results):
    scores = results["q3-model"]["test"]
    gain = scores["beam"]["interval"][0] > scores["greedy"]["interval"][1]
    return gain and scores["beam"]["wer"] < scores["greedy"]["wer"]
