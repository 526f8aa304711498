"""Advantage Alignment (Duque et al., 2024, arXiv:2406.14662), in its proximal form, for N agents.
Child of ippo.py; the diff is the method.

Each agent learns by PPO, and its advantage gets one more term. Where the game has gone well for the agent so far, the
term favours actions that are good for the others; where not, actions that are bad for them. In the prisoner's dilemma
this leads to tit-for-tat.

    A_t^i   the advantage of agent i as in ippo.py, by its own rewards and critic             core.returns.gae
    B_t^i = A_t^i standardised over the rollout, each agent by itself                         align
    W_t^i = Σ_{k<t} γ^{t−k} B_k^i,   over the steps k of the same episode and rollout         align
    Â_t^i = B_t^i + β γ W_t^i Σ_{j≠i} B_t^j                                                   align  (the paper's A*)
    L_π   = −E[min(r Ã, clip(r, 1−ε, 1+ε) Ã)],   Ã is Â standardised over the minibatch       Agent.loss
    L_V   as in ippo.py: its target is G = A + V_old                                          Agent.loss

    β alignment; r, ε, V as in ippo.py. No gradient flows through A, which the rollout gave. B_t^j tells how good the
    actions of all agents at time t were for j. It is needed in training only: to act, an agent needs its observation.

Ends: W starts at 0 in each episode, of an agent that ends earlier also there, and in each rollout. So a rollout should
hold whole episodes, as in the config here. The rest as in ippo.py.
Random: as in ippo.py.
Departures: those of ippo.py. The paper's equation has A for B: with a critic that is still far off W would be large in
all steps, and β would depend on the unit of the reward. The paper has two agents; the sum over j is that of the
authors' code for more. The authors' code divides W by t and leaves out its γ; here it is as in the paper's equation. In
the paper the policy reads the whole history by a GRU; here an agent sees the last outcome.
Kept: `Run`, as in ippo.py.
Decides: normalize_reward and lr: before the critic knows the values, W says nothing, and a policy that learns faster
than the critic ends in defection. Then alignment; num_envs · num_steps, because a product of advantages is noisy.
Cost: that of ippo.py.
Expect: −100 for both players, every round with cooperation, IQM of 10 seeds, after 640k steps in the prisoner's dilemma
of 100 rounds with configs/advantage_alignment_ipd.py, greedy. With drawn actions they cooperate in 56% of the rounds.
IPPO's players have −200. 52 s for all seeds on one busy CPU core, after 47 s of compilation.
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
        env="iterated_matrix_game",  # the prisoner's dilemma
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
        alignment=nonnegative(1.0),  # β
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
        advantage = batch["aligned"] - batch["aligned"].mean(axis=0, keepdims=True)
        advantage = advantage / (batch["aligned"].std(axis=0, keepdims=True) + 1e-8)
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
    batch["aligned"] = align(advantage, terminated | truncated, config)
    agent, info = run.agent.update(jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch), update_key)
    if config.normalize_obs:
        run = run._replace(obs_stats=run.obs_stats.update(features(run, obs)))
    clock = run.clock.tick(config.num_envs * config.num_steps, config.num_epochs * config.num_minibatches)
    explained = 1 - advantage.var((0, 1)) / ((advantage + value).var((0, 1)) + 1e-8)  # of the targets' variance
    episode = jax.tree.map(lambda x: x.sum((0, 1)), step.info["episode"])
    return run._replace(agent=agent, clock=clock), info | dict(explained_variance=explained.mean(), episode=episode)


def align(advantage, over, config):  # (T, E, N), whether an episode ended (T, E, N or 1) -> (T, E, N)
    """Every agent's advantage and, for what was before, a share in those of the others."""
    def forwards(past, step):
        own, over = step
        others = own.sum(axis=1, keepdims=True) - own
        aligned = own + config.alignment * config.discount * past * others
        return config.discount * (past + own) * (1.0 - over), aligned

    scaled = advantage - advantage.mean(axis=(0, 1), keepdims=True)
    scaled = scaled / (advantage.std(axis=(0, 1), keepdims=True) + 1e-8)
    return jax.lax.scan(forwards, jnp.zeros_like(scaled[0]), (scaled, over))[1]


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
