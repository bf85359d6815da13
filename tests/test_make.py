"""The Makefile: which commands it runs for which variables, and what it refuses."""

import os
import shutil
import subprocess

from conftest import ROOT

import pytest

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")


def make(*words, **environment):
    """Ask make what it would run, with only these variables set in the environment."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["make", "--dry-run", "-o", ".venv/ready", "-o", ".venv/ready-dev", *words],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )


def commands(*words, **environment):
    """The commands that make would run, without quotes."""
    process = make(*words, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.replace('"', "").splitlines()


# ----------------------------------------------------------------------------- what is given counts
@pytest.mark.parametrize(
    "words, line",
    [
        (["q1", "ARGS=-dims 16 32"], "-out build/sample  -dims 16 32"),
        (
            ["q2", "ARGS=-epochs 3", "DATA=d"],
            "-data d -out build/d -learning_rate 0.1 0.01 0.001 -epochs 3",
        ),
        (["q2", "DATA=d", "ARGS=-epochs 3"], "-epochs 3 -learning_rate best -no_maxpool"),
        (["q2", "DATA=d", "OUT=my o"], "-data d -out my o -learning_rate 0.1"),
        (
            ["q3", "ARGS=epochs=5 decoders=lstm"],
            "data=sample out=build/sample  epochs=5 decoders=lstm",
        ),
        (["q3", "DATA=/there/my data"], "data=/there/my data out=build/"),
        (["report", "OUT=o"], "report.make -out o"),
        (["transcribe", "WAV=my.wav"], "transcribe.py my.wav"),
        (["test", "ARGS=-k name"], "-m pytest -k name"),
    ],
)
def test_what_is_given_reaches_the_command(words, line):
    assert any(line in command for command in commands(*words))


def test_the_environment_does_not_count():
    surroundings = {"DATA": "d", "OUT": "o", "ARGS": "-epochs 3", "EPOCHS": "3", "WAV": "w"}
    for target in ("q2", "q3", "run"):
        assert commands(target, **surroundings) == commands(target)


def test_run_does_everything_in_order_and_makes_what_is_missing():
    lines = commands("run")
    scripts = [
        "q1_linear_attention.py",
        "-only octmnist",
        "-learning_rate 0.1",
        "-learning_rate best",
        "-only ljspeech",
        "data=sample out=build/sample epochs=7 batch_size=8 learning_rate=0.0015",
        "report.make -out build/sample",
    ]
    places = [next(i for i, line in enumerate(lines) if script in line) for script in scripts]
    assert places == sorted(places)
    assert any("-seq_lens 256 512 1024 2048 4096" in line for line in lines)
    real = commands("run", "DATA=data", "OUT=o")
    assert not any("make_sample_data" in line or "-seq_lens" in line for line in real)
    assert any(line.strip().endswith("tools.run_notebook data=data out=o") for line in real)


# ------------------------------------------------------------------------------ what does not count
@pytest.mark.parametrize(
    "words, said",
    [
        (["q3", "EPOCHS=1"], "make q3 does not read EPOCHS; flags go into ARGS"),
        (["q3", "epochs=1"], "make q3 does not read epochs; flags go into ARGS"),
        (["run", "ARGS=-epochs 3"], "make run does not read ARGS"),
        (["run", "SEED=42 43"], "make run does not read SEED"),
        (["notebook", "DATA=mydata"], "make notebook does not read DATA"),
        (["q1", "DATA=d"], "make q1 does not read DATA"),
        (["test", "OUT=o"], "make test does not read OUT"),
        (["transcribe"], "give WAV=my.wav"),
        (["transcribe", "my.wav"], "give WAV=my.wav"),
    ],
)
def test_what_nobody_reads_is_refused(words, said):
    process = make(*words)
    assert process.returncode == 2 and process.stdout == ""
    assert said in process.stderr and process.stderr.count("\n") == 1
