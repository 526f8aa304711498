"""Conservative Q-learning, CQL(H), on soft actor-critic (Kumar et al., 2020, arXiv:2006.04779).

    y    = r + γ (1 − terminated) min_i Q̄_i(s', a'),   a' ~ π(·|s')                            critic_loss
    L_Q  = Σ_i ½ E[(Q_i(s, a) − y)²] + c E[log Ẑ_i(s) − Q_i(s, a)]           i = 1, 2          critic_loss      (Eq. 4)
    Ẑ_i  = 1/(3N) Σ_j [exp Q_i(s, u_j) / 2^(−A) + exp Q_i(s, ã_j) / π(ã_j|s) + exp Q_i(s, ã'_j) / π(ã'_j|s')]
           u_j ~ U[−1, 1]^A,   ã_j ~ π(·|s),   ã'_j ~ π(·|s'),   j = 1 … N                     log_partition    (App. F)
    Q̄_i <- τ Q_i + (1 − τ) Q̄_i                                                                 update
    L_π  = E[α log π(ã|s) − min_i Q_i(s, ã)],   ã = tanh(μ(s) + σ(s) ε),  ε ~ N(0, I)          actor_loss
    L_α  = α E[−log π(ã|s) − H̄],   H̄ = target_entropy · A                                      temperature_loss

    π actor, Q critic, Q̄ target critic, α temperature; E the mean over a minibatch of (s, a, r, s', terminated), drawn
    with replacement from the data set. A the numbers in an action, N is num_actions, c is cql_alpha.
    Ẑ estimates Z(s) = ∫ exp Q(s, a) da over the box: each action counts 1 / the density that it was drawn from. The
    third kind is drawn at s' and judged at s. log Z − Q(s, a) is the negative log-likelihood of the data's action under
    the softmax of Q, so c pushes Q down where it is large and up at the actions of the data.
    a lies in [−1, 1]^A: the data's actions, with the box of the environment shrunk to that.

    train_step   updates_per_step times: draw a minibatch, one step of Adam on L_Q, one of Q̄ with the new Q, one on L_π
                 with the new Q and the old α, one on L_α with the log π of L_π

Ends: at a time limit (truncated) y bootstraps from s', at any other end (terminated) it is r.
Random: first weights (actor_key, critic_key, temperature_key), minibatches (sample_key), a' (next_key), u, ã and ã' of
L_Q (partition_key), ã of L_π (actor_key).
Departures from the authors' code: L_Q has the paper's ½, theirs has none, so its weight 10 is c = 5 here; actor and
temperature take their steps after the critic, there before it; the actor never imitates the data first, theirs does for
40,000 updates; 1/(3N) is left out there, which changes no gradient. As in that code y has no entropy of π. The form
that learns c (Lagrange) is not here. Weights start orthogonal (√2, last layers 1).
Kept: `Run`: agent (networks, optimisers, target critic, log α), clock. The data are not in it.
Decides: the data; cql_alpha, against the scale of the rewards; actor_lr.
Cost: an update at hidden_dims (256, 256, 256), batch_size 256, num_actions 10 and HalfCheetah's sizes takes 14 GFLOP:
97 forward passes of both critics, where a gradient counts as two; 93 of them are L_Q's over 3 · 10 + 1 actions. Steps
of an environment are taken in evaluation only.
Expect: −243 on Pendulum from data with return −923, IQM of 8 seeds, after 10,000 updates with configs/cql_pendulum.py.
385 s for all seeds on 2 CPU cores.
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
from core.config import count, fraction, nonnegative, number, positive, rising
from core.envs import Box, require
from core.networks import MLP, TanhNormal, ensemblize, flat
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
        hidden_dims=count((256, 256, 256)),
        lr=positive(3e-4),  # of the critic
        actor_lr=positive(3e-5),  # of actor and temperature
        discount=fraction(0.99),  # γ
        tau=fraction(0.005),  # τ
        cql_alpha=nonnegative(5.0),  # c
        num_actions=count(10),  # N, of each of the three kinds
        init_temperature=positive(1.0),  # α at the start
        target_entropy=number(-1.0),  # H̄ of one dimension of the action
        log_std_bounds=rising((-10.0, 2.0)),
    ))


class Actor(nn.Module):
    action_dim: int
    hidden_dims: tuple[int, ...]
    log_std_bounds: tuple[float, float]

    @nn.compact
    def __call__(self, obs):  # (B, ...) -> distribution over (B, A)
        mean, log_std = jnp.split(MLP((*self.hidden_dims, 2 * self.action_dim))(flat(obs)), 2, axis=-1)
        return TanhNormal(mean, jnp.clip(log_std, *self.log_std_bounds))


class Critic(nn.Module):
    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):  # (B, ...), (B, A) -> (2, B)
        return ensemblize(MLP, 2)((*self.hidden_dims, 1))(flat((obs, action))).squeeze(-1)


class Temperature(nn.Module):
    init_value: float

    @nn.compact
    def __call__(self):  # -> ()
        return jnp.exp(self.param("log", nn.initializers.constant(jnp.log(self.init_value)), ()))


class Agent(struct.PyTreeNode):
    actor: TrainState
    critic: TrainState
    target_critic: TrainState
    temperature: TrainState
    action_space: Box = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs, action_space, config):
        actor_key, critic_key, temperature_key = jax.random.split(key, 3)
        action = jnp.zeros((1, *action_space.shape))
        actor = Actor(action.shape[-1], config.hidden_dims, config.log_std_bounds)
        actor_tx, tx = optax.adam(config.actor_lr), optax.adam(config.lr)
        critic = TrainState.create(Critic(config.hidden_dims), critic_key, obs, action, tx=tx)
        return cls(TrainState.create(actor, actor_key, obs, tx=actor_tx), critic, critic.target(),
                   TrainState.create(Temperature(config.init_temperature), temperature_key, tx=actor_tx),
                   action_space, config)

    def critic_loss(self, params, batch, key):
        next_key, partition_key = jax.random.split(key)
        next_action, _ = self.actor(batch["next_obs"]).sample_and_log_prob(next_key)
        next_v = self.target_critic(batch["next_obs"], next_action).min(axis=0)
        target = batch["reward"] + self.config.discount * (1.0 - batch["terminated"]) * next_v
        q = self.critic(batch["obs"], batch["action"], params=params)
        error = 0.5 * jnp.square(q - target[None]).mean(axis=1)
        gap = (self.log_partition(params, batch, partition_key) - q).mean(axis=1)
        loss = (error + self.config.cql_alpha * gap).sum()
        return loss, dict(critic_loss=loss, q=q.mean(), gap=gap.mean())

    def log_partition(self, params, batch, key):
        """(2, B) log Ẑ, of both critics."""
        uniform_key, *policy_keys = jax.random.split(key, 3)
        shape = (self.config.num_actions, *batch["action"].shape)  # (N, B, A)
        actions = [jax.random.uniform(uniform_key, shape, minval=-1.0, maxval=1.0)]
        log_densities = [jnp.full(shape[:-1], -shape[-1] * jnp.log(2.0))]
        for name, policy_key in zip(("obs", "next_obs"), policy_keys, strict=True):
            dist = self.actor(batch[name])
            action, log_prob = jax.vmap(dist.sample_and_log_prob)(jax.random.split(policy_key, shape[0]))
            actions.append(action)
            log_densities.append(log_prob)
        q = jax.vmap(lambda action: self.critic(batch["obs"], action, params=params), out_axes=1)(
            jnp.concatenate(actions))  # (2, 3N, B)
        log_ratio = q - jnp.concatenate(log_densities)[None]
        return jax.nn.logsumexp(log_ratio, axis=1) - jnp.log(log_ratio.shape[1])

    def actor_loss(self, params, batch, key):
        action, log_prob = self.actor(batch["obs"], params=params).sample_and_log_prob(key)
        q = self.critic(batch["obs"], action).min(axis=0)
        loss = (self.temperature() * log_prob - q).mean()
        return loss, dict(actor_loss=loss, entropy=-log_prob.mean())

    def temperature_loss(self, params, entropy):
        temperature = self.temperature(params=params)
        target_entropy = self.config.target_entropy * self.action_space.shape[0]
        return temperature * (entropy - target_entropy), dict(temperature=temperature)

    def update(self, batch, key):  # leaves (B, ...)
        critic_key, actor_key = jax.random.split(key)
        critic, critic_info = self.critic.minimize(self.critic_loss, batch, critic_key)
        agent = self.replace(critic=critic, target_critic=self.target_critic.track(critic, self.config.tau))
        actor, actor_info = agent.actor.minimize(agent.actor_loss, batch, actor_key)
        temperature, info = agent.temperature.minimize(agent.temperature_loss, actor_info["entropy"])
        return agent.replace(actor=actor, temperature=temperature), critic_info | actor_info | info


class Run(NamedTuple):
    agent: Agent
    clock: Clock


def init(key, source, config):
    require(source, config, actions=(Box,), bounded=True)
    one = jax.tree.map(lambda x: x[:1], source.data["obs"])
    return Run(Agent.create(key, one, source.action_space, config), Clock.start())


def train_step(run, key, source, config):
    def update(agent, key):
        sample_key, update_key = jax.random.split(key)
        batch = source.sample(sample_key, config.batch_size)
        centre, half = (jnp.broadcast_to(x, batch["action"].shape) for x in source.action_space.scale)
        return agent.update(batch | dict(action=(batch["action"] - centre) / half), update_key)

    agent, info = jax.lax.scan(update, run.agent, jax.random.split(key, config.updates_per_step))
    run = run._replace(agent=agent, clock=run.clock.tick(updates=config.updates_per_step))
    return run, jax.tree.map(jnp.mean, info)


def act(run, carry, obs, key):
    """The mode of π, in the environment's units. Nothing is carried between steps."""
    return (), run.agent.action_space.from_unit(run.agent.actor(obs).mode())
