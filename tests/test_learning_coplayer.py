"""The co-player that learns between games, against games summed by hand and learning by finite differences, in
float64."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.envs import make_env
from core.envs.learning_coplayer import Env, State
from core.errors import UserError
from core.evaluation import evaluate

FILE = "core/envs/learning_coplayer.py"
STEP, FIRST, TRIAL, FRESH = ("test_a_step_is_the_formula", "test_the_first_game_is_before_the_first_lesson",
                             "test_whole_trials_against_a_simulation", "test_each_trial_has_a_co_player_of_its_own")
PLANTED_ERRORS = {  # and the test that has to notice
    "the co-player learns before its reward": (FILE, "(1 - self.discount) * values",
        "(1 - self.discount) * self.game.values(jnp.stack([action, state.logits]))", FIRST),
    "the co-player climbs the agent's value": (FILE, "return values[1], values", "return values[0], values", STEP),
    "downhill": (FILE, "state.logits + self", "state.logits - self", STEP),
    "learning rate forgotten": (FILE, "self.learning_rate * slope", "slope", STEP),
    "the slope of the value per round": (FILE, "self.learning_rate * slope",
                                         "self.learning_rate * (1 - self.discount) * slope", STEP),
    "the co-player plays first": (FILE, "jnp.stack([action, own])", "jnp.stack([own, action])", STEP),
    "the co-player's view is the agent's": ("core/envs/infinite_matrix_game.py", "logits[1, OTHER_VIEW]", "logits[1]",
                                            STEP),
    "rewards exchanged": (FILE, "reward, coplayer_reward =", "coplayer_reward, reward =", STEP),
    "the value of the whole game": (FILE, "= (1 - self.discount) * values", "= values", STEP),
    "it never learns": (FILE, "State(state.logits + self.learning_rate * slope, state.t + 1)",
                        "State(state.logits, state.t + 1)", TRIAL),
    "what it played is observed": (FILE, "obs = self.observe(action, state.logits)",
                                   "obs = self.observe(action, state.logits - self.learning_rate * slope)", STEP),
    "logits are observed": (FILE, "jax.nn.sigmoid(jnp.concatenate([own, other]))", "jnp.concatenate([own, other])",
                            STEP),
    "the co-player's half first": (FILE, "[own, other]))", "[other, own]))", STEP),
    "one game too many": (FILE, "state.t >= self.max_steps", "state.t > self.max_steps", TRIAL),
    "the limit is an end": (FILE, "reward, jnp.bool_(False), state.t >= self.max_steps,",
                            "reward, state.t >= self.max_steps, jnp.bool_(False),", TRIAL),
    "games are not counted": (FILE, "slope, state.t + 1)", "slope, state.t)", TRIAL),
    "a byte counts the games": (FILE, "jnp.int32(0))", "jnp.int8(0))", "test_more_games_than_a_byte_counts"),
    "the same co-player in every trial": (FILE, "jax.random.normal(key, (5,))",
                                          "jax.random.normal(jax.random.key(0), (5,))", FRESH),
    "the co-player stays for the next trial": ("core/envs/batch.py", "lambda new, old: where(done, new, old), fresh",
                                               "lambda new, old: old, fresh", FRESH),
    "a start of its own size": (FILE, "self.init_std * jax", "jax", FRESH),
    "the agent's half at the start": (FILE, "self.observe(jnp.zeros(5), state.logits)",
                                      "self.observe(state.logits, state.logits)", FRESH),
}

UNEVEN = ((0.5, -1), (-3, 2), (4, -0.25), (-2, 1.5))  # no player is like the other
C, D = np.full(5, 20.0), np.full(5, -20.0)  # logits
TFT = np.array([20.0, 20, -20, 20, -20])
OUTCOMES = "CC", "CD", "DC", "DD"


def values(first, second, payoff, discount):
    """Discounted sums of both players: 2,000 rounds, each player named its own action first."""
    p, q = (1 / (1 + np.exp(-np.float64(x))) for x in (first, second))

    def after(own, other):
        return np.array([(p[own] if a == "C" else 1 - p[own]) * (q[other] if b == "C" else 1 - q[other])
                         for a, b in OUTCOMES])

    move = np.array([after(1 + OUTCOMES.index(a + b), 1 + OUTCOMES.index(b + a)) for a, b in OUTCOMES])
    chance, weight, total = after(0, 0), 1.0, np.zeros(2)
    while weight > 1e-12:
        total += weight * chance @ np.float64(payoff)
        chance, weight = chance @ move, weight * discount
    return total


def learned(first, second, payoff, discount, rate, h=1e-5):
    """The co-player's logits after a step up its own value, by finite differences."""
    ends = np.array([[values(first, second + sign * h * unit, payoff, discount)[1] for unit in np.eye(5)]
                     for sign in (-1, 1)])
    return second + rate * (ends[1] - ends[0]) / (2 * h)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@functools.cache
def stepper(**settings):
    return jax.jit(Env(**settings).step)


@pytest.mark.parametrize("seed", range(3))
def test_a_step_is_the_formula(seed):
    step = stepper(payoff=UNEVEN, discount=0.9, learning_rate=0.3)
    action, logits = np.random.default_rng(seed).normal(size=(2, 5))
    state, ts = step(jax.random.key(0), State(jnp.float32(logits), jnp.int32(0)), jnp.float32(action))
    expected = learned(action, logits, UNEVEN, 0.9, 0.3)
    np.testing.assert_allclose(state.logits, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected - logits).max() > 0.05
    rewards = 0.1 * values(action, logits, UNEVEN, 0.9)
    np.testing.assert_allclose([ts.reward, ts.info["coplayer_reward"]], rewards, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ts.obs, sigmoid(np.concatenate([action, expected])), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(ts.next_obs, ts.obs)


def test_the_first_game_is_before_the_first_lesson():
    """How fast the co-player learns changes the second reward, not the first one."""
    action, start = jnp.float32([1, -1, 0.5, 2, -2]), State(jnp.float32([0.3, -0.2, 1, -1, 0.5]), jnp.int32(0))
    rewards = []
    for rate in (0.5, 5.0):
        step = stepper(learning_rate=rate)
        state, first = step(jax.random.key(0), start, action)
        _, second = step(jax.random.key(0), state, action)
        rewards.append((first.reward, first.info["coplayer_reward"], second.reward))
    assert rewards[0][:2] == rewards[1][:2] and abs(rewards[0][2] - rewards[1][2]) > 0.01
    np.testing.assert_allclose(rewards[0][:2], 0.04 * values(action, start.logits, Env.payoff, 0.96), rtol=1e-4)


@pytest.mark.parametrize("policy", [C, D, TFT, np.array([1, 2, -3, 0.5, -1])])
def test_whole_trials_against_a_simulation(policy):
    env = Env(max_steps=8)
    state, _ = jax.jit(env.reset)(jax.random.key(3))
    logits, step = np.float64(state.logits), stepper(max_steps=8)
    for t in range(8):
        state, ts = step(jax.random.key(t), state, jnp.float32(policy))
        own, other = 0.04 * values(policy, logits, Env.payoff, 0.96)
        logits = learned(policy, logits, Env.payoff, 0.96, 1.0)
        np.testing.assert_allclose([ts.reward, ts.info["coplayer_reward"]], [own, other], rtol=2e-3, atol=1e-3)
        np.testing.assert_allclose(ts.obs[5:], sigmoid(logits), atol=2e-3)
        assert not ts.terminated and ts.truncated == (t == 7)


@pytest.mark.parametrize("policy, own, other", [(C, -3, 0), (D, -2, -2), (TFT, -1, -1)])
def test_what_a_learner_answers_to_fixed_policies(policy, own, other):
    """It exploits who cooperates, defects with who defects, and cooperates with tit-for-tat."""
    env = Env()

    @jax.jit
    def trial(key):
        def step(state, key):
            state, ts = env.step(key, state, jnp.float32(policy))
            return state, jnp.stack([ts.reward, ts.info["coplayer_reward"]])

        return jax.lax.scan(step, env.reset(key)[0], jax.random.split(jax.random.key(1), 100))[1]

    with jax.debug_key_reuse(False):
        np.testing.assert_allclose(trial(jax.random.key(2))[-1], [own, other], atol=0.05)


def test_each_trial_has_a_co_player_of_its_own():
    env = make_env("learning_coplayer", 500, max_steps=2, init_std=2.0)
    state, obs = env.reset(jax.random.key(0))
    starts = [state.env.logits]
    np.testing.assert_allclose(obs, sigmoid(np.concatenate([np.zeros((500, 5)), state.env.logits], axis=1)), rtol=1e-5)
    step = jax.jit(env.step)
    for key in jax.random.split(jax.random.key(1), 4):
        state, ts = step(key, state, jnp.zeros((500, 5)))
        if ts.truncated.all():
            starts.append(state.env.logits)
            np.testing.assert_allclose(ts.obs[:, 5:], sigmoid(np.float64(state.env.logits)), rtol=1e-5)
            assert (np.abs(ts.next_obs - ts.obs).max(axis=1) > 1e-3).all() and (state.env.t == 0).all()
    starts = np.array(starts)  # (3, 500, 5)
    assert starts.shape == (3, 500, 5) and len(np.unique(starts)) > 0.99 * starts.size
    assert (abs(starts.std(axis=(1, 2)) - 2) < 0.15).all() and (abs(starts.mean(axis=(1, 2))) < 0.15).all()
    assert abs(np.corrcoef(starts[0].ravel(), starts[1].ravel())[0, 1]) < 0.1


def test_more_games_than_a_byte_counts():
    env = make_env("learning_coplayer", 2, max_steps=300)
    _, length, _ = jax.jit(lambda key: evaluate(
        lambda carry, obs, key: (carry, jnp.zeros((2, 5))), env, key))(jax.random.key(0))
    np.testing.assert_array_equal(length, 300)


def test_settings_that_cannot_be_are_named():
    for settings in (dict(discount=1.0), dict(learning_rate=0.0), dict(learning_rate=-1.0), dict(init_std=0.0),
                     dict(max_steps=0), dict(max_steps=2.5), dict(payoff=((0, 0),) * 3)):
        with pytest.raises(UserError, match=f"{[*settings][0]} = "):
            make_env("learning_coplayer", 1, **settings)
