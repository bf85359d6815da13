"""Execute a copy of hw2-q3.ipynb with settings from the environment, and save it as OUT/hw2-q3.ipynb.

    DATA=sample OUT=build/sample python run_notebook.py

What the cells print appears as they run. A failing cell ends it in one sentence and exit status 2; the copy is saved
either way, and training goes on from its last epoch when the same command is given again.
"""

import os
import re
import shlex
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from traitlets.config import Config

import utils

NOTEBOOK = Path(__file__).resolve().with_name("hw2-q3.ipynb")


class PrintingClient(NotebookClient):
    """A client that also passes on what the cells print."""

    def process_message(self, message, cell, cell_index):
        """Print streams as they come; everything else is nbclient's."""
        if message["msg_type"] == "stream":
            stream = sys.stderr if message["content"]["name"] == "stderr" else sys.stdout
            print(message["content"]["text"], end="", file=stream, flush=True)
        return super().process_message(message, cell, cell_index)


def main(args):
    """Run the notebook from its folder, so that relative paths mean the same as for the scripts."""
    os.chdir(NOTEBOOK.parent)
    out = Path(os.environ.get("OUT", "build/sample"))
    utils.check_writable(out)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    names = re.findall(r'setting\("(\w+)"', "".join(cell.source for cell in notebook.cells))
    settings = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    os.environ |= {"QUIET": "1", "COMMAND": shlex.join(["make", "q3", *settings])}
    with tempfile.TemporaryDirectory() as private:  # talk to the kernel through sockets in there, not open ports
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{private}/kernel"}})
        folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
        client = PrintingClient(notebook, timeout=None, coalesce_streams=True, resources=folder, config=config)
        try:
            client.execute()
        except CellExecutionError as error:
            if error.ename != "UserError":
                print(error, file=sys.stderr)
                raise utils.UserError("a cell failed; its error stands above and in the saved copy.") from None
            sys.exit(2)  # the notebook has said its sentence
        except DeadKernelError:
            raise utils.UserError(
                "the notebook's kernel was killed, mostly for want of memory; run it again."
            ) from None
        finally:
            with utils.write_atomically(out / NOTEBOOK.name) as temporary:
                nbformat.write(notebook, temporary)
    print(f"Executed copy: {out / NOTEBOOK.name}")


if __name__ == "__main__":
    parser = utils.ArgumentParser(__doc__.splitlines()[0])
    utils.run_script(main, parser, "finished epochs are saved; the same command goes on from there")
