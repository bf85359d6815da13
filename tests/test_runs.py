"""runs.py: flags, settings, errors in one sentence, results, checkpoints, many processes."""

import argparse
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time

import runs
from conftest import POSIX, ROOT, assert_one_sentence, restore_interrupts, run_python
from runs import UserError

import numpy as np
import pytest
import torch


# ----------------------------------------------------------------------------- flags and settings
def test_numbers_have_limits():
    parse = runs.number(float, low=-2, above=-3, below=1)
    assert [parse(text) for text in ("-2", "0.5")] == [-2, 0.5]
    for text in ("-2.5", "1", "nan", "-inf"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not at least -2"):
            parse(text)


def test_a_seed_is_what_numpy_and_torch_take():
    assert [runs.SEED(text) for text in ("0", "4294967295")] == [0, 2**32 - 1]
    for text in ("-1", "4294967296", "best"):
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            runs.SEED(text)
    assert runs.number(float, or_word="best")("best") == "best"


def write_notebook(folder, *cells):
    """A notebook of these (tag, source) cells; returns its path."""
    path = folder / "a.ipynb"
    cells = [
        {"cell_type": "code", "metadata": {"tags": [tag] if tag else []}, "source": [source]}
        for tag, source in cells
    ]
    path.write_text(json.dumps({"cells": cells}))
    return path


PARAMETERS = ("parameters", "epochs: int = 15\nrate = 0.5")


def test_definitions_of_a_notebook(tmp_path, monkeypatch):
    """What cells define, with these parameters and nothing of the environment."""
    cells = (
        ("define", "%matplotlib inline\nimport os\n!ls\ndef double(x): return 2 * x"),
        PARAMETERS,
        ("define", "used = (epochs, rate)"),
        (None, "%%time\nWINDOW = 16\nclass Helper:\n    size = 2 * WINDOW"),
        (None, "found = double(4)\nraise RuntimeError"),
        (None, "%%bash\necho no Python"),
    )
    path = write_notebook(tmp_path, *cells)
    monkeypatch.setenv("EPOCHS", "3")
    assert runs.parameters_of(path) == {"epochs": 15, "rate": 0.5}
    defined = runs.load_definitions(path, rate=2.0)
    assert defined.double(4) == 8 and defined.used == (15, 2.0)
    assert defined.Helper.size == 32 and not hasattr(defined, "found")
    with pytest.raises(UserError, match="has no parameter epoch; it has epochs, rate"):
        runs.load_definitions(path, epoch=1)


@pytest.mark.parametrize("n_cells", [0, 2])
def test_a_lost_or_copied_tag_is_one_sentence(tmp_path, n_cells):
    path = write_notebook(tmp_path, ("define", "x = 1"), *[PARAMETERS] * n_cells)
    for read in (runs.parameters_of, runs.load_definitions):
        with pytest.raises(UserError, match=f'has {n_cells} cells tagged "parameters"; give that'):
            read(path)


def test_auto_takes_a_gpu_only_if_it_can_compute(monkeypatch, capsys):
    """As on a card for which this torch has no kernels."""

    def refuse(*_, **__):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", refuse)
    assert runs.pick_device("auto") == torch.device("cpu")
    assert "no kernel image is available" in capsys.readouterr().err


def test_devices_and_their_indices():
    assert runs.pick_device("cpu") == torch.device("cpu")
    assert runs.pick_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "tpu", "cpu:1", "cuda:x"):
        with pytest.raises(UserError, match=name):
            runs.pick_device(name)


def draw():
    return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002


def test_a_seed_is_that_of_python_numpy_and_torch():
    torch.backends.cudnn.deterministic = False
    runs.configure_seed(5)
    assert torch.backends.cudnn.deterministic
    first = draw()
    assert all(a != b for a, b in zip(draw(), first, strict=True))
    runs.configure_seed(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))
    runs.configure_seed(5)
    assert draw() == first


def test_training_goes_on_with_the_draws_that_would_have_come(tmp_path):
    torch.manual_seed(0)
    state = runs.random_state()
    draws = torch.rand(3)
    runs.save_checkpoint(tmp_path / "state.pt", state)
    torch.manual_seed(9)
    runs.set_random_state(runs.load_checkpoint(tmp_path / "state.pt"))
    assert torch.equal(torch.rand(3), draws)


# --------------------------------------------------------------------------------------- results
def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "new" / "a.json"
    with runs.write_atomically(path) as temporary:
        temporary.write_text("first")
    with pytest.raises(ZeroDivisionError), runs.write_atomically(path) as temporary:
        temporary.write_text("sec")
        1 / 0  # noqa: B018
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    runs.check_writable(tmp_path / "out")
    assert list((tmp_path / "out" / "results").iterdir()) == []


def test_results_come_back_and_damaged_ones_are_one_sentence(tmp_path):
    assert runs.git_commit() is None or len(runs.git_commit().removesuffix("-dirty")) == 40
    result = runs.new_result("q1", "q1", "make q1", {"seed": 42}, {"source": "none"}, "cpu")
    result["test"]["loss"] = float("nan")
    result["seconds"] = np.float64(1.5)
    runs.save_result(tmp_path, result)
    loaded = runs.load_result(tmp_path, "q1")
    assert loaded == {**result, "test": {"loss": None}} and loaded["status"] == "interrupted"
    file = tmp_path / "results" / "q1.json"
    for content, said in ((file.read_text()[:50], "damaged"), ("[]", "is no results file")):
        file.write_text(content)
        with pytest.raises(UserError, match=rf"q1\.json.* {said}; delete it, then run make q1"):
            runs.load_result(tmp_path, "q1", "make q1")
    with pytest.raises(UserError, match="does not exist; run make q2 first"):
        runs.load_result(tmp_path, "q2", "make q2")


def test_numbers_come_back_as_they_are_and_others_as_null(tmp_path):
    whole = {"text": "±", "none": None, "yes": True, "n": 10**12, "x": 0.1 + 0.2, "list": [[1, 2]]}
    lists = {"inf": [1.0, math.inf, {"nan": math.nan}], "pair": (0.5, -math.inf)}
    runs.save_result(tmp_path, {"question": "q1", "run": "a", **whole, **lists})
    loaded = runs.load_result(tmp_path, "a")
    assert loaded == {
        "question": "q1",
        "run": "a",
        **whole,
        "inf": [1.0, None, {"nan": None}],
        "pair": [0.5, None],
    }


def test_a_new_result_is_what_it_was_given_and_nothing_has_finished(monkeypatch):
    monkeypatch.setattr(runs, "environment", lambda device: {"device": device})
    config, data = {"seed": 42, "epochs": 3}, {"source": "none"}
    assert runs.new_result("q1", "q1-a", "make q1", config, data, "cpu") == {
        "question": "q1",
        "run": "q1-a",
        "command": "make q1",
        "config": config,
        "seed": 42,
        "status": "interrupted",
        "data": data,
        "environment": {"device": "cpu"},
        "seconds": 0.0,
        "epochs": [],
        "test": {},
    }


def test_the_environment_is_that_of_this_process(monkeypatch):
    monkeypatch.setattr(runs, "git_commit", lambda: "a commit")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    found = runs.environment(torch.device("cpu"))
    torch.set_num_threads(before)
    assert found == {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": torch.__version__,
        "device": "cpu",
        "threads": 3,
        "processor": found["processor"],
        "commit": "a commit",
    }
    assert found["processor"].endswith(f", {runs.usable_cpus()} cores")


@pytest.mark.skipif(not shutil.which("git"), reason="there is no git here")
def test_the_commit_says_when_files_were_edited_since(tmp_path, monkeypatch):
    def git(*words):
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(
            ["git", *name, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert runs.git_commit() is None
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    git("init")
    git("add", "a.py")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "a tag, which is no commit")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "results.json").write_text("{}\n")  # what git does not know is no edit
    assert len(commit) == 40 and runs.git_commit() == commit
    model = tmp_path / "report" / "models" / "q3-lstm.pt"
    model.parent.mkdir(parents=True)
    model.write_text("weights")
    git("add", "report")
    assert runs.git_commit() == commit  # a model that is made names the commit that makes it
    git("reset")
    file.write_text("x = 2\n")
    assert runs.git_commit() == f"{commit}-dirty"
    git("add", "a.py")
    assert runs.git_commit() == f"{commit}-dirty"
    git("commit", "-m", "second")
    commit, first = git("rev-parse", "HEAD"), commit
    assert runs.git_commit() == commit != first

    results = tmp_path / "report" / "results"
    results.mkdir(parents=True)
    (results / "q1.json").write_text("{}\n")
    git("add", "report")
    assert runs.git_commit() == commit  # making results again is no edit of the code
    file.write_text("x = 3\n")
    assert runs.git_commit() == f"{commit}-dirty"


# ------------------------------------------------------------------------------------ checkpoints
def test_a_checkpoint_comes_back_and_a_damaged_one_says_so(tmp_path):
    path = tmp_path / "checkpoints" / "run.pt"
    with pytest.raises(UserError, match="no checkpoint"):
        runs.load_checkpoint(path)
    for epoch in (1, 2):  # the second in place of the first
        runs.save_checkpoint(path, {"weights": torch.arange(100) * epoch, "epoch": epoch})
    loaded = runs.load_checkpoint(path)
    assert loaded["epoch"] == 2 and torch.equal(loaded["weights"], torch.arange(100) * 2)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        runs.load_checkpoint(path)


def test_weights_fit_all_or_not_at_all():
    """An LSTM's weights would fill three quarters of a GRU's."""
    lstm, gru = torch.nn.LSTM(3, 4), torch.nn.GRU(3, 4)
    before = gru.weight_ih_l0.clone()
    with pytest.raises(UserError, match=r"run\.pt is of another model: it differs in bias_hh_l0"):
        runs.load_weights(gru, lstm.state_dict(), "run.pt")
    assert torch.equal(gru.weight_ih_l0, before)
    other = torch.nn.LSTM(3, 4)
    runs.load_weights(other, lstm.state_dict(), "run.pt")
    for name, weights in other.state_dict().items():
        assert torch.equal(weights, lstm.state_dict()[name])


def test_an_unfinished_checkpoint_is_kept_under_another_name(tmp_path, capsys):
    for content in ("first", "second"):
        (tmp_path / "run.pt").write_text(content)
        runs.set_aside(tmp_path / "run.pt")
    assert (tmp_path / "run-old1.pt").read_text() == "first"
    assert (tmp_path / "run-old2.pt").read_text() == "second"
    assert "kept as run-old2.pt" in capsys.readouterr().out


# -------------------------------------------------------------------------------- many processes
def square(x):
    if x == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02 * (x == 0))  # the first is the last to end
    return x * x


def test_work_side_by_side_keeps_its_order_and_a_killed_worker_is_one_sentence():
    squares = runs.side_by_side(square, [(i,) for i in range(5)], n_processes=2)
    assert list(squares) == [0, 1, 4, 9, 16]
    with pytest.raises(UserError, match="a worker process was killed"):
        list(runs.side_by_side(square, [(1,), (13,)], n_processes=2))


# ------------------------------------------------------------------------- errors in one sentence
def write_script(folder, body, before=""):
    """A script of its own whose `main` has this body; returns its path."""
    path = folder / "script.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{before}\n"
        f"import runs\n\ndef main(args):\n    {body}\n\n"
        "runs.run_script(main, runs.ArgumentParser('a test'), 'a smaller -size', 'go on')\n"
    )
    return path


@pytest.mark.parametrize(
    "error, said",
    [
        (UserError("no data; make some."), "no data; make some."),
        (OSError(28, "No space left on device"), "the disk is full; make room on it"),
        (MemoryError(), "too little memory; try a smaller -size."),
    ],
)
def test_errors_have_a_sentence(error, said):
    assert said in runs.sentence_of(error, "a smaller -size")


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), FileNotFoundError(2, "No", "a"), KeyError()]
)
def test_a_fault_in_code_has_none(error):
    assert runs.sentence_of(error) is None


def test_files_that_cannot_be_read_or_written_are_one_sentence(tmp_path):
    """Said where that happens, whoever called."""
    (tmp_path / "file").touch()
    below = tmp_path / "file" / "below"
    for use in (
        lambda: runs.read_text(below),
        lambda: runs.check_writable(below),
        lambda: runs.save_result(below, {"run": "a"}),
        lambda: runs.is_whole_zip(tmp_path),
        lambda: runs.read_cells(below),
    ):
        with pytest.raises(UserError, match=r"file.*; check that path and its disk"):
            use()


def test_a_missing_package_keeps_its_traceback_and_python_goes_on(tmp_path):
    """`runs` installs no hook for exceptions."""
    lines = "import runs\nimport no_such_package\nprint('goes on')\n"
    process = run_python("-i", "-c", "", input=lines)
    assert "No module named 'no_such_package'" in process.stderr
    assert process.stdout.endswith("goes on\n")


def test_the_command_is_recorded_as_it_was_typed(tmp_path):
    path = write_script(tmp_path, "print(runs.command_line())")
    process = run_python(path)
    assert process.stdout == f"python {path}\n"
    process = run_python("-m", "script", cwd=tmp_path)
    assert process.stdout == "python -m script\n"


def test_what_a_person_can_put_right_is_one_sentence_and_status_2(tmp_path):
    process = run_python(write_script(tmp_path, "raise runs.UserError('no data; make some.')"))
    assert_one_sentence(process)
    assert process.stderr == "script.py: no data; make some.\n"


def test_unknown_flags_are_one_sentence(capsys):
    with pytest.raises(SystemExit) as ended:
        runs.ArgumentParser("a test").parse_args(["-nonsense"])
    stderr = capsys.readouterr().err
    assert ended.value.code == 2 and stderr.count("\n") == 1
    assert "unrecognized arguments: -nonsense; -h explains all flags" in stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device here")
@pytest.mark.parametrize("n_letters", [1, 100_000])
def test_a_full_standard_output_is_not_success(tmp_path, n_letters):
    """Whether it shows while printing, or when the buffer is written at the end."""
    path = write_script(tmp_path, f"print('x' * {n_letters})")
    command = f"exec {shlex.join([sys.executable, str(path)])} > /dev/full"
    process = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "the disk is full" in process.stderr


@POSIX
def test_workers_end_when_their_parent_is_interrupted(tmp_path):
    """They hold the other end of its pipe, which is read until nobody does."""
    rest = "import time\ndef rest(i):\n    print('rests\\n', end='', flush=True); time.sleep(600)"
    path = write_script(tmp_path, "list(runs.side_by_side(rest, [(0,), (1,)], 2))", rest)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, path], **pipes, preexec_fn=restore_interrupts)
    assert [process.stdout.readline() for _ in range(2)] == ["rests\n", "rests\n"]
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 2 and stderr == "script.py: interrupted; go on.\n"


# ----------------------------------------------------------------------------------- surroundings
@pytest.mark.skipif(not shutil.which("head"), reason="there is no head here")
@pytest.mark.parametrize(
    "body",
    [
        "for i in range(100_000): print('line', i)",
        "print('line 0', flush=True); list(runs.side_by_side(print, [('x' * 9_999,)] * 99, 2))",
    ],
)
def test_head_ends_it_without_a_word(tmp_path, body):
    """Also where its workers print."""
    path = write_script(tmp_path, body)
    command = f"{shlex.join([sys.executable, str(path)])} | head -n 1"
    process = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert process.stdout == "line 0\n" and process.stderr == ""


NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
NAMELESS = "import pwd\ndef nobody(uid): raise KeyError(uid)\npwd.getpwuid = nobody"


@POSIX
def test_an_account_without_a_name_and_without_a_home_can_run(tmp_path):
    body = "import getpass, torch, utils; utils.pyplot().figure(); print(getpass.getuser())"
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    kept["HOME"] = f"{os.devnull}/home"  # nothing can be written there
    process = run_python(write_script(tmp_path, body, NAMELESS), env=kept)
    assert process.returncode == 0 and process.stdout == "nobody\n", process.stderr


def test_a_terminal_without_the_letters_gets_others(tmp_path):
    plain = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    process = run_python(write_script(tmp_path, "print('0.5 \\u00b1 0.1')"), env=plain)
    assert process.returncode == 0 and process.stdout == "0.5 ? 0.1\n"
