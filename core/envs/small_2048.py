"""2048 on a small board: tiles slide to one side, equal ones that meet become one of twice the number.

    actions 0 to 3: left, up, right, down;  reward = sum of the numbers on the tiles that the move has made

After a move that changed the board one empty cell gets a tile: a 2 with probability 0.9, else a 4. A move that changes
nothing is not allowed; if it is made, nothing happens. The game ends where no move is allowed. It starts with two
tiles. obs: for every cell, which of the numbers (none, 2, 4, 8, …) it has, as zeros and a one; then the 4 numbers that
say which moves are allowed (`masked`).

With side = 2 there are 662 boards. The best player has a mean return of 66.96 there, one who takes the largest reward
24.04, moves at random have 19.66 (by dynamic programming, in tests/test_small_2048.py).
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from core.envs.interface import Discrete, TimeStep
from core.errors import UserError


class State(NamedTuple):
    board: jax.Array  # [side, side] logarithms of the numbers to base 2; 0 is an empty cell
    t: jax.Array


@dataclasses.dataclass(frozen=True)
class Env:
    side: int = 3
    max_steps: int = 1000

    masked = True
    action_space = Discrete(4)

    def __post_init__(self):
        if self.side not in (2, 3, 4):
            raise UserError(f"side = {self.side} of small_2048: one of 2, 3, 4")

    @property
    def highest(self):
        """No tile can have a higher logarithm: each cell of a full board would hold one number less than the last."""
        return self.side**2 + 1

    def reset(self, key):
        board = jnp.zeros((self.side, self.side), jnp.int32)
        for spawn_key in jax.random.split(key):
            board = spawn(spawn_key, board)
        return State(board, jnp.int32(0)), self.observe(board)

    def step(self, key, state, action):
        boards, rewards = moves(state.board)
        board, reward = boards[action], rewards[action]
        board = jnp.where((board != state.board).any(), spawn(key, board), board)
        t, obs = state.t + 1, self.observe(board)
        over = obs[-4:].sum() == 0
        return State(board, t), TimeStep(obs, obs, reward, over, (t >= self.max_steps) & ~over, {})

    def observe(self, board):
        cells = jax.nn.one_hot(board.ravel(), self.highest + 1)
        return jnp.concatenate([cells.ravel(), allowed(board)])


def spawn(key, board):
    """One more tile in an empty cell, if there is one."""
    cell_key, number_key = jax.random.split(key)
    cell = jax.random.categorical(cell_key, jnp.where(board.ravel() == 0, 0.0, -jnp.inf))
    number = jnp.where(jax.random.uniform(number_key) < 0.9, 1, 2)
    full = (board > 0).all()
    return jnp.where(full, board, board.ravel().at[cell].set(number).reshape(board.shape))


def moves(board):
    """Board [4, side, side] and reward [4] after each move, before a tile appears."""
    after = [slide(jnp.rot90(board, k)) for k in range(4)]
    return jnp.stack([jnp.rot90(new, -k) for k, (new, _) in enumerate(after)]), jnp.stack([r for _, r in after])


def allowed(board):
    return (moves(board)[0] != board[None]).any(axis=(1, 2)).astype(jnp.float32)


def slide(board):
    """Board after a move to the left, and its reward. What has become one is not joined again."""
    board, reward = together(board), 0.0
    for i in range(board.shape[1] - 1):
        same = (board[:, i] == board[:, i + 1]) & (board[:, i] > 0)
        board = board.at[:, i].add(same).at[:, i + 1].multiply(~same)
        reward += jnp.where(same, 2.0 ** board[:, i], 0.0).sum()
    return together(board), reward


def together(board):
    """All tiles of each row to the left, in their order."""
    return jnp.take_along_axis(board, jnp.argsort(board == 0, axis=1, stable=True), axis=1)
