# Two commands: `make demo` and `make test`; and `make docs`. All make .venv first, with locked versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The CPU build of torch, unless there is an NVIDIA GPU or a Mac (whose only build has no suffix). A CPU
# build is asked for by its full version, so that pip fails rather than bring gigabytes of CUDA.
TORCH_VERSION := 2.13.0
TORCH ?= torch==$(TORCH_VERSION)$(shell \
	if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then echo +cpu; fi)

.PHONY: demo test docs clean

demo: $(VENV)/.installed
	$(BIN)/plywise demo

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Runs the gallery's examples; any warning is an error.
docs: $(VENV)/.installed
	MPLBACKEND=Agg $(BIN)/sphinx-build -W --keep-going -n -b html docs docs/_build/html

$(VENV)/.installed: Makefile pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "plywise needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock "$(TORCH)" || { \
		echo "pip found no $(TORCH). Point pip at PyTorch's index of CPU builds (see pytorch.org, 'Get" \
		"Started'), or choose a build yourself: make TORCH=torch==$(TORCH_VERSION)"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) runs build dist docs/_build docs/generated
