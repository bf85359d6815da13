"""Every script, tool and definition of the notebook on other systems than this one, as far as it
can be imitated: what Windows and macOS lack is taken away, then everything is imported and used.
"""

import contextlib
import importlib
import io
import os
import pathlib
import signal
import sys
from types import SimpleNamespace

from conftest import ROOT, load_script, oct_folder, run_python  # noqa: F401

import joblib  # noqa: F401  (runs.py imports it late: here before the system changes)
import pytest
import soundfile

SCRIPTS = ("q1_linear_attention", "hw2-q2", "download_octmnist", "transcribe")
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("[!_]*.py"))
LACKING = {  # modules, and what is missing of os and signal
    "win32": (
        ("pwd", "grp", "fcntl", "termios", "tty", "pty", "resource"),
        ("geteuid", "getuid", "getgid", "getpgid", "killpg", "fork", "setsid", "sched_getaffinity"),
        ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGALRM", "alarm", "pthread_sigmask"),
    ),
    "darwin": ((), ("sched_getaffinity",), ()),
}


def import_everything():
    """{name: module} of scripts and tools, and {name: object} of the notebook's definitions."""
    modules = {name: load_script(name) for name in SCRIPTS}
    for name in TOOLS:
        modules[name] = importlib.import_module(f"tools.{name}")
    return modules, modules["definitions"].load_definitions()


def forget_our_modules():
    """So that the next import executes them again; libraries stay."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("runs", "utils", "tools", "transcribe"):
            del sys.modules[name]


def imitate(system):
    """Take away from this process what `system` lacks; its libraries have been imported."""
    modules, of_os, of_signal = LACKING[system]
    for name in modules:
        sys.modules[name] = None  # importing it raises ImportError
    for name in of_os:
        if hasattr(os, name):
            delattr(os, name)
    for name in of_signal:
        if hasattr(signal, name):
            delattr(signal, name)
    soundfile._sys = SimpleNamespace(**vars(sys))  # its library stays that of this system
    sys.platform = system
    if system == "win32":
        os.name = "nt"
        pathlib.WindowsPath = pathlib.PosixPath  # which is what Path(...) makes now

    true_open = io.open

    def open_without_proc(file, *arguments, **options):
        if str(file).startswith(("/proc", "/sys", "/dev/full")):
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return true_open(file, *arguments, **options)

    io.open = open_without_proc  # which pathlib uses


def give_command(module, *flags):
    """What happens when a script or tool is started with these flags."""
    sys.argv = [module.__file__, *map(str, flags)]
    module.runs.run_script(module.main, module.make_parser())


def use_everything_as_on(system, data, out):
    """In a child process: import everything, and go the way of README's "Without make"."""
    import_everything()
    forget_our_modules()
    imitate(system)
    modules, definitions = import_everything()

    assert "SpeechToText" in definitions
    for module in modules.values():
        if hasattr(module, "make_parser"):
            with contextlib.suppress(SystemExit):
                module.make_parser().parse_args(["-h"])
    name = sys.modules["runs"].processor_name()
    assert name.endswith(" cores"), name

    few = ("-n_clips", 4, "-workers", 1, "-only", "ljspeech")
    give_command(modules["make_sample_data"], "-out", out, *few)
    give_command(modules["q1_linear_attention"], "-out", out, "-seq_lens", 32, 64, "-dims", 4)
    give_command(modules["hw2-q2"], "-out", out, "-data", data, "-epochs", 1)
    give_command(modules["make_report"], "-out", out)
    way = modules["run_notebook"].connection(out)
    assert way["transport"] == ("tcp" if system == "win32" else "ipc"), way


@pytest.mark.parametrize("system", LACKING)
def test_everything_but_the_kernel_works_as_on(oct_folder, tmp_path, system):  # noqa: F811
    out = tmp_path / "out"
    code = "import sys; sys.path[:0] = ['.', 'tests']; import test_systems as t; "
    code += "t.use_everything_as_on(*sys.argv[1:])"
    process = run_python("-c", code, system, oct_folder, out)
    assert process.returncode == 0, process.stderr
    made = {path.name for path in out.rglob("*") if path.is_file()}
    assert {"q1.json", "q2-maxpool-lr0.01-seed42-epochs1.json", "metadata.csv"} <= made
    assert "results.pdf" in made
