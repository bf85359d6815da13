# The commands of this repository; each only runs a script. `make help` lists them.
#
# These variables can be given, as in `make q2 DATA=data ARGS="-epochs 5"`; the environment does not
# count. ARGS holds the flags of a script or of pytest, or the parameters of Q3's notebook.
DATA := sample
OUT := build/$(notdir $(abspath $(DATA)))
ARGS :=
WAV :=
METADATA :=
PYTHON := python3
PY := .venv/bin/python

# A variable that a target would ignore is refused. These are the ones that each target reads.
READ_BY_q1 := OUT ARGS
READ_BY_q2 := DATA OUT ARGS
READ_BY_q3 := DATA OUT ARGS
READ_BY_run := DATA OUT
READ_BY_transcribe := WAV
READ_BY_model := METADATA DATA
READ_BY_evidence := DATA ARGS
READ_BY_exercises := ARGS
READ_BY_report := OUT
READ_BY_test := ARGS
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
READ := PYTHON $(foreach goal,$(MAKECMDGOALS),$(READ_BY_$(goal)))
UNREAD := $(filter-out $(READ),$(GIVEN))
HINT := flags go into ARGS, as in make q2 ARGS="-epochs 5" or make q3 ARGS="epochs=5"
$(if $(UNREAD),$(error make $(MAKECMDGOALS) does not read $(UNREAD); $(HINT)))

# Some containers set this. Then Python compiles torch's files at every start: 4 to 15 s.
unexport PYTHONDONTWRITEBYTECODE

# Where DATA is the sample, it is made first.
ifeq ($(DATA),sample)
IMAGES := images
SPEECH := speech
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test data sample images speech q1 q2 q3 notebook transcribe demo model evidence \
	exercises report readme submission bench lint

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z0-9]+:.*##/ {printf "%-12s%s\n", $$1, $$2}' Makefile
	@echo "Variables: DATA=$(DATA) OUT=$(OUT) ARGS=; real data: make data, then make run DATA=data"

# With the sample, Question 1 is measured at short lengths, and Question 3 trains with small batches
# at a higher rate, so that seven epochs are enough to learn its words.
ifeq ($(DATA),sample)
run: Q1_ARGS := -seq_lens 256 512 1024 2048 4096
run: Q3_ARGS := epochs=7 batch_size=8 learning_rate=0.0015
endif
run: q1 q2 q3  ## all three questions and a sheet of results, on DATA into OUT
	"$(PY)" -m report.make -out "$(OUT)"
	@echo "Done. Figures: $(OUT)/figures/  Notebook: $(OUT)/hw2-q3.ipynb"

test: .venv/ready-dev  ## the tests (ARGS: flags of pytest)
	"$(PY)" -m pytest $(ARGS)

data: .venv/ready  ## fetch the real OCTMNIST (55 MB) and LJ Speech (2.6 GB) into data/
	"$(PY)" download_octmnist.py -root data
	"$(PY)" -m tools.download_ljspeech -root data

sample: images speech  ## write the synthetic stand-ins into sample/

images: .venv/ready
	@"$(PY)" -m tools.make_sample_data -out sample -only octmnist

speech: .venv/ready
	@"$(PY)" -m tools.make_sample_data -out sample -only ljspeech

q1: .venv/ready  ## Question 1
	"$(PY)" q1_linear_attention.py
	"$(PY)" q1_measure.py -out "$(OUT)" $(Q1_ARGS) $(ARGS)

q2: .venv/ready $(IMAGES)  ## Question 2: three learning rates, then the strided network at the best
	"$(PY)" hw2-q2.py -data "$(DATA)" -out "$(OUT)" -learning_rate 0.1 0.01 0.001 $(ARGS)
	"$(PY)" hw2-q2.py -data "$(DATA)" -out "$(OUT)" $(ARGS) -learning_rate best -no_maxpool

q3: .venv/ready $(SPEECH)  ## Question 3: execute a copy of the notebook (ARGS="epochs=5 seed=1")
	@"$(PY)" -m tools.run_notebook data="$(DATA)" out="$(OUT)" $(Q3_ARGS) $(ARGS)

notebook: .venv/ready-dev $(SPEECH)  ## Question 3: open the notebook in JupyterLab
	"$(PY)" -m jupyterlab hw2-q3.ipynb

transcribe: .venv/ready  ## write down what is said in the sound file WAV=
	$(if $(WAV),,$(error give WAV=my.wav, the recording that is to be written down))
	@"$(PY)" transcribe.py "$(WAV)"

demo: .venv/ready  ## speak into a page of the browser; gradio is installed if need be
	@"$(PY)" -c "import gradio" 2>/dev/null || { $(call install,gradio==6.31.0); }
	"$(PY)" demo.py

NEEDED_BY_model := METADATA=metadata.csv, which is spoken, and DATA=folder with real clips
model: .venv/ready  ## make both trained models again: METADATA= is spoken, DATA= has real clips
	$(if $(and $(METADATA),$(filter-out sample,$(DATA))),,$(error give $(NEEDED_BY_model)))
	"$(PY)" -m tools.make_sample_data -only ljspeech -metadata "$(METADATA)" -out build/spoken
	"$(PY)" -m tools.letters -metadata "$(METADATA)" -data "$(DATA)"
	for decoder in lstm transformer; do \
		"$(PY)" -m tools.finetune -spoken build/spoken -data "$(DATA)" -decoder $$decoder -resume \
		&& "$(PY)" -m tools.make_model -data "$(DATA)" \
			-checkpoint build/model/finetuned/checkpoints/q3-$$decoder.pt || exit 1; \
	done
	"$(PY)" -m report.readme

evidence: .venv/ready  ## make all committed results (hours; `python -m tools.evidence` lists them)
	"$(PY)" -m tools.evidence -all -data "$(DATA)" $(ARGS)

exercises: .venv/ready speech  ## do the exercises of EXERCISES.md and write down what comes out
	"$(PY)" -m tools.exercises $(ARGS)

report: OUT := report
report: .venv/ready  ## report.pdf, and which numbers changed; of another OUT results.pdf
	"$(PY)" -m report.make -out "$(OUT)"

readme: .venv/ready  ## write the committed results into README and the model's card
	"$(PY)" -m report.readme

submission: .venv/ready  ## the zip to hand in; refuses until report/group.toml is filled in
	"$(PY)" -m report.submission

bench: .venv/ready  ## speed, as ratios against plain reference loops measured in the same run
	"$(PY)" -m bench.q1
	"$(PY)" -m bench.q2
	"$(PY)" -m bench.q3

lint: .venv/ready-dev  ## ruff, the notebook included
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .

# uv installs in a fifth of pip's time; where there is no wheel of uv, pip does it.
install = UV_HTTP_TIMEOUT=300 "$(PY)" -m uv pip install --quiet --python "$(PY)" $1 \
	|| "$(PY)" -m pip install --quiet --disable-pip-version-check $1

.venv/ready: requirements.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make PYTHON=python3.11 ..." >&2; exit 2; }
	"$(PYTHON)" -m venv .venv
	"$(PY)" -m pip install --quiet --disable-pip-version-check --only-binary :all: uv==0.13.9 || true
	$(call install,-r requirements.txt)
	@touch $@

.venv/ready-dev: .venv/ready requirements-dev.txt
	$(call install,-r requirements-dev.txt)
	@touch $@
