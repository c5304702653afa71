# The two commands of a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# ArviZ 1.x needs Python >= 3.12.
PYTHON312 ?= $(shell for p in python3.12 "$$HOME"/.pyenv/versions/3.12*/bin/python3.12 python3.13; do \
	$$p -c "" 2>/dev/null && echo $$p && break; done)
VENV312 ?= .venv312

# Bytecode is compiled where it is first imported, not for all of PyTorch at installation.
unexport PYTHONDONTWRITEBYTECODE
INSTALL = python -m pip install --quiet --no-compile

# Two processes of one thread each beat one of two: most tests are many small tensor operations.
RUN = OMP_NUM_THREADS=1
ARGS_TEST ?= -n 2

.PHONY: demo test test-arviz1 tutorials benchmarks benchmarks-smoke lint types docs package clean

$(VENV)/installed-%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/$(INSTALL) --upgrade pip
	# torch first and alone: a later range that it satisfies then installs nothing more.
	$(BIN)/$(INSTALL) -c constraints.txt torch
	$(BIN)/$(INSTALL) -c constraints.txt -e ".[$*]"
	touch $@

demo: $(VENV)/installed-demo
	$(BIN)/python -m pyro_cpa.demo $(ARGS)

test: $(VENV)/installed-test lint types
	$(RUN) $(BIN)/python -m pytest $(ARGS_TEST) $(ARGS)

# All notebooks in full, their outputs stored in place.
tutorials: $(VENV)/installed-tutorials
	$(BIN)/python tutorials/run.py $(ARGS)

# The papers' tables, as far as ARGS="--minutes M", minutes of CPU time of each net, lets them go; all resume.
BENCHMARK = OMP_NUM_THREADS=1 $(BIN)/python benchmarks
benchmarks: $(VENV)/installed-test
	$(BENCHMARK)/bounds.py
	$(BENCHMARK)/toys.py --data-seeds 20 --weight-seeds 20 --pairs 20
	$(BENCHMARK)/latent_maps.py $(ARGS)
	$(BENCHMARK)/latent_maps.py --data-set mnist $(ARGS)
	$(BENCHMARK)/helmholtz.py $(ARGS)
	$(BENCHMARK)/update_costs.py
	$(BENCHMARK)/discrete_mnist.py $(ARGS)
	$(BENCHMARK)/models.py --dataset mnist --all $(ARGS)
	$(BENCHMARK)/results_page.py

# Every script of benchmarks in seconds; part of make test.
benchmarks-smoke: $(VENV)/installed-test
	$(RUN) $(BIN)/python -m pytest $(ARGS_TEST) tests/test_benchmarks.py $(ARGS)

# The parts that touch ArviZ, under ArviZ 1.x in an environment of its own.
test-arviz1: $(VENV312)/installed
	$(RUN) $(VENV312)/bin/python -m pytest tests/criticism tests/distributions tests/infer $(ARGS_TEST) $(ARGS)

$(VENV312)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON312)" || { echo "ArviZ 1.x needs Python >= 3.12: none found, set PYTHON312="; exit 1; }
	test -x $(VENV312)/bin/python || $(PYTHON312) -m venv $(VENV312)
	$(VENV312)/bin/$(INSTALL) --upgrade pip
	$(VENV312)/bin/$(INSTALL) -c constraints.txt torch
	$(VENV312)/bin/$(INSTALL) -c constraints.txt -e ".[test]" "arviz>=1.0"
	touch $@

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-test
	$(BIN)/mypy

# The pages in docs/_build/index.html; a warning of Sphinx is an error.
docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build

# Build both distributions, install the wheel alone elsewhere, and run the README's example there.
package:
	$(PYTHON) scripts/check_package.py $(ARGS)

clean:
	rm -rf $(VENV) $(VENV312) build dist docs/_build demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis
