# Everything a newcomer needs: `make demo` and `make test`. Each makes its own environment first when it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt
SHELL_SCRIPTS = $(shell git ls-files '*.sh' '*.sbatch' .ci/run)

.PHONY: demo test lint format environment site clean

demo: environment ## raw images -> features -> codebook -> tokens -> models -> pictures, report and figures in demo_out/
	$(BIN)/python -m digit_ds demo --out demo_out

# Two processes: many tests wait for processes of their own. A file's tests stay together, since they share fixtures.
# The variable is emptied because hundreds of processes would each translate this package's sources.
test: environment ## all tests that this machine can run
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: environment ## ruff, layering contract, types, shellcheck where installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy
	@if command -v shellcheck >/dev/null; then shellcheck $(SHELL_SCRIPTS); else echo "shellcheck is not installed: shell scripts not linted"; fi

format: environment ## rewrite the sources in the project's format and draw the layers in CONTRIBUTING.md
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python docs/draw_layers.py
	$(BIN)/python docs/draw_faults.py
	$(BIN)/python docs/draw_reference.py
	$(BIN)/python docs/draw_costs.py
	$(BIN)/python docs/draw_scaling.py

site: environment ## the documentation as a web site in site/ (Python 3.11 or newer)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

environment: $(VENV)/complete

# DeepSpeed comes as source and imports torch while it builds: torch first, then DeepSpeed without build isolation.
$(VENV)/complete: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 13) else f"{sys.executable} is Python {v[0]}.{v[1]}, expected 3.10 to 3.12: make PYTHON=python3.12")'
	@echo "Installing into $(VENV): about 7.2 GB, 3 to 10 minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja packaging numpy torch torchvision
	$(PIP) --no-build-isolation deepspeed
	$(PIP) --no-build-isolation --editable '.[cpu,dev]'
	@touch $@

clean: ## remove what demo and tests made; the environment stays
	rm -rf demo_out site .pytest_cache .ruff_cache build *.egg-info
