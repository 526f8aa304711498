"""A 2x2 game that two players repeat for ever, each with a memory of one round: its value in closed form.

    p_i   = σ(θ_i)            player i cooperates with these probabilities: in the first round, and after CC, CD, DC, DD
    p_0   the probabilities of the first outcome, CC, CD, DC or DD; the first letter is the first player's action
    P     those of the next outcome, one row for each outcome before it
    m     = Σ_t γ^t (Pᵀ)^t p_0 = (I − γ Pᵀ)⁻¹ p_0,    V_i = m · R_i                                       Env.values
    r_i   = (1 − γ) V_i, the value per step

    σ the logistic function, γ discount, R_i the four payoffs of player i. m counts the rounds with each outcome, with
    weights γ^t.

Each player names its own action first: after CD the first player knows "CD" and the second one "DC". One step is one
episode: the action is θ (2, 5), for both players, and the game is played for ever. There is nothing to observe.
"""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from core.envs import iterated_matrix_game
from core.envs.interface import Box, TimeStep
from core.envs.iterated_matrix_game import OTHER_VIEW
from core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Env:
    payoff: tuple = iterated_matrix_game.Env.payoff  # of both players, after CC, CD, DC, DD
    discount: float = 0.96  # γ, below 1

    num_agents, teams, max_steps, action_space = 2, (0, 1), 1, Box((-np.inf,) * 5, (np.inf,) * 5)

    def __post_init__(self):
        if not self.discount < 1:
            raise UserError(f'discount = {self.discount} of environment "infinite_matrix_game": has to be below 1')

    def reset(self, key):
        return (), jnp.zeros((2, 1))

    def step(self, key, state, action):
        obs, reward = jnp.zeros((2, 1)), (1 - self.discount) * self.values(action)
        return state, TimeStep(obs, obs, reward, jnp.bool_(True), jnp.bool_(False), {})

    def values(self, logits):
        """The discounted sums [2] of both players' payoffs, as a function of their logits [2, 5]."""
        logits = jnp.stack([logits[0], logits[1, OTHER_VIEW]])  # CD and DC: in the first player's view
        cooperate, defect = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
        chance = jnp.stack([cooperate[0] * cooperate[1], cooperate[0] * defect[1],
                            defect[0] * cooperate[1], defect[0] * defect[1]])  # (4, 5) of an outcome, by that before it
        rounds = solve(jnp.eye(4) - self.discount * chance[:, 1:], chance[:, 0])
        return (rounds[:, None] * jnp.array(self.payoff, logits.dtype)).sum(axis=0)


def solve(A, b):
    """x [n] of A x = b. In each column of A the entry on the diagonal has to be larger than all others together."""
    return jax.lax.custom_linear_solve(  # so that a derivative is another solution, not a way back through this one
        lambda x: (A * x[None]).sum(axis=1), b, lambda _, b: eliminate(A, b), lambda _, b: eliminate(A.T, b))


def eliminate(A, b):
    """Without a choice of pivots. A solver of LAPACK would take the matrices of many seeds one by one."""
    table = jnp.concatenate([A, b[:, None]], axis=1)
    for k, unit in enumerate(jnp.eye(len(b))):
        table = table - jnp.outer(table[:, k] - unit, table[k] / table[k, k])
    return table[:, -1]
