"""Point masses in the plane: what the multi-agent environments of this folder share.

    p' = p + v·dt + ½ a·dt²,   v' = v + a·dt,   then   v' ← v' · min(1, cap / (|v'| + 1e-6))           move
    b(z) = 0 if z < 0.9,   10 (z − 0.9) if z < 1,   else min(e^{2z − 2}, 10)                           wall_penalty

    agents [N, 4] holds (x, y, vx, vy) of every agent; a is the clipped action, and the cap on the speed comes after
    the position has moved. The box is |x|, |y| <= w.
"""
from typing import Any

import jax
import jax.numpy as jnp

from core.render import Line


def spawn(key: jax.Array, num_agents: int, half_width: float, goal_half_width: float) -> tuple[jax.Array, jax.Array]:
    """Agents [N, 4] at rest and a goal [2], both uniform in their squares; one draw, because a draw is what costs."""
    unit = jax.random.uniform(key, (num_agents + 1, 2), minval=-1.0, maxval=1.0)
    position, goal = unit[:-1] * half_width, unit[-1] * goal_half_width
    return jnp.concatenate([position, jnp.zeros_like(position)], axis=1), goal


def move(agents: jax.Array, action: jax.Array, dt: float, max_accel: Any, max_speed: Any = None) -> jax.Array:
    """agents [N, 4], action [N, 2], caps scalar or [N, 1] -> agents [N, 4]."""
    accel = jnp.clip(action, -max_accel, max_accel)
    position, velocity = agents[:, :2], agents[:, 2:]
    position = position + velocity * dt + 0.5 * dt**2 * accel
    velocity = velocity + accel * dt
    if max_speed is not None:
        velocity = velocity * jnp.minimum(1.0, max_speed / (norm(velocity)[:, None] + 1e-6))
    return jnp.concatenate([position, velocity], axis=1)


def norm(x: jax.Array) -> jax.Array:
    """[..., 2] -> [...]."""
    return jnp.sqrt(jnp.square(x[..., 0]) + jnp.square(x[..., 1]))


def wall_penalty(position: jax.Array, half_width: float) -> jax.Array:
    """Σ_axes b(|x| / w): [..., 2] -> [...]."""
    z = jnp.abs(position) / half_width
    b = jnp.where(z < 0.9, 0.0, jnp.where(z < 1.0, 10 * (z - 0.9), jnp.minimum(jnp.exp(2 * z - 2), 10.0)))
    return b[..., 0] + b[..., 1]


def others(agents: jax.Array) -> jax.Array:
    """[N, 4] -> [N, 4 (N − 1)]: what agent i sees of all j ≠ i in their order, (p_j − p_i, v_j − v_i)."""
    n = agents.shape[0]
    difference = (agents[None] - agents[:, None]).reshape(n * n, 4)  # row i·n + j; every (n + 1)-th is i − i
    return difference[1:].reshape(n - 1, n + 1, 4)[:, :-1].reshape(n, 4 * (n - 1))


def box(half_width: float, colour: tuple[int, int, int]) -> Line:
    w = half_width
    return Line(((-w, -w), (w, -w), (w, w), (-w, w), (-w, -w)), colour)
