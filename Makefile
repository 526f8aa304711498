# `make demo` and `make test` set up all they need in .venv by themselves. PYTHON=python3.12 chooses the interpreter.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test slow errors gpu lint clean

# Dual control of 32 pursuers with hidden costs: the agent knows the cost, learns it, or acts to learn it. The filter
# expects the noise that there is: obs_var = process_noise².
demo: RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)
demo: PURSUIT = $(BIN)/python -m launchers.train --config=configs/ekf_lqr_pursuit.py --num_seeds=32 --devices=2 \
  --config.env_kwargs.process_noise=0.1 --config.obs_var=0.01
demo: .venv/ready
	$(PURSUIT) --workdir=$(RUN)/perfect --config.env_kwargs.reveal=True
	$(PURSUIT) --workdir=$(RUN)/passive
	$(PURSUIT) --workdir=$(RUN)/active --config.explore=independent --config.info_weight=5
	$(BIN)/python -m launchers.compare --runs=$(RUN)/perfect,$(RUN)/passive,$(RUN)/active
	$(BIN)/python -m launchers.visualize --run=$(RUN)/active --against=$(RUN)/perfect \
	  --out=$(RUN)/active.gif --figure=$(RUN)/active.png

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n auto --dist loadfile

slow: .venv/ready
	$(BIN)/python -m pytest -m slow

errors: .venv/ready
	$(BIN)/python -m tests.plant_errors --all

# Installs nothing, because there may be no network: .venv if it is there, else $(PYTHON), with jax[cuda12].
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m tests.gpu

lint: .venv/ready
	$(BIN)/ruff check .

.venv/ready: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Monograph needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[envs,board,dev]"
	touch $@

clean:
	rm -rf .venv .pytest_cache runs
