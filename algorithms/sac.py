"""Soft Actor-Critic with a learnt temperature (Haarnoja et al., 2018b, arXiv:1812.05905).

    y    = r + γ (1 − terminated) [min_i Q̄_i(s', a') − α log π(a'|s')],   a' ~ π(·|s')         critic_loss      (Eq. 3)
    L_Q  = Σ_i ½ E[(Q_i(s, a) − y)²]                                     i = 1, 2              critic_loss      (Eq. 5)
    Q̄_i <- τ Q_i + (1 − τ) Q̄_i                                                                 update
    L_π  = E[α log π(ã|s) − min_i Q_i(s, ã)],   ã = tanh(μ(s) + σ(s) ε),  ε ~ N(0, I)          actor_loss       (Eq. 9)
    L_α  = α E[−log π(ã|s) − H̄],   H̄ = target_entropy · dim(A)                                 temperature_loss (Eq. 18)

    π actor, Q critic, Q̄ target critic, α temperature; E the mean over a minibatch of (s, a, r, s', terminated), drawn
    with replacement from the buffer. a, a', ã lie in (−1, 1)^A; the environment gets them stretched to its box.

    init         random_steps steps of random actions, uniform over the box
    train_step   num_steps times, in every environment: a ~ π(·|s), step, store
                 num_envs · num_steps · updates_per_step times: draw a minibatch, one step of Adam on L_Q, one of Q̄ with
                 the new Q, one on L_π with the new Q and the old α, one on L_α with the log π of L_π

Ends: the buffer keeps the true successor s', also where an episode ended. At a time limit y bootstraps from it, at any
other end the target is r. The next episode starts by itself.
Random: first weights (agent_key), start states (reset_key, env_key), random actions and those of π (act_key),
minibatches (sample_key), a' (critic_key), ã (actor_key).
Departures: Q̄ moves right after Q (in the paper at the end of the update; nothing in between uses Q̄); log σ is clipped;
Adam changes log α, not α; weights start orthogonal (√2, last layers 1).
Kept: `Run`: agent (networks, optimisers, target critic, log α), buffer, environments and their observations, clock. A
checkpoint holds `Run`, the number of the iteration and the sums since the last row of the log. No key is kept: the
launcher makes one from the seed and that number. Simulators of Gymnasium are not kept: they start new episodes.
Decides: updates_per_step; discount; target_entropy. α is learnt, so it adapts to the scale of the reward.
Cost: an update at hidden_dims (256, 256) and batch_size 256 takes 0.6 GFLOP: 6 forward
passes of both critics and 4 of the actor, where a gradient counts as two. That is 6 ms on a CPU core, about a hundred
times what a step of MuJoCo's HalfCheetah takes.
Expect: configs/sac_half_cheetah.py: 5,178 after 100k steps (6 seeds).
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
from core.config import count, fraction, number, positive, rising, whole
from core.dataset import ReplayBuffer
from core.envs import Box, require
from core.networks import MLP, TanhNormal, ensemblize, flat
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="gymnax/Pendulum-v1",
        num_envs=count(1),
        num_steps=count(1),  # of every env before the next updates
        updates_per_step=count(1),  # of one env
        env_steps=count(20_000),  # the budget of one seed, over all its envs, random_steps included
        random_steps=whole(1000),  # over all envs, before the first update
        eval_every=count(2000),
        eval_episodes=count(32),
        buffer_size=count(1_000_000),  # transitions
        batch_size=count(256),
        hidden_dims=count((256, 256)),
        lr=positive(3e-4),  # of actor, critic and temperature
        discount=fraction(0.99),  # γ
        tau=fraction(0.005),  # τ
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
        action = jnp.zeros((config.num_envs, *action_space.shape))
        actor = Actor(action.shape[-1], config.hidden_dims, config.log_std_bounds)
        tx = optax.adam(config.lr)
        critic = TrainState.create(Critic(config.hidden_dims), critic_key, obs, action, tx=tx)
        return cls(TrainState.create(actor, actor_key, obs, tx=tx), critic, critic.target(),
                   TrainState.create(Temperature(config.init_temperature), temperature_key, tx=tx),
                   action_space, config)

    def critic_loss(self, params, batch, key):
        next_action, next_log_prob = self.actor(batch["next_obs"]).sample_and_log_prob(key)
        next_q = self.target_critic(batch["next_obs"], next_action).min(axis=0)
        next_v = next_q - self.temperature() * next_log_prob
        target = batch["reward"] + self.config.discount * (1.0 - batch["terminated"]) * next_v
        q = self.critic(batch["obs"], batch["action"], params=params)
        loss = 0.5 * jnp.square(q - target[None]).mean(axis=1).sum()
        return loss, dict(critic_loss=loss, q=q.mean())

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
    buffer: ReplayBuffer  # obs, action in (−1, 1), reward, next_obs, terminated
    env_state: Any
    obs: Any  # (E, ...), or a dictionary of such
    clock: Clock


def init(key, source, config):
    require(source, config, actions=(Box,), bounded=True)
    agent_key, reset_key, play_key = jax.random.split(key, 3)
    env_state, obs = source.reset(reset_key)
    agent = Agent.create(agent_key, obs, source.action_space, config)
    one, zero = jax.tree.map(lambda x: x[0], obs), jnp.zeros(())
    example = dict(obs=one, action=jnp.zeros(source.action_space.shape), reward=zero, next_obs=one, terminated=zero)
    run = Run(agent, ReplayBuffer.create(example, config.buffer_size), env_state, obs, Clock.start())

    def explore(run, key):
        return jax.random.uniform(key, (source.num_envs, *source.action_space.shape), minval=-1.0, maxval=1.0)

    steps = config.random_steps // source.num_envs
    run, transitions, _ = play(run, play_key, source, steps, explore)
    return store(run, transitions)


def train_step(run, key, source, config):
    play_key, update_key = jax.random.split(key)
    run, transitions, episode = play(run, play_key, source, config.num_steps, sample)
    run = store(run, transitions)
    num_updates = config.num_envs * config.num_steps * config.updates_per_step

    def update(agent, keys):
        sample_key, key = keys
        return agent.update(run.buffer.sample(sample_key, config.batch_size), key)

    agent, info = jax.lax.scan(update, run.agent, jax.random.split(update_key, (num_updates, 2)))
    run = run._replace(agent=agent, clock=run.clock.tick(updates=num_updates))
    return run, jax.tree.map(jnp.mean, info) | dict(episode=episode)


def play(run, key, source, num_steps, policy):
    """-> run, the transitions (T, E, ...), the sums of info["episode"]."""
    def env_step(run, keys):
        act_key, env_key = keys
        action = policy(run, act_key)
        env_state, step = source.step(env_key, run.env_state, source.action_space.from_unit(action))
        transition = dict(obs=run.obs, action=action, reward=step.reward, next_obs=step.next_obs,
                          terminated=step.terminated.astype(jnp.float32))
        return run._replace(env_state=env_state, obs=step.obs), (transition, step.info["episode"])

    # Without the buffer: this loop would copy it.
    buffer, run = run.buffer, run._replace(buffer=())
    run, (transitions, episode) = jax.lax.scan(env_step, run, jax.random.split(key, (num_steps, 2)))
    return run._replace(buffer=buffer), transitions, jax.tree.map(jnp.sum, episode)


def store(run, transitions):
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), transitions)
    steps = len(flat["reward"])
    return run._replace(buffer=run.buffer.add(flat), clock=run.clock.tick(env_steps=steps))


def sample(run, key):
    return run.agent.actor(run.obs).sample_and_log_prob(key)[0]


def act(run, carry, obs, key):
    """The mode of π, in the environment's units. Nothing is carried between steps."""
    return (), run.agent.action_space.from_unit(run.agent.actor(obs).mode())
