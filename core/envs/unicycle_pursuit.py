"""An evader that the agent steers, and a unicycle that chases it by predictive control of hidden eagerness w.

    x = (p_e, v_e; p_p, s, h): the evader is a double integrator, the pursuer a unicycle by explicit Euler,
    p' = p + s (cos h, sin h)·dt,   s' = s + a·dt,   h' = h + ω·dt

    a, ω = the first controls of min Σ_{k=1,2} w |p_k − (p_e + k·dt·v_e)|² + 0.2 Σ_{k=0,1} (a_k² + ω_k²) + 0.1 Σ_k s_k²

The first control moves the pursuer at k = 2, the second only changes s_2. So the best a_1 and ω_1 = 0 are known, the
best a_0 given ω_0 too, and with d = p_e + 2·dt·v_e − p_1, θ the angle from d to the heading h + ω·dt, what is left is

    f(ω) = 0.2 ω² − (P cos θ + S)² / W,    P = w·dt·|d|,  S = 0.2 s / dt²,  W = w·dt² + κ + 0.2 / dt²          chase

a line search in one angle. Its steps divide f' by a bound on f'', so each lowers f; the last one divides by f'' itself
and is the only one that is differentiated, which makes the derivative in w that of the optimum (implicit function).

    cost = −|p_e − p_p|² + 10 |u|² + |p_e|²,   terminal −|p_e − p_p|²

The evader starts at (−5, −5), the pursuer at (5, 5), both at rest. After Palafox et al. (2026, arXiv:2601.21988), where
the pursuer stops short after 50 gradient steps on the same problem.
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs import hidden
from core.envs.interface import Box
from core.render import BLUE, REDS, Circle, Line, Scene

EFFORT, SLOWNESS = 0.2, 0.1  # weights of the pursuer's controls and of its speed


class Params(NamedTuple):
    log_eagerness: jax.Array  # w


@dataclasses.dataclass(frozen=True)
class Env:
    eagerness: float = 2.0
    max_accel: float = 2.0
    control_weight: float = 10.0
    iterations: int = 12
    dt: float = 0.1
    max_steps: int = 100
    spread: float = 1.0
    jump_step: int = 0
    jump_by: tuple[tuple[str, float], ...] = ()
    drift: float = 0.0
    process_noise: float = 0.0
    observation_noise: float = 0.0
    reveal: bool = False

    __post_init__, reset, step, unknown = hidden.check, hidden.reset, hidden.step, hidden.unknown
    informative = (6, 7)

    @property
    def action_space(self):
        return Box((-self.max_accel,) * 2, (self.max_accel,) * 2)

    @property
    def truth(self) -> Params:
        return Params(jnp.float32(np.log(self.eagerness)))

    @property
    def guess(self) -> Params:
        return Params(jnp.float32(0.0))

    def start(self, key: jax.Array) -> jax.Array:
        return jnp.float32([-5.0, -5.0, 0.0, 0.0, 5.0, 5.0, 0.0, 0.0])

    def dynamics(self, params: Params, x: jax.Array, action: jax.Array) -> jax.Array:
        """[8], [2] -> [8]."""
        (ex, ey, evx, evy, px, py, speed, heading), (ux, uy) = x, action
        dt, half = self.dt, 0.5 * self.dt**2
        px, py = px + speed * jnp.cos(heading) * dt, py + speed * jnp.sin(heading) * dt
        accel, turn = self.chase(params, ex + 2 * dt * evx - px, ey + 2 * dt * evy - py, speed, heading)
        return jnp.stack([
            ex + evx * dt + half * ux, ey + evy * dt + half * uy, evx + ux * dt, evy + uy * dt,
            px, py, speed + accel * dt, heading + turn * dt])

    def chase(self, params: Params, dx: jax.Array, dy: jax.Array, speed: jax.Array,
              heading: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The pursuer's (a, ω), all scalars; (dx, dy) from its next position to where the evader will be at k = 2."""
        dt, eagerness = self.dt, jnp.exp(params.log_eagerness)
        p, s = eagerness * dt, EFFORT * speed / dt**2  # p without the |d| that along and across bring
        w = eagerness * dt**2 + SLOWNESS + SLOWNESS * EFFORT / (EFFORT + SLOWNESS * dt**2) + EFFORT / dt**2

        def angles(turn):  # |d| cos θ, |d| sin θ
            cos, sin = jnp.cos(heading + turn * dt), jnp.sin(heading + turn * dt)
            return dx * cos + dy * sin, dx * sin - dy * cos

        def slope(turn):  # f'
            along, across = angles(turn)
            return 2 * EFFORT * turn + 2 * dt * p * across * (p * along + s) / w

        distance = jnp.sqrt(dx**2 + dy**2)
        bound = 2 * EFFORT + 2 * dt**2 * p * distance * (p * distance + jnp.abs(s)) / w
        turn = jnp.zeros_like(speed)
        for _ in range(self.iterations):
            turn = turn - slope(turn) / bound
        turn = jax.lax.stop_gradient(turn)
        along, across = angles(turn)
        curvature = 2 * EFFORT + 2 * dt**2 * p * (p * (along**2 - across**2) + s * along) / w
        turn = turn - slope(turn) / jax.lax.stop_gradient(jnp.clip(curvature, 0.1 * bound, bound))
        return ((p * angles(turn)[0] + s) / w - speed) / dt, turn

    def parameter_error(self, params: Params, truth: Params) -> jax.Array:
        return jnp.abs(jnp.exp(params.log_eagerness) - jnp.exp(truth.log_eagerness))

    def cost(self, x: jax.Array, action: jax.Array, next_x: jax.Array) -> jax.Array:
        effort = self.control_weight * (action[0] ** 2 + action[1] ** 2)
        return self.terminal_cost(x) + effort + x[0] ** 2 + x[1] ** 2

    def terminal_cost(self, x: jax.Array) -> jax.Array:
        return -((x[0] - x[4]) ** 2) - (x[1] - x[5]) ** 2

    def draw(self, state):
        evader, pursuer, heading = state.x[:2], state.x[4:6], state.x[7]
        low, high = np.minimum(evader, pursuer) - 1, np.maximum(evader, pursuer) + 1
        nose = pursuer + 0.8 * np.array([np.cos(heading), np.sin(heading)])
        return Scene(np.minimum(-6, low), np.maximum(6, high), [
            Circle(evader, 0.25, BLUE, label="evader"), Line([pursuer, nose], REDS[0], 3),
            Circle(pursuer, 0.3, REDS[0], label="pursuer")])

    def place(self, x):
        return x[4:6]
