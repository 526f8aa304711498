"""The co-player that learns from the rounds of a game, against the policy gradient of a game by hand, in float64."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.envs import make_env
from core.envs.tabular_coplayer import Env
from core.evaluation import evaluate

FILE = "core/envs/tabular_coplayer.py"
GAME, MANY, FAIR, CHANCE, TRIAL, LEARNS, SIZES, FRESH = (
    "test_a_game_is_learnt_by_its_policy_gradient", "test_whole_trials_against_a_simulation",
    "test_the_slope_is_that_of_the_expected_return", "test_the_co_player_cooperates_as_often_as_it_says",
    "test_a_trial_ends_at_its_limit", "test_it_learns_what_is_best_for_it",
    "test_more_rounds_than_a_byte_counts", "test_each_trial_has_a_co_player_of_its_own")
PLANTED_ERRORS = {  # and the test that has to notice
    "credit is not discounted": (FILE, "self.discount * state.trace", "state.trace", GAME),
    "only the last action has credit": (FILE, "self.discount * state.trace + seen", "seen", GAME),
    "no baseline": (FILE, "(coplayer_reward - state.baseline) * trace", "coplayer_reward * trace", GAME),
    "the agent's reward": (FILE, "reward, coplayer_reward = step.reward", "coplayer_reward, reward = step.reward",
                           GAME),
    "the slope of defection": (FILE, "(cooperates - chance)", "(chance - cooperates)", GAME),
    "credit before the round": (FILE, "(coplayer_reward - state.baseline) * trace",
                                "(coplayer_reward - state.baseline) * state.trace", GAME),
    "all states are credited": (FILE, "state.trace + seen * (cooperates", "state.trace + (cooperates", GAME),
    "learning rate forgotten": (FILE, "self.learning_rate * slope", "slope", GAME),
    "downhill": (FILE, "state.logits + self", "state.logits - self", GAME),
    "the last round is not learnt": (FILE, "self.learning_rate * slope", "self.learning_rate * state.slope", GAME),
    "credit passes to the next game": (FILE, "self.learning_rate * slope, jnp.zeros(5), jnp.zeros(5)",
                                       "self.learning_rate * slope, trace, jnp.zeros(5)", MANY),
    "the slope stays for the next game": (FILE, "slope, jnp.zeros(5), jnp.zeros(5)", "slope, jnp.zeros(5), slope",
                                          MANY),
    "the baseline is a sum": (FILE, "earned / self.rounds, fresh", "earned, fresh", MANY),
    "the baseline is that of the trial": (FILE, "jnp.zeros(5), jnp.float32(0.0),\n", "jnp.zeros(5), earned,\n", MANY),
    "the baseline stays": (FILE, "earned / self.rounds, fresh", "state.baseline, fresh", MANY),
    "the first baseline is the agent's": (FILE, "jnp.float32(self.payoff)[:, 1].mean()",
                                          "jnp.float32(self.payoff)[:, 0].mean()", GAME),
    "the game goes on": (FILE, "earned / self.rounds, fresh, t)", "earned / self.rounds, game, t)", MANY),
    "the agent sees the last game": (FILE, "(after, obs[0])", "(after, step.obs[0])", MANY),
    "the agent sees what the co-player sees": (FILE, "(going_on, step.obs[0])", "(going_on, step.obs[1])", MANY),
    "the co-player sees what the agent sees": (FILE, "self.game.observe(state.game.outcome)[1]",
                                               "self.game.observe(state.game.outcome)[0]", CHANCE),
    "it defects for cooperating": (FILE, "jnp.where(cooperates, 0, 1)", "jnp.where(cooperates, 1, 0)", CHANCE),
    "it is no random choice": (FILE, "jax.random.bernoulli(key, chance)", "chance > 0.5", CHANCE),
    "one round too many": (FILE, "t >= self.max_steps", "t > self.max_steps", TRIAL),
    "one game": (FILE, "return self.rounds * self.games", "return self.rounds", TRIAL),
    "the limit is an end": (FILE, "reward, jnp.bool_(False), t >= self.max_steps,",
                            "reward, t >= self.max_steps, jnp.bool_(False),", TRIAL),
    "a byte counts the rounds": (FILE, "baseline, game, jnp.int32(0))", "baseline, game, jnp.int8(0))", SIZES),
    "the same co-player in every trial": (FILE, "jax.random.normal(key, (5,))",
                                          "jax.random.normal(jax.random.key(0), (5,))", FRESH),
    "a start of its own size": (FILE, "self.init_std * jax", "jax", FRESH),
}
UNEVEN = ((0.5, -1), (-3, 2), (4, -0.25), (-2, 1.5))  # no player is like the other
SETTINGS = dict(payoff=UNEVEN, discount=0.7, learning_rate=0.3, init_std=1.5, rounds=4, games=3)
OTHER = [0, 1, 3, 2, 4]


@functools.cache
def programs(**settings):
    env = Env(**settings)
    return env, jax.jit(env.reset), jax.jit(env.step)


def played(key, agent, **settings):
    """A trial with the agent's actions (T,): [state after each step], [TimeStep], first state, first observation."""
    env, reset, step = programs(**settings)
    state, obs = reset(key)
    first, states, steps = state, [], []
    for t, action in enumerate(agent):
        state, ts = step(jax.random.fold_in(jax.random.key(7), t), state, jnp.int32(action))
        states.append(state)
        steps.append(ts)
    return first, np.asarray(obs), states, steps


def simulate(logits, agent, coplayer, payoff, discount, learning_rate, rounds, **_):
    """What the agent saw, both players' rewards and θ after each round, where the actions of both are given. The
    gradient of a game is summed over pairs of rounds: an action, and each reward from then on."""
    logits, baseline, seen, rewards, thetas = np.float64(logits), np.mean([p[1] for p in payoff]), [], [], []
    for start in range(0, len(agent), rounds):
        state, scores, earned = 0, [], []
        for a, b in zip(agent[start:start + rounds], coplayer[start:start + rounds], strict=True):
            seen.append(state)
            mine = OTHER[state]
            score = np.zeros(5)
            score[mine] = (1 - b) - 1 / (1 + np.exp(-logits[mine]))
            scores.append(score)
            earned.append(payoff[2 * a + b][1])
            rewards.append(payoff[2 * a + b])
            state = 1 + 2 * a + b
            thetas.append(logits.copy())
        gradient = sum(scores[t] * discount ** (k - t) * (earned[k] - baseline)
                       for k in range(rounds) for t in range(k + 1))
        logits, baseline = logits + learning_rate * gradient, np.mean(earned)
        thetas[-1] = logits.copy()
    return seen, rewards, thetas


def actions_of(states, steps, payoff):
    """The co-player's actions, read from the rewards, which are all different."""
    return [[p[0] for p in payoff].index(round(float(ts.reward), 3)) % 2 for ts in steps]


@pytest.mark.parametrize("seed", range(4))
def test_a_game_is_learnt_by_its_policy_gradient(seed):
    agent = np.random.default_rng(seed).integers(2, size=4)
    first, obs, states, steps = played(jax.random.key(seed), agent, **SETTINGS)
    coplayer = actions_of(states, steps, UNEVEN)
    _, rewards, thetas = simulate(first.logits, agent, coplayer, **SETTINGS)
    np.testing.assert_allclose([s.logits for s in states], thetas, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([[s.reward, s.info["coplayer_reward"]] for s in steps], rewards)
    np.testing.assert_array_equal(obs, np.eye(5)[0])


def test_whole_trials_against_a_simulation():
    agent = np.random.default_rng(5).integers(2, size=12)
    for seed in range(3):
        first, obs, states, steps = played(jax.random.key(seed), agent, **SETTINGS)
        coplayer = actions_of(states, steps, UNEVEN)
        seen, _, thetas = simulate(first.logits, agent, coplayer, **SETTINGS)
        np.testing.assert_allclose([s.logits for s in states], thetas, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal([obs, *(s.obs for s in steps[:-1])], np.eye(5)[seen])
        np.testing.assert_array_equal([s.obs for s in steps], [s.next_obs for s in steps])


def test_the_slope_is_that_of_the_expected_return():
    """With γ = 1, in a game of two rounds against an agent that defects and then copies: its mean is the gradient of
    the co-player's return, by central differences of a sum over all four pairs of its actions."""
    settings = SETTINGS | dict(rounds=2, games=1, discount=1.0, learning_rate=1.0, init_std=0.0)

    def expected(logits):
        p = 1 / (1 + np.exp(-logits))
        total = 0.0
        for b in (0, 1):
            state = OTHER[1 + 2 * 1 + b]
            for b2 in (0, 1):
                chance = (p[0] if b == 0 else 1 - p[0]) * (p[state] if b2 == 0 else 1 - p[state])
                total += chance * (UNEVEN[2 + b][1] + UNEVEN[2 * b + b2][1])
        return total

    slope = [(expected(1e-4 * e) - expected(-1e-4 * e)) / 2e-4 for e in np.eye(5)]
    env, reset, step = programs(**settings)

    @jax.jit
    @jax.vmap
    def one(key):
        state, _ = reset(jax.random.key(0))
        first, second = jax.random.split(key)
        state, ts = step(first, state, jnp.int32(1))
        state, _ = step(second, state, jnp.argmax(ts.obs[jnp.array([3, 4])]))
        return state.logits

    with jax.debug_key_reuse(False):
        moved = np.asarray(one(jax.random.split(jax.random.key(0), 20_000)))
    np.testing.assert_allclose(moved.mean(axis=0), slope, atol=4 * (moved.std(axis=0) / 20_000**0.5).max())


def test_the_co_player_cooperates_as_often_as_it_says():
    """After each outcome, in its own view, with the agent alternating."""
    logits = jnp.float32([1.0, -1.0, 0.5, 2.0, -2.0])
    env, reset, step = programs(**(SETTINGS | dict(rounds=100, games=1)))

    @jax.jit
    @jax.vmap
    def one(key):
        state, obs = reset(jax.random.key(0))
        state = state._replace(logits=logits)

        def round_of(carry, key):
            state, obs = carry
            agent_key, key = jax.random.split(key)
            state, ts = step(key, state, jax.random.randint(agent_key, (), 0, 2))
            return (state, ts.obs), (obs, jnp.isin(ts.reward, jnp.float32([0.5, 4.0])))

        return jax.lax.scan(round_of, (state, obs), jax.random.split(key, 99))[1]

    with jax.debug_key_reuse(False):
        seen, cooperated = one(jax.random.split(jax.random.key(1), 300))
    for state in range(5):
        there = np.asarray(seen[..., state] > 0)
        chance = 1 / (1 + np.exp(-float(logits[OTHER[state]])))
        assert abs(np.asarray(cooperated)[there].mean() - chance) < 4 * 0.5 / there.sum() ** 0.5


def test_a_trial_ends_at_its_limit():
    _, _, _, steps = played(jax.random.key(0), [0] * 12, **SETTINGS)
    assert [bool(s.truncated) for s in steps] == [False] * 11 + [True] and not any(s.terminated for s in steps)
    assert Env(**SETTINGS).max_steps == 12


def test_it_learns_what_is_best_for_it():
    """To defect where the agent always cooperates or always defects; to cooperate with tit-for-tat."""
    env = make_env("tabular_coplayer", 32)

    def earned(chances):
        def act(carry, obs, key):
            return carry, jnp.where(jax.random.bernoulli(key, obs @ jnp.float32(chances)), 0, 1)

        return float(evaluate(act, env, jax.random.key(1))[0].mean() / env.max_steps)

    assert earned([1] * 5) < -2.5 and abs(earned([0] * 5) + 1.8) < 0.15 and earned([1, 1, 0, 1, 0]) > -1.3


def test_more_rounds_than_a_byte_counts():
    env, reset, step = programs(**(SETTINGS | dict(rounds=60, games=5)))
    states = jax.jit(lambda key: jax.lax.scan(
        lambda state, key: (step(key, state, jnp.int32(0))[0], state.t), reset(jax.random.key(0))[0],
        jax.random.split(key, 299))[1])(jax.random.key(1))
    np.testing.assert_array_equal(states, np.arange(299))


def test_each_trial_has_a_co_player_of_its_own():
    _, reset, _ = programs(**SETTINGS)
    logits = np.asarray(jax.vmap(lambda key: reset(key)[0].logits)(jax.random.split(jax.random.key(0), 2000)))
    np.testing.assert_allclose(logits.std(axis=0), 1.5, atol=0.1)
    assert len(np.unique(logits)) > 9_990
    assert dataclasses.replace(Env(), rounds=7).game.max_steps == 7
