# make demo, make demo-tasks and make test are all the set-up there is: each makes .venv on its first run.
PYTHON ?= python3
VENV ?= .venv
BACKEND ?= torch
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo demo-tasks test check lint bench bench-quick clean

demo: $(VENV)/.demo
	$(BIN)/mamba-core demo --backends torch,mlx,jax

# Trains on data that Python packages ship; BACKEND is torch, mlx or jax. What it draws is in demo-out/tasks.
demo-tasks: $(VENV)/.demo-tasks
	$(BIN)/python -m mamba_core.benchmarks.demo_tasks --backend $(BACKEND)

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto $(PYTEST)

# A minute: lint, types, and a slice of the laws.
check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/unit/test_types.py tests/unit/test_signatures.py tests/meta/test_house.py
	EXAMPLES=3 $(BIN)/python -m pytest -n auto tests/conformance --backend torch -k "test_laws or test_model"

lint: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Hours, on a machine with nothing else to do; then the README's tables and plot.
bench: $(VENV)/.test
	$(BIN)/mamba-core bench --out benchmarks/results/bench.json
	$(BIN)/python -m mamba_core.benchmarks.report

bench-quick: $(VENV)/.test
	$(BIN)/mamba-core bench --quick

# torch first and pinned: without it a dependency would bring a build with several gigabytes of CUDA.
$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed; set PYTHON=')"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[all]"
	touch $@

$(VENV)/.demo-tasks: $(VENV)/.demo
	$(PIP) --editable ".[all,demo]"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) --editable ".[all,dev]"
# Their reference functions are oracles; they need no CUDA, but their set-up looks for it unless told not to.
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(PIP) --no-build-isolation --no-deps mamba-ssm
	CAUSAL_CONV1D_FORCE_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE $(PIP) --no-build-isolation --no-deps causal-conv1d
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
