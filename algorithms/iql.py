"""Implicit Q-Learning (Kostrikov et al., 2022, arXiv:2110.06169).

    L_V  = E[|η − 1(u < 0)| u²],   u = min_i Q̄_i(s, a) − V(s)                                 value_loss   (Eq. 5)
    L_π  = −E[min(exp(β (min_i Q̄_i(s, a) − V(s))), w) log π(a|s)]                             actor_loss   (Eq. 7)
    L_Q  = Σ_i E[(Q_i(s, a) − y)²],   y = r + γ (1 − terminated) V(s')                         critic_loss  (Eq. 6)
    Q̄_i <- τ Q_i + (1 − τ) Q̄_i                                               i = 1, 2         update

    π actor, V value, Q critic, Q̄ target critic; E the mean over a minibatch of (s, a, r, s', terminated), drawn with
    replacement from the data set. η the expectile: at ½ V is the mean of Q̄ over the actions of the data, near 1 it is
    the largest of them. So no action is asked about that the data do not have. β the inverse temperature, w the largest
    weight. a lies in [−1, 1]^A: the data's actions, with the box of the environment shrunk to that.

    init         scale the rewards: the best and the worst return in the data differ by return_range
    train_step   updates_per_step times: draw a minibatch, one step of Adam on L_V, one on L_π with the new V, one on
                 L_Q with the new V, one of Q̄ with the new Q

Ends: at a time limit (truncated) y bootstraps from s', at any other end (terminated) it is r. A return is that of all
steps to an end of either kind, or to the end of the data.
Random: first weights (actor_key, value_key, critic_key), minibatches (the keys that train_step splits).
Departures from the authors' code: last layers start with scale 1, theirs with √2; rewards are scaled in every
environment, there in MuJoCo only, to 1000. As in that code: π is a normal with mean tanh μ(s) and a deviation σ that
depends on no state, its log clipped; the actor's learning rate falls to zero along a cosine.
Kept: `Run`: agent (networks, optimisers, target critic), scale of the rewards, clock. The data are not in it.
A checkpoint holds `Run`, the number of the iteration and the sums since the last row of the log.
Decides: the data; expectile and inverse_temperature; return_range, against which β is set.
Cost: an update at hidden_dims (256, 256), batch_size 256 and HalfCheetah's sizes takes 0.6 GFLOP: 8 forward passes of a
critic, 5 of V, 3 of the actor, where a gradient counts as two. Steps of an environment are taken in evaluation only.
Expect: −196 on Pendulum from data with return −923 (configs/iql_pendulum.py, 8 seeds, 10 min on 2 shared CPU cores).
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
from core.config import count, fraction, positive, rising
from core.envs import Box, require
from core.networks import MLP, ensemblize, flat
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
        lr=positive(3e-4),  # of value, critic, and at first of the actor
        discount=fraction(0.99),  # γ
        tau=fraction(0.005),  # τ
        expectile=fraction(0.7),  # η
        inverse_temperature=positive(3.0),  # β
        max_weight=positive(100.0),  # w
        return_range=positive(1000.0),  # of the data, once the rewards are scaled
        log_std_bounds=rising((-5.0, 2.0)),
    ))


class Actor(nn.Module):
    action_dim: int
    hidden_dims: tuple[int, ...]
    log_std_bounds: tuple[float, float]

    @nn.compact
    def __call__(self, obs):  # (B, ...) -> distribution over (B, A)
        mean = jnp.tanh(MLP((*self.hidden_dims, self.action_dim))(flat(obs)))
        log_std = jnp.clip(self.param("log_std", nn.initializers.zeros, (self.action_dim,)), *self.log_std_bounds)
        return distrax.MultivariateNormalDiag(mean, jnp.broadcast_to(jnp.exp(log_std)[None], mean.shape))


class Value(nn.Module):
    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):  # (B, ...) -> (B,)
        return MLP((*self.hidden_dims, 1))(flat(obs)).squeeze(-1)


class Critic(nn.Module):
    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):  # (B, ...), (B, A) -> (2, B)
        return ensemblize(MLP, 2)((*self.hidden_dims, 1))(flat((obs, action))).squeeze(-1)


class Agent(struct.PyTreeNode):
    actor: TrainState
    value: TrainState
    critic: TrainState
    target_critic: TrainState
    action_space: Box = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs, action_space, config):
        actor_key, value_key, critic_key = jax.random.split(key, 3)
        action = jnp.zeros((1, *action_space.shape))
        actor = Actor(action.shape[-1], config.hidden_dims, config.log_std_bounds)
        falling, tx = optax.adam(optax.cosine_decay_schedule(config.lr, config.updates)), optax.adam(config.lr)
        critic = TrainState.create(Critic(config.hidden_dims), critic_key, obs, action, tx=tx)
        return cls(TrainState.create(actor, actor_key, obs, tx=falling),
                   TrainState.create(Value(config.hidden_dims), value_key, obs, tx=tx),
                   critic, critic.target(), action_space, config)

    def value_loss(self, params, batch):
        value = self.value(batch["obs"], params=params)
        error = self.target_critic(batch["obs"], batch["action"]).min(axis=0) - value
        weight = jnp.where(error < 0, 1.0 - self.config.expectile, self.config.expectile)
        loss = (weight * jnp.square(error)).mean()
        return loss, dict(value_loss=loss, value=value.mean())

    def actor_loss(self, params, batch):
        q = self.target_critic(batch["obs"], batch["action"]).min(axis=0)
        advantage = q - self.value(batch["obs"])
        weight = jnp.minimum(jnp.exp(self.config.inverse_temperature * advantage), self.config.max_weight)
        loss = -(weight * self.actor(batch["obs"], params=params).log_prob(batch["action"])).mean()
        clipped = (weight == self.config.max_weight).mean()
        return loss, dict(actor_loss=loss, advantage=advantage.mean(), clipped=clipped)

    def critic_loss(self, params, batch):
        next_v = self.value(batch["next_obs"])
        target = batch["reward"] + self.config.discount * (1.0 - batch["terminated"]) * next_v
        q = self.critic(batch["obs"], batch["action"], params=params)
        loss = jnp.square(q - target[None]).mean(axis=1).sum()
        return loss, dict(critic_loss=loss, q=q.mean())

    def update(self, batch):  # leaves (B, ...)
        value, value_info = self.value.minimize(self.value_loss, batch)
        agent = self.replace(value=value)
        actor, actor_info = agent.actor.minimize(agent.actor_loss, batch)
        critic, critic_info = agent.critic.minimize(agent.critic_loss, batch)
        target_critic = agent.target_critic.track(critic, self.config.tau)
        agent = agent.replace(actor=actor, critic=critic, target_critic=target_critic)
        return agent, value_info | actor_info | critic_info


class Run(NamedTuple):
    agent: Agent
    reward_scale: jax.Array
    clock: Clock


def init(key, source, config):
    require(source, config, actions=(Box,), bounded=True)
    returns, there = episode_returns(source.data)
    span = returns.max(where=there, initial=-jnp.inf) - returns.min(where=there, initial=jnp.inf)
    scale = jnp.where(span > 0, config.return_range / span, 1.0)
    one = jax.tree.map(lambda x: x[:1], source.data["obs"])
    return Run(Agent.create(key, one, source.action_space, config), scale, Clock.start())


def episode_returns(data):
    """(N,) the sum of rewards of each episode, and whether there is an episode of that number."""
    done = data["terminated"] | data["truncated"]
    episode = jnp.cumsum(done) - done  # (N,) the episode's number, of each step
    returns = jax.ops.segment_sum(data["reward"], episode, num_segments=len(done))
    return returns, jnp.arange(len(done)) <= episode[-1]


def train_step(run, key, source, config):
    def update(agent, key):
        batch = source.sample(key, config.batch_size)
        centre, half = (jnp.broadcast_to(x, batch["action"].shape) for x in source.action_space.scale)
        action, reward = (batch["action"] - centre) / half, run.reward_scale * batch["reward"]
        return agent.update(batch | dict(action=action, reward=reward))

    agent, info = jax.lax.scan(update, run.agent, jax.random.split(key, config.updates_per_step))
    run = run._replace(agent=agent, clock=run.clock.tick(updates=config.updates_per_step))
    return run, jax.tree.map(jnp.mean, info)


def act(run, carry, obs, key):
    """The mean of π, in the environment's units. Nothing is carried between steps."""
    return (), run.agent.action_space.from_unit(run.agent.actor(obs).mode())
