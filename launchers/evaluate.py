"""Evaluate a finished or running training: its newest checkpoint, its best one, or the one named.

    python -m launchers.evaluate --run=runs/x --episodes=100
    python -m launchers.evaluate --run=runs/x --best --gif=episode.gif
    python -m launchers.evaluate --run=runs/x/checkpoints/step_000000000976.npz --picture=returns.png
    python -m launchers.evaluate --run=runs/x --cross_play --against=runs/y --picture=matrix.png

Cross-play is for environments with opponents (`teams`): every seed's first team plays every seed's other agents, of
the same run or of another one. Self-play cannot say which seed plays well; a row of this matrix does.
"""
import jax
import jax.numpy as jnp
import numpy as np

from core.errors import UserError
from core.evaluation import by_team, cell, evaluate, score
from launchers import cli
from launchers.runs import drawable, figure, host_film, host_renderer, load, play, watch

TEAMS = ("the first team", "the second team")


def evaluate_run(*, run: str, episodes: int = 100, eval_seed: int = 1_000_000, best: bool = False,
                 gif: str | None = None, picture: str | None = None, cross_play: bool = False,
                 against: str | None = None, smoke: bool = False) -> dict[str, np.ndarray]:
    """Play full episodes of every seed of a run: {column: [S]}, as in metrics.csv.

    Args:
        run: A run's folder, or one of its checkpoints.
        episodes: Full episodes of each seed.
        eval_seed: Fixes the episodes; training evaluates on the default.
        best: The best checkpoint by evaluation return, where no checkpoint is named.
        gif: Film one episode of the first seed into this file, if the environment can be drawn.
        picture: Draw every episode's return by seed into this file.
        cross_play: Play every seed's first team against every seed's other agents.
        against: The run that the other agents are from, if not the same.
        smoke: Two episodes.
    """
    cli.compilation_cache()
    episodes = 2 if smoke else episodes
    if episodes < 1:
        raise UserError(f"--episodes={episodes}: at least 1")
    cli.check_seeds(eval_seed=eval_seed)
    cli.check_output("gif", gif, ".gif")
    cli.check_output("picture", picture, ".png", ".pdf")
    algorithm, config, arrays, meta = load(run, best)
    env_name, settings = cli.eval_settings(config)
    on_host = env_name.startswith("gymnasium/")
    if gif:  # before any episode is played
        single = host_renderer(env_name, settings)[1].close() if on_host else drawable(env_name, **settings)
    env, title = cli.eval_env(config, episodes), f"{config.algorithm} on {env_name}"
    print(f"{title}, iteration {meta['iteration']}, {episodes} episodes a seed")
    if cross_play:
        other, other_config, other_arrays, _ = load(against or run, best)
        if (config.env, config.get("env_kwargs")) != (other_config.env, other_config.get("env_kwargs")):
            raise UserError(f"{run} and {against} are runs in different environments")
        matrices = play_all_pairs(algorithm, arrays, other, other_arrays, env, jax.random.key(eval_seed))
        print_matrices(matrices, against)
        if picture:
            draw_matrices(matrices, picture, title)
        return dict(zip(TEAMS, matrices, strict=True))

    num_seeds = len(jax.tree.leaves(arrays)[0])
    seeds = jnp.arange(meta["seed"], meta["seed"] + num_seeds)
    teams = getattr(env.env, "teams", None)

    played = cli.episodes_of(algorithm, config, episodes, eval_seed)

    def test(arrays, seed):
        returns, length, *told = played(arrays, seed)
        return by_team(returns, teams), score(returns, length, teams, *told)

    returns, row = jax.device_get(jax.jit(cli.per_seed(test, num_seeds))(arrays, seeds))
    for i, seed in enumerate(seeds):
        words = "   ".join(f"{name} {row[name][i]:10.3f} ± {row[name.replace('return', 'return_std', 1)][i]:.3f}"
                           for name in returns)
        told = "".join(f"   {name} {x[i]:.2f}" for name, x in row.items() if not name.startswith(("return", "length")))
        print(f"  seed {seed:3}  {words}   length {row['length'][i]:.1f}{told}")
    for name in returns:
        print(f"  {name}: IQM [95% CI] of {num_seeds} seeds {cell(row[name])}")
    if picture:
        draw_returns(returns, picture, title)
    if gif:
        from core import render

        first = cli.moved(algorithm, jax.tree.map(lambda x: x[0], arrays), config)
        key = jax.random.fold_in(jax.random.key(eval_seed), meta["seed"])
        if on_host:
            frames, _ = host_film(*watch(algorithm, first, env_name, settings, key), height=384)
        else:
            states, reward, _ = play(algorithm, first, single, key)
            frames = render.film(render.scenes(single, states), reward)
        render.write_gif(gif, frames, fps=20)
    return row


def play_all_pairs(algorithm, run, other, other_run, env, key):
    """[2, S, S'] mean returns of team 0, by seed i of `run`, and of all other agents, by seed j of `other_run`."""
    if not hasattr(env.env, "teams"):
        raise UserError("cross-play needs opponents: this environment has no `teams`, the number of each agent's team")
    first, methods = np.array(env.env.teams) == 0, (algorithm, other)

    def test(*runs):
        policies = [cli.policy(m, r) for m, r in zip(methods, runs, strict=True)]

        def act(carry, obs, key):
            keys = jax.random.split(key)
            moves = [act(c, obs, k) for (act, _), c, k in zip(policies, carry, keys, strict=True)]
            carry, (ours, theirs) = zip(*moves, strict=True)
            chosen = first.reshape(1, -1, *(1 for _ in ours.shape[2:]))
            return carry, jnp.where(jnp.broadcast_to(chosen, ours.shape), ours, theirs)

        def observe(carry, step):
            return tuple(c if observe is None else observe(c, step)
                         for (_, observe), c in zip(policies, carry, strict=True))

        carry = tuple(cli.start_carry(m, r, env.num_envs) for m, r in zip(methods, runs, strict=True))
        returns = evaluate(act, env, key, carry, observe)[0].mean(0)
        return jnp.stack([returns[first].sum(), returns[~first].sum()])

    matrix = jax.jit(jax.vmap(jax.vmap(test, (None, 0)), (0, None)))(run, other_run)
    return np.moveaxis(np.asarray(matrix), 2, 0)


def print_matrices(matrices, against):
    for name, matrix in zip(TEAMS, matrices, strict=True):
        print(f"  return of {name}; row: seed of the first team, column: of the second")
        print("\n".join("   " + " ".join(f"{x:8.2f}" for x in row) for row in matrix))
        rows = matrix.mean(1)
        line = f"  mean {rows.mean():.4g}, of a row {rows.min():.4g} to {rows.max():.4g}"
        same = np.eye(*matrix.shape, dtype=bool)
        if not against and len(matrix) > 1:
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
    with figure(path, ncols=len(returns), figsize=(6 * len(returns), 4), squeeze=False) as (_, axes):
        for (name, values), ax in zip(returns.items(), axes[0], strict=True):
            for seed, total in enumerate(values):
                ax.plot(np.full(len(total), seed), total, ".", color="tab:blue", alpha=0.3)
            ax.plot(range(len(values)), np.median(values, axis=1), "_", color="black", markersize=12)
            ax.set(xlabel="seed", ylabel=f"{name} of an episode", title=title)
            ax.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    cli.run(evaluate_run)
