"""The report: it compiles, its claims follow the results, and the submission is packed."""

import copy
import json
import re
import shutil
import tomllib
import zipfile

import runs
from conftest import ROOT, assert_one_sentence, run_tool
from report import claims, evidence
from runs import UserError
from tools import make_report

import numpy as np
import pytest
from scipy import stats

SOURCES = sorted((ROOT / "report").glob("*.typ"))
ASSIGNMENT = ROOT.parent / "shared" / "assignment.md"


@pytest.fixture(scope="module")
def results():
    """The committed results; whoever changes them copies them first."""
    return make_report.read_results(ROOT / "report")


# ------------------------------------------------------------------------------------ the documents
def test_committed_report_is_current():
    """The PDF in report/ is what text, results and figures in report/ give."""
    pdf, pages = make_report.compile_report(ROOT / "report")
    assert pages <= 14
    assert pdf == (ROOT / "report" / "report.pdf").read_bytes(), "run `make report`"


def test_every_plot_that_the_text_names_is_there():
    for path in SOURCES:
        for name in re.findall(r'"((?:q\d|CNN)-[\w-]+)"', path.read_text()):
            assert (ROOT / "report" / "figures" / f"{name}.pdf").exists(), (path.name, name)


@pytest.mark.skipif(
    not ASSIGNMENT.exists(), reason="the assignment's text is not beside this folder"
)
def test_no_sentence_is_the_assignments():
    def phrases(text, n=9):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    theirs = phrases(ASSIGNMENT.read_text())
    for path in SOURCES:
        assert not phrases(path.read_text()) & theirs, path.name


def test_no_semicolon_is_swallowed():
    """Typst takes a semicolon right after code for the end of that code, and does not print it."""
    for path in SOURCES:
        text = re.sub(r"^//.*", "", path.read_text(), flags=re.MULTILINE)
        assert not re.search(r"#[\w.()]+[\w)\]];", text), path.name


def test_any_other_folder_gets_a_sheet(results, tmp_path, capsys):
    """Whatever is there is shown, also an unfinished run; what is not there is named."""
    some = {name: results[name] for name in ("q1", "q2-maxpool-lr0.1-seed42")}
    some["q3-lstm"] = {**results["q3-lstm-asis"], "run": "q3-lstm"}
    unfinished = {**some["q2-maxpool-lr0.1-seed42"], "run": "q2-maxpool-lr1-seed1"}
    some[unfinished["run"]] = {**unfinished, "status": "diverged", "epochs": [], "test": {}}
    for result in some.values():
        runs.save_result(tmp_path, result)
    (tmp_path / "figures").mkdir()
    shutil.copy(ROOT / "report" / "figures" / "q1-seconds.pdf", tmp_path / "figures")

    sheet = evidence.sheet(make_report.read_results(tmp_path))
    assert [sheet[f"q{i}"]["missing"] for i in (1, 2, 3)] == [
        [],
        ["q2-strided"],
        ["q3-transformer"],
    ]
    ((_, rows),) = sheet["q2"]["tables"]
    assert [row[:3] for row in rows][1] == ["`q2-maxpool-lr1-seed1`", "diverged", "–"]
    make_report.main(make_report.make_parser().parse_args(["-out", str(tmp_path)]))
    assert "results.pdf: " in capsys.readouterr().out
    assert (tmp_path / "results.pdf").read_bytes().startswith(b"%PDF")


def test_a_missing_result_is_named(results, tmp_path):
    for name in results:
        if not name.startswith("q2-avgpool"):
            shutil.copy(ROOT / "report" / "results" / f"{name}.json", tmp_path)
    (tmp_path / "results").mkdir()
    for path in tmp_path.glob("*.json"):
        path.rename(tmp_path / "results" / path.name)
    with pytest.raises(UserError, match="q2-avgpool"):
        make_report.compile_report(tmp_path)


def test_a_damaged_result_leaves_the_old_pdf(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "q1.json").write_text('{"question": "q1", "ru')
    (tmp_path / "results.pdf").write_bytes(b"old")
    with pytest.raises(UserError, match="q1"):
        make_report.main(make_report.make_parser().parse_args(["-out", str(tmp_path)]))
    assert (tmp_path / "results.pdf").read_bytes() == b"old"


def test_command_line_says_one_sentence(tmp_path):
    assert_one_sentence(run_tool("make_report", "-out", tmp_path / "nowhere"))


# ------------------------------------------------------------------------------ numbers and claims
def test_numbers_as_text():
    assert evidence.spread([0.5, 0.6, 0.7]) == "0.600\u00a0±\u00a00.100"
    assert evidence.power(4.67e-14) == "4.7 × 10⁻¹⁴"
    assert evidence.listing([1, 2, 3]) == "1, 2 and 3"
    assert evidence.signed(-0.5, 1) == "−0.5"


def test_welch_interval():
    """By hand: means 3 and 1, both variances 1, n = 3: error sqrt(2/3), 4 degrees of freedom."""
    assert np.allclose(
        evidence.welch([2, 3, 4], [0, 1, 2]), (2, 2 - 2.776 * 0.8165, 2 + 2.776 * 0.8165), atol=1e-3
    )


def test_paired_interval():
    """By hand: gaps 1, 2 and 3, deviation 1, n = 3: 2 ± 4.303 / sqrt(3)."""
    half = 4.303 / 3**0.5
    assert np.allclose(evidence.paired([2, 4, 6], [1, 2, 3]), (2, 2 - half, 2 + half), atol=1e-3)


def test_the_shares_interval_ends_where_a_paired_t_test_begins_to_reject():
    parts, wholes = (
        np.array([0.12, 0.07, 0.08, 0.12, 0.13]),
        np.array([0.15, 0.17, 0.14, 0.16, 0.15]),
    )
    share, interval = evidence.share_with_interval(parts, wholes)
    assert share == pytest.approx(parts.mean() / wholes.mean())
    for end in interval:
        assert stats.ttest_1samp(parts - end * wholes, 0).pvalue == pytest.approx(0.05, abs=1e-6)
    assert interval[0] < share < interval[1]


def test_kinds_of_failure():
    texts = {
        "the " * 20: "loop",
        "nothing of this was ever said in the recording, not one word": "long",
        "the": "short",
        "a dog lay on a rug now": "other",
    }
    rows = [{"hypothesis": text, "reference": "the cat sat on the mat"} for text in texts]
    names = [f"q3-lstm-full-seed{seed}" for seed in evidence.SEEDS]
    results = {"q3-derailed": {"texts": {name: rows if name == names[0] else [] for name in names}}}
    assert evidence.kinds_of_failure(results, "lstm") == dict.fromkeys(texts.values(), 1)


def test_how_clips_fall_out():
    pairs = np.array([[1.0, 0.95], [0.5, 0.9], [0.8, 0.8], [0.6, 0.69]])  # LSTM, transformer
    counts = evidence.counts_of(pairs)
    assert (counts["lstm_better"], counts["transformer_better"]) == (1, 2)
    assert (counts["lstm_exact"], counts["transformer_exact"]) == (1, 0)
    assert (counts["lstm_derailed"], counts["transformer_derailed"]) == (2, 1)
    assert counts["lost"] == 2 and counts["lead_of_lost"] == pytest.approx(0.49 / 4)
    assert counts["lead_of_lost"] + counts["lead_of_kept"] == pytest.approx(np.diff(pairs).mean())


def test_every_claim_holds(results):
    assert claims.no_longer_true(results) == []


def edit(pattern, change):
    """A change of the results whose names match: change(result)."""

    def apply(results):
        for result in evidence.matching(results, pattern):
            change(result)

    return apply


def exchange(a, b):
    """Two groups of runs, seed by seed, get each other's epochs, test scores and clips."""

    def apply(results):
        pairs = zip(evidence.matching(results, a), evidence.matching(results, b), strict=True)
        for x, y in pairs:
            for key in {"test", "epochs", "clips"} & set(x):
                x[key], y[key] = y[key], x[key]

    return apply


def tests_as(**values):
    """These scores on the test split, a little different for each seed."""

    def change(run):
        for key, value in values.items():
            run["test"][key] = value + run["seed"] / 100_000

    return change


def ends_with(**values):
    """These values of the last epoch, a little different for each seed."""

    def change(run):
        for key, value in values.items():
            run["epochs"][-1][key] = value + run["seed"] / 100_000

    return change


def always(**values):
    """These values of every epoch, as functions of its number."""

    def change(run):
        for row in run["epochs"]:
            row.update({key: value(row["epoch"]) for key, value in values.items()})

    return change


def q1_is_the_other_way_round(q1):
    """Linear attention is quadratic, slow and hungry; the series is exact and never negative."""
    q1["identities"][0]["full"] = 1e-3
    for row in q1["approximation"]:
        row["error"] = [0.5] * len(row["error"])
        row["negative_weights"] = [0.0] * len(row["error"])
    rows = {(row["method"], row["D"]): row for row in q1["scaling"]}
    for D in q1["config"]["dims"]:
        linear, fused = rows["linear", D], rows["softmax, fused", D]
        for key in ("seconds", "slope"):
            linear[key], fused[key] = fused[key], linear[key]
        linear["seconds"] = [D**4 * seconds for seconds in linear["seconds"]]
        linear["peak_bytes"] = [D * n for n in linear["seq_lens"]]
    for crossing in q1["crossover"]:
        crossing["measured"] = crossing["predicted"] / 2


def another_rate_is_best(results):
    """0.01 after 15 epochs and 0.1 after 150; the other networks were trained at those rates."""
    for name in [name for name in results if re.match("q2-(strided|avgpool)-", name)]:
        old, new = ("0.01", "0.1") if name.endswith("-epochs150") else ("0.1", "0.01")
        results[name.replace(f"lr{old}-", f"lr{new}-")] = results.pop(name)
    for search in evidence.matching(results, "q2-search-.*"):
        search["best"] = search["table"][0 if search["config"]["epochs"] == 150 else 1]
    for run in evidence.matching(results, "q2-maxpool-lr0.1-.*-epochs150"):
        run["test"]["accuracy_shifted"] = [0.5, 0.5, 0.5, 0.5]  # some are no better than guessing


def confuses_others_than_drusen_with_normal(run):
    run["test"]["confusion"] = [[0, 75, 0, 0], [0, 75, 0, 0], [0, 0, 75, 0], [70, 0, 0, 5]]


def falls_apart_when_moved(run):
    run["test"]["accuracy_shifted"][3] = 0.26 + run["seed"] / 100_000


def writes_letters_in_disorder(result):
    for counts in result["derails"]["counts"].values():
        counts["derails"] = 100
        counts["dl_less_jaccard"]["at least 0.9"] = -0.1


def has_a_parameter_more(run):
    run["parameters"] += 1
    run["multiply_accumulates"] += 1


def leads_by_a_little_everywhere(results):
    for lstm, transformer in zip(*claims.both(results)):
        values = lstm["clips"]["damerau_levenshtein"]
        transformer["clips"]["damerau_levenshtein"] = [value + 0.05 for value in values]


def the_transformer_loops(results):
    for name, texts in results["q3-derailed"]["texts"].items():
        for row in texts:
            row["hypothesis"] = "no " * 30 if "transformer" in name else "no"


def search_gains_nothing(model):
    model["test"]["beam"] = model["test"]["greedy"]


Q3 = r"q3-(lstm|transformer)-full-seed\d+"
OPPOSITES = (
    [edit("q1", q1_is_the_other_way_round)],
    [another_rate_is_best],
    [  # all rates learn
        edit(r"q2-maxpool-lr0.0.*", ends_with(train_loss=0.1, val_accuracy=0.99)),
        edit(r"q2-maxpool-lr.*", tests_as(accuracy=0.9)),
    ],
    [  # strides win
        exchange(r"q2-maxpool-lr0.1-seed\d+", r"q2-strided-lr0.1-seed\d+"),
        exchange(r"q2-maxpool-lr0.01-seed\d+-epochs150", r"q2-strided-lr0.01-.*-epochs150"),
    ],
    [edit("q2-strided-.*", ends_with(val_accuracy=0.99))],
    [edit("q2-(strided|maxpool)-lr0.01-.*-epochs150", confuses_others_than_drusen_with_normal)],
    [edit("q2-strided-lr0.01-.*-epochs150", falls_apart_when_moved)],
    [  # the average wins
        edit("q2-avgpool-.*", tests_as(accuracy=0.9)),
        edit("q2-avgpool-.*", ends_with(val_accuracy=0.95, train_loss=0.01)),
    ],
    [edit("q2-(strided|maxpool)-lr.*", has_a_parameter_more)],
    [edit(r"q2-avgpool-lr0.1-seed\d+", tests_as(accuracy=0.55))],
    [edit("q2-strided-lr0.1-.*-epochs150", tests_as(accuracy=0.7))],
    [edit("q3-derailed", writes_letters_in_disorder)],
    [edit(r"q3-lstm-full-seed\d+", tests_as(damerau_levenshtein=0.5))],
    [exchange(r"q3-lstm-full-seed\d+", r"q3-transformer-full-seed\d+")],
    [edit(Q3, always(val_loss=lambda epoch: epoch))],
    [edit(Q3, always(val_loss=lambda epoch: 2 / epoch))],
    [edit(Q3[:-3] + "44", always(damerau_levenshtein=lambda epoch: epoch / 15))],
    [leads_by_a_little_everywhere],
    [the_transformer_loops],
    [edit(r"q3-lstm-full-seed\d+", tests_as(wer=0.5, cosine=0.1, jaccard=0.5))],
    [edit("q3-lstm-full-handed-out", always(damerau_levenshtein=lambda epoch: 0.9))],
    [edit("q3-transformer-full-noctc", tests_as(damerau_levenshtein=0.1))],
    [edit("q3-lstm-trial-noctc-.*", always(damerau_levenshtein=lambda epoch: 0.1))],
    [edit("q3-.*-(realonly|asis-plain)", tests_as(damerau_levenshtein=0.9))],
    [edit("q3-model", search_gains_nothing)],
)


def test_every_claim_can_be_false(results):
    false = set()
    for changes in OPPOSITES:
        other = copy.deepcopy(results)
        for change in changes:
            change(other)
        false.update(claims.no_longer_true(other))
    names = {claim.__name__.replace("_", " ") for claim in claims.CLAIMS}
    assert names - false == set()


# --------------------------------------------------------------------------- README and submission
FILLED = """course = "Deep Learning"\ntitle = "Homework 2"\ngroup = "G07"
members = ["Ada Lovelace, 1"]\ncontributions = "Ada did everything."\n"""
PRIVATE = ("notes.txt", "data/octmnist.npz", ".venv/x.py", "report/checkpoints/q3.pt")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """make_report's ROOT: the code, and files around it that must not be submitted."""
    root = tmp_path / "project"
    for pattern in make_report.CODE:
        for path in ROOT.glob(pattern):
            (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.relative_to(ROOT))
    for name in PRIVATE:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("not to be submitted")
    for folder in ("results", "figures"):
        shutil.copytree(ROOT / "report" / folder, root / "report" / folder)
    (root / "report" / "group.toml").write_text(FILLED)
    monkeypatch.setattr(make_report, "ROOT", root)
    return root


def submit(root):
    out = str(root / "report")
    make_report.main(make_report.make_parser().parse_args(["-out", out, "-submission"]))


def test_zip_holds_the_report_and_the_code(project):
    submit(project)
    with zipfile.ZipFile(project / "G07.zip") as archive:
        names = set(archive.namelist())
        assert archive.read("report.pdf") == (project / "report" / "report.pdf").read_bytes()
        assert archive.read("hw2-q2.py") == (ROOT / "hw2-q2.py").read_bytes()
    assert {"report.pdf", "hw2-q3.ipynb", "README.md", "CONTRIBUTING.md", "report/q1.typ"} < names
    assert {path.name for path in ROOT.glob("*.py")} < names and "tests/conftest.py" in names
    assert not names & set(PRIVATE)


@pytest.mark.parametrize(
    "old, new, word",
    [
        ('"G07"', '"TO BE FILLED IN"', "group"),
        ('"G07"', '"../G07"', "group"),
        ('["Ada Lovelace, 1"]', "[]", "members"),
        ('"Ada did everything."', '" "', "contributions"),
        ('"Ada did everything."', '"TO BE FILLED IN: one paragraph"', "contributions"),
        ("members = [", "members = ", "group.toml"),
    ],
)
def test_placeholder_blocks_the_submission(project, old, new, word):
    (project / "report" / "group.toml").write_text(FILLED.replace(old, new))
    with pytest.raises(UserError, match=word):
        submit(project)
    assert not list(project.glob("*.zip"))


def test_the_committed_group_is_a_placeholder():
    group = tomllib.loads((ROOT / "report" / "group.toml").read_text())
    with pytest.raises(UserError, match="has not been filled in"):
        make_report.check_group(group)


def test_missing_code_blocks_the_submission(project):
    (project / "requirements.txt").unlink()
    with pytest.raises(UserError, match="requirements"):
        submit(project)


def test_readme_table_is_current(project):
    before = (project / "README.md").read_text()
    make_report.main(make_report.make_parser().parse_args(["-readme"]))
    assert (project / "README.md").read_text() == before
    (project / "README.md").write_text("no markers")
    with pytest.raises(UserError, match="markers"):
        make_report.write_readme()
    assert json.dumps(evidence.readme_rows(make_report.read_results(ROOT / "report")))
