"""The coin game: a red and a blue player on a 3x3 torus with one red and one blue coin (after Lerer and Peysakhovich,
2017, arXiv:1707.01068; with two coins at a time, as in Pax).

    r_i = a_i · (i takes its own coin) + b_i · (i takes the other's coin) + c_i · (the other takes i's coin)

    where a bracket is 1 if that happens in the step, and else 0; payoff holds (a_i, b_i, c_i) of each player i

The payoff is (1, 1, −2) for both: a coin of any colour is worth 1, and its owner loses 2 where the other takes it. Both
players together earn c (2 q − 1) a step, for c coins taken of which a share q is taken by the owner. So players who do
not look at colours (q = ½) earn nothing.

Actions 0 to 4: up, down, right, left, stay. Both players move at once. Who leaves the board comes back on its other
side. A player takes a coin where it stands on it after the move; two may stand on one cell and take the same coin. A
coin that was taken comes back at once, on any of the nine cells alike. Players and coins start on any cells.

Player i observes (3, 3, 4): planes of itself, the other player, its own coin and the other's, along x and y, with
itself in the middle. So the game looks alike to both. Nothing terminates: the episode is truncated at max_steps, and
the last step is paid like any other. Columns beside the return: how many `own_coins` and `other_coins` each player
takes, a step.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs.interface import Discrete, TimeStep
from core.render import BLUE, GREY, RED, Circle, Line, Scene

SIDE = 3
MOVES = np.int32([[0, 1], [0, -1], [1, 0], [-1, 0], [0, 0]])
VIEWS = np.int32([[0, 1, 2, 3], [1, 0, 3, 2]])  # of both players and coins, as each player counts them


class State(NamedTuple):
    players: jax.Array  # [2, 2] int32 x, y; red, blue
    coins: jax.Array  # [2, 2] int32 x, y; red, blue
    t: jax.Array  # int32


@dataclasses.dataclass(frozen=True)
class Env:
    payoff: tuple = ((1.0, 1.0, -2.0), (1.0, 1.0, -2.0))  # of each player: its own coin, the other's, its own one lost
    max_steps: int = 16

    num_agents, teams, action_space, reports = 2, (0, 1), Discrete(5), ("own_coins", "other_coins")

    def reset(self, key):
        cells = jax.random.randint(key, (4, 2), 0, SIDE)
        return State(cells[:2], cells[2:], jnp.int32(0)), self.observe(cells[:2], cells[2:])

    def step(self, key, state, action):
        players = (state.players + jnp.array(MOVES)[action]) % SIDE
        takes = (players[:, None] == state.coins[None]).all(axis=2)  # [2, 2] player i, coin k
        own, other = jnp.diagonal(takes), jnp.diagonal(takes[:, ::-1])
        kinds = jnp.stack([own, other, other[::-1]], axis=1).astype(jnp.float32)
        reward = (jnp.float32(self.payoff) * kinds).sum(axis=1)
        fresh = jax.random.randint(key, (2, 2), 0, SIDE)
        coins = jnp.where(jnp.broadcast_to(takes.any(axis=0)[:, None], (2, 2)), fresh, state.coins)
        t, obs = state.t + 1, self.observe(players, coins)
        return State(players, coins, t), TimeStep(obs, obs, reward, jnp.bool_(False), t >= self.max_steps,
                                                  {"own_coins": kinds[:, 0], "other_coins": kinds[:, 1]})

    def observe(self, players, coins):
        cells = jnp.concatenate([players, coins])[VIEWS]  # [2, 4, 2] of each player: itself first
        seen = jax.nn.one_hot((cells - players[:, None] + SIDE // 2) % SIDE, SIDE)
        return jnp.einsum("ikx,iky->ixyk", seen[:, :, 0], seen[:, :, 1])

    def draw(self, state):
        edges = np.arange(SIDE + 1) - 0.5
        low, high = edges[[0, 0]], edges[[-1, -1]]
        lines = [Line(ends, GREY, 1) for x in edges for ends in (
            ((x, low[1]), (x, high[1])), ((low[0], x), (high[0], x)))]
        places = zip((RED, BLUE), ("red", "blue"), (-0.2, 0.2), state.players, state.coins, strict=True)
        shapes = []
        for colour, label, aside, player, coin in places:  # red left and blue right of the middle of their cells
            shapes.append(Circle(coin + (aside, -0.28), 0.09, colour, filled=False))
            shapes.append(Circle(player + (aside, 0.12), 0.17, colour, label=label))
        return Scene(low - 0.05, high + 0.05, lines + shapes)
