"""The Makefile: which commands it runs for which settings, and what it refuses."""

import os
import shutil
import subprocess

from conftest import ROOT

import pytest

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")


def make(*words, **environment):
    """The commands that make would run, without running them; the environment has no settings."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["make", "--dry-run", "-o", ".venv/ready", *words],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
    )


def commands(*words, **environment):
    """The lines that make would run, quotes left out."""
    process = make(*words, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout.replace('"', "").splitlines()


# ------------------------------------------------------------------------------ settings that count
@pytest.mark.parametrize(
    "words, flags",
    [
        (["q1", "DIMS=16 32", "SEQ_LENS=64", "MAX_MEMORY=1"], "-seq_lens 64 -dims 16 32"),
        (["q2", "DROPOUT=0.5", "EPOCHS=3"], "-epochs 3 -dropout 0.5"),
        (["q2", "DATA=d", "OUT=o", "SEED=1 2"], "-data d -out o -seed 1 2"),
        (["run", "DIMS=8"], "-seq_lens 256 512 1024 2048 4096 -dims 8"),
    ],
)
def test_settings_become_flags(words, flags):
    assert any(flags in line for line in commands(*words))


def test_the_environment_counts_as_much():
    given = commands("q2", EPOCHS="3", DATA="d")
    assert given == commands("q2", "EPOCHS=3", "DATA=d") != commands("q2")


def test_question_2_searches_and_takes_the_best():
    search, strided = commands("q2", "DATA=d")
    assert search.endswith("-learning_rate 0.1 0.01 0.001")
    assert strided.endswith("-learning_rate best -no_maxpool")
    search, strided = commands("q2", "DATA=d", "LEARNING_RATE=0.1")  # one rate: no search
    assert search.endswith("-learning_rate 0.1")
    assert strided.endswith("-learning_rate 0.1 -no_maxpool")


def test_question_3_gets_its_settings_in_the_environment(tmp_path):
    """As the stand-in for Python sees them."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$DATA,$OUT,$EPOCHS,$DECODERS,$LEARNING_RATE" "$@"\n')
    python.chmod(0o755)
    words = ["-s", "-o", ".venv/ready", f"PY={python}", "q3"]
    words += ["DATA=my data", "OUT=o", "EPOCHS=1", "DECODERS=lstm", "LEARNING_RATE=0.1"]
    process = subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout == "my data,o,1,lstm,0.1 -m tools.run_notebook\n"


def test_run_does_everything_in_order_and_makes_what_is_missing():
    lines = commands("run")
    scripts = [
        "q1_linear_attention.py",
        "q1_measure.py -out build/sample -seq_lens 256 512 1024 2048 4096",
        "-only octmnist",
    ]
    scripts += ["-learning_rate 0.1", "-learning_rate best", "-only ljspeech"]
    scripts += [
        "EPOCHS=7 BATCH_SIZE=8 LEARNING_RATE=0.0015 .venv/bin/python -m tools.run_notebook",
        "make_report -out build/sample",
    ]
    for script, line in zip(scripts, lines):
        assert script in line
    real = commands("run", "DATA=data", "OUT=o", "DOWNLOAD=1")
    assert not any("make_sample_data" in line or "-seq_lens" in line for line in real)
    assert "DATA=data OUT=o  .venv/bin/python -m tools.run_notebook" in real
    assert "DATA=sample OUT=build/sample  " in "".join(commands("run", "EPOCHS=2"))


# ---------------------------------------------------------------------------- settings that do not
@pytest.mark.parametrize(
    "words, said",
    [
        (["q3", "EPOCH=1"], "no setting EPOCH; did you mean EPOCHS?"),
        (["q3", "epochs=1"], "no setting epochs; did you mean EPOCHS?"),
        (["q3", "LR=0.1"], "no setting LR; did you mean LEARNING_RATE?"),
        (["q3", "DECODER=lstm"], "no setting DECODER; did you mean DECODERS?"),
        (["q1", "EPOCHS=3"], "make q1 does not read EPOCHS; make q2 does"),
        (["transcribe"], "give WAV=my.wav"),
        (["transcribe", "my.wav"], "give WAV=my.wav"),
    ],
)
def test_what_nobody_reads_is_refused(words, said):
    process = make(*words)
    assert process.returncode == 2 and process.stdout == ""
    assert said in process.stderr and process.stderr.count("\n") == 1


def test_every_target_is_listed():
    targets = make("-p").stdout.split(".PHONY:")[1].split("\n")[0].split()
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    for target in set(targets) - {"images", "speech"}:
        assert f"\n{target} " in "\n" + listed
