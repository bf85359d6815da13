"""tools/run_notebook.py: what is printed and saved, and how it ends when a cell fails."""

import os
import signal
import subprocess
import sys

from conftest import POSIX, ROOT, assert_one_sentence, restore_interrupts, run_python

import nbformat

ON_ANOTHER_NOTEBOOK = """import sys
from pathlib import Path
import runs
from tools import run_notebook
run_notebook.NOTEBOOK = Path(sys.argv.pop())
runs.run_script(run_notebook.main, runs.ArgumentParser("a test"))
"""
OUR_ERRORS = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import runs
runs.say_errors_in_one_sentence("hw2-q3.ipynb", "a smaller BATCH_SIZE")
"""


def write_notebook(folder, *sources):
    """A notebook of a cell of settings and these cells; returns its path."""
    cells = [nbformat.v4.new_code_cell(source) for source in ("epochs = 15\nout = 'x'", *sources)]
    cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "tiny.ipynb")
    return folder / "tiny.ipynb"


def execute(folder, *sources, **environment):
    """Execute a notebook of these cells as a process of its own: (process, executed copy)."""
    path = write_notebook(folder, *sources)
    environment = {**os.environ, "OUT": str(folder / "out"), **environment}
    process = run_python("-c", ON_ANOTHER_NOTEBOOK, path, env=environment)
    return process, nbformat.read(folder / "out" / "tiny.ipynb", as_version=4)


def test_what_cells_print_appears_and_is_saved_without_bars(tmp_path):
    bar = "import sys\nfor i in range(9): print(f'\\r {i}', end='', file=sys.stderr, flush=True)"
    told = "import os; print(os.environ['COMMAND'])"
    cells = (told, bar, "import os; os.getcwd()", "import sys; sys.prefix")
    process, copy = execute(tmp_path, *cells, EPOCHS="2")
    assert process.returncode == 0, process.stderr
    command, last = process.stdout.splitlines()
    assert command.startswith(f"make q3 EPOCHS=2 OUT={tmp_path}")  # as one would type it
    assert last == f"Executed copy: {tmp_path / 'out' / 'tiny.ipynb'}"
    assert process.stderr.endswith(" 8")
    assert [cell.execution_count for cell in copy.cells] == [1, 2, 3, 4, 5]
    assert copy.cells[2].outputs[0].text.strip() == "8"  # the last state of a bar, not all
    assert copy.cells[3].outputs[0].data["text/plain"] == repr(str(tmp_path))
    assert copy.cells[4].outputs[0].data["text/plain"] == repr(sys.prefix)  # this environment's


def test_a_mistake_of_the_user_is_said_once(tmp_path):
    failure = "raise runs.UserError('there is no data; make some.')"
    process, _ = execute(tmp_path, OUR_ERRORS, failure, "print('never')")
    assert_one_sentence(process)
    assert process.stderr.startswith("hw2-q3.ipynb: there is no data; make some.")
    assert process.stdout == ""


def test_another_error_is_shown(tmp_path):
    process, copy = execute(tmp_path, OUR_ERRORS, "1 / 0", "print('never')")
    assert process.returncode == 2 and process.stdout == ""
    assert "ZeroDivisionError" in process.stderr
    assert process.stderr.rstrip().endswith("above and in the saved copy.")
    assert copy.cells[2].outputs[0].ename == "ZeroDivisionError"


@POSIX
def test_killed_kernel_is_one_sentence(tmp_path):
    process, _ = execute(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert_one_sentence(process)
    assert "kernel was killed" in process.stderr and "RESUME=1" in process.stderr


@POSIX
def test_an_interrupt_keeps_what_was_executed(tmp_path):
    """It ends only when the kernel has ended, too, which holds the other end of the pipes."""
    path = write_notebook(tmp_path, "print('busy', flush=True)\nwhile True: pass")
    process = subprocess.Popen(
        [sys.executable, "-c", ON_ANOTHER_NOTEBOOK, str(path)],
        cwd=ROOT,
        env={**os.environ, "OUT": str(tmp_path / "out")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore_interrupts,
    )
    assert process.stdout.readline() == "busy\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 2 and stderr.count("\n") == 1, stderr
    assert "interrupted" in stderr and (tmp_path / "out" / "tiny.ipynb").exists()
