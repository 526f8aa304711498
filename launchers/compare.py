"""Compare runs seed by seed: one column of their metrics, and what separates each from the first, paired.

    python -m launchers.compare --runs=runs/perfect,runs/passive,runs/joint --column=return
    python -m launchers.compare --runs=runs/passive,runs/joint --column=gain_error --at=50,100,250

The same seed means the same start and the same hidden truth, so differences are taken within seeds: far narrower
intervals than two tables side by side. Values are IQM [95% CI] over seeds.
"""
import pathlib

import numpy as np
from absl import flags

from core.errors import UserError
from core.logging import read_metrics
from launchers import cli
from launchers.runs import cell

FLAGS = flags.FLAGS
flags.DEFINE_list("runs", None, "Folders of runs; the first is what the others are compared with.", required=True)
flags.DEFINE_string("column", "return", "Of metrics.csv.")
flags.DEFINE_list("at", [], "Environment steps to compare at; by default the last evaluation.")


def column(run):
    """([evaluations] env steps, [evaluations, seeds] values) of one run."""
    if not (pathlib.Path(run) / "metrics.csv").exists():
        raise UserError(f"no run in {run}: it has no metrics.csv")
    metrics = read_metrics(run)
    if FLAGS.column not in metrics:
        raise UserError(f'{run} has no column "{FLAGS.column}"; {cli.suggest(FLAGS.column, sorted(metrics))}')
    return metrics["env_steps"][:, 0], metrics[FLAGS.column], metrics["seed"][0]


def main(_):
    columns = {run: column(run) for run in FLAGS.runs}
    base_steps, base, seeds = columns[FLAGS.runs[0]]
    at = [int(step) for step in FLAGS.at] or [int(base_steps[-1])]
    for run, (steps, _, theirs) in columns.items():
        if not np.array_equal(seeds, theirs):
            raise UserError(f"{run} has other seeds than {FLAGS.runs[0]}")
        if missing := set(at) - set(steps.astype(int)):
            raise UserError(f"{run} was not evaluated at step {min(missing)}")
    print(f"{FLAGS.column}, IQM [95% CI] of {len(seeds)} seeds; second line: less {FLAGS.runs[0]}, paired")
    print("  ".join([f"{'run':24}", *(f"{f'step {step}':>30}" for step in at)]))
    for run, (steps, values, _) in columns.items():
        rows = [int(np.flatnonzero(steps == step)[0]) for step in at]
        print("  ".join([f"{pathlib.Path(run).name:24}", *(f"{cell(values[row]):>30}" for row in rows)]))
        if run != FLAGS.runs[0]:
            starts = [int(np.flatnonzero(base_steps == step)[0]) for step in at]
            gaps = [cell(values[row] - base[start]) for row, start in zip(rows, starts, strict=True)]
            print("  ".join([" " * 24, *(f"{gap:>30}" for gap in gaps)]))


if __name__ == "__main__":
    cli.run(main)
