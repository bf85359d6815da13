"""tools/run_notebook.py: settings, the way to the kernel, failing cells, and how both end."""

import os
import signal
import subprocess
import sys
import time

from conftest import POSIX, ROOT, assert_one_sentence, restore_interrupts, run_python
from runs import UserError
from tools import run_notebook

import nbformat
import psutil
import pytest
import zmq

PARAMETERS = """from dataclasses import dataclass
LIMIT: int = 3
class Other:
    no_setting: int = 1
@dataclass
class Settings:
    data: str = "sample"  # a comment
    learning_rate: float = 1e-3
    decoders: tuple = ("lstm", "transformer")

    def method(self):
        self.value: int = 1
"""
ON_ANOTHER_NOTEBOOK = """import sys
from pathlib import Path
import runs
from tools import run_notebook
run_notebook.NOTEBOOK = Path(sys.argv.pop())
runs.run_script(run_notebook.main, runs.ArgumentParser("a test"), "give it again")
"""
USER_ERROR = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import runs
runs.say_errors_in_one_sentence("hw2-q3.ipynb")
raise runs.UserError("there is no data; make some.")
"""


def write_notebook(path, *sources, tags=()):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    if tags:
        cells[-1].metadata["tags"] = list(tags)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def run_cells(folder, *sources, **environment):
    """Execute a notebook of these cells as a process of its own; the copy goes to `folder`/out."""
    path = write_notebook(folder / "tiny.ipynb", *sources)
    environment = {**os.environ, "OUT": str(folder / "out"), **environment}
    return run_python("-c", ON_ANOTHER_NOTEBOOK, path, env=environment)


# ---------------------------------------------------------------------------------------- settings
def test_settings_are_the_fields_of_the_dataclass(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "x = 1", PARAMETERS, tags=["define", "parameters"])
    names = run_notebook.settings_of_the_notebook(path)
    assert names == ["DATA", "LEARNING_RATE", "DECODERS"]


@pytest.mark.parametrize("source, tags", [(PARAMETERS, []), ("x = 1", ["parameters"])])
def test_settings_that_are_lost(tmp_path, source, tags):
    path = write_notebook(tmp_path / "a.ipynb", source, tags=tags)
    with pytest.raises(UserError, match=r"a\.ipynb has lost its cell of settings"):
        run_notebook.settings_of_the_notebook(path)


def test_settings_of_the_real_notebook():
    names = run_notebook.settings_of_the_notebook()
    assert {"DATA", "OUT", "EPOCHS", "DECODERS", "LEARNING_RATE", "SEED", "TAG"} <= set(names)


def test_command_is_as_one_would_type_it(monkeypatch):
    for name in run_notebook.settings_of_the_notebook():
        monkeypatch.delenv(name, raising=False)
    assert run_notebook.make_command() == "make q3"
    monkeypatch.setenv("EPOCHS", "5")
    monkeypatch.setenv("DATA", "my data")
    assert run_notebook.make_command() == "make q3 'DATA=my data' EPOCHS=5"


# ------------------------------------------------------------------------------------ the way there
def test_private_sockets_where_they_fit(monkeypatch, tmp_path):
    loopback = {"transport": "tcp", "ip": "127.0.0.1", "transport_encryption": "auto"}
    if os.name == "posix":
        assert run_notebook.connection("/run/x") == {"transport": "ipc", "ip": "/run/x/kernel"}
    assert run_notebook.connection("/run/" + "é" * 50) == loopback  # 100 bytes
    monkeypatch.setattr(zmq, "has", lambda name: False)
    plain = {**loopback, "transport_encryption": "disabled"}
    assert run_notebook.connection("/run/x") == plain


@pytest.mark.parametrize("long", [False, True])
def test_cells_run_and_what_they_print_appears(tmp_path, long):
    """Also where the folder for temporary files has too long a path for sockets."""
    temporary = tmp_path / ("x" * 100 if long else "x")
    temporary.mkdir()
    cells = ("import os, sys", "print('one'); print('two', file=sys.stderr)", "os.getcwd()")
    process = run_cells(tmp_path, *cells, TMPDIR=str(temporary), QUIET="1")
    assert process.returncode == 0
    assert process.stderr == "two\n"
    assert process.stdout == f"one\nExecuted copy: {tmp_path / 'out' / 'tiny.ipynb'}\n"
    executed = nbformat.read(tmp_path / "out" / "tiny.ipynb", as_version=4)
    assert [cell.execution_count for cell in executed.cells] == [1, 2, 3]
    assert executed.cells[2].outputs[0].data["text/plain"] == repr(str(tmp_path))
    assert list(temporary.iterdir()) == []


# ------------------------------------------------------------------------------------------ the end
def test_a_mistake_of_the_user_is_said_once(tmp_path):
    process = run_cells(tmp_path, USER_ERROR, "print('never')")
    assert_one_sentence(process)
    assert process.stderr == "hw2-q3.ipynb: there is no data; make some.\n"
    assert process.stdout == ""
    assert (tmp_path / "out" / "tiny.ipynb").exists()


def test_another_error_is_shown(tmp_path):
    process = run_cells(tmp_path, "print('before')", "1 / 0", "print('never')")
    assert process.returncode == 2 and process.stdout == "before\n"
    assert "ZeroDivisionError" in process.stderr
    assert process.stderr.strip().splitlines()[-1].endswith("above and in the saved copy.")
    executed = nbformat.read(tmp_path / "out" / "tiny.ipynb", as_version=4)
    assert executed.cells[1].outputs[0].ename == "ZeroDivisionError"


@POSIX
def test_killed_kernel_is_one_sentence(tmp_path):
    process = run_cells(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert_one_sentence(process)
    assert "kernel was killed" in process.stderr


@POSIX
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_the_kernel_ends_with_its_parent(tmp_path, name):
    """And the sentence, where there can be one, is that of an interrupted command."""
    busy = "import os; print(os.getpid(), flush=True)\nwhile True:\n    sum(range(1_000_000))"
    path = write_notebook(tmp_path / "tiny.ipynb", busy)
    process = subprocess.Popen(
        [sys.executable, "-c", ON_ANOTHER_NOTEBOOK, str(path)],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path / "out"), "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore_interrupts,
    )
    kernel = int(process.stdout.readline())
    process.send_signal(getattr(signal, name))
    _, stderr = process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(kernel):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if name == "SIGKILL":
        return
    assert process.returncode == 2
    assert stderr == "-c: interrupted; give it again.\n"
    assert (tmp_path / "out" / "tiny.ipynb").exists()


def test_a_bar_is_not_kept_but_what_is_printed_beside_it():
    assert run_notebook.without_bars("epoch 1 done\n") == "epoch 1 done\n"
    assert run_notebook.without_bars("\r 10%|#   |\r 20%|##  |") == ""
    assert run_notebook.without_bars("a warning\n\r 30%|### |\r      \ranother\n") == (
        "a warning\nanother\n"
    )
