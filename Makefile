# The commands of this repository; every line only runs a script. `make help` lists them.
DATA ?= sample
OUT ?= build/sample
PYTHON ?= python3
PY := .venv/bin/python

# Some containers set this: then every start compiles torch and its relatives anew, for 4 to 15 s.
unexport PYTHONDONTWRITEBYTECODE

# A setting is given as `make q2 EPOCHS=3`, or in the environment, under one name everywhere. Here
# are the flags of Questions 1 and 2 that are handed on; Question 3's settings are in its notebook.
Q1 := seq_lens dims n_terms max_memory seed device
Q2 := epochs batch_size dropout l2_decay optimizer seed device

capitals = $(shell echo $1 | tr a-z A-Z)
flag_of = $(if $($(call capitals,$1)),-$1 $($(call capitals,$1)))
flags = $(strip $(foreach name,$1,$(call flag_of,$(name))))# $(call flags,epochs seed): -epochs 3 -seed 1

# What is given but not read would be ignored without a word: it is refused, before anything runs.
GIVEN := $(foreach name,$(.VARIABLES),$(if $(findstring command,$(origin $(name))),$(name)))
CHECK = "$(PYTHON)" -m tools.check_settings -goals $(MAKECMDGOALS) -given $(GIVEN) \
	-q1 out $(Q1) -q2 data out learning_rate $(Q2)
PROBLEM := $(if $(GIVEN),$(shell $(CHECK) 2>&1))
$(if $(PROBLEM),$(error $(PROBLEM)))

# Where DATA is the sample, it is made first.
ifeq ($(DATA),sample)
IMAGES := images
SPEECH := speech
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test data sample images speech q1 q2 q3 notebook transcribe demo model report \
	readme submission bench lint

help:  ## list the targets
	@awk -F ':.*## *' '/^[a-z0-9]+:.*##/ {printf "%-12s%s\n", $$1, $$2}' Makefile
	@echo "Settings: DATA=$(DATA) OUT=$(OUT); real data: make data, then make run DATA=data OUT=build/data DOWNLOAD=1"

# The sample is small: Question 1 is measured at short lengths there, and seven epochs of small
# batches, at a higher rate, teach Question 3 its words. Question 2's fifteen epochs stay, and
# whatever is given.
run: SHORT := $(if $(SPEECH),$(if $(SEQ_LENS),,-seq_lens 256 512 1024 2048 4096))
run: Q3_SMALL := $(if $(SPEECH),$(if $(EPOCHS),,EPOCHS=7) $(if $(BATCH_SIZE),,BATCH_SIZE=8) \
	$(if $(LEARNING_RATE),,LEARNING_RATE=0.0015))
run: q1 q2 q3  ## everything that exists, on DATA into OUT (default: the sample, which it makes)
	"$(PY)" -m tools.make_report -out "$(OUT)"
	@echo "Done. Figures: $(OUT)/figures/  Notebook: $(OUT)/hw2-q3.ipynb"

test: .venv/ready  ## the tests
	"$(PY)" -m pytest

data: .venv/ready  ## fetch the real OCTMNIST (55 MB) into data/
	"$(PY)" download_octmnist.py -root data

sample: images speech  ## write the synthetic stand-ins into sample/

images: .venv/ready
	@"$(PY)" -m tools.make_sample_data -out sample -only octmnist

speech: .venv/ready
	@"$(PY)" -m tools.make_sample_data -out sample -only ljspeech

q1: .venv/ready  ## Question 1
	"$(PY)" q1_linear_attention.py
	"$(PY)" q1_measure.py -out "$(OUT)" $(SHORT) $(call flags,$(Q1))

q2: RATES = $(or $(LEARNING_RATE),0.1 0.01 0.001)
q2: BEST = $(if $(word 2,$(RATES)),best,$(RATES))# of one rate there is no search
q2: Q2_FLAGS = -data "$(DATA)" -out "$(OUT)" $(call flags,$(Q2))
q2: .venv/ready $(IMAGES)  ## Question 2: search three learning rates, then the strided network at the best
	"$(PY)" hw2-q2.py $(Q2_FLAGS) -learning_rate $(RATES)
	"$(PY)" hw2-q2.py $(Q2_FLAGS) -learning_rate $(BEST) -no_maxpool

q3: .venv/ready $(SPEECH)  ## Question 3: execute a copy of the notebook (settings: EPOCHS=, DECODERS=, ...)
	DATA="$(DATA)" OUT="$(OUT)" $(Q3_SMALL) "$(PY)" -m tools.run_notebook

notebook: .venv/ready $(SPEECH)  ## Question 3: open the notebook in JupyterLab, which is installed if need be
	@"$(PY)" -c "import jupyterlab" 2>/dev/null || { $(call install,jupyterlab==4.6.6); }
	DATA="$(DATA)" OUT="$(OUT)" "$(PY)" -m jupyterlab hw2-q3.ipynb

transcribe: .venv/ready  ## write down what is said in the sound file WAV=
	$(if $(WAV),,$(error give WAV=my.wav, the recording that is to be written down))
	@"$(PY)" transcribe.py "$(WAV)"

demo: .venv/ready  ## speak into a page of the browser; gradio is installed if need be
	@"$(PY)" -c "import gradio" 2>/dev/null || { $(call install,gradio==6.31.0); }
	"$(PY)" demo.py

model: .venv/ready  ## the model that comes with the clone: METADATA= is spoken, DATA= has real clips
	$(if $(and $(METADATA),$(filter-out sample,$(DATA))),,$(error give METADATA=metadata.csv, which is spoken, and DATA=folder with real clips))
	"$(PY)" -m tools.make_sample_data -only ljspeech -metadata "$(METADATA)" -out build/spoken
	"$(PY)" -m tools.finetune -spoken build/spoken -data "$(DATA)" -out build/model
	"$(PY)" -m tools.letters -metadata "$(METADATA)" -data "$(DATA)"
	"$(PY)" -m tools.make_model -data "$(DATA)" \
		-checkpoint build/model/finetuned/checkpoints/q3-transformer.pt
	"$(PY)" -m tools.make_report -readme

report: OUT := report
report: .venv/ready  ## compile report/report.pdf, or another OUT's results.pdf
	"$(PY)" -m tools.make_report -out "$(OUT)"

readme: .venv/ready  ## write the committed results into README and the model's card
	"$(PY)" -m tools.make_report -readme

submission: .venv/ready  ## the zip to hand in; refuses until report/group.toml is filled in
	"$(PY)" -m tools.make_report -out report -submission

bench: .venv/ready  ## speed, as ratios against plain reference loops measured in the same run
	"$(PY)" tests/bench_q1.py
	"$(PY)" tests/bench_q2.py
	"$(PY)" tests/bench_q3.py

lint: .venv/ready  ## ruff, the notebook included
	"$(PY)" -m ruff check .
	"$(PY)" -m ruff format --check .

# uv installs in a fifth of pip's time; where there is no wheel of uv, pip does it.
install = UV_HTTP_TIMEOUT=300 "$(PY)" -m uv pip install --quiet --python "$(PY)" $1 \
	|| "$(PY)" -m pip install --quiet --disable-pip-version-check $1

.venv/ready: requirements.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed: make PYTHON=python3.11 ..." >&2; exit 2; }
	"$(PYTHON)" -m venv .venv
	"$(PY)" -m pip install --quiet --disable-pip-version-check --only-binary :all: uv==0.13.9 || true
	$(call install,-r requirements.txt)
	@touch $@
