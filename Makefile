# make demo          a population that is counted each year, beside the exact posterior: prints, and saves, what it finds
# make test          lint, type check and the tests that take seconds: 6 minutes on 2 cores, 4 once programs are compiled
# make test-long     the others, each with one of its cases: half an hour
# make test-weekly   all other cases, examples, and pages that take minutes: an hour
# make test-all      all tests on Python 3.11 and 3.13, which are the oldest and the newest, as far as they are found;
#                    and `make test-oldest`
# make test-oldest   the tests that take seconds, with the oldest NumPyro, JAX and ArviZ that pyproject.toml admits
# make test-nightly  the same tests with JAX of last night and NumPyro of its main branch, as an early warning
# make slow          measures all tests, and writes tests/slow.txt, the list of those that are long as they take over 2 s
# make docs          these pages as a site in docs/_build, warnings as errors
# make publish-docs  the site, pushed into the folder DOCS_VERSION of the branch gh-pages
# make outputs       what pages and examples print, and their pictures, written into docs/ anew
# make benchmark     the tables of benchmarks/
# make posteriors    all methods on posteriors with a known truth, and their page: hours
# make dist          wheel and sdist in dist/, tested in an environment of their own
# make check-tag     whether TAG is v and the version of the package, and the changelog has a section for it

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DOCS_INSTALLED := $(VENV)/.installed-docs

.PHONY: demo test test-long test-weekly test-all test-oldest test-nightly pytest slow lint ruff mypy docs publish-docs outputs \
  benchmark posteriors dist check-tag clean

# Installs what the example needs, and no more. `make test` adds the rest.
demo:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	test -e $(INSTALLED) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable . optax matplotlib
	$(BIN)/python examples/population.py

test: lint pytest

pytest: $(INSTALLED)
	$(BIN)/python -m pytest -n 2

test-long: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m 'long and not weekly'

test-weekly: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 -m weekly

# With nothing compiled before, as on a machine of CI.
slow: $(INSTALLED)
	JAX_COMPILATION_CACHE_DIR=$$(mktemp -d) $(BIN)/python -m pytest -n 2 -m 'long or not long' --durations 0 > .durations.txt || true
	sed -nE 's/^([0-9.]+)s (call|setup) +(.*)/\1 \3/p' .durations.txt | \
	  awk '{t = $$1; $$1 = ""; s[$$0] += t} END {for (k in s) if (s[k] > 2) print substr(k, 2)}' | \
	  grep -vE '^tests/test_(docs|errors|package)\.py' | sort > tests/slow.txt

lint: ruff mypy

ruff: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

mypy: $(INSTALLED)
	$(BIN)/mypy

# One virtual environment for each Python found, on the PATH or under pyenv.
test-all:
	@found=; \
	for version in 3.11 3.13; do \
	  for python in python$$version $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python; do \
	    if $$python -c 'import venv' 2>/dev/null; then \
	      echo "== $$($$python --version)"; found=1; \
	      $(MAKE) --no-print-directory pytest test-long test-weekly PYTHON=$$python VENV=.venv-$$version || exit 1; \
	      oldest=$${oldest:-$$python}; \
	      break; \
	    fi; \
	  done; \
	done; \
	test -n "$$found" || { echo "neither Python 3.11 nor 3.13 found"; exit 1; }; \
	echo "== oldest versions, $$($$oldest --version)"; \
	$(MAKE) --no-print-directory test-oldest PYTHON=$$oldest

test-oldest:
	sed -n 's/^dependencies = //p' pyproject.toml | grep -o '[a-z]*>=[0-9.]*' | sed 's/>=/==/' > .oldest.txt
	$(MAKE) --no-print-directory pytest VENV=.venv-oldest CONSTRAINTS='--constraint .oldest.txt'

# Where this index or GitHub cannot be reached: `make test-nightly JAX_INDEX= NUMPYRO=numpyro` tests the newest releases.
JAX_INDEX ?= --extra-index-url https://us-python.pkg.dev/ml-oss-artifacts-published/jax/simple/
NUMPYRO ?= git+https://github.com/pyro-ppl/numpyro

test-nightly:
	$(MAKE) --no-print-directory .venv-nightly/.installed VENV=.venv-nightly
	.venv-nightly/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --pre $(JAX_INDEX) jax jaxlib '$(NUMPYRO)'
	$(MAKE) --no-print-directory pytest VENV=.venv-nightly

benchmark: $(INSTALLED)
	$(BIN)/python benchmarks

# One core for all methods, as some would use two and others could not.
posteriors: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[pymc]'
	taskset -c 0 $(BIN)/python benchmarks/posteriors
	$(BIN)/python benchmarks/posteriors --report

# The code of the pages is run by tests/test_docs.py; of the notebooks, by the build.
docs: $(DOCS_INSTALLED)
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs docs/_build
	@echo "Open docs/_build/index.html"

# A folder for each version, `main` or a tag, and a page that lists them. The branch is made if there is none.
DOCS_VERSION ?= main
AS_DOCS := git -c user.name=docs -c user.email=docs@example.org
publish-docs: export DOCS_VERSION := $(DOCS_VERSION)

publish-docs: docs
	test -n "$(DOCS_VERSION)"
	rm -rf .gh-pages && git worktree prune
	git fetch --quiet --depth 1 origin +gh-pages:gh-pages || \
	  git branch gh-pages $$($(AS_DOCS) commit-tree -m 'No pages yet' $$(git mktree < /dev/null))
	git worktree add --quiet .gh-pages gh-pages
	rm -rf .gh-pages/$(DOCS_VERSION)
	cp -R docs/_build .gh-pages/$(DOCS_VERSION)
	rm -rf .gh-pages/$(DOCS_VERSION)/.doctrees .gh-pages/$(DOCS_VERSION)/.jupyter_cache
	cd .gh-pages && touch .nojekyll && \
	  { echo '<!doctype html><title>numpyro_vimco</title><h1>numpyro_vimco</h1>'; \
	    ls -d */ | sort -rV | sed 's|\(.*\)/|<p><a href="\1/">\1</a>|'; } > index.html
	cd .gh-pages && git add --all && (git diff --cached --quiet || $(AS_DOCS) commit --quiet -m "$(DOCS_VERSION)")
	git push --quiet origin gh-pages
	git worktree remove --force .gh-pages

# Of examples that take minutes docs/experiments.md and docs/which_objective.md have the results.
SHORT := population variable_selection coal_mining occupancy turtles cranes signal_and_noise mixture_selection
PAGES := README.md docs/quick_start.md docs/occupancy.md docs/checking_a_fit.md docs/bad_to_good.md

outputs: $(INSTALLED)
	for name in $(SHORT); do \
	  $(BIN)/python examples/$$name.py > docs/examples/output/$$name.txt && cp output/$$name.png docs/images/ || exit 1; \
	done
	$(BIN)/python examples/capture_recapture.py --nuts 1000 > docs/examples/output/capture_recapture.txt
	cp output/capture_recapture.png docs/images/
	$(BIN)/python docs/outputs.py $(PAGES)

# The tests of the sdist run against the wheel: the sdist's own package is removed.
dist: $(INSTALLED)
	rm -rf dist .venv-dist
	$(BIN)/python -m pip install --quiet --disable-pip-version-check build twine
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet --disable-pip-version-check "$$(ls dist/*.whl)[test]"
	tar -xzf dist/*.tar.gz -C .venv-dist
	rm -r .venv-dist/numpyro_vimco-*/numpyro_vimco
	cd .venv-dist/numpyro_vimco-*/ && ../bin/python -m pytest -n 2

check-tag:
	@test "$(TAG)" = "v$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' numpyro_vimco/__init__.py)" || \
	  { echo "TAG is '$(TAG)', and not v and the version in numpyro_vimco/__init__.py"; exit 1; }
	@grep -q "^## \[$(TAG:v%=%)\]" CHANGELOG.md || { echo "CHANGELOG.md has no section [$(TAG:v%=%)]"; exit 1; }

$(INSTALLED): EXTRAS := examples,test
$(DOCS_INSTALLED): EXTRAS := docs
$(INSTALLED) $(DOCS_INSTALLED): pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS) --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf .venv .venv-* .gh-pages .oldest.txt .pytest_cache .ruff_cache .mypy_cache dist docs/_build docs/notebooks docs/jupyter_execute
