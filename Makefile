# make quickstart   train a real Gemma and see it answer        make test         lint, types, tests
# make test-lowest  the default tests on the oldest releases that pyproject.toml allows
# make clients      other programs read our files, each in its own environment; results in docs/clients.md
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: quickstart test test-lowest clients clean

PYTHON ?= python3
# Relative, so that a path with a space in it does no harm.
BIN := .venv/bin
RUN := runs/quickstart
# `.venv/.NAME` says that what NAME needs is installed, and is older than pyproject.toml when that has changed.
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

quickstart: .venv/.quickstart
	@if [ -n "$${FRESH:-}" ]; then rm -rf $(RUN); fi
	if [ -f $(RUN)/adapter_model.safetensors ]; then
	    echo "== $(RUN) is trained already (make quickstart FRESH=1 trains anew)"
	else
	    echo "== training recipes/quickstart.yaml, five to seven minutes"
	    $(BIN)/finetune train recipes/quickstart.yaml training.resume_from_checkpoint=true
	fi
	head -n 3 data/prompts.txt > .venv/prompts.txt
	echo; echo "== before: the base model"
	$(BIN)/finetune generate $(RUN) --no-adapter --max-new-tokens 96 < .venv/prompts.txt
	echo; echo "== after: the trained model"
	$(BIN)/finetune generate $(RUN) --max-new-tokens 96 < .venv/prompts.txt
	$(BIN)/finetune report $(RUN)
	echo "== the run: $(RUN) (report.html, README.md, ledger.json); chat with it: $(BIN)/finetune generate $(RUN)"

# The tests take both cores; what hypothesis draws differs with each commit. Lint and types run while they start.
test: .venv/.test
	@checks=$$(mktemp)
	( echo "== lint"; $(BIN)/ruff check .; $(BIN)/ruff format --check .; echo "== types"; $(BIN)/mypy ) > $$checks 2>&1 &
	echo "== tests"
	code=0
	seed=$$(git rev-parse --short=7 HEAD 2> /dev/null || echo 0)
	$(BIN)/python -m pytest -n 2 -m "not soak and not gpu and not clients" \
	    --hypothesis-profile ci --hypothesis-seed $$((16#$$seed)) || code=$$?
	wait $$! || code=$$?
	cat $$checks; rm $$checks
	echo "== $$(( SECONDS / 60 )) min $$(( SECONDS % 60 )) s"
	exit $$code

test-lowest:
	@echo "== the oldest releases that pyproject.toml allows, in .venv-lowest"
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) tests/lowest.py > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/lowest.txt -e '.[quickstart,dev]'
	.venv-lowest/bin/python -m pytest

clients: .venv/.test
	@code=0
	$(BIN)/python -m pytest -m clients tests/test_clients.py || code=$$?
	$(BIN)/python docs/reference.py
	exit $$code

.venv/.%: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
	    echo "Python 3.11 or newer is needed, $$($(PYTHON) --version) was found; name another: make $* PYTHON=python3.12"
	    exit 1
	}
	[ -x $(BIN)/python ] || { echo "== making .venv"; $(PYTHON) -m venv .venv; }
	echo "== installing what $* needs (minutes, the first time)"
	$(INSTALL) -e '.[$(EXTRAS_$*)]'
	touch $@
EXTRAS_quickstart := quickstart
EXTRAS_test := quickstart,dev

clean:
	rm -rf .venv .venv-lowest runs
