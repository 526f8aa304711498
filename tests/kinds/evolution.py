"""Evolution strategies: a constant action moves towards the perturbations that paid; every environment is a member."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from core.clock import Clock


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm="evolution", env="probe/Target", num_envs=16, num_steps=1, env_steps=1600, eval_every=800,
        eval_episodes=2, lr=0.3, std=0.2))


class Run(NamedTuple):
    mean: jax.Array  # (A,)
    clock: Clock
    env_state: Any
    obs: jax.Array


def init(key, source, config):
    env_state, obs = source.reset(key)
    return Run(jnp.zeros(source.action_space.shape), Clock.start(), env_state, obs)


def train_step(run, key, source, config):
    noise_key, env_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, (source.num_envs, *run.mean.shape))
    env_state, step = source.step(env_key, run.env_state, run.mean[None] + config.std * noise)
    fitness = (step.reward - step.reward.mean()) / (step.reward.std() + 1e-8)
    mean = run.mean + config.lr * config.std * (fitness[:, None] * noise).mean(0)
    clock = run.clock.tick(source.num_envs, updates=1)
    info = dict(fitness=step.reward.mean(), episode=jax.tree.map(jnp.sum, step.info["episode"]))
    return Run(mean, clock, env_state, step.obs), info


def act(run, carry, obs, key):
    return carry, jnp.broadcast_to(run.mean, (obs.shape[0], *run.mean.shape))
