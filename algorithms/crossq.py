"""CrossQ: SAC without a target network, with batch normalisation (Bhatt et al., 2024, arXiv:1902.05605).
Child of sac.py; the diff is the method.

    (q, q') = Q_i((s, a); (s', a')),   a' ~ π(·|s')       one pass over both halves of 2 B rows    critic_loss
    y    = r + γ (1 − terminated) [min_i q'_i − α log π(a'|s')],   no gradient through y           critic_loss
    L_Q  = Σ_i ½ E[(q_i − y)²]                             i = 1, 2                                critic_loss
    L_π  = E[α log π(ã|s) − min_i Q_i(s, ã)],   ã = tanh(μ(s) + σ(s) ε),  ε ~ N(0, I)              actor_loss
    L_α  = α E[−log π(ã|s) − H̄],   H̄ = target_entropy · dim(A)                                     temperature_loss

    Q and π normalise what goes into each of their layers (Ioffe, 2017, arXiv:1702.03275):         BatchRenorm

    train   x̂ = (x − m_B) / s_B · r + d,   r = clip(s_B / s, 1/r_max, r_max),   d = clip((m_B − m) / s, −d_max, d_max)
            m <- μ m + (1 − μ) m_B,   s² <- μ s² + (1 − μ) s_B²            no gradient through r and d
    act     x̂ = (x − m) / s
    then    γ̂ x̂ + β̂

    π actor, Q critic, α temperature; E the mean over a minibatch of (s, a, r, s', terminated), drawn with replacement
    from the buffer. a, a', ã lie in (−1, 1)^A; the environment gets them stretched to its box. m_B, s_B mean and
    deviation of the rows of a batch; m, s running ones; γ̂, β̂ learnt; μ norm_momentum. Q is in train mode in L_Q, π in
    L_π, and each moves its m, s there; everywhere else both are in act mode. Until a layer has had
    renorm_after passes in train mode, r = 1 and d = 0: plain batch normalisation. No run of 100k updates leaves it.

    init         random_steps steps of random actions, uniform over the box
    train_step   num_steps times, in every environment: a ~ π(·|s), step, store
                 num_envs · num_steps · updates_per_step times: draw a minibatch, one step of Adam on L_Q; each
                 policy_delay-th time one on L_π with the new Q and the old α, one on L_α with the log π of L_π

Ends: the buffer keeps the true successor s', also where an episode ended. At a time limit y bootstraps from it, at any
other end the target is r. The next episode starts by itself.
Random: first weights (agent_key), start states (reset_key, env_key), random actions and those of π (act_key),
minibatches (sample_key), a' (critic_key), ã (actor_key).
Departures from the authors' code: weights start orthogonal (√2, in last layers 1); log σ is at least −10, theirs −20; α
has Adam's β₁ = 0.5, too, theirs 0.9. The critics of the configs are narrower than 2048, so that a CPU can train them.
Kept: `Run`: agent (networks with their m and s, optimisers, log α, number of updates), buffer, environments and their
observations, clock. A checkpoint holds `Run`, the number of the iteration and the sums since the last row of the log.
No key is kept: the launcher makes one from the seed and that number. Simulators of Gymnasium start new episodes.
Decides, after the paper (none of them was measured here): critic_dims; lr; norm_momentum.
Cost: an update with critic_dims (256, 256) and batch_size 256 takes 0.6 GFLOP, as much as one of SAC: the critic's pass
has twice the rows, and π learns every third time. With (2048, 2048) it takes 29 GFLOP.
Expect: configs/crossq_half_cheetah.py: 7,665 after 100k steps with critics 256 wide (4 seeds); SAC has 5,178.
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
from core.envs import Box, repeat, require
from core.evaluation import any_of
from core.networks import TanhNormal, ensemblize, flat, orthogonal
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="gymnax/Pendulum-v1",
        num_envs=count(1),
        num_steps=count(1),  # of every env between two rounds of updates
        updates_per_step=count(1),  # of one env
        env_steps=count(20_000),  # the budget of one seed, over all its envs, random_steps included
        random_steps=whole(1000),  # over all envs, before the first update
        eval_every=count(2000),
        eval_episodes=count(32),
        buffer_size=count(1_000_000),  # transitions
        batch_size=count(256),
        hidden_dims=count((256, 256)),  # of the actor
        critic_dims=count((2048, 2048)),
        lr=positive(1e-3),  # of actor, critic and temperature
        adam_b1=fraction(0.5),
        policy_delay=count(3),  # updates of the critic to one of the actor
        discount=fraction(0.99),  # γ
        norm_momentum=fraction(0.99),  # μ
        renorm_after=whole(100_000),  # passes
        r_max=positive(3.0),
        d_max=positive(5.0),
        init_temperature=positive(1.0),  # α at the start
        target_entropy=number(-1.0),  # H̄ of one dimension of the action
        log_std_bounds=rising((-10.0, 2.0)),
    ))


class Stats(NamedTuple):
    """Of one layer's inputs. With two critics each leaf is (2, ...)."""

    mean: jax.Array  # m (D,)
    var: jax.Array  # s² (D,)
    passes: jax.Array  # ()

    @classmethod
    def create(cls, dim):
        return cls(jnp.zeros(dim), jnp.ones(dim), jnp.int32(0))


class BatchRenorm(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, x, stats, train):  # (B, D) -> (B, D), stats
        std = jnp.sqrt(stats.var + 1e-3)
        if train:
            mean, var = x.mean(axis=0), x.var(axis=0)
            batch_std, on = jnp.sqrt(var + 1e-3), stats.passes >= self.config.renorm_after
            r = jnp.clip(batch_std / std, 1 / self.config.r_max, self.config.r_max)
            d = jnp.clip((mean - stats.mean) / std, -self.config.d_max, self.config.d_max)
            r, d = (jax.lax.stop_gradient(v)[None] for v in (jnp.where(on, r, 1.0), jnp.where(on, d, 0.0)))
            x = (x - mean[None]) / batch_std[None] * r + d
            keep = self.config.norm_momentum
            stats = Stats(keep * stats.mean + (1 - keep) * mean, keep * stats.var + (1 - keep) * var, stats.passes + 1)
        else:
            x = (x - stats.mean[None]) / std[None]
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return x * scale[None] + bias[None], stats


class NormedMLP(nn.Module):
    dims: tuple[int, ...]
    config: Any

    @nn.compact
    def __call__(self, x, stats, train):  # (B, I) -> (B, dims[-1]), stats
        moved = []
        for dim, layer in zip(self.dims, stats, strict=True):
            x, layer = BatchRenorm(self.config)(x, layer, train)
            moved.append(layer)
            last = len(moved) == len(self.dims)
            x = nn.Dense(dim, kernel_init=orthogonal(1.0 if last else 2**0.5))(x)
            x = x if last else nn.relu(x)
        return x, jax.lax.stop_gradient(tuple(moved))


class Actor(nn.Module):
    action_dim: int
    config: Any

    @nn.compact
    def __call__(self, obs, stats, train=False):  # (B, ...) -> distribution over (B, A), stats
        out, stats = NormedMLP((*self.config.hidden_dims, 2 * self.action_dim), self.config)(flat(obs), stats, train)
        mean, log_std = jnp.split(out, 2, axis=-1)
        return TanhNormal(mean, jnp.clip(log_std, *self.config.log_std_bounds)), stats


class Critic(nn.Module):
    config: Any

    @nn.compact
    def __call__(self, obs, action, stats, train=False):  # (B, ...), (B, A) -> (2, B), stats
        critics = ensemblize(NormedMLP, 2, in_axes=(None, 0, None))((*self.config.critic_dims, 1), self.config)
        q, stats = critics(flat((obs, action)), stats, train)
        return q.squeeze(-1), stats


class Temperature(nn.Module):
    init_value: float

    @nn.compact
    def __call__(self):  # -> ()
        return jnp.exp(self.param("log", nn.initializers.constant(jnp.log(self.init_value)), ()))


class Agent(struct.PyTreeNode):
    actor: TrainState
    critic: TrainState
    temperature: TrainState
    actor_stats: tuple[Stats, ...]  # of each layer
    critic_stats: tuple[Stats, ...]
    updates: jax.Array  # of the critic
    action_space: Box = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs, action_space, config):
        actor_key, critic_key, temperature_key = jax.random.split(key, 3)
        action = jnp.zeros((config.num_envs, *action_space.shape))
        inputs = flat(obs).shape[-1]
        actor_stats = tuple(map(Stats.create, (inputs, *config.hidden_dims)))
        critic_stats = tuple(map(Stats.create, (inputs + action.shape[-1], *config.critic_dims)))
        critic_stats = repeat(critic_stats, 2)
        tx = optax.adam(config.lr, b1=config.adam_b1)
        return cls(TrainState.create(Actor(action.shape[-1], config), actor_key, obs, actor_stats, tx=tx),
                   TrainState.create(Critic(config), critic_key, obs, action, critic_stats, tx=tx),
                   TrainState.create(Temperature(config.init_temperature), temperature_key, tx=tx),
                   actor_stats, critic_stats, jnp.int32(0), action_space, config)

    def policy(self, obs):  # in act mode
        return self.actor(obs, self.actor_stats)[0]

    def critic_loss(self, params, batch, key):
        next_action, next_log_prob = self.policy(batch["next_obs"]).sample_and_log_prob(key)
        obs = jax.tree.map(lambda *x: jnp.concatenate(x), batch["obs"], batch["next_obs"])
        action = jnp.concatenate([batch["action"], next_action])
        both, stats = self.critic(obs, action, self.critic_stats, train=True, params=params)
        q, next_q = jnp.split(both, 2, axis=1)
        next_v = next_q.min(axis=0) - self.temperature() * next_log_prob
        target = batch["reward"] + self.config.discount * (1.0 - batch["terminated"]) * next_v
        loss = 0.5 * jnp.square(q - jax.lax.stop_gradient(target)[None]).mean(axis=1).sum()
        return loss, (stats, dict(critic_loss=loss, q=q.mean(), entropy=-next_log_prob.mean()))

    def actor_loss(self, params, batch, key):
        dist, stats = self.actor(batch["obs"], self.actor_stats, train=True, params=params)
        action, log_prob = dist.sample_and_log_prob(key)
        q = self.critic(batch["obs"], action, self.critic_stats)[0].min(axis=0)
        loss = (self.temperature() * log_prob - q).mean()
        return loss, (stats, -log_prob.mean())

    def temperature_loss(self, params, entropy):
        target_entropy = self.config.target_entropy * self.action_space.shape[0]
        return self.temperature(params=params) * (entropy - target_entropy), ()

    def update(self, batch, key):  # leaves (B, ...)
        critic_key, actor_key = jax.random.split(key)
        critic, (stats, info) = self.critic.minimize(self.critic_loss, batch, critic_key)
        agent = self.replace(critic=critic, critic_stats=stats, updates=self.updates + 1)
        # Seeds count alike, so the answer of one is that of all, and under their vmap `cond` stays a branch.
        due = any_of(agent.updates % self.config.policy_delay == 0)
        agent = jax.lax.cond(due, lambda: agent.update_actor(batch, actor_key), lambda: agent)
        return agent, info | dict(temperature=agent.temperature())

    def update_actor(self, batch, key):
        actor, (stats, entropy) = self.actor.minimize(self.actor_loss, batch, key)
        temperature, _ = self.temperature.minimize(self.temperature_loss, entropy)
        return self.replace(actor=actor, actor_stats=stats, temperature=temperature)


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
    return run.agent.policy(run.obs).sample_and_log_prob(key)[0]


def act(run, carry, obs, key):
    """The mode of π, in the environment's units. Nothing is carried between steps."""
    return (), run.agent.action_space.from_unit(run.agent.policy(obs).mode())
