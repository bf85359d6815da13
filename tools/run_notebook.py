"""Execute a copy of hw2-q3.ipynb with settings from the environment; save it as OUT/hw2-q3.ipynb.

    DATA=sample OUT=build/sample python -m tools.run_notebook

What the cells print appears as they run. A cell that fails ends it in one sentence and exit status
2. The copy is saved either way, and training goes on from its last epoch when the same command is
given again. Whatever ends this process ends the notebook's kernel too.
"""

import os
import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import runs
from runs import UserError
from tools.definitions import NOTEBOOK, settings_of_the_notebook

import nbformat
import zmq
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

LONGEST_SOCKET_PATH = 100  # bytes; systems allow 104 or 108


# ---------------------------------------------------------------------------------------- settings
def make_command():
    """The command that is running, as one would type it: what the results files record."""
    settings = []
    for name in settings_of_the_notebook():
        if name in os.environ:
            settings.append(f"{name}={os.environ[name]}")
    return shlex.join(["make", "q3", *settings])


# --------------------------------------------------------------------------------------- execution
class PrintingClient(NotebookClient):
    """A client that also passes on what the cells print, progress bars included.

    A bar is for the person who waits: it does not go into the saved copy.
    """

    def process_message(self, message, cell, cell_index):
        """Print streams as they come; everything else is nbclient's."""
        if message["msg_type"] == "stream":
            content = message["content"]
            stream = sys.stderr if content["name"] == "stderr" else sys.stdout
            print(content["text"], end="", file=stream, flush=True)
            content["text"] = without_bars(content["text"])
            if not content["text"]:
                return None
        return super().process_message(message, cell, cell_index)


def without_bars(text):
    """What is left of a stream's text without the lines that a progress bar draws over itself."""
    before, *drawn = text.split("\r")
    after = drawn[-1] if drawn and drawn[-1].endswith("\n") else ""
    return before + after


def connection(folder):
    """How to talk to the kernel: sockets in a private folder, which no other user can open.

    On the loopback, encrypted, where there are no such sockets, or `folder` is too long a path.
    """
    prefix = f"{folder}/kernel"
    longest = f"{prefix}-5"  # there are five sockets
    if zmq.has("ipc") and os.name == "posix" and len(os.fsencode(longest)) < LONGEST_SOCKET_PATH:
        return {"transport": "ipc", "ip": prefix}
    encryption = "auto" if zmq.has("curve") else "disabled"
    return {"transport": "tcp", "ip": "127.0.0.1", "transport_encryption": encryption}


def run_cells(notebook, folder):
    """Run the cells of `notebook` in a kernel of its own, which fills in their outputs."""
    this_python = KernelSpecManager(kernel_dirs=[])  # not the python3 that somebody installed
    manager = AsyncKernelManager(kernel_spec_manager=this_python, **connection(folder))
    client = PrintingClient(
        notebook,
        km=manager,
        timeout=None,
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},  # where the kernel starts
    )
    # Not `client.execute()`, which takes over Ctrl-C and then speaks of a dead kernel.
    try:
        with client.setup_kernel():
            for index, cell in enumerate(notebook.cells):
                client.execute_cell(cell, index, execution_count=client.code_cells_executed + 1)
    finally:
        run_sync(manager.shutdown_kernel)(now=True)  # what is finished is saved: no need to wait


def execute(notebook):
    """Run the cells of `notebook`; UserError, or exit status 2, where one of them fails."""
    try:
        with TemporaryDirectory() as folder:
            run_cells(notebook, folder)
    except CellExecutionError as error:
        if error.ename == "UserError":
            sys.exit(2)  # the notebook has said its sentence
        print(error, file=sys.stderr)
        where = "its error stands above and in the saved copy"
        raise UserError(f"a cell failed; {where}.") from None
    except DeadKernelError:
        reason = "mostly for want of memory"
        raise UserError(f"the notebook's kernel was killed, {reason}; run it again.") from None
    except RuntimeError as error:  # before the first cell
        advice = "`python -m ipykernel` says why"
        raise UserError(f"the notebook's kernel does not start ({error}); {advice}.") from None


def main(args):
    """Execute the copy and save it, also when a cell failed or somebody interrupted it."""
    os.chdir(NOTEBOOK.parent)  # so that relative paths mean the same here and in the notebook
    copy = Path(os.environ.get("OUT", "build/sample")) / NOTEBOOK.name
    runs.check_writable(copy.parent)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if not sys.stderr.isatty():
        os.environ["QUIET"] = "1"  # a log wants no progress bars
    os.environ["COMMAND"] = make_command()
    for name in ("MPLBACKEND", "PYTHONSAFEPATH"):  # the kernel shows plots, and imports from here
        os.environ.pop(name, None)
    try:
        execute(notebook)
    finally:
        with runs.write_atomically(copy) as temporary:
            nbformat.write(notebook, temporary)
    print(f"Executed copy: {copy}")


if __name__ == "__main__":
    parser = runs.ArgumentParser(__doc__)
    again = "finished epochs are saved; the same command goes on from there"
    runs.run_script(main, parser, again)
