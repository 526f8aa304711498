"""Evaluate a finished or running training: its newest checkpoint, its best one, or the one named.

    python -m launchers.evaluate --run=runs/x --episodes=100
    python -m launchers.evaluate --run=runs/x --best --gif=episode.gif
    python -m launchers.evaluate --run=runs/x/checkpoints/step_000000000976 --picture=returns.png
    python -m launchers.evaluate --run=runs/x --cross_play --against=runs/y --picture=matrix.png

Cross-play is for environments with opponents (`teams`): every seed's first team plays every seed's other agents, of
the same run or of another one. What self-play returns cannot say, a row of this matrix does: who is good at the game.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from core.envs import make_env
from core.errors import UserError
from core.evaluation import evaluate, summarize
from launchers import cli
from launchers.runs import drawable, figure, load, play, start_carry

FLAGS = flags.FLAGS
flags.DEFINE_string("run", None, "A run's folder, or one of its checkpoints.", required=True)
flags.DEFINE_integer("episodes", 100, "Full episodes of each seed.", lower_bound=1)
flags.DEFINE_integer("eval_seed", 1_000_000, "Fixes the episodes; training evaluates on the default.")
flags.DEFINE_bool("best", False, "The best checkpoint by evaluation return, where no checkpoint is named.")
flags.DEFINE_string("gif", None, "Film one episode of the first seed into this file, if the environment can be drawn.")
flags.DEFINE_string("picture", None, "Draw every episode's return by seed into this file.")
flags.DEFINE_bool("cross_play", False, "Play every seed's first team against every seed's other agents.")
flags.DEFINE_string("against", None, "The run that the other agents are from, if not the same.")
flags.DEFINE_bool("smoke", False, "Two episodes.")

TEAMS = ("the first team", "the second team")


def main(_):
    cli.compilation_cache()
    episodes = 2 if FLAGS.smoke else FLAGS.episodes
    algorithm, config, run, meta = load(FLAGS.run, FLAGS.best)
    env = make_env(config.env, episodes, **config.get("env_kwargs", {}))
    key, title = jax.random.key(FLAGS.eval_seed), f"{config.algorithm} on {config.env}"
    print(f"{title}, iteration {meta['iteration']}, {episodes} episodes a seed")
    if FLAGS.cross_play:
        other, other_config, other_run, _ = load(FLAGS.against or FLAGS.run, FLAGS.best)
        if (config.env, config.get("env_kwargs")) != (other_config.env, other_config.get("env_kwargs")):
            raise UserError(f"{FLAGS.run} and {FLAGS.against} are runs in different environments")
        matrices = cross_play(algorithm, run, other, other_run, env, key)
        print_matrices(matrices)
        if FLAGS.picture:
            draw_matrices(matrices, FLAGS.picture, title)
        return
    num_seeds = len(jax.tree.leaves(run)[0])

    def test(run, key):
        return evaluate(functools.partial(algorithm.act, run), env, key, start_carry(algorithm, run, episodes))

    returns, length = jax.device_get(jax.jit(cli.per_seed(test, num_seeds, (0, None)))(run, key))
    team = returns if returns.ndim == 2 else returns.sum(2)
    for seed, (total, steps) in enumerate(zip(team, length, strict=True)):
        print(f"  seed {seed:3}  return {total.mean():10.3f} ± {total.std():.3f}   length {steps.mean():.1f}")
    score = summarize(team.mean(1))
    print(f"  IQM {score['iqm']:.4g}, 95% CI [{score['ci95'][0]:.4g}, {score['ci95'][1]:.4g}]")
    if FLAGS.picture:
        draw_returns(team, FLAGS.picture, title)
    if FLAGS.gif:
        from core import render

        single = drawable(config.env, **config.get("env_kwargs", {}))
        states, reward = play(algorithm, jax.tree.map(lambda x: x[0], run), single, key)
        render.write_gif(FLAGS.gif, render.film(render.scenes(single, states), reward), fps=20)


def cross_play(algorithm, run, other, other_run, env, key):
    """[2, S, S'] mean returns of team 0, by seed i of `run`, and of all other agents, by seed j of `other_run`."""
    if not hasattr(getattr(env, "env", None), "teams"):
        raise UserError("cross-play needs opponents: this environment has no `teams`, the number of each agent's team")
    first, methods = np.array(env.env.teams) == 0, (algorithm, other)

    def test(*runs):
        def act(carry, obs, key):
            keys = jax.random.split(key)
            moves = [m.act(r, c, obs, k) for m, r, c, k in zip(methods, runs, carry, keys, strict=True)]
            carry, (ours, theirs) = zip(*moves, strict=True)
            chosen = first.reshape(1, -1, *(1 for _ in ours.shape[2:]))
            return carry, jnp.where(jnp.broadcast_to(chosen, ours.shape), ours, theirs)

        carry = tuple(start_carry(m, r, env.num_envs) for m, r in zip(methods, runs, strict=True))
        returns = evaluate(act, env, key, carry)[0].mean(0)
        return jnp.stack([returns[first].sum(), returns[~first].sum()])

    matrix = jax.jit(jax.vmap(jax.vmap(test, (None, 0)), (0, None)))(run, other_run)
    return np.moveaxis(np.asarray(matrix), 2, 0)


def print_matrices(matrices):
    for name, matrix in zip(TEAMS, matrices, strict=True):
        print(f"  return of {name}; row: seed of the first team, column: of the second")
        print("\n".join("   " + " ".join(f"{x:8.2f}" for x in row) for row in matrix))
        rows = matrix.mean(1)
        line = f"  mean {rows.mean():.4g}, of a row {rows.min():.4g} to {rows.max():.4g}"
        same = np.eye(*matrix.shape, dtype=bool)
        if not FLAGS.against and len(matrix) > 1:
            line += f"; with partners of its own seed {matrix[same].mean():.4g}, of others {matrix[~same].mean():.4g}"
        print(line)


def draw_matrices(matrices, path, title):
    with figure(path, ncols=2, figsize=(11, 5)) as (fig, axes):
        for name, matrix, ax in zip(TEAMS, matrices, axes, strict=True):
            image = ax.imshow(matrix, cmap="viridis")
            ax.set(xlabel="seed of the second team", ylabel="seed of the first team", title=f"return of {name}")
            fig.colorbar(image, ax=ax, shrink=0.8)
        fig.suptitle(title)


def draw_returns(returns, path, title):
    with figure(path, figsize=(6, 4)) as (_, ax):
        for seed, total in enumerate(returns):
            ax.plot(np.full(len(total), seed), total, ".", color="tab:blue", alpha=0.3)
        ax.plot(range(len(returns)), np.median(returns, axis=1), "_", color="black", markersize=12)
        ax.set(xlabel="seed", ylabel="return of an episode", title=title)
        ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    cli.run(main)
