# make demo   sound for a video of this repository, from nothing but a Python
# make docs   the documents as a site, in build/site
# make test   lint, types, the site and tests
# make clean  remove what they made

PYTHON ?= python3
BIN := .venv/bin
CLIP := examples/ball_wood.mp4
RESULT := demo/ball_wood.mp4
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Threads of several test processes would only wait for one another.
AVX2_ENV := ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2
TEST_ENV := OMP_NUM_THREADS=1 HYPOTHESIS_STORAGE_DIRECTORY=.pytest_cache/hypothesis
WORKERS ?= 2
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*)

.PHONY: demo docs test clean

demo: $(BIN)/.installed
	@mkdir -p demo
	@$(BIN)/mfmjt generate $(CLIP) --output $(RESULT)
	@echo "Play $(RESULT): the picture of $(CLIP), with sound that was made from it."

docs: $(BIN)/.installed-dev
	@$(SITE)
	@echo "Open build/site/index.html"

# The ops' tests run on the Triton kernels (interpreted) and on what this CPU uses, and a part of
# them once more as on a CPU with AVX2 only, and without the shortcut of eager calls. All checks run even if the first fails, so that one run
# shows everything.
test: $(BIN)/.installed-dev
	@status=0; \
	$(BIN)/ruff check . || status=1; \
	$(BIN)/ruff format --check . || status=1; \
	$(BIN)/mypy || status=1; \
	$(SITE) || status=1; \
	TRITON_INTERPRET=1 $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) tests/kernels || status=1; \
	$(AVX2_ENV) $(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --avx2 tests/kernels \
	  -k 'native or toom or all_modes or reference or without_any_key or huge' || status=1; \
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --library tests/kernels -k all_modes || status=1; \
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) || status=1; \
	exit $$status

clean:
	rm -rf .venv demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "mfmjt needs Python 3.10 or later; $(PYTHON) is older. Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "Cannot make a virtual environment. On Debian or Ubuntu: apt install python3-venv"; exit 1; }

$(BIN)/.torch: constraints.txt | $(BIN)/python
	@echo "Installing PyTorch into .venv (it is large; this happens once)"
	@$(PIP) torch numpy setuptools wheel
	@touch $@

# What is compiled is built against the PyTorch above, not against another copy of it.
$(BIN)/.installed: $(SOURCES) | $(BIN)/.torch
	@echo "Installing mfmjt into .venv"
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(BIN)/.installed-dev: $(SOURCES) | $(BIN)/.torch
	@echo "Installing mfmjt and its tests' tools into .venv"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@ $(BIN)/.installed
