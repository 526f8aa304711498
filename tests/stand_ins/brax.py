"""A stand-in for Brax and for MuJoCo Playground: what the adapters need of either, and their habits, good and bad."""
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
from flax import struct


@struct.dataclass
class State:
    pipeline_state: jax.Array
    obs: jax.Array
    reward: jax.Array
    done: jax.Array
    metrics: dict
    info: dict


class Base:
    def __init__(self, sys, n_frames=1):
        self.n_frames = n_frames


class Slide(Base):
    """x' = x + push · a; it falls off where x > 1. The reward is a bare 1, `done` changes its type, and a fall is
    called a time-out, too."""

    action_size = 2

    def __init__(self, push=0.25, backend="generalized", **kwargs):
        assert backend in ("generalized", "spring"), "backend should be generalized or spring"
        super().__init__(None, **kwargs)
        self.push = push

    def reset(self, rng):
        assert jnp.issubdtype(rng.dtype, jnp.uint32)
        x = jax.random.uniform(jax.random.split(rng)[0], minval=-0.1) + 0 * jax.random.uniform(jax.random.split(rng)[1])
        return State(x, self.see(x), jnp.zeros(()), jnp.zeros(()), {"place": 0.0}, {"rng": rng, "time_out": 0.0})

    def step(self, state, action):
        x = state.pipeline_state + self.push * action.sum()
        done = x > 1.0
        state.metrics.update(place=x)
        return state.replace(pipeline_state=x, obs=self.see(x), reward=1.0, done=done,
                             info=state.info | {"time_out": done})

    def see(self, x):
        return jnp.stack([x, 1.0]) + jnp.zeros((2,))


class SlidePlus(Slide):
    """Playground's: settings are a config, and the critic sees more."""

    def __init__(self, config):
        super().__init__(config.push)

    def see(self, x):
        return {"state": super().see(x), "privileged_state": jnp.full(3, x)}


def get_default_config(name):
    repeat = 4 if name == "SlideTwice" else 1
    return ml_collections.ConfigDict(dict(push=0.25, episode_length=500, action_repeat=repeat, noise=dict(level=0.5)))


def load(name, config):
    if name == "SlideRobot":
        raise FileNotFoundError("git")
    if config.noise.level < 0:
        raise ValueError("no such noise")
    return SlidePlus(config)


envs = SimpleNamespace(_envs=dict(slide=Slide))
registry = SimpleNamespace(ALL_ENVS=("Slide", "SlideTwice", "SlideRobot"), load=load,
                           get_default_config=get_default_config)
