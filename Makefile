# `make demo` and `make test` set everything up by themselves, once: Python, make and a package index are enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Both ends of the declared ranges: the Pythons that `make test-versions` runs the lowest and the newest packages on.
LOWEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.13

RUNS ?= 1000000

.PHONY: demo test fuzz test-slow test-clients test-versions lint format clean

demo: $(INSTALLED)
	$(BIN)/dylora-moe demo --output_dir demo_output

# A process for each core, each with one thread: the models are too small for more. Files in the order of their names,
# which begins with the longest tests.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The suites that take minutes. HUMANEVAL_OVERRIDE_PATH names EvalPlus's HumanEvalPlus.jsonl(.gz), where there is one.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# RUNS damaged and hostile inputs through the code that reads what others made. What reached new code stays below .fuzz/,
# where a finding is put, too.
fuzz: $(INSTALLED)
	$(BIN)/python -m pip install --quiet 'atheris>=3'
	PYTHONPATH=tests $(BIN)/python -m fuzz.run .fuzz -runs=$(RUNS)

# Other projects' libraries on a mixture, each in an environment of its own that pip makes from the package index.
test-clients: $(INSTALLED)
	$(BIN)/python -m pytest -m clients tests/clients

# The suite's core, with the lowest and with the newest packages that `pyproject.toml` allows, each in an environment of
# its own below .versions/.
test-versions:
	$(LOWEST_PYTHON) tests/versions.py lowest
	$(NEWEST_PYTHON) tests/versions.py newest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# PyTorch first and pinned: an open range would take a build for accelerators that may not be there.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) .versions .fuzz demo_output build dist *.egg-info
