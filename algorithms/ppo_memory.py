"""PPO with a memory: actor and critic read a GRU (Cho et al., 2014, arXiv:1406.1078) instead of the observation.
Child of ppo.py; the diff is the method.

    h_t   = GRU(h_{t−1}, φ(s_t)),  h_{t−1} = 0 where s_t is the first observation of an episode    ActorCritic.remember
    π(a|h_t),  V(h_t),  V(s'_t) = V(GRU(h_t, φ(s'_t)))                                 ActorCritic.actor, critic; values
    L     the loss of ppo.py, with h_1 … h_T made again from h_0 by the current weights         Agent.recall, Agent.loss

    φ an MLP; h_0 the memory before the rollout, a constant. The gradient of a step flows back through all steps before
    it, to the start of its episode or of the rollout: backpropagation through time, not cut in between. So a minibatch
    holds whole environments, with all their steps in order.

Ends: as in ppo.py. At a time limit the memory takes in the true successor, for its value only, and then starts at 0.
Random: as in ppo.py.
Departures: those of ppo.py. π and V share φ and the GRU, and are linear in h.
Kept: `Run`: that of ppo.py, with the memory of each environment and whether an episode has just started there.
Decides: num_steps, how far gradients reach back; lr; memory_dim.
Cost: that of ppo.py, but the T steps of a rollout come one after the other in learning, too.
Expect: −100 against tit-for-tat after 160k steps, every one of 8 seeds: cooperation in all of 100 rounds. 34 s in all
on 2 CPU cores, after 25 s of compilation, with configs/ppo_memory_tft.py.
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
from core.networks import MLP, orthogonal
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
        hidden_dims=count((64, 64)),  # of φ
        memory_dim=count(32),  # of h
        lr=positive(2.5e-4),
        anneal_lr=True,  # linearly to 0 at the end of the budget
        max_grad_norm=positive(0.5),
        discount=fraction(0.99),  # γ
        gae_lambda=fraction(0.95),  # λ
        num_epochs=count(4),
        num_minibatches=count(4),  # divides num_envs
        clip=positive(0.2),  # ε, of the ratio and of the change of V
        value_coef=nonnegative(0.5),  # c_V
        entropy_coef=nonnegative(0.01),  # c_H
        init_std=positive(1.0),  # of a continuous action, in half widths of its box
        adam_eps=positive(1e-5),
        normalize_obs=False,
        normalize_reward=False,
    ))


class ActorCritic(nn.Module):
    """Two heads on one memory."""

    action_space: Any
    hidden_dims: tuple[int, ...]
    memory_dim: int
    init_std: float

    def setup(self):
        discrete = isinstance(self.action_space, Discrete)
        outputs = self.action_space.n if discrete else self.action_space.shape[0]
        self.encoder = MLP(self.hidden_dims, nn.tanh, activate_final=True)
        self.cell = nn.GRUCell(self.memory_dim, recurrent_kernel_init=orthogonal(1.0))
        self.policy = MLP((outputs,), final_scale=0.01)
        log_std = nn.initializers.constant(jnp.log(self.init_std))
        self.log_std = None if discrete else self.param("log_std", log_std, (outputs,))
        self.value = MLP((1,))

    def remember(self, memory, first, obs):  # (B, H), (B,), (B, ...) -> (B, H)
        memory = jnp.where(first[:, None], 0.0, memory)
        return self.cell(memory, self.encoder(obs.reshape(obs.shape[0], -1)))[0]

    def actor(self, memory):  # (B, H) -> distribution over (B,) or (B, A)
        out = self.policy(memory)
        if self.log_std is None:
            return distrax.Categorical(logits=out)
        centre, half = (jnp.broadcast_to(x, out.shape) for x in self.action_space.scale)  # in the env's units
        return distrax.MultivariateNormalDiag(centre + half * out, half * jnp.exp(self.log_std)[None])

    def critic(self, memory):  # (B, H) -> (B,)
        return self.value(memory).squeeze(-1)

    def __call__(self, memory, first, obs):
        memory = self.remember(memory, first, obs)
        return self.actor(memory), self.critic(memory)


class Agent(struct.PyTreeNode):
    actor_critic: TrainState
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs, action_space, config):
        batch = config.num_envs * config.num_steps
        if config.num_envs % config.num_minibatches:
            raise UserError(f"num_envs = {config.num_envs} is not divisible by num_minibatches = "
                            f"{config.num_minibatches}")
        updates = config.env_steps // batch * config.num_epochs * config.num_minibatches
        lr = optax.linear_schedule(config.lr, 0.0, updates) if config.anneal_lr else config.lr
        # One flat vector: for networks this small, the time of an optimiser step grows with the number of arrays.
        tx = optax.flatten(optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm), optax.adam(lr, eps=config.adam_eps)))
        network = ActorCritic(action_space, config.hidden_dims, config.memory_dim, config.init_std)
        memory, first = jnp.zeros((len(obs), config.memory_dim)), jnp.ones(len(obs), bool)
        return cls(TrainState.create(network, key, memory, first, obs, tx=tx), config)

    def recall(self, params, memory, first, obs):  # (B, H), (B, T), (B, T, ...) -> (B, T, H)
        def step(memory, seen):
            memory = self.actor_critic(memory, *seen, params=params, method="remember")
            return memory, memory

        return jax.lax.scan(step, memory, (first.swapaxes(0, 1), obs.swapaxes(0, 1)))[1].swapaxes(0, 1)

    def loss(self, params, batch):
        memory = self.recall(params, batch["memory"], batch["first"], batch["obs"])
        batch = {k: batch[k].reshape(-1, *batch[k].shape[2:]) for k in ("action", "log_prob", "value", "advantage")}
        memory = memory.reshape(-1, memory.shape[-1])
        dist = self.actor_critic(memory, params=params, method="actor")
        value = self.actor_critic(memory, params=params, method="critic")
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

    def update(self, batch, key):  # leaves (E, T, ...), of memory (E, H)
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
    memory: jax.Array  # (E, H) before obs
    first: jax.Array  # (E,) whether obs is the first one of an episode
    obs_stats: RunningMeanStd  # updated at the end of train_step, so that one iteration uses one set
    reward_scale: RewardScale  # updated by a rollout before its rewards are scaled


def init(key, source, config):
    require(source, config)
    env_key, agent_key = jax.random.split(key)
    env_state, obs = source.reset(env_key)
    agent = Agent.create(agent_key, obs, source.action_space, config)
    memory, first = jnp.zeros((len(obs), config.memory_dim)), jnp.ones(len(obs), bool)
    return Run(agent, Clock.start(), env_state, obs, memory, first, RunningMeanStd.create(obs[0]),
               RewardScale.create((source.num_envs,)))


def train_step(run, key, source, config):
    """A rollout of `num_steps` in every env, then `update`."""
    rollout_key, update_key = jax.random.split(key)
    before = run.memory
    run, (obs, first, memory, action, log_prob, step) = rollout(run, rollout_key, source, config)
    reward = step.reward
    if config.normalize_reward:
        run = run._replace(reward_scale=run.reward_scale.update(reward, ended(step), config.discount))
        reward = run.reward_scale(reward)

    # The critic is not needed to act: it evaluates the whole rollout at once.
    value, next_value = values(run, memory, step.next_obs)
    advantage = gae(reward, value, next_value, step.terminated, step.truncated, config.discount, config.gae_lambda)
    batch = dict(obs=normalize(run, obs), first=first, action=action, log_prob=log_prob, value=value,
                 advantage=advantage)
    batch = jax.tree.map(lambda x: x.swapaxes(0, 1), batch) | dict(memory=before)
    agent, info = run.agent.update(batch, update_key)
    if config.normalize_obs:
        run = run._replace(obs_stats=run.obs_stats.update(obs))
    clock = run.clock.tick(config.num_envs * config.num_steps, config.num_epochs * config.num_minibatches)
    explained = 1 - advantage.var() / ((advantage + value).var() + 1e-8)  # of the targets' variance
    info |= dict(explained_variance=explained, episode=jax.tree.map(jnp.sum, step.info["episode"]))
    return run._replace(agent=agent, clock=clock), info


def rollout(run, key, source, config):  # -> run, leaves (T, E, ...)
    def env_step(run, keys):
        act_key, env_key = keys
        memory = run.agent.actor_critic(run.memory, run.first, normalize(run, run.obs), method="remember")
        dist = run.agent.actor_critic(memory, method="actor")
        action = dist.sample(seed=act_key)
        env_state, step = source.step(env_key, run.env_state, action)
        out = run.obs, run.first, memory, action, dist.log_prob(action), step
        return run._replace(env_state=env_state, obs=step.obs, memory=memory, first=ended(step)), out

    return jax.lax.scan(env_step, run, jax.random.split(key, (config.num_steps, 2)))


def normalize(run, obs):
    return run.obs_stats(obs) if run.agent.config.normalize_obs else obs


def values(run, memory, next_obs):  # (T, E, H), (T, E, ...) -> (T, E) of the observations, and of their successors
    flat = memory.reshape(-1, memory.shape[-1])
    seen = normalize(run, next_obs).reshape(-1, *next_obs.shape[2:])
    after = run.agent.actor_critic(flat, jnp.zeros(len(flat), bool), seen, method="remember")
    return [run.agent.actor_critic(x, method="critic").reshape(memory.shape[:2]) for x in (flat, after)]


def initial_carry(run, num_envs):
    return jnp.zeros((num_envs, run.agent.config.memory_dim))


def act(run, carry, obs, key):
    """The most likely action. The carry is the memory, zero at the start of an episode."""
    first = jnp.zeros(len(obs), bool)
    memory = run.agent.actor_critic(carry, first, normalize(run, obs), method="remember")
    return memory, run.agent.actor_critic(memory, method="actor").mode()
