"""Train, all seeds at once.

    python -m launchers.train --config=configs/ppo_cartpole.py --config.lr=1e-3 --num_seeds=16 --workdir=runs/x
    python -m launchers.train --config=configs/ppo_cartpole.py --config.lr=1e-3 --num_seeds=16 --workdir=runs/x --resume

    from launchers.train import train                      # the same from Python
    summary = train(ppo_cartpole.get_config(), num_seeds=16, workdir="runs/x")

Training runs in chunks: one compiled program, its state donated, that takes as many iterations as it is told and
returns sums, never a value per step. Between chunks the loop below evaluates, logs, saves and draws. Iteration i of
seed s uses the key fold_in(fold_in(key(s), 1), i), so how a run is cut into chunks changes nothing. Seed s is evaluated
with the key fold_in(key(eval_seed), s): every seed plays episodes of its own, the same at every evaluation.
"""
import concurrent.futures
import contextlib
import pathlib
import resource
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from core import checkpoint
from core.errors import UserError
from core.evaluation import by_agent, by_team, score, summarize, words
from core.logging import Logger, check_wandb, finals, read_metrics
from launchers import cli
from launchers.processes import use_devices


def train(config, *, seed: int = 0, num_seeds: int = 1, eval_seed: int = 1_000_000, workdir: str | None = None,
          resume: bool = False, save_every: float = 30.0, keep: int = 2, devices: int = 0, chunk: int = 0,
          smoke: bool = False, wandb: Literal["off", "offline", "online"] = "off", coordinator: str | None = None,
          num_processes: int = 1, process_id: int = 0) -> dict[str, Any]:
    """Train all seeds of a config and return what summary.json holds.

    Args:
        seed: First seed.
        num_seeds: Seeds trained together.
        eval_seed: Fixes the evaluation episodes.
        workdir: Folder of this run; by default a new one under runs/.
        resume: Go on from the newest checkpoint in workdir.
        save_every: Seconds between checkpoints, at least; there is one at the end and on SIGTERM, too.
        keep: Checkpoints that stay: the newest ones; the best one stays, too.
        devices: Devices to spread the seeds over. 0: all accelerators. A CPU is split into as many as asked for.
        chunk: Iterations of one call of the program; 0: about half a second's worth.
        smoke: Shrink the budget to seconds.
        wandb: Mirror the local files to Weights & Biases.
        coordinator: host:port of process 0, where several processes train together.
        num_processes: How many they are.
        process_id: Which of them this one is.
    """
    cli.check_seeds(seed=seed, eval_seed=eval_seed)
    for name, value, least in (("num_seeds", num_seeds, 1), ("save_every", save_every, 0), ("keep", keep, 1),
                               ("chunk", chunk, 0)):
        if not value >= least:
            raise UserError(f"--{name}={value}: at least {least}")
    check_wandb(wandb)
    if config is not None:
        cli.algorithm_of(config)  # which checks the config
    workdir = workdir or f"runs/{cli.config_name(config)}-{time.strftime('%Y%m%d-%H%M%S')}"
    num_devices = use_devices(devices, coordinator, num_processes, process_id)
    config = ml_collections.ConfigDict(config.to_dict())
    config = ml_collections.FrozenConfigDict(cli.smoke(config) if smoke else config)
    stored = cli.config_dict(config) | dict(seed=seed, num_seeds=num_seeds, eval_seed=eval_seed)
    cli.check_folder(workdir, stored, resume)
    began, seeds = time.perf_counter(), np.arange(seed, seed + num_seeds, dtype=np.int32)
    job = compile_job(cli.algorithm_of(config), config, seeds, eval_seed, num_devices)
    compile_seconds = time.perf_counter() - began

    folder, lead = pathlib.Path(workdir), jax.process_index() == 0
    with cli.open_folder(folder, stored, resume) if lead else contextlib.nullcontext():
        state = newest(job, folder / "checkpoints", lead) if resume else State(job.run, job.zeros(), START)
        if jax.process_count() > 1:  # all have looked at the folder before one of them writes there
            multihost_utils.sync_global_devices("the folder is read")
        settings = dict(seed=seed, num_seeds=num_seeds, eval_seed=eval_seed, devices=devices, chunk=chunk, smoke=smoke)
        logger = Logger(folder, stored, settings, seeds.tolist(), state.meta["rows"], wandb) if lead else None

        row, seconds = fit(job, state, folder, logger, save_every, keep, chunk)
        if row is None:  # it was killed after its last checkpoint
            row = {k: v[-1] for k, v in read_metrics(folder).items() if k != "seed"}
        summary = summary_of(job, seeds, row, compile_seconds, seconds, num_devices) | dict(smoke=smoke)
        if lead:
            logger.close(summary)
            print(table(summary, folder))
        return summary


class Job(NamedTuple):
    """A config as compiled programs over the seed axis: every leaf of what they take and give is [S, ...]."""

    config: Any
    clock: str  # what the budget counts: env_steps or updates
    iteration: int  # what one train_step adds to it
    run: Any  # the first one, in its place
    zeros: Callable  # -> totals: sums of info, and the first iteration that was not finite, or −1
    train: Callable  # run, totals, start, stop -> run, totals
    test: Callable  # run -> {column: [S]}, of full episodes
    measure: Callable  # run -> {column: [S]}, of the method's own
    columns: list[str]  # those of `test`
    scores: list[str]  # the columns that a run is judged by
    whole: Callable  # tree -> the same on this process, whole


def programs(algorithm, config, num_seeds, eval_seed, source):
    """(init, train, test, measure, info) over the seed axis. `data` is the data set of an offline method, else nothing:
    an argument, so that no program holds a copy of it."""
    offline, played = "dataset" in config, cli.episodes_of(algorithm, config, config.get("eval_episodes", 0), eval_seed)

    @jax.jit  # so that it is traced once for the sums and the loop
    def train_step(run, key, data):
        return algorithm.train_step(run, key, data if offline else source, config)

    def init(seed, data):
        return algorithm.init(jax.random.fold_in(jax.random.key(seed), 0), data if offline else source, config)

    def info(run, data):
        return train_step(run, jax.random.key(0), data)[1]

    def train(run, totals, seed, data, start, stop):
        key = jax.random.fold_in(jax.random.key(seed), 1)

        def iteration(i, state):
            run, (sums, bad) = state
            run, info = train_step(run, jax.random.fold_in(key, i), data)
            finite = jax.tree.reduce(lambda ok, x: ok & jnp.isfinite(x).all(), info, jnp.bool_(True))
            return run, (jax.tree.map(jnp.add, sums, info), jnp.where(finite | (bad >= 0), bad, i))

        return jax.lax.fori_loop(start, stop, iteration, (run, totals))

    def test(run, seed, data):
        returns, length, *told = played(run, seed)
        return score(returns, length, cli.teams_of(config), *told)

    def measure(run, seed, data):
        key = jax.random.fold_in(jax.random.key(eval_seed), ~seed)  # none that an evaluation has
        if offline:
            return algorithm.measure(run, key, data, config)
        env = cli.eval_env(config, config.num_envs)
        return algorithm.measure(cli.moved(algorithm, run, config), key, env, config)

    def nothing(run, seed, data):
        return {}

    return (cli.per_seed(init, num_seeds, (0, None)),
            cli.per_seed(train, num_seeds, (0, 0, 0, None, None, None)),
            cli.per_seed(test if hasattr(algorithm, "act") else nothing, num_seeds, (0, 0, None)),
            cli.per_seed(measure if hasattr(algorithm, "measure") else nothing, num_seeds, (0, 0, None)),
            cli.per_seed(info, num_seeds, (0, None)))


def compile_job(algorithm, config, seeds, eval_seed, num_devices):
    (clock, iteration), source = cli.iteration_of(config), cli.source_of(config)
    if config[clock] - config.get("random_steps", 0) < iteration:
        raise UserError(f"{clock} = {config[clock]} leaves no iteration, which takes {iteration}")
    if getattr(source, "on_host", False) and len(seeds) % num_devices:
        raise UserError(f'environment "{config.env}" runs on the host: --num_seeds has to be a multiple of --devices')
    mesh = jax.make_mesh((num_devices,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:num_devices])
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("devices"))
    by_seed = len(seeds) % num_devices == 0  # every device has seeds of its own and waits for no other

    def spread(program, num_split, num_whole):
        if num_devices == 1 or not by_seed:
            return program
        specs = (split.spec,) * num_split + (whole.spec,) * num_whole
        return jax.shard_map(program, mesh=mesh, in_specs=specs, out_specs=split.spec, check_vma=False)

    seeds_of_a_device = len(seeds) // num_devices if by_seed else len(seeds)
    init, train, test, measure, info = programs(algorithm, config, seeds_of_a_device, eval_seed, source)
    init, train, info = spread(init, 1, 1), spread(train, 3, 3), spread(info, 1, 1)
    test, measure = spread(test, 2, 1), spread(measure, 2, 1)

    per_seed = split if by_seed else whole
    seeds, data = jax.device_put(seeds, per_seed), jax.device_put(source if "dataset" in config else (), whole)
    like = jax.eval_shape(init, seeds, data)
    places = jax.tree.map(lambda _: split, like) if by_seed else env_places(algorithm, config, like, mesh)
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), like, places)
    sums = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(info, like, data))
    totals = jax.device_put((sums, np.full(len(seeds), -1, np.int32)), per_seed)

    lowered = [  # traced one after the other, compiled side by side
        jax.jit(init, out_shardings=places).lower(seeds, data),
        jax.jit(train, donate_argnums=(0, 1), out_shardings=(places, per_seed)).lower(like, totals, seeds, data, 0, 1),
        jax.jit(test, out_shardings=per_seed).lower(like, seeds, data),
        jax.jit(measure, out_shardings=per_seed).lower(like, seeds, data)]
    with concurrent.futures.ThreadPoolExecutor(len(lowered)) as threads:
        init, train, test, measure = threads.map(lambda program: program.compile(), lowered)
    columns, measures = list(lowered[2].out_info), list(lowered[3].out_info)
    scores = [name for name in columns if name == "return" or name.startswith("return_team")] or measures[:1]
    gather = jax.jit(lambda tree: tree, out_shardings=whole) if jax.process_count() > 1 else lambda tree: tree
    return Job(
        config, clock, iteration, init(seeds, data), lambda: jax.tree.map(jnp.copy, totals),
        lambda run, totals, start, stop: train(run, totals, seeds, data, start, stop),
        lambda run: test(run, seeds, data), lambda run: measure(run, seeds, data), columns, scores, gather)


def env_places(algorithm, config, like, mesh):
    """Where the leaves [S, ...] of a run lie if its environments are spread over the devices: an axis that doubles with
    num_envs is theirs."""
    if config.num_envs % mesh.size:
        raise UserError(f"neither num_seeds nor num_envs = {config.num_envs} divides over {mesh.size} devices")
    doubled = ml_collections.FrozenConfigDict(config.to_dict() | dict(num_envs=2 * config.num_envs))
    source = cli.source_of(doubled)
    twice = jax.eval_shape(lambda key: algorithm.init(key, source, doubled), jax.random.key(0))

    def place(one, two):
        axes = ["devices" if a != b else None for a, b in zip(one.shape[1:], two.shape, strict=True)]
        return NamedSharding(mesh, PartitionSpec(None, *axes))

    leaves = [place(*pair) for pair in zip(jax.tree.leaves(like), jax.tree.leaves(twice), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


class State(NamedTuple):
    run: Any
    totals: Any
    meta: dict  # iteration; since, that of the last row; rows; seconds of training


START = dict(iteration=0, since=0, rows=None, seconds=0.0)


def newest(job, folder, lead):
    """The state in the newest checkpoint; where none was written yet, that before the first iteration."""
    state = State(job.run, job.zeros(), START)
    if not checkpoint.steps(folder):
        return state
    stored, meta = checkpoint.restore_newest(folder, dict(run=state.run, totals=state.totals))
    wrong = [name for name in START if type(meta.get(name)) not in (int, float) or not meta[name] >= 0]
    if wrong or meta["iteration"] != meta["step"]:
        raise UserError(f"{folder}: {checkpoint.META} of step {meta['step']} is damaged: {(wrong or ['iteration'])[0]}")
    if lead:  # it may have been killed before it removed others
        checkpoint.prune(folder, meta["step"])
    return State(stored["run"], stored["totals"], meta)


def fit(job, state, folder, logger, save_every, keep, chunk):
    """All that is left of training: (last row, seconds)."""
    (run, totals, meta), config = state, job.config
    i, since, seconds, row, best = meta["iteration"], meta["since"], meta["seconds"], None, -np.inf
    clock = int(np.asarray(getattr(job.whole(run.clock), job.clock)).max())
    budget = config[job.clock] - (clock - i * job.iteration)  # less what was taken before the first iteration
    iterations, alone = budget // job.iteration, jax.process_count() == 1
    evaluations = stops_of(iterations, budget / config.eval_every)
    rows = sorted({*evaluations, *stops_of(iterations, budget / config.get("log_every", config.eval_every))})
    seeds = totals[1].shape[0]
    chunk = chunk if alone else iterations  # processes must cut alike; their clocks differ
    size, writer = chunk or 1, checkpoint.Writer(folder / "checkpoints", save_every, keep)

    def save(score=None):
        saved = job.whole(dict(run=run, totals=totals))
        if logger:
            writer.save(i, saved, dict(iteration=i, since=since, rows=logger.rows, seconds=seconds, score=score))

    steps = (n * job.iteration * seeds for n in (iterations, i))
    bar = cli.progress_bar(f" {job.clock.replace('_', ' ')}", *steps)
    with sigterm() as told_to_stop, bar, contextlib.closing(writer):
        for stop in [stop for stop in rows if stop > i]:
            while i < stop:
                began, upto = time.perf_counter(), min(i + size, stop)
                run, totals = job.train(run, totals, i, upto)
                check_finite(job, totals, clock - meta["iteration"] * job.iteration, logger, writer)
                took = time.perf_counter() - began
                bar.update((upto - i) * job.iteration * seeds)
                size = size if chunk or took > 0.25 else 2 * size
                i, seconds = upto, seconds + took
                if told_to_stop.is_set():
                    save()
                    writer.wait()
                    raise SystemExit(f"stopped by SIGTERM after iteration {i}: go on by --resume")
                writer.check()
                if alone and i < stop and writer.due:
                    save()
            row = row_of(job, run, totals, stop - since, stop in evaluations)
            since, totals = stop, job.zeros()
            if logger:
                logger.write(row)
            score = float(row["return"].mean()) if "return" in row and stop in evaluations else None
            if not alone or stop == rows[-1] or writer.due or (score is not None and score > best and writer.free):
                save(score)
                best = best if score is None else max(best, score)
            bar.set_postfix({name: f"{np.nanmean(row[name]):.4g}" for name in job.scores if stop in evaluations})
    return row, seconds


def stops_of(iterations, count):
    """The iterations after which something is done `count` times, rounded, at least once: evenly, and at the end."""
    count = max(1, round(count))
    return sorted({iterations * (k + 1) // count for k in range(count)} - {0})


@contextlib.contextmanager
def sigterm():
    """An event that is set by SIGTERM, where Python can listen to it."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread() or jax.process_count() > 1:
        yield told
        return
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def check_finite(job, totals, start, logger, writer):
    bad = np.asarray(job.whole(totals[1]))
    if (bad < 0).all():
        return
    writer.wait()
    index, last = int(np.argmax(bad >= 0)), checkpoint.steps(writer.folder)[-1:] or ["none was written yet"]
    seed, when = logger.seeds[index] if logger else index, start + (int(bad[index]) + 1) * job.iteration
    raise UserError(f"a loss is not finite at {job.clock.removesuffix('s').replace('_', ' ')} {when} of seed {seed}; "
                    f"the last good checkpoint: {last[0]}")


def row_of(job, run, totals, iterations, evaluated):
    """{column: [S]}: the clock, the evaluation or NaN, the method's measures, means over the iterations before."""
    tested = job.test(run) if evaluated else {}
    clock, tested, measured, sums = jax.tree.map(
        np.asarray, job.whole((run.clock._asdict(), tested, job.measure(run), totals[0])))
    empty = np.full(len(clock[job.clock]), np.nan)
    row = {job.clock: clock.pop(job.clock)} | clock | {name: tested.get(name, empty) for name in job.columns}
    return row | measured | means_of(sums, iterations, cli.teams_of(job.config))


def means_of(sums, iterations, teams):
    """{column: [S]} of sums over `iterations`: the means of info, and of the episodes that ended."""
    sums = dict(sums)
    episode = sums.pop("episode", None)
    means = {k: v / iterations for k, v in sums.items()}
    if episode is None:
        return means
    count = np.where(episode["count"] > 0, episode["count"], np.nan)
    returns = {f"train_{name}": total / count for name, total in by_team(episode["return"], teams).items()}
    told = by_agent({f"train_{name}": (x.T / count).T for name, x in episode.items()
                     if name not in ("count", "return", "length")})
    return returns | dict(train_length=episode["length"] / count) | told | dict(
        train_episodes=episode["count"]) | means


def summary_of(job, seeds, row, compile_seconds, train_seconds, devices):
    config, final = job.config, {name: summarize(row[name]) for name in job.scores}
    env_steps, updates = (int(np.median(row[name])) for name in ("env_steps", "updates"))
    taken = env_steps - config.get("random_steps", 0)
    others = {k: summarize(v) for k, v in row.items() if k not in (*job.scores, "env_steps", "updates")
              and np.isfinite(v).all()}  # NaN: no episode ended, or it is of an evaluation that was not due
    return dict(
        algorithm=config.algorithm, env=config.env, seeds=seeds.tolist(), env_steps=env_steps, updates=updates,
        score=job.scores, final=final[job.scores[0]] if len(final) == 1 else final, **others,
        compile_seconds=compile_seconds, train_seconds=train_seconds,
        env_steps_per_second=taken * len(seeds) / train_seconds,
        updates_per_second=updates * len(seeds) / train_seconds,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        device=jax.devices()[0].device_kind, devices=devices)


def table(summary, folder):
    scores = [f"{words(final)} {name}" for name, final in zip(summary["score"], finals(summary), strict=True)]
    rows = {
        "method": f"{summary['algorithm']} on {summary['env']}",
        "score": f"{'; '.join(scores)}, IQM [95% CI] of {len(summary['seeds'])} seeds",
        "budget": f"{summary['env_steps']:,} env steps and {summary['updates']:,} updates a seed",
        "speed": f"{summary['env_steps_per_second']:,.0f} env steps/s, trained {summary['train_seconds']:.1f} s, "
                 f"compiled {summary['compile_seconds']:.1f} s, on {summary['device']}",
        "files": str(folder),
    }
    return "\n".join(f"{k:8} {v}" for k, v in rows.items())


if __name__ == "__main__":
    cli.run(train)
