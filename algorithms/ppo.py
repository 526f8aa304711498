"""Proximal Policy Optimization (Schulman et al., 2017, arXiv:1707.06347).

    A_t  = Σ_l (γλ)^l δ_{t+l},   δ_t = r_t + γ·mask·V(s'_t) − V(s_t)              core.returns.gae   (Eq. 11, 12)
    r(θ) = π_θ(a|s) / π_old(a|s)
    L_π  = −E[min(r A, clip(r, 1−ε, 1+ε) A)]                                      loss               (Eq. 7)
    L_V  = ½ E[max((V − G)², (V_old + clip(V − V_old, −ε, ε) − G)²)],  G = A + V_old
    L    = L_π + c_V L_V − c_H E[H(π(·|s))]                                       loss               (Eq. 9)

    π actor, V critic, s' true successor (next_obs), mask = 1 − terminated: a time limit bootstraps with V(s').

Departures: advantages are standardised per minibatch; the value loss is clipped; Adam's ε = 1e-5, the learning rate
falls linearly to zero, gradients are clipped by global norm (Engstrom et al., 2020; Huang et al., 2022).
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

from core.envs import Discrete
from core.networks import MLP
from core.normalize import RewardScale, RunningMeanStd
from core.returns import gae
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="gymnax/CartPole-v1",
        num_envs=4,
        num_steps=128,  # T, steps of every env in one rollout
        env_steps=500_000,  # the budget of one seed, over all its envs
        eval_every=50_000,  # env steps between evaluations
        eval_episodes=64,
        hidden_dims=(64, 64),
        lr=2.5e-4,
        anneal_lr=True,  # linearly to 0 at the end of the budget
        max_grad_norm=0.5,
        discount=0.99,  # γ
        gae_lambda=0.95,  # λ
        num_epochs=4,
        num_minibatches=4,
        clip=0.2,  # ε
        value_coef=0.5,  # c_V
        entropy_coef=0.01,  # c_H
        normalize_obs=False,
        normalize_reward=False,
    ))


class ActorCritic(nn.Module):
    """Two networks under one optimiser, so that the gradient's norm is clipped over both."""

    action_space: Any
    hidden_dims: tuple[int, ...]

    def setup(self):
        discrete = isinstance(self.action_space, Discrete)
        outputs = self.action_space.n if discrete else self.action_space.shape[0]
        self.policy = MLP((*self.hidden_dims, outputs), nn.tanh, final_scale=0.01)
        self.log_std = None if discrete else self.param("log_std", nn.initializers.zeros, (outputs,))
        self.value = MLP((*self.hidden_dims, 1), nn.tanh)

    def actor(self, obs):  # (B, ...) -> distribution over (B,) or (B, A)
        out = self.policy(obs.reshape(obs.shape[0], -1))
        if self.log_std is None:
            return distrax.Categorical(logits=out)
        return distrax.MultivariateNormalDiag(out, jnp.broadcast_to(jnp.exp(self.log_std), out.shape))

    def critic(self, obs):  # (B, ...) -> (B,)
        return self.value(obs.reshape(obs.shape[0], -1)).squeeze(-1)

    def __call__(self, obs):
        return self.actor(obs), self.critic(obs)


class Agent(struct.PyTreeNode):
    net: TrainState
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs, action_space, config):
        updates = config.env_steps // (config.num_envs * config.num_steps) * config.num_epochs * config.num_minibatches
        lr = optax.linear_schedule(config.lr, 0.0, updates) if config.anneal_lr else config.lr
        tx = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), optax.adam(lr, eps=1e-5))
        return cls(TrainState.create(ActorCritic(action_space, config.hidden_dims), key, obs, tx=tx), config)

    def loss(self, params, batch):
        dist, value = self.net(batch["obs"], params=params)
        ratio = jnp.exp(dist.log_prob(batch["action"]) - batch["log_prob"])
        advantage = (batch["advantage"] - batch["advantage"].mean()) / (batch["advantage"].std() + 1e-8)
        clipped_ratio = jnp.clip(ratio, 1 - self.config.clip, 1 + self.config.clip)
        actor_loss = -jnp.minimum(ratio * advantage, clipped_ratio * advantage).mean()
        clipped_value = batch["value"] + jnp.clip(value - batch["value"], -self.config.clip, self.config.clip)
        error = jnp.maximum(jnp.square(value - batch["target"]), jnp.square(clipped_value - batch["target"]))
        value_loss = 0.5 * error.mean()
        entropy = dist.entropy().mean()
        loss = actor_loss + self.config.value_coef * value_loss - self.config.entropy_coef * entropy
        return loss, {"actor_loss": actor_loss, "value_loss": value_loss, "entropy": entropy}

    def update(self, batch, key):  # leaves (T·E, ...)
        """`num_epochs` passes over the batch, each in `num_minibatches` gradient steps and a fresh order."""
        def minibatch(net, index):
            return net.minimize(self.loss, jax.tree.map(lambda x: x[index], batch))

        def epoch(net, key):
            order = permutation(key, batch["advantage"].shape[0])
            return jax.lax.scan(minibatch, net, order.reshape(self.config.num_minibatches, -1))

        net, info = jax.lax.scan(epoch, self.net, jax.random.split(key, self.config.num_epochs))
        return self.replace(net=net), jax.tree.map(jnp.mean, info)


class Run(NamedTuple):
    agent: Agent
    env_state: Any
    obs: jax.Array


def init(key, env, config):
    env_key, agent_key = jax.random.split(key)
    env_state, obs = env.reset(env_key)
    return Run(Agent.create(agent_key, obs, env.action_space, config), env_state, obs)


def collect(run, key, env, config):
    """A rollout of `num_steps` steps: leaves (T, E, ...)."""
    def step(run, key):
        act_key, env_key = jax.random.split(key)
        dist = run.agent.net(run.obs, method="actor")
        action = dist.sample(seed=act_key)
        env_state, ts = env.step(env_key, run.env_state, action)
        return run._replace(env_state=env_state, obs=ts.obs), (run.obs, action, dist.log_prob(action), ts)

    return jax.lax.scan(step, run, jax.random.split(key, config.num_steps))

def permutation(key,n):
    b=max(1,(n-1).bit_length())
    return (jnp.sort((jax.random.bits(key,(n,),'uint32')<<b)|jnp.arange(n,dtype='uint32')) & ((1<<b)-1)).astype(jnp.int32)

def train_step(run, key, env, config):
    rollout_key, update_key = jax.random.split(key)
    run, (obs, action, log_prob, step) = collect(run, rollout_key, env, config)
    T,E=step.reward.shape
    value = lambda x: run.agent.net(x.reshape(T*E, *x.shape[2:]), method="critic").reshape(T,E)
    v=value(obs)
    advantage = gae(step.reward, v, value(step.next_obs), step.terminated, step.truncated, config.discount, config.gae_lambda)
    batch = dict(obs=obs, action=action, log_prob=log_prob, value=v, advantage=advantage, target=advantage+v)
    agent, info = run.agent.update(jax.tree.map(lambda x: x.reshape(T*E,*x.shape[2:]), batch), update_key)
    return run._replace(agent=agent), info | dict(episode=jax.tree.map(jnp.sum, step.info["episode"]))


def act(run, carry, obs, key):
    """Greedy, and reactive: nothing to carry between steps."""
    return (), run.agent.net(obs, method="actor").mode()
