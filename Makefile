PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check setup clean

demo: setup ## toy clips -> curate -> train VAE -> encode -> train -> sample -> score
	$(BIN)/python jobs/train_video.py

test: setup check ## lint, types and the whole suite
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: .venv/.installed

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
