"""Write what the committed results say into README and into the model's card."""

import runs
from report import lib, make, q1, q2, q3
from report.lib import bytes_text, extent, interval, listing, table, whole, write_between


def result_rows(results):
    """README's table: question, result, data."""
    first, second, third = q1.numbers(results), q2.numbers(results), q3.numbers(results)
    images = results["q2-search"]["data"]["source"]
    speech = q3.full_runs(results, "lstm")[0]["data"]["source"]
    text = "$M = 1 + D + D^2$ features, so $O(LMD)$ operations; `linear_attention` is "
    text += f"{first['faster']} times as fast as fused softmax attention "
    text += f"(one head, D = {first['D']}, L = {first['L']})"
    rows = [["Q1", text, "random numbers"]]
    for name, title, run in (("pool", "max-pooling", "maxpool"), ("strided", "strides", "strided")):
        n = whole(q2.network(results, run, second["rate_short"], "")[0]["parameters"])
        text = f"{title}, {n} parameters, rate {second['rate_short']}: accuracy "
        text += f"{second[name]['val']} validation, {second[name]['test']} test"
        rows.append(["Q2", text, images])
    for decoder, title in q3.NAMES.items():
        scores = third[decoder]
        text = f"{title}: test loss {scores['loss']}, similarity {scores['damerau_levenshtein']}, "
        text += f"Jaccard {scores['jaccard']}, cosine {scores['cosine']}, WER {scores['wer']}"
        rows.append(["Q3", text, speech])
    model = results["q3-model-transformer"]
    scores = model["recordings"]["clips as they are"]
    text = "the model of `transcribe.py`: "
    text += f"similarity {scores['damerau_levenshtein']:.3f}, WER {scores['wer']:.3f}"
    rows.append(["Q3", text, model["data"]["source"]])
    return rows


def sentence_of_pages(starts):
    """README's sentence on which pages of the PDF answer each question."""
    _, second, third, appendix = starts[:4]
    ends = second, third, appendix - 1  # the appendix begins on a new page
    places = [
        f"question {number} on pages {extent(pages)}"
        for number, pages in enumerate(zip(starts[:3], ends, strict=True), 1)
    ]
    return f"In the PDF, {listing(places)}."


def sentence_of_times(times):
    """README's sentence on how long its two commands take."""
    run, test = (f"{times['seconds'][name] / 60:.1f}" for name in ("run", "test"))
    kind = "with" if times["bf16"] else "without"
    return (
        f"From a fresh clone, installation included, `make run` took {run} minutes and `make test` "
        f"{test} (one run each; {times['environment']['processor']}, {kind} bfloat16 products)."
    )


def model_rows(model):
    """The model's card: scores on each kind of recordings."""
    spoken = {
        f"before fine-tuning: test texts in the voice of the first training, {how}": scores
        for how, scores in model.get("spoken", {}).items()
    }
    named = {
        **spoken,
        "clips as they are, greedy as the assignment asks": model["test"]["greedy"],
        "clips as they are, search without the model of letters": model["test"]["beam"],
        **model["recordings"],
    }
    rows = []
    for name, scores in named.items():
        similarity = f"{scores['damerau_levenshtein']:.3f} {interval(*scores['interval'])}"
        rates = f"{scores['wer']:.3f}", f"{scores['cer']:.3f}"
        rows.append([name, str(scores["n"]), similarity, *rates])
    return rows


def model_facts(model):
    """The model's card: what one model is, what it learned from, and how it was made."""
    trained, machine = model["trained"], model["environment"]
    start = trained["started_from"]["data"]
    first = f"{whole(start['counts']['train'])} clips ({start['source']})"
    if "held_out" in start:
        first += f", without {start['held_out']} whose texts are for validation or test below"
    machine = f"{machine['processor']}; threads: {machine['threads']}"
    chosen = []
    for share, scores in model.get("validation", {}).items():
        text = f"similarity {scores['damerau_levenshtein']:.3f} on {scores['n']} validation clips"
        if float(share) == model["search"]["letter_share"]:
            text += " (chosen)"
        chosen.append([f"search, the letters' vote weighted {share}", text])
    return [
        ["parameters, without the CTC layer", whole(trained["parameters"])],
        ["size", bytes_text(model["bytes"])],
        ["trained first on", first],
        ["then on", f"{trained['data']['counts']['train']} clips ({trained['data']['source']})"],
        *chosen,
        ["scored on", model["data"]["source"]],
        ["a minute of speech takes", f"{model['seconds_per_minute']:.0f} s ({machine})"],
        ["trained by", f"`{trained['command']}`"],
        ["scored by", f"`{model['command']}`"],
    ]


def main(args):
    results = lib.read_results(lib.ROOT / "report")
    rows = table(["question", "result", "data"], result_rows(results))
    times = [sentence_of_times(results["times"])]
    folder = lib.ROOT / "report"
    *_, starts = make.compile_document("report", make.all_numbers(results), folder)
    pages = [sentence_of_pages(starts)]
    write_between(lib.ROOT / "README.md", {"times": times, "pages": pages, "results": rows})

    header = ["recordings", "how many", "similarity", "word error rate", "letter error rate"]
    facts, scores = [], []
    for decoder, title in q3.NAMES.items():
        if model := results.get(f"q3-model-{decoder}"):
            name = ["", f"{title} decoder: `q3-{decoder}.pt`", ""]
            facts += [*name, *table(["", ""], model_facts(model))]
            scores += [*name, *table(header, model_rows(model))]
    card = lib.ROOT / "report" / "models" / "README.md"
    write_between(card, {"facts": facts, "scores": scores})


if __name__ == "__main__":
    runs.run_script(main, runs.ArgumentParser(__doc__))
