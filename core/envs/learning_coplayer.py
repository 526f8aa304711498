"""The repeated 2x2 game against a co-player that learns. One step is one game, and the co-player learns after it.

    θ'  = action                        the agent's five logits for this game: first round, after CC, CD, DC, DD
    r   = (1 − γ) V_0(θ', θ)            the agent's reward, the exact value per round                      Env.step
    c   = (1 − γ) V_1(θ', θ)            the co-player's, info["coplayer_reward"]                           Env.step
    θ  <- θ + η ∂V_1(θ', θ)/∂θ          a naive learner: the agent's policy is a constant to it            Env.step

    θ the co-player's logits, drawn from N(0, init_std²) at the start of an episode; η learning_rate; V_0, V_1 the
    discounted sums of the payoffs of agent and co-player (infinite_matrix_game.py); γ discount

An episode is max_steps games against one co-player. It is truncated there; nothing terminates. The co-player of the
next episode starts afresh.

The agent observes ten probabilities to cooperate: its own of the last game, ½ before the first one, and those that the
co-player will play with next, after it has learned. Each player names its own action first, in both halves.
"""
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs import infinite_matrix_game
from core.envs.interface import Box, TimeStep


class State(NamedTuple):
    logits: jax.Array  # (5,) of the co-player
    t: jax.Array  # int32, games played


@dataclasses.dataclass(frozen=True)
class Env:
    payoff: tuple = infinite_matrix_game.Env.payoff  # of the agent and the co-player, after CC, CD, DC, DD
    discount: float = 0.96  # γ, below 1
    learning_rate: float = 1.0  # η
    init_std: float = 1.0
    max_steps: int = 100

    action_space, reports = Box((-np.inf,) * 5, (np.inf,) * 5), ("coplayer_reward",)

    def __post_init__(self):
        _ = self.game  # which checks discount

    @functools.cached_property
    def game(self):
        return infinite_matrix_game.Env(self.payoff, self.discount)

    def reset(self, key):
        state = State(self.init_std * jax.random.normal(key, (5,)), jnp.int32(0))
        return state, self.observe(jnp.zeros(5), state.logits)

    def step(self, key, state, action):
        def value(own):
            values = self.game.values(jnp.stack([action, own]))
            return values[1], values

        slope, values = jax.grad(value, has_aux=True)(state.logits)
        state = State(state.logits + self.learning_rate * slope, state.t + 1)
        reward, coplayer_reward = (1 - self.discount) * values
        obs = self.observe(action, state.logits)
        return state, TimeStep(obs, obs, reward, jnp.bool_(False), state.t >= self.max_steps,
                               {"coplayer_reward": coplayer_reward})

    def observe(self, own, other):
        return jax.nn.sigmoid(jnp.concatenate([own, other]))
