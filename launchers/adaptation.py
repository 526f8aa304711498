"""How runs come through a jump of the hidden truth, against one that knows it and one that never learns.

    python -m launchers.adaptation --runs=runs/oracle,runs/frozen,runs/gradient,runs/ekf --figure=adapt.png

The first run knows the truth, reward r*; the second never learns. Each is one episode. IQM [95% CI] over paired seeds:

    regret      Σ r* − r of the training steps; after jump: of the steps since
    closed      1 − IQM(regret) / IQM(regret of the second) of the steps from --within after the jump on, seeds
                resampled together. No gap: the second's own interval reaches 0, and the ratio would mean nothing
    back        steps after the jump until the mean r of the last 10 is at most 10% of the mean |r*| below that of r*,
                and is so to the end: 10 at the least; r and r* are IQMs of the seeds
    nll         of the next state by the run's own model, median over steps
    covered     share of steps whose NIS 95% of right ones stay below;  ms: per step and seed, as it was run
"""
import pathlib
import types

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from core import files
from core.errors import UserError
from core.evaluation import cell, iqm
from core.logging import read_metrics
from launchers import cli
from launchers.runs import figure, regret

HEADER = "run", "regret", "after jump", "closed", "back", "nll", "covered", "ms"
WINDOW = 10  # steps


def adaptation(*, runs: list[str], within: int = 50, markdown: bool = False,
               figure: str | None = None) -> list[dict[str, str]]:
    """Print the table of the runs and return its rows.

    Args:
        runs: Folders of runs: the oracle, the frozen model, others.
        within: Steps after the jump from which on the gap should be closed.
        markdown: Print the table as Markdown.
        figure: The picture to write: rewards and errors against steps, .png or .pdf.
    """
    if len(runs) < 2:
        raise UserError("--runs: name the oracle and the frozen model at least")
    cli.check_output("figure", figure, ".png", ".pdf")
    first, frozen, *_ = read = [read_run(folder, runs[0]) for folder in runs]
    steps, jump = timeline(first, within)
    rows = [cells(run, first, frozen, jump, within, int(steps[0])) for run in read]
    print(f"{first.config['env']}, jump at step {jump}: IQM [95% CI] of {len(first.regret[0])} seeds\n")
    print(table(rows, markdown))
    if figure:
        draw(figure, read, steps, jump)
    return [dict(zip(HEADER, row, strict=True)) for row in rows]


def read_run(folder, first):
    """Of a run: name, config, metrics {column: [T, S]}, regret [T, S] up to every row, ms."""
    first, folder = pathlib.Path(first), pathlib.Path(folder)
    for path in (first, folder):
        if not (path / "summary.json").exists():
            raise UserError(f"no finished run in {path}: it has no summary.json")
    kinds = dict(env=str, env_kwargs=dict, num_envs=int)
    oracle, config = (files.read(path / "config.json", **kinds) for path in (first, folder))
    summary = files.read(folder / "summary.json", train_seconds=float | int, env_steps=int, seeds=list)
    if (taken := summary["env_steps"] * len(summary["seeds"])) <= 0:
        raise UserError(f"{folder / 'summary.json'} is damaged: {taken} steps of all seeds")
    if config["num_envs"] < 1 or type(config["env_kwargs"].get("jump_step", 0)) is not int:
        raise UserError(f"{folder / 'config.json'} is damaged: num_envs or jump_step")
    for settings in (oracle, config):
        settings["env_kwargs"].pop("reveal", None)  # the oracle sees the truth, which is the same
    if differ := [name for name in ("env", "env_kwargs", "num_envs") if config[name] != oracle[name]]:
        raise UserError(f"{folder} and {first} differ in {differ[0]}: the same seed is another truth there")
    metrics = read_metrics(folder)
    if missing := {"reward", "error", "nll", "covered", "train_episodes"} - metrics.keys():
        raise UserError(f'{folder} has no column "{min(missing)}": nothing of adaptation is logged there')
    if metrics["train_episodes"][:-1].any() or (metrics["train_episodes"][-1] > config["num_envs"]).any():
        raise UserError(f"{folder} is more than one episode: the belief starts again within it")
    return types.SimpleNamespace(
        name=folder.name, config=config, metrics=metrics, regret=regret(folder, first),
        ms=1e3 * summary["train_seconds"] / taken)


def timeline(run, within):
    """(steps [T], step of the jump), of rows that are where they are needed."""
    steps = run.metrics["env_steps"][:, 0] / run.config["num_envs"]
    jump, span = run.config["env_kwargs"].get("jump_step", 0), steps[0]
    if not 0 < jump < steps[-1] - max(within, 2 * WINDOW - span):
        raise UserError(f"{run.name} has {steps[-1]:g} steps and env_kwargs.jump_step = {jump}: too few after the jump")
    if (np.diff(steps) != span).any() or np.any(np.array([WINDOW, jump, within]) % span):
        raise UserError(f"{run.name} has rows {span:g} steps apart: that must divide {WINDOW}, jump_step and --within")
    return steps, jump


def closed(late, frozen):
    """Share of the gap `frozen` [S] that a run with regret `late` [S] closes: of all seeds, and its interval."""
    index = np.random.default_rng(0).choice(len(late), (2000, len(late)))
    gap = np.array([iqm(frozen[i]) for i in index])
    if np.percentile(gap, 2.5) <= 0:
        return "no gap"
    share = [1 - iqm(late[i]) / g for i, g in zip(index, gap, strict=True) if g > 0]
    low, high = np.percentile(share, [2.5, 97.5])
    return f"{1 - iqm(late) / iqm(frozen):.0%} [{low:.0%}, {high:.0%}]"


def back(reward, best, span):
    """Steps until `reward` [T, S], from the jump on, is near `best` and stays so; infinite where it never does."""
    reward, best = (np.array([iqm(row) for row in x]) for x in (reward, best))
    rows = WINDOW // span
    mean, target = (sliding_window_view(x, rows).mean(-1) for x in (reward, best))
    away = np.flatnonzero(mean < target - 0.1 * np.abs(best).mean())
    start = away[-1] + 1 if away.size else 0
    return span * (rows + start) if start < len(mean) else np.inf


def cells(run, first, frozen, jump, within, span):
    at, late = jump // span - 1, (jump + within) // span - 1  # rows up to which regret does not count
    total, after, *own = map(cell, (run.regret[-1], run.regret[-1] - run.regret[at],
                                    np.median(run.metrics["nll"], axis=0), run.metrics["covered"].mean(0)))
    steps = back(run.metrics["reward"][at + 1:], first.metrics["reward"][at + 1:], span)
    own = "––" if run is first else own  # it plans with the truth, not with a model of its own
    return (run.name, total, after, closed(*(r.regret[-1] - r.regret[late] for r in (run, frozen))),
            f"{steps:g}" if np.isfinite(steps) else "never", *own, f"{run.ms:.3g}")


def table(rows, markdown):
    if markdown:
        return "\n".join(f"| {' | '.join(row)} |" for row in [HEADER, ["---", *["--:"] * len(HEADER[1:])], *rows])
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in [HEADER, *rows])


def draw(path, runs, steps, jump):
    with figure(path, ncols=2, figsize=(8.4, 3.5), sharex=True) as (fig, (left, right)):
        for ax, name, shown in ((left, "reward", runs), (right, "error", runs[1:])):
            for i, run in enumerate(shown, len(runs) - len(shown)):
                values = run.metrics[name]
                ax.fill_between(steps, *np.percentile(values, [25, 75], axis=1), color=f"C{i}", alpha=0.15, linewidth=0)
                ax.plot(steps, [iqm(x) for x in values], color=f"C{i}", label=run.name.replace("$", r"\$"))
            ax.axvline(jump, color="grey", linestyle="--", linewidth=0.8)
            ax.spines[["top", "right"]].set_visible(False)
        left.set(xlabel="step; IQM and quartiles of seeds", title=f"{runs[0].config['env']}, reward per step")
        right.set(xlabel="step", yscale="log", title="error of the next state, in scales of change")
        fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


if __name__ == "__main__":
    cli.run(adaptation)
