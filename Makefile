# Two commands on a fresh machine: `make quickstart` and `make test`. Both make .venv and install pinned dependencies first.
# To use a Python that already has them (a cluster's container, say): make test VENV= PYTHON=python3
PYTHON ?= python3
VENV ?= .venv
RUN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
INSTALLED := $(if $(VENV),$(VENV)/.installed)
PATHS := PYTHONPATH=$(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: install quickstart test test-slow lint docs clean

install: $(INSTALLED)

quickstart: $(INSTALLED)
	$(PATHS) $(RUN) tools/quickstart.py

test: $(INSTALLED)
	$(PATHS) HF_HUB_OFFLINE=1 $(RUN) -m pytest -m "not slow" $(ARGS)

test-slow: $(INSTALLED)
	$(PATHS) HF_HUB_OFFLINE=1 $(RUN) -m pytest $(ARGS)

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(INSTALLED)
	$(if $(VENV),$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]')
	$(PATHS) $(RUN) docs/generate_configuration.py
	$(PATHS) $(RUN) -m sphinx --quiet --fail-on-warning --keep-going docs build/docs
	@echo "open build/docs/index.html"

$(VENV)/.installed: pyproject.toml constraints.txt
	launch/setup_environment.sh "$(PYTHON)" "$(VENV)"
	touch $@

clean:
	rm -rf .venv runs data build *.egg-info
