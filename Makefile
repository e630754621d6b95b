# Every target sets itself up: a fresh clone needs python3 >= 3.10 (with venv), make and a network once.
PYTHON := .venv/bin/python
ARGS ?=

.PHONY: setup test test-all lint demo demo-cnn benchmark benchmark-models benchmark-search benchmark-gpu

setup: .venv/.installed

.venv/.installed: pyproject.toml
	@python3 -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("lightning-hinm needs Python 3.10 or newer; python3 is %d.%d. Put a newer python3 first on PATH." % v[:2])'
	python3 -m venv .venv
	@# Bytecode afterwards, on all cores. Not all that is installed compiles: some is of other versions of Python.
	$(PYTHON) -m pip install --no-compile -e '.[dev]'
	@$(PYTHON) -m compileall -q -j 0 .venv/lib > /dev/null 2>&1 || true
	@# Apart, because its files have the paths of the oldest assembler's. Without it a test is skipped, and says so.
	-$(PYTHON) -m pip install --no-deps --upgrade --target .venv/cuda12 nvidia-cuda-nvcc-cu12==12.8.93
	@touch $@

lint: setup
	$(PYTHON) -m ruff check
	$(PYTHON) -m ruff format --check
	$(PYTHON) -m mypy

test: lint
	$(PYTHON) -m pytest -n 2 -m 'not slow'

test-all: lint
	$(PYTHON) -m pytest -n 2

demo: setup
	$(PYTHON) -m benchmarks.demo minilm $(ARGS)

demo-cnn: setup
	$(PYTHON) -m benchmarks.demo resnet $(ARGS)

benchmark: setup
	$(PYTHON) benchmarks/cpu.py $(ARGS)

benchmark-models: setup
	$(PYTHON) -m benchmarks.models $(ARGS)

benchmark-search: setup
	$(PYTHON) -m benchmarks.search $(ARGS)

# No setup: a machine with a GPU brings its own torch.
benchmark-gpu:
	benchmarks/gpu.sh $(ARGS)
