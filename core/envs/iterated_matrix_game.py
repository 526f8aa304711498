"""A 2x2 game that two players repeat max_steps times, e.g. the prisoner's dilemma.

    r_i = payoff of player i after this round's outcome, CC, CD, DC or DD; the first letter is the first player's action

Actions: 0 cooperates (C), 1 defects (D). Each player observes the outcome of the last round as a one-hot vector: start,
CC, CD, DC, DD. It names its own action first: after CD the first player sees "CD" and the second one "DC". Nothing
terminates. The episode is truncated at max_steps, and the last round is paid like any other. A column beside the
return, `cooperates`, is the share of rounds in which each player cooperates.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs.interface import Discrete, TimeStep

OTHER_VIEW = np.int32([0, 1, 3, 2, 4])  # start, CC, CD, DC, DD as the other player counts them


class State(NamedTuple):
    outcome: jax.Array  # int32: 0 at the start, 1 to 4 after CC, CD, DC, DD
    t: jax.Array  # int32


@dataclasses.dataclass(frozen=True)
class Env:
    payoff: tuple = ((-1.0, -1.0), (-3.0, 0.0), (0.0, -3.0), (-2.0, -2.0))  # of both players, after CC, CD, DC, DD
    max_steps: int = 100

    num_agents, teams, action_space, reports = 2, (0, 1), Discrete(2), ("cooperates",)

    def reset(self, key):
        return State(jnp.int32(0), jnp.int32(0)), self.observe(jnp.int32(0))

    def step(self, key, state, action):
        outcome, t = 1 + 2 * action[0] + action[1], state.t + 1
        reward, obs = jnp.float32(self.payoff)[outcome - 1], self.observe(outcome)
        return State(outcome, t), TimeStep(obs, obs, reward, jnp.bool_(False), t >= self.max_steps,
                                           {"cooperates": 1.0 - action})

    def observe(self, outcome):
        """[2, 5] an outcome as each of the players names it."""
        return jax.nn.one_hot(jnp.stack([outcome, jnp.array(OTHER_VIEW)[outcome]]), 5)
