"""`make gpu` in small, on the machine at hand."""
import sys

import pytest

from tests import gpu
from tests.test_configs import small

PLANTED_ERRORS = {
    "one seed only": ("tests/gpu.py", "1 if smoke else num_seeds, smoke, workdir)", "1, smoke, workdir)",
                      "test_large_runs_train_their_seeds_in_one_program"),
    "the budget of a large run is cut": ("tests/gpu.py", "1 if smoke else num_seeds, smoke, workdir)",
                                         "1 if smoke else num_seeds, True, workdir)",
                                         "test_large_runs_train_their_seeds_in_one_program"),
}


def test_every_method_that_acts_has_a_row():
    assert {"algorithms.ppo", "algorithms.ippo", "algorithms.ekf_lqr", "algorithms.pets"} <= set(gpu.methods())


def test_large_runs_train_their_seeds_in_one_program(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(gpu, "row", lambda *args: calls.append((args[0], *args[2:4])))
    list(gpu.rows(tmp_path, smoke=False))
    assert calls[-2:] == [("configs.ppo_cartpole", 2048, False), ("configs.ekf_lqr_pursuit", 500, False)]
    assert calls[:-2] == [(name, 1, True) for name in gpu.methods()]


def test_a_table_in_smoke(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "methods", lambda: [])
    monkeypatch.setattr(gpu, "SEEDS", {"configs.ppo_cartpole": 3})
    monkeypatch.setattr(gpu, "get_config", lambda module: small(gpu.importlib.import_module(module).get_config()))
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke"])
    gpu.main()
    header, _, row = capsys.readouterr().out.splitlines()[-3:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert header.startswith("| program | seeds |") and len(cells) == len(gpu.COLUMNS)
    assert cells[:3] == ["configs.ppo_cartpole (smoke)", "1", "64"]


@pytest.mark.slow
def test_the_whole_table_in_smoke(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--smoke"])
    gpu.main()
    assert len(capsys.readouterr().out.split("| --- |")[-1].splitlines()) >= len(gpu.methods()) + len(gpu.SEEDS)
