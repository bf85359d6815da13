"""The report: it compiles, says what was not run, follows the results, and packs the submission."""

import json
import math
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import runs
import utils
from conftest import ROOT, assert_one_sentence, load_script, oct_arrays, run_tool
from runs import UserError
from tools import make_report

import numpy as np
import pytest

SOURCES = sorted((ROOT / "report").glob("*.typ"))
TESTS = sorted((ROOT / "tests").glob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
PARAMETERS = {"lstm": 2_115_835, "transformer": 1_965_435}
TEXTS = {  # reference, hypothesis
    "worst": ("the red box.", "a a a a a a"),
    "lower quartile": ("a small dog.", "a smal dog."),
    "median": ("seven maps?", "seven mops?"),
    "best": ("two letters", "two letters"),
    "most misleading cosine": ("stop on top", "pots no pot"),
}


# ------------------------------------------------------------------------------------ tiny results
def q3_result(decoder, similarity, seconds=1.0, **entries):
    """A result as hw2-q3.ipynb writes it, of two epochs, with scores that are true for its texts.

    `entries` take the place of those of the result.
    """
    scores = {
        "damerau_levenshtein": similarity,
        "jaccard": 0.8,
        "cosine": 0.95,
        "wer": 0.4,
        "cer": 0.1,
    }
    data = {
        "source": "synthetic test speech",
        "sha256": "0" * 64,
        "counts": {"train": 9, "val": 2, "test": 5},
        "split": "first 75 %, next 5 %, last 20 % of the clips, in order",
    }
    config = {
        "seed": 42,
        "epochs": 2,
        "batch_size": 16,
        "learning_rate": 0.001,
        "warmup": 0.2,
        "dropout": 0.1,
        "label_smoothing": 0.1,
        "ctc_weight": 0.3,
        "speed": 0.1,
        "noise": 0.5,
        "bf16": 1,
        "d": 200,
        "n_heads": 2,
        "n_blocks": 4,
    }
    result = runs.new_result("q3", f"q3-{decoder}", "make q3", config, data, "cpu")
    for epoch in (1, 2):
        row = {
            "epoch": epoch,
            "train_loss": 2 / epoch,
            "val_loss": 1.8 / epoch,
            **scores,
            "damerau_levenshtein": similarity * epoch / 2,
            "train_seconds": seconds,
            "seconds": seconds,
        }
        result["epochs"].append(row)
    result["test"] = {"loss": 2 - similarity, **scores, "seconds_per_clip": seconds / 100}
    result["intervals"] = {"damerau_levenshtein": [similarity - 0.1, similarity + 0.1]}
    result["unrelated"] = dict(scores)
    result["examples"] = {rank: example(*texts) for rank, texts in TEXTS.items()}
    result["clips"] = {
        "seconds": [1.0, 2.0, 3.0, 4.0, 5.0],
        "letters": [11, 12, 12, 11, 11],
        "written": [11, 11, 11, 11, 40],
        "damerau_levenshtein": [1.0, 0.9, 0.9, 0.8, 0.8],
    }
    return {**result, "status": "finished", "parameters": PARAMETERS[decoder], **entries}


def example(reference, hypothesis):
    """One of a result's examples: two texts and their scores."""
    a, b = Counter(reference), Counter(hypothesis)
    n_common, n_either = (a & b).total(), (a | b).total()
    words = reference.split()
    n_wrong = sum(x != y for x, y in zip(words, hypothesis.split()))
    return {
        "clip": "T-1",
        "reference": reference,
        "hypothesis": hypothesis,
        "cosine": n_common / math.sqrt(a.total() * b.total()) if a and b else float(a == b),
        "jaccard": n_common / n_either,
        "wer": n_wrong / len(words),
        "damerau_levenshtein": 1 - n_wrong / 11,
        "cer": n_wrong / 11,
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of results: Q1's and Q2's by their own scripts, Q3's as its notebook has them."""
    out = tmp_path_factory.mktemp("made")
    np.savez_compressed(out / "octmnist.npz", source="synthetic test images", **oct_arrays())
    q1, q2 = load_script("q1_linear_attention"), load_script("hw2-q2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q1, "draw", lambda *_: None)
        patch.setattr(q1, "SCALES", (0.1, 24.0))
        patch.setattr(q2, "n_processes", lambda n_runs: 1)  # in this process, one after the other
        q1.main(q1.make_parser().parse_args(["-seq_lens", "32", "-dims", "4", "-out", str(out)]))
        search = ["-learning_rate", "0.1", "0.01", "-seed", "1", "2"]
        strided = ["-learning_rate", "best", "-no_maxpool", "-seed", "1", "2"]
        for flags in (search, strided):
            q2.main(q2.make_parser().parse_args(["-data", str(out), "-out", str(out), *flags]))
    runs.save_result(out, q3_result("lstm", 0.9))
    runs.save_result(out, q3_result("transformer", 0.7))

    figure = next((out / "figures").glob("CNN-*.pdf"))
    text = "".join(path.read_text() for path in SOURCES)
    named = re.findall(r'"(q[13]-[\w-]+)"', text)
    for name in {*named, "q3-curves-lstm", "q3-curves-transformer"}:
        shutil.copy(figure, out / "figures" / f"{name}.pdf")
    return out


@pytest.fixture
def out(made, tmp_path):
    """A copy of those results, to change."""
    shutil.copytree(made / "results", tmp_path / "out" / "results")
    shutil.copytree(made / "figures", tmp_path / "out" / "figures")
    return tmp_path / "out"


def read(out, run):
    return json.loads((out / "results" / f"{run}.json").read_text())


def change(out, run, **entries):
    """Change entries of a saved result."""
    path = out / "results" / f"{run}.json"
    path.write_text(json.dumps({**read(out, run), **entries}))


def sheet(out):
    """What results.pdf says about itself."""
    return make_report.compile_report(out, "results")[1]


# ----------------------------------------------------------------------------- the sheet of results
def test_compiles_completely(out):
    pdf, labels = make_report.compile_report(out, "results")
    assert pdf.startswith(b"%PDF") and labels["missing"] == []
    assert 4 <= labels["pages"][0] <= 9
    assert b"CreationDate" not in pdf
    assert make_report.compile_report(out, "results")[0] == pdf  # same results, same bytes


@pytest.mark.parametrize(
    "name", ["q1", "q2-search", "q2-strided-lr*", "q3-lstm", "q3-transformer", "*"]
)
def test_missing_result_shows_the_box(out, name):
    for path in (out / "results").glob(f"{name}.json"):
        path.unlink()
    if name.startswith("q2-strided"):
        (out / "results" / "q2-search-strided.json").unlink()
        name = "q2-search-strided"
    missing = sheet(out)["missing"]
    assert any(Path(run).match(name) for run in missing), missing
    if name == "*":
        assert {"q1", "q2-search", "q3-lstm", "q3-transformer"} <= set(missing)


def test_one_run_of_a_search_missing_shows_the_box(out):
    (out / "results" / "q2-maxpool-lr0.1-seed1.json").unlink()
    assert "q2-maxpool-lr0.1-seed1" in sheet(out)["missing"]


def test_unfinished_result_and_missing_figure_show_the_box(out):
    change(out, "q3-lstm", status="interrupted", test={}, examples={})
    (out / "figures" / "q1-seconds.pdf").unlink()
    assert {"q3-lstm", "q1-seconds"} == set(sheet(out)["missing"])


@pytest.mark.parametrize("where", ["epochs", "test", "examples"])
def test_infinite_metric_and_divergence_show_the_box(out, where):
    """runs.save_result writes null for NaN and infinity."""
    result = q3_result("lstm", 0.9)
    row, key = {
        "epochs": (result["epochs"][0], "val_loss"),
        "test": (result["test"], "loss"),
        "examples": (result["examples"]["median"], "wer"),
    }[where]
    row[key] = math.nan
    runs.save_result(out, result)
    diverged = {"status": "diverged", "test": {}}
    runs.save_result(out, q3_result("transformer", 0.7, epochs=[], **diverged))
    assert {"q3-lstm", "q3-transformer"} <= set(sheet(out)["missing"])


def test_models_that_were_only_tested(out):
    """EPOCHS=0 with INIT_FROM leaves no epochs."""
    for decoder in ("lstm", "transformer"):
        runs.save_result(out, q3_result(decoder, 0.6, epochs=[]))
    assert sheet(out)["missing"] == []


def test_single_seed_without_a_strided_search(out):
    """What one seed and a strided run at a rate given by hand leave."""
    search = read(out, "q2-search")
    of_seed_1 = [run for run in search["runs"] if "seed1" in run]
    change(out, "q2-search", config={**search["config"], "seed": [1]}, runs=of_seed_1)
    (out / "results" / "q2-search-strided.json").unlink()
    for path in (out / "results").glob("q2-*seed2.json"):
        path.unlink()
    assert sheet(out)["missing"] == []


def test_networks_trained_on_different_data_are_not_compared(out):
    """A later search on other data, say, before its strided runs are made."""
    for path in (out / "results").glob("q2-*strided*.json"):
        change(out, path.stem, data={**read(out, path.stem)["data"], "sha256": "1" * 64})
    assert "q2-search-strided" in sheet(out)["missing"]


def test_any_other_folder_gets_the_sheet_of_results(out, capsys):
    make_report.main(make_report.make_parser().parse_args(["-out", str(out)]))
    assert (out / "results.pdf").exists() and not (out / "report.pdf").exists()
    assert "results.pdf" in capsys.readouterr().out


# ------------------------------------------------------------------- the report: its sentences hold
@pytest.fixture(scope="module")
def committed(tmp_path_factory):
    """A copy of the committed results and figures."""
    folder = tmp_path_factory.mktemp("committed")
    shutil.copytree(ROOT / "report" / "results", folder / "results")
    shutil.copytree(ROOT / "report" / "figures", folder / "figures")
    return folder


def sentences(folder):
    """{what a sentence of the report rests on: whether these results have it so}."""
    found = make_report.compile_report(folder, "report")[1]["holds"]
    assert len({item["name"] for item in found}) == len(found)
    return {item["name"]: item["holds"] for item in found}


def test_committed_report_is_current():
    """The PDF in report/ is what the results in report/ give, and they bear out every sentence."""
    pdf, labels = make_report.compile_report(ROOT / "report", "report")
    committed = (ROOT / "report" / "report.pdf").read_bytes()
    assert pdf == committed, "results or text have changed; run `make report`"
    assert labels["missing"] == []
    assert len(labels["check"]) > 20
    assert all(check["equal"] for check in labels["check"])
    assert [item["name"] for item in labels["holds"] if not item["holds"]] == []
    assert 10 <= labels["pages"][0] <= 14


def edit(folder, pattern, change):
    """Apply `change(result)` to the saved results whose names match."""
    paths = sorted((folder / "results").glob(f"{pattern}.json"))
    assert paths, pattern
    for path in paths:
        result = json.loads(path.read_text())
        change(result)
        path.write_text(json.dumps(result))


def exchange(folder, a, b, key):
    """Two runs get each other's entry `key`."""
    first, second = read(folder, a), read(folder, b)
    change(folder, a, **{key: second[key]})
    change(folder, b, **{key: first[key]})


def seeds_of(folder, pattern):
    """The pattern's runs, in the order of their seeds."""
    return sorted(path.stem for path in (folder / "results").glob(f"{pattern}.json"))


def opposite_of_q1(folder):
    """Linear attention is quadratic, slow and hungry; the series is exact and never negative."""

    def reverse(q1):
        q1["identities"][0]["full"] = 1e-3
        for row in q1["approximation"]:
            row["error"] = [0.5] * len(row["error"])
            row["negative_weights"] = [0.0] * len(row["error"])
        rows = {(row["method"], row["D"]): row for row in q1["scaling"]}
        for D in q1["config"]["dims"]:
            linear, fused = rows["linear", D], rows["softmax, fused", D]
            for key in ("seconds", "slope"):
                linear[key], fused[key] = fused[key], linear[key]
            linear["peak_bytes"] = [D * n for n in linear["seq_lens"]]
            plain = rows["softmax, plain", D]
            plain["seconds"] = [4.0**i for i in range(len(plain["seconds"]))]
        for crossing in q1["crossover"]:
            crossing["measured"] = crossing["predicted"] / 2

    edit(folder, "q1", reverse)


def opposite_of_q2(folder):
    """The smallest rate is best, all rates learn, strides win, the average wins over both."""

    def reverse(search):
        search["best"] = search["table"][0 if search["config"]["epochs"] == 150 else -1]

    def learn(result):
        result["epochs"][-1]["train_loss"] = result["config"]["learning_rate"]
        result["epochs"][-1]["val_accuracy"] = 0.99

    edit(folder, "q2-search", reverse)
    edit(folder, "q2-search-epochs150", reverse)
    edit(folder, "q2-maxpool-*", learn)
    for run in seeds_of(folder, "q2-maxpool-lr0.001-seed4?"):
        result = read(folder, run)
        test = {**result["test"], "accuracy": 0.9 + result["seed"] / 1000}
        change(folder, run, test=test)


def strides_win(folder):
    """The networks get each other's scores on test, and the control learns best."""
    for epochs, rate in (("", "0.1"), ("-epochs150", "0.01")):
        pool = seeds_of(folder, f"q2-maxpool-lr{rate}-seed4?{epochs}")
        strided = seeds_of(folder, f"q2-strided-lr{rate}-seed4?{epochs}")
        for a, b in zip(pool, strided):
            exchange(folder, a, b, "test")

    def best_on_validation(result):
        result["epochs"][-1]["val_accuracy"] = 0.99 + result["seed"] / 100_000
        result["epochs"][-1]["train_loss"] = 0.01

    def falls_apart(result):
        result["test"]["accuracy_shifted"][1:] = [0.26, 0.26, 0.26 + result["seed"] / 100_000]

    def learns_best(result):
        result["epochs"][-1]["train_loss"] = 0.01

    edit(folder, "q2-strided-lr0.1-seed4?", best_on_validation)
    edit(folder, "q2-strided-lr0.01-seed4?-epochs150", falls_apart)
    edit(folder, "q2-avgpool-*", learns_best)


def the_average_wins(folder):
    def win(result):
        result["test"]["accuracy"] = 0.9 + result["seed"] / 1000
        result["epochs"][-1]["val_accuracy"] = 0.9 + result["seed"] / 1000

    edit(folder, "q2-avgpool-*", win)


def recalls_are_low(folder):
    def miss(result):
        result["test"]["confusion"] = [[1, 2, 2, 2], [2, 1, 2, 2], [2, 2, 1, 2], [2, 2, 2, 1]]

    edit(folder, "q2-maxpool-lr0.01-seed4?-epochs150", miss)


def opposite_of_q3(folder):
    """The LSTM is the transformer and the other way round; both over-fit, but not on real clips."""
    for tag in ("", "-finetuned", "-finetuned-seed43", "-finetuned-seed44"):
        for key in ("test", "examples", "clips", "intervals"):
            exchange(folder, f"q3-lstm{tag}", f"q3-transformer{tag}", key)

    def fits_too_well(result):
        for row in result["epochs"]:
            row["val_loss"] = float(row["epoch"])
            row["train_loss"] = 0.1

    edit(folder, "q3-lstm", fits_too_well)
    edit(folder, "q3-transformer", fits_too_well)

    def learns_to_the_end(result):
        for row in result["epochs"]:
            row["val_loss"] = 1 / row["epoch"]

    edit(folder, "q3-*-finetuned*", learns_to_the_end)


def other_voices(folder):
    """Varied clips cost nothing and win nothing; real clips alone are enough; the worst is good."""
    for decoder in ("q3-lstm", "q3-transformer"):
        exchange(folder, decoder, f"{decoder}-varied", "test")
        exchange(folder, f"{decoder}-asis", f"{decoder}-asis-plain", "test")
        exchange(folder, f"{decoder}-realonly", f"{decoder}-finetuned", "test")

    def is_good(result):
        result["examples"]["worst"]["damerau_levenshtein"] = 0.9
        result["examples"]["median"]["hypothesis"] = ""

    edit(folder, "q3-transformer", is_good)


def the_transformer_needs_nothing(folder):
    """In the trials it is best with neither clock nor CTC; the LSTM never aligns without CTC."""

    def fail(result):
        result["test"]["damerau_levenshtein"] = 0.2 + result["seed"] / 1000
        for row in result["epochs"]:
            row["damerau_levenshtein"] = 0.2

    def win(result):
        result["test"]["damerau_levenshtein"] = 0.9 + result["seed"] / 1000
        result["epochs"][0]["damerau_levenshtein"] = 0.9

    edit(folder, "q3-lstm-trial-*", fail)
    edit(folder, "q3-transformer-trial-*", win)
    edit(folder, "q3-transformer-trial-ctc-random-*", fail)


def one_clip_decides(folder):
    """The transformer leads by one clip alone."""

    def alike(result):
        n = len(result["clips"]["damerau_levenshtein"])
        first = 0.9 if "transformer" in result["run"] else 0.8
        result["clips"]["damerau_levenshtein"] = [first] + [0.8] * (n - 1)
        result["test"]["wer"] = first
        result["examples"]["worst"] |= {"hypothesis": "", "wer": 1.0}

    edit(folder, "q3-lstm", alike)
    edit(folder, "q3-transformer", alike)


OPPOSITES = (
    opposite_of_q1,
    opposite_of_q2,
    strides_win,
    the_average_wins,
    recalls_are_low,
    opposite_of_q3,
    other_voices,
    the_transformer_needs_nothing,
    one_clip_decides,
)


def test_every_sentence_can_be_false(committed, tmp_path):
    """Other results make each condition false once, and the report then says so."""
    names, false = set(sentences(committed)), set()
    for opposite in OPPOSITES:
        folder = tmp_path / opposite.__name__
        shutil.copytree(committed, folder)
        opposite(folder)
        false |= {name for name, value in sentences(folder).items() if not value}
    assert names - false == set()


def test_derived_numbers_must_equal_saved_ones(committed, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(committed, folder)
    change(folder, "q2-search", parameters=224_893)
    labels = make_report.compile_report(folder, "report")[1]
    assert [item["name"] for item in labels["check"] if not item["equal"]] == ["parameters"]


@pytest.mark.parametrize("name", ["q1.typ", "q2.typ", "q3.typ", "appendix.typ"])
def test_no_measured_number_is_typed(name):
    """A decimal in a question's file would be a result that cannot follow the runs.

    Only lengths (pt, em) may be.
    """
    path = ROOT / "report" / name
    text = re.sub(r'"[1A]\.1"', "", path.read_text())  # the headings' numbering
    found = [line for line in text.splitlines() if re.search(r"\d\.\d+(?!\d|pt|em|cm)", line)]
    assert not found, found


def test_no_semicolon_is_swallowed():
    """Typst takes a semicolon right after code for the end of that code; escaped, it is printed."""
    for path in SOURCES:
        for line in path.read_text().splitlines():
            if not line.lstrip().startswith("//"):
                assert not re.search(r"[\])];", line), line


def test_q3_keys_are_those_of_the_notebook():
    """The tiny Q3 result of these tests has no key that the notebook does not write."""
    cells = json.loads((ROOT / "hw2-q3.ipynb").read_text())["cells"]
    source = "".join("".join(cell["source"]) for cell in cells)
    source += (ROOT / "utils.py").read_text() + (ROOT / "runs.py").read_text()

    def keys(value):
        if not isinstance(value, dict):
            return set()
        found = set(value)
        for item in value.values():
            found |= keys(item)
        return found

    result = q3_result("lstm", 0.9)
    del result["environment"]
    for name in keys(result) | keys(result["epochs"][0]):
        assert re.search(rf"\b{name}\b", source), name


def test_classes_and_sizes_are_those_of_the_scripts():
    tables = (ROOT / "report" / "tables.typ").read_text()
    assert ", ".join(f'"{name}"' for name in utils.OCT_CLASSES) in tables
    assert f"course's {sum(load_script('hw2-q2').COURSE_SUBSET)}" in tables
    q3 = " ".join((ROOT / "report" / "q3.typ").read_text().split())
    assert f"from {len(utils.VOCABULARY)} tokens" in q3
    assert f"{utils.N_MELS} log-mel bands per frame, a frame every {utils.HOP} samples" in q3
    appendix = (ROOT / "report" / "appendix.typ").read_text()
    assert f"Windows of {utils.N_FFT:,} samples, a frame every {utils.HOP}" in appendix


# --------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("text", ['{"question": "q1", "ru', "[]", "", '{"status": "finished"}'])
def test_damaged_result_leaves_the_old_pdf(out, text):
    (out / "results.pdf").write_bytes(b"old")
    (out / "results" / "q1.json").write_text(text)
    with pytest.raises(UserError) as raised:
        make_report.main(make_report.make_parser().parse_args(["-out", str(out)]))
    assert len(str(raised.value).splitlines()) == 1
    assert (out / "results.pdf").read_bytes() == b"old"
    assert len(list(out.iterdir())) == 3


def test_damaged_figure_is_one_sentence(out):
    (out / "figures" / "q1-seconds.pdf").write_bytes(b"%PDF-1.4 cut sh")
    with pytest.raises(UserError, match="damaged"):
        make_report.compile_report(out, "results")


def test_command_line_says_one_sentence(tmp_path):
    assert_one_sentence(run_tool("make_report", "-out", tmp_path / "nowhere"))


def test_only_make_readme_writes_the_readme(project, out):
    """Compiling the report has no such side effect."""
    begin, end = "<!-- results: written by make readme -->\n", "\n<!-- end of results -->"
    readme = project / "README.md"
    readme.write_text(f"before\n{begin}old table{end}\nafter\n")
    shutil.copytree(out / "results", project / "report" / "results")
    main, parser = make_report.main, make_report.make_parser()
    main(parser.parse_args(["-out", str(project / "report")]))
    assert "old table" in readme.read_text() and (project / "report" / "report.pdf").exists()
    main(parser.parse_args(["-readme"]))
    table = make_report.results_table(make_report.read_results(out))
    assert readme.read_text() == f"before\n{begin}{table}{end}\nafter\n"
    change(project / "report", "q1", crossover=None)
    with pytest.raises(UserError, match="another version"):
        main(parser.parse_args(["-readme"]))
    (project / "report" / "results" / "q1.json").unlink()
    readme.write_text("no markers")
    with pytest.raises(UserError, match="markers"):
        main(parser.parse_args(["-readme"]))
    assert readme.read_text() == "no markers"


# -------------------------------------------------------------------------------------- submission
FILLED = """course = "Deep Learning"\ntitle = "Homework 2"\ngroup = "G07"
members = ["Ada Lovelace, 1"]\ncontributions = "Ada did everything."\n"""
PLAIN_FILES = ("requirements.txt", "Makefile", "README.md", "LICENSE", "pyproject.toml")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """make_report's ROOT: a copy of the code, with files around it that must not be submitted."""
    root = tmp_path / "project"
    for folder in ("report", "tests", "tools"):
        (root / folder).mkdir(parents=True)
    for path in [*ROOT.glob("*.py"), ROOT / "hw2-q3.ipynb", *SOURCES, *TESTS, *TOOLS]:
        shutil.copy(path, root / path.relative_to(ROOT))
    for name in (*PLAIN_FILES, "notes.txt", "group.zip", ".env"):
        (root / name).write_text(name)
    for name in (
        "data/octmnist.npz",
        ".venv/lib/x.py",
        "report/checkpoints/q3.pt",
        "report/features/f.npz",
        "tests/__pycache__/t.pyc",
        "tools/__pycache__/t.pyc",
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
        expected = ["report.pdf", "hw2-q3.ipynb", "report/group.toml", *PLAIN_FILES]
        for path in [*ROOT.glob("*.py"), *SOURCES, *TESTS, *TOOLS]:
            expected.append(path.relative_to(ROOT).as_posix())
        assert "tests/conftest.py" in expected and "tools/make_report.py" in expected
        assert sorted(archive.namelist()) == sorted(expected)
        assert archive.read("report.pdf") == (out / "report.pdf").read_bytes()
        assert archive.read("hw2-q2.py") == (ROOT / "hw2-q2.py").read_bytes()
    first = (project / "G07.zip").read_bytes()
    submit(out)
    assert (project / "G07.zip").read_bytes() == first


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_group_that_an_editor_saved_with_a_mark(project, out, encoding):
    (project / "report" / "group.toml").write_text(FILLED, encoding=encoding)
    submit(out)
    assert (project / "G07.zip").exists()


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
    with pytest.raises(UserError, match=word):
        submit(out)
    assert not list(project.glob("*G07*")) and not (out / "report.pdf").exists()


def test_missing_code_blocks_the_submission(project, out):
    (project / "README.md").unlink()
    with pytest.raises(UserError, match="README"):
        submit(out)
    assert not list(project.glob("*G07*"))


def test_readme_table_is_current():
    results = make_report.read_results(ROOT / "report")
    readme = (ROOT / "README.md").read_text()
    table = readme.split("<!-- results: written by make readme -->\n")[1]
    assert table.split("\n<!-- end of results -->")[0] == make_report.results_table(results)
    shown = ["q3-lstm", "q3-transformer", "q3-lstm-finetuned", "q3-transformer-finetuned"]
    shown += [name for name in results if name.startswith("q2-search")]
    assert table.count("| Q") == len(shown) + len(results["q1"]["config"]["dims"]) + 1  # the model
