"""Runs on disk, for the launchers that look at them: reading one back, an episode of it, a figure."""
import contextlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from core import checkpoint
from core.envs import make_env
from core.errors import UserError
from core.evaluation import ended, summarize
from core.logging import read_metrics
from launchers import cli


def load(path, best=False):
    """(algorithm, config, run [S, ...], meta) of a run's folder or of one of its checkpoints; meta["seed"] is the first
    of the run's seeds."""
    path = pathlib.Path(path)
    folder = path if (path / "config.json").exists() else path.parent.parent
    if not (folder / "config.json").exists():
        raise UserError(f"no run in {path}: it has no config.json")
    stored = json.loads((folder / "config.json").read_text())
    num_seeds, seed, _ = (stored.pop(k) for k in ("num_seeds", "seed", "eval_seed"))
    config = ml_collections.FrozenConfigDict(stored)
    algorithm = cli.algorithm_of(config)
    env = make_env(config.env, config.num_envs, **config.get("env_kwargs", {}))
    init = cli.per_seed(lambda seed: algorithm.init(jax.random.key(seed), env, config), num_seeds)
    like = jax.eval_shape(init, jnp.arange(num_seeds))
    if path == folder and not checkpoint.steps(folder / "checkpoints"):
        raise UserError(f"{folder} holds no checkpoint yet")
    if path == folder and not best:
        run, meta = checkpoint.restore_newest(folder / "checkpoints", like)
    else:
        run, meta = checkpoint.restore(path if path != folder else checkpoint.best(folder / "checkpoints"), like)
    return algorithm, config, run, meta | dict(seed=seed)


def start_carry(algorithm, run, num_envs):
    return algorithm.initial_carry(run, num_envs) if hasattr(algorithm, "initial_carry") else ()


def play(algorithm, run, env, key, steps=None):
    """(states [T + 1, ...], reward [T, ...]) of one episode of the unbatched `env`, of its first `steps` at most."""
    def step(before, key):
        state, obs, carry = before
        act_key, env_key = jax.random.split(key)
        carry, action = algorithm.act(run, carry, obs[None], act_key)
        state, ts = env.step(env_key, state, action[0])
        return (state, ts.obs, carry), (state, ts.reward, ended(ts))

    @jax.jit
    def episode(key):
        reset_key, key = jax.random.split(key)
        state, obs = env.reset(reset_key)
        keys = jax.random.split(key, min(steps or env.max_steps, env.max_steps))
        _, (states, reward, done) = jax.lax.scan(step, (state, obs, start_carry(algorithm, run, 1)), keys)
        states = jax.tree.map(lambda first, rest: jnp.concatenate([jnp.asarray(first)[None], rest]), state, states)
        return states, reward, done

    states, reward, done = episode(key)
    length = int(done.argmax()) + 1 if done.any() else len(reward)
    return jax.tree.map(lambda x: x[:length + 1], states), reward[:length]


def replay(algorithm, config, seeds, index):
    """The training of a method that is judged by its own run, once more, with the same keys and all its seeds together:
    (runs of seed `index` [T + 1, ...], what it imagined), T = env_steps of one environment."""
    env = make_env(config.env, config.num_envs, **config.get("env_kwargs", {}))

    def init(seed):
        return algorithm.init(jax.random.fold_in(jax.random.key(seed), 0), env, config)

    def train_step(run, seed, i):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 1), i)
        return algorithm.train_step(run, key, env, config)[0]

    def look(run):
        run = jax.tree.map(lambda x: x[index], run)
        return run, algorithm.imagine(run, env, config)

    @jax.jit
    def again(seeds):
        def step(run, i):
            run = cli.per_seed(train_step, len(seeds), (0, 0, None))(run, seeds, i)
            return run, look(run)

        run = cli.per_seed(init, len(seeds))(seeds)
        _, rest = jax.lax.scan(step, run, jnp.arange(config.env_steps // (config.num_envs * config.num_steps)))
        return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), look(run), rest)

    return jax.device_get(again(jnp.array(seeds)))


def drawable(name, **kwargs):
    """The environment `name`, unbatched, if it can be drawn."""
    env = getattr(make_env(name, 1, **kwargs), "env", None)
    if not hasattr(env, "draw"):
        raise UserError(f'environment "{name}" cannot be drawn: it has no draw(state)')
    return env


def cell(per_seed):
    """IQM [95% CI] of values [S], to print."""
    score = summarize(per_seed)
    return f"{score['iqm']:.4g} [{score['ci95'][0]:.4g}, {score['ci95'][1]:.4g}]"


@contextlib.contextmanager
def figure(path, **kwargs):
    """A figure to draw on, which is `path` once all is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(layout="constrained", **kwargs)
    yield fig, axes
    partial = pathlib.Path(path).with_name(f".partial.{pathlib.Path(path).name}")
    fig.savefig(partial, dpi=120)
    plt.close(fig)
    os.replace(partial, path)


def regret(folder, against):
    """Return of the run `against` less that of `folder`, [evaluations, seeds]: what not knowing cost."""
    mine, other = read_metrics(folder), read_metrics(against)
    for name in ("seed", "env_steps"):
        if not np.array_equal(other[name], mine[name]):
            raise UserError(f"{against} and {folder} differ in {name}: regret is paired by seed and step")
    return other["return"] - mine["return"]
