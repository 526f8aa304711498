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

from core import files
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
            files.write(self.workdir / "provenance.json", json.dumps(provenance(settings), indent=1))
            files.write(self.workdir / "metrics.csv", "")
            files.write(self.workdir / "config.json", json.dumps(config, indent=1))  # last: it says that here is a run
        else:
            self._cut(rows)

    def _cut(self, rows):
        """Leave the `rows` that the checkpoint knows of: training goes on after them."""
        path = self.workdir / "metrics.csv"
        header, *lines = files.text_of(path).splitlines(keepends=True) or [""]
        if len(lines) < rows:
            raise UserError(f"{path} is damaged: it has {len(lines)} rows, and its checkpoint counted {rows}")
        kept = "".join([header, *lines[:rows]]) if rows else ""
        if rows:
            parse(kept, path)
        files.write(path, kept)

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
        files.append(self.workdir / "metrics.csv", text.getvalue())
        self.rows += len(self.seeds)
        for i, run in enumerate(self.wandb_runs):
            row = {k: v[i].item() for k, v in per_seed.items()}
            run.log({k: v for k, v in row.items() if not np.isnan(v)}, step=row[clock])

    def close(self, summary: dict[str, Any]) -> None:
        """`summary["score"]` names the columns that `summary["final"]` is about. The file is the last one of a run: it
        says that all is there."""
        _curve(self.workdir, summary["score"])
        files.write(self.workdir / "summary.json", json.dumps(summary, indent=1))
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


def read_metrics(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """{column: [rows, seeds]} of metrics.csv; an empty cell is NaN."""
    path = pathlib.Path(workdir) / "metrics.csv"
    return parse(files.text_of(path), path)


def parse(text: str, path: pathlib.Path) -> dict[str, np.ndarray]:
    """`read_metrics` of the text of the file `path`."""
    try:
        header, *rows = list(csv.reader(io.StringIO(text), strict=True)) or [[]]
        if header[1:2] != ["seed"] or len({*header}) < len(header):
            raise ValueError("it does not begin with the names of its columns, the second of them seed")
        if not rows:
            raise ValueError("it has no row yet")
        if text[-1] != "\n" or any(len(row) != len(header) for row in rows):
            raise ValueError("its rows are not all whole")
        values = np.array([[float(cell or "nan") for cell in row] for row in rows])
        num_seeds = len({*values[:, 1]})
        seeds = values[:num_seeds, 1]
        if len(values) % num_seeds or (values[:, 1].reshape(-1, num_seeds) != seeds).any() or np.isnan(seeds).any():
            raise ValueError("it has not one row of every seed at each time")
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return dict(zip(header, values.T.reshape(len(header), -1, num_seeds), strict=True))


def provenance(settings: dict) -> dict:
    root = pathlib.Path(__file__).parents[1]

    def git(*words):
        try:
            run = subprocess.run(["git", "-C", root, *words], capture_output=True)
        except OSError:  # there is no git here
            return None
        return run.stdout.decode(errors="replace").strip() if run.returncode == 0 else None

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


def check_wandb(mode: str) -> None:
    """That W&B is installed, and knows who asks where it is to send something."""
    if mode == "off":
        return
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"--wandb={mode} needs the package wandb: pip install wandb") from error
    try:
        if mode == "online" and not wandb.login(prompt=False):
            raise UserError("--wandb=online needs a key: wandb login")
    except wandb.errors.Error as error:
        raise UserError(f"--wandb=online: {' '.join(str(error).split())}") from error


def _wandb_runs(workdir, config, seeds, mode):
    import wandb

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
    ax.set(xlabel=clock.replace("_", " ") + " of a seed", ylabel="score", 
           title=workdir.absolute().name.replace("$", r"\$"))
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()  # whole before it is written: then a full disk is an error like any other
    fig.savefig(picture, dpi=120)
    plt.close(fig)
    files.write(workdir / "curve.png", picture.getvalue())
