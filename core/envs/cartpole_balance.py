"""The cart-pole of Barto, Sutton and Anderson (1983) with a real-valued force: keep the pole up. All constants hidden.

    (M + m) x'' + m l cos θ θ'' − m l sin θ θ'² = f u
    cos θ x'' + (4/3) l θ'' − G sin θ = 0              θ = 0 is upright; no friction (Florian, 2007)
    r = 1 while |x| < 2.4 and |θ| < 12°, of the next state; else 0, and the episode ends

    M, m masses, l half the pole, f force, G gravity. Explicit Euler of 0.02 s; u in [−1, 1]; 200 steps; x, x', θ, θ'
    start from U(−0.05, 0.05).

It is `cartpole_continuous` of mbrl-lib, the task of its PETS example, where r is what the planner is given; its
environment pays 1 for the step of the fall too, so a fallen episode scores 1 less here, and a whole one 200 in both.
The observation is (x, x', θ, θ').
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs import hidden
from core.envs.interface import Box
from core.render import BLACK, BLUE, GREY, Circle, Line, Scene

GRAVITY = 9.8
MAX_POSITION, MAX_ANGLE = 2.4, np.pi / 15


class Params(NamedTuple):
    log_cart_mass: jax.Array
    log_pole_mass: jax.Array
    log_half_length: jax.Array
    log_force: jax.Array


@dataclasses.dataclass(frozen=True)
class Env:
    cart_mass: float = 1.0
    pole_mass: float = 0.1
    half_length: float = 0.5
    force: float = 10.0
    dt: float = 0.02
    max_steps: int = 200
    spread: float = 1.0
    jump_step: int = 0
    jump_by: tuple[tuple[str, float], ...] = ()
    drift: float = 0.0
    process_noise: float = 0.0
    observation_noise: float = 0.0
    reveal: bool = False

    shown = {"log cart mass, log force": (0, 3), "log pole mass, log half length": (1, 2)}
    __post_init__, reset, unknown = hidden.check, hidden.reset, hidden.unknown

    @property
    def action_space(self):
        return Box((-1.0,), (1.0,))

    @property
    def truth(self) -> Params:
        values = (self.cart_mass, self.pole_mass, self.half_length, self.force)
        return Params(*(jnp.float32(np.log(value)) for value in values))

    guess = truth  # the nominal system is known; what differs from it is not

    def start(self, key: jax.Array) -> jax.Array:
        return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)

    def step(self, key, state, action):
        state, step = hidden.step(self, key, state, action)
        fallen = ~standing(state.x)
        return state, step._replace(terminated=fallen, truncated=step.truncated & ~fallen)

    def dynamics(self, params: Params, x: jax.Array, action: jax.Array) -> jax.Array:
        """[4], [1] -> [4]."""
        cart, pole, half, force = (jnp.exp(value) for value in params)
        position, speed, angle, spin = x
        sin, cos, share = jnp.sin(angle), jnp.cos(angle), pole / (cart + pole)
        push = force * action[0] / (cart + pole) + share * half * spin**2 * sin  # x'' if the pole did not turn
        turn = (GRAVITY * sin - cos * push) / (half * (4 / 3 - share * cos**2))
        slope = jnp.stack([speed, push - share * half * cos * turn, spin, turn])
        return x + self.dt * slope

    def cost(self, x: jax.Array, action: jax.Array, next_x: jax.Array) -> jax.Array:
        return -standing(next_x).astype(jnp.float32)

    def terminal_cost(self, x: jax.Array) -> jax.Array:
        return jnp.zeros(())

    def draw(self, state):
        (position, _, angle, _), length = state.x, 2 * np.exp(state.params.log_half_length)  # of the pole as it is
        cart, tip = np.array([position, 0.0]), np.array([position + length * np.sin(angle), length * np.cos(angle)])
        body = np.array([(-0.2, -0.1), (0.2, -0.1), (0.2, 0.1), (-0.2, 0.1), (-0.2, -0.1)])
        ends = [Line([(x, -0.2), (x, 0.2)], GREY) for x in (-MAX_POSITION, MAX_POSITION)]
        return Scene((-2.8, -1.4), (2.8, 1.4), [
            *ends, Line([(-MAX_POSITION, 0), (MAX_POSITION, 0)], GREY, 1), Line(cart + body, BLACK),
            Line([cart, tip], BLACK, 3), Circle(tip, 0.06, BLUE, label="tip")])

    def place(self, x):
        """The tip of a pole of the nominal length."""
        length = 2 * self.half_length
        return jnp.stack([x[0] + length * jnp.sin(x[2]), length * jnp.cos(x[2])])


def standing(x: jax.Array) -> jax.Array:
    """[4] -> bool; what is not finite has fallen."""
    position, _, angle, _ = x
    return (jnp.abs(position) < MAX_POSITION) & (jnp.abs(angle) < MAX_ANGLE)
