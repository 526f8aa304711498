"""A drone with two rotors in a plane, in a wind that the agent does not know.

    x = (p_x, p_y, φ, v_x, v_y, φ'), two thrusts T in [0, 20], semi-implicit Euler of 0.02 s
    a = (T sin φ / m, T cos φ / m − g, (L / I) (T₂ − T₁))                    thrust, which is known
      + (w_x, w_y, (c / I) (w_y sin φ − w_x cos φ))                          wind, which is not

    cost = Σ k (x − x*)² + 0.01 |T|² + 1000 σ(−5 p_y),   terminal the first sum,   x* = (0, 10, 0, 0, 0, 0)

Hidden are the wind's acceleration (its logarithm and its direction) and the drag c that turns the drone. A learner may
believe in these, or in a network of its own for the second line: `integrate(x, thrust(x, u) + residual)` with any
residual [3], of `features` (v_x, v_y, φ). The drone starts at (0, 1), at rest; a learner's guess is half the wind.
System and cost follow Palafox et al. (2026, arXiv:2601.21988). Departure: the penalty of the ground is bounded. Theirs,
1e8 e^{−5 p_y}, is 6.7e5 at the start, where the rest of the cost is 81, and infinite for a drone that falls.
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
    log_wind: jax.Array
    direction: jax.Array  # 0 blows along +x
    log_drag: jax.Array  # c


@dataclasses.dataclass(frozen=True)
class Env:
    wind: float = 10.0
    direction: float = 0.0
    drag: float = 0.2
    mass: float = 1.0
    inertia: float = 0.1
    arm: float = 0.25
    gravity: float = 9.81
    max_thrust: float = 20.0
    goal: tuple[float, ...] = (0.0, 10.0, 0.0, 0.0, 0.0, 0.0)
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 0.5, 0.5, 1.0)
    ground_weight: float = 1e3
    dt: float = 0.02
    max_steps: int = 300
    spread: float = 1.0
    jump_step: int = 0
    jump_by: tuple[tuple[str, float], ...] = ()
    drift: float = 0.0
    process_noise: float = 0.0
    observation_noise: float = 0.0
    reveal: bool = False

    __post_init__, reset, step, unknown = hidden.check, hidden.reset, hidden.step, hidden.unknown
    informative = (3, 4, 5)
    shown = {"log wind, log drag": (0, 2)}

    @property
    def action_space(self):
        return Box((0.0, 0.0), (self.max_thrust,) * 2)

    @property
    def truth(self) -> Params:
        return Params(*(jnp.float32(value) for value in (np.log(self.wind), self.direction, np.log(self.drag))))

    @property
    def guess(self) -> Params:
        return self.truth._replace(log_wind=jnp.float32(np.log(self.wind / 2)))

    def start(self, key: jax.Array) -> jax.Array:
        return jnp.float32([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])

    def dynamics(self, params: Params, x: jax.Array, action: jax.Array) -> jax.Array:
        """[6], [2] -> [6]."""
        return self.integrate(x, self.thrust(x, action) + self.residual(params, x))

    def thrust(self, x: jax.Array, action: jax.Array) -> jax.Array:
        """Known acceleration: [6], [2] -> [3]."""
        total, difference = action[0] + action[1], action[1] - action[0]
        return jnp.stack([total * jnp.sin(x[2]) / self.mass, total * jnp.cos(x[2]) / self.mass - self.gravity,
                          self.arm / self.inertia * difference])

    def residual(self, params: Params, x: jax.Array) -> jax.Array:
        """Acceleration by the wind: [6] -> [3]."""
        wind, drag = jnp.exp(params.log_wind), jnp.exp(params.log_drag)
        wind_x, wind_y = wind * jnp.cos(params.direction), wind * jnp.sin(params.direction)
        spin = drag / self.inertia * (wind_y * jnp.sin(x[2]) - wind_x * jnp.cos(x[2]))
        return jnp.stack([wind_x, wind_y, spin])

    def integrate(self, x: jax.Array, acceleration: jax.Array) -> jax.Array:
        """[6], [3] -> [6]: the new velocity moves the position."""
        velocity = x[3:] + self.dt * acceleration
        return jnp.concatenate([x[:3] + self.dt * velocity, velocity])

    def features(self, x: jax.Array) -> jax.Array:
        """What a learnt residual may depend on: [..., 6] -> [..., 3]."""
        return x[..., jnp.array([3, 4, 2])]

    def cost(self, x: jax.Array, action: jax.Array, next_x: jax.Array) -> jax.Array:
        ground = self.ground_weight * jax.nn.sigmoid(-5 * x[1])
        return self.terminal_cost(x) + 0.01 * (action[0] ** 2 + action[1] ** 2) + ground

    def terminal_cost(self, x: jax.Array) -> jax.Array:
        return (jnp.float32(self.weights) * jnp.square(x - jnp.float32(self.goal))).sum()

    def draw(self, state):
        place, goal = state.x[:2], np.array(self.goal[:2])
        low, high = np.minimum((-5, -1), place - 1), np.maximum((5, 12), place + 1)
        arm = 3 * self.arm * np.array([np.cos(state.x[2]), -np.sin(state.x[2])])  # three times as long as it is
        return Scene(low, high, [
            Line([(low[0], 0), (high[0], 0)], BLACK), Circle(goal, 0.3, GREEN, filled=False),
            Line([place - arm, place + arm], BLACK, 3), Circle(place, 0.2, BLUE, label="drone")])

    def place(self, x):
        return x[:2]
