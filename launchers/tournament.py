"""Let the players of a board game play each other: the points of each pairing, and Elo ratings.

    python -m launchers.tournament --players=random,greedy,runs/x/checkpoints/step_000000000250.npz,runs/x
    python -m launchers.tournament --players=random,greedy,runs/x,runs/y --games=256 --picture=elo.png

A player is a run, one of its checkpoints, or an opponent that the environment has (core/envs/from_pgx.py). Seed i of a
run plays seed i of the others, so each seed gives ratings of its own, and the table has their IQM [95% CI]. A game
begins with random moves, its opening, because players without noise would play one game again and again. Each opening
is played twice, with the sides exchanged.

    E_ij = 1 / (1 + 10^((R_j − R_i) / 400))     the points that i is expected to win in one game against j
    R    the ratings under which all games together are most likely; a draw is half a win and half a loss

Each pairing counts one draw more than was played, so a player who wins every game has a finite rating. The first player
has the rating 0.
"""
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs import make_env
from core.envs.from_pgx import OPPONENTS, any_move
from core.errors import UserError
from core.evaluation import any_of, cell
from launchers import cli
from launchers.runs import figure, load

RULES = {name: rule for name, rule in OPPONENTS.items() if rule is not None}


def tournament(*, players: list[str], games: int = 128, opening: int = 2, eval_seed: int = 1_000_000,
               picture: str | None = None) -> dict[str, np.ndarray]:
    """Play all pairings and rate the players: points [S, N, N] of row against column, from 0 to 1, and elo [S, N].

    Args:
        players: Runs, their checkpoints, and opponents that the environment has.
        games: Games of each pairing and seed, an even number.
        opening: Random moves that a game begins with.
        eval_seed: Fixes the games.
        picture: Draw points and ratings into this file.
    """
    cli.compilation_cache()
    cli.check_seeds(eval_seed=eval_seed)
    cli.check_output("picture", picture, ".png", ".pdf")
    if games < 2 or games % 2:
        raise UserError(f"--games={games}: an even number is due, at least 2")
    if opening < 0:
        raise UserError(f"--opening={opening}: at least 0")
    if len(players) < 2:
        raise UserError(f"--players={','.join(players)}: at least two are due")
    env, entrants = enter(players)
    num_seeds = max(entrant.num_seeds for entrant in entrants)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(eval_seed), jnp.arange(num_seeds))

    @functools.cache  # checkpoints of one config share a program
    def program(kind, other_kind):
        return jax.jit(cli.per_seed(functools.partial(match, env, kind, other_kind, games, opening), num_seeds))

    points = np.full((num_seeds, len(entrants), len(entrants)), 0.5)
    for i, first in enumerate(entrants):
        for j, second in enumerate(entrants[:i]):
            with jax.debug_key_reuse(False):  # it misfires on a tree search, which has branches under vmap
                points[:, i, j] = program(first.kind, second.kind)(first.run, second.run, keys)
            points[:, j, i] = 1 - points[:, i, j]
    ratings = np.stack([elo(of_seed, games) for of_seed in points])
    names = [entrant.name for entrant in entrants]
    show(names, points, ratings, games)
    if picture:
        draw(names, points, ratings, picture)
    return dict(points=points, elo=ratings)


class Kind(NamedTuple):
    """What a program is compiled for."""

    algorithm: Any  # None: a rule of the environment
    rule: str
    reveal: bool  # whether the policy sees the game, or the board alone


class Entrant(NamedTuple):
    name: str
    kind: Kind
    run: Any  # [S, ...]; () of a rule
    num_seeds: int


def enter(players):
    """(one copy of the game, the players)."""
    loaded = {player: load(player) for player in players if player not in RULES}
    if not loaded:
        raise UserError(f"--players={','.join(players)}: one of them has to be a run, which names the game")
    first = next(iter(loaded))
    name = loaded[first][1].env
    for player, (algorithm, config, run, _) in loaded.items():
        if not name.startswith("pgx/") or config.env != name:
            raise UserError(f'{player} is a run on "{config.env}", which is not '
                            + (f'"{name}" of {first}' if name.startswith("pgx/") else "a board game of pgx"))
        if hasattr(algorithm, "initial_carry"):
            raise UserError(f"{player}: {config.algorithm} has a memory of what it saw, and cannot play here")
        if len(jax.tree.leaves(run)[0]) != len(jax.tree.leaves(loaded[first][2])[0]):
            raise UserError(f"{player} and {first} differ in their number of seeds")
    copies = functools.cache(lambda num_envs, **settings: make_env(name, num_envs, **settings))
    entrants = []
    for player in players:
        if player in RULES:
            entrants.append(Entrant(player, Kind(None, player, True), (), 1))
            continue
        algorithm, config, run, meta = loaded[player]
        settings = config.get("env_kwargs", {})
        reveal = settings.get("reveal", False)
        run = cli.rebind(algorithm, run, copies(config.num_envs, **settings), config)  # so that runs share a program
        folder = pathlib.Path(player)
        label = folder.name if (folder / "config.json").exists() else f"{folder.parent.parent.name} {meta['iteration']}"
        num_seeds = len(jax.tree.leaves(run)[0])
        entrants.append(Entrant(label, Kind(algorithm, "", reveal), run, num_seeds))
    return copies(1, reveal=True).env, entrants


def match(env, kind, other_kind, num_games, opening, run, other, key):
    """The points of the first player, 0 to 1, mean of `num_games`."""
    start_key, opening_key, key = jax.random.split(key, 3)
    games = jax.vmap(env.reset)(jax.random.split(start_key, num_games // 2))[0]

    def random_move(games, key):
        action = jax.vmap(any_move, (None, 0, 0))(env, jax.random.split(key, num_games // 2), games)
        return jax.vmap(env.move)(games, action)[0], ()

    games, _ = jax.lax.scan(random_move, games, jax.random.split(opening_key, opening))
    side = jnp.concatenate([games.current_player, 1 - games.current_player])  # of the first player, in each game
    games = jax.tree.map(lambda x: jnp.concatenate([x, x]), games)

    def going_on(state):
        return any_of(~state[1].terminated)

    def move(state):
        t, games, total = state
        keys = jax.random.split(jax.random.fold_in(key, t))
        obs = jax.vmap(env.observe)(games)
        action = jnp.where(games.current_player == side, decide(env, kind, run, obs, keys[0]),
                           decide(env, other_kind, other, obs, keys[1]))
        after, _, _ = jax.vmap(env.move)(games, action)
        reward = jnp.take_along_axis(after.rewards, side[:, None], axis=1).squeeze(1)
        return t + 1, after, total + jnp.where(games.terminated, 0.0, reward)

    *_, total = jax.lax.while_loop(going_on, move, (jnp.int32(0), games, jnp.zeros(num_games)))
    return (1 + total.mean()) / 2


def decide(env, kind, run, obs, key):
    if kind.algorithm is None:
        keys = jax.random.split(key, len(obs["board"]))
        return jax.vmap(RULES[kind.rule], (None, 0, 0))(env, keys, obs["game"])
    return kind.algorithm.act(run, (), obs if kind.reveal else obs["board"], key)[1]


def elo(points, games):
    """Ratings [N] of the players, from the points [N, N] of row against column, ½ against oneself, in `games` games
    each: by Newton's method. The first rating stays 0."""
    won, slope, rating = points * games + 0.5, np.log(10) / 400, np.zeros(len(points))
    for _ in range(100):
        expected = 1 / (1 + 10 ** ((rating[None] - rating[:, None]) / 400))
        gradient = (won - (games + 1) * expected).sum(axis=1) * slope
        weight = (games + 1) * expected * (1 - expected) * slope**2
        rating[1:] += np.linalg.solve((np.diag(weight.sum(axis=1)) - weight)[1:, 1:], gradient[1:])
    return rating


def show(names, points, ratings, games):
    print(f"Elo, IQM [95% CI] of {len(ratings)} seeds; then the points of each pairing in percent, row against column, "
          f"{games} games a seed")
    width = max(map(len, names))
    for i, name in enumerate(names):
        row = " ".join(f"{100 * x:5.1f}" if i != j else "     " for j, x in enumerate(points.mean(axis=0)[i]))
        print(f"  {name:{width}}  {cell(ratings[:, i]):>24}  {row}")


def draw(names, points, ratings, path):
    size = 2 + 0.6 * len(names)
    with figure(path, ncols=2, figsize=(2 * size, size)) as (fig, (left, right)):
        mean, places = points.mean(axis=0), range(len(names))
        left.imshow(mean, vmin=0, vmax=1, cmap="RdBu")
        for i in places:
            for j in places:
                if i != j:
                    left.text(j, i, f"{100 * mean[i, j]:.0f}", ha="center", va="center")
        left.set(xticks=places, yticks=places, yticklabels=names, title="points in percent, row against column")
        left.set_xticklabels(names, rotation=45, ha="right")
        for rating in ratings:
            right.plot(rating, places, ".", color="tab:blue", alpha=0.5)
        right.plot(ratings.mean(axis=0), places, "|", color="black", markersize=14)
        right.set(yticks=places, yticklabels=names, xlabel="Elo; a point for each seed, and their mean")
        right.set_ylim(len(names) - 0.5, -0.5)
        right.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    cli.run(tournament)
