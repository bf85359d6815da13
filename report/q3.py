"""Question 3: the numbers that q3.typ and its tables show, from results/q3-*.json."""

import json
import math
from collections import Counter
from statistics import mean

import utils
from plots import NAMES, SCORES
from report.lib import (
    ROOT,
    average,
    difference,
    extent,
    last,
    matching,
    percent,
    signed,
    spread,
    test,
    welch,
    whole,
)
from runs import load_definitions

import numpy as np
from rapidfuzz.distance import Levenshtein

score = load_definitions(ROOT / "hw2-q3.ipynb", device="cpu").score

SEEDS = (42, 43, 44)
SIMILARITY = "damerau_levenshtein"  # which one "similarity" alone means
HIGHER = 0.85  # a second such limit, to see what depends on it
LOST = 0.7  # a text is lost, it has stopped following the sound, below this similarity


def numbers(results):
    lstm, transformer = (full_runs(results, decoder) for decoder in NAMES)
    config = lstm[0]["config"]
    fine_tuned = real_runs(results, "lstm", "finetuned")[0]
    n_real = fine_tuned["data"]["counts"]
    greedy, beam = (results["q3-model-transformer"]["test"][how] for how in ("greedy", "beam"))
    return {
        **{f"n_{split}": whole(n) for split, n in lstm[0]["data"]["counts"].items()},
        "n_seeds": len(SEEDS),
        "lost": LOST,
        "nearly": NEARLY,
        "higher": HIGHER,
        "config": config,
        "vectors_per_token": f"{vectors_per_token(lstm[0]):.1f}",
        "warmup": percent(config["warmup"]),
        "lstm": decoder_numbers(results, "lstm"),
        "transformer": decoder_numbers(results, "transformer"),
        "more_parameters": whole(lstm[0]["parameters"] - transformer[0]["parameters"]),
        "longest_clip": f"{max(lstm[0]['clips']['seconds']):.1f}",
        "aid_rows": aid_rows(results),
        "gap_rows": gap_rows(results),
        "early_lead": signed(early_lead(lstm, transformer), 2),
        "smallest_gap": f"{welch(*(test(g, SIMILARITY) for g in (transformer, lstm)))[1]:.4f}",
        "device": lstm[0]["environment"]["device"],
        "smoothed_p": f"{math.exp(-smoothed_loss(config['label_smoothing'])):.3f}",
        "smoothed_loss": f"{smoothed_loss(config['label_smoothing']):.3f}",
        "noclock": noclock_numbers(results),
        "clock_only": f"{similarity(results['q3-transformer-full-noctc']):.3f}",
        "noctc_lost": cells_of_counts([results["q3-transformer-full-noctc"]])[1],
        "neither_lost": cells_of_counts([results["q3-transformer-full-handed-out"]])[1],
        "unrelated": {key: f"{value:.3f}" for key, value in lstm[0]["unrelated"].items()},
        "example_rows": example_rows(),
        "text_rows": text_rows(results),
        "n_real": whole(sum(n_real.values())),
        **{f"n_real_{split}": n for split, n in n_real.items()},
        "unrelated_real": f"{fine_tuned['unrelated'][SIMILARITY]:.3f}",
        "real_rows": real_rows(results),
        "greedy": f"{greedy[SIMILARITY]:.3f}",
        "greedy_wer": f"{greedy['wer']:.3f}",
        "beam": f"{beam[SIMILARITY]:.3f}",
        "beam_wer": f"{beam['wer']:.3f}",
    }


def decoder_numbers(results, decoder):
    """What the text says of one decoder."""
    runs = full_runs(results, decoder)
    handed_out = results[f"q3-{decoder}-full-handed-out"]
    exact, lost = cells_of_counts(runs)
    kinds = kinds_of_failure(results, decoder)
    eighths = np.mean([by_length(run, 8) for run in runs], axis=0)
    return {
        **{key: spread(test(runs, key)) for key in ("loss", *SCORES)},
        **{f"val_{key}": spread(last(runs, key)) for key in SCORES},
        "parameters": whole(runs[0]["parameters"]),
        "first_val_loss": spread([run["epochs"][0]["val_loss"] for run in runs]),
        "val_loss": spread(last(runs, "val_loss")),
        "train_loss": spread(last(runs, "train_loss")),
        "first_similarity": spread([run["epochs"][0][SIMILARITY] for run in runs]),
        "above": extent((mean_above(run, 0.8) for run in runs), ".3f"),
        "median": extent((np.median(run["clips"][SIMILARITY]) for run in runs), ".3f"),
        "exact": exact,
        "lost": lost,
        "kinds": {**kinds, "all": kinds.total()},
        "edits_per_letter": extent((edits_per_letter(run) for run in runs), ".3f"),
        "best_eighth": f"{max(eighths):.3f}",
        "longest_eighth": f"{eighths[-1]:.3f}",
        "words_to_letters": f"{mean(test(runs, 'wer')) / mean(test(runs, 'cer')):.1f}",
        "handed_out": f"{similarity(handed_out):.3f}",
        "score_rows": score_rows(results, decoder),
    }


def noclock_numbers(results):
    """What the text says of the transformer with CTC and without the clock, one run."""
    run = results["q3-transformer-full-noclock"]
    exact, lost = cells_of_counts([run])
    shares = [percent(share_of_architecture(results, limit)) for limit in (LOST, HIGHER)]
    nearly, single = count_kinds(run)
    return {
        "exact": exact,
        "lost": lost,
        "similarity": f"{similarity(run):.3f}",
        "edits_per_letter": f"{edits_per_letter(run):.3f}",
        "shares": shares,
        "commit": run["environment"]["commit"][:7],
        "processor": run["environment"]["processor"],
        "n_places": whole(nearly.total()),
        "n_single": whole(single.total()),
        "marks_single": percent(single["mark"] / single.total()),
        "kind_rows": kind_rows(nearly, single),
    }


# ------------------------------------------------------------------------------------ runs, by name
def full_runs(results, decoder):
    """The trainings on all of the corpus, one for each seed."""
    return [results[f"q3-{decoder}-full-seed{seed}"] for seed in SEEDS]


def real_runs(results, decoder, kind):
    """The runs that are scored on real clips; `kind`: a key of REAL."""
    return matching(results, rf"q3-{decoder}-{kind}(-seed\d+)?")


def similarity(run):
    return run["test"][SIMILARITY]


def early_lead(lstm, transformer, epochs=(2, 5)):
    """The transformer's mean lead in similarity on validation, from one epoch to another."""
    means = []
    for runs in (transformer, lstm):
        rows = [row for run in runs for row in run["epochs"]]
        means.append(mean(r[SIMILARITY] for r in rows if epochs[0] <= r["epoch"] <= epochs[1]))
    return means[0] - means[1]


# ------------------------------------------------------------------------------- clip by clip, Q3.3
def is_exact(similarities):
    return similarities == 1


def is_lost(similarities):
    return similarities < LOST


def by_length(run, n_parts):
    """Mean similarity in `n_parts` equally many clips each, from the shortest to the longest."""
    order = np.argsort(run["clips"]["seconds"], kind="stable")
    values = np.array(run["clips"][SIMILARITY])[order]
    return [part.mean() for part in np.array_split(values, n_parts)]


# ------------------------------------------------------------------------------ texts that go wrong
def edits_of(run):
    """For each clip (n,), how many edits its text is away from the true one."""
    clips = {key: np.array(run["clips"][key]) for key in ("letters", "written", SIMILARITY)}
    longer = np.maximum(clips["letters"], clips["written"])
    return np.rint((1 - clips[SIMILARITY]) * longer).astype(int)


def edits_per_letter(run):
    """Edits per letter of the true texts, lost texts left out."""
    followed = ~is_lost(np.array(run["clips"][SIMILARITY]))
    return edits_of(run)[followed].sum() / np.array(run["clips"]["letters"])[followed].sum()


EDITS = {"0": 0, "1": 1, "2": 2, "3–5": 5, "6–10": 10, "11–20": 20, ">20": math.inf}  # up to


def counts_of_edits(run):
    """{how many edits: in how many texts there are so many; "lost": how many texts are lost}."""
    followed = ~is_lost(np.array(run["clips"][SIMILARITY]))
    counts, _ = np.histogram(edits_of(run)[followed], [0, *(most + 0.5 for most in EDITS.values())])
    return {**dict(zip(EDITS, counts, strict=True)), "lost": (~followed).sum()}


def smoothed_loss(smoothing):
    """The loss of a decoder that knows every letter and is as unsure as label smoothing asks."""
    return -math.log(1 - smoothing + smoothing / len(utils.VOCABULARY))


def ends_in_a_loop(text, n=36):
    """Whether the last `n` letters repeat something of a third of that length or less."""
    tail = text[-n:]
    periods = range(1, n // 3 + 1)
    return len(tail) == n and any(tail[period:] == tail[:-period] for period in periods)


def kinds_of_failure(results, decoder):
    """How the lost texts go wrong: in a loop, too long otherwise, too short, or else."""
    texts = results["q3-lost"]["texts"]
    kinds = Counter()
    for seed in SEEDS:
        for row in texts[f"q3-{decoder}-full-seed{seed}"]:
            written, n = row["hypothesis"], len(row["reference"])
            if ends_in_a_loop(written):
                kinds["loop"] += 1
            elif len(written) > 1.25 * n:
                kinds["long"] += 1
            elif len(written) < 0.75 * n:
                kinds["short"] += 1
            else:
                kinds["other"] += 1
    return kinds


NEARLY = 0.9  # a text is nearly right from this similarity on
KINDS = {  # of errors in nearly right texts
    "replaced": "one letter for another",
    "several": "several letters for others",
    "missing": "a letter missing",
    "added": "a letter too many",
    "doubled": "one for a double letter, or the other way round",
    "boundary": "a space missing or too many",
    "mark": "a punctuation mark",
}


def kind_of_error(old, new, before, after):
    """Which of KINDS it is that `old` became `new` between the letters `before` and `after`."""
    changed = old + new
    if changed.strip(" ,.?-") == "":
        return "boundary" if changed == " " else "mark"
    if len(old) > 1 or len(new) > 1:
        return "several"
    if old and new:
        return "replaced"
    if changed in (before, after):
        return "doubled"
    return "added" if new else "missing"


def kinds_of_error(true, written):
    """How many of the places in which the written text differs from the true one are of each kind.

    Between two places the texts are the same, in the alignment with the fewest edits.
    """
    kinds = Counter()
    i, j = 0, 0  # how far both texts have been compared
    for same in Levenshtein.opcodes(true, written).as_matching_blocks():
        old, new = true[i : same.a], written[j : same.b]
        if old or new:
            kinds[kind_of_error(old, new, true[i - 1 : i], true[same.a : same.a + 1])] += 1
        i, j = same.a + same.size, same.b + same.size
    return kinds


def n_below(runs, limit):
    """How many test texts are below a similarity, mean over the runs."""
    return mean((np.array(run["clips"][SIMILARITY]) < limit).sum() for run in runs)


def share_of_architecture(results, limit):
    """Of the LSTM's texts below a similarity that are more than the transformer's, the share that
    are also more than the transformer's without the clock.
    """
    lstm, transformer = (n_below(full_runs(results, decoder), limit) for decoder in NAMES)
    noclock = n_below([results["q3-transformer-full-noclock"]], limit)
    return (lstm - noclock) / (lstm - transformer)


def mean_above(run, limit):
    """The mean similarity of the texts that reach `limit`."""
    values = np.array(run["clips"][SIMILARITY])
    return values[values >= limit].mean()


def count_kinds(run):
    """The kinds of errors in a run's nearly right texts, and in those with one wrong place."""
    nearly, single = Counter(), Counter()
    clips = run["clips"]
    texts = zip(clips["reference"], clips["hypothesis"], clips[SIMILARITY], strict=True)
    for true, written, value in texts:
        kinds = kinds_of_error(true, written)
        if value >= NEARLY:
            nearly += kinds
        if kinds.total() == 1:
            single += kinds
    return nearly, single


def kind_rows(nearly, single):
    """The share of each kind of error, the most frequent ones first."""
    shares = [(title, nearly[kind], single[kind]) for kind, title in KINDS.items()]
    shares.sort(key=lambda row: row[1], reverse=True)
    totals = nearly.total(), single.total()
    return [[title, percent(a / totals[0]), percent(b / totals[1])] for title, a, b in shares]


# ----------------------------------------------------------------------------------- tables of Q3.3
def vectors_per_token(run):
    """How many vectors of z (one for two frames) a token takes, on average over the test clips."""
    clips = run["clips"]
    n_vectors = sum(clips["seconds"]) * utils.SAMPLE_RATE / utils.HOP / 2
    return n_vectors / sum(letters + 1 for letters in clips["letters"])


ONE_SEED = {  # single runs, for the tables of Q3.1 and Q3.2: the split, what was left out
    "lstm": {"full-handed-out": "no CTC"},
    "transformer": {
        "full-noclock": "no clock",
        "full-noctc": "no CTC",
        "full-handed-out": "neither aid",
    },
}


def cells_of_counts(runs):
    """How many test texts are without an error and how many are lost, over the runs."""
    similarities = [np.array(run["clips"][SIMILARITY]) for run in runs]
    return [extent(what(values).sum() for values in similarities) for what in (is_exact, is_lost)]


def score_rows(results, decoder):
    """Loss and every score of one decoder: after the last epoch on validation, and on test."""
    runs = full_runs(results, decoder)
    rows = [
        ["validation", *(spread(last(runs, key)) for key in ("val_loss", *SCORES))],
        ["*test*", *(f"*{spread(test(runs, key))}*" for key in ("loss", *SCORES))],
    ]
    for name, title in ONE_SEED[decoder].items():
        run = results[f"q3-{decoder}-{name}"]
        rows.append([f"test, {title}", *(f"{run['test'][key]:.3f}" for key in ("loss", *SCORES))])
    return rows


def aid_rows(results):
    """Similarity, and how many test texts are exact and lost, with the aids and without some."""
    rows = []
    for decoder, title in NAMES.items():
        runs = full_runs(results, decoder)
        rows.append([title, spread(test(runs, SIMILARITY)), *cells_of_counts(runs)])
        for name, what in ONE_SEED[decoder].items():
            run = results[f"q3-{decoder}-{name}"]
            rows.append([f"{title}, {what}", f"{similarity(run):.3f}", *cells_of_counts([run])])
    return rows


def gap_rows(results):
    """Loss and every score of both decoders on test, and transformer less LSTM there and on
    validation.
    """
    lstm, transformer = (full_runs(results, decoder) for decoder in NAMES)
    rows = []
    for key, title in {"loss": "loss", **SCORES}.items():
        pair = test(lstm, key), test(transformer, key)
        val = [last(group, "val_loss" if key == "loss" else key) for group in (lstm, transformer)]
        gaps = [difference(b, a) for a, b in (pair, val)]
        rows.append([title, *map(spread, pair), *gaps])
    return rows


def text_rows(results):
    """What was said and written in some clips, whole; a loop is cut after its first rounds."""
    rows = []
    for example in results["q3-lost"]["examples"]:
        for key, title in {"said": "_said_", **NAMES}.items():
            rows.append([title, f"#{json.dumps(shortened(example[key]), ensure_ascii=False)}"])
    for decoder, seed in (("lstm", 42), ("transformer", 44)):  # nearly right ones
        example = results[f"q3-{decoder}-full-seed{seed}"]["examples"]["median"]
        for key, title in {"reference": "_said_", "hypothesis": NAMES[decoder]}.items():
            rows.append([title, f"#{json.dumps(example[key], ensure_ascii=False)}"])
    return rows


def shortened(text, longest=150):
    """A text that runs on, cut with a mark."""
    return f"{text[:longest]} …" if len(text) > longest else text


# -------------------------------------------------------------------------- tables of Q3.4 and Q3.5
EXAMPLES = {  # ways to write "his visas": what happened
    "his vises": "one letter replaced",
    "his visa s": "one letter more, a space",
    "visas his": "the words exchanged",
    "his": "cut",
    "his visas visas visas": "running on",
}


def example_rows():
    """The scores of some texts."""
    rows = []
    for text, what in EXAMPLES.items():
        values = score(["his visas"], [text])
        rows.append([f"_{text}_", what, *(f"{values[key]:.2f}" for key in SCORES)])
    return rows


REAL = {  # what a decoder was trained on before it met the real clips of the test part
    "asis-plain": "synthetic voice",
    "asis": "synthetic voice, varied",
    "realonly": "real clips only",
    "finetuned": "synthetic voice, varied; then real clips",
}


def real_rows(results):
    """Similarity and WER on real clips, for each of these trainings."""
    rows = []
    for kind, title in REAL.items():
        both = [real_runs(results, decoder, kind) for decoder in NAMES]
        cells = [(spread(test(found, SIMILARITY)), average(test(found, "wer"))) for found in both]
        rows.append([title, *cells[0], *cells[1]])
    return rows
