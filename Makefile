# The commands of this repository; every line only runs a script. `make help` lists them.
DATA ?= sample
OUT ?= build/sample
PYTHON ?= python3
PY := .venv/bin/python
SAMPLE := $(if $(subst sample,,$(DATA)),,sample)# where DATA is the sample, it is made first

unexport PYTHONSAFEPATH  # scripts and tools import from this folder
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test data sample q1 q2 q3 notebook transcribe model report readme submission bench faults lint

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z0-9]+:.*##/ {printf "%-12s%s\n", $$1, $$2}' Makefile
	@echo "Settings: DATA=$(DATA) OUT=$(OUT); real data: make data, then make run DATA=data OUT=build/data DOWNLOAD=1"

run: .venv/ready $(SAMPLE)  ## everything that exists, on DATA into OUT (default: the embedded sample)
	"$(PY)" q1_linear_attention.py $(if $(SAMPLE),-quick) -out "$(OUT)"
	@"$(MAKE)" --no-print-directory q2 q3 report "DATA=$(DATA)" "OUT=$(OUT)"
	@echo "Done. Figures: $(OUT)/figures/  Notebook: $(OUT)/hw2-q3.ipynb"

test: .venv/ready  ## the tests
	"$(PY)" -m pytest

data: .venv/ready  ## fetch the real OCTMNIST (55 MB) into data/
	"$(PY)" download_octmnist.py -root data

sample: .venv/ready  ## write the synthetic stand-ins into sample/
	"$(PY)" -m tools.make_sample_data -out sample

q1: .venv/ready  ## Question 1 in full
	"$(PY)" q1_linear_attention.py -out "$(OUT)"

q2: .venv/ready $(SAMPLE)  ## Question 2: search three learning rates, then the strided network at the best
	"$(PY)" hw2-q2.py -data "$(DATA)" -out "$(OUT)" -learning_rate 0.1 0.01 0.001
	"$(PY)" hw2-q2.py -data "$(DATA)" -out "$(OUT)" -learning_rate best -no_maxpool

q3: .venv/ready $(SAMPLE)  ## Question 3: execute a copy of the notebook (settings: EPOCHS=, DECODERS=, ...)
	DATA="$(DATA)" OUT="$(OUT)" "$(PY)" -m tools.run_notebook

notebook: .venv/ready $(SAMPLE)  ## Question 3: open the notebook in JupyterLab, which is installed if need be
	@"$(PY)" -c "import jupyterlab" 2>/dev/null || "$(PY)" -m pip install --quiet --disable-pip-version-check jupyterlab==4.6.6
	DATA="$(DATA)" OUT="$(OUT)" "$(PY)" -m jupyterlab hw2-q3.ipynb

transcribe: .venv/ready  ## write down what is said in the sound file WAV=
	@"$(PY)" transcribe.py "$(WAV)"

# Each variable of these settings is explained in the notebook's section 11.
VARIED := SPEED=0.1 WARP=0.1 REVERB=0.5 NOISE=0.5
STARTED := INIT_FROM=build/varied/checkpoints TAG=-finetuned
TUNED := $(VARIED) $(STARTED) EPOCHS=20 LEARNING_RATE=0.0003 KEEP_BEST=1
model: .venv/ready  ## the model that comes with the clone: METADATA= is spoken, DATA= has real clips
	"$(PY)" -m tools.make_sample_data -only ljspeech -metadata "$(METADATA)" -out build/full
	DATA=build/full OUT=build/varied $(VARIED) "$(PY)" -m tools.run_notebook
	DATA="$(DATA)" OUT=build/real $(TUNED) "$(PY)" -m tools.run_notebook
	"$(PY)" -m tools.make_model -data "$(DATA)" \
		-checkpoint build/real/checkpoints/q3-transformer-finetuned.pt

report: OUT := report
report: .venv/ready  ## compile report/report.pdf, or another OUT's results.pdf
	"$(PY)" -m tools.make_report -out "$(OUT)"

readme: .venv/ready  ## write README's table of results from report/results
	"$(PY)" -m tools.make_report -readme

faults: .venv/ready  ## try everything that can go wrong (a quarter of an hour)
	"$(PY)" tests/faults.py

submission: .venv/ready  ## the zip to hand in; refuses until report/group.toml is filled in
	"$(PY)" -m tools.make_report -out report -submission

bench: .venv/ready  ## speed, as ratios against plain reference loops measured in the same run
	"$(PY)" tests/bench_q1.py
	"$(PY)" tests/bench_q2.py
	"$(PY)" tests/bench_q3.py

lint: .venv/ready  ## ruff, the notebook included
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .

.venv/ready: requirements.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.11 ..." >&2; exit 2; }
	"$(PYTHON)" -m venv .venv
	"$(PY)" -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@
