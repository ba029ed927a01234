# The commands of this project. `make serve` and `make test` need nothing but git, make and Python 3.11 or newer.
#   make serve ARGS="--model-id … --port …"     make test ARGS="tests/test_scheduler.py -x"

VENV ?= .venv
BIN := $(VENV)/bin
CLIENTS ?= .venv-clients
ARGS ?=
# With a GPU, torch brings triton; without one, its interpreter runs the kernels in tests.
COMMA := ,
TEST_EXTRAS := test,torch$(if $(wildcard /dev/nvidiactl),,$(COMMA)interpreter)
# All tests run in one process more than there are cores, at most eight, with a file's tests in the same one. A part that
# ARGS names runs in one process. MORE: pytest's options beside these.
ALL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(MORE)
export VENV
# Modules are compiled at their first import (scripts/install.sh). Kept from that, every process would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help serve chat torch test test-without-torch test-histories test-clients test-newest test-ray lock lint types imports check bench-cpu bench-cpu-peers bench-cpu-ranks bench-first bench-scheduler bench-mixed bench-frontend bench-hostile bench-grammar bench-loading bench-gpu wheel clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/' | awk -F: '{printf "  make %-20s%s\n", $$1, $$2}'

serve: $(VENV)/.installed  ## serve the default model, or ARGS="--model-id …"
	@exec $(BIN)/tokenmill serve $(ARGS)

chat: $(VENV)/.installed  ## talk to the server that runs, or to one's own
	@exec $(BIN)/tokenmill chat $(ARGS)

torch: $(VENV)/.installed-torch  ## install torch, for models that the CPU engine has no kernels for

test: $(VENV)/.installed-test  ## all tests (installs torch, the reference of many), or ARGS="tests/test_scheduler.py"
	@$(BIN)/python -m pytest $(or $(ARGS),$(ALL))

test-without-torch: $(VENV)/.installed-test-without-torch  ## the tests that need no torch; PYTHON=… VENV=… for another Python
	@$(BIN)/python -m pytest $(or $(ARGS),$(ALL))

test-histories: $(VENV)/.installed-test  ## the random histories of scheduling, others and fifty times as many
	$(BIN)/python -m pytest --histories 50 --first-seed $(shell date +%s) $(or $(ARGS),tests/test_scheduler.py tests/test_scheduler_memory.py tests/test_constrained.py)

# TOKENMILL_PYTHON: who runs the server. --confcutdir: the other tests' conftest needs their environment.
test-clients: $(VENV)/.installed-test $(CLIENTS)/.installed tests/clients/node/node_modules  ## the clients that people use, Python's in .venv-clients and Node's
	@TOKENMILL_PYTHON=$(abspath $(BIN)/python) $(CLIENTS)/bin/python -m pytest --confcutdir=tests/clients tests/clients --disable-warnings $(ARGS)

test-ray:  ## deployments on a real Ray cluster of this machine, in .venv-ray
	@LOCKED=no VENV=.venv-ray scripts/install.sh -e '.[test,ray]'
	@.venv-ray/bin/python -m pytest tests/test_deploy*.py --slow $(ARGS)

# From nothing, so that pip keeps no version that is there already. A Makefile's variables reach it by the environment.
test-newest:  ## all tests, and the clients', with the newest of everything that pyproject.toml allows, in .venv-newest
	@rm -rf .venv-newest .venv-newest-clients
	@LOCKED=no TORCH="$${TORCH:-torch}" $(MAKE) --no-print-directory .venv-newest/.installed-test VENV=.venv-newest
	@.venv-newest/bin/python -m pip freeze --disable-pip-version-check
	@LOCKED=no $(MAKE) --no-print-directory test VENV=.venv-newest MORE=--slow
	@LOCKED=no $(MAKE) --no-print-directory test-clients VENV=.venv-newest CLIENTS=.venv-newest-clients

lock:  ## write locks/*.txt anew: the newest of everything, or ARGS="--upgrade-package NAME"
	@VENV=.venv-lock scripts/lock.sh $(ARGS)

lint: $(VENV)/.installed-dev  ## ruff, and the first words of docstrings
	$(BIN)/ruff check .
	$(BIN)/python scripts/docstrings.py

types: $(VENV)/.installed-dev  ## mypy --strict
	$(BIN)/mypy

imports: $(VENV)/.installed-dev  ## who may import whom
	$(BIN)/lint-imports

check: lint types imports test  ## everything that a change must pass

bench-cpu: $(VENV)/.installed-test  ## tokens/s and latencies of the default model over HTTP
	$(BIN)/python bench/serving.py $(ARGS)

bench-cpu-ranks: $(VENV)/.installed-test  ## ranks of one thread beside one rank of as many threads (ARGS="--model …")
	$(BIN)/python -m bench.cpu_ranks $(ARGS)

bench-cpu-peers: $(VENV)/.installed-test  ## the same beside llama.cpp and OpenVINO, interleaved (ARGS="--help")
	$(BIN)/python -m bench.peers $(ARGS)

bench-first: $(VENV)/.installed-test  ## the first answer after a start, beside the later ones
	$(BIN)/python -m bench.first $(ARGS)

bench-scheduler: $(VENV)/.installed-test  ## time of a scheduler step
	$(BIN)/python bench/scheduler.py $(ARGS)

bench-mixed: $(VENV)/.installed-test  ## first tokens of short prompts beside a long one, by a cost model; ARGS="--real --long 6000"
	$(BIN)/python -m bench.mixed_prompts $(ARGS)

bench-frontend: $(VENV)/.installed-test  ## events a second of the HTTP front end
	$(BIN)/python bench/frontend.py $(ARGS)

bench-hostile: $(VENV)/.installed-test  ## how long a stream waits while a large body is read
	$(BIN)/python bench/hostile.py $(ARGS)

bench-grammar: $(VENV)/.installed-test  ## do answers obey their schemas, and what do grammars cost
	$(BIN)/python -m bench.grammar $(ARGS)

bench-loading: $(VENV)/.installed-test  ## GB/s of loading weights, beside safetensors' load_file (ARGS="--gigabytes 3")
	$(BIN)/python -m bench.loading $(ARGS)

bench-gpu: $(VENV)/.installed-test  ## what a GPU does; with ARGS="--parts offline-8b,http-8b" a plan and one table
	$(BIN)/python -m bench.gpu $(ARGS)

wheel: $(VENV)/.installed  ## dist/tokenmill-….whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove what was made, the environment too
	rm -rf $(VENV) $(CLIENTS) tests/clients/node/node_modules build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(VENV)/.installed: pyproject.toml scripts/install.sh locks/torch.txt locks/without-torch.txt
	@scripts/install.sh -e .
	@touch $@

$(VENV)/.installed-torch: $(VENV)/.installed
	@scripts/install.sh -e '.[torch]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed-torch
	@scripts/install.sh -e '.[$(TEST_EXTRAS)]'
	@touch $@

$(VENV)/.installed-test-without-torch: $(VENV)/.installed
	@scripts/install.sh -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-test
	@scripts/install.sh -e '.[$(TEST_EXTRAS),dev]'
	@touch $@

$(CLIENTS)/.installed: tests/clients/requirements.txt locks/clients.txt | $(VENV)/.installed
	@echo "Installing the clients into $(CLIENTS)"
	@$(BIN)/python -m venv $(CLIENTS)
	@$(CLIENTS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --no-input -r $< \
		$(if $(filter no,$(LOCKED)),,-c locks/clients.txt)
	@touch $@

tests/clients/node/node_modules: tests/clients/node/package-lock.json
	@if command -v npm >/dev/null; then cd tests/clients/node && npm ci --ignore-scripts --no-audit --no-fund --silent; \
	else echo "npm is not installed: Node's clients are left out"; fi
	@if [ -d $@ ]; then touch $@; fi
