"""A run's folder. Local files come first and are complete; W&B mirrors them when asked.

    config.json      what was computed          metrics.csv   a row per seed at every log and evaluation: no seconds in
    provenance.json  with what, where                         it, so the same config gives the same file, byte for byte
    summary.json     scores and speed           curve.png     scores against environment steps, or updates
"""
import csv
import io
import json
import os
import pathlib
import platform
import subprocess
import sys
from importlib import metadata
from typing import Any

import jax
import numpy as np

from core.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "distrax", "chex", "numpy", "gymnax", "gymnasium")


class Logger:
    """Files of one run. `rows` of an earlier part of it are kept on resume; `wandb_mode` is off, online or offline."""

    def __init__(self, workdir: pathlib.Path, config: dict, settings: dict, seeds: list[int], rows: int | None = None,
                 wandb_mode: str = "off"):
        self.workdir, self.seeds = pathlib.Path(workdir), seeds
        self.rows = 0 if rows is None else rows
        self.wandb_runs = _wandb_runs(self.workdir, config, seeds, wandb_mode) if wandb_mode != "off" else []
        if rows is None:
            write(self.workdir / "provenance.json", json.dumps(provenance(settings), indent=1))
            write(self.workdir / "metrics.csv", "")
            write(self.workdir / "config.json", json.dumps(config, indent=1))  # last: it says that here lives a run
        else:
            lines = (self.workdir / "metrics.csv").read_text().splitlines(keepends=True)
            write(self.workdir / "metrics.csv", "".join(lines[: rows + 1] if rows else []))

    def write(self, per_seed: dict[str, np.ndarray]) -> None:
        """One row per seed; every value has one entry per seed. The first column is the clock. NaN is an empty cell."""
        text = io.StringIO()
        clock, *columns = per_seed
        writer = csv.DictWriter(text, [clock, "seed", *columns], lineterminator="\n")
        if self.rows == 0:
            writer.writeheader()
        for i, seed in enumerate(self.seeds):
            row = {k: v[i].item() for k, v in per_seed.items()}
            writer.writerow({"seed": seed} | {k: _cell(v) for k, v in row.items()})
            if self.wandb_runs:
                self.wandb_runs[i].log({k: v for k, v in row.items() if not np.isnan(v)}, step=row[clock])
        with open(self.workdir / "metrics.csv", "a") as file:
            file.write(text.getvalue())
            file.flush()
            os.fsync(file.fileno())
        self.rows += len(self.seeds)

    def close(self, summary: dict[str, Any]) -> None:
        """`summary["score"]` names the columns that `summary["final"]` is about."""
        write(self.workdir / "summary.json", json.dumps(summary, indent=1))
        _curve(self.workdir, summary["score"])
        for i, run in enumerate(self.wandb_runs):
            for name, row in zip(summary["score"], finals(summary), strict=True):
                run.summary[f"final_{name}"] = row["per_seed"][i]
            run.finish()


def finals(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """What is in summary["final"], one for each name in summary["score"]: a game between teams has several."""
    return [summary["final"]] if len(summary["score"]) == 1 else [summary["final"][name] for name in summary["score"]]


def _cell(value):
    if isinstance(value, int):
        return str(value)
    return "" if np.isnan(value) else f"{value:.8g}"


def write(path: pathlib.Path, text: str) -> None:
    """The whole file or nothing."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_metrics(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """{column: [rows, seeds]} of metrics.csv; an empty cell is NaN."""
    with open(pathlib.Path(workdir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    num_seeds = len({row["seed"] for row in rows})
    return {k: np.array([float(row[k] or "nan") for row in rows]).reshape(-1, num_seeds) for k in rows[0]}


def provenance(settings: dict) -> dict:
    root = pathlib.Path(__file__).parents[1]

    def git(*words):
        run = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else None

    return dict(
        commit=git("rev-parse", "HEAD"), diff=git("diff", "HEAD"), command=sys.argv, settings=settings,
        python=platform.python_version(), versions={p: _version(p) for p in PACKAGES},
        device=jax.devices()[0].device_kind, devices=jax.device_count(), cpus=os.cpu_count(),
        machine=platform.machine(), xla_flags=os.environ.get("XLA_FLAGS", ""),
        matmul_precision=str(jax.config.jax_default_matmul_precision), prng=jax.config.jax_default_prng_impl)


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _wandb_runs(workdir, config, seeds, mode):
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"--wandb={mode} needs the package wandb: pip install wandb") from error
    name = workdir.absolute().name
    return [
        wandb.init(project="monograph", group=name, name=f"{name}-seed{seed}", id=f"{name}-seed{seed}", resume="allow",
                   config=config | dict(seed=seed), mode=mode, dir=workdir, reinit="create_new",
                   settings=wandb.Settings(console="off", silent=True))
        for seed in seeds]


def _curve(workdir, names):
    import matplotlib  # here, because only the end of a run draws

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = read_metrics(workdir)
    clock = "env_steps" if metrics["env_steps"].any() else "updates"
    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for i, name in enumerate(names):
        rows = np.isfinite(metrics[name]).all(axis=1)
        steps, values = metrics[clock][rows], metrics[name][rows]
        ax.plot(steps, values, color=f"C{i}", alpha=0.25, linewidth=0.8)
        label = f"{name}, median of {values.shape[1]} seeds"
        ax.plot(np.median(steps, axis=1), np.median(values, axis=1), f"C{i}.-", linewidth=2, label=label)
    ax.set(xlabel=clock.replace("_", " ") + " of a seed", ylabel="score", title=workdir.absolute().name)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    partial = workdir / ".curve.partial.png"
    fig.savefig(partial, dpi=120)
    plt.close(fig)
    os.replace(partial, workdir / "curve.png")
