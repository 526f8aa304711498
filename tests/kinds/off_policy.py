"""Off-policy: Q-learning with a replay buffer, random steps before training and ten updates a step."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn

from core.clock import Clock
from core.dataset import ReplayBuffer
from core.envs import Transition
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm="off_policy", env="probe/Match", num_envs=4, num_steps=1, env_steps=160, random_steps=40,
        eval_every=60, eval_episodes=8, updates_per_step=10, capacity=128, batch_size=32, lr=0.03, discount=0.9,
        tau=0.1, epsilon=0.2))


class Run(NamedTuple):
    critic: TrainState
    target_critic: TrainState
    buffer: ReplayBuffer
    clock: Clock
    env_state: Any
    obs: jax.Array


def init(key, source, config):
    reset_key, net_key, *keys = jax.random.split(key, 2 + config.random_steps // config.num_envs)
    env_state, obs = source.reset(reset_key)
    critic = TrainState.create(nn.Dense(source.action_space.n), net_key, obs, tx=optax.adam(config.lr))
    action = source.action_space.sample(net_key, (config.num_envs,))
    _, step = jax.eval_shape(source.step, key, env_state, action)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), Transition.of(obs, action, step))
    buffer = ReplayBuffer.create(example._asdict(), config.capacity)
    run = Run(critic, critic.target(), buffer, Clock.start(), env_state, obs)
    for key in keys:
        run = interact(run, key, source, config, 1.0)
    return run


def interact(run, key, source, config, epsilon):
    choice_key, random_key, env_key = jax.random.split(key, 3)
    explore = jax.random.uniform(choice_key, (config.num_envs,)) < epsilon
    random = source.action_space.sample(random_key, (config.num_envs,))
    action = jnp.where(explore, random, run.critic(run.obs).argmax(-1).astype(jnp.int32))
    env_state, step = source.step(env_key, run.env_state, action)
    buffer = run.buffer.add(Transition.of(run.obs, action, step)._asdict())
    return run._replace(env_state=env_state, obs=step.obs, buffer=buffer, clock=run.clock.tick(config.num_envs))


def train_step(run, key, source, config):
    act_key, key = jax.random.split(key)
    run = interact(run, act_key, source, config, config.epsilon)

    def update(run, key):
        batch = run.buffer.sample(key, config.batch_size)
        next_q = run.target_critic(batch["next_obs"]).max(-1)
        target = batch["reward"] + config.discount * (1.0 - batch["terminated"]) * next_q

        def loss(params):
            q = jnp.take_along_axis(run.critic(batch["obs"], params=params), batch["action"][:, None], 1)[:, 0]
            return jnp.square(q - target).mean(), dict(q=q.mean())

        critic, info = run.critic.minimize(loss)
        clock, target_critic = run.clock.tick(updates=1), run.target_critic.track(critic, config.tau)
        return run._replace(critic=critic, target_critic=target_critic, clock=clock), info

    run, info = jax.lax.scan(update, run, jax.random.split(key, config.updates_per_step))
    return run, jax.tree.map(jnp.mean, info)


def act(run, carry, obs, key):
    return carry, run.critic(obs).argmax(-1).astype(jnp.int32)
