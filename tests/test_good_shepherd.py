"""The evolution strategy against its expectation and by hand, whole trials, and the extortion of a learner."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import good_shepherd
from core.envs import Batch, Box, TimeStep, make_env
from core.errors import UserError
from core.evaluation import evaluate

FILE = "algorithms/good_shepherd.py"
PAIRS, RANKS, EXPECTED, ADAM, COMMON, WHOLE, GENERATION, ACTS, MISTAKES = (
    "test_noise_comes_in_pairs", "test_ranks_by_hand", "test_the_slope_is_what_theory_expects",
    "test_two_steps_by_hand", "test_luck_is_common", "test_a_trial_is_one_episode", "test_a_generation_by_its_parts",
    "test_the_mean_is_what_acts", "test_mistakes_are_named")
PLANTED_ERRORS = {  # and the test that has to notice
    "noise without pairs": (FILE, "jnp.concatenate([noise, -noise])", "jnp.concatenate([noise, noise])", PAIRS),
    "noise shared between members": (FILE, "jax.random.normal(key, (self.config.population // 2, self.mean.size))",
        "jax.random.normal(key, (1, self.mean.size)).repeat(self.config.population // 2, 0)", PAIRS),
    "noise shared between parameters": (FILE, "self.config.population // 2, self.mean.size))",
        "self.config.population // 2, 1)).repeat(self.mean.size, 1)", PAIRS),
    "the population twice": (FILE, "self.config.population // 2, self", "self.config.population, self", PAIRS),
    "fitness of the wrong sign": (FILE, "(rankdata(fitness) - 1)", "(rankdata(-fitness) - 1)", RANKS),
    "returns for ranks": (FILE, "(rankdata(fitness) - 1)", "(fitness - 1)", RANKS),
    "ranks from 1 on": (FILE, "(rankdata(fitness) - 1)", "rankdata(fitness)", RANKS),
    "ranks over one too many": (FILE, "/ (fitness.size - 1) - 0.5", "/ fitness.size - 0.5", RANKS),
    "ranks around a half": (FILE, "(fitness.size - 1) - 0.5", "(fitness.size - 1)", RANKS),
    "equal returns by their number": (FILE, "rankdata(fitness)", 'rankdata(fitness, method="ordinal")', RANKS),
    "downhill": (FILE, ".update(-slope,", ".update(slope,", EXPECTED),
    "the slope forgets σ": (FILE, " / (self.config.population * self.config.noise_std)", " / self.config.population",
                            EXPECTED),
    "the slope is a sum": (FILE, "(self.config.population * self.config.noise_std)", "self.config.noise_std", EXPECTED),
    "the best member for the mean": (FILE, "mean=self.mean + step",
        "mean=self.mean + self.config.noise_std * noise[fitness.argmax()]", ADAM),
    "Adam forgets": (FILE, "opt_state=opt_state), dict", "opt_state=self.opt_state), dict", ADAM),
    "a learning rate of its own": (FILE, "optax.adam(self.config.lr)", "optax.adam(0.01)", ADAM),
    "each member has trials of its own": (FILE, "in_axes=(0, None, None))(members, trial_key, source)",
        "in_axes=(0, 0, None))(members, jax.random.split(trial_key, config.population), source)", COMMON),
    "the same trials in every generation": (FILE, "(members, trial_key, source)",
                                            "(members, jax.random.key(0), source)", GENERATION),
    "ranks from one environment": (FILE, "reward.sum(axis=1).mean(axis=1)", "reward.sum(axis=1)[:, 0]", GENERATION),
    "ranks from the last step": (FILE, "reward.sum(axis=1).mean(axis=1)", "reward[:, -1].mean(axis=1)", GENERATION),
    "the best member is reported": (FILE, "population_return=fitness.mean()", "population_return=fitness.max()",
                                    GENERATION),
    "members without σ": (FILE, "config.noise_std * noise\n", "noise\n", GENERATION),
    "members around zero": (FILE, "run.agent.mean[None] + config", "0 * run.agent.mean[None] + config", GENERATION),
    "one step for each trial": (FILE, "tick(lives.sum(), 1)", "tick(lives.shape[0] * lives.shape[2], 1)", GENERATION),
    "steps of full trials": (FILE, "tick(lives.sum(), 1)", "tick(lives.size, 1)", GENERATION),
    "rewards after an end": (FILE, "(ts.reward * lives, lives)", "(ts.reward, lives)", WHOLE),
    "the last reward is lost": (FILE, "(ts.reward * lives, lives)",
                                "(ts.reward * (lives & ~ended(ts)), lives)", WHOLE),
    "an end is forgotten": (FILE, "(state, lives & ~ended(ts))", "(state, ~ended(ts))", WHOLE),
    "co-players alike": (FILE, "jax.random.split(reset_key, source.num_envs)",
                         "jnp.broadcast_to(reset_key, (source.num_envs,))", WHOLE),
    "another policy acts": (FILE, "jnp.broadcast_to(run.agent.mean,", "jnp.broadcast_to(2 * run.agent.mean,", ACTS),
    "an odd population": (FILE, "if config.population % 2:", "if False:", MISTAKES),
    "any environment will do": (FILE, 'actions=(Box,), offers=("reset",)', "actions=(Box,)", MISTAKES),
}
GOAL = np.float32([0.5, -1.5])


class Pasture(NamedTuple):
    """Reward luck − |a − GOAL|² for a number of steps, 4 at most, that is drawn like the luck. Steps after the
    end pay 100."""

    luck: float = 5.0
    pull: float = 1.0  # 0: the action does not matter
    ends: bool = True
    max_steps: int = 4
    action_space: Box = Box((-np.inf,) * 2, (np.inf,) * 2)

    def reset(self, key):
        luck_key, length_key = jax.random.split(key)
        length = jax.random.randint(length_key, (), 1, 5) if self.ends else jnp.int32(4)
        return (self.luck * jax.random.normal(luck_key), length, jnp.int32(0)), jnp.zeros(1)

    def step(self, key, state, action):
        luck, length, t = state
        reward = jnp.where(t < length, luck - self.pull * jnp.square(action - GOAL).sum(), 100.0)
        obs = jnp.zeros(1)
        return (luck, length, t + 1), TimeStep(obs, obs, reward, t + 1 == length, jnp.bool_(False), {})


def make_config(**changes):
    config = good_shepherd.get_config()
    config.update(changes)
    return ml_collections.FrozenConfigDict(config.to_dict())


def start(config, source, mean=None):
    run = good_shepherd.init(None, source, config)
    return run if mean is None else run._replace(agent=run.agent.replace(mean=jnp.float32(mean)))


@functools.partial(jax.jit, static_argnames=("source", "config", "generations"))
def evolve(key, run, source, config, generations):
    def generation(run, key):
        return good_shepherd.train_step(run, key, source, config)

    return jax.lax.scan(generation, run, jax.random.split(key, generations))


def test_noise_comes_in_pairs():
    config = make_config(population=4000)
    noise = np.asarray(start(config, make_env("learning_coplayer", 1)).agent.draw(jax.random.key(0)))
    assert noise.shape == (4000, 5) and len(np.unique(np.abs(noise))) > 0.99 * 10_000
    np.testing.assert_array_equal(noise[2000:], -noise[:2000])
    np.testing.assert_allclose(noise[:2000].T @ noise[:2000] / 2000, np.eye(5), atol=0.12)


def test_ranks_by_hand():
    np.testing.assert_allclose(good_shepherd.shape(jnp.float32([30, 1, 2, 2])), [0.5, -0.5, 0, 0])
    np.testing.assert_allclose(good_shepherd.shape(jnp.float32([-7, 5, 3, 3.1, -90])), [-0.25, 0.5, 0, 0.25, -0.5])
    np.testing.assert_array_equal(good_shepherd.shape(jnp.zeros(6)), 0)


def test_the_slope_is_what_theory_expects():
    """Of −|θ − c|²/2 with a small σ, where only the direction of c − θ matters to ranks. For z_i, the part of ε_i
    in that direction, E[sign(z_i − z_j) z_i] is 1/√π for a member of another pair and √(2/π) for the other one of its
    own pair."""
    P, std, goal, mean = 6, 1e-3, np.array([3.0, -1, 0.5, 2, -2]), np.array([1.0, 1, 1, 1, 1])
    source, config = make_env("learning_coplayer", 1), make_config(population=P, noise_std=std)
    agent = start(config, source, mean).agent

    @jax.jit
    @jax.vmap
    def one(key):
        noise = agent.draw(key)
        distance = (goal - mean).astype(np.float32)
        fitness = noise @ distance - std * jnp.square(noise).sum(axis=1) / 2  # less a constant, over σ
        moved, info = agent.update(noise, fitness)
        return -10 * moved.opt_state[0].mu, moved.mean - agent.mean, info["grad_norm"]  # Adam's first mean is g / 10

    slopes, step, norm = one(jax.random.split(jax.random.key(1), 4000))
    away = (goal - mean) / np.linalg.norm(goal - mean)
    size = ((P - 2) / np.sqrt(np.pi) + np.sqrt(2 / np.pi)) / (2 * (P - 1)) / std
    np.testing.assert_allclose(slopes.mean(axis=0), size * away, atol=4 * slopes.std() / 4000**0.5)
    np.testing.assert_allclose(norm, np.linalg.norm(slopes, axis=1), rtol=1e-4)
    np.testing.assert_array_equal(np.sign(step), np.sign(slopes))


def test_two_steps_by_hand():
    config = make_config(population=4, noise_std=0.2, lr=0.05)
    agent = start(config, make_env("learning_coplayer", 1)).agent
    rng, mean, m, v = np.random.default_rng(0), np.zeros(5), 0, 0
    for t in (1, 2):
        noise = rng.normal(size=(4, 5))
        agent, _ = agent.update(jnp.float32(noise), jnp.float32([3, -1, 8, 5]))
        slope = np.array([-1 / 6, -0.5, 0.5, 1 / 6]) @ noise / 0.8
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        mean = mean + 0.05 * (m / (1 - 0.9**t)) / np.sqrt(v / (1 - 0.999**t))
        np.testing.assert_allclose(agent.mean, mean, rtol=1e-4)


def test_luck_is_common():
    """Where actions do not matter all members earn the same, to the last bit, and the mean stays. One environment: in
    what order returns are added may differ from member to member."""
    source, config = Batch(Pasture(pull=0.0), 1), make_config(population=8)
    run, info = evolve(jax.random.key(0), start(config, source), source, config, 3)
    np.testing.assert_array_equal(run.agent.mean, 0)
    np.testing.assert_array_equal(info["grad_norm"], 0)
    assert len(np.unique(info["population_return"])) == 3  # and drawn anew


def test_a_trial_is_one_episode():
    source, policy = Batch(Pasture(), 200), jnp.float32([1, 2])
    reward, lives = jax.jit(lambda key: good_shepherd.trials(policy, key, source))(jax.random.key(0))
    assert reward.shape == lives.shape == (4, 200)
    length = np.asarray(lives.sum(axis=0))
    assert set(length) == {1, 2, 3, 4}
    np.testing.assert_array_equal(lives, np.arange(4)[:, None] < length[None])
    assert (np.where(lives, 0, reward) == 0).all()
    luck = reward[0] + 0.25 + 3.5**2
    assert len(np.unique(luck)) == 200 and abs(luck.std() - 5) < 1
    np.testing.assert_allclose(reward.sum(axis=0), length * reward[0], rtol=1e-5)


def test_a_trial_earns_what_evaluation_says():
    """Against co-players that start alike."""
    source, policy = make_env("learning_coplayer", 2, init_std=1e-6, max_steps=9), jnp.float32([1, 2, -1, 0.5, -2])
    returns, length, _ = jax.jit(lambda key: evaluate(
        lambda carry, obs, key: (carry, jnp.broadcast_to(policy, (2, 5))), source, key))(jax.random.key(1))
    reward, lives = jax.jit(lambda key: good_shepherd.trials(policy, key, source))(jax.random.key(0))
    np.testing.assert_allclose(reward.sum(axis=0), returns, rtol=1e-4)
    np.testing.assert_array_equal(lives.sum(axis=0), length)


def test_a_generation_by_its_parts():
    source, config = Batch(Pasture(luck=0.5), 3), make_config(population=6, noise_std=0.4)
    run, steps = start(config, source, [2, -0.5]), 0
    for key in jax.random.split(jax.random.key(4)):
        with jax.debug_key_reuse(False):
            noise_key, trial_key = jax.random.split(key)
            noise = run.agent.draw(noise_key)
            played = [good_shepherd.trials(run.agent.mean + 0.4 * x, trial_key, source) for x in noise]
            fitness = jnp.stack([reward.sum(axis=0).mean() for reward, _ in played])
            expected, _ = run.agent.update(noise, fitness)
            run, info = jax.jit(lambda run, key: good_shepherd.train_step(run, key, source, config))(run, key)
        np.testing.assert_allclose(run.agent.opt_state[0].mu, expected.opt_state[0].mu, rtol=1e-4)
        np.testing.assert_allclose(run.agent.mean, expected.mean, atol=5e-3)  # powers of 0.999 less 1 are rounded
        np.testing.assert_allclose(info["population_return"], fitness.mean(), rtol=1e-5)
        steps += sum(int(lives.sum()) for _, lives in played)
    assert (run.clock.env_steps, run.clock.updates) == (steps, 2) and steps < 2 * 6 * 4 * 3


def test_the_mean_is_what_acts():
    run = start(make_config(), Batch(Pasture(), 1), [1, 2])
    carry, action = good_shepherd.act(run, (), jnp.zeros((7, 1)), None)
    np.testing.assert_array_equal(action, [[1, 2]] * 7)
    assert carry == ()


def test_a_known_optimum_is_found_behind_the_luck():
    """Members differ by 0.01 where luck differs by 5."""
    source, config = Batch(Pasture(ends=False), 2), make_config(population=16)
    run, _ = evolve(jax.random.key(0), start(config, source), source, config, 120)
    np.testing.assert_allclose(run.agent.mean, GOAL, atol=0.08)


def test_a_learner_is_extorted():
    """The agent earns more than those who cooperate, and its co-player less, even though it climbs its own value."""
    source, config = make_env("learning_coplayer", 4, max_steps=50), make_config(population=16, lr=0.2)
    run, _ = evolve(jax.random.key(0), start(config, source), source, config, 60)
    fresh = make_env("learning_coplayer", 64)
    returns, _, told = jax.jit(lambda run, key: evaluate(functools.partial(good_shepherd.act, run), fresh, key))(
        run, jax.random.key(1))
    assert -1 < returns.mean() / 100 < 0 and -2 < told["coplayer_reward"].mean() < -1.3


def test_a_seed_is_the_same_alone():
    source, config = make_env("learning_coplayer", 2, max_steps=4), make_config(population=4)
    keys = jax.random.split(jax.random.key(0), 3)
    with jax.debug_key_reuse(False):
        together = jax.jit(jax.vmap(lambda key: evolve(key, start(config, source), source, config, 3)[0]))(keys)
        alone, _ = evolve(keys[1], start(config, source), source, config, 3)
    np.testing.assert_allclose(together.agent.mean[1], alone.agent.mean, rtol=1e-3, atol=1e-4)
    assert len(np.unique(together.agent.mean)) == 15 and (together.clock.env_steps == 3 * 4 * 2 * 4).all()


def test_mistakes_are_named():
    source = make_env("learning_coplayer", 1)
    with pytest.raises(UserError, match="population = 7: has to be even"):
        good_shepherd.init(None, source, make_config(population=7))
    for name, words in (("gymnasium/Pendulum-v1", 'no "reset"'), ("fixed_coplayer", "discrete actions"),
                        ("infinite_matrix_game", "several agents")):
        with pytest.raises(UserError, match=words):
            good_shepherd.init(None, make_env(name, 1), make_config(env=name))
