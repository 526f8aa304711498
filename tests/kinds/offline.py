"""Offline: behaviour cloning, a = W'(obs, 1), by Adam on a data set."""
from typing import NamedTuple

import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn

from core.clock import Clock
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm="offline", env="probe/Target", dataset="", updates=300, eval_every=100, eval_episodes=2, lr=0.1,
        batch_size=16))


class Run(NamedTuple):
    actor: TrainState
    clock: Clock


def init(key, source, config):
    actor = nn.Dense(source.action_space.shape[0])
    return Run(TrainState.create(actor, key, source.data["obs"][0], tx=optax.adam(config.lr)), Clock.start())


def train_step(run, key, source, config):
    batch = source.sample(key, config.batch_size)

    def loss(params):
        loss = jnp.square(run.actor(batch["obs"], params=params) - batch["action"]).mean()
        return loss, dict(loss=loss)

    actor, info = run.actor.minimize(loss)
    return run._replace(actor=actor, clock=run.clock.tick(updates=1)), info


def act(run, carry, obs, key):
    return carry, run.actor(obs)
