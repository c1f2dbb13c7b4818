# `make demo` and `make test`; of the latter, `make check` is the linters and `make quick` a minute of tests;
# `make sweep` tries all of torch's modules; `make docs` and `make notebooks`; `make results` and `make package`
# make the files of a release. All make .venv first, with locked versions.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The CPU build of torch, unless there is an NVIDIA GPU or a Mac (whose only build has no suffix). A CPU
# build is asked for by its full version, so that pip fails rather than bring gigabytes of CUDA.
TORCH_VERSION := 2.13.0
TORCH ?= torch==$(TORCH_VERSION)$(shell \
	if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then echo +cpu; fi)

# Tests start many processes: each would compile the sources again, and each of pytest's rewrite all assertions.
unexport PYTHONDONTWRITEBYTECODE

PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 5 --dist loadfile --no-loadscope-reorder

# Some tests of every room, and the promises that touch every rule
QUICK := contract/test_unmodified.py engine/test_calls.py engine/test_liveness.py \
	engine/test_maps.py engine/test_state_uses.py rules/test_one_problem.py rules/test_proxprop.py \
	rules/test_nlms.py rules/test_rls.py rules/test_whitening_family.py rules/test_back_matching.py \
	rules/test_consequentialism.py rules/test_gradient_amplification.py numerics/test_least_squares.py \
	numerics/test_patch_gram.py schedules/test_layer_freezing.py optim/test_conventions.py \
	nn/test_unroll_models.py losses/test_slope_recovery.py init local/test_split_refusals.py \
	local/test_rules_inside.py pipeline/test_wire.py pipeline/test_forecast.py \
	arena/test_score.py data/test_readers.py data/test_reading.py cli/test_workloads_command.py \
	test_attachment.py test_card.py test_environment.py test_errors.py \
	test_replicas.py trainers/test_plain_loop.py

.PHONY: demo test tests check lint types quick sweep docs notebooks results package clean

demo: $(VENV)/.installed
	$(BIN)/plywise demo

# mypy runs beside the first tests, many of which wait for processes of their own.
test: lint
	@$(MAKE) --no-print-directory --jobs 2 types tests

tests: $(VENV)/.installed
	$(PYTEST)

check: lint types

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

# Two processes: none of these tests waits for another, and a third one would only import torch once more.
quick: $(VENV)/.installed
	$(PYTEST) --maxprocesses 2 $(addprefix tests/,$(QUICK))

# Ctrl-C stops it, the same command goes on.
sweep: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.sweep.run

# Runs the gallery's examples; any warning is an error.
docs: $(VENV)/.installed
	MPLBACKEND=Agg $(BIN)/sphinx-build -W --keep-going -n -b html docs docs/_build/html

# Runs the notebooks whose code has changed since they were made; all of them take a quarter of an hour.
notebooks: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python docs/notebooks/make.py

# Builds wheel and sdist, and uses them in a fresh environment: needs a network.
package:
	$(PYTHON) .ci/package.py --torch "$(TORCH)"

# Runs the quick bench on this machine, compares it with the published one, and packs the ledgers and reports of
# all published benches into dist/results. The other benches take hours: their commands are in benchmarks/.
AGAIN := runs/results/quick
results: $(VENV)/.installed
	if [ -e $(AGAIN)/bench.json ]; then set -- --resume; else set -- --workloads quick --trials 2 --seeds 2; fi; \
		$(BIN)/plywise bench "$$@" --out $(AGAIN)
	$(BIN)/python benchmarks/archives.py pack
	$(BIN)/python benchmarks/archives.py unpack quick
	$(BIN)/python benchmarks/arena/again.py runs/arena/quick $(AGAIN)
	$(BIN)/python benchmarks/tables.py

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
