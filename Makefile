# `make demo` and `make test` set up all they need in .venv by themselves. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test slow errors lint clean

demo: .venv/ready
	$(BIN)/python -m launchers.train --config=configs/ppo_cartpole.py --num_seeds=16 --devices=2 \
	  --workdir=runs/demo-$$(date +%Y%m%d-%H%M%S)

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto

slow: .venv/ready
	$(BIN)/python -m pytest -m slow

errors: .venv/ready
	$(BIN)/python -m tests.plant_errors --all

lint: .venv/ready
	$(BIN)/ruff check .

.venv/ready: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Monograph needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[envs,dev]"
	touch $@

clean:
	rm -rf .venv runs
