"""What a planner is told of MuJoCo's tasks in Gymnasium: cost(x [O], action [A], next_x [O]) = −r of observations.

    InvertedPendulum-v5   r = 1 where |θ| <= 0.2 and all is finite, else 0, and the episode ends
    Reacher-v5            r = −|fingertip − target| − |a|²
    HalfCheetah-v5        r = v − 0.1 |a|², v the forward speed

of the next observation, and of actions within their bounds. The first two are what Gymnasium pays. For HalfCheetah it
pays the mean of v over the five substeps, a difference of positions that observations do not hold. v at their end is
off by 0.25 (root mean square over 1,500 random steps, the worst by 0.95; v itself deviates by 0.58), without bias.
"""
import jax
import jax.numpy as jnp


def inverted_pendulum(x: jax.Array, action: jax.Array, next_x: jax.Array) -> jax.Array:
    return -(jnp.isfinite(next_x).all() & (jnp.abs(next_x[1]) <= 0.2)).astype(jnp.float32)


def reacher(x: jax.Array, action: jax.Array, next_x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(next_x[8:10]).sum()) + jnp.square(action).sum()


def half_cheetah(x: jax.Array, action: jax.Array, next_x: jax.Array) -> jax.Array:
    return 0.1 * jnp.square(action).sum() - next_x[8]


COSTS = {"InvertedPendulum-v5": inverted_pendulum, "Reacher-v5": reacher, "HalfCheetah-v5": half_cheetah}
