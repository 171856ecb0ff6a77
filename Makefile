# Needs Python 3.11 or newer and make; everything else goes into .venv. `make demo` and `make test` each work on a clean clone.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
RUN := $(VENV)/bin/python
LAUNCH := $(RUN) -m accelerate.commands.launch
PIP_INSTALL := -m pip install -qq --disable-pip-version-check --no-warn-conflicts
# Added to the command of `make demo`, `make images` and `make app`, for example ARGS="--max_steps 20".
ARGS ?=
# Processes of pytest, each with one thread; 0 is pytest's own process with two, which a debugger needs.
JOBS ?= 2
# The tests of a file stay in one process, because they share what is slow to make.
PYTEST := -m pytest -n $(JOBS) --dist loadfile
# What the oldest supported transformers must still pass.
OLDEST_TESTS := tests/models tests/test_attention_*.py

.PHONY: demo images app test test-all test-oldest test-slow lint typecheck docs clean rebuild

demo: $(VENV)/installed
	$(LAUNCH) scripts/finetune.py --output_dir outputs/demo --overwrite_output_dir $(ARGS)

images: $(VENV)/installed
	$(LAUNCH) scripts/finetune.py --task image-classification --output_dir outputs/images --overwrite_output_dir $(ARGS)

# Serves until Ctrl-C; of the demos' models, or small ones that it trains first.
app: $(VENV)/installed
	$(RUN) scripts/app.py $(ARGS)

# Training takes a thread for each core, in each of the processes: threads that wait are to leave their core to the others.
test test-all test-oldest test-slow: export OMP_WAIT_POLICY := passive

test: $(VENV)/installed
	$(RUN) $(PYTEST) -m "not slow" $(ARGS)

# The slow tests of some files; all of them where SLOW_TESTS is empty.
test-slow: $(VENV)/installed
	$(RUN) $(PYTEST) -m slow $(SLOW_TESTS) $(ARGS)

test-all: $(VENV)/installed
	$(RUN) $(PYTEST) $(ARGS)

test-oldest: $(OLDEST)/installed
	$(OLDEST)/bin/python $(PYTEST) -m "not slow" $(OLDEST_TESTS) $(ARGS)

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

typecheck: $(VENV)/installed
	$(RUN) -m mypy

# Into site/; a dead link or an unknown name is an error. Material's notice of its own end of life is left out.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(OLDEST) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache

# The stamp is written last and holds the folder it was built in, so an interrupted, copied or moved environment is built
# anew. When only the pins change it is brought up to date in place, and the stamp is away meanwhile.
ifneq ($(shell cat $(VENV)/installed 2>/dev/null),$(CURDIR))
$(VENV)/installed: rebuild
endif
ifneq ($(shell cat $(OLDEST)/installed 2>/dev/null),$(CURDIR))
$(OLDEST)/installed: rebuild
endif

# Not the Python of an activated .venv, which would have to delete itself.
NEEDED := Python 3.11 or newer is needed, for example: make PYTHON=python3.12
BASE_PYTHON := import sys; sys.version_info >= (3, 11) or sys.exit("$(NEEDED)"); print(sys._base_executable)

# $(call build_environment,folder,constraints,extras). torch comes first: the build that pip is set up to prefer stays.
define build_environment
	@echo "Installing into $(1): some minutes the first time"
	@if [ "$$(cat $(1)/installed 2>/dev/null)" = "$(CURDIR)" ]; then rm $(1)/installed; \
	else base="$$($(PYTHON) -c '$(BASE_PYTHON)')" && "$$base" -m venv --clear $(1); fi
	$(1)/bin/python $(PIP_INSTALL) -c $(2) pip setuptools
	$(1)/bin/python $(PIP_INSTALL) -c $(2) torch
	$(1)/bin/python $(PIP_INSTALL) -c $(2) --no-build-isolation -e ".[$(3)]"
	$(1)/bin/python $(PIP_INSTALL) --no-deps -r requirements-data.txt
	@echo "$(CURDIR)" > $(1)/installed
endef
comma := ,

$(VENV)/installed: setup.py constraints.txt requirements-data.txt
	$(call build_environment,$(VENV),constraints.txt,test$(comma)app$(comma)lint$(comma)triton$(comma)docs)

$(OLDEST)/installed: setup.py constraints-oldest.txt requirements-data.txt
	$(call build_environment,$(OLDEST),constraints-oldest.txt,test)
