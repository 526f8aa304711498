"""Learning with Opponent-Learning Awareness (Foerster et al., 2018, arXiv:1709.04326), with exact gradients.

Two players learn at once. Each one differentiates through the step that it supposes its opponent to take. For player i,
with the opponent j:

    naive       J_i = V_i(θ_i, θ_j)                                                              Agent.naive
    taylor      J_i = V_i(θ_i, θ_j) + (∂V_i/∂θ_j)ᵀ Δ_j,   Δ_j = η ∂V_j(θ_i, θ_j)/∂θ_j           Agent.taylor
    lookahead   J_i = V_i(θ_i, θ_j + Δ_j)                                                       Agent.lookahead
    θ_i <- θ_i + α ∂J_i/∂θ_i, both players at once                                              Agent.update

    V_i the discounted sum of player i's payoffs, not divided by a number of steps; θ_i the logits of its policy; α lr,
    η opponent_lr. The slope is taken by θ_i, also through Δ_j, which depends on θ_i; θ_j is a constant. In
    `taylor` the factor ∂V_i/∂θ_j is a constant, too, as in the paper's update

        θ_i <- θ_i + α ∂V_i/∂θ_i + α η (∂²V_j/∂θ_i∂θ_j) ∂V_i/∂θ_j

    where ∂²V/∂θ_i∂θ_j has a row for each entry of θ_i. The slope of `lookahead` also has the term (∂²V_i/∂θ_i∂θ_j) Δ_j
    and all higher orders in η.

form="taylor"     the paper's own form
form="lookahead"  the derivative of the whole, through θ_j + Δ_j: the form of LOLA-DiCE (arXiv:1802.05098), exact here
form="naive"      gradient ascent of both players: what opponent shaping is compared with

Ends: training plays no episode. In evaluation an episode is one step: its reward is (1 − γ) V_i, the value per step, in
closed form (core/envs/infinite_matrix_game.py).
Random: `init` draws the logits from key. Nothing else is drawn.
Departures: η = 3 is ours (the authors' script has 1). Of η = 1, 3 and 10 it gives the most seeds in which both players
cooperate, with `taylor`. α, γ, the number of updates and the normal start are those of the authors' code.
Kept: `Run`: the logits of both players, the clock. A checkpoint holds `Run`, the number of the iteration and the sums
since the last row of the log.
Decides: form; opponent_lr; lr.
Cost: an update takes two gradients, one for each player; in `taylor` and `lookahead` each goes through a gradient of V.
V solves four linear equations. All seeds are one program.
Expect: a value per step of −1.02 ± 0.09, mean and deviation of 1,000 seeds, after 200 updates with configs/lola_ipd.py;
in 97% of the seeds both players have more than −1.1. The look-ahead: −1.05 ± 0.16, 92%; naive: −1.98 ± 0.12, 1.5%. One
to two seconds for all seeds on 2 CPU cores, after 14 s of compilation.
"""
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import struct

from core.clock import Clock
from core.config import choice, count, positive
from core.envs import require

TIT_FOR_TAT = np.array([1, 1, -1, 1, -1])  # signs of logits: first round, after CC, CD, DC, DD; own action first


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="infinite_matrix_game",  # the prisoner's dilemma, γ = 0.96
        num_envs=count(1),  # copies of the game that the launcher makes; an update plays none
        updates=count(200),  # the budget of one seed
        eval_every=count(50),  # updates between evaluations
        eval_episodes=count(1),  # one is enough: its reward is exact
        form=choice("taylor", "lookahead", "naive"),
        lr=positive(1.0),  # α
        opponent_lr=positive(3.0),  # η, the step size that a player supposes its opponent to have
        init_std=positive(1.0),  # of the logits at the start
    ))


class Agent(struct.PyTreeNode):
    """Both players. `values` maps the logits of both (2, 5) to the discounted sums of both (2,)."""

    logits: jax.Array  # (2, 5)
    config: Any = struct.field(pytree_node=False)

    def naive(self, own, i, values):
        return values(self.logits.at[i].set(own))[i]

    def taylor(self, own, i, values):
        logits, j = self.logits.at[i].set(own), 1 - i
        slope = jax.jacrev(values)(logits)  # (2, 2, 5): of whose value, by whose logits
        step = self.config.opponent_lr * slope[j, j]
        return values(logits)[i] + (jax.lax.stop_gradient(slope[i, j]) * step).sum()

    def lookahead(self, own, i, values):
        logits, j = self.logits.at[i].set(own), 1 - i
        step = self.config.opponent_lr * jax.jacrev(values)(logits)[j, j]
        return values(logits.at[j].add(step))[i]

    def update(self, values):
        """One step of both players, each from the logits that the other one had before it."""
        objective = dict(naive=self.naive, taylor=self.taylor, lookahead=self.lookahead)[self.config.form]
        slope = jnp.stack([jax.grad(objective)(self.logits[i], i, values) for i in (0, 1)])
        return self.replace(logits=self.logits + self.config.lr * slope), dict(grad_norm=jnp.sqrt((slope**2).sum()))


class Run(NamedTuple):
    agent: Agent
    clock: Clock


def init(key, source, config):
    require(source, config, agents=True, offers=("values",))
    return Run(Agent(config.init_std * jax.random.normal(key, (2, 5)), config), Clock.start())


def train_step(run, key, source, config):
    """One update. The value is exact, so no step of the environment is taken."""
    agent, info = run.agent.update(source.env.values)
    return Run(agent, run.clock.tick(updates=1)), info


def act(run, carry, obs, key):
    """The logits of both players. Nothing is carried between steps."""
    return (), jnp.broadcast_to(run.agent.logits, (len(obs), *run.agent.logits.shape))


def measure(run, key, source, config):
    """The share of the two players whose likelier action is that of tit-for-tat, in the first round and after CC, CD,
    DC and DD."""
    return dict(tit_for_tat=(jnp.sign(run.agent.logits) == TIT_FOR_TAT[None]).all(axis=1).mean())
