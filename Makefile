# Two commands are enough on a machine with nothing but Python and make: `make demo`, `make test`.
PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
OUT     ?= runs/gpu
ARGS    ?=
# constraints-oldest.txt has the oldest versions that are supported.
CONSTRAINTS ?= constraints.txt
MARKS   ?= $(if $(CI),not gpu,not slow and not gpu)

RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.fastperturb-installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs docs-serve docs-check bench gpu clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s  %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(INSTALLED)  ## watch a learned perturbation beat exact-prefix training out of support
	$(VENV)/bin/fastperturb demo --output-dir runs/demo --overwrite

# One OpenMP thread a worker: two workers with two threads each would fight over two cores.
test: $(INSTALLED)  ## run the tests (CI=true adds the slow ones)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --benchmark-disable -m "$(MARKS)" $(ARGS)

lint: $(INSTALLED)  ## ruff, mypy and the import contracts
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache

docs docs-serve: export NO_MKDOCS_2_WARNING = 1

docs: $(INSTALLED)  ## build the documentation into site/; a broken link is an error
	$(RUN) -m mkdocs build --strict

docs-serve: $(INSTALLED)  ## show the documentation in a browser, rebuilt as files change
	$(RUN) -m mkdocs serve

docs-check: $(INSTALLED)  ## fail when a table of a page and its JSON disagree, or a diagram and its code
	$(RUN) -m docs.tables
	$(RUN) -m docs.diagrams
	@echo 'The pages, their JSON and the code agree.'

bench: $(INSTALLED)  ## time every implementation against naive code, into runs/bench
	$(RUN) -m bench.run --output-dir runs/bench --overwrite

# A GPU machine brings its own torch and may have no network: no virtual environment here.
gpu:  ## tests and benchmarks that need CUDA, with the python that is there, into runs/gpu
	PYTHONPATH=. $(PYTHON) -m bench.gpu --output-dir $(OUT) $(if $(STAGES),--stages $(STAGES)) $(ARGS)

clean:  ## remove build products and caches; keeps the virtual environment and runs/
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("FastPerturb needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": try make PYTHON=python3.11")'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	# compat: the package is found by a path, also from the folder that holds this clone.
	$(RUN) -m pip install --disable-pip-version-check -c $(CONSTRAINTS) \
		-e '.[all]' --config-settings editable_mode=compat
	@touch $@
