# What a newcomer needs: `make run` and `make test`. Both need Python 3.11 or newer and a Python package index, and install into .venv.

VENV := .venv
PYTHON ?= python3 python3.13 python3.12 python3.11
CONFIG ?= configs/quickstart.yaml
ARGS ?=
TORCH ?= yes
WORKERS ?= 2

PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --disable-pip-version-check --prefer-binary --editable
TEST := $(if $(filter no,$(TORCH)),test-no-torch,test)

# glibc keeps freed activations, in huge pages, for the next training step instead of giving them back and faulting them in again: on a
# CPU with two cores 0.45 s instead of 1.2 s of system time a step of 512 tokens.
# Other C libraries do not read this; whoever has set the variable keeps their own.
ifeq ($(shell uname -s),Linux)
GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456
TUNE := GLIBC_TUNABLES='$(GLIBC_TUNABLES)'
endif

.PHONY: help run test lint format docs scale clean
.DELETE_ON_ERROR:

help:
	@echo "make run      install into $(VENV), fetch the embedded model, train and evaluate $(CONFIG), print the table"
	@echo "              CONFIG=FILE: another config; ARGS='key=value ...': config keys to set. The same command continues a run"
	@echo "make test     install what the tests need and run them; ARGS='...': options of pytest"
	@echo "              WORKERS=2: processes that share the tests (some GiB of memory each)"
	@echo "              TORCH=no: without torch (large), and without the tests that compare with it"
	@echo "make lint     check style with ruff; make format: correct it"
	@echo "make docs     write docs/configuration.md anew"
	@echo "make scale    write docs/scale.md anew from its records; ARGS=--compile: compile first what has none (libtpu, minutes each)"
	@echo "make clean    remove $(VENV) and what was built; run folders and the fetched model stay"
	@echo "PYTHON=...    the Python that $(VENV) is made with (at least 3.11)"

run: $(VENV)/.installed
	@$(TUNE) $(PY) -m seal_jax.cli train $(CONFIG) $(ARGS)

test: $(VENV)/.installed-$(TEST)
	$(PY) -m pytest --numprocesses=$(WORKERS) --dist=loadfile --durations=15 --durations-min=1 $(ARGS)

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

docs: $(VENV)/.installed
	$(PY) docs/configuration.py

scale: $(VENV)/.installed
	$(PY) docs/scale.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .jax_cache .pytest_cache .ruff_cache .hypothesis
	find seal_jax tests docs -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.made:
	@for python in $(PYTHON); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv $(VENV) && touch $@ && exit 0; \
	    echo "seal_jax: '$$python -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	  fi; \
	done; \
	echo "seal_jax: needs Python 3.11 or newer, and none of '$(PYTHON)' is; name one: make PYTHON=/path/to/python3" >&2; exit 1

$(VENV)/.installed: setup.py $(VENV)/.made
	@echo "Installing seal_jax and the packages it needs into $(VENV) (once; a minute or two)"
	@$(INSTALL) .
	@touch $@

$(VENV)/.installed-dev: setup.py $(VENV)/.made
	@$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-test-no-torch: setup.py $(VENV)/.made
	@echo "Installing seal_jax and what its tests need, without torch, into $(VENV) (once)"
	@$(INSTALL) '.[test-no-torch]'
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-test: setup.py $(VENV)/.made
	@echo "Installing seal_jax and what its tests need into $(VENV) (once). torch is large; 'make test TORCH=no' does without"
	@$(INSTALL) '.[test]' || { \
	  echo; echo "torch or peft cannot be installed here: see above. The tests that compare with them will be skipped, the others run."; \
	  echo "To try again: rm $@"; echo; \
	  $(INSTALL) '.[test-no-torch]'; }
	@touch $@ $(VENV)/.installed
