"""Behaviour cloning: the actor's log-likelihood of the actions in a data set, by Adam.

    L = −E[log π(a|s)]                                                                         Agent.loss
    π(·|s) = N(c + h μ(s), diag(h σ)²)  for continuous actions, c the centre and h half the width of their box (without
             bounds 0 and 1); σ depends on no state
    π(·|s) = softmax(f(s))  for discrete actions

    E the mean over a minibatch of (s, a), drawn with replacement from the data set.

No paper: it is maximum likelihood (Pomerleau, 1989, "ALVINN", is the first such policy of a network). `info` says how
well the greedy action fits: `mse`, the mean over the minibatch and the A numbers of ((c + h μ(s) − a) / h)², or
`accuracy`, the share of actions that are the most likely one.

Ends: the loss uses each step alone, so ends play no role. Rewards are not used.
Random: first weights (init), minibatches (the keys that train_step splits).
Departures: the equations, but log σ is clipped; weights start orthogonal (√2, last layer 0.01).
Kept: `Run`: actor, optimiser, clock. The data are not in it. A checkpoint holds `Run`, the number of the iteration and
the sums since the last row of the log.
Decides: the data; updates, since after too many of them the actor fits the noise in few data.
Cost: an update at hidden_dims (256, 256), batch_size 256 and HalfCheetah's sizes takes 0.1 GFLOP: one forward pass of
the actor and its gradient, which counts as two. Steps of an environment are taken in evaluation only.
Expect: −935 on Pendulum from data with return −923 (configs/bc_pendulum.py, 8 seeds, 32 s on 2 CPU cores).
"""
import pathlib
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from flax import struct

from core.clock import Clock
from core.config import count, positive, rising
from core.envs import Discrete, require
from core.networks import MLP, flat
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="gymnax/Pendulum-v1",  # for evaluation, and whose actions the data have
        dataset="runs/iql_pendulum/collect/data.npz",  # or minari:NAME, or d4rl:PATH.hdf5
        updates=count(20_000),  # the budget of one seed
        updates_per_step=count(10),  # in one train_step
        eval_every=count(2000),  # updates
        eval_episodes=count(32),
        batch_size=count(256),
        hidden_dims=count((256, 256)),
        lr=positive(3e-4),
        log_std_bounds=rising((-5.0, 2.0)),  # of a real action, in half widths of its box
    ))


class Actor(nn.Module):
    action_space: Any
    hidden_dims: tuple[int, ...]
    log_std_bounds: tuple[float, float]

    @nn.compact
    def __call__(self, obs):  # (B, ...) -> distribution over (B,) or (B, A)
        discrete = isinstance(self.action_space, Discrete)
        outputs = self.action_space.n if discrete else self.action_space.shape[0]
        out = MLP((*self.hidden_dims, outputs), final_scale=0.01)(flat(obs))
        if discrete:
            return distrax.Categorical(logits=out)
        log_std = jnp.clip(self.param("log_std", nn.initializers.zeros, (outputs,)), *self.log_std_bounds)
        centre, half = (jnp.broadcast_to(x, out.shape) for x in self.action_space.scale)  # in the env's units
        return distrax.MultivariateNormalDiag(centre + half * out, half * jnp.exp(log_std)[None])


class Agent(struct.PyTreeNode):
    actor: TrainState
    action_space: Any = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs, action_space, config):
        actor = Actor(action_space, config.hidden_dims, config.log_std_bounds)
        return cls(TrainState.create(actor, key, obs, tx=optax.adam(config.lr)), action_space, config)

    def loss(self, params, batch):
        dist, action = self.actor(batch["obs"], params=params), batch["action"]
        loss = -dist.log_prob(action).mean()
        if isinstance(self.action_space, Discrete):
            return loss, dict(loss=loss, accuracy=(dist.mode() == action).mean())
        half = jnp.broadcast_to(self.action_space.scale[1], action.shape)
        return loss, dict(loss=loss, mse=jnp.square((dist.mode() - action) / half).mean())

    def update(self, batch):  # leaves (B, ...)
        actor, info = self.actor.minimize(self.loss, batch)
        return self.replace(actor=actor), info


class Run(NamedTuple):
    agent: Agent
    clock: Clock


def init(key, source, config):
    require(source, config)
    one = jax.tree.map(lambda x: x[:1], source.data["obs"])
    return Run(Agent.create(key, one, source.action_space, config), Clock.start())


def train_step(run, key, source, config):
    """`updates_per_step` times: a minibatch, one step of Adam on L."""
    def update(agent, key):
        return agent.update(source.sample(key, config.batch_size))

    agent, info = jax.lax.scan(update, run.agent, jax.random.split(key, config.updates_per_step))
    run = run._replace(agent=agent, clock=run.clock.tick(updates=config.updates_per_step))
    return run, jax.tree.map(jnp.mean, info)


def act(run, carry, obs, key):
    """The most likely action; the environment clips it. Nothing is carried between steps."""
    return (), run.agent.actor(obs).mode()
