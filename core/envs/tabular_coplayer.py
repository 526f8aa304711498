"""The 2x2 game in rounds: many games against one co-player, which learns after each of them. One step is one round.

    σ(θ_s)   the probability that the co-player cooperates after s, which is start, CC, CD, DC or DD       Env.step
    e  <- γ e + ∂ log P(a) / ∂θ       a the co-player's action in this round; e = 0 at the start of a game  Env.step
    g  <- g + (c − b) e               c the co-player's reward of this round; g = 0 at the start of a game  Env.step
    θ  <- θ + η g,  b <- mean c       after the last round of a game; mean c that of the game               Env.step

    θ the co-player's logits, drawn from N(0, init_std²) at the start of an episode; η learning_rate; γ discount

So g is the REINFORCE estimate of one game (Williams, 1992, doi.org/10.1007/BF00992696): each action is credited with
the discounted rewards that follow it in this game. As usual, later actions have no factor γ^t. b starts with the mean
of the co-player's four payoffs, and later depends on earlier games only, so it does not change the mean of g.

An episode is one trial: `games` games of `rounds` rounds against one co-player. It is truncated after the last game;
nothing terminates. The next episode has a new co-player. The agent observes the last outcome of the running game, as
in iterated_matrix_game.py: start, CC, CD, DC or DD, its own action first. After the last round of a game it observes
start. Action 0 cooperates, 1 defects.
"""
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.envs import iterated_matrix_game
from core.envs.interface import Discrete, TimeStep


class State(NamedTuple):
    logits: jax.Array  # (5,) θ
    trace: jax.Array  # (5,) e
    slope: jax.Array  # (5,) g
    earned: jax.Array  # what the co-player has earned in this game
    baseline: jax.Array  # b
    game: iterated_matrix_game.State
    t: jax.Array  # int32, rounds played in all games


@dataclasses.dataclass(frozen=True)
class Env:
    payoff: tuple = iterated_matrix_game.Env.payoff  # of the agent and the co-player, after CC, CD, DC, DD
    discount: float = 0.96  # γ
    learning_rate: float = 0.1  # η
    init_std: float = 1.0
    rounds: int = 20
    games: int = 100

    action_space, reports = Discrete(2), ("coplayer_reward",)

    @functools.cached_property
    def game(self):
        return iterated_matrix_game.Env(self.payoff, self.rounds)

    @property
    def max_steps(self):
        return self.rounds * self.games

    def reset(self, key):
        game, obs = self.game.reset(None)
        nothing, baseline = jnp.zeros(5), jnp.float32(self.payoff)[:, 1].mean()
        logits = self.init_std * jax.random.normal(key, (5,))
        return State(logits, nothing, nothing, jnp.float32(0.0), baseline, game, jnp.int32(0)), obs[0]

    def step(self, key, state, action):
        seen = self.game.observe(state.game.outcome)[1]
        chance = jax.nn.sigmoid((seen * state.logits).sum())
        cooperates = jax.random.bernoulli(key, chance)
        game, step = self.game.step(None, state.game, jnp.stack([action, jnp.where(cooperates, 0, 1)]))
        reward, coplayer_reward = step.reward
        trace = self.discount * state.trace + seen * (cooperates - chance)
        slope = state.slope + (coplayer_reward - state.baseline) * trace
        earned, t = state.earned + coplayer_reward, state.t + 1
        going_on = state._replace(trace=trace, slope=slope, earned=earned, game=game, t=t)
        fresh, obs = self.game.reset(None)
        after = State(state.logits + self.learning_rate * slope, jnp.zeros(5), jnp.zeros(5), jnp.float32(0.0),
                      earned / self.rounds, fresh, t)
        state, obs = jax.tree.map(lambda new, old: jnp.where(step.truncated, new, old), (after, obs[0]),
                                  (going_on, step.obs[0]))
        return state, TimeStep(obs, obs, reward, jnp.bool_(False), t >= self.max_steps,
                               {"coplayer_reward": coplayer_reward})
