# Two commands matter: `make demo` and `make test`. Both print the plain commands that they run.
# Another Python: make demo PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: demo test docs site readme clean help

demo:  ## install into .venv and run the main job
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt .
	$(BIN)/papermill nbs/experiments.ipynb results/experiments.ipynb

test:  ## install with the dev extra and run everything that CI runs
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --do_print
	$(BIN)/papermill nbs/experiments.ipynb results/smoke.ipynb --cwd nbs -p methods zero-shot -p out_dir results/smoke
	OMP_NUM_THREADS=1 $(BIN)/papermill nbs/tables/ablations-coft.ipynb results/smoke-ablations.ipynb -p tasks glyphs-toy -p groups phases -p out_dir results/smoke
	$(BIN)/python .ci/readme.py --check
	$(BIN)/python .ci/check_docs.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

docs:  ## render the pages into _docs and check them (after make test)
	$(BIN)/python .ci/check_docs.py

site:  ## build the pages into _docs with Quarto, as they are published (after make test)
	$(BIN)/python .ci/render_docs.py
	quarto render _proc --no-execute
	rm -rf _docs
	mv _proc/_docs _docs

readme:  ## put the last results into the home page; write README.md and the sidebar (after make test)
	$(BIN)/python .ci/readme.py

clean:  ## remove what these commands made, results/ aside
	rm -rf .venv _docs _proc build dist coft.egg-info .pytest_cache

help:  ## show this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 10
