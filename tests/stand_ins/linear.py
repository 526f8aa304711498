"""A stand-in for a method that learns within an episode: its action says how many of its steps it has observed."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from core.clock import Clock
from core.dataset import read_arrays
from core.envs import Transition, ended, restart


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm="linear", env="drift", env_kwargs=dict(noise=0.5), num_envs=2, num_steps=1, env_steps=8, eval_every=4,
        eval_episodes=2, hidden_dims=(), pretrained="",
        collect=dict(episodes=50, num_envs=7, action_noise=0.3, env_kwargs=dict(noise=0.05, reveal=True)),
        pretrain=dict(updates=400, eval_every=100, batch_size=64, lr=0.05, holdout=0.2, rollout_steps=5),
    ))


class Run(NamedTuple):
    weight: jax.Array
    carry: jax.Array
    env_state: Any
    obs: jax.Array
    clock: Clock


def init(key, source, config):
    weight = jnp.float32(0)
    if config.pretrained:
        weight = jnp.abs(read_arrays(config.pretrained)["weights"]["Dense_0"]["kernel"]).sum()
    env_state, obs = source.reset(key)
    return Run(weight, jnp.zeros(source.num_envs), env_state, obs, Clock.start())


def initial_carry(run, num_envs):
    return jnp.zeros(num_envs)


def act(run, carry, obs, key):
    return carry, carry[:, None] / 20 + run.weight / 10


def observe(run, carry, step):
    return carry + 1


def train_step(run, key, source, config):
    act_key, env_key = jax.random.split(key)
    carry, action = act(run, run.carry, run.obs, act_key)
    env_state, step = source.step(env_key, run.env_state, action)
    carry = observe(run, carry, Transition.of(run.obs, action, step))
    carry = restart(ended(step), initial_carry(run, source.num_envs), carry)
    run = run._replace(carry=carry, env_state=env_state, obs=step.obs, clock=run.clock.tick(env_steps=source.num_envs))
    return run, dict(weight=run.weight)
