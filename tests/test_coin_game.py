"""The coin game against its rules in a loop, known steps, and the exact mean of random play."""
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import render
from core.envs import Batch, Discrete, make_env
from core.envs.coin_game import Env, State
from core.errors import UserError
from core.evaluation import evaluate, score

FILE = "core/envs/coin_game.py"
LOOP, KNOWN, RANDOM, FRESH, VIEWS, LAST, PICTURE = (
    "test_steps_are_the_rules_in_a_loop", "test_known_steps", "test_random_play_takes_as_many_coins_as_it_should",
    "test_a_coin_comes_back_on_any_cell_alike", "test_each_player_sees_the_board_around_itself",
    "test_the_last_step_is_paid_and_cuts_the_episode", "test_the_picture_shows_the_state")
START = "test_players_and_coins_start_on_any_cells"
PLANTED_ERRORS = {  # and the test that has to notice
    "the last step is not paid": (FILE, "obs, reward, jnp", "obs, reward * (t < self.max_steps), jnp", LAST),
    "one step more": (FILE, "t >= self.max_steps", "t > self.max_steps", LAST),
    "a time limit is an end": (FILE, "jnp.bool_(False), t >= self.max_steps", "t >= self.max_steps, jnp.bool_(False)",
                               LAST),
    "a byte counts the steps": (FILE, "jnp.int32(0))", "jnp.int8(0))", START),
    "a board with walls": (FILE, "MOVES)[action]) % SIDE", "MOVES)[action]).clip(0, SIDE - 1)", LOOP),
    "both make the first player's move": (FILE, "jnp.array(MOVES)[action]", "jnp.array(MOVES)[action[:1]]", LOOP),
    "up and down exchanged": (FILE, "[[0, 1], [0, -1]", "[[0, -1], [0, 1]", KNOWN),
    "coins are taken before the move": (FILE, "(players[:, None] == state", "(state.players[:, None] == state", LOOP),
    "one coordinate is enough": (FILE, "state.coins[None]).all(axis=2)", "state.coins[None]).any(axis=2)", LOOP),
    "a coin is of its finder": (FILE, "jnp.diagonal(takes), jnp.diagonal(takes[:, ::-1])",
                                "jnp.diagonal(takes[:, ::-1]), jnp.diagonal(takes)", KNOWN),
    "the finder pays, not the owner": (FILE, "[own, other, other[::-1]]", "[own, other, other]", KNOWN),
    "the players' payoffs exchanged": (FILE, "jnp.float32(self.payoff) *", "jnp.float32(self.payoff)[::-1] *", LOOP),
    "both must take a coin": (FILE, "takes.any(axis=0)", "takes.all(axis=0)", LOOP),
    "the coin of a player who took one comes back": (FILE, "takes.any(axis=0)", "takes.any(axis=1)", LOOP),
    "a coin never comes back": (FILE, "fresh, state.coins)", "state.coins, state.coins)", FRESH),
    "both coins come back on one cell": (FILE, "jax.random.randint(key, (2, 2), 0, SIDE)",
                                         "jax.random.randint(key, (1, 2), 0, SIDE).repeat(2, 0)", FRESH),
    "coins come back on the diagonal": (FILE, "jax.random.randint(key, (2, 2), 0, SIDE)",
                                        "jax.random.randint(key, (2, 1), 0, SIDE).repeat(2, 1)", FRESH),
    "coins come back on four cells": (FILE, "randint(key, (2, 2), 0, SIDE)", "randint(key, (2, 2), 0, SIDE - 1)",
                                      FRESH),
    "all start on four cells": (FILE, "randint(key, (4, 2), 0, SIDE)", "randint(key, (4, 2), 0, SIDE - 1)", START),
    "a player starts on its coin": (FILE, "jax.random.randint(key, (4, 2), 0, SIDE)",
                                    "jnp.tile(jax.random.randint(key, (2, 2), 0, SIDE), (2, 1))", START),
    "both players see the red one's view": (FILE, "[1, 0, 3, 2]]", "[0, 1, 2, 3]]", VIEWS),
    "own and other coin exchanged for blue": (FILE, "[1, 0, 3, 2]]", "[1, 0, 2, 3]]", VIEWS),
    "all views are around red": (FILE, "cells - players[:, None]", "cells - players[:1, None]", VIEWS),
    "the board is not turned around the player": (FILE, "cells - players[:, None] + SIDE // 2", "cells + 0", VIEWS),
    "itself in the corner": (FILE, "+ SIDE // 2) % SIDE", ") % SIDE", VIEWS),
    "x and y exchanged": (FILE, '"ikx,iky->ixyk"', '"ikx,iky->iyxk"', VIEWS),
    "the coins of the step before are seen": (FILE, "t, obs = state.t + 1, self.observe(players, coins)",
                                              "t, obs = state.t + 1, self.observe(players, state.coins)", FRESH),
    "own and other coins are told exchanged": (FILE, '"own_coins": kinds[:, 0], "other_coins": kinds[:, 1]',
                                               '"own_coins": kinds[:, 1], "other_coins": kinds[:, 0]', KNOWN),
    "coins lost are told as taken": (FILE, '"other_coins": kinds[:, 1]', '"other_coins": kinds[:, 2]', KNOWN),
    "returns of opponents are added": (FILE, "2, (0, 1), Discrete(5)", "2, (0, 0), Discrete(5)", RANDOM),
    "nobody stays": (FILE, "Discrete(5)", "Discrete(4)", KNOWN),
    "colours exchanged in the picture": (FILE, "zip((RED, BLUE)", "zip((BLUE, RED)", PICTURE),
    "coins drawn where players are": (FILE, "Circle(coin + (aside", "Circle(player + (aside", PICTURE),
}

UNEVEN = ((0.5, 3.0, -7.0), (1.25, -0.75, 11.0))  # no two are alike
STEPS = {payoff: jax.jit(jax.vmap(Env(payoff).step, in_axes=(0, 0, 0))) for payoff in (Env.payoff, UNEVEN)}
MOVES = {"up": (0, 1), "down": (0, -1), "right": (1, 0), "left": (-1, 0), "stay": (0, 0)}
WORDS = list(MOVES)
SIZE = 512  # of all batches, so that each payoff is compiled once


def play(cells, actions, payoff=Env.payoff, seed=0):
    """Steps of many boards at once: cells [B, 4, 2] of red, blue, red's coin and blue's coin, actions [B, 2]."""
    cells, actions = (np.resize(x, (SIZE, *np.shape(x)[1:])).astype(np.int32) for x in (cells, actions))
    with jax.debug_key_reuse(False):
        return cells, actions, jax.device_get(STEPS[payoff](
            jax.random.split(jax.random.key(seed), SIZE), State(cells[:, :2], cells[:, 2:], jnp.zeros(SIZE, jnp.int32)),
            actions))


def rules(cells, action, payoff):
    """Players after the move, whether each coin was taken, rewards, own and other coins taken: one board."""
    players = [tuple((np.array(cell) + MOVES[WORDS[a]]) % 3) for cell, a in zip(cells[:2], action, strict=True)]
    reward, own, other, taken = [0.0, 0.0], [0, 0], [0, 0], [False, False]
    for i, coin in itertools.product(range(2), range(2)):
        if players[i] == tuple(cells[2 + coin]):
            taken[coin] = True
            reward[i] += payoff[i][0 if coin == i else 1]
            if coin == i:
                own[i] += 1
            else:
                other[i] += 1
                reward[coin] += payoff[coin][2]
    return players, taken, reward, own, other


def planes(things, centre):
    """(3, 3, 4) of four cells, around one of them."""
    out = np.zeros((3, 3, 4))
    for k, thing in enumerate(things):
        x, y = (np.array(thing) - centre + 1) % 3
        out[x, y, k] = 1
    return out


def test_steps_are_the_rules_in_a_loop():
    rng = np.random.default_rng(0)
    cells, actions, (state, ts) = play(rng.integers(0, 3, (SIZE, 4, 2)), rng.integers(0, 5, (SIZE, 2)), UNEVEN)
    stayed = []
    for i in range(SIZE):
        players, taken, reward, own, other = rules(cells[i], actions[i], UNEVEN)
        np.testing.assert_array_equal(state.players[i], players)
        for coin in range(2):
            same = (state.coins[i, coin] == cells[i, 2 + coin]).all()
            assert taken[coin] or same
            stayed += [same] if taken[coin] else []
        np.testing.assert_allclose(ts.reward[i], reward)
        np.testing.assert_array_equal([ts.info["own_coins"][i], ts.info["other_coins"][i]], [own, other])
        red, blue, coin, other_coin = *players, *state.coins[i]
        np.testing.assert_array_equal(ts.obs[i], [planes((red, blue, coin, other_coin), red),
                                                  planes((blue, red, other_coin, coin), blue)])
    assert np.mean(stayed) < 0.3  # one in nine comes back where it was
    np.testing.assert_array_equal(ts.next_obs, ts.obs)
    assert ts.reward.dtype == np.float32 and {x.dtype for x in state} == {np.dtype("int32")}
    assert not ts.terminated.any() and not ts.truncated.any() and (state.t == 1).all()


KNOWN_STEPS = [  # red, blue, red's coin, blue's coin, moves, rewards, own coins, other coins
    ((0, 0), (2, 0), (0, 1), (2, 1), ("up", "up"), (1, 1), (1, 1), (0, 0)),
    ((0, 0), (2, 0), (2, 2), (0, 2), ("down", "down"), (-1, -1), (0, 0), (1, 1)),  # over the edge, each other's coin
    ((0, 0), (1, 1), (1, 0), (2, 2), ("right", "down"), (-1, 1), (1, 0), (0, 1)),  # both on red's coin
    ((0, 0), (1, 1), (2, 2), (1, 0), ("right", "down"), (1, -1), (0, 1), (1, 0)),  # both on blue's
    ((0, 0), (2, 1), (2, 0), (2, 0), ("left", "stay"), (2, -2), (1, 0), (1, 0)),  # two coins on one cell
    ((0, 0), (2, 1), (2, 0), (2, 0), ("left", "down"), (0, 0), (1, 1), (1, 1)),  # and both players, too
    ((1, 1), (1, 1), (1, 1), (0, 1), ("stay", "left"), (1, 1), (1, 1), (0, 0)),  # they start together
    ((1, 1), (1, 2), (1, 1), (1, 2), ("up", "down"), (-1, -1), (0, 0), (1, 1)),  # they change places
    ((1, 1), (1, 2), (0, 0), (2, 0), ("left", "right"), (0, 0), (0, 0), (0, 0))]


def test_known_steps():
    cells = [step[:4] for step in KNOWN_STEPS]
    assert Env.action_space == Discrete(len(WORDS))
    _, _, (_, ts) = play(cells, [[WORDS.index(word) for word in step[4]] for step in KNOWN_STEPS])
    for i, (*_, reward, own, other) in enumerate(KNOWN_STEPS):
        np.testing.assert_array_equal(ts.reward[i], reward, str(i))
        np.testing.assert_array_equal([ts.info["own_coins"][i], ts.info["other_coins"][i]], [own, other], str(i))


def test_each_player_sees_the_board_around_itself():
    obs = Env().observe(jnp.array([[0, 0], [2, 1]]), jnp.array([[1, 0], [2, 2]]))
    red, blue = ([tuple(np.argwhere(view[:, :, k])[0]) for k in range(4)] for view in np.asarray(obs))
    assert obs.shape == (2, 3, 3, 4) and (obs.sum(axis=(1, 2)) == 1).all()
    assert red == [(1, 1), (0, 2), (2, 1), (0, 0)]  # itself, the other, its own coin, the other's
    assert blue == [(1, 1), (2, 0), (1, 2), (0, 0)]


def test_the_game_is_alike_for_both():
    """Players, coins and moves exchanged: what was red's is blue's."""
    rng = np.random.default_rng(1)
    cells, actions = rng.integers(0, 3, (SIZE, 4, 2)), rng.integers(0, 5, (SIZE, 2))
    _, _, (state, ts) = play(cells, actions)
    _, _, (other, exchanged) = play(cells[:, [1, 0, 3, 2]], actions[:, ::-1])
    np.testing.assert_array_equal(exchanged.reward, ts.reward[:, ::-1])
    np.testing.assert_array_equal(other.players, state.players[:, ::-1])
    np.testing.assert_array_equal(exchanged.obs[:, :, :, :, :2], ts.obs[:, ::-1, :, :, :2])  # coins are drawn anew
    assert len(np.unique(ts.reward, axis=0)) > 5


def chi_square(*cells):
    """Of the cells [B, 2], or of pairs of them, against equal counts."""
    numbers = np.ravel_multi_index([x for cell in cells for x in np.asarray(cell).T], (3, 3) * len(cells))
    counts = np.bincount(numbers, minlength=9 ** len(cells))
    return ((counts - counts.mean()) ** 2 / counts.mean()).sum()


def test_a_coin_comes_back_on_any_cell_alike():
    """Each on the nine, both on the 81 pairs: below the 99.9% quantiles 26 and 125 of chi-square."""
    coins = np.concatenate([play([[(0, 0), (2, 2), (0, 1), (2, 1)]], [[0, 1]], seed=seed)[2][0].coins
                            for seed in range(16)])
    assert len(coins) == 8192
    assert chi_square(coins[:, 0]) < 26 and chi_square(coins[:, 1]) < 26 and chi_square(coins[:, 0], coins[:, 1]) < 125
    _, _, (state, ts) = play([[(0, 0), (2, 2), (0, 1), (2, 1)]], [[0, 1]])
    for i in range(SIZE):  # and is seen where it is now
        np.testing.assert_array_equal(ts.obs[i, 0], planes([*state.players[i], *state.coins[i]], state.players[i, 0]))


def test_players_and_coins_start_on_any_cells():
    with jax.debug_key_reuse(False):
        state, obs = jax.jit(jax.vmap(Env().reset))(jax.random.split(jax.random.key(1), 8192))
    cells = np.concatenate([state.players, state.coins], axis=1)
    for i, j in itertools.combinations(range(4), 2):
        assert chi_square(cells[:, i]) < 26 and chi_square(cells[:, i], cells[:, j]) < 125
    assert obs.shape == (8192, 2, 3, 3, 4) and (state.t == 0).all() and {x.dtype for x in state} == {jnp.dtype("int32")}
    np.testing.assert_array_equal(obs[7, 1], planes(cells[7, [1, 0, 3, 2]], cells[7, 1]))


def test_the_last_step_is_paid_and_cuts_the_episode():
    env = Env(max_steps=2)
    state = State(jnp.array([[0, 0], [2, 2]]), jnp.array([[0, 1], [1, 1]]), jnp.int32(0))
    step = jax.jit(env.step)
    state, first = step(jax.random.key(0), state, jnp.array([4, 4]))
    state, last = step(jax.random.key(1), state, jnp.array([0, 4]))
    np.testing.assert_array_equal([first.reward, last.reward], [[0, 0], [1, 0]])
    assert not first.truncated and last.truncated and not first.terminated and not last.terminated


def coins_of_random_play(steps):
    """Own coins that a player takes, a step: the chances of one coin, as both players see it, in float64."""
    walk = np.array([[sum(((np.array(a) + move) % 3 == b).all() for move in MOVES.values()) / 5
                      for b in itertools.product(range(3), repeat=2)] for a in itertools.product(range(3), repeat=2)])
    chance, total = np.full((9, 9), 1 / 81), 0.0  # of where the coin lies from red and from blue
    where_it_comes_back = np.array([[[[(tuple((np.array(b) - a + c) % 3) == d) for d in CELLS] for c in CELLS]
                                     for b in CELLS] for a in CELLS]) / 9
    for _ in range(steps):
        chance = walk.T @ chance @ walk
        total += chance[0].sum()
        taken = np.zeros((9, 9))
        taken[0], taken[:, 0] = chance[0], chance[:, 0]
        chance = chance - taken
        for a, b in np.argwhere(taken):  # the players stay as far from each other as they were
            chance += taken[a, b] * where_it_comes_back[a, b]
    return total / steps


CELLS = list(itertools.product(range(3), repeat=2))


def test_random_play_takes_as_many_coins_as_it_should():
    """Of 1,000 episodes of 150 steps: within four standard errors. It earns nothing on average."""
    env = Batch(Env(max_steps=150), 1000)
    with jax.debug_key_reuse(False):
        returns, length, told = jax.jit(lambda key: evaluate(
            lambda carry, obs, key: (carry, env.action_space.sample(key, (1000, 2))), env, key))(jax.random.key(5))
    np.testing.assert_array_equal(length, 150)
    row = score(returns, length, Env.teams, told)
    due = coins_of_random_play(150)
    for name in ("own_coins", "other_coins"):
        error = np.asarray(told[name]).std(axis=0) / 1000**0.5
        assert (np.abs(np.asarray(told[name]).mean(axis=0) - due) < 4 * error).all() and (error < 0.001).all()
    assert abs(row["own_coins_agent0"] - due) < 0.004 and 0.09 < due < 0.1
    error = np.asarray(returns).std(axis=0) / 1000**0.5
    assert (np.abs([row["return_team0"], row["return_team1"]]) < 4 * error).all() and "return" not in row


def test_settings_that_cannot_be_are_named():
    wrong = [dict(payoff=((1, 1, -2),)), dict(payoff=(1, 1, -2)), dict(payoff=((1, 1), (1, 1))), dict(payoff=3),
             dict(payoff=((1, 1, -2, 0),) * 2), dict(payoff=((1, 1, float("nan")),) * 2),
             dict(payoff=(("a", 1, 1),) * 2), dict(max_steps=0), dict(max_steps=1.5)]
    for settings in wrong:
        with pytest.raises(UserError, match=f'{[*settings][0]} = .* of environment "coin_game"'):
            make_env("coin_game", 1, **settings)
    assert make_env("coin_game", 1, payoff=[[1, 2, 3], [4, 5, 6]], max_steps=3).max_steps == 3


def test_the_picture_shows_the_state():
    state = State(np.array([[0, 1], [2, 2]]), np.array([[1, 0], [2, 2]]), np.int32(3))
    scene = Env().draw(state)
    players = [shape for shape in scene.shapes if isinstance(shape, render.Circle) and shape.label]
    coins = [shape for shape in scene.shapes if isinstance(shape, render.Circle) and not shape.label]
    assert [p.label for p in players] == ["red", "blue"]
    for shape, cell, colour in zip([*players, *coins], [(0, 1), (2, 2), (1, 0), (2, 2)],
                                   [render.RED, render.BLUE] * 2, strict=True):
        assert shape.colour == colour and np.abs(np.array(shape.centre) - cell).max() + shape.radius < 0.5
    apart = [np.hypot(*np.subtract(a.centre, b.centre)) > a.radius + b.radius
             for a, b in itertools.combinations([players[1], *coins], 2)]
    assert all(apart)  # also on one cell
    frame = render.film([scene])[0]
    for shape in players:
        place = np.subtract(shape.centre, scene.low) / np.subtract(scene.high, scene.low)
        column, row = (place * len(frame)).astype(int)
        np.testing.assert_array_equal(frame[len(frame) - row, column], shape.colour)
