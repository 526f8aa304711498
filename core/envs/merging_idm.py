"""Merging onto a lane before a car that yields by the intelligent driver model, four numbers of which are hidden.

    x = (p_x, p_y, v_x, v_y; q, w): the agent's car, steered by its acceleration, and the other's place and speed.
    Both are double integrators with exact ½ a·dt², and neither drives backwards.

    α   = σ(−k (|p_y − y*| − d)) · σ(p_x − q)          how much the other takes the agent for its leader
    s   = softplus(α (p_x − q − 5) + (1 − α) 1000 − 0.1) + 0.1              gap
    s*  = 2 + w T + w α (w − v_x) / (2 √(2 b))                              desired gap
    w'' = 2 (1 − (w / 10)⁴ − (s* / s)²)

    cost = p_y² + 10 (v_x − 10)² + 0.1 v_y² + 0.01 |u|² + 5e6 · (collision + off the road + merged behind)
    terminal 1e4 p_y² + 5e6 · (the same)

Hidden are time headway T, comfortable braking b, lateral alertness k and reach d, all positive, so Params holds their
logarithms and a belief cannot leave the meaningful. There is one d, 1.75, for the world and for `parameter_error`
(Σ |Δ|). System, guess and cost follow Palafox et al. (2026, arXiv:2601.21988).
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs import hidden
from core.envs.interface import Box
from core.render import BLACK, BLUE, GREY, REDS, Circle, Line, Scene


class Params(NamedTuple):
    log_headway: jax.Array  # T
    log_braking: jax.Array  # b
    log_alertness: jax.Array  # k
    log_reach: jax.Array  # d


@dataclasses.dataclass(frozen=True)
class Env:
    headway: float = 2.0
    braking: float = 3.0
    alertness: float = 3.0
    reach: float = 1.75
    desired_speed: float = 10.0  # of both
    max_accel: float = 2.0  # of both
    min_gap: float = 2.0
    car_length: float = 5.0
    lane: float = 0.0  # y*
    violation_weight: float = 5e6
    terminal_weight: float = 1e4
    dt: float = 0.1
    max_steps: int = 300
    spread: float = 1.0
    jump_step: int = 0
    jump_by: tuple[tuple[str, float], ...] = ()
    drift: float = 0.0
    process_noise: float = 0.0
    observation_noise: float = 0.0
    reveal: bool = False

    __post_init__, reset, step, unknown = hidden.check, hidden.reset, hidden.step, hidden.unknown
    informative = (5,)
    shown = {"log headway, log braking": (0, 1), "log alertness, log reach": (2, 3)}

    @property
    def action_space(self):
        return Box((-self.max_accel,) * 2, (self.max_accel,) * 2)

    @property
    def truth(self) -> Params:
        values = (self.headway, self.braking, self.alertness, self.reach)
        return Params(*(jnp.float32(np.log(value)) for value in values))

    @property
    def guess(self) -> Params:
        return Params(*(jnp.float32(np.log(value)) for value in (0.5, 1.0, 5.0, 0.5)))

    def start(self, key: jax.Array) -> jax.Array:
        return jnp.float32([8.0, -3.5, 12.0, 0.0, 15.0, 10.0])

    def dynamics(self, params: Params, x: jax.Array, action: jax.Array) -> jax.Array:
        """[6], [2] -> [6]."""
        (px, py, vx, vy, car, speed), (ax, ay) = x, action
        dt, half = self.dt, 0.5 * self.dt**2
        accel = self.yielding(params, px - car, py, vx, speed)
        return jnp.stack([
            px + vx * dt + half * ax, py + vy * dt + half * ay, jnp.maximum(vx + ax * dt, 0.0), vy + ay * dt,
            car + speed * dt + half * accel, jnp.maximum(speed + accel * dt, 0.0)])

    def yielding(self, params: Params, ahead: jax.Array, py: jax.Array, vx: jax.Array, speed: jax.Array) -> jax.Array:
        """Acceleration of the other car; `ahead` is how far the agent's is before it."""
        headway, braking, alertness, reach = (jnp.exp(value) for value in params)
        heed = jax.nn.sigmoid(alertness * (reach - jnp.abs(py - self.lane))) * jax.nn.sigmoid(ahead)
        gap = heed * (ahead - self.car_length) + (1 - heed) * 1000.0
        gap = jax.nn.softplus(gap - 0.1) + 0.1
        closing = speed * heed * (speed - vx) / (2 * jnp.sqrt(self.max_accel * braking))
        desired = self.min_gap + speed * headway + closing
        return self.max_accel * (1 - (speed / self.desired_speed) ** 4 - (desired / gap) ** 2)

    def parameter_error(self, params: Params, truth: Params) -> jax.Array:
        return sum(jnp.abs(jnp.exp(a) - jnp.exp(b)) for a, b in zip(params, truth, strict=True))

    def cost(self, x: jax.Array, action: jax.Array, next_x: jax.Array) -> jax.Array:
        tracking = (x[1] - self.lane) ** 2 + 10 * (x[2] - self.desired_speed) ** 2 + 0.1 * x[3] ** 2
        return tracking + 0.01 * (action[0] ** 2 + action[1] ** 2) + self.violation_weight * self.violations(x)

    def terminal_cost(self, x: jax.Array) -> jax.Array:
        return self.terminal_weight * (x[1] - self.lane) ** 2 + self.violation_weight * self.violations(x)

    def violations(self, x: jax.Array) -> jax.Array:
        """How many of: collision, off the road, on the lane but behind the other car."""
        ahead, aside = x[0] - x[4], jnp.abs(x[1] - self.lane)
        collision = (jnp.abs(ahead) < self.car_length) & (aside < 2.0)
        off_road = (x[1] < -7.0) | (x[1] > 3.5)
        behind = (aside < 1.0) & (ahead < 0.0)
        return collision.astype(jnp.float32) + off_road + behind

    def draw(self, state):
        """Seen from the other car, which rests at the origin."""
        me, half = np.array([state.x[0] - state.x[4], state.x[1]]), self.car_length / 2
        low, high = np.minimum((-30, -12), me - 5), np.maximum((30, 12), me + 5)
        corners = np.array([(-half, -1), (half, -1), (half, 1), (-half, 1), (-half, -1)])
        edges = [Line([(low[0], y), (high[0], y)], BLACK) for y in (-7.0, 3.5)]
        lane = Line([(low[0], self.lane), (high[0], self.lane)], GREY, 1)
        return Scene(low, high, [*edges, lane, Line(corners + (0, self.lane), REDS[0]), Line(corners + me, BLUE),
                                 Circle(me, 0.4, BLUE, label="agent"),
                                 Circle((0, self.lane), 0.4, REDS[0], label="other")])

    def place(self, x):
        return jnp.stack([x[0] - x[4], x[1]])
