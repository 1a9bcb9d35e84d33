# The commands of this repository. `make` alone lists them; each says in its remark what it does.
#
# `setup` is a stamp file: it runs again only when a lock or pyproject.toml changed.

VENV := .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUNTIME_STAMP := $(VENV)/.noodle-runtime
DEV_STAMP := $(VENV)/.noodle-dev
GGML_STAMP := $(VENV)/.noodle-ggml
TRANSFORMERS_STAMP := $(VENV)/.noodle-transformers
KERNELS := $(wildcard services/stage/executors/kernels/*.c services/stage/executors/kernels/*/*.c)
KERNELS_STAMP := $(VENV)/.noodle-kernels
# switches of ggml's own build, with semicolons between; another device than the CPU is one more, as -DGGML_VULKAN=ON.
# RPC is for tests: a device whose memory is not this machine's, as a card's is not
GGML_CMAKE_ARGS ?= -DGGML_NATIVE=ON;-DGGML_LLAMAFILE=ON;-DGGML_CPU_REPACK=ON;-DGGML_RPC=ON
SLOWEST := --durations=10 --durations-min=1
UV_VERSION := 0.13.9
DEV_EXTRAS := --extra control --extra stage --extra up --extra plots --extra transformers --extra dev
COMPILE := $(VENV)/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --no-annotate \
	--no-emit-index-url --no-emit-find-links --custom-compile-command "make lock" --quiet
# every lock is a part of the developer's, so that all machines and images have the same versions
PART := $(COMPILE) --constraint requirements-dev.lock

.DEFAULT_GOAL := help
.PHONY: docs map help setup setup-dev ggml transformers run test test-all test-engine lint check measure lock clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(RUNTIME_STAMP) $(GGML_STAMP) $(KERNELS_STAMP) $(wildcard $(TRANSFORMERS_STAMP)) ## install what runs noodle into .venv

setup-dev: $(DEV_STAMP) $(GGML_STAMP) $(KERNELS_STAMP) ## install what tests it as well

ggml: $(RUNTIME_STAMP) ## build ggml again for this machine (needs a C++ compiler; GGML_CMAKE_ARGS are its switches)
	@rm -f $(GGML_STAMP)
	@$(MAKE) --no-print-directory $(KERNELS_STAMP)
	@test -f $(GGML_STAMP)

transformers: $(TRANSFORMERS_STAMP) ## install torch and transformers too, for models that ggml does not know (several GB)

run: setup ## set up, then start noodle on this machine (Ctrl-C stops it)
	$(VENV)/bin/noodle up

test: setup-dev ## run the tests that need no Docker; of slow kinds a sample
	$(VENV)/bin/python -m pytest $(SLOWEST)

test-all: setup-dev ## run every test in full, those that need Docker too
	$(VENV)/bin/python -m pytest $(SLOWEST) --all tests/unit tests/contract tests/integration tests/engine

test-engine: setup-dev ## build the images and test them on a Docker engine
	$(VENV)/bin/python -m pytest $(SLOWEST) tests/engine

lint: setup-dev ## lint, format, types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

check: lint ## lint, format, types, unit and contract tests: what a change must pass
	$(VENV)/bin/python -m pytest tests/unit tests/contract

map: setup ## print every folder and file of the source with its purpose
	@$(VENV)/bin/python -m docs.generate map

docs: setup-dev ## write the pages that come from the code: commands, HTTP API, bounds
	$(VENV)/bin/python -m docs.generate

measure: setup-dev ## measure, and write the tables into docs/measurements.md
	$(VENV)/bin/python -m tests.measure

lock: $(DEV_STAMP) ## resolve the lock files again, keeping the versions that still fit
	$(VENV)/bin/python -m pip install --quiet uv==$(UV_VERSION)
	$(COMPILE) $(DEV_EXTRAS) --output-file requirements-dev.lock
	$(PART) --extra control --extra stage --extra up --extra plots --output-file requirements.lock
	$(PART) --extra transformers --output-file requirements-transformers.lock
	$(PART) --extra control --output-file requirements-control.lock
	$(PART) --extra stage --output-file requirements-stage.lock
	$(COMPILE) --extra ggml --output-file requirements-ggml.lock
	sed -i -E '/^(#|ggml-python==)/!d' requirements-ggml.lock

clean: ## remove the virtual environment and every cache of the tools (not the model cache)
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "noodle needs Python 3.11 or newer, and none is on PATH." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "noodle needs Python 3.11 or newer; $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." >&2; \
		echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(RUNTIME_STAMP): requirements.lock pyproject.toml | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements.lock
	$(VENV)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --editable .
	@touch $@

# Without ggml, transformers computes: it is installed where no compiler is, or the build fails. pip's own cache is not
# asked: it would give a build with other switches, or for another machine that shares the folder. The switches are only
# heeded for a requirement that is named here, and not for one in a file.
$(GGML_STAMP): requirements-ggml.lock $(RUNTIME_STAMP)
	@if ! printf 'int main(){}' | $${CC:-cc} -x c -o /dev/null - 2>/dev/null || \
	    ! printf 'int main(){}' | $${CXX:-c++} -x c++ -o /dev/null - 2>/dev/null; then \
		echo "no C and C++ compiler here (Debian and Ubuntu: build-essential), so torch and transformers are installed" \
			"instead of ggml: several GB, and slower"; \
		$(MAKE) --no-print-directory transformers; \
	elif echo "building ggml for this machine, about a minute" && \
	    $(VENV)/bin/python -m pip install --disable-pip-version-check --no-cache-dir --no-deps --force-reinstall --verbose \
	    --config-settings="cmake.args=$(GGML_CMAKE_ARGS)" $$(grep '^ggml-python==' requirements-ggml.lock) \
	    >$(VENV)/ggml-build.log 2>&1; then \
		touch $@; \
	else \
		echo "ggml could not be built ($(VENV)/ggml-build.log says why), so torch and transformers are installed instead:" \
			"several GB, and slower"; \
		$(MAKE) --no-print-directory transformers; \
	fi

$(TRANSFORMERS_STAMP): requirements-transformers.lock $(RUNTIME_STAMP)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements-transformers.lock
	@touch $@

# noodle's own kernels stand beside ggml's. They are compiled for several kinds of processors, and asked which this one is.
$(KERNELS_STAMP): $(KERNELS) $(wildcard services/stage/executors/kernels/*.h services/stage/executors/kernels/*/*.h) $(GGML_STAMP)
	@for folder in $(VENV)/lib/python3*/site-packages/ggml/lib; do \
		if [ -d "$$folder" ]; then \
			$${CC:-cc} -O3 -ffp-contract=off -shared -fPIC -pthread -o "$$folder/libnoodle.so" $(KERNELS) || \
				{ echo "noodle's own kernels could not be built: ggml's compute, several times slower"; exit 0; }; \
			touch $@; \
		fi; \
	done

$(DEV_STAMP): requirements-dev.lock $(RUNTIME_STAMP)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -r requirements-dev.lock
	@touch $@
