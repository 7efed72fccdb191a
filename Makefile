# make demo | make test: each makes .venv if needed, installs, runs. Also: lint, format, test-transformers, clean.

# First interpreter that is new enough; set PY=... to choose another.
PY ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
UV := $(shell uv --version >/dev/null 2>&1 && echo uv)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
EXTRAS := demo,eval,dev,vit
ifeq ($(UV),)
INSTALL := $(BIN)/python -m pip install
else
INSTALL := uv pip install --python $(BIN)/python
endif

# Older transformers: each of these files becomes a folder of .venv that goes first on PYTHONPATH.
OLDER := $(patsubst .ci/transformers-%.txt,%,$(wildcard .ci/transformers-*.txt))
VERSION_TESTS ?= tests/adapters tests/embedded/test_random_models.py tests/packaging/test_huggingface_kernels.py
PYTEST_ARGS ?=
# Two workers; a file's tests stay together, so that its fixtures are made once.
WORKERS ?= -n 2 --dist loadfile

.PHONY: demo test test-transformers lint format install clean

demo: $(STAMP)
	$(BIN)/vlmprune quickstart --output runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS) $(PYTEST_ARGS)

# The adapter tests on the oldest and on a middle version; `make test` runs them on the newest.
test-transformers: $(addprefix test-transformers-,$(OLDER))

test-transformers-%: $(VENV)/transformers-%/.stamp
	PYTHONPATH="$(CURDIR)/$(VENV)/transformers-$*" $(BIN)/python -c \
	    "import transformers; assert transformers.__version__ == '$*', transformers.__version__"
	PYTHONPATH="$(CURDIR)/$(VENV)/transformers-$*" $(BIN)/python -m pytest $(WORKERS) $(VERSION_TESTS) $(PYTEST_ARGS)

.PRECIOUS: $(VENV)/transformers-%/.stamp
$(VENV)/transformers-%/.stamp: .ci/transformers-%.txt $(STAMP)
	rm -rf $(@D)
	$(INSTALL) --target $(@D) --no-deps -r $<
	touch $@

# mypy sees the mapped folders through links: .venv/types/vlmprune/kernels -> kernels, and so on.
TYPES := $(VENV)/types
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPES) && mkdir -p $(TYPES)/vlmprune
	ln -s $(addprefix $(CURDIR)/,$(wildcard vlmprune/*) kernels adapters evaluation demos) $(TYPES)/vlmprune/
	cd $(TYPES) && ../bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache \
	    -p vlmprune.core -p vlmprune.kernels

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	@test -n "$(PY)" || { echo "Python 3.11 or newer was not found; set PY=/path/to/python" >&2; exit 1; }
ifeq ($(UV),)
	@"$(PY)" -c 'import ensurepip' 2>/dev/null || { echo "$(PY) cannot make virtual environments:" \
	    "install uv, or your system's venv package (Debian: apt-get install python3-venv)" >&2; exit 1; }
	"$(PY)" -m venv $(VENV)
else
	uv venv --quiet --allow-existing --python "$$("$(PY)" -c 'import sys; print(sys.executable)')" $(VENV)
endif
	$(INSTALL) -c constraints.txt -e '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find vlmprune kernels adapters evaluation demos tests -name __pycache__ -type d -prune -exec rm -rf {} +
