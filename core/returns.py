"""Returns and advantages of a rollout. Time is the leading axis; any axes may follow it."""
import jax
import jax.numpy as jnp

EPSILON = 0.001  # of h: keeps its slope from vanishing


def gae(
    reward: jax.Array, value: jax.Array, next_value: jax.Array, terminated: jax.Array, truncated: jax.Array,
    discount: float, trace: float,
) -> jax.Array:
    """Generalised advantages [T, ...] (Schulman et al., 2016, Eq. 16), right at terminations and at time limits.

        δ_t = r_t + γ (1 − terminated_t) V(s'_t) − V(s_t)
        A_t = δ_t + γ λ (1 − terminated_t)(1 − truncated_t) A_{t+1}

    `next_value` [T, ...] is the value of the true successor s'_t, also where the episode was cut by a time limit.
    """
    delta = reward + discount * (1.0 - terminated) * next_value - value
    decay = discount * trace * (1.0 - terminated) * (1.0 - truncated)

    def backwards(advantage, step):
        delta, decay = step
        advantage = delta + decay * advantage
        return advantage, advantage

    return jax.lax.scan(backwards, jnp.zeros_like(delta[0]), (delta, decay), reverse=True, unroll=16)[1]


def lambda_returns(
    reward: jax.Array, next_value: jax.Array, terminated: jax.Array, truncated: jax.Array,
    discount: float, trace: float,
) -> jax.Array:
    """TD(λ) targets [T, ...].

        G_t = r_t + γ (1 − terminated_t) [(1 − λ_t) V(s'_t) + λ_t G_{t+1}],   λ_t = λ (1 − truncated_t), G_T = V(s'_T)
    """
    def backwards(target, step):
        reward, next_value, terminated, truncated = step
        weight = trace * (1.0 - truncated)
        target = reward + discount * (1.0 - terminated) * ((1.0 - weight) * next_value + weight * target)
        return target, target

    return jax.lax.scan(backwards, next_value[-1], (reward, next_value, terminated, truncated), reverse=True)[1]


def n_step_returns(
    reward: jax.Array, next_value: jax.Array, terminated: jax.Array, truncated: jax.Array,
    discount: float, n: int,
) -> jax.Array:
    """n-step targets [T, ...]: rewards summed until n steps, a termination, a time limit or the end of the rollout,
    whichever comes first, then the value of the successor reached (0 at a termination)."""
    def extend(later, _):
        # `later` holds the (k−1)-step target of each step; one step earlier it continues unless the episode ended.
        shifted = jnp.concatenate([later[1:], next_value[-1:]])
        follow = jnp.where(truncated.astype(bool), next_value, shifted)
        return reward + discount * (1.0 - terminated) * follow, None

    one_step = reward + discount * (1.0 - terminated) * next_value
    return jax.lax.scan(extend, one_step, length=n - 1)[0]


def to_bins(x: jax.Array, bound: float, num_bins: int) -> jax.Array:
    """x [...] -> weights [..., num_bins] of bins, which are numbers evenly spaced in [−bound, bound] (Schrittwieser et
    al., 2020, Appendix F). The two bins beside h(x) share the weight 1, so that the mean is h(x), clipped to the bound.

        h(x) = sign(x) (√(|x| + 1) − 1) + 0.001 x
    """
    h = jnp.clip(jnp.sign(x) * (jnp.sqrt(jnp.abs(x) + 1) - 1) + EPSILON * x, -bound, bound)
    place = (h + bound) * (num_bins - 1) / (2 * bound)  # 0 is the first bin
    return jnp.maximum(1.0 - jnp.abs(jnp.subtract.outer(place, jnp.arange(num_bins))), 0.0)


def from_bins(weights: jax.Array, bound: float) -> jax.Array:
    """Weights [..., num_bins] -> h⁻¹ of their mean [...]. The usual form subtracts 1 from √(1 + 4 ε y), which is little
    more than 1: in float32 a small number would lose its digits. This form does not."""
    h = weights @ jnp.linspace(-bound, bound, weights.shape[-1])
    y = jnp.abs(h) + 1 + EPSILON  # h⁻¹(h) = sign(h) (u² − 1),  u = (√(1 + 4 ε y) − 1) / 2 ε = 2 y / (√(1 + 4 ε y) + 1)
    return jnp.sign(h) * (jnp.square(2 * y / (jnp.sqrt(1 + 4 * EPSILON * y) + 1)) - 1)
