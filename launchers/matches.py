"""Who plays in a tournament, and one match: of a board game, or of a 2x2 game in rounds."""
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from core.envs import fixed_coplayer, from_pgx, iterated_matrix_game, make_env
from core.errors import UserError
from core.evaluation import any_of
from launchers import cli
from launchers.runs import load

BOARD_RULES = {name: rule for name, rule in from_pgx.OPPONENTS.items() if rule is not None}
VIEWS = dict(  # of a 2x2 game: where a run was trained, and what its policy sees and gives
    fixed_coplayer="own", tabular_coplayer="own", iterated_matrix_game="both", infinite_matrix_game="logits")


class Kind(NamedTuple):
    """What a program is compiled for."""

    algorithm: Any  # None: a rule
    rule: str
    view: str  # what the policy sees: "board", or "game" with it; of a 2x2 game one of VIEWS


class Entrant(NamedTuple):
    name: str
    kind: Kind
    run: Any  # [S, ...]; () of a rule


class Game(NamedTuple):
    board: bool
    match: Any  # kind, other kind, run, other run, key -> (2,) what both earn
    num_seeds: int  # the smallest number of seeds of any run


def enter(players, games, opening):
    """(Game, [Entrant]) of runs, checkpoints and rules by their names."""
    known = {*BOARD_RULES, *fixed_coplayer.RULES}
    if wrong := [player for player in players if player not in known and not pathlib.Path(player).exists()]:
        raise UserError(f'"{wrong[0]}" is no run; rules are {", ".join(sorted(known))}')
    runs = {player: load(player) for player in players if player not in known}
    if not runs:
        raise UserError(f"--players={','.join(players)}: one of them has to be a run, which names the game")
    num_seeds = min(len(jax.tree.leaves(run)[0]) for _, _, run, _ in runs.values())
    first, (_, config, _, _) = next(iter(runs.items()))
    board = config.env.startswith("pgx/")
    if not board and config.env not in VIEWS:
        raise UserError(f'{first} is a run on "{config.env}", which is not one of pgx/…, {", ".join(VIEWS)}')
    rules = BOARD_RULES if board else fixed_coplayer.RULES
    if unknown := [player for player in players if player not in {*runs, *rules}]:
        raise UserError(f'"{unknown[0]}" does not play the game of {first}; known: {", ".join(rules)}')
    for player, (algorithm, own, _, _) in runs.items():
        same = own.env == config.env if board else own.env in VIEWS and payoff(own) == payoff(config)
        if not same:
            raise UserError(f'{player}, on "{own.env}", plays another game than {first}, on "{config.env}"')
        if board and hasattr(algorithm, "initial_carry"):
            raise UserError(f"{player}: {own.algorithm} has a memory, and does not see the moves of its opponent here")
    copies = functools.cache(make_env)  # so that runs share a program

    def entrant(player):
        if player not in runs:
            return Entrant(player, Kind(None, player, "game" if board else "own"), ())
        algorithm, own, run, meta = runs[player]
        settings, folder = own.get("env_kwargs", {}), pathlib.Path(player)
        view = ("game" if settings.get("reveal", False) else "board") if board else VIEWS[own.env]
        run = cli.rebind(algorithm, run, copies(own.env, own.num_envs, **settings), own)
        run = jax.tree.map(lambda x: x[:num_seeds], run)
        name = folder.name if (folder / "config.json").exists() else f"{folder.parent.parent.name} {meta['iteration']}"
        return Entrant(name, Kind(algorithm, "", view), run)

    if board:
        match = functools.partial(board_match, make_env(config.env, 1, reveal=True).env, games, opening)
    else:
        match = functools.partial(round_match, iterated_matrix_game.Env(payoff(config)), games)
    return Game(board, match, num_seeds), [entrant(player) for player in players]


def payoff(config):
    return config.get("env_kwargs", {}).get("payoff", iterated_matrix_game.Env.payoff)


def board_match(env, num_games, opening, kind, other_kind, run, other, key):
    """The points of both players, from 0 to 1, mean of the games."""
    start_key, opening_key, key = jax.random.split(key, 3)
    games = jax.vmap(env.reset)(jax.random.split(start_key, num_games // 2))[0]

    def random_move(games, key):
        keys = jax.random.split(key, num_games // 2)
        action = jax.vmap(from_pgx.any_move, (None, 0, 0))(env, keys, games)
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
        action = jnp.where(games.current_player == side, board_move(env, kind, run, obs, keys[0]),
                           board_move(env, other_kind, other, obs, keys[1]))
        after, _, _ = jax.vmap(env.move)(games, action)
        reward = jnp.take_along_axis(after.rewards, side[:, None], axis=1).squeeze(1)
        return t + 1, after, total + jnp.where(games.terminated, 0.0, reward)

    *_, total = jax.lax.while_loop(going_on, move, (jnp.int32(0), games, jnp.zeros(num_games)))
    points = (1 + total.mean()) / 2
    return jnp.stack([points, 1 - points])


def board_move(env, kind, run, obs, key):
    if kind.algorithm is None:
        keys = jax.random.split(key, len(obs["board"]))
        return jax.vmap(BOARD_RULES[kind.rule], (None, 0, 0))(env, keys, obs["game"])
    return kind.algorithm.act(run, (), obs if kind.view == "game" else obs["board"], key)[1]


def round_match(env, num_games, kind, other_kind, run, other, key):
    """The rewards of both players, mean of a round. In half of the games the second player has the first seat."""
    def play(kinds, runs, key):  # the first player of `kinds` has the first seat
        reset_key, key = jax.random.split(key)
        state, obs = jax.vmap(env.reset)(jax.random.split(reset_key, num_games // 2))
        carries = tuple(() if kind.algorithm is None else cli.start_carry(kind.algorithm, run, num_games // 2)
                        for kind, run in zip(kinds, runs, strict=True))

        def one_round(before, key):
            state, obs, carries = before
            keys = jax.random.split(key, 2)
            moves = [choose(kinds[seat], runs[seat], seat, carries[seat], obs, keys[seat]) for seat in (0, 1)]
            carries, actions = zip(*moves, strict=True)
            state, ts = jax.vmap(env.step, (None, 0, 0))(None, state, jnp.stack(actions, axis=1))
            return (state, ts.obs, carries), ts.reward.mean(axis=0)

        rewards = jax.lax.scan(one_round, (state, obs, carries), jax.random.split(key, env.max_steps))[1]
        return rewards.mean(axis=0)

    first_key, second_key = jax.random.split(key)
    here, there = play((kind, other_kind), (run, other), first_key), play((other_kind, kind), (other, run), second_key)
    return (here + there[::-1]) / 2


def choose(kind, run, seat, carry, obs, key):  # obs (E, 2, 5) -> carry, actions (E,)
    own = obs[:, seat]
    if kind.algorithm is None:
        chance = own @ jnp.array(fixed_coplayer.RULES[kind.rule])
    elif kind.view == "logits":  # of a game that shows nothing
        key, act_key = jax.random.split(key)
        logits = kind.algorithm.act(run, carry, jnp.zeros((len(obs), 2, 1)), act_key)[1][:, seat]
        chance = jax.nn.sigmoid((own * logits).sum(axis=1))
    else:
        carry, action = kind.algorithm.act(run, carry, own if kind.view == "own" else obs, key)
        return carry, action if kind.view == "own" else action[:, seat]
    return carry, jnp.where(jax.random.bernoulli(key, chance), 0, 1)
