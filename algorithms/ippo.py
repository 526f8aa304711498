"""Independent PPO: PPO for each of N agents (de Witt et al., 2020, arXiv:2011.09533).
Child of ppo.py; the diff is the method.

Every agent learns from its own observations and rewards; the other agents are a part of the environment. For each:

    δ_t  = r_t + γ (1 − terminated_t) V(o'_t) − V(o_t)                                        core.returns.gae
    A_t  = δ_t + γλ (1 − terminated_t)(1 − truncated_t) A_{t+1},   0 after the rollout        core.returns.gae
    r(θ) = π_θ(a|o) / π_old(a|o)
    L_π  = −E[min(r Ã, clip(r, 1−ε, 1+ε) Ã)]                                                  Agent.loss
    L_V  = ½ E[max((V − G)², (V_old + clip(V − V_old, −ε, ε) − G)²)],  G = A + V_old          Agent.loss
    L    = L_π + c_V L_V − c_H E[H(π(·|o))]                                                   Agent.loss

    π the agent's actor, V its critic; π_old, V_old those that made the rollout; o' next_obs, the true successor; Ã is A
    standardised over the minibatch, G uses A itself. At a time limit (truncated) a step bootstraps with V(o'), at any
    other end (terminated) with 0. The environment then starts a new episode by itself. An agent may end before the
    episode does: info["agent_done"] is true from that step on, and counts as terminated; at a time limit it is false
    for all. The rows after an agent's end stay in the batch.

share_params=False   every agent has networks and an optimiser of its own: each of their arrays has a leading axis N.
                     The sum of the N losses is minimised; an agent's gradient depends on its own loss only
share_params=True    one network, which gets the agent's number as a one-hot vector; the mean of the losses is minimised
masked               the environment forbids actions: the last numbers of an observation, one for each action, are 1
                     where it is allowed. A forbidden Discrete action gets probability 0. A forbidden component of a Box
                     is drawn from N(0, 1), which changes no ratio, and the environment ignores it

Departures: the paper shares the networks, here that is an option. Compared with the PPO paper: advantages standardised
over the minibatch, for each agent by itself; the clipped value loss; Adam's ε of 1e-5; a learning rate that falls
linearly to zero; gradients clipped by global norm; orthogonal weights, 0.01 in the actor's last layer; actions without
bounds, which the environment clips. A minibatch holds the same steps of all agents. normalize_obs and normalize_reward
use statistics of each agent; the normalised values are clipped to ±10.
Kept: `Run`: networks, optimisers, clock, environments and their observations, statistics. A checkpoint holds `Run`, the
number of the iteration and the sums since the last row of the log. No key is kept: the launcher makes one from the seed
and that number.
Decides: lr (3e-4 here, 1e-3 in configs/ippo_tracking.py); num_envs · num_steps, the batch. share_params makes no
clear difference on simple_spread: after 1M steps of configs/ippo_spread.py −60.3 with it, −60.7 without.
Cost: num_steps environment steps and passes of N actors, two passes of N critics over num_envs · num_steps, then
num_epochs passes of both, forwards and backwards. All but the first take 93% of the time on multi_agent_tracking.
Expect: 1.90, the sum over six agents, on multi_agent_tracking after 100k steps with configs/ippo_tracking.py, IQM of 16
seeds. No policy earns more than 2.04.
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
        env="multi_agent_tracking",
        env_kwargs=ml_collections.ConfigDict(),  # its own settings
        num_envs=count(32),
        num_steps=count(64),  # T, steps of every env in one rollout
        env_steps=count(100_000),  # the budget of one seed, over all its envs; N agents act in each
        eval_every=count(10_000),  # env steps between evaluations
        eval_episodes=count(64),
        share_params=False,  # one network for all agents, which is told their number
        hidden_dims=count((64, 64)),
        lr=positive(3e-4),
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
    """Actor and critic: a pair for each agent, or one pair for all."""

    action_space: Any
    num_agents: int
    masked: bool
    share_params: bool
    hidden_dims: tuple[int, ...]
    init_std: float

    def setup(self):
        # One network for each agent: parameters (N, ...) meet observations (B, N, O) in one batched matmul.
        by_agent = dict(variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1, out_axes=1)
        net = MLP if self.share_params else nn.vmap(MLP, **by_agent)
        agents = () if self.share_params else (self.num_agents,)
        discrete, size = isinstance(self.action_space, Discrete), width(self.action_space)
        self.policy = net((*self.hidden_dims, size), nn.tanh, final_scale=0.01)
        log_std = nn.initializers.constant(jnp.log(self.init_std))
        self.log_std = None if discrete else self.param("log_std", log_std, (*agents, size))
        self.value = net((*self.hidden_dims, 1), nn.tanh)

    def outputs(self, net, obs):  # (B, N, ...) -> (B, N, outputs)
        obs = obs.reshape(*obs.shape[:2], -1)
        if not self.share_params:
            return net(obs)
        number = jnp.broadcast_to(jnp.eye(self.num_agents)[None], (*obs.shape[:2], self.num_agents))
        flat = jnp.concatenate([obs, number], axis=-1).reshape(-1, obs.shape[-1] + self.num_agents)
        return net(flat).reshape(*obs.shape[:2], -1)  # flat, because two batch axes take three times as long on a CPU

    def actor(self, obs):  # (B, N, O) -> distribution over (B, N) or (B, N, A)
        out = self.outputs(self.policy, obs)
        available = obs[..., -out.shape[-1]:] > 0 if self.masked else jnp.ones(out.shape, bool)
        if self.log_std is None:
            return distrax.Categorical(logits=jnp.where(available, out, -1e9))
        centre, half = (jnp.broadcast_to(x, out.shape) for x in self.action_space.scale)  # in the env's units
        mean = centre + half * out
        std = half * jnp.broadcast_to(jnp.exp(self.log_std), out.shape)
        # A forbidden component gets the same density from every policy: it changes neither ratio nor gradient.
        mean, std = jnp.where(available, mean, 0.0), jnp.where(available, std, 1.0)
        return distrax.Independent(distrax.Normal(mean, std), 1)

    def critic(self, obs):  # (B, N, O) -> (B, N)
        return self.outputs(self.value, obs).squeeze(-1)

    def __call__(self, obs):
        return self.actor(obs), self.critic(obs)


def width(space):
    return space.n if isinstance(space, Discrete) else space.shape[0]


def is_masked(source):
    return getattr(source.env, "masked", False)  # source.env: one copy of the environment


class Agent(struct.PyTreeNode):
    actor_critic: TrainState
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs, source, config):
        batch = config.num_envs * config.num_steps
        if batch % config.num_minibatches:
            raise UserError(f"num_envs * num_steps = {batch} is not divisible by num_minibatches = "
                            f"{config.num_minibatches}")
        updates = config.env_steps // batch * config.num_epochs * config.num_minibatches
        lr = optax.linear_schedule(config.lr, 0.0, updates) if config.anneal_lr else config.lr
        # One flat vector: for networks this small, the time of an optimiser step grows with the number of arrays.
        tx = optax.flatten(optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm), optax.adam(lr, eps=config.adam_eps)))
        if not config.share_params:
            tx = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
        network = ActorCritic(source.action_space, source.num_agents, is_masked(source),
                              config.share_params, config.hidden_dims, config.init_std)
        return cls(TrainState.create(network, key, obs, tx=tx), config)

    def loss(self, params, batch):  # leaves (B, N, ...)
        dist, value = self.actor_critic(batch["obs"], params=params)
        log_ratio = dist.log_prob(batch["action"]) - batch["log_prob"]
        ratio = jnp.exp(log_ratio)
        clipped_ratio = jnp.clip(ratio, 1 - self.config.clip, 1 + self.config.clip)
        advantage = batch["advantage"] - batch["advantage"].mean(axis=0, keepdims=True)
        advantage = advantage / (batch["advantage"].std(axis=0, keepdims=True) + 1e-8)
        actor_loss = -jnp.minimum(ratio * advantage, clipped_ratio * advantage).mean(axis=0)

        target = batch["advantage"] + batch["value"]
        clipped_value = batch["value"] + jnp.clip(value - batch["value"], -self.config.clip, self.config.clip)
        value_loss = 0.5 * jnp.maximum(jnp.square(value - target), jnp.square(clipped_value - target)).mean(axis=0)

        entropy = dist.entropy().mean(axis=0)
        loss = actor_loss + self.config.value_coef * value_loss - self.config.entropy_coef * entropy  # (N,)
        clipped, kl = (jnp.abs(ratio - 1) > self.config.clip).mean(), (ratio - 1 - log_ratio).mean()
        info = dict(actor_loss=actor_loss.mean(), value_loss=value_loss.mean(), entropy=entropy.mean(), clipped=clipped,
                    approx_kl=kl)
        # The gradient of a sum is each agent's own gradient; shared weights take the mean over agents.
        return loss.mean() if self.config.share_params else loss.sum(), info

    def update(self, batch, key):  # leaves (T·E, N, ...)
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
    reward_scale: RewardScale  # leaves (N, ...); updated by a rollout before its rewards are scaled


def init(key, source, config):
    require(source, config, agents=True)
    env_key, agent_key = jax.random.split(key)
    env_state, obs = source.reset(env_key)
    agent = Agent.create(agent_key, obs, source, config)
    mask_size = width(source.action_space) if is_masked(source) else 0
    obs_stats = RunningMeanStd.create(obs[0, ..., :obs.shape[-1] - mask_size])
    reward_scale = jax.vmap(lambda _: RewardScale.create((source.num_envs,)))(jnp.arange(source.num_agents))
    return Run(agent, Clock.start(), env_state, obs, obs_stats, reward_scale)


def train_step(run, key, source, config):
    """A rollout of `num_steps` in every env, then `update`."""
    rollout_key, update_key = jax.random.split(key)
    run, (obs, action, log_prob, step) = rollout(run, rollout_key, source, config)
    reward = step.reward  # (T, E, N)
    if config.normalize_reward:
        run, reward = scale(run, reward, ended(step), config)

    # The critic is not needed to act: it evaluates the whole rollout at once.
    value, next_value = critic(run, obs), critic(run, step.next_obs)
    terminated, truncated = step.terminated[..., None], step.truncated[..., None]
    terminated = terminated | step.info.get("agent_done", False)  # from an agent's end on; false at a time limit
    advantage = gae(reward, value, next_value, terminated, truncated, config.discount, config.gae_lambda)
    batch = dict(obs=normalize(run, obs), action=action, log_prob=log_prob, value=value, advantage=advantage)
    agent, info = run.agent.update(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch), update_key)
    if config.normalize_obs:
        run = run._replace(obs_stats=run.obs_stats.update(features(run, obs)))
    clock = run.clock.tick(config.num_envs * config.num_steps, config.num_epochs * config.num_minibatches)
    explained = 1 - advantage.var((0, 1)) / ((advantage + value).var((0, 1)) + 1e-8)  # of the targets' variance
    episode = jax.tree.map(lambda x: x.sum((0, 1)), step.info["episode"])
    return run._replace(agent=agent, clock=clock), info | dict(explained_variance=explained.mean(), episode=episode)


def rollout(run, key, source, config):  # -> run, leaves (T, E, ...)
    def env_step(run, keys):
        act_key, env_key = keys
        dist = run.agent.actor_critic(normalize(run, run.obs), method="actor")
        action = dist.sample(seed=act_key)
        env_state, step = source.step(env_key, run.env_state, action)
        return run._replace(env_state=env_state, obs=step.obs), (run.obs, action, dist.log_prob(action), step)

    return jax.lax.scan(env_step, run, jax.random.split(key, (config.num_steps, 2)))


def scale(run, reward, done, config):  # reward (T, E, N), each agent's by its own returns
    def one_agent(scale, reward):
        scale = scale.update(reward, done, config.discount)
        return scale, scale(reward)

    reward_scale, reward = jax.vmap(one_agent, in_axes=(0, 2), out_axes=(0, 2))(run.reward_scale, reward)
    return run._replace(reward_scale=reward_scale), reward


def features(run, obs):  # (..., N, O) without the numbers that say what is allowed
    return obs[..., :run.obs_stats.mean.shape[-1]]


def normalize(run, obs):
    if not run.agent.config.normalize_obs:
        return obs
    values = features(run, obs)
    return jnp.concatenate([run.obs_stats(values), obs[..., values.shape[-1]:]], axis=-1)


def critic(run, obs):  # (T, E, N, ...) -> (T, E, N)
    flat = normalize(run, obs).reshape(-1, *obs.shape[2:])
    return run.agent.actor_critic(flat, method="critic").reshape(obs.shape[:3])


def act(run, carry, obs, key):
    """The most likely actions. Nothing is carried between steps."""
    return (), run.agent.actor_critic(normalize(run, obs), method="actor").mode()
