"""The iterated 2x2 game against a co-player that follows a fixed rule. One agent learns, and the co-player is a part of
its environment.

    coplayer           it cooperates
    tit_for_tat        in the first round; then where the agent cooperated in the last round
    grim               until one of the two defects; then never again
    always_cooperate   in every round
    always_defect      in no round
    random             in every round with probability 1/2

The game, its actions and its observations are those of iterated_matrix_game.py: 0 cooperates, 1 defects; the agent sees
start, CC, CD, DC or DD as a one-hot vector, its own action first. The reward is the agent's own payoff.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from core.envs import iterated_matrix_game
from core.envs.interface import Discrete
from core.errors import UserError

RULES = dict(  # probability to cooperate: in the first round, after CC, CD, DC, DD; the co-player's own action first
    tit_for_tat=(1.0, 1.0, 0.0, 1.0, 0.0), grim=(1.0, 1.0, 0.0, 0.0, 0.0), always_cooperate=(1.0,) * 5,
    always_defect=(0.0,) * 5, random=(0.5,) * 5)


@dataclasses.dataclass(frozen=True)
class Env:
    coplayer: str = "tit_for_tat"
    payoff: tuple = iterated_matrix_game.Env.payoff  # of the agent and the co-player, after CC, CD, DC, DD
    max_steps: int = 100

    action_space = Discrete(2)

    def __post_init__(self):
        if self.coplayer not in RULES:
            raise UserError(f'coplayer = "{self.coplayer}" is none of {", ".join(RULES)}')

    @functools.cached_property
    def game(self):
        return iterated_matrix_game.Env(self.payoff, self.max_steps)

    def reset(self, key):
        state, obs = self.game.reset(key)
        return state, obs[0]

    def step(self, key, state, action):
        chance = (self.game.observe(state.outcome)[1] * jnp.array(RULES[self.coplayer])).sum()
        answer = jnp.where(jax.random.bernoulli(key, chance), 0, 1)
        state, step = self.game.step(key, state, jnp.stack([action, answer]))
        return state, step._replace(obs=step.obs[0], next_obs=step.next_obs[0], reward=step.reward[0])
