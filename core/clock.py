"""What a run has cost so far. It is a part of `Run`: a checkpoint keeps it, and every row of metrics.csv reads it."""
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Clock(NamedTuple):
    env_steps: jax.Array  # steps really taken, over all environments of the seed, random ones before training included
    updates: jax.Array  # gradient steps, or updates of a filter

    @classmethod
    def start(cls, env_steps: int = 0) -> "Clock":
        return cls(jnp.int32(env_steps), jnp.int32(0))

    def tick(self, env_steps: int = 0, updates: int = 0) -> "Clock":
        return Clock(self.env_steps + env_steps, self.updates + updates)
