"""Every player plays every other player: a board game, with Elo ratings, or a 2x2 game of 100 rounds.

    python -m launchers.tournament --players=random,greedy,runs/x/checkpoints/step_000000000250.npz,runs/x
    python -m launchers.tournament --players=tit_for_tat,always_defect,runs/y,runs/z --picture=matrix.png

A player is a run, one of its checkpoints, or a rule by its name: an opponent of core/envs/from_pgx.py in a board game
of pgx, a co-player of core/envs/fixed_coplayer.py in a 2x2 game. The first run says which game it is. Nobody learns
while they play. Seed i of a run meets seed i of the others. So each seed gives a score of its own, and the score is
printed as IQM [95% CI] over seeds; an entry of the matrix is a mean over seeds.

In a 2x2 game an entry is the mean reward that the row player has in a round against the column player; a player also
meets itself. Its score is the mean of its row. Runs may come from fixed_coplayer, tabular_coplayer,
iterated_matrix_game and infinite_matrix_game. A run of two players plays with the one of its seat, and half of the
games are played with the seats exchanged.

In a board game an entry is the mean of points, 1 for a win and ½ for a draw. A game begins with random moves, its
opening, because players without noise would play one game again and again. Each opening is played twice, with the sides
exchanged; a game that ends in its opening counts as a draw. The score is the Elo rating R:

    E_ij = 1 / (1 + 10^((R_j − R_i) / 400))     the points that i is expected to win in one game against j
    R    the maximum-likelihood ratings of all games; a draw is half a win and half a loss

Each pairing counts one draw more than was played, so a player who wins every game has a finite rating. The first player
has the rating 0.
"""
import functools

import jax
import jax.numpy as jnp
import numpy as np

from core.errors import UserError
from core.evaluation import cell
from launchers import cli
from launchers.matches import enter
from launchers.runs import figure


def tournament(*, players: list[str], games: int = 128, opening: int = 2, eval_seed: int = 1_000_000,
               picture: str | None = None) -> dict[str, np.ndarray]:
    """Play all pairings: table [S, N, N] of what row earns against column, and the score [S, N] of each player.

    Args:
        players: Runs, their checkpoints, and rules.
        games: Games of each pairing and seed, an even number.
        opening: Random moves that a board game begins with.
        eval_seed: Fixes the games.
        picture: Draw table and scores into this file.
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
    game, entrants = enter(players, games, opening)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(eval_seed), jnp.arange(game.num_seeds))

    @functools.cache  # checkpoints of one config share a program
    def program(kind, other_kind):
        return jax.jit(cli.per_seed(functools.partial(game.match, kind, other_kind), game.num_seeds))

    table = np.full((game.num_seeds, len(entrants), len(entrants)), 0.5)
    for i, first in enumerate(entrants):
        for j, second in enumerate(entrants[:i] if game.board else entrants[:i + 1]):
            earned = np.asarray(program(first.kind, second.kind)(first.run, second.run, keys))
            table[:, i, j], table[:, j, i] = (earned if i != j else earned.mean(axis=1, keepdims=True).repeat(2, 1)).T
    score = np.stack([elo(of_seed, games) for of_seed in table]) if game.board else table.mean(axis=2)
    names = [entrant.name for entrant in entrants]
    show(names, table, score, games, game.board)
    if picture:
        draw(names, table, score, picture, game.board)
    return dict(table=table, score=score)


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


def show(names, table, score, games, board):
    what = "Elo" if board else "reward of a round"
    print(f"{what}, IQM [95% CI] of {len(score)} seeds; then what each earned{' in percent' * board}, row against "
          f"column, mean of the seeds, {games} games each")
    width = max(map(len, names))
    for i, name in enumerate(names):
        row = " ".join("     " if board and i == j else f"{100 * x:5.1f}" if board else f"{x:5.2f}"
                       for j, x in enumerate(table.mean(axis=0)[i]))
        print(f"  {name:{width}}  {cell(score[:, i]):>24}  {row}")


def draw(names, table, score, path, board):
    size = 2 + 0.6 * len(names)
    with figure(path, ncols=2, figsize=(2 * size, size)) as (_, (left, right)):
        mean, places = table.mean(axis=0), range(len(names))
        image = left.imshow(mean, cmap="RdBu", **(dict(vmin=0, vmax=1) if board else {}))
        for i in places:
            for j in places:
                if not board or i != j:
                    dark = abs(image.norm(mean[i, j]) - 0.5) > 0.35
                    left.text(j, i, f"{100 * mean[i, j]:.0f}" if board else f"{mean[i, j]:.2f}", ha="center",
                              va="center", fontsize=8, color="white" if dark else "black")
        title = "points in percent" if board else "reward of a round"
        left.set(xticks=places, yticks=places, yticklabels=names, title=f"{title}, row against column")
        left.set_xticklabels(names, rotation=45, ha="right")
        for of_seed in score:
            right.plot(of_seed, places, ".", color="tab:blue", alpha=0.5)
        right.plot(score.mean(axis=0), places, "|", color="black", markersize=14)
        score_is = "Elo" if board else "mean of a row"
        right.set(yticks=places, yticklabels=names, xlabel=f"{score_is}; a point for each seed, and their mean")
        right.set_ylim(len(names) - 0.5, -0.5)
        right.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    cli.run(tournament)
