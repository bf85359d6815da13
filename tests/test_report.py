"""The report: it is current, its numbers are right, and the submission is packed."""

import json
import re
import shutil
import tomllib
import zipfile

import runs
from conftest import ROOT
from report import figures, lib, make, q1, q2, q3, readme, sheet, submission
from runs import UserError

import pytest
import torch
import torch.nn.functional as F
from matplotlib.testing.compare import compare_images

SOURCES = sorted((ROOT / "report").glob("*.typ"))


@pytest.fixture(scope="module")
def results():
    """The committed results; whoever changes them copies them first."""
    return lib.read_results(ROOT / "report")


def make_for(out):
    """`make report OUT=out`"""
    make.main(make.make_parser().parse_args(["-out", str(out)]))


# ------------------------------------------------------------------------------------ the documents
def test_committed_report_is_current(results):
    """The PDF in report/ is what text, results and figures in report/ give."""
    numbers = make.all_numbers(results)
    pdf, n_pages, _ = make.compile_document("report", numbers, ROOT / "report")
    assert n_pages <= 14
    assert pdf == (ROOT / "report" / "report.pdf").read_bytes(), "run `make report`"
    kept = json.loads((ROOT / "report" / "numbers.json").read_text(encoding="utf-8"))
    assert kept == make.numbers_in_text(numbers), "run `make report`"


def test_committed_figures_are_current(results, tmp_path):
    """Compared as pictures: another machine may round a letter's edge otherwise."""
    figures.draw_all(results, tmp_path)
    for new in sorted((tmp_path / "figures").glob("*.png")):
        committed = ROOT / "report" / "figures" / new.name
        assert compare_images(str(committed), str(new), tol=2) is None, "run `make report`"


def test_every_plot_that_the_text_names_is_there():
    for path in SOURCES:
        for name in re.findall(r'"((?:q\d|CNN)-[\w-]+)"', path.read_text()):
            assert (ROOT / "report" / "figures" / f"{name}.pdf").exists(), (path.name, name)


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

    parts = sheet.contents(lib.read_results(tmp_path), ["q1-seconds"])
    missing = [parts[question]["missing"] for question in ("q1", "q2", "q3")]
    assert missing == [[], ["q2-strided"], ["q3-transformer"]]
    _, rows = parts["q2"]["table"]
    assert [row[:3] for row in rows][1] == ["`q2-maxpool-lr1-seed1`", "diverged", "–"]
    make_for(tmp_path)
    assert "results.pdf: " in capsys.readouterr().out
    assert (tmp_path / "results.pdf").read_bytes().startswith(b"%PDF")


def test_the_sheets_figures_have_captions_in_words():
    figures = ["CNN-networks", "CNN-rates-epochs3", "CNN-rates-strided", "CNN-other"]
    shown = sheet.with_captions(figures, sheet.CAPTIONS["q2"])
    assert shown == [
        ("CNN-rates-strided", "The strided network at each learning rate."),
        ("CNN-rates-epochs3", "The network with max-pooling at each learning rate. (`epochs3`)"),
        ("CNN-networks", "Both networks at the same learning rate."),
    ]


def test_a_missing_result_is_named(results, tmp_path):
    others = {name: run for name, run in results.items() if not name.startswith("q2-avgpool")}
    with pytest.raises(UserError, match="q2-avgpool"):
        make.all_numbers(others)


def test_a_damaged_result_leaves_the_old_pdf(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "q1.json").write_text('{"question": "q1", "ru')
    (tmp_path / "results.pdf").write_bytes(b"old")
    with pytest.raises(UserError, match="q1"):
        make_for(tmp_path)
    assert (tmp_path / "results.pdf").read_bytes() == b"old"


def test_a_folder_without_results_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="nowhere holds no results"):
        make_for(tmp_path / "nowhere")


# ------------------------------------------------------------------------- numbers and their lines
TEXT = """// n.rate is no use of it
#let n = numbers.q2
#let (pool, other) = (n.pool, n.other)
The rate #n.rate, and again #n.rate; over all, #pool.test.
#numbered-table([Title], n.rows + numbers.q3.rows) $n.$ #other.gaps.at(1).at(0)
"""


def test_numbers_are_found_where_the_text_asks_for_them():
    assert make.names_in(TEXT) == [
        ("q2.rate", 4),
        ("q2.rate", 4),
        ("q2.pool.test", 4),
        ("q2.rows", 5),
        ("q3.rows", 5),
        ("q2.other.gaps.at(1).at(0)", 5),
    ]


def test_a_number_has_its_printed_value():
    numbers = {"q2": {"n": 5, "gaps": [["a", "b"], ["c", "d"]]}}
    assert make.value_of(numbers, "q2.n") == "5"
    assert make.value_of(numbers, "q2.gaps") == ["a | b", "c | d"]
    assert make.value_of(numbers, "q2.gaps.at(1).at(0)") == "c"


def test_changed_numbers_are_listed_with_their_lines():
    used = "report/q2.typ:41, report/q2.typ:43"
    before = {
        "q2.pool.val": {"value": "0.849", "used": used},
        "q2.rows": {"value": ["0.1 | 0.5", "0.2 | 0.6"], "used": "report/q2.typ:41"},
        "q2.same": {"value": "1", "used": used},
        "q2.gone": {"value": "1", "used": used},
    }
    now = {
        "q2.pool.val": {"value": "0.851", "used": used},
        "q2.rows": {"value": ["0.1 | 0.5", "0.2 | 0.7"], "used": "report/q2.typ:41"},
        "q2.same": {"value": "1", "used": "report/q2.typ:43"},
        "q2.new": {"value": "1", "used": used},
    }
    assert make.changes(before, now) == [
        "q2.pool.val: 0.849 -> 0.851, used in report/q2.typ:41, report/q2.typ:43",
        "q2.rows: 0.2 | 0.6 -> 0.2 | 0.7, used in report/q2.typ:41",
    ]


# ---------------------------------------------------------------------- numbers as they are printed
def test_numbers_as_text():
    assert lib.spread([0.5, 0.6, 0.7]) == "0.600\u00a0±\u00a00.100"
    assert q1.power(4.67e-14) == "4.7 × 10⁻¹⁴"
    assert q1.two_digits(2321) == "2,300" and q1.two_digits(855) == "860"
    assert q1.two_digits(None) == "not found"
    assert lib.listing([1, 2, 3]) == "1, 2 and 3"
    assert lib.signed(-0.5, 1) == "−0.5"
    assert lib.extent([5, 3, 4000]) == "3 to 4,000" and lib.extent([5, 5]) == "5"


def test_the_interval_by_hand():
    """Welch: means 3 and 1, both variances 1, n = 3: error sqrt(2/3), 4 degrees of freedom."""
    half = 2.776 * 0.8165
    assert lib.welch([2, 3, 4], [0, 1, 2]) == pytest.approx((2, 2 - half, 2 + half), abs=1e-3)


def test_networks_at_equal_training_loss():
    """Two runs of twelve epochs: the mean of the nine epochs around the first with that loss."""
    runs = []
    for first in (5, 8):  # the epoch, from 0, at which the loss falls to 0.5
        losses = [1.0] * first + [0.5] * (12 - first)
        rows = [{"train_loss": x, "val_accuracy": k / 10} for k, x in enumerate(losses)]
        runs.append({"epochs": rows})
    assert q2.at_training_loss(runs, 0.5) == pytest.approx([0.5, 0.75])  # 1 to 9, 4 to 11
    assert q2.at_training_loss(runs, 0.4) is None
    assert q2.lowest_common_loss([runs]) == 0.5


def test_kinds_of_failure():
    texts = {
        "the " * 20: "loop",
        "nothing of this was ever said in the recording, not one word": "long",
        "the": "short",
        "a dog lay on a rug now": "other",
    }
    rows = [{"hypothesis": text, "reference": "the cat sat on the mat"} for text in texts]
    names = [f"q3-lstm-full-seed{seed}" for seed in q3.SEEDS]
    results = {"q3-lost": {"texts": {name: rows if name == names[0] else [] for name in names}}}
    assert q3.kinds_of_failure(results, "lstm") == dict.fromkeys(texts.values(), 1)


def test_kinds_of_error():
    """Each edit of each text is of one kind; none of a text without an error."""
    cases = {
        ("the jury rose", "the jury rose"): {},
        ("the jury rose", "the jery rose"): {"replaced": 1},
        ("harbour", "harber"): {"several": 1},
        ("it matters", "it maters"): {"doubled": 1},
        ("the later one", "the latter one"): {"doubled": 1},
        ("the night", "the niht"): {"missing": 1},
        ("an hour", "ban hour"): {"added": 1},
        ("any one, at all.", "anyone at all"): {"boundary": 1, "mark": 2},
        ("a boat", "a bote"): {"several": 1},
    }
    for (true, written), kinds in cases.items():
        assert q3.kinds_of_error(true, written) == kinds, (true, written)


def test_edits_in_texts():
    """Four texts of ten letters: right, two edits, three letters too many, and a lost one."""
    clips = {
        "letters": [10, 10, 10, 10],
        "written": [10, 10, 13, 5],
        "damerau_levenshtein": [1.0, 0.8, 0.7692, 0.5],
    }
    run = {"clips": clips}
    assert q3.edits_of(run).tolist() == [0, 2, 3, 5]
    assert q3.cells_of_counts([run, run]) == ["1", "1"]  # exact, lost
    assert q3.edits_per_letter(run) == pytest.approx(5 / 30)
    assert {k: n for k, n in q3.counts_of_edits(run).items() if n} == {
        "0": 1,
        "2": 1,
        "3–5": 1,
        "lost": 1,
    }


def test_the_share_of_the_architecture():
    """Below 0.7: LSTM 4 texts, transformer 0, without the clock 1, so three of four; 2 of 4 below
    0.85.
    """
    values = {"lstm": [0.5] * 4, "transformer": [0.9] * 4, "noclock": [0.5, 0.8, 0.9, 0.9]}
    runs = {name: {"clips": {"damerau_levenshtein": value}} for name, value in values.items()}
    results = {f"q3-{name}-full-seed{n}": runs[name] for name in q3.NAMES for n in q3.SEEDS}
    results["q3-transformer-full-noclock"] = runs["noclock"]
    assert q3.share_of_architecture(results, 0.7) == 0.75
    assert q3.share_of_architecture(results, 0.85) == 0.5
    assert q3.mean_above(runs["noclock"], 0.8) == pytest.approx(2.6 / 3)


def test_the_loss_that_smoothing_asks_for():
    """The best loss under smoothed targets, found by training nothing but the logits."""
    logits = torch.zeros(1, 35, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", max_iter=200)
    target = torch.tensor([3])

    def smoothed():
        optimizer.zero_grad()
        loss = F.cross_entropy(logits, target, label_smoothing=0.1)
        loss.backward()
        return loss

    optimizer.step(smoothed)
    plain = F.cross_entropy(logits, target).item()
    assert q3.smoothed_loss(0.1) == pytest.approx(plain, abs=1e-3)


# --------------------------------------------------------------------------- README and submission
FILLED = """course = "Deep Learning"\ntitle = "Homework 2"\ngroup = "G07"
members = ["Ada Lovelace, 1"]\ncontributions = "Ada did everything."\n"""
PRIVATE = ("notes.txt", "data/octmnist.npz", ".venv/x.py", "report/checkpoints/q3.pt")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A ROOT for the report: the code, and files around it that must not be submitted."""
    root = tmp_path / "project"
    for pattern in submission.CODE:
        for path in ROOT.glob(pattern):
            (root / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path.relative_to(ROOT))
    for name in PRIVATE:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("not to be submitted")
    for folder in ("results", "figures"):
        shutil.copytree(ROOT / "report" / folder, root / "report" / folder)
    (root / "report" / "group.toml").write_text(FILLED)
    monkeypatch.setattr(lib, "ROOT", root)
    return root


def test_zip_holds_the_report_and_the_code(project):
    submission.main(None)
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
        ('"G07"', '"../G07"', "group"),
        ('["Ada Lovelace, 1"]', "[]", "members"),
        ('"Ada did everything."', '" "', "contributions"),
        ("members = [", "members = ", "group.toml"),
    ],
)
def test_placeholder_blocks_the_submission(project, old, new, word):
    (project / "report" / "group.toml").write_text(FILLED.replace(old, new))
    with pytest.raises(UserError, match=word):
        submission.main(None)
    assert not list(project.glob("*.zip"))


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('group = "G07"', "group = 42", "group must be text"),
        ('members = ["Ada Lovelace, 1"]', 'members = "Ada"', "members must be a list of texts"),
        ('members = ["Ada Lovelace, 1"]', "members = [1]", "members must be a list of texts"),
        ('contributions = "Ada', 'contributions = ["Ada', "contributions must be text"),
    ],
)
def test_an_entry_of_another_kind_is_one_sentence(project, old, new, said):
    text = FILLED.replace(old, new)
    if new.endswith('["Ada'):
        text = text.rstrip() + "]\n"
    (project / "report" / "group.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        make.read_group()


def test_a_name_beyond_the_reports_fonts_is_set_in_this_machines(project, capsys):
    text = FILLED.replace("Ada Lovelace, 1", "李华 (1)")
    (project / "report" / "group.toml").write_text(text, encoding="utf-8")
    assert make.needs_other_fonts(make.read_group())
    assert "lack 华 李: those of this machine are used" in capsys.readouterr().out
    assert not make.needs_other_fonts({"members": ["Zoë Čapek, Αθηνά, Иван (1)"]})


def test_a_missing_result_is_one_sentence_and_a_fault_in_code_a_traceback(results, monkeypatch):
    fewer = lib.Results(results)
    del fewer["q1"]
    with pytest.raises(UserError, match=r"there is no result q1\.json"):
        make.all_numbers(fewer)
    monkeypatch.setattr(q1, "numbers", lambda results: {}["a name mistyped"])
    with pytest.raises(KeyError):
        make.all_numbers(results)


def test_the_committed_group_is_a_placeholder():
    group = tomllib.loads((ROOT / "report" / "group.toml").read_text())
    with pytest.raises(UserError, match="has not been filled in"):
        submission.check_group(group)


def test_readme_and_card_are_current(project):
    pages = ("README.md", "report/models/README.md")
    (project / "report" / "models").mkdir()
    shutil.copy(ROOT / pages[1], project / pages[1])
    shutil.copy(ROOT / "report" / "group.toml", project / "report")
    figures = project / "report" / "figures"  # the pages are those with all figures
    shutil.copytree(ROOT / "report" / "figures", figures, dirs_exist_ok=True)
    readme.main(None)
    for page in pages:
        assert (project / page).read_text() == (ROOT / page).read_text(), "run `make readme`"
    (project / "README.md").write_text("no markers")
    with pytest.raises(UserError, match="markers"):
        readme.main(None)
