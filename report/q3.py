"""Question 3: the numbers that q3.typ and its tables show, from results/q3-*.json."""

from collections import Counter
from statistics import mean

from plots import NAMES, SCORES
from report.lib import (
    ROOT,
    average,
    extent,
    interval,
    last,
    listing,
    matching,
    paired,
    percent,
    signed,
    spread,
    test,
    whole,
)
from runs import load_definitions

import numpy as np
from scipy import stats

score = load_definitions(ROOT / "hw2-q3.ipynb", device="cpu").score

SEEDS = (42, 43, 44)
SIMILARITY = "damerau_levenshtein"  # which one "similarity" alone means


def numbers(results):
    lstm, transformer = (full_runs(results, decoder) for decoder in NAMES)
    config = lstm[0]["config"]
    fine_tuned = real_runs(results, "lstm", "finetuned")[0]
    n_real = fine_tuned["data"]["counts"]
    trial_clips = trials(results, "lstm-trial-ctc")[0]["data"]["counts"]
    greedy, beam = (results["q3-model"]["test"][how] for how in ("greedy", "beam"))
    return {
        **{f"n_{split}": whole(n) for split, n in lstm[0]["data"]["counts"].items()},
        "n_seeds": len(SEEDS),
        "config": config,
        "warmup": percent(config["warmup"]),
        "lstm": decoder_numbers(results, "lstm"),
        "transformer": decoder_numbers(results, "transformer"),
        "more_parameters": whole(lstm[0]["parameters"] - transformer[0]["parameters"]),
        "longest_clip": f"{max(lstm[0]['clips']['seconds']):.1f}",
        "score_rows": score_rows(results),
        "seed_rows": seed_rows(results),
        "lead_rows": lead_rows(results),
        "clip_rows": clip_rows(results),
        "clock_only": f"{similarity(results['q3-transformer-full-noctc']):.3f}",
        "n_trials": len(trials(results, "lstm-trial-ctc")),
        "n_sentences": whole(sum(trial_clips.values())),
        "trial_rows": trial_rows(results),
        "trial_p": trial_p(results),
        "unrelated": {key: f"{value:.3f}" for key, value in lstm[0]["unrelated"].items()},
        "example_rows": example_rows(),
        "text_rows": text_rows(results),
        "n_real": whole(sum(n_real.values())),
        **{f"n_real_{split}": n for split, n in n_real.items()},
        "unrelated_real": f"{fine_tuned['unrelated'][SIMILARITY]:.3f}",
        "real_rows": real_rows(results),
        "greedy": f"{greedy[SIMILARITY]:.3f}",
        "greedy_wer": f"{greedy['wer']:.3f}",
        "greedy_interval": interval(*greedy["interval"]),
        "beam": f"{beam[SIMILARITY]:.3f}",
        "beam_wer": f"{beam['wer']:.3f}",
        "beam_interval": interval(*beam["interval"]),
    }


def decoder_numbers(results, decoder):
    """What the text says of one decoder."""
    runs = full_runs(results, decoder)
    handed_out = results[f"q3-{decoder}-full-handed-out"]
    column = list(NAMES).index(decoder)
    counts = [counts_of(pairs) for pairs in clip_pairs(results)]
    derailed = derailed_counts(results, decoder)
    kinds = kinds_of_failure(results, decoder)
    eighths = np.mean([by_length(run, 8) for run in runs], axis=0)
    letter_errors = [round(100 * row["share_of_letter_errors"]) for row in derailed]
    return {
        **{key: spread(test(runs, key)) for key in ("loss", *SCORES)},
        **{f"val_{key}": spread(last(runs, key)) for key in SCORES},
        "parameters": whole(runs[0]["parameters"]),
        "first_val_loss": spread([run["epochs"][0]["val_loss"] for run in runs]),
        "val_loss": spread(last(runs, "val_loss")),
        "train_loss": spread(last(runs, "train_loss")),
        "aligned": listing(sorted({passes_half(run) for run in runs})),
        "exact": extent(count["exact"][column] for count in counts),
        "derailed": extent(count["derailed"][column] for count in counts),
        "derails": extent(row["derails"] for row in derailed),
        "kinds": {**kinds, "all": kinds.total()},
        "best_eighth": f"{max(eighths):.3f}",
        "longest_eighth": f"{eighths[-1]:.3f}",
        "share_of_letter_errors": extent(letter_errors),
        "words_to_letters": f"{mean(test(runs, 'wer')) / mean(test(runs, 'cer')):.1f}",
        "dl_less_jaccard": dl_less_jaccard(runs, derailed),
        "handed_out": f"{similarity(handed_out):.3f}",
        "handed_out_loss": f"{handed_out['test']['loss']:.3f}",
        "handed_out_aligned": passes_half(handed_out),
    }


# ------------------------------------------------------------------------------------ runs, by name
def full_runs(results, decoder):
    """The trainings on all of the corpus, one for each seed."""
    return [results[f"q3-{decoder}-full-seed{seed}"] for seed in SEEDS]


def real_runs(results, decoder, kind):
    """The runs that are scored on real clips; `kind`: a key of REAL."""
    return matching(results, rf"q3-{decoder}-{kind}(-seed\d+)?")


def trials(results, name):
    """The short trainings on a small grammar; `name`: a value of TRIALS."""
    return matching(results, rf"q3-{name}-seed\d+")


def similarity(run):
    return run["test"][SIMILARITY]


def passes_half(run):
    """The epoch in which a run first passes one half in similarity on validation, or None."""
    return next((row["epoch"] for row in run["epochs"] if row[SIMILARITY] > 0.5), None)


# ------------------------------------------------------------------------------- clip by clip, Q3.3
def clip_pairs(results):
    """For each seed (n, 2): the similarity of the LSTM and of the transformer on every clip."""
    both = [full_runs(results, decoder) for decoder in NAMES]
    columns = [[run["clips"][SIMILARITY] for run in runs] for runs in both]
    return [np.column_stack(pair) for pair in zip(*columns, strict=True)]


def is_exact(similarities):
    return similarities == 1


def is_derailed(similarities):
    return similarities < 0.7


def lead_of(pairs):
    """Transformer less LSTM on each clip."""
    lstm, transformer = pairs.T
    return transformer - lstm


def counts_of(pairs):
    """{what: on how many clips of a seed it is so, for the LSTM and for the transformer}."""
    lead = lead_of(pairs)
    return {
        "better": ((lead < 0).sum(), (lead > 0).sum()),
        "exact": is_exact(pairs).sum(axis=0),
        "derailed": is_derailed(pairs).sum(axis=0),
    }


def parts_of_lead(pairs):
    """How many clips one decoder or both lose, and what these and the other clips add to the mean
    lead.
    """
    lead, lost = lead_of(pairs), is_derailed(pairs).any(axis=1)
    return int(lost.sum()), lead[lost].sum() / len(lead), lead[~lost].sum() / len(lead)


def sign_test(pairs):
    """The p-value that as many clips are written better by one decoder as by the other."""
    better = counts_of(pairs)["better"]
    return stats.binomtest(better[0], sum(better)).pvalue


def discordant(pairs, is_so):
    """McNemar's test of a yes-or-no question about clips: how many say yes for the LSTM alone, how
    many for the transformer alone, and the p-value that this is chance.
    """
    lstm, transformer = is_so(pairs).T
    alone = int((lstm & ~transformer).sum()), int((transformer & ~lstm).sum())
    return *alone, stats.binomtest(alone[0], sum(alone)).pvalue


def by_length(run, n_parts):
    """Mean similarity in `n_parts` equally many clips each, from the shortest to the longest."""
    order = np.argsort(run["clips"]["seconds"], kind="stable")
    values = np.array(run["clips"][SIMILARITY])[order]
    return [part.mean() for part in np.array_split(values, n_parts)]


def dl_less_jaccard(runs, derailed):
    """DL less Jaccard for texts with a DL of at least 0.9, between, and below 0.7: of each group
    (its share of the clips, its mean difference), means over the seeds. What lies between follows
    from the mean over all clips.
    """
    rows = []
    for run, row in zip(runs, derailed, strict=True):
        gap, values = row["dl_less_jaccard"], np.array(run["clips"][SIMILARITY])
        high, low = (values >= 0.9).mean(), is_derailed(values).mean()
        middle = 1 - high - low
        total = similarity(run) - run["test"]["jaccard"]
        rest = total - high * gap["at least 0.9"] - low * gap["below 0.7"]
        rows.append([high, gap["at least 0.9"], middle, rest / middle, low, gap["below 0.7"]])
    shares_and_gaps = np.mean(rows, axis=0).reshape(3, 2)
    return [[f"{100 * share:.1f} %", signed(gap)] for share, gap in shares_and_gaps]


# ------------------------------------------------------------------------------ texts that go wrong
def n_running_on(run):
    """The clips whose text is longer than the true one by more than a quarter."""
    clips = run["clips"]
    return sum(
        written > 1.25 * n for n, written in zip(clips["letters"], clips["written"], strict=True)
    )


def ends_in_a_loop(text, n=36):
    """Whether the last `n` letters repeat something of a third of that length or less."""
    tail = text[-n:]
    periods = range(1, n // 3 + 1)
    return len(tail) == n and any(tail[period:] == tail[:-period] for period in periods)


def kinds_of_failure(results, decoder):
    """How the texts below 0.7 go wrong: in a loop, too long otherwise, too short, or else."""
    texts = results["q3-derailed"]["texts"]
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


def derailed_counts(results, decoder):
    """What q3-derailed.json counted in all texts of each seed."""
    counts = results["q3-derailed"]["derails"]["counts"]
    return [counts[f"q3-{decoder}-full-seed{seed}"] for seed in SEEDS]


# ----------------------------------------------------------------------------------- tables of Q3.3
def score_rows(results):
    """Loss and every score of both decoders on the test clips."""
    rows = []
    for decoder, title in NAMES.items():
        runs = full_runs(results, decoder)
        rows.append([title, *(spread(test(runs, key)) for key in ("loss", *SCORES))])
    single = {
        "LSTM, no CTC": "q3-lstm-full-handed-out",
        "transformer, clock only": "q3-transformer-full-noctc",
        "transformer, neither": "q3-transformer-full-handed-out",
    }
    for title, name in single.items():
        rows.append([title, *(f"{results[name]['test'][key]:.3f}" for key in ("loss", *SCORES))])
    return rows


def seed_rows(results):
    """Transformer less LSTM, paired over the seeds: the difference and its 95 % interval."""
    lstm, transformer = (full_runs(results, decoder) for decoder in NAMES)
    rows = []
    for key, title in (("loss", "loss"), (SIMILARITY, "DL"), ("wer", "WER"), ("cer", "CER")):
        size, *ends = paired(test(transformer, key), test(lstm, key))
        rows.append([title, signed(size, 4), interval(*ends, 4)])
    return rows


def mean_lead(pairs):
    """The transformer's mean lead over the clips of one seed, and its 95 % interval."""
    lstm, transformer = pairs.T
    return paired(transformer, lstm)


def lead_rows(results):
    """The transformer's mean lead in similarity over the clips, a column for each seed."""
    pairs = clip_pairs(results)
    leads = [mean_lead(p) for p in pairs]
    parts = [parts_of_lead(p) for p in pairs]
    p_values = [sign_test(p) for p in pairs]
    return [
        ["mean lead", *(signed(size, 4) for size, *_ in leads)],
        ["95 % interval", *(interval(*ends) for _, *ends in leads)],
        ["lost clips", *(str(n_lost) for n_lost, _, _ in parts)],
        ["their part of it", *(signed(of_lost, 4) for _, of_lost, _ in parts)],
        ["the others' part", *(signed(of_kept, 4) for _, _, of_kept in parts)],
        ["sign test, $p$", *(f"{p:.2f}" if p >= 0.001 else "< 0.001" for p in p_values)],
    ]


def clip_rows(results):
    """Counts over the test clips, a row for each, a column for each seed and decoder."""
    counts = [counts_of(pairs) for pairs in clip_pairs(results)]
    titles = {
        "better": "written better than by the other",
        "exact": "written without an error",
        "derailed": "below a similarity of 0.7",
    }
    rows = []
    for key, title in titles.items():
        rows.append([title, *(f"{n:,}" for count in counts for n in count[key])])
    seeds = zip(*(full_runs(results, decoder) for decoder in NAMES), strict=True)
    n_long = [str(n_running_on(run)) for pair in seeds for run in pair]
    return [*rows, ["more than a quarter too long", *n_long]]


def text_rows(results, longest=112):
    """What was said and written in some clips; the middle of long texts is left out."""
    rows = []
    for example in results["q3-derailed"]["examples"]:
        for key, title in {"said": "_said_", **NAMES}.items():
            text = example[key]
            cut = f"{text[: longest - 28]} … {text[-24:]}" if len(text) > longest else text
            rows.append([title, f"`{cut}`"])
    return rows


TRIALS = {  # short trainings on a small grammar: decoder, what it is given: their name
    ("LSTM", "CTC"): "lstm-trial-ctc",
    ("LSTM", "nothing"): "lstm-trial-noctc",
    ("transformer", "CTC, clock"): "transformer-trial-ctc",
    ("transformer", "clock"): "transformer-trial-noctc",
    ("transformer", "CTC"): "transformer-trial-ctc-random",
    ("transformer", "nothing"): "transformer-trial-noctc-random",
}


def aligned_epochs(results, name):
    """For each of these trials the epoch in which it passes one half, or None."""
    return [passes_half(run) for run in trials(results, name)]


def trial_rows(results):
    """How many trials align, when, and their similarity on test clips."""
    rows = []
    for (decoder, given), name in TRIALS.items():
        epochs = aligned_epochs(results, name)
        aligned = [epoch for epoch in epochs if epoch]
        when = extent(aligned) if aligned else "–"
        similarities = spread(test(trials(results, name), SIMILARITY))
        rows.append([decoder, given, f"{len(aligned)} of {len(epochs)}", when, similarities])
    return rows


def trial_p(results):
    """Fisher's test: do LSTM and transformer, given nothing, align in equally many trials?"""
    table = []
    for name in (TRIALS["LSTM", "nothing"], TRIALS["transformer", "nothing"]):
        epochs = aligned_epochs(results, name)
        table.append([len(epochs) - epochs.count(None), epochs.count(None)])
    return f"{stats.fisher_exact(table).pvalue:.2f}"


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
