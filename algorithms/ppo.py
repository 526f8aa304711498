"""Proximal Policy Optimization (Schulman et al., 2017, arXiv:1707.06347).

    δ_t  = r_t + γ (1 − terminated_t) V(s'_t) − V(s_t)                                        core.returns.gae  (Eq. 12)
    A_t  = δ_t + γλ (1 − terminated_t)(1 − truncated_t) A_{t+1},   0 after the rollout        core.returns.gae  (Eq. 11)
    r(θ) = π_θ(a|s) / π_old(a|s)
    L_π  = −E[min(r Ã, clip(r, 1−ε, 1+ε) Ã)]                                                  Agent.loss        (Eq. 7)
    L_V  = ½ E[max((V − G)², (V_old + clip(V − V_old, −ε, ε) − G)²)],  G = A + V_old          Agent.loss
    L    = L_π + c_V L_V − c_H E[H(π(·|s))]                                                   Agent.loss        (Eq. 9)

    π actor, V critic; π_old, V_old those that made the rollout; s' next_obs, the true successor; Ã is A standardised
    over the minibatch, G uses A itself. At a time limit (truncated) a step bootstraps with V(s'), at any other end
    (terminated) with 0. The environment then starts a new episode by itself: step.obs is its first observation.

Departures: Ã; the value loss has a factor ½ and is clipped by the same ε; Adam's ε is 1e-5; the learning rate falls
linearly to zero (in the paper on Atari only); gradients are clipped by global norm; weights start orthogonal, of scale
√2 in hidden layers, 1 in the critic's last layer and 0.01 in the actor's (Engstrom et al., 2020; Huang et al., 2022). A
continuous action is a normal without bounds: the environment clips it, and its log-probability is that of the sample
before the clip. With normalize_obs, observations are standardised by running statistics; with normalize_reward, rewards
are divided by the running deviation of the discounted return. Both are then clipped to ±10.
Kept: `Run`: networks, optimiser, clock, environments and their observations, statistics. A checkpoint holds `Run`, the
number of the iteration and the sums since the last row of the log. No key is kept: the launcher makes one from the seed
and that number.
Decides: lr; num_envs · num_steps, the batch; on Pendulum normalize_obs and normalize_reward (configs/ppo_pendulum.py).
Cost: num_steps environment steps and passes of the actor over num_envs observations, two passes of the critic over all
num_envs · num_steps, then num_epochs passes of both, forwards and backwards, over the same. All but the first take 81%
of the time on CartPole and 93% on Breakout (one CPU core).
Expect: 500 on CartPole after 500k steps, every one of 16 seeds (30 s in all on 2 CPU cores).
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
from core.config import count, fraction, nonnegative, positive
from core.dataset import permutation
from core.envs import Discrete, ended, require
from core.errors import UserError
from core.networks import MLP
from core.normalize import RewardScale, RunningMeanStd
from core.returns import gae
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="gymnax/CartPole-v1",
        num_envs=count(4),
        num_steps=count(128),  # T, steps of every env in one rollout
        env_steps=count(500_000),  # the budget of one seed, over all its envs
        eval_every=count(50_000),  # env steps between evaluations
        eval_episodes=count(64),
        hidden_dims=count((64, 64)),
        lr=positive(2.5e-4),
        anneal_lr=True,  # linearly to 0 at the end of the budget
        max_grad_norm=positive(0.5),
        discount=fraction(0.99),  # γ
        gae_lambda=fraction(0.95),  # λ
        num_epochs=count(4),
        num_minibatches=count(4),
        clip=positive(0.2),  # ε, of the ratio and of the change of V
        value_coef=nonnegative(0.5),  # c_V
        entropy_coef=nonnegative(0.01),  # c_H
        init_std=positive(1.0),  # of a continuous action, in half widths of its box
        adam_eps=positive(1e-5),
        normalize_obs=False,
        normalize_reward=False,
    ))


class ActorCritic(nn.Module):
    """Two networks under one optimiser, so that the gradient's norm is clipped over both."""

    action_space: Any
    hidden_dims: tuple[int, ...]
    init_std: float

    def setup(self):
        discrete = isinstance(self.action_space, Discrete)
        outputs = self.action_space.n if discrete else self.action_space.shape[0]
        self.policy = MLP((*self.hidden_dims, outputs), nn.tanh, final_scale=0.01)
        log_std = nn.initializers.constant(jnp.log(self.init_std))
        self.log_std = None if discrete else self.param("log_std", log_std, (outputs,))
        self.value = MLP((*self.hidden_dims, 1), nn.tanh)

    def actor(self, obs):  # (B, ...) -> distribution over (B,) or (B, A)
        out = self.policy(obs.reshape(obs.shape[0], -1))
        if self.log_std is None:
            return distrax.Categorical(logits=out)
        centre, half = (jnp.broadcast_to(x, out.shape) for x in self.action_space.scale)  # in the env's units
        return distrax.MultivariateNormalDiag(centre + half * out, half * jnp.exp(self.log_std)[None])

    def critic(self, obs):  # (B, ...) -> (B,)
        return self.value(obs.reshape(obs.shape[0], -1)).squeeze(-1)

    def __call__(self, obs):
        return self.actor(obs), self.critic(obs)


class Agent(struct.PyTreeNode):
    actor_critic: TrainState
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs, action_space, config):
        batch = config.num_envs * config.num_steps
        if batch % config.num_minibatches:
            raise UserError(f"num_envs * num_steps = {batch} is not divisible by num_minibatches = "
                            f"{config.num_minibatches}")
        updates = config.env_steps // batch * config.num_epochs * config.num_minibatches
        lr = optax.linear_schedule(config.lr, 0.0, updates) if config.anneal_lr else config.lr
        # One flat vector: for networks this small, the time of an optimiser step grows with the number of arrays.
        tx = optax.flatten(optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm), optax.adam(lr, eps=config.adam_eps)))
        network = ActorCritic(action_space, config.hidden_dims, config.init_std)
        return cls(TrainState.create(network, key, obs, tx=tx), config)

    def loss(self, params, batch):
        dist, value = self.actor_critic(batch["obs"], params=params)
        log_ratio = dist.log_prob(batch["action"]) - batch["log_prob"]
        ratio = jnp.exp(log_ratio)
        clipped_ratio = jnp.clip(ratio, 1 - self.config.clip, 1 + self.config.clip)
        advantage = (batch["advantage"] - batch["advantage"].mean()) / (batch["advantage"].std() + 1e-8)
        actor_loss = -jnp.minimum(ratio * advantage, clipped_ratio * advantage).mean()

        target = batch["advantage"] + batch["value"]
        clipped_value = batch["value"] + jnp.clip(value - batch["value"], -self.config.clip, self.config.clip)
        value_loss = 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(clipped_value - target)).mean()

        entropy = dist.entropy().mean()
        loss = actor_loss + self.config.value_coef * value_loss - self.config.entropy_coef * entropy
        clipped, kl = (jnp.abs(ratio - 1) > self.config.clip).mean(), (ratio - 1 - log_ratio).mean()
        return loss, dict(actor_loss=actor_loss, value_loss=value_loss, entropy=entropy, clipped=clipped, approx_kl=kl)

    def update(self, batch, key):  # leaves (T·E, ...)
        """`num_epochs` passes over the batch, each in a fresh order and `num_minibatches` gradient steps."""
        def minibatch(actor_critic, index):
            return actor_critic.minimize(self.loss, jax.tree.map(lambda x: x[index], batch))

        def epoch(actor_critic, key):
            order = permutation(key, batch["advantage"].shape[0])
            return jax.lax.scan(minibatch, actor_critic, order.reshape(self.config.num_minibatches, -1))

        actor_critic, info = jax.lax.scan(epoch, self.actor_critic, jax.random.split(key, self.config.num_epochs))
        return self.replace(actor_critic=actor_critic), jax.tree.map(jnp.mean, info)


class Run(NamedTuple):
    agent: Agent
    clock: Clock
    env_state: Any
    obs: jax.Array
    obs_stats: RunningMeanStd  # updated at the end of train_step, so that one iteration uses one set
    reward_scale: RewardScale  # updated by a rollout before its rewards are scaled


def init(key, source, config):
    require(source, config)
    env_key, agent_key = jax.random.split(key)
    env_state, obs = source.reset(env_key)
    agent = Agent.create(agent_key, obs, source.action_space, config)
    return Run(agent, Clock.start(), env_state, obs, RunningMeanStd.create(obs[0]),
               RewardScale.create((source.num_envs,)))


def train_step(run, key, source, config):
    """A rollout of `num_steps` in every env, then `update`."""
    rollout_key, update_key = jax.random.split(key)
    run, (obs, action, log_prob, step) = rollout(run, rollout_key, source, config)
    reward = step.reward
    if config.normalize_reward:
        run = run._replace(reward_scale=run.reward_scale.update(reward, ended(step), config.discount))
        reward = run.reward_scale(reward)

    # The critic is not needed to act: it evaluates the whole rollout at once.
    value, next_value = critic(run, obs), critic(run, step.next_obs)
    advantage = gae(reward, value, next_value, step.terminated, step.truncated, config.discount, config.gae_lambda)
    batch = dict(obs=normalize(run, obs), action=action, log_prob=log_prob, value=value, advantage=advantage)
    agent, info = run.agent.update(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch), update_key)
    if config.normalize_obs:
        run = run._replace(obs_stats=run.obs_stats.update(obs))
    clock = run.clock.tick(config.num_envs * config.num_steps, config.num_epochs * config.num_minibatches)
    explained = 1 - advantage.var() / ((advantage + value).var() + 1e-8)  # of the targets' variance
    info |= dict(explained_variance=explained, episode=jax.tree.map(jnp.sum, step.info["episode"]))
    return run._replace(agent=agent, clock=clock), info


def rollout(run, key, source, config):  # -> run, leaves (T, E, ...)
    def env_step(run, keys):
        act_key, env_key = keys
        dist = run.agent.actor_critic(normalize(run, run.obs), method="actor")
        action = dist.sample(seed=act_key)
        env_state, step = source.step(env_key, run.env_state, action)
        return run._replace(env_state=env_state, obs=step.obs), (run.obs, action, dist.log_prob(action), step)

    return jax.lax.scan(env_step, run, jax.random.split(key, (config.num_steps, 2)))


def normalize(run, obs):
    return run.obs_stats(obs) if run.agent.config.normalize_obs else obs


def critic(run, obs):  # (T, E, ...) -> (T, E)
    flat = normalize(run, obs).reshape(-1, *obs.shape[2:])
    return run.agent.actor_critic(flat, method="critic").reshape(obs.shape[:2])


def act(run, carry, obs, key):
    """The most likely action. Nothing is carried between steps."""
    return (), run.agent.actor_critic(normalize(run, obs), method="actor").mode()
