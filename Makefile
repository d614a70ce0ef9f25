# make demo: adapt a small audio model in several ways, and print a table.   make test: all checks that a change must pass.
# make bench: a training step beside Hugging Face peft, written to docs/speed.md; takes an hour or so.
# Either sets everything up in .venv first; what is there already is used again.

SHELL := /bin/sh
BIN := .venv/bin
# What is installed depends on two files alone: a change in either makes another stamp.
STAMP := .venv/installed-$(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
# The newest Python that is there, works, and can make an environment.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& echo $$python && break; done)
EXTRAS ?= audio,vision,retrieval,dev
WORKERS ?= 2

NANO := --data.source mini --model.backbone.name nano
SEEDS := --over seed_everything=0,1,2

# One thread a process: pytest runs several of them.
test test-all: export OMP_NUM_THREADS := 1
# Children that tests start would compile all libraries anew where the environment keeps python from writing bytecode.
test test-all: export PYTHONDONTWRITEBYTECODE :=

.PHONY: bench demo test test-all lint setup wheel clean
.DEFAULT_GOAL := setup

# One run, then a table: a probe, LoRA and full training, on the small pretrained network and on the same one with random
# weights (full training at a rate that suits a small network), three seeds each.
demo: $(STAMP)
	$(BIN)/lightning run domains/audio/esc50.yaml $(NANO) --trainer.max_epochs 3
	$(BIN)/lightning run domains/audio/esc50.yaml $(NANO) --trainer.max_epochs 3 --run_dir runs/demo $(SEEDS) \
		--over "peft=LinearProbe,LoRA,{class: FullFineTuning, lr: 0.001}" --over model.backbone.pretrained=true,false

test: $(STAMP)
	$(BIN)/ruff check --quiet .
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

test-all: $(STAMP)
	SCION_ALL=1 $(BIN)/python -m pytest -n $(WORKERS)

# BENCH="--model bert_base --methods LoRA --layers 2" is a quick look.
bench: export OMP_NUM_THREADS := 1
bench: $(STAMP)
	$(BIN)/python -m benchmarks.training_step $(BENCH)

# Pyright fetches its engine from the net when it runs for the first time, so it is no part of `make test`.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/pyright

setup: $(STAMP)

wheel: $(STAMP)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache

# uv takes about a minute where pip takes several. It reads no pip configuration: an index given to pip in the environment
# is passed on, certificates are the system's, and where uv is not to be had, or does not get through, pip does the work.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "Scion needs Python 3.11 or newer with its venv module (on Debian and Ubuntu:" \
		"python3-venv); set PYTHON=/path/to/python if yours has another name." >&2; exit 1; }
	@$(BIN)/python -c 'import pip' 2>/dev/null || { echo "Making .venv with $(PYTHON)"; $(PYTHON) -m venv --clear .venv; }
	@echo "Installing; the packages take about 5 GB"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv \
		&& UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1 UV_DEFAULT_INDEX="$${UV_DEFAULT_INDEX:-$$PIP_INDEX_URL}" \
			$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable ".[$(EXTRAS)]" \
		|| $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRAS)]"
	@rm -f .venv/installed-*
	@touch $@
