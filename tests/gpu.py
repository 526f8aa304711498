"""How long a machine takes: every method in smoke, then two programs of many seeds. It needs no network.

    python -m tests.gpu            # on a GPU
    python -m tests.gpu --smoke    # two iterations of one seed in every program: a check of this file

Each row is one call of `launchers.train.train`: the seconds of compilation, of training, of all (with evaluation, the
checkpoint at the end and the picture), and the env steps of all seeds in a second of training.
"""
import argparse
import importlib
import pathlib
import tempfile
import time

import jax
import numpy as np

from core.evaluation import words
from core.logging import finals
from launchers.train import train

ROOT = pathlib.Path(__file__).parents[1]
SEEDS = {"configs.ppo_cartpole": 2048, "configs.ekf_lqr_pursuit": 500}  # trained in one program each
COLUMNS = ("program", "seeds", "env steps of a seed", "compile s", "train s", "all s", "env steps/s", "score")


def methods():
    """The algorithm files that start from an environment. The others need data first."""
    names = sorted(path.stem for path in (ROOT / "algorithms").glob("*.py") if path.stem != "__init__")
    return [f"algorithms.{name}" for name in names if "dataset" not in get_config(f"algorithms.{name}")]


def get_config(module):
    return importlib.import_module(module).get_config()


def row(name, config, num_seeds, smoke, workdir):
    """{column: text} of one run, which saves and evaluates once, at the end."""
    budget = "env_steps" if "env_steps" in config else "updates"
    config.eval_every = config[budget]
    began = time.perf_counter()
    summary = train(config, num_seeds=num_seeds, smoke=smoke, save_every=np.inf, devices=1, workdir=str(workdir / name))
    seconds = time.perf_counter() - began
    score = "; ".join(f"{name} {words(final)}" for name, final in zip(summary["score"], finals(summary), strict=True))
    return dict(zip(COLUMNS, (
        f"{name}{' (smoke)' if smoke else ''}", f"{num_seeds:,}", f"{summary['env_steps']:,}",
        f"{summary['compile_seconds']:.1f}", f"{summary['train_seconds']:.1f}", f"{seconds:.1f}",
        f"{summary['env_steps_per_second']:,.0f}", score), strict=True))


def rows(workdir, smoke):
    for module in methods():
        yield row(module, get_config(module), 1, True, workdir)
    for module, num_seeds in SEEDS.items():
        yield row(module, get_config(module), 1 if smoke else num_seeds, smoke, workdir)


def line(cells):
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two iterations of one seed in every program")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began, table = time.perf_counter(), list(rows(pathlib.Path(folder), args.smoke))
    print(f"\nOn {jax.devices()[0].device_kind}, jax {jax.__version__}, {time.perf_counter() - began:.0f} s in all\n")
    print("\n".join([line(COLUMNS), line(["---"] * len(COLUMNS)), *(line(row.values()) for row in table)]))


if __name__ == "__main__":
    main()
