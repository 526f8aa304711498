"""A linear system of which nothing is known: x' = A x + B u, with all 24 numbers of A and B hidden.

    cost = |x − g|² + |u|²,   terminal |x − g|²,   g = (0, 5, 0, 0),   |u_i| <= 2,   x starts at 0 unless told

The state is two positions and two velocities that drag and turn each other; a learner starts from other matrices, of
an unstable system. `parameter_error` is |ΔA| + |ΔB| (Frobenius), 0.847 at first. System, guess and cost follow Palafox
et al. (2026, arXiv:2601.21988).
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs import hidden
from core.envs.interface import Box
from core.render import BLUE, GREEN, Circle, Scene

TRUE_A = ((1.0, 0.0, 0.1, 0.02), (0.0, 1.0, -0.015, 0.1), (0.0, 0.0, 0.92, 0.05), (0.0, 0.0, -0.04, 0.88))
TRUE_B = ((0.005, 0.001), (-0.0008, 0.005), (0.1, 0.02), (-0.015, 0.1))
GUESSED_A = ((1.0, 0.0, -0.2, 0.0), (0.0, 1.0, 0.0, -0.2), (0.0, 0.0, 1.1, 0.5), (0.0, 0.0, -0.5, 1.1))
GUESSED_B = ((0.005, 0.0), (0.0, 0.005), (0.1, 0.0), (0.0, 0.1))


class Params(NamedTuple):
    a: jax.Array  # [4, 4]
    b: jax.Array  # [4, 2]


@dataclasses.dataclass(frozen=True)
class Env:
    a: tuple[tuple[float, ...], ...] = TRUE_A
    b: tuple[tuple[float, ...], ...] = TRUE_B
    goal: tuple[float, ...] = (0.0, 5.0, 0.0, 0.0)
    start_width: float = 0.0  # how far from 0 each position may be at first
    max_control: float = 2.0
    control_weight: float = 1.0
    max_steps: int = 90
    spread: float = 1.0
    jump_step: int = 0
    jump_by: tuple[tuple[str, float], ...] = ()
    drift: float = 0.0
    process_noise: float = 0.0
    observation_noise: float = 0.0
    reveal: bool = False

    __post_init__, reset, step, unknown = hidden.check, hidden.reset, hidden.step, hidden.unknown
    informative = (0, 1, 2, 3)
    shown = {"a_13, a_24": (2, 7), "a_33, a_44": (10, 15), "b_31, b_42": (20, 23)}

    @property
    def action_space(self):
        return Box((-self.max_control,) * 2, (self.max_control,) * 2)

    @property
    def truth(self) -> Params:
        return Params(jnp.float32(self.a), jnp.float32(self.b))

    @property
    def guess(self) -> Params:
        return Params(jnp.float32(GUESSED_A), jnp.float32(GUESSED_B))

    def start(self, key: jax.Array) -> jax.Array:
        return jnp.append(self.start_width * jax.random.uniform(key, (2,), minval=-1.0), jnp.zeros(2))

    def dynamics(self, params: Params, x: jax.Array, action: jax.Array) -> jax.Array:
        """[4], [2] -> [4]."""
        return params.a @ x + params.b @ action

    def parameter_error(self, params: Params, truth: Params) -> jax.Array:
        return jnp.linalg.norm(params.a - truth.a) + jnp.linalg.norm(params.b - truth.b)

    def cost(self, x: jax.Array, action: jax.Array, next_x: jax.Array) -> jax.Array:
        return self.terminal_cost(x) + self.control_weight * jnp.square(action).sum()

    def terminal_cost(self, x: jax.Array) -> jax.Array:
        return jnp.square(x - jnp.float32(self.goal)).sum()

    def draw(self, state):
        place, goal = state.x[:2], np.array(self.goal[:2])
        low, high = np.minimum(0.0, goal), np.maximum(0.0, goal)
        return Scene(np.minimum(low - 3.0, place - 0.5), np.maximum(high + 3.0, place + 0.5), [
            Circle(goal, 0.3, GREEN, filled=False), Circle(goal, 0.1, GREEN), Circle(place, 0.2, BLUE, label="system")])

    def place(self, x):
        return x[:2]
