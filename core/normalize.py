"""Running normalisation. The statistics are state: they live in `Run`, are saved with it, and evaluation reads them."""
import jax
import jax.numpy as jnp
from flax import struct


class RunningMeanStd(struct.PyTreeNode):
    """Mean and variance of everything seen, merged batch by batch (Chan et al., 1979)."""

    mean: jax.Array
    var: jax.Array
    count: jax.Array

    @classmethod
    def create(cls, example: jax.Array) -> "RunningMeanStd":
        """Of values shaped like `example`. Starts as the identity, with the weight of almost nothing."""
        return cls(jnp.zeros(example.shape), jnp.ones(example.shape), jnp.float32(1e-4))

    def update(self, batch: jax.Array) -> "RunningMeanStd":
        """Add `batch` [..., *example.shape]."""
        batch = batch.astype(self.mean.dtype).reshape(-1, *self.mean.shape)
        batch_mean, batch_var, n = batch.mean(axis=0), batch.var(axis=0), batch.shape[0]
        count = self.count + n
        delta = batch_mean - self.mean
        mean = self.mean + delta * (n / count)
        var = (self.var * self.count + batch_var * n + delta**2 * (self.count * n / count)) / count
        return RunningMeanStd(mean, var, count)

    def __call__(self, x: jax.Array, limit: float = 10.0) -> jax.Array:
        """Standardised and clipped to ±limit."""
        mean, std = (jnp.broadcast_to(v, x.shape) for v in (self.mean, jnp.sqrt(self.var + 1e-8)))
        return jnp.clip((x - mean) / std, -limit, limit)


class RewardScale(struct.PyTreeNode):
    """Divides rewards by the standard deviation of the discounted return, which has one unit whatever the task."""

    stats: RunningMeanStd
    discounted_return: jax.Array  # [E, ...], of the running episodes

    @classmethod
    def create(cls, shape: tuple[int, ...]) -> "RewardScale":
        return cls(RunningMeanStd.create(jnp.zeros(())), jnp.zeros(shape))

    def update(self, reward: jax.Array, done: jax.Array, discount: float) -> "RewardScale":
        """Add a rollout: reward [T, E, ...], done [T, E]. The terminal reward counts for the episode it ends."""
        def accumulate(total, step):
            reward, done = step
            total = discount * total + reward
            return jnp.where(done, 0.0, total), total

        done = jnp.broadcast_to(done.reshape(done.shape + (1,) * (reward.ndim - done.ndim)), reward.shape)
        discounted_return, totals = jax.lax.scan(accumulate, self.discounted_return, (reward, done))
        return RewardScale(self.stats.update(totals), discounted_return)

    def __call__(self, reward: jax.Array, limit: float = 10.0) -> jax.Array:
        return jnp.clip(reward / jnp.sqrt(self.stats.var + 1e-8), -limit, limit)
