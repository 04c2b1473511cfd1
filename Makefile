# make demo, make test, make docs: each sets up .venv first, and does nothing twice. test-oldest and test-middle have their own.
PYTHON ?= python3
# The torch that the development environment is tested with; any torch that pyproject.toml admits will do.
TORCH ?= torch==2.15.0
# A torch between the newest and the oldest, which is the lowest that pyproject.toml admits.
MIDDLE ?= torch==2.11.0
VENV := .venv
# What pytest runs, or all; those that take long by themselves.
TESTS := tests
MARKED := not slow
IGNORED := tests/browser
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
ASKED_FOR := $(PYTHON) $(TORCH)
WAS_ASKED_FOR := $(shell cat $(INSTALLED) 2>/dev/null)
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*)

# What a build leaves is of one environment, whose nanobind CMake remembers.
export SKBUILD_BUILD_DIR := $(VENV)/build

.PHONY: demo test test-all test-browser test-oldest test-middle lint docs bench clean anew
.DEFAULT_GOAL := test

# Another TORCH installs again, another PYTHON starts .venv anew.
ifneq ($(WAS_ASKED_FOR),$(ASKED_FOR))
$(INSTALLED): anew
endif
ifneq ($(WAS_ASKED_FOR),)
ifneq ($(firstword $(WAS_ASKED_FOR)),$(PYTHON))
$(BIN)/python: anew
endif
endif

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("omniops needs Python 3.10 or newer; make PYTHON=...")'
	$(PYTHON) -m venv --clear $(VENV)

# torchvision comes with torch, so that it is the one made for it. The build runs without isolation so that a second run
# finds CMake's cache where it left it, and so that sam2, built of plain Python, does not download a torch to itself.
$(INSTALLED): $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet '$(TORCH)' torchvision 'scikit-build-core>=0.11,<2' 'nanobind>=2.7,<4' ninja cmake setuptools wheel
	SAM2_BUILD_CUDA=0 $(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[dev]'
	echo '$(ASKED_FOR)' >$(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/omniops demo --out demo/demo.png --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(addprefix --ignore ,$(IGNORED)) -m '$(MARKED)' $(TESTS)

# A process for each file that runs exported models, the longest first: a worker died with several runtimes in it, and pytest-xdist then
# waits for good.
EXPORT_TESTS := tests/export/test_table.py $(filter-out %/test_table.py,$(wildcard tests/export/test_*.py))
test-all: $(VENV)/runtimes
	$(MAKE) test MARKED=slow IGNORED='tests/browser tests/export'
	printf '%s\n' $(EXPORT_TESTS) | OMP_NUM_THREADS=1 xargs -P 2 -n 1 $(BIN)/python -m pytest -m slow

# The runtimes of exported models: some hundred megabytes, which the other tests do without.
$(VENV)/runtimes: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[runtimes]'
	touch $@

# Each dependency in the lowest version that pyproject.toml names, by pip's constraints.
test-oldest: export PIP_CONSTRAINT = build/lowest.txt
test-oldest:
	mkdir -p build
	grep -oE '"[[:alnum:]-]+>=[[:digit:].]+' pyproject.toml | sed 's/"//; s/>=/==/' >build/lowest.txt
	$(MAKE) test VENV=.venv-oldest TORCH=torch

# What calls PyTorch: the rest was tested with its newest and its oldest.
# NumPy 2.4 refuses how the interpreter of that torch's Triton makes arrays numbers.
test-middle: export PIP_CONSTRAINT = build/middle.txt
test-middle:
	mkdir -p build
	echo 'numpy<2.4' >build/middle.txt
	$(MAKE) test VENV=.venv-middle TORCH='$(MIDDLE)' TESTS='tests/backends tests/ops tests/nn tests/dropin tests/sam2'

# The page in chromium, which is installed where it is missing and root asks. What make test skips without is an error.
test-browser: $(INSTALLED)
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; \
	} || { echo 'the tests of the page need chromium, which is not installed: apt-get install chromium, as root' >&2; exit 1; }
	$(BIN)/python -c 'import playwright'
	$(BIN)/python -m pytest tests/browser

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into build/docs: all of it each time, because Sphinx does not warn again of a page that did not change.
# A link that leads nowhere is a warning, and a warning an error.
docs: $(INSTALLED)
	$(BIN)/python -m sphinx --fresh-env --write-all --fail-on-warning --keep-going --quiet docs build/docs
	@echo 'The site is build/docs/index.html.'

bench: $(INSTALLED)
	$(BIN)/python benchmarks/carafe.py
	$(BIN)/python benchmarks/connected_components.py
	$(BIN)/python benchmarks/deform_conv2d.py
	$(BIN)/python benchmarks/sam2_predictors.py
	$(BIN)/python benchmarks/guided_upsampling.py

clean:
	rm -rf .venv .venv-* build dist demo
