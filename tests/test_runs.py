"""runs.py: flags, settings, results, checkpoints, the hash of code, and work on many processes."""

import argparse
import dataclasses
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import runs
from conftest import POSIX, ROOT, restore_interrupts, run_python
from runs import UserError

import psutil
import pytest
import torch


# ----------------------------------------------------------------------------- flags and settings
@pytest.mark.parametrize(
    "limits, good, bad",
    [
        ({"low": 1}, ["1", "7"], ["0", "-1"]),
        ({"above": 0, "below": 1}, ["0.5"], ["0", "1", "nan", "inf"]),
        ({"high": 2}, ["2", "-9"], ["3"]),
    ],
)
def test_numbers_have_limits(limits, good, bad):
    parse = runs.number(float, **limits)
    assert [parse(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match="is not"):
            parse(text)


@dataclasses.dataclass(frozen=True)
class Settings:
    epochs: int = 15
    rate: float = 0.5
    folder: str = "here"
    kinds: tuple = ("a", "b")


def read(monkeypatch, **environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return runs.read_settings(Settings, epochs=runs.number(int, 1), kinds=runs.words("a", "b"))


def test_settings_come_from_the_environment(monkeypatch):
    assert read(monkeypatch) == Settings()
    chosen = read(monkeypatch, EPOCHS="3", RATE="2", FOLDER="my data", KINDS="b")
    assert chosen == Settings(3, 2.0, "my data", ("b",))


@pytest.mark.parametrize("name, value", [("EPOCHS", "0"), ("EPOCHS", "many"), ("KINDS", "a,c")])
def test_bad_settings_are_named(monkeypatch, name, value):
    with pytest.raises(UserError, match=name):
        read(monkeypatch, **{name: value})


def test_devices_and_their_indices():
    assert runs.pick_device("cpu") == torch.device("cpu")
    assert runs.pick_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "tpu", "cpu:1", "cuda:x"):
        with pytest.raises(UserError, match=name):
            runs.pick_device(name)


# ------------------------------------------------------------------------------------ checkpoints
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoints" / "run.pt"
    runs.save_checkpoint(path, {"config": 1}, {"epoch": 1})

    def full(self, data):
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(runs.UserError, match="No space left"):
        runs.save_checkpoint(path, {"config": 1}, {"epoch": 2})
    assert runs.load_checkpoint(path, {"config": 1}) == {"epoch": 1}
    assert list(path.parent.iterdir()) == [path]


def test_edited_code_starts_anew_and_keeps_the_old_checkpoint(tmp_path, capsys):
    path = tmp_path / "run.pt"
    runs.save_checkpoint(path, {"config": 1, "code": "aaaa"}, {"epoch": 1})
    assert runs.load_checkpoint(path, {"config": 1, "code": "aaaa"}) == {"epoch": 1}
    assert runs.load_checkpoint(path, {"config": 1, "code": "bbbb"}) is None
    assert "its code (or Python) has changed" in capsys.readouterr().out
    assert runs.load_checkpoint(tmp_path / "run-code-aaaa.pt") == {"epoch": 1}
    runs.save_checkpoint(path, {"config": 1, "code": "aaaa"}, {"epoch": 1})
    with pytest.raises(UserError, match="other code and config"):
        runs.load_checkpoint(path, {"config": 2, "code": "bbbb"})


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_checkpoint_is_not_called_damaged(tmp_path):
    path = tmp_path / "run.pt"
    runs.save_checkpoint(path, {}, {})
    path.chmod(0)
    with pytest.raises(UserError, match=r"cannot read .*Permission denied"):
        runs.load_checkpoint(path)


def test_a_damaged_checkpoint_says_so(tmp_path):
    path = tmp_path / "run.pt"
    runs.save_checkpoint(path, {}, {"weights": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        runs.load_checkpoint(path)


# ------------------------------------------------------------------------ has the code been edited?
BASE = """
from dataclasses import dataclass, field
LIMIT = 3
NAMES = {"a": [1, 2]}
class Cache:
    def grow(self):
        return 5
@dataclass
class State:
    cache: Cache = field(default_factory=Cache)
def helper(x, y=2, *, z=1):
    "What it does."
    return x * y * z + len(NAMES)
class Layer:
    size = 4
    def forward(self, x):
        return helper(x) + LIMIT + State().cache.grow()
    @property
    def width(self):
        return self.size
def train(x):
    names = [name for name in ("a", "b") if name in {"a", "b", "c"}]
    return Layer().forward(x), names
def plot(x):
    return x
"""


def hash_of(source):
    namespace = {"__name__": "somewhere"}
    exec(compile(source, "cell", "exec"), namespace)
    return runs.code_hash(namespace["train"], namespace["Layer"])


@pytest.mark.parametrize(
    "old, new",
    [
        ("x * y", "x + y"),  # a function that a method calls
        ("y=2", "y=3"),  # its default
        ("z=1", "z=2"),  # one that is given by name alone
        ("[1, 2]", "[1, 3]"),  # a dictionary
        ("return 5", "return 6"),  # a method of what makes a dataclass's default
        ("LIMIT = 3", "LIMIT = 4"),  # a constant
        ("size = 4", "size = 5"),  # of a class
        ("return self.size", "return self.size + 1"),  # a property
        ('{"a", "b", "c"}', '{"a", "b", "d"}'),  # inside a comprehension
    ],
)
def test_an_edit_changes_the_hash(old, new):
    assert old in BASE
    assert hash_of(BASE.replace(old, new)) != hash_of(BASE)


def test_comments_layout_and_what_is_not_used_do_not_change_the_hash():
    edited = "# a comment\n\n" + BASE.replace("x * y * z", "(x * y  # why\n     * z)")
    edited = edited.replace("What it does.", "What it really does.")
    edited = edited.replace("def plot(x):\n    return x", "def plot(x):\n    return 2 * x")
    assert edited != BASE and hash_of(edited) == hash_of(BASE)


def test_what_is_left_out_does_not_change_the_hash():
    def hash_without_cache(source):
        namespace = {"__name__": "somewhere"}
        exec(compile(source, "cell", "exec"), namespace)
        return runs.code_hash(namespace["train"], without=[namespace["Cache"]])

    edited = BASE.replace("return 5", "return 6")
    assert hash_without_cache(edited) == hash_without_cache(BASE) != hash_of(BASE)


def test_the_hash_is_the_same_in_every_process():
    """Python orders the elements of a set differently in each process."""
    code = (
        "import sys; sys.path[:0] = ['.', 'tests']; from test_runs import *; print(hash_of(BASE))"
    )
    hashes = {run_python("-c", code).stdout for _ in range(2)}
    assert hashes == {hash_of(BASE) + "\n"}


# -------------------------------------------------------------------------------- many processes
def square(x):
    return x * x


def test_work_side_by_side_keeps_its_order():
    assert list(runs.side_by_side(square, [(i,) for i in range(7)], n_processes=2)) == [
        0, 1, 4, 9, 16, 25, 36,
    ]  # fmt: skip


def script(tmp_path, body):
    """A script of its own that uses runs.py; returns its path."""
    path = tmp_path / "script.py"
    root = f"os.fsdecode({os.fsencode(ROOT)!r})"  # also where no umlaut can be written
    path.write_text(f"import os, sys\nsys.path.insert(0, {root})\n" + textwrap.dedent(body))
    return path


WORK = """
import os, signal, time
import runs

def work(i):
    if i == 1 and KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    print(os.getpid(), flush=True)
    time.sleep(SECONDS)

def main(args):
    list(runs.side_by_side(work, [(0,), (1,)], 2, after_a_kill="use fewer -jobs"))

if __name__ == "__main__":
    runs.run_script(main, runs.ArgumentParser("a test"))
"""


@POSIX
def test_a_killed_worker_ends_in_one_sentence(tmp_path):
    path = script(tmp_path, "KILL, SECONDS = True, 0.1\n" + WORK)
    process = run_python(path)
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert "want of memory; use fewer -jobs" in process.stderr


@POSIX
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_workers_end_with_their_parent(tmp_path, name):
    path = script(tmp_path, "KILL, SECONDS = False, 60\n" + WORK)
    restore = {"preexec_fn": restore_interrupts}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, path], **pipes, **restore)
    workers = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=30)
    if name != "SIGKILL":
        assert process.returncode == 2 and stderr.count("\n") == 1 and "interrupted" in stderr
    deadline = time.monotonic() + 30
    while any(map(psutil.pid_exists, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_never_more_processes_than_jobs_or_processors(monkeypatch):
    import joblib

    asked = []

    class Parallel:
        def __init__(self, n_processes, **_):
            asked.append(n_processes)

        def __call__(self, jobs):
            return [function(*arguments) for function, arguments, _ in jobs]

    monkeypatch.setattr(joblib, "Parallel", Parallel)
    monkeypatch.setattr(runs, "usable_cpus", lambda: 4)
    for n_jobs in (1, 3, 100):
        list(runs.side_by_side(square, [(i,) for i in range(n_jobs)]))
    assert asked == [1, 3, 4]


# ----------------------------------------------------------------------------------- surroundings
@pytest.mark.skipif(not shutil.which("head"), reason="there is no head here")
def test_a_reader_that_goes_away_ends_nothing(tmp_path):
    path = script(
        tmp_path,
        """
        import runs
        from pathlib import Path

        def main(args):
            for i in range(20_000):
                print("line", i, flush=True)
            Path("finished").touch()

        runs.run_script(main, runs.ArgumentParser("a test"))
        """,
    )
    command = f"{shlex.join([sys.executable, str(path)])} | head -n 1"
    process = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout == "line 0\n" and process.stderr == ""
    assert (tmp_path / "finished").exists()


@pytest.mark.skipif(not str(ROOT).isascii(), reason="torch itself needs UTF-8 in such a folder")
def test_a_terminal_without_the_sign_gets_plain_letters(tmp_path):
    path = script(tmp_path, "import runs\nprint('0.5 ± 0.1 … “é”')")
    plain = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    plain.pop("PYTHONIOENCODING", None)
    process = run_python(path, env=plain)
    assert process.returncode == 0 and process.stdout == '0.5 +- 0.1 ... "?"\n'


@pytest.mark.skipif(os.name != "posix", reason="names come from elsewhere on Windows")
def test_a_user_without_a_name_can_run(tmp_path):
    path = script(
        tmp_path,
        """
        import getpass, pwd
        def nobody(uid):
            raise KeyError(uid)
        pwd.getpwuid = nobody
        import runs
        import torch
        print(getpass.getuser())
        """,
    )
    names = ("LOGNAME", "USER", "LNAME", "USERNAME")
    nameless = {key: value for key, value in os.environ.items() if key not in names}
    process = run_python(path, env=nameless)
    assert process.returncode == 0 and process.stdout == "nobody\n", process.stderr


@POSIX
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_stop_during_the_imports_is_one_sentence(tmp_path, name):
    """A copy of runs.py beside a `torch` whose import takes long and is interrupted."""
    shutil.copy(ROOT / "runs.py", tmp_path)
    (tmp_path / "transcribe.py").write_text("import runs")
    stop = f"os.kill(os.getpid(), signal.{name})"
    (tmp_path / "torch.py").write_text(f"import os, signal, time\n{stop}\ntime.sleep(30)")
    process = run_python(tmp_path / "transcribe.py")
    assert process.returncode == 2
    assert process.stderr == "transcribe.py: interrupted; give the command again.\n"


def test_errors_name_the_command_that_explains_the_flags():
    process = run_python("-m", "tools.make_sample_data", "-nonsense")
    assert process.returncode == 2
    assert "`python -m tools.make_sample_data -h` explains all flags" in process.stderr
    process = run_python(ROOT / "hw2-q2.py", "-nonsense")
    assert "`python hw2-q2.py -h` explains all flags" in process.stderr
