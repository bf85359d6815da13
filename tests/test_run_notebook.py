"""tools/run_notebook.py: what is printed and saved, and how it ends when a cell fails."""

import signal
import subprocess
import sys

from conftest import POSIX, ROOT, assert_one_sentence, restore_interrupts, run_python
from tools import run_notebook

import nbformat
import pytest

ON_ANOTHER_NOTEBOOK = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
import runs
from tools import run_notebook
run_notebook.NOTEBOOK = Path(sys.argv.pop(1))
runs.run_script(run_notebook.main, run_notebook.make_parser(), "", run_notebook.go_on())
"""
START = f"""import sys
sys.path.insert(0, {str(ROOT)!r})
import runs
runs.say_errors_in_one_sentence("hw2-q3.ipynb")
"""
PARAMETERS = "data = 'sample'\nout = None\nepochs: int = 15\ndecoders = ('lstm', 'transformer')"


def write_notebook(folder, *sources):
    """A notebook of a first cell, one of parameters and these; returns its path."""
    cells = [nbformat.v4.new_code_cell(source) for source in (START, PARAMETERS, *sources)]
    cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "tiny.ipynb")
    return folder / "tiny.ipynb"


def execute(folder, *sources, words=()):
    """Execute a notebook of these cells as a process of its own: (process, executed copy)."""
    path = write_notebook(folder, *sources)
    (folder / "tool.py").write_text(ON_ANOTHER_NOTEBOOK)
    process = run_python(folder / "tool.py", path, f"out={folder / 'out'}", *words)
    copy = folder / "out" / "tiny.ipynb"
    return process, nbformat.read(copy, as_version=4) if copy.exists() else None


def test_parameters_go_into_the_copy_alone(tmp_path):
    """So an edit of the notebook's own cell counts; the copy says what was given."""
    told = "print(data, epochs, decoders, '|', runs.COMMAND)"
    words = ("epochs=5", "decoders=lstm")
    process, copy = execute(tmp_path, told, words=words)
    assert process.returncode == 0, process.stderr
    settings, command = process.stdout.splitlines()[0].split(" | ")
    assert settings == "sample 5 lstm"
    assert command.startswith("python ") and command.endswith("epochs=5 decoders=lstm")
    assert "epochs = 5\ndecoders = 'lstm'" in copy.cells[2].source
    own = nbformat.read(tmp_path / "tiny.ipynb", as_version=4)
    assert len(own.cells) == 3 and not any(cell.outputs for cell in own.cells)

    process, _ = execute(tmp_path, told, words=(*words, "-keep_outputs"))
    own = nbformat.read(tmp_path / "tiny.ipynb", as_version=4)
    assert [cell.execution_count for cell in own.cells] == [1, 2, 3]
    assert own.cells[1].source == PARAMETERS and "sample 5 lstm" in own.cells[2].outputs[0].text


@pytest.mark.parametrize("word", ["epoch=5", "EPOCHS=5", "5", "-epochs"])
def test_an_unknown_parameter_is_refused_before_anything_runs(tmp_path, word):
    process, copy = execute(tmp_path, "print('never')", words=(word,))
    assert_one_sentence(process)
    assert process.stdout == "" and copy is None


def test_results_and_copy_go_to_the_same_place():
    """Where only the data are named, too."""
    given = run_notebook.read_parameters(["data=/there/my data"])
    assert given == {"data": "/there/my data", "out": "build/my data"}
    given = run_notebook.read_parameters(["out=123", "learning_rate=0.5"])
    assert given == {"out": "123", "learning_rate": 0.5, "data": "sample"}


def test_what_cells_print_appears_and_is_saved_without_bars(tmp_path):
    bar = "import sys\nfor i in range(9): print(f'\\r {i}', end='', file=sys.stderr, flush=True)"
    cells = ("print('line')", bar, "import os; os.getcwd()", "import sys; sys.prefix")
    process, copy = execute(tmp_path, *cells)
    assert process.returncode == 0, process.stderr
    first, last = process.stdout.splitlines()
    assert (first, last) == ("line", f"Executed copy: {tmp_path / 'out' / 'tiny.ipynb'}")
    assert process.stderr.endswith(" 8")
    assert [cell.execution_count for cell in copy.cells] == [1, 2, 3, 4, 5, 6, 7]
    assert copy.cells[4].outputs[0].text.strip() == "8"  # the last state of a bar, not all
    assert copy.cells[5].outputs[0].data["text/plain"] == repr(str(tmp_path))
    assert copy.cells[6].outputs[0].data["text/plain"] == repr(sys.prefix)  # this environment's


def test_a_mistake_of_the_user_is_said_once(tmp_path):
    failure = "raise runs.UserError('there is no data; make some.')"
    process, _ = execute(tmp_path, failure, "print('never')")
    assert_one_sentence(process)
    assert process.stderr.startswith("hw2-q3.ipynb: there is no data; make some.")
    assert process.stdout == ""


@pytest.mark.parametrize("fault", ["1 / 0", "open('/nowhere/a.txt')", "import no_such_package"])
def test_a_fault_in_a_cell_keeps_its_traceback(tmp_path, fault):
    process, copy = execute(tmp_path, fault, "print('never')")
    assert process.returncode == 2 and process.stdout == ""
    assert "Error" in process.stderr and fault in process.stderr
    assert process.stderr.rstrip().endswith("above and in the saved copy.")
    assert copy.cells[3].outputs[0].output_type == "error"


def test_scripts_run_under_the_magic_run(tmp_path):
    """As people start them in Jupyter: nothing is cut, and what was typed is recorded."""
    script = tmp_path / "script.py"
    script.write_text(
        "import runs\ndef main(args):\n    print('±', runs.command_line())\n"
        "runs.run_script(main, runs.ArgumentParser('a test'))\n"
    )
    process, _ = execute(tmp_path, f"%run {script}", "print('and goes on')")
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[:2] == [f"± python {script}", "and goes on"]


@POSIX
def test_killed_kernel_is_one_sentence(tmp_path):
    process, _ = execute(tmp_path, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert_one_sentence(process)
    assert "kernel was killed" in process.stderr and "resume=1` goes on" in process.stderr


@POSIX
def test_an_interrupt_keeps_what_was_executed(tmp_path):
    """It ends only when the kernel has ended, too, which holds the other end of the pipes."""
    path = write_notebook(tmp_path, "print('busy', flush=True)\nwhile True: pass")
    (tmp_path / "tool.py").write_text(ON_ANOTHER_NOTEBOOK)
    process = subprocess.Popen(
        [
            sys.executable,
            str(tmp_path / "tool.py"),
            str(path),
            f"out={tmp_path / 'out'}",
            "epochs=3",
        ],
        cwd=ROOT,
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
    command = stderr.split("`")[1]  # what it says works: given again, with one word more
    assert command.startswith(sys.executable) and command.endswith("epochs=3 resume=1")
