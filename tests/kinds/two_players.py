"""Two players: each learns the logits of its actions by policy gradient, while the other one learns as well."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from core.clock import Clock


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm="two_players", env="probe/Dilemma", num_envs=16, num_steps=4, env_steps=3200, eval_every=1600,
        eval_episodes=4, lr=(1.0, 0.5)))


class Run(NamedTuple):
    logits: jax.Array  # (N, A)
    clock: Clock
    env_state: Any
    obs: jax.Array


def init(key, source, config):
    env_state, obs = source.reset(key)
    return Run(jnp.zeros((source.num_agents, source.action_space.n)), Clock.start(), env_state, obs)


def train_step(run, key, source, config):
    def env_step(run, key):
        act_key, env_key = jax.random.split(key)
        logits = jnp.broadcast_to(run.logits, (source.num_envs, *run.logits.shape))
        action = jax.random.categorical(act_key, logits).astype(jnp.int32)
        env_state, step = source.step(env_key, run.env_state, action)
        return run._replace(env_state=env_state, obs=step.obs), (action, step.reward, step.info["episode"])

    run, (action, reward, episode) = jax.lax.scan(env_step, run, jax.random.split(key, config.num_steps))
    advantage = reward - reward.mean((0, 1), keepdims=True)  # (T, E, N)

    def loss(logits):
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(jnp.broadcast_to(logits, (*action.shape, 2))),
                                       action[..., None], -1)[..., 0]
        return -(advantage * log_prob).mean((0, 1)).sum()

    logits = run.logits - jnp.float32(config.lr)[:, None] * jax.grad(loss)(run.logits)
    clock = run.clock.tick(config.num_envs * config.num_steps, updates=1)
    info = dict(first=jax.nn.softmax(logits)[0, 1], second=jax.nn.softmax(logits)[1, 1])
    return run._replace(logits=logits, clock=clock), info | dict(
        episode=jax.tree.map(lambda x: x.sum((0, 1)), episode))


def act(run, carry, obs, key):
    return carry, jnp.broadcast_to(run.logits.argmax(-1).astype(jnp.int32), obs.shape[:2])
