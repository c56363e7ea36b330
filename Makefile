# From a fresh clone: `make demo` or `make test`; each makes its own .venv first. Other targets: see README.md.

# The first Python 3.11 to 3.13 that can make a virtual environment; override with PYTHON=/path/to/python3.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& echo $$p && break; done)

# What pip installs as torch. Without an NVIDIA GPU it is pinned to a release that has a CPU build for pip to
# find; override with whatever `pip install` takes, such as TORCH="torch==2.13.0 --find-links wheels".
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),"torch>=2.11","torch==2.13.0")

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo-out/tiny-m27-nvfp4
RECIPE := nvfp4_experts_only-fp8_kv

.PHONY: install demo test lint types docs build clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py $(wildcard src/m27quant/kernels/_native/*.[ch])
	@test -n "$(PYTHON)" || { echo "m27quant needs Python 3.11, 3.12 or 3.13 with its venv module;" \
		"name one with PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[dev]"
	touch $@

# The first commands of the README, on the checkpoint that lies in examples/.
demo: $(STAMP)
	$(BIN)/m27quant quantize examples/tiny-m27 $(DEMO) --recipe $(RECIPE) \
		--dataset examples/tiny-m27/calibration.jsonl --overwrite
	$(BIN)/m27quant verify $(DEMO)
	$(BIN)/m27quant run $(DEMO) --drafter examples/tiny-m27-dflash --prompt "def read_lines(path):" \
		--max-tokens 96 --temperature 0 --stats

test: $(STAMP)
	$(BIN)/python -m pytest -n auto $(PYTEST_FLAGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# What is generated from the program: the references of command line and checks, the list of frozen options.
docs: $(STAMP)
	$(BIN)/python -m m27quant.cli.docs cli > docs/cli.md
	$(BIN)/python -m m27quant.cli.docs checks > docs/checks.md
	$(BIN)/python -m m27quant.cli.docs serving > docs/serving.md
	$(BIN)/python -m tests.cli.test_docs

build: $(STAMP)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist demo-out src/*.egg-info src/m27quant/kernels/_native/*.so
