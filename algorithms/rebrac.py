"""ReBRAC: TD3 with a behaviour penalty of its own for actor and critic (Tarasov et al., 2023, arXiv:2305.09836).

    y    = r + γ (1 − terminated) [min_i Q̄_i(s', ã') − β₂ m ‖ã' − a'‖²]                        critic_loss
    ã'   = clip(π̄(s') + clip(σ ε, −c, c), −1, 1),   ε ~ N(0, I)                                target_action
    L_Q  = Σ_i E[(Q_i(s, a) − y)²]                                            i = 1, 2         critic_loss
    L_π  = E[β₁ ‖π(s) − a‖² − min_i Q_i(s, π(s)) / E|min_i Q_i(s, π(s))|]                      actor_loss
    Q̄_i <- τ Q_i + (1 − τ) Q̄_i,   π̄ <- τ π + (1 − τ) π̄                                        update

    π actor, Q critic with LayerNorm; Q̄, π̄ their targets; E the mean over a minibatch of (s, a, r, s', a', terminated),
    drawn with replacement from the data set. a' the data's action in s'; m is 1 where the data have one, else 0. No
    gradient flows through the E|·| that divides. a lies in [−1, 1]^A: the data's actions, with the box of the
    environment shrunk to that.

    train_step   updates_per_step / policy_delay times: draw policy_delay minibatches and take one step of Adam on L_Q
                 with each; one on L_π with the last of them and the new Q; one of Q̄ and π̄ with the new Q and π

Ends: at a time limit (truncated) y bootstraps from s', at any other end (terminated) it is r. After an end of either
kind, and where the data stop, there is no a' of the same episode: m = 0.
Random: first weights (actor_key, critic_key), minibatches (sample_key), ε (the keys that update splits).
Departures: none from the equations. As in the authors' code L_π has the smaller critic (in TD3 the first one), and the
targets move with the actor. That code also keeps y above the data's return from there; here it may be below. Their π̄
follows the π before the update. They train AntMaze with another rate for the critic. Weights start orthogonal (√2, last
layers 1).
Kept: `Run`: agent (networks, optimisers, targets), clock. The data are not in it.
Decides: the data; actor_penalty; tau, as the targets move at every second update only. critic_penalty, which has the
unit of a return, made no difference on Pendulum.
Cost: a round of two updates at hidden_dims (256, 256, 256), batch_size 1024 and HalfCheetah's sizes takes 7 GFLOP: 20
forward passes of a critic and 5 of the actor, where a gradient counts as two. Steps of an environment are taken in
evaluation only.
Expect: −248 on Pendulum from data with return −923 (configs/rebrac_pendulum.py, 8 seeds, 6 min on 2 shared CPU cores).
"""
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from flax import struct

from core.clock import Clock
from core.config import count, fraction, nonnegative, positive
from core.envs import Box, require
from core.errors import UserError
from core.networks import MLP, ensemblize, flat
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="gymnax/Pendulum-v1",  # for evaluation, and whose actions the data have
        dataset="runs/iql_pendulum/collect/data.npz",  # or minari:NAME, or d4rl:PATH.hdf5
        updates=count(20_000),  # the budget of one seed, of the critic
        updates_per_step=count(10),  # in one train_step
        eval_every=count(2000),  # updates
        eval_episodes=count(32),
        batch_size=count(1024),
        hidden_dims=count((256, 256, 256)),
        lr=positive(1e-3),  # of actor and critic
        discount=fraction(0.99),  # γ
        tau=fraction(0.005),  # τ
        actor_penalty=nonnegative(0.01),  # β₁
        critic_penalty=nonnegative(0.01),  # β₂
        smoothing_std=nonnegative(0.2),  # σ
        smoothing_clip=nonnegative(0.5),  # c
        policy_delay=count(2),  # updates of the critic to one of the actor; it divides updates_per_step
    ))


def relu_norm(x):
    return nn.LayerNorm()(nn.relu(x))


class Actor(nn.Module):
    action_dim: int
    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):  # (B, ...) -> (B, A)
        return jnp.tanh(MLP((*self.hidden_dims, self.action_dim))(flat(obs)))


class Critic(nn.Module):
    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):  # (B, ...), (B, A) -> (2, B)
        return ensemblize(MLP, 2)((*self.hidden_dims, 1), activation=relu_norm)(flat((obs, action))).squeeze(-1)


class Agent(struct.PyTreeNode):
    actor: TrainState
    target_actor: TrainState
    critic: TrainState
    target_critic: TrainState
    action_space: Box = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs, action_space, config):
        actor_key, critic_key = jax.random.split(key)
        action = jnp.zeros((1, *action_space.shape))
        tx = optax.adam(config.lr)
        actor = TrainState.create(Actor(action.shape[-1], config.hidden_dims), actor_key, obs, tx=tx)
        critic = TrainState.create(Critic(config.hidden_dims), critic_key, obs, action, tx=tx)
        return cls(actor, actor.target(), critic, critic.target(), action_space, config)

    def target_action(self, obs, key):
        action = self.target_actor(obs)
        noise = self.config.smoothing_std * jax.random.normal(key, action.shape)
        noise = jnp.clip(noise, -self.config.smoothing_clip, self.config.smoothing_clip)
        return jnp.clip(action + noise, -1.0, 1.0)

    def critic_loss(self, params, batch, key):
        next_action = self.target_action(batch["next_obs"], key)
        penalty = batch["has_next"] * jnp.square(next_action - batch["next_action"]).sum(axis=-1)
        next_q = self.target_critic(batch["next_obs"], next_action).min(axis=0)
        next_v = next_q - self.config.critic_penalty * penalty
        target = batch["reward"] + self.config.discount * (1.0 - batch["terminated"]) * next_v
        q = self.critic(batch["obs"], batch["action"], params=params)
        loss = jnp.square(q - target[None]).mean(axis=1).sum()
        return loss, dict(critic_loss=loss, q=q.mean(), next_penalty=penalty.mean())

    def actor_loss(self, params, batch):
        action = self.actor(batch["obs"], params=params)
        penalty = jnp.square(action - batch["action"]).sum(axis=-1)
        q = self.critic(batch["obs"], action).min(axis=0)
        scale = jax.lax.stop_gradient(jnp.abs(q).mean())
        loss = (self.config.actor_penalty * penalty - q / scale).mean()
        return loss, dict(actor_loss=loss, penalty=penalty.mean())

    def update(self, batches, key):  # leaves (D, B, ...), D = policy_delay
        def update_critic(critic, batch_and_key):
            return critic.minimize(self.replace(critic=critic).critic_loss, *batch_and_key)

        keys = jax.random.split(key, self.config.policy_delay)
        critic, critic_info = jax.lax.scan(update_critic, self.critic, (batches, keys))
        agent = self.replace(critic=critic, target_critic=self.target_critic.track(critic, self.config.tau))
        actor, info = agent.actor.minimize(agent.actor_loss, jax.tree.map(lambda x: x[-1], batches))
        agent = agent.replace(actor=actor, target_actor=agent.target_actor.track(actor, self.config.tau))
        return agent, jax.tree.map(jnp.mean, critic_info) | info


class Run(NamedTuple):
    agent: Agent
    clock: Clock


def init(key, source, config):
    require(source, config, actions=(Box,), bounded=True)
    if config.updates_per_step % config.policy_delay:
        raise UserError(f"policy_delay = {config.policy_delay} does not divide "
                        f"updates_per_step = {config.updates_per_step}")
    one = jax.tree.map(lambda x: x[:1], source.data["obs"])
    return Run(Agent.create(key, one, source.action_space, config), Clock.start())


def train_step(run, key, source, config):
    def update(agent, key):
        sample_key, update_key = jax.random.split(key)
        return agent.update(sample(source, sample_key, (config.policy_delay, config.batch_size)), update_key)

    rounds = config.updates_per_step // config.policy_delay
    agent, info = jax.lax.scan(update, run.agent, jax.random.split(key, rounds))
    run = run._replace(agent=agent, clock=run.clock.tick(updates=config.updates_per_step))
    return run, jax.tree.map(jnp.mean, info)


def sample(source, key, shape):
    """Transitions, leaves (*shape, ...), with `next_action`, that of the next row, and `has_next`: whether that row is
    one of the same episode. Actions as the networks have them."""
    index = jax.random.randint(key, shape, 0, source.size)
    next_index = jnp.minimum(index + 1, source.size - 1)
    batch = jax.tree.map(lambda x: x[index], source.data)
    has_next = ~(batch["terminated"] | batch["truncated"]) & (next_index > index)

    def unit_action(index):
        action = source.data["action"][index]
        centre, half = (jnp.broadcast_to(x, action.shape) for x in source.action_space.scale)
        return (action - centre) / half

    return batch | dict(action=unit_action(index), next_action=unit_action(next_index), has_next=has_next)


def act(run, carry, obs, key):
    """π(s), in the environment's units. Nothing is carried between steps."""
    return (), run.agent.action_space.from_unit(run.agent.actor(obs))
