# `make demo` shows what the package does, `make test` runs all that CI runs. Both make their own environments.

PYTHON ?= python3
VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_PACKAGE ?= .venv-package
VENV_COMPAT ?= .venv-compat
PYTEST_ARGS ?=
# Two processes of one thread each: what tests train is too small for threads to share.
PYTEST_TWICE := -n 2 --dist loadgroup

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo benchmark benchmark-quick bench test lint tests slow gpu package release docs notebooks demo-quick oldest compat env clean distclean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-demo  ## install, then fine-tune the digits example and write its figures
	$(VENV)/bin/python examples/digits/demo.py

benchmark: $(VENV)/.installed-benchmark  ## all methods on three suites: hours; goes on where it stopped. Needs npm
	$(VENV)/bin/python examples/benchmark/prepare.py
	$(VENV)/bin/python examples/benchmark/benchmark.py
	$(VENV)/bin/python examples/benchmark/losses.py
	$(VENV)/bin/python examples/benchmark/summary.py

benchmark-quick: $(VENV)/.installed-benchmark  ## the same at its smallest, in minutes: that it runs, not what it finds
	$(VENV)/bin/python examples/benchmark/prepare.py
	$(VENV)/bin/python examples/benchmark/benchmark.py --seeds 1 --epochs 1 --questions 1 --output demo_output/benchmark
	$(VENV)/bin/python examples/benchmark/summary.py --results demo_output/benchmark

bench: $(VENV)/.installed-demo  ## what each method costs, against the floor: above an hour; goes on where it stopped
	$(VENV)/bin/python examples/overhead/overhead.py
	$(VENV)/bin/python examples/overhead/own.py
	$(VENV)/bin/python examples/overhead/large.py
	$(VENV)/bin/python examples/overhead/report.py

test: lint tests slow package docs demo-quick oldest compat  ## everything that CI runs

lint: $(VENV)/.installed-dev  ## style, format and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

tests: $(VENV)/.installed-dev  ## tests and doctests but for the slow ones; options in PYTEST_ARGS, for instance --cov
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest $(PYTEST_TWICE) -m "not slow" $(PYTEST_ARGS)

slow: $(VENV)/.installed-dev  ## the slow tests: what starts processes, or runs examples and the benchmark
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest $(PYTEST_TWICE) -m slow $(PYTEST_ARGS)

# Without a GPU, or with a torch that knows none, all are skipped. On Linux the usual build of constraints.txt's torch has CUDA.
gpu: $(VENV)/.installed-dev  ## the tests that need a GPU
	$(VENV)/bin/pytest -m gpu -rs $(PYTEST_ARGS)

# The checks run in the root folder with -I: the package that they import is the installed one.
package: $(VENV)/.installed-dev $(VENV_PACKAGE)/.installed  ## build, look into the wheel, import it with no extras installed
	rm -rf build dist
	$(VENV)/bin/python -m build --quiet
	$(VENV)/bin/python -m twine check --strict dist/*
	$(VENV)/bin/python .ci/check_wheel.py dist
	$(VENV_PACKAGE)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(VENV_PACKAGE)/bin/python -m pip check
	cd / && "$(abspath $(VENV_PACKAGE))/bin/python" -I -W error "$(CURDIR)/.ci/check_installed.py"

# Nothing is uploaded: that is a command for whoever may do it.
release: package  ## build and check a release, print what would be uploaded; fails unless commit and changelog are ready
	@echo "$(VENV)/bin/python -m twine upload dist/*  # would upload:"
	@cd dist && wc -c *.whl *.tar.gz | sed '$$d' && sha256sum *.whl *.tar.gz
	@test -z "$$(git status --porcelain)" || { echo "Not yet: there are uncommitted changes."; exit 1; }
	@version=$$($(VENV)/bin/python -c "import lightning_tpgm; print(lightning_tpgm.__version__)"); \
	grep -Eq "^## \[$$version\] - [0-9]{4}-[0-9]{2}-[0-9]{2}$$" CHANGELOG.md || \
		{ echo "Not yet: CHANGELOG.md has no section '## [$$version] - YYYY-MM-DD'."; exit 1; }

# Not --quiet: it would keep warnings from being counted.
docs: $(VENV)/.installed-dev  ## the site, into site/; a warning is an error
	$(VENV)/bin/mkdocs build --strict

notebooks: $(VENV)/.installed-dev  ## execute the sources of the notebooks, and write the .ipynb with their outputs
	$(VENV)/bin/python examples/notebooks/write.py

demo-quick: $(VENV)/.installed-dev  ## the demo at its smallest: that it runs, not what it finds
	$(VENV)/bin/python examples/digits/demo.py --seeds 1 --epochs 1 --output demo_output/quick

oldest: $(VENV_OLDEST)/.installed  ## the tests against the oldest supported lightning
	OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/pytest $(PYTEST_TWICE) -m "not slow" $(PYTEST_ARGS)

compat: $(VENV_COMPAT)/.installed  ## modules of other projects, the recipes, and the example with a transformer
	$(VENV_COMPAT)/bin/pytest compat
	$(VENV_COMPAT)/bin/pytest tests/test_examples.py -k text_classifier
	$(VENV_COMPAT)/bin/pytest tests/test_paper_examples.py

env: $(VENV)/.installed-dev  ## the development environment only

clean:  ## remove what builds, tests and the demo wrote
	rm -rf build dist site demo_output lightning_logs htmlcov .coverage .coverage.* *.egg-info
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache

distclean: clean  ## remove the environments as well
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_PACKAGE) $(VENV_COMPAT)

# An environment is made when it is absent, and installed again when a file that decides its content changed.
# lightning_tpgm/__init__.py holds the version, which the installed metadata repeat.
%/bin/python:
	$(PYTHON) -m venv $*

.PRECIOUS: %/bin/python

$(VENV)/.installed-dev: pyproject.toml constraints.txt lightning_tpgm/__init__.py | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-demo: pyproject.toml constraints.txt lightning_tpgm/__init__.py | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[examples]'
	touch $@

$(VENV)/.installed-benchmark: pyproject.toml constraints.txt lightning_tpgm/__init__.py | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e '.[benchmark]'
	touch $@

$(VENV_OLDEST)/.installed: pyproject.toml constraints-oldest.txt lightning_tpgm/__init__.py | $(VENV_OLDEST)/bin/python
	$(VENV_OLDEST)/bin/python -m pip install --quiet -c constraints-oldest.txt -e '.[test]'
	touch $@

# What imports torchvision lies in a folder that compat/conftest.py alone looks into: the usual build of torchvision is
# made for a torch with CUDA and does not load beside any other, and torchmetrics imports it wherever it is installed.
# pyproject.toml names what these five need.
$(VENV_COMPAT)/.installed: pyproject.toml constraints-compat.txt lightning_tpgm/__init__.py | $(VENV_COMPAT)/bin/python
	$(VENV_COMPAT)/bin/python -m pip install --quiet -c constraints-compat.txt -e '.[compat]'
	$(VENV_COMPAT)/bin/python -m pip install --quiet -c constraints-compat.txt --no-deps --upgrade \
		--target $(VENV_COMPAT)/vision anomalib lightly segmentation_models_pytorch timm torchvision
	touch $@

# The dependencies without any extra; the wheel itself follows in `package`.
$(VENV_PACKAGE)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV_PACKAGE)
	$(VENV_PACKAGE)/bin/python -m pip install --quiet -c constraints.txt .
	touch $@
