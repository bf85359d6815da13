"""The report: compiles from results, says what was not run, lets the results speak, and packs the submission."""

import json
import math
import os
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, assert_one_sentence, load_script, oct_arrays, run_script

import make_report
import utils

SOURCES, TESTS = sorted((ROOT / "report").glob("*.typ")), sorted((ROOT / "tests").glob("*.py"))
TEXTS = {  # reference, hypothesis
    "worst": ("the red box.", "a a a a a a"),
    "lower quartile": ("a small dog.", "a smal dog."),
    "median": ("seven maps?", "seven mops?"),
    "best": ("two letters", "two letters"),
    "most misleading cosine": ("stop on top", "pots no pot"),
}


# --------------------------------------------------------------------------------------------------- tiny results
def q3_result(decoder, similarity, parameters, seconds=1.0):
    """A result as hw2-q3.ipynb writes it, of two epochs, with scores that are true for its texts."""
    scores = {"damerau_levenshtein": similarity, "jaccard": 0.8, "cosine": 0.95, "wer": 0.4, "cer": 0.1}
    config = {"seed": 42, "d": 200, "n_heads": 2, "n_blocks": 4}
    data = {"source": "synthetic test speech", "sha256": "0" * 64, "counts": {"train": 9, "val": 2, "test": 5}}
    data["split"] = "first 75 %, next 5 %, last 20 % of the clips, in order"
    result = utils.new_result("q3", f"q3-{decoder}", "make q3", config, data, "cpu")
    times = {"train_seconds": seconds, "seconds": seconds}
    for epoch in (1, 2):
        row = {"epoch": epoch, "train_loss": 2 / epoch, "val_loss": 1.8 / epoch}
        result["epochs"].append(row | scores | {"damerau_levenshtein": similarity * epoch / 2} | times)
    result["test"] = {"loss": 2 - similarity} | scores | {"seconds_per_clip": seconds / 100}
    result["examples"] = {rank: example(*texts) for rank, texts in TEXTS.items()}
    result["clips"] = {"seconds": [1.0, 2.0, 3.0, 4.0, 5.0], "damerau_levenshtein": [1.0, 0.9, 0.9, 0.8, 0.8]}
    return result | {"status": "finished", "parameters": parameters}


def example(reference, hypothesis):
    a, b = Counter(reference), Counter(hypothesis)
    cosine = (a & b).total() / math.sqrt(a.total() * b.total()) if a and b else float(a == b)
    wrong = sum(x != y for x, y in zip(reference.split(), hypothesis.split()))
    row = {"clip": "T-1", "reference": reference, "hypothesis": hypothesis, "cosine": cosine}
    row |= {"jaccard": (a & b).total() / (a | b).total(), "wer": wrong / len(reference.split())}
    return row | {"damerau_levenshtein": 1 - wrong / 11, "cer": wrong / 11}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of results: Q1's and Q2's made by their own scripts on tiny data, Q3's as its notebook writes them."""
    out, patch = tmp_path_factory.mktemp("made"), pytest.MonkeyPatch()
    np.savez_compressed(out / "octmnist.npz", source="synthetic test images", **oct_arrays())
    q1, q2 = load_script("q1_linear_attention"), load_script("hw2-q2")
    with patch.context() as context:
        context.setattr(os, "cpu_count", lambda: 1)  # in this process, one run after the other
        context.setattr(q1, "draw", lambda *_: None)
        context.setattr(q1, "SCALES", (0.1, 24.0))
        q1.main(q1.make_parser().parse_args(["-seq_lens", "32", "-dims", "4", "-out", str(out)]))
        for flags in (["0.1", "0.01", "-seed", "1", "2"], ["best", "-no_maxpool", "-seed", "1", "2"]):
            folders = ["-data", str(out), "-out", str(out)]
            q2.main(q2.make_parser().parse_args([*folders, "-learning_rate", *flags]))
    utils.save_result(out, q3_result("lstm", 0.9, 2_115_835))
    utils.save_result(out, q3_result("transformer", 0.7, 1_965_435))
    figure = next((out / "figures").glob("CNN-*.pdf"))
    named = re.findall(r'"(q[13]-[\w-]+)"', "".join(path.read_text() for path in SOURCES))
    for name in {*named, "q3-loss-lstm", "q3-loss-transformer"}:
        shutil.copy(figure, out / "figures" / f"{name}.pdf")
    return out


@pytest.fixture
def out(made, tmp_path):
    """A copy of those results, to change."""
    shutil.copytree(made / "results", tmp_path / "out" / "results")
    shutil.copytree(made / "figures", tmp_path / "out" / "figures")
    return tmp_path / "out"


def change(out, run, **entries):
    path = out / "results" / f"{run}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def query(out, selector):
    return make_report.typst.query(selector=selector, **make_report.report_inputs(out))


def claims(labels):
    return {claim["name"]: claim["value"] for claim in labels["claim"]}


# ----------------------------------------------------------------------------------------------------- compilation
def test_compiles_completely(out):
    pdf, labels = make_report.compile_report(out)
    assert pdf.startswith(b"%PDF") and labels["missing"] == []
    assert len(labels["check"]) > 20 and all(check["equal"] for check in labels["check"]), labels["check"]
    assert 8 <= labels["pages"][0] <= 14
    assert make_report.compile_report(out)[0] == pdf and b"CreationDate" not in pdf  # same results, same bytes


def test_derived_numbers_must_equal_saved_ones(out):
    change(out, "q2-search", parameters=224_893)
    wrong = [check["name"] for check in make_report.compile_report(out)[1]["check"] if not check["equal"]]
    assert wrong == ["parameters"]


@pytest.mark.parametrize("name", ["q1", "q2-search", "q2-strided-lr*", "q3-lstm", "q3-transformer", "*"])
def test_missing_result_shows_the_box(out, name):
    for path in (out / "results").glob(f"{name}.json"):
        path.unlink()
    if name.startswith("q2-strided"):
        (out / "results" / "q2-search-strided.json").unlink()
    missing = make_report.compile_report(out)[1]["missing"]
    assert any(Path(run).match(name) for run in missing), missing
    if name == "*":
        assert {"q1", "q2-search", "q3-lstm", "q3-transformer"} <= set(missing)


def test_one_run_of_a_search_missing_shows_the_box(out):
    (out / "results" / "q2-maxpool-lr0.1-seed1.json").unlink()
    assert "q2-maxpool-lr0.1-seed1" in make_report.compile_report(out)[1]["missing"]


def test_unfinished_result_and_missing_figure_show_the_box(out):
    change(out, "q3-lstm", status="interrupted", test={}, examples={})
    (out / "figures" / "q1-seconds.pdf").unlink()
    assert {"q3-lstm", "q1-seconds"} == set(make_report.compile_report(out)[1]["missing"])


@pytest.mark.parametrize("where", ["epochs", "test", "examples"])
def test_infinite_metric_and_divergence_show_the_box(out, where):
    """utils.save_result writes null for NaN and infinity."""
    result = q3_result("lstm", 0.9, 2_115_835)
    row, key = {
        "epochs": (result["epochs"][0], "val_loss"),
        "test": (result["test"], "loss"),
        "examples": (result["examples"]["median"], "wer"),
    }[where]
    row[key] = math.nan
    utils.save_result(out, result)
    utils.save_result(out, q3_result("lstm", 0.9, 1) | {"run": "q3-lstm-asis", "status": "diverged", "test": {}})
    utils.save_result(out, q3_result("transformer", 0.7, 1) | {"status": "diverged", "epochs": [], "test": {}})
    missing = make_report.compile_report(out)[1]["missing"]
    assert {"q3-lstm", "q3-transformer", "q3-lstm-asis", "q3-transformer-realonly"} <= set(missing)


def test_models_that_were_only_tested(out):
    """EPOCHS=0 with INIT_FROM leaves no epochs, neither in a tagged run nor in one without a tag."""
    for decoder, parameters in (("lstm", 2_115_835), ("transformer", 1_965_435)):
        for tag in ("", "-asis"):
            result = q3_result(decoder, 0.6, parameters) | {"run": f"q3-{decoder}{tag}", "epochs": []}
            utils.save_result(out, result)
    labels = make_report.compile_report(out)[1]
    assert set(labels["missing"]) == {
        f"q3-{name}-{tag}" for name in ("lstm", "transformer") for tag in ("finetuned", "realonly")
    }
    assert "half LSTM" not in claims(labels) and all(check["equal"] for check in labels["check"])


@pytest.mark.parametrize(
    "tag, settings",
    [
        ("-asis", "EPOCHS=0 INIT_FROM=<folder of checkpoints> TAG=-asis"),
        ("-finetuned", "EPOCHS=60 INIT_FROM=<folder of checkpoints> TAG=-finetuned"),
        ("-realonly", "EPOCHS=60 TAG=-realonly"),
    ],
)
def test_box_names_the_command_of_a_run_on_real_speech(out, tag, settings):
    for other in {"-asis", "-finetuned", "-realonly"} - {tag}:
        for decoder in ("lstm", "transformer"):
            utils.save_result(out, q3_result(decoder, 0.6, 1) | {"run": f"q3-{decoder}{other}"})
    assert make_report.compile_report(out)[1]["missing"] == [f"q3-lstm{tag}", f"q3-transformer{tag}"]
    commands = {item["text"] for item in json.loads(query(out, "raw")) if item["text"].startswith("make q3 ")}
    assert commands == {f"make q3 DATA=... OUT=report {settings}"}


def test_single_seed_without_a_strided_search(out):
    """What one seed and a strided run at a rate given by hand leave."""
    search = json.loads((out / "results" / "q2-search.json").read_text())
    change(out, "q2-search", config=search["config"] | {"seed": [1]}, runs=[r for r in search["runs"] if "seed1" in r])
    for path in [*(out / "results").glob("q2-*seed2.json"), out / "results" / "q2-search-strided.json"]:
        path.unlink()
    assert make_report.compile_report(out)[1]["missing"] == []


def test_networks_trained_on_different_data_are_not_compared(out):
    """A later search on other data, say, before its strided runs are made."""
    for path in (out / "results").glob("q2-*strided*.json"):
        change(out, path.stem, data=json.loads(path.read_text())["data"] | {"sha256": "1" * 64})
    labels = make_report.compile_report(out)[1]
    assert any(run.startswith("q2-strided-lr") for run in labels["missing"])
    assert not any(name.startswith("better by") for name in claims(labels))


def test_longer_search_and_real_speech_appear_when_they_exist(out):
    search = json.loads((out / "results" / "q2-search.json").read_text())
    (out / "results" / "q2-search-epochs150.json").write_text(json.dumps(search))
    for run in ("q3-lstm-asis", "q3-lstm-finetuned", "q3-lstm-realonly"):
        result = q3_result("lstm", 0.8 if "finetuned" in run else 0.3, 2_115_835)
        utils.save_result(out, result | {"run": run})
    base = q3_result("lstm", 0.9, 1)
    for tag, changed in (("-tried", {}), ("-tried-smaller", {"batch_size": 8})):
        config = base["config"] | {"epochs": 2, "batch_size": 16} | changed
        utils.save_result(out, base | {"run": f"q3-lstm{tag}", "config": config})
    labels = make_report.compile_report(out)[1]
    assert [claim["name"] for claim in labels["claim"]].count("best rate") == 2
    assert claims(labels)["pretraining lstm"] == "worth having"
    headings = query(out, "heading")
    assert all(title in headings for title in ("The same search with more updates", "On real speech", "was tried for"))
    assert {run for run in labels["missing"] if run.startswith("q3")} == {
        f"q3-transformer-{tag}" for tag in ("asis", "finetuned", "realonly")
    }


# ---------------------------------------------------------------------------------------- the text follows the data
def test_sentences_follow_the_results(out):
    before = claims(make_report.compile_report(out)[1])
    assert (before["better decoder"], before["half LSTM"], before["half transformer"]) == ("LSTM", "epoch 2", "epoch 2")
    utils.save_result(out, q3_result("lstm", 0.3, 2_115_835))
    search = json.loads((out / "results" / "q2-search.json").read_text())
    loser = next(row for row in search["table"] if row["learning_rate"] != search["best"]["learning_rate"])
    change(out, "q2-search", best=loser)
    after = claims(make_report.compile_report(out)[1])
    assert after["better decoder"] == after["lower loss"] == "transformer"
    assert after["half LSTM"] == "never" and after["best rate"] == str(loser["learning_rate"]) != before["best rate"]


@pytest.mark.parametrize(
    "lstm, transformer, reason",
    [
        (0.9, 0.3, "hypothesis"),
        ([0.9, 0.9], [0.3, 0.9], "hypothesis"),
        (0.9, 0.9, None),
        (0.3, 0.9, "not separated"),
        (0.3, 0.3, None),
    ],
)
def test_the_reason_follows_who_is_first(out, lstm, transformer, reason):
    for decoder, similarities, parameters in (("lstm", lstm, 2_115_835), ("transformer", transformer, 1_965_435)):
        result = q3_result(decoder, 0.9, parameters)
        for row, value in zip(result["epochs"], np.broadcast_to(similarities, 2).tolist()):
            row["damerau_levenshtein"] = value
        utils.save_result(out, result)
    found = claims(make_report.compile_report(out)[1])
    assert found.get("reason") == reason and (found["half LSTM"] == "never") == (lstm == 0.3)


@pytest.mark.parametrize(
    "pool, strided, said",
    [
        ((0.8, 0.9), (0.7, 1.0), "these runs do not separate the networks"),  # accuracy of two seeds, nothing lost
        ((0.8, 0.82), (0.5, 0.52), "tolerance"),
        ((0.8, 0.82), (0.8, 0.82), "these runs do not separate the networks"),
    ],
)
def test_no_conclusion_where_the_seeds_do_not_separate_the_networks(out, pool, strided, said):
    rate = json.loads((out / "results" / "q2-search.json").read_text())["best"]["learning_rate"]
    for network, accuracies in (("maxpool", pool), ("strided", strided)):
        for seed, accuracy in zip((1, 2), accuracies):
            run = f"q2-{network}-lr{rate}-seed{seed}"
            test = json.loads((out / "results" / f"{run}.json").read_text())["test"]
            change(out, run, test=test | {"accuracy": accuracy, "accuracy_shifted": [0.5, 0.5]})
    assert claims(make_report.compile_report(out)[1])["measured"] == said
    if said == "tolerance":  # now the max-pool network also loses less
        for seed in (1, 2):
            run = f"q2-strided-lr{rate}-seed{seed}"
            test = json.loads((out / "results" / f"{run}.json").read_text())["test"]
            change(out, run, test=test | {"accuracy_shifted": [0.5, 0.3 + 0.01 * seed]})
        assert claims(make_report.compile_report(out)[1])["measured"] == "more tolerant"


def test_runs_that_learned_and_then_collapsed_are_named(out):
    assert "collapsed" not in claims(make_report.compile_report(out)[1])
    search = json.loads((out / "results" / "q2-search.json").read_text())
    loser = next(row for row in search["table"] if row["learning_rate"] != search["best"]["learning_rate"])
    run = f"q2-maxpool-lr{loser['learning_rate']:g}-seed2"
    epochs = json.loads((out / "results" / f"{run}.json").read_text())["epochs"]
    losses = [1.4, 0.1] + [5.0] * (len(epochs) - 2)
    change(out, run, epochs=[row | {"train_loss": loss} for row, loss in zip(epochs, losses)])
    assert claims(make_report.compile_report(out)[1])["collapsed"] == "1"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.stem != "lib"], ids=lambda path: path.name)
def test_no_measured_number_is_typed(path):
    """A decimal in a question's file would be a result that cannot follow the runs; only lengths (pt, em) may be."""
    text = re.sub(r'"[1A]\.1"', "", path.read_text())  # the headings' numbering
    found = [line for line in text.splitlines() if re.search(r"\d\.\d+(?!\d|pt|em|cm)", line)]
    assert not found, found


def test_q3_keys_are_those_of_the_notebook():
    """The tiny Q3 result of these tests has no key that the notebook (or new_result) does not write."""
    cells = json.loads((ROOT / "hw2-q3.ipynb").read_text())["cells"]
    source = "".join("".join(cell["source"]) for cell in cells) + (ROOT / "utils.py").read_text()

    def keys(value):
        return {*value, *(k for v in value.values() for k in keys(v))} if isinstance(value, dict) else set()

    result = q3_result("lstm", 0.9, 1)
    names = keys({key: value for key, value in result.items() if key != "environment"}) | keys(result["epochs"][0])
    assert not [name for name in names if not re.search(rf"\b{name}\b", source.replace("N_", "n_").replace("D,", "d"))]


def test_classes_and_sizes_are_those_of_the_scripts():
    q2 = (ROOT / "report" / "q2.typ").read_text()
    assert ", ".join(f'"{name}"' for name in utils.OCT_CLASSES) in q2
    assert f"{sum(load_script('hw2-q2').COURSE_SUBSET)}-image" in q2
    q3 = (ROOT / "report" / "q3.typ").read_text()
    assert f"#let (V, mels) = ({len(utils.VOCABULARY)}, {utils.N_MELS})" in q3 and f"every {utils.HOP} samples" in q3


def test_committed_report_is_current():
    """The PDF in report/ is what the results in report/ give."""
    if not (ROOT / "report" / "report.pdf").exists():
        pytest.skip("report/report.pdf has not been made yet")
    pdf, labels = make_report.compile_report(ROOT / "report")
    assert pdf == (ROOT / "report" / "report.pdf").read_bytes(), "results or text have changed; run `make report`"
    assert labels["missing"] == [] and all(check["equal"] for check in labels["check"])


# ------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("text", ['{"question": "q1", "ru', "[]", "", '{"status": "finished"}'])
def test_damaged_result_leaves_the_old_pdf(out, text):
    (out / "report.pdf").write_bytes(b"old")
    (out / "results" / "q1.json").write_text(text)
    with pytest.raises(utils.UserError) as raised:
        make_report.main(make_report.make_parser().parse_args(["-out", str(out)]))
    assert len(str(raised.value).splitlines()) == 1
    assert (out / "report.pdf").read_bytes() == b"old" and len(list(out.iterdir())) == 3


def test_damaged_figure_is_one_sentence(out):
    (out / "figures" / "q1-seconds.pdf").write_bytes(b"%PDF-1.4 cut sh")
    with pytest.raises(utils.UserError, match="damaged"):
        make_report.compile_report(out)


def test_command_line_says_one_sentence(tmp_path):
    assert_one_sentence(run_script("make_report.py", "-out", tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------------ submission
FILLED = """course = "Deep Learning"\ntitle = "Homework 2"\ngroup = "G07"
members = ["Ada Lovelace, 1"]\ncontributions = "Ada did everything."\n"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A copy of the project's code, with files around it that must not be submitted, as make_report's ROOT."""
    root = tmp_path / "project"
    (root / "report").mkdir(parents=True)
    (root / "tests").mkdir()
    for path in [*ROOT.glob("*.py"), ROOT / "hw2-q3.ipynb", *SOURCES, *TESTS]:
        shutil.copy(path, root / path.relative_to(ROOT))
    for name in ("requirements.txt", "Makefile", "README.md", "pyproject.toml", "notes.txt", "group.zip", ".env"):
        (root / name).write_text(name)
    for name in (
        "data/octmnist.npz",
        ".venv/lib/x.py",
        "report/checkpoints/q3.pt",
        "report/features/f.npz",
        "tests/__pycache__/t.pyc",
        "tests/notes.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("not to be submitted")
    (root / "report" / "group.toml").write_text(FILLED)
    monkeypatch.setattr(make_report, "ROOT", root)
    return root


def submit(out):
    make_report.main(make_report.make_parser().parse_args(["-out", str(out), "-submission"]))


def test_zip_holds_exactly_what_it_should(project, out):
    submit(out)
    with zipfile.ZipFile(project / "G07.zip") as archive:
        assert archive.testzip() is None
        expected = ["report.pdf", "hw2-q3.ipynb", "requirements.txt", "Makefile", "README.md", "pyproject.toml"]
        expected += [path.name for path in ROOT.glob("*.py")] + ["report/group.toml"]
        expected += [path.relative_to(ROOT).as_posix() for path in [*SOURCES, *TESTS]]
        assert "tests/conftest.py" in expected and sorted(archive.namelist()) == sorted(expected)
        assert archive.read("report.pdf") == (out / "report.pdf").read_bytes()
        assert archive.read("hw2-q2.py") == (ROOT / "hw2-q2.py").read_bytes()
    first = (project / "G07.zip").read_bytes()
    submit(out)
    assert (project / "G07.zip").read_bytes() == first


@pytest.mark.parametrize(
    "old, new, word",
    [
        ('"G07"', '"TO BE FILLED IN"', "group"),
        ('"G07"', '"../G07"', "group"),
        ('["Ada Lovelace, 1"]', "[]", "members"),
        ('"Ada Lovelace, 1"', '"TO BE FILLED IN (name)"', "members"),
        ('"Ada did everything."', '" "', "contributions"),
        ('"Ada did everything."', '"TO BE FILLED IN: one paragraph"', "contributions"),
        ('"Ada did everything."', "3", "group.toml"),
        ('title = "Homework 2"', "", "group.toml"),
        ("members = [", "members = ", "group.toml"),
    ],
)
def test_placeholder_blocks_the_submission(project, out, old, new, word):
    (project / "report" / "group.toml").write_text(FILLED.replace(old, new))
    with pytest.raises(utils.UserError, match=word):
        submit(out)
    assert not list(project.glob("*G07*")) and not (out / "report.pdf").exists()


def test_missing_code_blocks_the_submission(project, out):
    (project / "README.md").unlink()
    with pytest.raises(utils.UserError, match="README"):
        submit(out)
    assert not list(project.glob("*G07*"))


def test_readme_table_is_current():
    results = make_report.read_results(ROOT / "report")
    table = (ROOT / "README.md").read_text().split("<!-- results: written by make report -->\n")[1]
    assert table.split("\n<!-- end of results -->")[0] == make_report.results_table(results)
    shown = [name for name in results if name.startswith(("q2-search", "q3-")) and "-tried" not in name]
    assert len(shown) > 5 and table.count("| Q") >= len(shown)
