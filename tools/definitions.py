"""What hw2-q3.ipynb and the scripts define, for those who use it elsewhere."""

import ast
import importlib.util
import os
from pathlib import Path

from runs import UserError

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "hw2-q3.ipynb"


def load_script(name):
    """Import a script of the root whose file name is no module name, such as hw2-q2.py."""
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings_of_the_notebook(path=NOTEBOOK):
    """The names of the notebook's settings, in its order.

    They are the fields of the class `Settings` in the cell tagged "parameters": the field
    `learning_rate` is the environment variable LEARNING_RATE.
    """
    for cell in nbformat.read(path, as_version=4).cells:
        if "parameters" not in cell.metadata.get("tags", []):
            continue
        for statement in ast.parse(cell.source).body:
            if isinstance(statement, ast.ClassDef) and statement.name == "Settings":
                fields = [line for line in statement.body if isinstance(line, ast.AnnAssign)]
                return [field.target.id.upper() for field in fields]
    problem = "has lost its cell of settings, tagged 'parameters'"
    raise UserError(f"{path.name} {problem}; restore it.")


def load_definitions(**environment):
    """The names that the notebook's cells tagged "define" define: {name: object}.

    `environment`: settings, as strings, for these definitions alone; those of the surroundings do
    not count.
    """
    namespace = {"__name__": "hw2_q3"}
    before = dict(os.environ)
    for name in settings_of_the_notebook():
        os.environ.pop(name, None)
    os.environ.update(environment)
    try:
        for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
            if "define" in cell.metadata.get("tags", []):
                exec(compile(cell.source, str(NOTEBOOK), "exec"), namespace)
    finally:
        os.environ.clear()
        os.environ.update(before)
    return namespace
