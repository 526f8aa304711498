"""What every part of the house means by an environment.

One environment, never batched, is any object with

    max_steps                                  the time limit, in steps
    action_space                               Discrete or Box
    reset(key) -> (state, obs)
    step(key, state, action) -> (state, TimeStep)

pure functions of their arguments. It knows nothing of resetting itself or of its copies: `batch.Batch` does both.
Hidden truth (masses, gains, an opponent's cost) lives inside `state`, so it can differ per copy and per episode.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class TimeStep(NamedTuple):
    obs: jax.Array  # what the policy sees next: the first observation of a new episode after an end
    next_obs: jax.Array  # the true successor of the action, also at an end
    reward: jax.Array
    terminated: jax.Array  # the task ended: nothing follows, bootstrap with 0
    truncated: jax.Array  # a time limit: the episode would have gone on, bootstrap with the value of next_obs
    info: dict[str, Any]


class Discrete(NamedTuple):
    """Actions 0 .. n − 1, int32."""

    n: int

    @property
    def shape(self):
        return ()

    @property
    def dtype(self):
        return jnp.int32

    def sample(self, key: jax.Array, batch: tuple[int, ...] = ()) -> jax.Array:
        return jax.random.randint(key, batch, 0, self.n)


class Box(NamedTuple):
    """Real actions in the environment's own units, low <= action <= high. The environment clips."""

    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def shape(self):
        return (len(self.low),)

    @property
    def dtype(self):
        return jnp.float32

    @property
    def bounds(self) -> tuple[jax.Array, jax.Array]:
        return jnp.float32(self.low), jnp.float32(self.high)

    @property
    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """(centre [A], half range [A]); 0 and 1 where there is no bound."""
        low, high = np.asarray(self.low, np.float32), np.asarray(self.high, np.float32)
        bounded = np.isfinite(low) & np.isfinite(high)
        low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
        return ((high + low) / 2).astype(np.float32), ((high - low) / 2).astype(np.float32)

    def sample(self, key: jax.Array, batch: tuple[int, ...] = ()) -> jax.Array:
        return self.from_unit(jax.random.uniform(key, (*batch, *self.shape), minval=-1.0, maxval=1.0))

    def from_unit(self, action: jax.Array) -> jax.Array:
        """[..., A] in [−1, 1] -> [low, high]; clips."""
        centre, half = (jnp.broadcast_to(x, action.shape) for x in self.scale)
        return centre + half * jnp.clip(action, -1.0, 1.0)

    def clip(self, action: jax.Array) -> jax.Array:
        low, high = (jnp.broadcast_to(jnp.asarray(x, jnp.float32), action.shape) for x in (self.low, self.high))
        return jnp.clip(action, low, high)
