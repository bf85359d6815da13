"""Execute a copy of hw2-q3.ipynb, with other parameters if they are given.

    python -m tools.run_notebook data=sample epochs=5 decoders=lstm

Each name=value stands in a cell that is put behind the notebook's own cell of parameters, in the
copy only: OUT/hw2-q3.ipynb, with OUT the parameter `out`. What the cells print appears as they run.
A cell that fails ends it with exit status 2; the copy is saved either way. With -keep_outputs the
outputs are written into the notebook itself as well, without that cell.
"""

import ast
import shlex
import sys
from pathlib import Path

import runs
from runs import UserError

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

NOTEBOOK = runs.ROOT / "hw2-q3.ipynb"


def read_parameters(words):
    """{name: value} of words such as epochs=5; UserError for a name that the notebook lacks.

    A value is read as Python has it, 5, 0.1 or ("lstm", "transformer"), and otherwise as text.
    """
    given = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"'{word}' gives no parameter; write name=value, such as epochs=5.")
        try:
            given[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[name] = text
        if name in ("data", "out"):
            given[name] = text  # a folder may be called 123
    runs.refuse_unknown_parameters(NOTEBOOK, given)
    given.setdefault("data", runs.parameters_of(NOTEBOOK)["data"])
    given.setdefault("out", runs.default_out(given["data"]))
    return given


def with_parameters(notebook, given):
    """Put a cell with these parameters behind the notebook's own; returns its index."""
    lines = ["# Put here by tools/run_notebook.py, in this copy only."]
    lines += [f"{name} = {value!r}" for name, value in given.items()]
    lines.append(f"runs.COMMAND = {runs.command_line()!r}")
    if not sys.stderr.isatty():
        lines.append("runs.QUIET = True  # a log wants no progress bars")
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    (place,) = (i for i, tags in enumerate(tags) if "parameters" in tags)
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(place + 1, cell)
    return place + 1


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
        raise UserError(f"the notebook's kernel was killed, {reason}; {go_on()}.") from None


def go_on():
    """What goes on with an interrupted run: the command that was given, with resume=1."""
    command = shlex.join([sys.orig_argv[0], *shlex.split(runs.command_line())[1:]])
    return f"finished epochs are saved, and `{command} resume=1` goes on from them"


def save(notebook, path):
    with runs.write_atomically(path) as temporary:
        nbformat.write(notebook, temporary)


def without_cell(notebook, place):
    """The executed notebook without that cell, its cells counted from 1."""
    del notebook.cells[place]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(code, start=1):
        cell.execution_count = number
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = number
    return notebook


def make_parser():
    parser = runs.ArgumentParser(__doc__)
    parser.add_argument("parameters", nargs="*", help="of the notebook, such as epochs=5")
    parser.flag("keep_outputs", action="store_true", help="also write them into the notebook")
    return parser


def main(args):
    """Execute the copy and save it, also when a cell failed."""
    given = read_parameters(args.parameters)
    copy = Path(given["out"]) / NOTEBOOK.name
    runs.check_writable(copy.parent)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = with_parameters(notebook, given)
    try:
        execute(notebook)
    finally:
        save(notebook, copy)
    print(f"Executed copy: {copy}")
    if args.keep_outputs:
        save(without_cell(notebook, place), NOTEBOOK)


if __name__ == "__main__":
    runs.run_script(main, make_parser(), after_interrupt=go_on())
