"""Parallelised Q-network: Q(λ) without replay or target network (Gallici et al., 2025, arXiv:2407.04811).

    V(s)  = max_a Q(s, a)
    G_t   = r_t + γ (1 − terminated_t) [(1 − λ_t) V(s'_t) + λ_t G_{t+1}]                   core.returns.lambda_returns
            λ_t = λ (1 − truncated_t),  and 0 at the end of the rollout
    L     = ½ E[(Q(s, a) − G)²]                                                            Agent.loss
    a     = a random action with probability ε, else argmax_a Q(s, a)                      explore
    ε     falls linearly from init_epsilon to final_epsilon while the first share epsilon_steps of the budget is taken;
          during a rollout it is constant

    Q is a network with LayerNorm after every layer but the last; s' is next_obs, the true successor; r is reward_scale
    times the reward of the environment. V and G are computed once, before the updates: the targets of an iteration stay
    fixed, without a target network. According to the paper, the normalisation keeps Q from growing without bound.

    train_step   num_steps times, in every environment: choose a, step
                 V of all s', then G, backwards through the rollout
                 num_epochs times: shuffle the rollout, split it into num_minibatches, one step of RAdam on L for each

Ends: at a time limit (truncated) G bootstraps with V(s'), at any other end (terminated) with 0; no sum crosses an end.
The environment then starts a new episode by itself: step.obs is its first observation.
Random: first weights (agent_key), start states and steps (env_key), exploration (act_key), order of the samples
(update_key).
Departures from the authors' code: at a time limit G bootstraps from s', theirs treats it as an end; weights start
orthogonal (√2; last layer 1). As in their code: reward_scale; the learning rate falls linearly to zero; gradients are
clipped by global norm; an observation with three axes first passes through one 3x3 convolution.
Kept: `Run`: network and optimiser, clock, environments and their observations. A checkpoint holds `Run`,
the number of the iteration and the sums since the last row of the log. No key is kept: the launcher makes one from the
seed and that number.
Decides (none of them was measured here): lr; num_envs · num_steps, the samples of an iteration; trace; final_epsilon,
because this share of the actions in a rollout is random.
Cost: over the num_envs · num_steps observations of a rollout one pass to act, one for V(s'), and num_epochs passes with
gradients, which cost three each: with 4 epochs 12 of 14 passes are learning.
Expect: configs/pqn_cartpole.py: 500 after 200k steps for each of 8 seeds (7 s in all on 2 CPU cores, 3 of them to
compile).
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
from core.config import count, fraction, positive, whole
from core.dataset import permutation
from core.envs import Discrete, require
from core.errors import UserError
from core.networks import orthogonal, patches
from core.returns import lambda_returns
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="gymnax/CartPole-v1",
        num_envs=count(32),
        num_steps=count(64),  # T, steps of every env in one rollout
        env_steps=count(500_000),  # the budget of one seed, over all its envs
        eval_every=count(50_000),  # env steps between evaluations
        eval_episodes=count(64),
        hidden_dims=count((256, 256)),
        channels=whole(0),  # of the convolution; 0: none, for observations that are vectors
        lr=positive(1e-4),  # falls linearly to 0 at the end of the budget
        max_grad_norm=positive(10.0),
        discount=fraction(0.99),  # γ
        trace=fraction(0.95),  # λ
        num_epochs=count(4),
        num_minibatches=count(16),
        init_epsilon=fraction(1.0),  # ε at the start
        final_epsilon=fraction(0.2),  # after epsilon_steps
        epsilon_steps=positive(0.2),  # of the budget, in which ε falls
        reward_scale=positive(0.1),  # of the rewards that are learnt from
    ))


class QNetwork(nn.Module):
    num_actions: int
    hidden_dims: tuple[int, ...]
    channels: int

    @nn.compact
    def __call__(self, obs):  # (B, O) or (B, H, W, C) -> (B, num_actions)
        x = obs.astype(jnp.float32)
        if self.channels:
            x = nn.relu(nn.LayerNorm()(nn.Dense(self.channels, kernel_init=orthogonal(2**0.5))(patches(x))))
        x = x.reshape(len(obs), -1)
        for dim in self.hidden_dims:
            x = nn.relu(nn.LayerNorm()(nn.Dense(dim, kernel_init=orthogonal(2**0.5))(x)))
        return nn.Dense(self.num_actions, kernel_init=orthogonal(1.0))(x)


class Agent(struct.PyTreeNode):
    q: TrainState
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs, action_space, config):
        batch = config.num_envs * config.num_steps
        if batch % config.num_minibatches:
            raise UserError(f"num_envs * num_steps = {batch} is not divisible by num_minibatches = "
                            f"{config.num_minibatches}")
        if bool(config.channels) != (obs.ndim == 4):
            raise UserError(f"channels = {config.channels}, but an observation has {obs.ndim - 1} axes")
        updates = config.env_steps // batch * config.num_epochs * config.num_minibatches
        tx = optax.flatten(optax.chain(optax.clip_by_global_norm(config.max_grad_norm),
                                       optax.radam(optax.linear_schedule(config.lr, 0.0, updates))))
        return cls(TrainState.create(QNetwork(action_space.n, config.hidden_dims, config.channels), key, obs, tx=tx),
                   config)

    def loss(self, params, batch):
        q = jnp.take_along_axis(self.q(batch["obs"], params=params), batch["action"][:, None], axis=1).squeeze(1)
        loss = 0.5 * jnp.square(q - batch["target"]).mean()
        return loss, dict(loss=loss, q=q.mean())

    def update(self, batch, key):  # leaves (T·E, ...)
        def minibatch(q, index):
            return q.minimize(self.loss, jax.tree.map(lambda x: x[index], batch))

        def epoch(q, key):
            order = permutation(key, len(batch["target"]))
            return jax.lax.scan(minibatch, q, order.reshape(self.config.num_minibatches, -1))

        q, info = jax.lax.scan(epoch, self.q, jax.random.split(key, self.config.num_epochs))
        return self.replace(q=q), jax.tree.map(jnp.mean, info)


class Run(NamedTuple):
    agent: Agent
    clock: Clock
    env_state: Any
    obs: jax.Array


def init(key, source, config):
    require(source, config, actions=(Discrete,))
    env_key, agent_key = jax.random.split(key)
    env_state, obs = source.reset(env_key)
    return Run(Agent.create(agent_key, obs, source.action_space, config), Clock.start(), env_state, obs)


def train_step(run, key, source, config):
    rollout_key, update_key = jax.random.split(key)
    run, (obs, action, step) = rollout(run, rollout_key, source, config)
    next_value = value(run, step.next_obs)
    reward = config.reward_scale * step.reward
    target = lambda_returns(reward, next_value, step.terminated, step.truncated, config.discount, config.trace)
    batch = dict(obs=obs, action=action, target=target)
    agent, info = run.agent.update(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch), update_key)
    clock = run.clock.tick(config.num_envs * config.num_steps, config.num_epochs * config.num_minibatches)
    return run._replace(agent=agent, clock=clock), info | dict(episode=jax.tree.map(jnp.sum, step.info["episode"]))


def rollout(run, key, source, config):  # -> run, leaves (T, E, ...)
    def env_step(run, keys):
        act_key, env_key = keys
        action = explore(run, act_key)
        env_state, step = source.step(env_key, run.env_state, action)
        return run._replace(env_state=env_state, obs=step.obs), (run.obs, action, step)

    return jax.lax.scan(env_step, run, jax.random.split(key, (config.num_steps, 2)))


def explore(run, key):
    config = run.agent.config
    progress = jnp.clip(run.clock.env_steps / (config.epsilon_steps * config.env_steps), 0.0, 1.0)
    epsilon = config.init_epsilon + progress * (config.final_epsilon - config.init_epsilon)
    whether_key, which_key = jax.random.split(key)
    q = run.agent.q(run.obs)
    random = jax.random.randint(which_key, (len(q),), 0, q.shape[1])
    return jnp.where(jax.random.uniform(whether_key, (len(q),)) < epsilon, random, q.argmax(axis=1))


def value(run, obs):  # (T, E, ...) -> (T, E)
    return run.agent.q(obs.reshape(-1, *obs.shape[2:])).max(axis=1).reshape(obs.shape[:2])


def act(run, carry, obs, key):
    """The best action. Nothing is carried between steps."""
    return (), run.agent.q(obs).argmax(axis=1)
