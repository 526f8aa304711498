"""Evaluate a finished or running training: its newest checkpoint, its best one, or the one named.

    python -m launchers.evaluate --run=runs/x --episodes=100
    python -m launchers.evaluate --run=runs/x --best --gif=episode.gif
    python -m launchers.evaluate --run=runs/x/checkpoints/step_000000000976 --picture=returns.png
"""
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags

from core import checkpoint
from core.envs import make_env
from core.errors import UserError
from core.evaluation import ended, evaluate, summarize
from launchers import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("run", None, "A run's folder, or one of its checkpoints.", required=True)
flags.DEFINE_integer("episodes", 100, "Full episodes of each seed.", lower_bound=1)
flags.DEFINE_integer("eval_seed", 1_000_000, "Fixes the episodes; training evaluates on the default.")
flags.DEFINE_bool("best", False, "The best checkpoint by evaluation return, where no checkpoint is named.")
flags.DEFINE_string("gif", None, "Film one episode of the first seed into this file, if the environment can be drawn.")
flags.DEFINE_string("picture", None, "Draw every episode's return by seed into this file.")
flags.DEFINE_bool("smoke", False, "Two episodes.")


def load(path):
    """(algorithm, config, run [S, ...], meta) of a run's folder or of one of its checkpoints."""
    path = pathlib.Path(path)
    folder = path if (path / "config.json").exists() else path.parent.parent
    if not (folder / "config.json").exists():
        raise UserError(f"no run in {path}: it has no config.json")
    stored = json.loads((folder / "config.json").read_text())
    num_seeds, _, _ = (stored.pop(k) for k in ("num_seeds", "seed", "eval_seed"))
    config = ml_collections.FrozenConfigDict(stored)
    algorithm = cli.algorithm_of(config)
    env = make_env(config.env, config.num_envs, **config.get("env_kwargs", {}))
    init = cli.per_seed(lambda seed: algorithm.init(jax.random.key(seed), env, config), num_seeds)
    like = jax.eval_shape(init, jnp.arange(num_seeds))
    if path != folder:
        return algorithm, config, *checkpoint.restore(path, like)
    if not checkpoint.steps(folder / "checkpoints"):
        raise UserError(f"{folder} holds no checkpoint yet")
    if FLAGS.best:
        return algorithm, config, *checkpoint.restore(checkpoint.best(folder / "checkpoints"), like)
    return algorithm, config, *checkpoint.restore_newest(folder / "checkpoints", like)


def start_carry(algorithm, run, num_envs):
    return algorithm.initial_carry(run, num_envs) if hasattr(algorithm, "initial_carry") else ()


def film_episode(algorithm, run, env, key):
    """(states [T + 1, ...], rewards [T, ...]) of one episode in the only copy of `env`."""
    def step(state, key):
        env_state, obs, carry = state
        act_key, env_key = jax.random.split(key)
        carry, action = algorithm.act(run, carry, obs, act_key)
        env_state, ts = env.step(env_key, env_state, action)
        return (env_state, ts.obs, carry), (state[0].env, ts.reward, ended(ts))

    reset_key, key = jax.random.split(key)
    env_state, obs = env.reset(reset_key)
    start = (env_state, obs, start_carry(algorithm, run, 1))
    scan = jax.jit(lambda start, keys: jax.lax.scan(step, start, keys)[1])
    states, reward, done = jax.device_get(scan(start, jax.random.split(key, env.max_steps)))
    length = int(np.argmax(done[:, 0])) + 1 if done.any() else env.max_steps
    return jax.tree.map(lambda x: x[:length, 0], states), reward[: length - 1, 0]


def main(_):
    cli.compilation_cache()
    episodes = 2 if FLAGS.smoke else FLAGS.episodes
    algorithm, config, run, meta = load(FLAGS.run)
    env = make_env(config.env, episodes, **config.get("env_kwargs", {}))
    key = jax.random.key(FLAGS.eval_seed)
    num_seeds = len(jax.tree.leaves(run)[0])

    def test(run, key):
        return evaluate(functools.partial(algorithm.act, run), env, key, start_carry(algorithm, run, episodes))

    returns, length = jax.device_get(jax.jit(cli.per_seed(test, num_seeds, (0, None)))(run, key))
    team = returns if returns.ndim == 2 else returns.sum(2)
    print(f"{config.algorithm} on {config.env}, iteration {meta['iteration']}, {episodes} episodes a seed")
    for seed, (total, steps) in enumerate(zip(team, length, strict=True)):
        print(f"  seed {seed:3}  return {total.mean():10.3f} ± {total.std():.3f}   length {steps.mean():.1f}")
    score = summarize(team.mean(1))
    print(f"  IQM {score['iqm']:.4g}, 95% CI [{score['ci95'][0]:.4g}, {score['ci95'][1]:.4g}]")
    if FLAGS.picture:
        draw_returns(team, FLAGS.picture, f"{config.algorithm} on {config.env}")
    if FLAGS.gif:
        single = make_env(config.env, 1, **config.get("env_kwargs", {}))
        if not hasattr(single.env, "draw"):
            raise UserError(f'environment "{config.env}" cannot be drawn: it has no draw(state)')
        from core import render

        states, reward = film_episode(algorithm, jax.tree.map(lambda x: x[0], run), single, key)
        render.write_gif(FLAGS.gif, render.film(render.scenes(single.env, states), reward), fps=20)


def draw_returns(returns, path, title):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    for seed, total in enumerate(returns):
        ax.plot(np.full(len(total), seed), total, ".", color="tab:blue", alpha=0.3)
    ax.plot(range(len(returns)), np.median(returns, axis=1), "_", color="black", markersize=12)
    ax.set(xlabel="seed", ylabel="return of an episode", title=title)
    ax.spines[["top", "right"]].set_visible(False)
    partial = pathlib.Path(path).with_name(f".partial.{pathlib.Path(path).name}")
    fig.savefig(partial, dpi=120)
    plt.close(fig)
    os.replace(partial, path)


if __name__ == "__main__":
    cli.run(main)
