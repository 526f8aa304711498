"""Environments whose optimum is known, for the tests of every algorithm."""
from typing import NamedTuple

import jax
import jax.numpy as jnp

import core.envs
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
