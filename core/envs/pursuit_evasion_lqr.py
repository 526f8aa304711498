"""An evader that the agent steers, and a pursuer that plays a linear-quadratic controller of hidden cost.

    x = (p_e, v_e, p_p, v_p), both double integrators:   p' = p + v·dt + ½ a·dt²,   v' = v + a·dt
    a_p = argmin_u |A x_p + B u − x_e|²_Q + |u|²_R = −G (A x_p − x_e),   G = (R + BᵀQB)⁻¹ BᵀQ          gain
    a_p = −G (x_p − x_e) of the regulator of infinite horizon for the same A, B, Q, R, if `infinite_horizon`
    cost = −|p_e − p_p|² + 10 |u|² + |p_e|²,   terminal −|p_e − p_p|²

Hidden are the logarithms of the diagonals of Q (4) and R (2). The pursuer's actions depend on them through G [2, 4]
alone: at most 4 of the 6 numbers (8 of the 20 of full Cholesky factors) can be found from its actions. So `gain_error`
is the measure, never a norm of the parameters. A belief may be about

    about="params"    θ = φ = Params                                                                        unknown
    about="gain"      θ = φ = G: x' is linear in G, so a Kalman filter is exact
    about="cost"      θ = log Q with R = 1, φ = G: only the ratio of Q to R can be found

and the dynamics take any gain: dynamics(params, x, u) = pursue(gain_of(params), x, u), pursue(gain(Q, R), x, u).

Positions start in U(−10, 10)², velocities at 0. Starts, horizon and prior follow Palafox et al. (2026,
arXiv:2601.21988).
"""
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.envs import hidden, particles, riccati
from core.envs.interface import Box
from core.render import BLUE, GREY, REDS, Circle, Scene


class Params(NamedTuple):
    log_q: jax.Array  # [4] position x, y, velocity x, y
    log_r: jax.Array  # [2]


@dataclasses.dataclass(frozen=True)
class Env:
    q: tuple[float, ...] = (10.0, 10.0, 1.0, 1.0)
    r: tuple[float, ...] = (0.1, 0.1)
    max_accel: float = 2.0  # of the evader; the pursuer has no limit
    half_width: float = 10.0
    control_weight: float = 10.0
    infinite_horizon: bool = False
    dt: float = 0.1
    max_steps: int = 250
    spread: float = 1.0
    jump_step: int = 0
    jump_by: tuple[tuple[str, float], ...] = ()
    drift: float = 0.0
    process_noise: float = 0.0
    observation_noise: float = 0.0
    reveal: bool = False

    __post_init__, reset, step = hidden.check, hidden.reset, hidden.step
    informative = (6, 7)  # v_p'; Params move p_p' too, by dt / 2 times as much, so it tells nothing new
    shown = {"log_q in x: position, velocity": (0, 2), "log_q in y: position, velocity": (1, 3)}

    @property
    def action_space(self):
        return Box((-self.max_accel,) * 2, (self.max_accel,) * 2)

    @property
    def truth(self) -> Params:
        return Params(jnp.float32(np.log(self.q)), jnp.float32(np.log(self.r)))

    @property
    def guess(self) -> Params:
        return Params(jnp.zeros(4), jnp.zeros(2))

    def start(self, key: jax.Array) -> jax.Array:
        evader, pursuer = jax.random.uniform(key, (2, 2), minval=-self.half_width, maxval=self.half_width)
        return jnp.concatenate([evader, jnp.zeros(2), pursuer, jnp.zeros(2)])

    def dynamics(self, params: Params, x: jax.Array, action: jax.Array) -> jax.Array:
        """[8], [2] -> [8]."""
        return self.pursue(self.gain_of(params), x, action)

    def unknown(self, about: str = "params") -> hidden.Unknown:
        system = hidden.unknown(self, about, ("params", "gain", "cost"))
        if about == "params":
            def error(phi, truth):
                return self.gain_error(self.gain_of(Params(phi[:4], phi[4:])), truth)

            return system._replace(error=error, error_name="gain_error")
        system = system._replace(
            guess=self.gain_of(self.guess), reduce=jnp.ravel, truth=lambda params: self.gain_of(params).ravel(),
            dynamics=lambda phi, x, action: self.pursue(phi.reshape(2, 4), x, action),
            error=lambda phi, params: self.gain_error(phi.reshape(2, 4), params), error_name="gain_error",
            shown={"gain in x: position, velocity": (0, 2), "gain in y: position, velocity": (5, 7)})
        if about == "gain":
            return system
        return system._replace(guess=self.guess.log_q,
                               reduce=lambda log_q: self.gain_of(Params(log_q, jnp.zeros(2))).ravel())

    def pursue(self, gain: jax.Array, x: jax.Array, action: jax.Array) -> jax.Array:
        """gain [2, 4], x [8], action [2] -> x [8]; in scalars, so that a population of x makes vectors of them."""
        (ex, ey, evx, evy, px, py, pvx, pvy), (ux, uy) = x, action
        dt, half, ahead = self.dt, 0.5 * self.dt**2, 0.0 if self.infinite_horizon else self.dt
        gap = (px + pvx * ahead - ex, py + pvy * ahead - ey, pvx - evx, pvy - evy)
        ax, ay = (-sum(g * e for g, e in zip(row, gap, strict=True)) for row in gain)
        return jnp.stack([
            ex + evx * dt + half * ux, ey + evy * dt + half * uy, evx + ux * dt, evy + uy * dt,
            px + pvx * dt + half * ax, py + pvy * dt + half * ay, pvx + ax * dt, pvy + ay * dt])

    def gain_of(self, params: Params) -> jax.Array:
        """[2, 4]. `gain` for diagonal Q and R, where the two axes are apart."""
        q, r = jnp.exp(params.log_q), jnp.exp(params.log_r)
        if self.infinite_horizon:
            Q, (A, B) = jax.vmap(jnp.diag)(q.reshape(2, 2).T), self.axis
            position, velocity = jax.vmap(riccati.gain, (None, None, 0, 0))(A, B, Q, r[:, None, None])[:, 0].T
            return jnp.concatenate([jnp.diag(position), jnp.diag(velocity)], axis=1)
        position, velocity = 0.5 * self.dt**2 * q[:2], self.dt * q[2:]  # BᵀQ
        scale = r + 0.5 * self.dt**2 * position + self.dt * velocity  # R + BᵀQB
        return jnp.concatenate([jnp.diag(position / scale), jnp.diag(velocity / scale)], axis=1)

    @property
    def axis(self) -> tuple[np.ndarray, np.ndarray]:
        """A [2, 2] and B [2, 1] of position and velocity along one axis."""
        return np.float32([[1, self.dt], [0, 1]]), np.float32([[0.5 * self.dt**2], [self.dt]])

    def gain(self, q: jax.Array, r: jax.Array) -> jax.Array:
        """G for any Q [4, 4] and R [2, 2] -> [2, 4]."""
        A, b = (np.kron(matrix, np.eye(2, dtype=np.float32)) for matrix in self.axis)
        if self.infinite_horizon:
            return riccati.gain(A, b, q, r)
        ((a, b12), (b21, d)), btq = r + b.T @ q @ b, b.T @ q
        return jnp.array([[d, -b12], [-b21, a]]) @ btq / (a * d - b12 * b21)

    def gain_error(self, gain: jax.Array, params: Params) -> jax.Array:
        """|G − G*| / |G*| in the Frobenius norm: a belief's gain [2, 4] against the truth."""
        true_gain = self.gain_of(params)
        return jnp.linalg.norm(gain - true_gain) / jnp.linalg.norm(true_gain)

    def cost(self, x: jax.Array, action: jax.Array, next_x: jax.Array) -> jax.Array:
        effort = self.control_weight * (action[0] ** 2 + action[1] ** 2)
        return self.terminal_cost(x) + effort + x[0] ** 2 + x[1] ** 2

    def terminal_cost(self, x: jax.Array) -> jax.Array:
        return -((x[0] - x[4]) ** 2) - (x[1] - x[5]) ** 2

    def draw(self, state):
        evader, pursuer, w = state.x[:2], state.x[4:6], self.half_width
        low, high = np.minimum(evader, pursuer), np.maximum(evader, pursuer)  # nothing keeps them in the box
        return Scene(np.minimum(-1.15 * w, low - 0.15 * w), np.maximum(1.15 * w, high + 0.15 * w), [
            particles.box(w, GREY), Circle(evader, 0.04 * w, BLUE, label="evader"),
            Circle(pursuer, 0.05 * w, REDS[0], label="pursuer")])

    def place(self, x):
        return x[4:6]
