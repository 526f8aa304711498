"""x' = 0.9 x + 0.2 u + noise, as long as |x| < 0.4; obs is (x, t / 20), so the data say where they are from."""
import dataclasses

import jax
import jax.numpy as jnp

from core.envs.interface import Box, TimeStep


@dataclasses.dataclass(frozen=True)
class Env:
    noise: float = 0.5
    reveal: bool = False
    max_steps: int = 20
    action_space = Box((-1.0,), (3.0,))
    truth = jnp.full(2, 7.0)  # the same numbers in every episode, revealed for the tests of collect

    def reset(self, key):
        obs = jnp.stack([jax.random.uniform(key, minval=-0.1, maxval=0.1), jnp.float32(0)])
        return obs, self.show(obs)

    def step(self, key, state, action):
        x, t = 0.9 * state[0] + 0.2 * action[0] + self.noise * jax.random.normal(key), state[1] + 1 / 20
        obs, lost = jnp.stack([x, t]), jnp.abs(x) > 0.4
        return obs, TimeStep(self.show(obs), self.show(obs), jnp.float32(1), lost, ~lost & (t > 0.999), {})

    def show(self, obs):
        return jnp.append(obs, self.truth) if self.reveal else obs
