"""The cart-pole of PETS (Chua et al., 2018) as an exact ordinary differential equation, all its constants hidden.

    (M + m) x'' − m l cos θ θ'' + m l sin θ θ'² = g u − c x'
    −m l cos θ x'' + (I + m l²) θ'' + m G l sin θ = −b θ'                    θ = 0 hangs, the tip is at x − 2 l sin θ
    r = exp(−((x − 0.6 sin θ)² + (0.6 cos θ + 0.6)²) / 0.36) − 0.01 u²       of the next state

    M, m masses, l half the pole, I = 0.4179 m l² about its centre, G gravity, g force gain, c and b viscous damping.
    Two Runge-Kutta steps of 0.02 s; u in [−3, 3]; 200 steps; x, θ, x', θ' start from N(0, 0.1²).

The numbers are those of its capsules of density 1000 in MuJoCo. Departures: no end of the rail (MuJoCo's is soft and at
±2.5, where no good policy goes), and the pole's centre is not 0.5 mm off its axis. With the true model a planner scores
181 to 183. The observation is (x, θ, x', θ'), θ not wrapped; `features` is what PETS feeds its networks.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs import hidden
from core.envs.interface import Box
from core.render import BLACK, BLUE, GREEN, GREY, Circle, Line, Scene

GRAVITY = 9.81
INERTIA_RATIO = 0.417889  # I / (m l²) of a capsule of radius 0.049 and length 0.6


class Params(NamedTuple):
    log_cart_mass: jax.Array
    log_pole_mass: jax.Array
    log_half_length: jax.Array
    log_gain: jax.Array
    log_cart_damping: jax.Array
    log_pole_damping: jax.Array


@dataclasses.dataclass(frozen=True)
class Env:
    cart_mass: float = 10.471976
    pole_mass: float = 5.018585
    half_length: float = 0.3
    gain: float = 100.0
    cart_damping: float = 1.0
    pole_damping: float = 1.0
    length: float = 0.6  # in the reward, whatever the true pole
    dt: float = 0.02
    substeps: int = 2
    max_steps: int = 200
    spread: float = 1.0
    jump_step: int = 0
    jump_by: tuple[tuple[str, float], ...] = ()
    drift: float = 0.0
    process_noise: float = 0.0
    observation_noise: float = 0.0
    reveal: bool = False

    shown = {"log cart mass, log pole mass": (0, 1), "log gain, log half length": (3, 2)}
    __post_init__, reset, step, unknown = hidden.check, hidden.reset, hidden.step, hidden.unknown

    @property
    def action_space(self):
        return Box((-3.0,), (3.0,))

    @property
    def truth(self) -> Params:
        values = (self.cart_mass, self.pole_mass, self.half_length, self.gain, self.cart_damping, self.pole_damping)
        return Params(*(jnp.float32(np.log(value)) for value in values))

    guess = truth  # the nominal system is known; what differs from it is not

    def start(self, key: jax.Array) -> jax.Array:
        return 0.1 * jax.random.normal(key, (4,))

    def dynamics(self, params: Params, x: jax.Array, action: jax.Array) -> jax.Array:
        """[4], [1] -> [4]."""
        values = [jnp.exp(value) for value in params]
        state = tuple(x)  # scalars: with a population over them, each operation is one vector
        for _ in range(self.substeps):
            k1 = self.slope(values, state, action[0])
            k2 = self.slope(values, advance(state, k1, self.dt / 2), action[0])
            k3 = self.slope(values, advance(state, k2, self.dt / 2), action[0])
            k4 = self.slope(values, advance(state, k3, self.dt), action[0])
            slope = [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True)]
            state = advance(state, slope, self.dt)
        return jnp.stack(state)

    def slope(self, values, state, u):
        """(x', θ', x'', θ'') of scalars: the two equations solved for the accelerations."""
        cart, pole, half, gain, cart_damping, pole_damping = values
        _, angle, speed, spin = state
        sin, cos = jnp.sin(angle), jnp.cos(angle)
        moment = pole * half
        push = gain * u - cart_damping * speed - moment * sin * spin**2
        turn = -pole_damping * spin - moment * GRAVITY * sin
        total, inertia, coupling = cart + pole, (1 + INERTIA_RATIO) * moment * half, -moment * cos
        det = total * inertia - coupling**2
        return speed, spin, (inertia * push - coupling * turn) / det, (total * turn - coupling * push) / det

    def cost(self, x: jax.Array, action: jax.Array, next_x: jax.Array) -> jax.Array:
        position, angle, _, _ = next_x
        across = position - self.length * jnp.sin(angle)
        below = self.length * jnp.cos(angle) + self.length
        return 0.01 * action[0] ** 2 - jnp.exp(-(across**2 + below**2) / self.length**2)

    def terminal_cost(self, x: jax.Array) -> jax.Array:
        return jnp.zeros(())

    def features(self, x: jax.Array) -> jax.Array:
        """[..., 4] -> [..., 5]: sin θ, cos θ, x, x', θ'."""
        return jnp.concatenate([jnp.sin(x[..., 1:2]), jnp.cos(x[..., 1:2]), x[..., :1], x[..., 2:]], axis=-1)

    def draw(self, state):
        (position, angle, _, _), length = state.x, 2 * np.exp(state.params.log_half_length)  # of the pole as it is
        cart, tip = np.array([position, 0.0]), np.array([position - length * np.sin(angle), -length * np.cos(angle)])
        low, high = np.minimum((-1.2, -1.2), cart - 0.5), np.maximum((1.2, 1.2), cart + 0.5)
        body = np.array([(-0.15, -0.08), (0.15, -0.08), (0.15, 0.08), (-0.15, 0.08), (-0.15, -0.08)])
        return Scene(low, high, [
            Line([(low[0], 0), (high[0], 0)], GREY, 1), Circle((0, self.length), 0.1, GREEN, filled=False),
            Line(cart + body, BLACK), Line([cart, tip], BLACK, 3), Circle(tip, 0.05, BLUE, label="tip")])

    def place(self, x):
        """The tip of a pole of the nominal length."""
        length = 2 * self.half_length
        return jnp.stack([x[0] - length * jnp.sin(x[1]), -length * jnp.cos(x[1])])


def advance(state, slope, dt):
    return tuple(value + dt * rate for value, rate in zip(state, slope, strict=True))
