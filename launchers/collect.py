"""First stage of a learned model: whole episodes of a config's own method, or of a trained policy, into a data set.

    python -m launchers.collect --config=configs/x.py --workdir=runs/x                     # runs/x/collect/data.npz
    python -m launchers.collect --config=configs/x.py --workdir=runs/x --run=runs/ppo_x    # what that run's policy does

`config.collect` holds the number of `episodes`, and the keys that replace those of the config meanwhile. Each of the
`num_envs` environments gives the same number of its first episodes (one more at most), however long they are: to take
whichever end first would favour short ones. They lie one after another in `data.npz`, each in the order of time.
"""
import json
import resource
import shutil
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from core import checkpoint, minari
from core.dataset import Dataset, last_steps
from core.envs import make_env
from core.envs.batch import where
from core.errors import UserError
from core.evaluation import ended
from core.logging import provenance, write
from launchers import cli
from launchers.runs import figure, load, start_carry

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "A file of configs/ with a section `collect`.")
flags.DEFINE_string("workdir", None, "Folder of all three stages; by default runs/ and the name of the config.")
flags.DEFINE_string("run", None, "Collect with the policy of this run's first seed.")
flags.DEFINE_integer("seed", 0, "Fixes the episodes.")
flags.DEFINE_bool("resume", False, "Go on from the newest checkpoint.")
flags.DEFINE_string("minari", None, "Write a Minari dataset of this name, too.")
flags.DEFINE_float("save_every", 5.0, "Seconds between checkpoints, at least.")
flags.DEFINE_bool("smoke", False, "Two episodes.")


class Collection(NamedTuple):
    """Everything needed to go on."""

    source: Any  # who acts, and in what environment
    t: jax.Array  # steps so far
    count: jax.Array  # (E,) episodes ended so far
    record: dict  # (T, E, ...), rows from t on are empty


def collecting(config):
    """The config of this stage: the keys of its section `collect` in the place of its own."""
    config = ml_collections.ConfigDict(config.to_dict())
    section = cli.section(config, "collect").to_dict()
    episodes = 2 if FLAGS.smoke else section.pop("episodes")
    for name, value in (dict(num_steps=1) | section).items():
        if name not in config:
            raise UserError(f'config.collect has "{name}", which the config has not; {cli.suggest(name, list(config))}')
        try:
            config[name] = value
        except TypeError as error:
            raise UserError(f"config.collect.{name}: {error}") from error
    config.num_envs = min(config.num_envs, episodes)
    return ml_collections.FrozenConfigDict(config), episodes


def method(config, env):
    """(init, step) of the config's algorithm, which leaves its newest transitions in `last`."""
    algorithm = cli.algorithm_of(config)

    def step(run, key):
        run, _ = algorithm.train_step(run, key, env, config)
        return run, run.last

    if not hasattr(jax.eval_shape(lambda key: algorithm.init(key, env, config), jax.random.key(0)), "last"):
        raise UserError(f'"{config.algorithm}" does not say what it saw last: train it, and collect with --run')
    return lambda key: algorithm.init(key, env, config), step


def policy(path, config, env):
    """(init, step) of a run's policy."""
    algorithm, its, run, _ = load(path)
    if its.env != config.env:
        raise UserError(f'{path} is a run in "{its.env}", the config is about "{config.env}"')
    if not hasattr(algorithm, "act"):
        raise UserError(f'{path}: "{its.algorithm}" learns while it acts, it has no policy to collect with')
    run = jax.tree.map(lambda x: x[0], run)
    fresh = start_carry(algorithm, run, env.num_envs)

    def step(state, key):
        (env_state, obs, carry), (act_key, env_key) = state, jax.random.split(key)
        carry, action = algorithm.act(run, carry, obs, act_key)
        env_state, ts = env.step(env_key, env_state, action)
        carry = jax.tree.map(lambda new, old: where(ended(ts), new, old), fresh, carry)
        last = dict(obs=obs, action=action, next_obs=ts.next_obs, reward=ts.reward, terminated=ts.terminated,
                    truncated=ts.truncated)
        return (env_state, ts.obs, carry), last

    return lambda key: (*env.reset(key), fresh), step


def compile_programs(source, quota, env):
    """`collect(state, stop)`, compiled, and the state that it starts from."""
    init, step = source
    key = jax.random.key(FLAGS.seed)

    def start():
        run = init(jax.random.fold_in(key, 0))
        _, last = jax.eval_shape(step, run, jax.random.key(0))
        record = jax.tree.map(lambda x: jnp.zeros((int(quota[0]) * env.max_steps, *x.shape), x.dtype), last)
        return Collection(run, jnp.int32(0), jnp.zeros(env.num_envs, jnp.int32), record)

    def unfinished(state, stop):
        return (state.count < quota).any() & (state.t < stop)

    def advance(state):
        run, last = step(state.source, jax.random.fold_in(jax.random.fold_in(key, 1), state.t))
        record = jax.tree.map(lambda old, new: old.at[state.t].set(new), state.record, last)
        return Collection(run, state.t + 1, state.count + (last["terminated"] | last["truncated"]), record)

    def collect(state, stop):
        return jax.lax.while_loop(lambda state: unfinished(state, stop), advance, state)

    state = jax.jit(start)()
    return jax.jit(collect, donate_argnums=0).lower(state, 0).compile(), state


def fill(collect, state, quota, folder, seconds):
    """The state when every environment has given its episodes, and the seconds that took. Checkpoints between."""
    total = len(state.record["truncated"])
    bar = cli.progress_bar(" episodes", int(quota.sum()), int(np.minimum(state.count, quota).sum()))
    size, saved = 1, time.perf_counter()
    while (done := np.minimum(state.count, quota).sum()) < quota.sum() and state.t < total:
        began = time.perf_counter()
        state = jax.block_until_ready(collect(state, min(int(state.t) + size, total)))
        took = time.perf_counter() - began
        seconds += took
        bar.update(int(np.minimum(state.count, quota).sum() - done))
        size = size if took > 0.25 else 2 * size
        if folder and time.perf_counter() - saved > FLAGS.save_every:
            checkpoint.save(folder, int(state.t), state, dict(seconds=seconds, score=float(state.t)))
            saved = time.perf_counter()
    bar.close()
    if (state.count < quota).any():
        raise UserError(f"an episode did not end within the environment's max_steps = {total // quota[0]}")
    return state, seconds


def whole_episodes(record, quota):
    """(T, E, ...) -> (N, ...): of environment e its first quota[e] episodes, one environment after the other."""
    done = record["terminated"] | record["truncated"]
    rows = [np.flatnonzero(done[:, e])[n - 1] + 1 for e, n in enumerate(quota)]
    return jax.tree.map(lambda x: np.concatenate([x[:n, e] for e, n in enumerate(rows)]), record)


def returns_of(data):
    """(episodes,), summed over the agents where there are several."""
    ends = np.unique(last_steps(data))
    return np.add.reduceat(data["reward"].reshape(ends[-1] + 1, -1).sum(1), np.append(0, ends[:-1] + 1))


def draw(path, data, returns, title):
    obs = jax.tree.leaves(data["obs"])[0].reshape(len(data["reward"]), -1)
    with figure(path, ncols=2, figsize=(10, 4)) as (fig, (left, right)):
        left.plot(returns, ".", color="tab:blue")
        left.set(xlabel="episode", ylabel="return")
        right.plot(obs[:, 0], obs[:, 1 % obs.shape[1]], ",", color="tab:blue")
        right.set(xlabel="first entry of obs", ylabel="second entry")
        fig.suptitle(title)


def main(_):
    cli.compilation_cache()
    folder = cli.stage_folder("collect")
    config, episodes = collecting(FLAGS.config)
    if FLAGS.minari:
        minari.require_free(FLAGS.minari)
    stored = cli.config_dict(config) | dict(seed=FLAGS.seed, episodes=episodes, run=FLAGS.run)
    if (folder / "summary.json").exists():
        raise UserError(f"{folder} holds a finished collection: choose another workdir")
    env, began = make_env(config.env, config.num_envs, **config.get("env_kwargs", {})), time.perf_counter()
    quota = np.array([len(part) for part in np.array_split(np.arange(episodes), env.num_envs)])
    source = policy(FLAGS.run, config, env) if FLAGS.run else method(config, env)
    collect, state = compile_programs(source, quota, env)
    compile_seconds, seconds = time.perf_counter() - began, 0.0

    cli.open_folder(folder, stored, FLAGS.resume)
    checkpoints = None if getattr(env, "on_host", False) else folder / "checkpoints"  # no simulator fits into one
    if FLAGS.resume and checkpoints and checkpoint.steps(checkpoints):
        state, meta = checkpoint.restore_newest(checkpoints, state)
        seconds = meta["seconds"]
    if not FLAGS.resume:
        write(folder / "provenance.json", json.dumps(provenance(cli.own_flags()), indent=1))
        write(folder / "config.json", json.dumps(stored, indent=1))
    state, seconds = fill(collect, state, quota, checkpoints, seconds)

    data = whole_episodes(jax.tree.map(np.asarray, state.record), quota)
    returns = returns_of(data)
    if not np.isfinite(returns).all():
        raise UserError(f"the return of episode {np.argmin(np.isfinite(returns))} is not finite: nothing is stored")
    Dataset.create(data).save(folder / "data.npz")
    if FLAGS.minari:
        minari.write(FLAGS.minari, data, env.action_space)
    draw(folder / "data.png", data, returns, f"{config.env}: {episodes} episodes")
    mean, half = returns.mean(), 1.96 * returns.std() / episodes**0.5
    summary = dict(
        algorithm=config.algorithm, env=config.env, run=FLAGS.run, seed=FLAGS.seed, episodes=episodes,
        transitions=len(data["reward"]), returns=dict(mean=float(mean), ci95=[float(mean - half), float(mean + half)]),
        compile_seconds=compile_seconds, seconds=seconds, env_steps_per_second=int(state.t) * env.num_envs / seconds,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, device=jax.devices()[0].device_kind)
    write(folder / "summary.json", json.dumps(summary, indent=1))  # last: it says that all is there
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    print(f"{episodes} episodes, {len(data['reward']):,} transitions, return {mean:.4g} ± {half:.2g}, "
          f"{seconds:.1f} s, compiled {compile_seconds:.1f} s: {folder / 'data.npz'}")


if __name__ == "__main__":
    cli.run(main)
