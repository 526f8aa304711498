"""x' = 0.9 x + 0.2 u + noise, as long as |x| < 0.4; what is seen is (x, t / 20)."""
import dataclasses

import jax
import jax.numpy as jnp

from core.envs.interface import Box, TimeStep


@dataclasses.dataclass(frozen=True)
class Env:
    noise: float = 0.5
    max_steps: int = 20
    action_space = Box((-1.0,), (1.0,))

    def reset(self, key):
        obs = jnp.stack([jax.random.uniform(key, minval=-0.1, maxval=0.1), jnp.float32(0)])
        return obs, obs

    def step(self, key, state, action):
        x, t = 0.9 * state[0] + 0.2 * action[0] + self.noise * jax.random.normal(key), state[1] + 1 / 20
        obs, lost = jnp.stack([x, t]), jnp.abs(x) > 0.4
        return obs, TimeStep(obs, obs, jnp.float32(1), lost, ~lost & (t > 0.999), {})
