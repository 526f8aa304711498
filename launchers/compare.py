"""Compare runs seed by seed: one column of their metrics, and what separates each from the first, paired.

    python -m launchers.compare --runs=runs/perfect,runs/passive,runs/joint --column=return
    python -m launchers.compare --runs=runs/passive,runs/joint --column=gain_error --at=50,100,250

The same seed means the same start and the same hidden truth, so differences are taken within seeds: far narrower
intervals than two tables side by side. Values are IQM [95% CI] over seeds.
"""
import pathlib

import numpy as np

from core.errors import UserError
from core.evaluation import cell
from core.logging import read_metrics
from launchers import cli


def compare(*, runs: list[str], column: str = "return", at: list[str] | None = None) -> dict[str, list[str]]:
    """Print one column of every run and its paired difference to the first run's; return the printed cells.

    Args:
        runs: Folders of runs; the first is what the others are compared with.
        column: Of metrics.csv.
        at: Environment steps to compare at; by default the last row that has the column.
    """
    if not runs:
        raise UserError("--runs: name a run at least")
    if wrong := [step for step in at or [] if not step.isdigit()]:
        raise UserError(f"--at={wrong[0]}: a number of environment steps is due")
    columns = {run: read_column(run, column) for run in runs}
    base_steps, base, seeds = columns[runs[0]]
    steps_to_compare = [int(step) for step in at or []] or [int(base_steps[-1])]
    for run, (steps, _, theirs) in columns.items():
        if not np.array_equal(seeds, theirs):
            raise UserError(f"{run} has other seeds than {runs[0]}")
        if missing := set(steps_to_compare) - set(steps.astype(int)):
            raise UserError(f"{run} has no {column} at step {min(missing)}")
    print(f"{column}, IQM [95% CI] of {len(seeds)} seeds; second line: less {runs[0]}, paired")
    print("  ".join([f"{'run':24}", *(f"{f'step {step}':>30}" for step in steps_to_compare)]))
    cells = {}
    for run, (steps, values, _) in columns.items():
        rows = [int(np.flatnonzero(steps == step)[0]) for step in steps_to_compare]
        starts = [int(np.flatnonzero(base_steps == step)[0]) for step in steps_to_compare]
        own = [cell(values[row]) for row in rows]
        gaps = [cell(values[row] - base[start]) for row, start in zip(rows, starts, strict=True)]
        print("  ".join([f"{pathlib.Path(run).name:24}", *(f"{text:>30}" for text in own)]))
        if run != runs[0]:
            print("  ".join([" " * 24, *(f"{text:>30}" for text in gaps)]))
        cells[run] = own + (gaps if run != runs[0] else [])
    return cells


def read_column(run, column):
    """([rows] env steps, [rows, seeds] values, [seeds]) of one run, of the rows that have a value."""
    if not (pathlib.Path(run) / "metrics.csv").exists():
        raise UserError(f"no run in {run}: it has no metrics.csv")
    metrics = read_metrics(run)
    if column not in metrics:
        raise UserError(f'{run} has no column "{column}"; {cli.suggest(column, sorted(metrics))}')
    filled = ~np.isnan(metrics[column]).any(axis=1)
    if not filled.any():
        raise UserError(f'{run} has no value in its column "{column}"')
    return metrics["env_steps"][filled, 0], metrics[column][filled], metrics["seed"][0]


if __name__ == "__main__":
    cli.run(compare)
