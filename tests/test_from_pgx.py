"""Board games of pgx: the rules of TicTacToe by hand, who moves, who is paid."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.errors import UserError

pytest.importorskip("pgx")

from core.envs.from_pgx import Env  # noqa: E402

FILE = "core/envs/from_pgx.py"
SELF, ANSWER, GREEDY, RANDOM = ("test_a_game_against_oneself", "test_the_opponent_answers_within_the_step",
                                "test_the_greedy_opponent_wins_where_it_can", "test_the_random_opponent")
PLANTED_ERRORS = {  # and the test that has to notice
    "reward of the next player": (FILE, "after.rewards[game.current_player]", "after.rewards[after.current_player]",
                                  SELF),
    "moves that are forbidden": (FILE, "[game.observation.ravel(), game.legal_action_mask]",
                                 "[game.observation.ravel(), ~game.legal_action_mask]", SELF),
    "the learner always starts": (FILE, "lambda: game, lambda: self.answer(answer_key, game))",
                                  "lambda: game, lambda: game)", ANSWER),
    "no answer": (FILE, "lambda: game, lambda: self.answer(key, game))", "lambda: game, lambda: game)", ANSWER),
    "losses are not counted": (FILE, "reward + jnp.where(ended, 0.0, game.rewards[player])", "reward + 0.0", ANSWER),
    "reward of the opponent": (FILE, "jnp.where(ended, 0.0, game.rewards[player])",
                               "jnp.where(ended, 0.0, game.rewards[1 - player])", ANSWER),
    "a win counts twice": (FILE, "reward + jnp.where(ended, 0.0, game.rewards[player]), game.terminated",
                           "reward + game.rewards[player], game.terminated", ANSWER),
    "greedy without a choice": (FILE, "good = jnp.where(wins.any(), wins, game.legal_action_mask)",
                                "good = wins", GREEDY),
    "greedy loses": (FILE, "(reward > 0)", "(reward < 0)", GREEDY),
    "the first free field": (FILE, "return jax.random.categorical(key, jnp.log(game.legal_action_mask.astype("
                             "jnp.float32)))", "return game.legal_action_mask.argmax()", RANDOM),
}
LINES = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]


@functools.cache
def programs(**settings):
    env = Env("tic_tac_toe", **settings)
    return jax.jit(env.reset), jax.jit(env.step)


def stones(obs):
    """Of the player whose turn it is, and of the other one."""
    planes = np.asarray(obs[:18]).reshape(9, 2)
    return set(np.flatnonzero(planes[:, 0]).tolist()), set(np.flatnonzero(planes[:, 1]).tolist())


def won(own):
    return any(set(line) <= own for line in LINES)


@pytest.mark.parametrize("seed", range(6))
def test_a_game_against_oneself(seed):
    reset, step = programs()
    rng, (state, obs) = np.random.default_rng(seed), reset(jax.random.key(seed))
    own, other, ended = set(), set(), False
    while not ended:
        assert stones(obs) == (own, other)
        free = sorted(set(range(9)) - own - other)
        np.testing.assert_array_equal(np.flatnonzero(obs[18:]), free)
        action = int(rng.choice(free))
        state, ts = step(jax.random.key(0), state, jnp.int32(action))
        own |= {action}
        ended = won(own) or len(own | other) == 9
        assert ts.reward == won(own) and ts.terminated == ended and not ts.truncated
        np.testing.assert_array_equal(ts.obs, ts.next_obs)
        own, other, obs = other, own, ts.obs


def test_the_opponent_answers_within_the_step():
    """It starts half of the games. A win is worth 1, a loss −1, a draw 0: each happens."""
    reset, step = programs(opponent="random")
    rng, starts, rewards = np.random.default_rng(0), [], []
    for seed in range(60):
        state, obs = reset(jax.random.key(seed))
        own, other = stones(obs)
        starts.append(len(other))
        assert not own and len(other) <= 1
        for t in range(9):
            action = int(rng.choice(np.flatnonzero(obs[18:])))
            state, ts = step(jax.random.key(100 * seed + t), state, jnp.int32(action))
            own |= {action}
            if won(own):
                assert ts.terminated and ts.reward == 1
                break
            if ts.terminated:
                assert ts.reward in (-1, 0)
                break
            now_own, now_other = stones(ts.obs)
            assert now_own == own and len(now_other - other) == 1 and other < now_other and not won(now_other)
            assert ts.reward == 0
            other, obs = now_other, ts.obs
        rewards.append(float(ts.reward))
    assert set(starts) == {0, 1} and 15 < sum(starts) < 45 and set(rewards) == {-1.0, 0.0, 1.0}


def test_the_greedy_opponent_wins_where_it_can():
    """Once it has two in a row it takes the third; else it plays any free field."""
    reset, step = programs(opponent="greedy")
    rng, chances, answers = np.random.default_rng(1), 0, set()
    for seed in range(60):
        state, obs = reset(jax.random.key(seed))
        for t in range(9):
            own, other = stones(obs)
            action = int(rng.choice(np.flatnonzero(obs[18:])))
            free = set(range(9)) - own - other - {action}
            can_win = any(won(other | {x}) for x in free) and not won(own | {action})
            state, ts = step(jax.random.key(100 * seed + t), state, jnp.int32(action))
            assert (ts.reward == -1) == can_win
            chances += can_win
            if ts.terminated:
                break
            answers |= stones(ts.obs)[1]
            obs = ts.obs
    assert chances > 10 and answers == set(range(9))


def test_the_random_opponent():
    """Every free field has its turn."""
    reset, _ = programs(opponent="random")
    first = [stones(reset(jax.random.key(seed))[1])[1] for seed in range(150)]
    counts = np.bincount([min(x) for x in first if x], minlength=9)
    assert (counts > 0).all() and counts.max() < 25


def test_the_game_is_in_the_observation():
    """And goes on from there."""
    env = Env("tic_tac_toe", reveal=True)
    state, obs = env.reset(jax.random.key(0))
    game, reward, ended = jax.jit(env.move)(obs["game"], jnp.int32(4))
    assert stones(env.observe(game)["board"]) == (set(), {4}) and reward == 0 and not ended
    assert Env("connect_four").max_steps == 42 and Env("connect_four").action_space.n == 7


@pytest.mark.parametrize(("name", "settings", "words"), [
    ("chess", {}, 'unknown environment "pgx/chess"; did you mean one of pgx/tic_tac_toe, pgx/connect_four'),
    ("tic_tac_toe", dict(opponent="me"), 'opponent = "me" of "pgx/tic_tac_toe": one of self, random, greedy'),
    ("tic_tac_toe", dict(oponent="self"), "oponent")])
def test_mistakes_are_named(name, settings, words):
    with pytest.raises(UserError, match=words):
        Env(name, **settings)
