"""Train, all seeds at once.

    python -m launchers.train --config=configs/ppo_cartpole.py --config.lr=1e-3 --num_seeds=16 --workdir=runs/x
    python -m launchers.train --config=configs/ppo_cartpole.py --config.lr=1e-3 --num_seeds=16 --workdir=runs/x --resume

Training runs in chunks: one jitted program, its state donated, that takes as many iterations as it is told and returns
sums, never a value per step. Between chunks the loop below evaluates, logs, saves and draws. Iteration i of seed s
uses the key fold_in(fold_in(key(s), 1), i), so how a run is cut into chunks changes nothing.
"""
import functools
import resource
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from ml_collections import config_flags

from core import checkpoint
from core.envs import make_env
from core.errors import UserError
from core.evaluation import evaluate, summarize
from core.logging import Logger, read_metrics
from launchers import cli

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "An algorithm file, or a file of configs/.")
flags.DEFINE_integer("seed", 0, "First seed.")
flags.DEFINE_integer("num_seeds", 1, "Seeds trained together.", lower_bound=1)
flags.DEFINE_integer("eval_seed", 1_000_000, "Fixes the evaluation episodes.")
flags.DEFINE_string("workdir", None, "Folder of this run; by default a new one under runs/.")
flags.DEFINE_bool("resume", False, "Go on from the newest checkpoint in workdir.")
flags.DEFINE_integer("devices", 0, "Devices to spread the seeds over; a CPU is split into so many. 0: all there are.")
flags.DEFINE_integer("chunk", 0, "Iterations of one call of the program; 0: about half a second's worth.")
flags.DEFINE_bool("smoke", False, "Shrink the budget to seconds.")
flags.DEFINE_enum("wandb", "off", ["off", "offline", "online"], "Mirror the local files to Weights & Biases.")
flags.DEFINE_string("coordinator", None, "host:port of process 0, where several processes train together.")
flags.DEFINE_integer("num_processes", 1, "How many they are.")
flags.DEFINE_integer("process_id", 0, "Which of them this one is.")


class Programs(NamedTuple):
    init: Callable  # seed -> run
    zeros: Callable  # run -> totals
    train: Callable  # run, totals, seed, start, stop -> run, totals
    test: Callable  # run, key -> {measure: value}, "return" among them


def build(algorithm, config, num_seeds):
    """The programs over the seed axis: every leaf of what they take and give is [S, ...]."""
    env = make_env(config.env, config.num_envs, **config.get("env_kwargs", {}))
    learns_as_it_is_judged = hasattr(algorithm, "measure")
    eval_env = make_env(config.env, config.num_envs if learns_as_it_is_judged else config.eval_episodes,
                        **{**config.get("env_kwargs", {}), **config.get("eval_env_kwargs", {})})
    if getattr(env, "on_host", False) and FLAGS.devices > 1:
        raise UserError(f'environment "{config.env}" runs on the host: --devices=1')
    if num_seeds > 1 and getattr(env, "on_host", False):
        raise UserError(f'environment "{config.env}" runs on the host, one seed per process: --num_seeds=1')

    @jax.jit  # so that it is traced once for `zeros` and `train`
    def train_step(run, key):
        return algorithm.train_step(run, key, env, config)

    def init(seed):
        return algorithm.init(jax.random.fold_in(jax.random.key(seed), 0), env, config)

    def train(run, totals, seed, start, stop):
        key = jax.random.fold_in(jax.random.key(seed), 1)

        def iteration(i, state):
            run, (sums, bad) = state
            run, info = train_step(run, jax.random.fold_in(key, i))
            finite = jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(info)]).all()
            return run, (jax.tree.map(jnp.add, sums, info), jnp.where(finite | (bad >= 0), bad, i))

        return jax.lax.fori_loop(start, stop, iteration, (run, totals))

    def zeros(run):
        _, info = jax.eval_shape(train_step, run, jax.random.key(0))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), info), jnp.int32(-1)

    def test(run, key):
        if learns_as_it_is_judged:
            return algorithm.measure(run, key, eval_env, config)
        carry = algorithm.initial_carry(run, config.eval_episodes) if hasattr(algorithm, "initial_carry") else ()
        return score(*evaluate(functools.partial(algorithm.act, run), eval_env, key, carry))

    return Programs(
        cli.per_seed(init, num_seeds), cli.per_seed(zeros, num_seeds),
        cli.per_seed(train, num_seeds, (0, 0, 0, None, None)), cli.per_seed(test, num_seeds, (0, None)))


def compile_programs(programs, seeds, config):
    """The same programs, compiled, each leaf where it belongs; the first run; its place."""
    mesh = jax.make_mesh((FLAGS.devices or jax.device_count(),), ("devices",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    seeds = jax.device_put(np.array(seeds, np.int32), whole)
    shardings = cli.seed_shardings(jax.eval_shape(programs.init, seeds), len(seeds), config.num_envs, mesh)
    run = jax.jit(programs.init, out_shardings=shardings)(seeds)
    zeros = jax.jit(programs.zeros, out_shardings=whole)
    train = jax.jit(programs.train, donate_argnums=0, out_shardings=(shardings, whole))
    train = train.lower(run, jax.eval_shape(zeros, run), seeds, 0, 1).compile()
    test = jax.jit(programs.test, out_shardings=whole).lower(run, jax.random.key(0)).compile()
    gather = jax.jit(lambda run: run, out_shardings=whole) if jax.process_count() > 1 else lambda run: run
    return run, gather, Programs(None, zeros, lambda run, totals, *span: train(run, totals, seeds, *span), test)


def train_span(programs, run, start, stop, bar, chunk):
    """Iterations start .. stop − 1 in chunks: (run, sums over the span). A value that is not finite ends it."""
    totals, size, i = programs.zeros(run), chunk or 1, start
    while i < stop:
        began, upto = time.perf_counter(), min(i + size, stop)
        run, totals = programs.train(run, totals, i, upto)
        bad = np.asarray(totals[1])
        if (bad >= 0).any():
            seed = FLAGS.seed + int(np.argmax(bad >= 0))
            raise NotFinite(int(bad.max()), seed)
        bar.update((upto - i) * bar.per_iteration)
        size = size if chunk or time.perf_counter() - began > 0.25 else 2 * size
        i = upto
    return run, totals[0]


class NotFinite(Exception):
    """Iteration and seed of the first loss that is NaN or infinite."""


def score(returns, length):
    """Scalars of one seed's evaluation: returns [E] or, summed over a team, [E, N], and lengths [E]."""
    total = returns if returns.ndim == 1 else returns.sum(axis=1)
    agents = {} if returns.ndim == 1 else {f"return_agent{n}": r for n, r in enumerate(returns.mean(axis=0))}
    return {"return": total.mean(), "return_std": total.std(), "length": length.mean()} | agents


def metrics_of(tested, totals, iterations):
    """{column: [S]}: the evaluation, and the means over the `iterations` before it."""
    sums = dict(totals)
    episode = {k: v.reshape(len(v), -1).sum(axis=1) for k, v in sums.pop("episode", {}).items()}
    if episode:
        count = np.where(episode["count"] > 0, episode["count"], np.nan)
        tested = tested | dict(train_return=episode["return"] / count, train_length=episode["length"] / count,
                               train_episodes=episode["count"])
    return tested | {k: v / iterations for k, v in sums.items()}


def start():
    """The devices and the processes of this run; its config."""
    name = cli.config_name()
    FLAGS.workdir = FLAGS.workdir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if FLAGS.devices > 1:
        jax.config.update("jax_num_cpu_devices", FLAGS.devices)
    if FLAGS.coordinator:
        jax.distributed.initialize(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    cli.compilation_cache()
    return ml_collections.FrozenConfigDict(cli.smoke(FLAGS.config) if FLAGS.smoke else FLAGS.config)


def fit(run, gather, programs, config, folder, meta, logger):
    """All that is left of training: (last metrics row, seconds). Each evaluation is logged, then a checkpoint."""
    per_iteration, seeds = config.num_envs * config.num_steps, FLAGS.num_seeds
    iterations, evaluations = config.env_steps // per_iteration, max(1, round(config.env_steps / config.eval_every))
    stops = [iterations * (k + 1) // evaluations for k in range(evaluations)]
    bar = cli.progress_bar(" steps", per_iteration * seeds * iterations, per_iteration * seeds * meta["iteration"])
    bar.per_iteration = per_iteration * seeds
    chunk = iterations if jax.process_count() > 1 else FLAGS.chunk  # processes must cut alike; their clocks differ
    i, seconds, row = meta["iteration"], meta["seconds"], None
    for stop in [stop for stop in stops if stop > i]:
        began = time.perf_counter()
        try:
            run, sums = train_span(programs, run, i, stop, bar, chunk)
        except NotFinite as bad:
            iteration, seed = bad.args
            last = checkpoint.steps(folder)[-1:] or ["none was written yet"]
            raise UserError(f"a loss is not finite at env step {(iteration + 1) * per_iteration} of seed {seed}; "
                            f"the last good checkpoint: {last[0]}") from None
        seconds += time.perf_counter() - began
        tested, sums = jax.tree.map(np.asarray, (programs.test(run, jax.random.key(FLAGS.eval_seed)), sums))
        row, i, whole = metrics_of(tested, sums, stop - i), stop, gather(run)
        bar.set_postfix({"return": f"{row['return'].mean():.4g}"})
        if logger:
            logger.write(i * per_iteration, row)
            meta = dict(iteration=i, rows=logger.rows, seconds=seconds, score=float(row["return"].mean()))
            checkpoint.save(folder, i, whole, meta)
    bar.close()
    return row, seconds


def main(_):
    config, began = start(), time.perf_counter()
    seeds = list(range(FLAGS.seed, FLAGS.seed + FLAGS.num_seeds))
    run, gather, programs = compile_programs(build(cli.algorithm_of(config), config, len(seeds)), seeds, config)
    compile_seconds = time.perf_counter() - began

    stored = cli.config_dict(config) | dict(seed=FLAGS.seed, num_seeds=FLAGS.num_seeds, eval_seed=FLAGS.eval_seed)
    workdir = cli.open_folder(FLAGS.workdir, stored, FLAGS.resume)
    folder, meta = workdir / "checkpoints", dict(iteration=0, rows=None, seconds=0.0)
    if FLAGS.resume and checkpoint.steps(folder):
        run, meta = checkpoint.restore_newest(folder, run)
    if jax.process_count() > 1:  # all have looked at the folder before one of them writes there
        multihost_utils.sync_global_devices("the folder is read")
    lead = jax.process_index() == 0
    logger = Logger(workdir, stored, cli.own_flags(), seeds, meta["rows"], FLAGS.wandb) if lead else None

    row, seconds = fit(run, gather, programs, config, folder, meta, logger)
    if row is None and (workdir / "summary.json").exists():
        raise UserError(f"{workdir} is finished: its {config.env_steps} env steps are done")
    if row is None:  # it was killed between its last checkpoint and its summary
        row = {k: v[-1] for k, v in read_metrics(workdir).items() if k not in ("env_steps", "seed")}
    if lead:
        summary = summary_of(config, seeds, row, compile_seconds, seconds)
        logger.close(summary)
        print(table(summary, workdir))


def summary_of(config, seeds, row, compile_seconds, train_seconds):
    iterations = config.env_steps // (config.num_envs * config.num_steps)
    env_steps = iterations * config.num_envs * config.num_steps
    measures = {k: summarize(v) for k, v in row.items() if k != "return"}
    return dict(
        algorithm=config.algorithm, env=config.env, seeds=seeds, env_steps=env_steps,
        final=summarize(row["return"]), **measures, compile_seconds=compile_seconds, train_seconds=train_seconds,
        env_steps_per_second=env_steps * len(seeds) / train_seconds,
        updates_per_second=iterations * len(seeds) / train_seconds,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        device=jax.devices()[0].device_kind, devices=jax.device_count())


def table(summary, workdir):
    final, (low, high) = summary["final"], summary["final"]["ci95"]
    rows = {
        "method": f"{summary['algorithm']} on {summary['env']}",
        "return": f"{final['iqm']:.4g} IQM of {len(summary['seeds'])} seeds, 95% CI [{low:.4g}, {high:.4g}]",
        "budget": f"{summary['env_steps']:,} env steps a seed",
        "speed": f"{summary['env_steps_per_second']:,.0f} env steps/s, trained {summary['train_seconds']:.1f} s, "
                 f"compiled {summary['compile_seconds']:.1f} s, on {summary['device']}",
        "files": str(workdir),
    }
    return "\n".join(f"{k:8} {v}" for k, v in rows.items())


if __name__ == "__main__":
    cli.run(main)
