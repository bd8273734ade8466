# Everything runs in .venv, made on first use from pyproject.toml with the versions in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo figures notebooks test lint bench zoo docs clean
demo: .venv/.core
	$(BIN)/python -m finetune_lens.demo

figures: .venv/.core
	$(BIN)/python -m figures

notebooks: .venv/.dev
	$(BIN)/python notebooks/execute.py

test: .venv/.dev lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.dev
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/decompositions.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/spectra.py
	$(BIN)/python benchmarks/large.py
	$(BIN)/python benchmarks/patching.py
	$(BIN)/python benchmarks/grafting.py
	$(BIN)/python benchmarks/circuits.py
	$(BIN)/python benchmarks/probing.py
	$(BIN)/python benchmarks/cot.py

docs: .venv/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo site/index.html

zoo: .venv/.core
	$(BIN)/python -m finetune_lens.zoo build --all

.venv/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.core
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs site
