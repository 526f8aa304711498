"""A pendulum too weak to be lifted at once, its damping b and inertia J hidden.

    φ'' = (τ − b φ' − m g l sin φ) / J,   explicit Euler of 0.05 s,   |τ| <= 5 < m g l,   φ = 0 hangs
    cost = (φ − π)² + 0.1 φ'² + 0.01 τ²,   terminal the same without τ

x = (φ, φ'), φ not wrapped: the goal is half a turn to the left. Starts at (0.1, 0). System, guess (b 0.2, J 0.5) and
cost follow Palafox et al. (2026, arXiv:2601.21988). `parameter_error` is |Δb| + |ΔJ|, 0.8 at first.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs import hidden
from core.envs.interface import Box
from core.render import BLACK, BLUE, GREEN, Circle, Line, Scene


class Params(NamedTuple):
    log_damping: jax.Array
    log_inertia: jax.Array


@dataclasses.dataclass(frozen=True)
class Env:
    damping: float = 0.5
    inertia: float = 1.0
    weight: float = 9.81  # m g l
    max_torque: float = 5.0
    dt: float = 0.05
    max_steps: int = 400
    spread: float = 1.0
    jump_step: int = 0
    jump_by: tuple[tuple[str, float], ...] = ()
    drift: float = 0.0
    process_noise: float = 0.0
    observation_noise: float = 0.0
    reveal: bool = False

    __post_init__, reset, step, unknown = hidden.check, hidden.reset, hidden.step, hidden.unknown
    informative = (1,)
    shown = {"log damping, log inertia": (0, 1)}

    @property
    def action_space(self):
        return Box((-self.max_torque,), (self.max_torque,))

    @property
    def truth(self) -> Params:
        return Params(jnp.float32(np.log(self.damping)), jnp.float32(np.log(self.inertia)))

    @property
    def guess(self) -> Params:
        return Params(jnp.float32(np.log(0.2)), jnp.float32(np.log(0.5)))

    def start(self, key: jax.Array) -> jax.Array:
        return jnp.float32([0.1, 0.0])

    def dynamics(self, params: Params, x: jax.Array, action: jax.Array) -> jax.Array:
        """[2], [1] -> [2]."""
        angle, spin = x
        torque = action[0] - jnp.exp(params.log_damping) * spin - self.weight * jnp.sin(angle)
        return jnp.stack([angle + self.dt * spin, spin + self.dt * torque * jnp.exp(-params.log_inertia)])

    def parameter_error(self, params: Params, truth: Params) -> jax.Array:
        return sum(jnp.abs(jnp.exp(a) - jnp.exp(b)) for a, b in zip(params, truth, strict=True))

    def cost(self, x: jax.Array, action: jax.Array, next_x: jax.Array) -> jax.Array:
        return self.terminal_cost(x) + 0.01 * action[0] ** 2

    def terminal_cost(self, x: jax.Array) -> jax.Array:
        return (x[0] - np.float32(np.pi)) ** 2 + 0.1 * x[1] ** 2

    def draw(self, state):
        bob = np.array([np.sin(state.x[0]), -np.cos(state.x[0])])
        return Scene((-1.3, -1.3), (1.3, 1.3), [
            Circle((0, 1), 0.12, GREEN, filled=False), Line([(0, 0), bob], BLACK, 3), Circle((0, 0), 0.04, BLACK),
            Circle(bob, 0.08, BLUE, label="pendulum")])

    def place(self, x):
        return jnp.stack([jnp.sin(x[0]), -jnp.cos(x[0])])
