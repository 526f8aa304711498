"""Environments whose optimum is known, and other things that the tests of several algorithms need."""
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import core.envs
from core.dataset import Dataset
from core.envs import Batch, Box, Discrete, TimeStep

NO = jnp.array(False)


def time_step(obs, reward, terminated=NO, truncated=NO):
    return TimeStep(obs, obs, jnp.float32(reward), terminated, truncated, {})


class Target(NamedTuple):
    """One step, continuous: reward −(a − 0.5)². The best action is 0.5."""

    max_steps: int = 1
    action_space: Box = Box((-1.0,), (1.0,))

    def reset(self, key):
        return (), jnp.zeros(1)

    def step(self, key, state, action):
        return (), time_step(jnp.zeros(1), -jnp.square(action[0] - 0.5), terminated=~NO)


class Match(NamedTuple):
    """One step, discrete: obs is ±1 and the reward is 1 for naming its sign, 0 else. The value of both obs is 1."""

    max_steps: int = 1
    action_space: Discrete = Discrete(2)

    def reset(self, key):
        obs = jax.random.rademacher(key, (1,), jnp.float32)
        return obs, obs

    def step(self, key, state, action):
        return state, time_step(state, action == (state[0] > 0), terminated=~NO)


class Chain(NamedTuple):
    """Two steps, nothing to choose, reward 1 at the end: the values are γ and 1."""

    max_steps: int = 2
    action_space: Discrete = Discrete(2)

    def reset(self, key):
        return jnp.int32(0), jnp.zeros(1)

    def step(self, key, t, action):
        return t + 1, time_step(jnp.ones(1), t == 1, terminated=t == 1)


class Clock(NamedTuple):
    """Reward 1 for ever, cut by a time limit after three steps: obs is constant and its value is 1 / (1 − γ).

    The true successor at the limit carries a mark that no first observation has.
    """

    max_steps: int = 3
    action_space: Discrete = Discrete(2)

    def reset(self, key):
        return jnp.int32(0), jnp.zeros(1)

    def step(self, key, t, action):
        return t + 1, time_step(jnp.full(1, t + 1, jnp.float32), 1.0, truncated=t + 1 == 3)


class Walk(NamedTuple):
    """A random walk. Observation 0 counts the steps; an episode ends where the walk leaves (−2, 2), or after four
    steps by the time limit. The reward is the place."""

    max_steps: int = 4
    action_space: Discrete = Discrete(3)

    def reset(self, key):
        x = jax.random.uniform(key, (), minval=-0.5, maxval=0.5)
        return (x, jnp.int32(0)), jnp.stack([0.0, x])

    def step(self, key, state, action):
        x, t = state[0] + jax.random.normal(key) + action - 1, state[1] + 1
        obs, left = jnp.stack([jnp.float32(t), x]), jnp.abs(x) > 2
        return (x, t), TimeStep(obs, obs, x, left, (t >= self.max_steps) & ~left, {})


class Dilemma(NamedTuple):
    """One step, two opponents: the prisoner's dilemma. Action 1, to defect, dominates, and both then get −2."""

    max_steps: int = 1
    action_space: Discrete = Discrete(2)
    num_agents: int = 2
    teams: tuple = (0, 1)

    def reset(self, key):
        return (), jnp.zeros((2, 1))

    def step(self, key, state, action):
        payoff = jnp.float32([[-1.0, -3.0], [0.0, -2.0]])  # of the first index' player
        reward = jnp.stack([payoff[action[0], action[1]], payoff[action[1], action[0]]])
        return (), TimeStep(jnp.zeros((2, 1)), jnp.zeros((2, 1)), reward, ~NO, NO, {})


def batch(env, num_envs=8):
    return Batch(env, num_envs)


def make_env(name, num_envs, **kwargs):
    """`core.envs.make_env`, which knows these probes as probe/Target and so on, too."""
    if name.startswith("probe/"):
        return Batch(globals()[name.removeprefix("probe/")](**kwargs), num_envs)
    return core.envs.make_env(name, num_envs, **kwargs)


def shaken(params, seed=0):
    """All weights and biases differ."""
    noise = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.3 * noise.normal(size=x.shape).astype(np.float32), params)


DATA_ACTIONS = Box((-1.0, -3.0), (3.0, 5.0))


def a_dataset(n=8, seed=0, **changes):
    """Episodes of 3, 3 and 2 steps: one ends, one is cut by a time limit, one where the data stop."""
    rng = np.random.default_rng(seed)
    data = dict(obs=rng.normal(size=(n, 2)), next_obs=rng.normal(size=(n, 2)), reward=rng.normal(size=n),
                action=rng.uniform((-1, -3), (3, 5), (n, 2)))
    data = {name: np.float32(x) for name, x in data.items()}
    ends = dict(terminated=np.arange(n) == 2, truncated=np.arange(n) == 5)
    return Dataset.create(data | ends | changes, DATA_ACTIONS)


def learn(init, step, data, iterations):
    """-> run, the last info of an offline method's programs `init` and `train_step` on `data`."""
    init_key, *keys = jax.random.split(jax.random.key(0), 1 + iterations)
    run = init(init_key, data)
    for key in keys:
        run, info = step(run, key, data)
    return run, info


def compare_seeds(init, step, data, atol=1e-6):
    """That two seeds in one program learn what each of them learns alone."""
    keys = jax.random.split(jax.random.key(0), 4)
    runs = [init(key, data) for key in keys[:2]]
    with jax.debug_key_reuse(False):  # it misfires on a scan over keys under vmap
        together = jax.vmap(step, (0, 0, None))(jax.tree.map(lambda *x: jnp.stack(x), *runs), keys[2:], data)
    for i, run in enumerate(runs):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), step(run, keys[2 + i], data), atol=atol)


def float64(tree):
    return jax.tree.map(np.float64, tree)


def assert_close(a, b, rtol=1e-4, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), a, b)
