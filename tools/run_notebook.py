"""Execute a copy of hw2-q3.ipynb with settings from the environment; save it as OUT/hw2-q3.ipynb.

    DATA=sample OUT=build/sample EPOCHS=5 python -m tools.run_notebook

What the cells print appears as they run. A cell that fails ends it with exit status 2. The copy is
saved either way.
"""

import os
import shlex
import sys
from pathlib import Path

import runs
from runs import UserError

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

NOTEBOOK = runs.ROOT / "hw2-q3.ipynb"
AGAIN = "finished epochs are saved, and RESUME=1 goes on from them"


def make_command(names):
    """The command that is running, as one would type it: what the results files record."""
    given = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    return shlex.join(["make", "q3", *given])


class PrintingClient(NotebookClient):
    """A client that also prints what the cells print, at once."""

    def process_message(self, message, cell, cell_index):
        if message["msg_type"] == "stream":
            content = message["content"]
            stream = sys.stderr if content["name"] == "stderr" else sys.stdout
            print(content["text"], end="", file=stream, flush=True)
        return super().process_message(message, cell, cell_index)


def execute(notebook):
    """Run the cells of `notebook`, which fills in their outputs, in a kernel of their own."""
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}  # where the kernel starts
    client = PrintingClient(notebook, timeout=None, coalesce_streams=True, resources=where)
    client.extra_arguments = ["--log-level=CRITICAL"]  # only what the cells print
    try:
        with client.setup_kernel():  # not `client.execute()`, which takes Ctrl-C away
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index)
    except CellExecutionError as error:
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        if not any(output.output_type == "error" for output in outputs):
            sys.exit(2)  # the notebook has said its sentence instead
        print(error, file=sys.stderr)
        raise UserError("a cell failed; its error stands above and in the saved copy.") from None
    except DeadKernelError:
        reason = "mostly for want of memory"
        raise UserError(f"the notebook's kernel was killed, {reason}; {AGAIN}.") from None


def main(args):
    """Execute the copy and save it, also when a cell failed."""
    copy = Path(os.environ.get("OUT", "build/sample")) / NOTEBOOK.name
    runs.check_writable(copy.parent)
    os.environ["COMMAND"] = make_command([name.upper() for name in runs.setting_names(NOTEBOOK)])
    if not sys.stderr.isatty():
        os.environ["QUIET"] = "1"  # a log wants no progress bars
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    try:
        execute(notebook)
    finally:
        with runs.write_atomically(copy) as temporary:
            nbformat.write(notebook, temporary)
    print(f"Executed copy: {copy}")


if __name__ == "__main__":
    runs.run_script(main, runs.ArgumentParser(__doc__), after_interrupt=AGAIN)
