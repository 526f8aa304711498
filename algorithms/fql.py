"""Flow Q-Learning: a one-step policy, close to a flow of the data and good for Q (Park et al., 2025, arXiv:2502.02538).

    L_Q  = Σ_i E[(Q_i(s, a) − y)²],   y = r + γ (1 − terminated) mean_i Q̄_i(s', a')            critic_loss
    a'   = clip(μ(s', z'), −1, 1),   z' ~ N(0, I)                                              action_of
    L_v  = E[‖v(s, x_t, t) − (a − x_0)‖² / A],   x_t = (1 − t) x_0 + t a                       flow_loss
           x_0 ~ N(0, I),   t ~ U(0, 1)
    x    <- x + v(s, x, k / K) / K   for k = 0 … K − 1, from x = z; then clip(x, −1, 1)        flow_action
    L_μ  = α E[‖μ(s, z) − flow_action(s, z)‖² / A] − E[Q(s, ã)] / E|Q(s, ã)|                   actor_loss
           ã = clip(μ(s, z), −1, 1),   z ~ N(0, I),   Q = mean_i Q_i
    Q̄_i <- τ Q_i + (1 − τ) Q̄_i                                                 i = 1, 2       update

    v flow: the vector field whose solution turns noise into an action of the data (flow matching); μ actor: the same
    in one step, moved towards larger Q; Q critic with LayerNorm, Q̄ target critic; K flow_steps, A the numbers of an
    action. E the mean over a minibatch of (s, a, r, s', terminated), drawn with replacement from the data set. No
    gradient flows into v from L_μ, nor through the E|·| that divides. a lies in [−1, 1]^A: the data's actions, with the
    box of the environment shrunk to that.

    train_step   updates_per_step times: draw a minibatch, one step of Adam on L_Q, one on L_v, one on L_μ, each with
                 the networks from before the update; one of Q̄ with the new Q

Ends: at a time limit (truncated) y bootstraps from s', at any other end (terminated) it is r.
Random: first weights (flow_key, actor_key, critic_key), minibatches (sample_key), z' (critic_key), x_0 and t
(noise_key, time_key), z of L_μ (actor_key), and z in evaluation (act's key): there, too, the policy is random.
Departures: the authors divide by E|Q| where they advise it for a new task, and not in their tables, so their α is
another one; L_Q sums over i (theirs is the mean). As in their code Q in L_μ and y is the mean of both critics (for some
of their tasks y has the smaller one). Weights start orthogonal (√2, last layers 1).
Kept: `Run`: agent (networks, optimisers, target critic), clock. The data are not in it.
Decides: the data; distill_weight, between imitation (large) and the largest Q.
Cost: an update at hidden_dims (512, 512, 512, 512), batch_size 256 and HalfCheetah's sizes takes 12 GFLOP. The flow's
10 steps are 10 forward passes, all others together 19, where a gradient counts as two. An action costs one pass.
Expect: −242 on Pendulum from data with return −923 (configs/fql_pendulum.py, 8 seeds, 7 min on 2 shared CPU cores).
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
from core.networks import MLP, ensemblize, flat
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
        hidden_dims=count((512, 512, 512, 512)),
        lr=positive(3e-4),  # of flow, actor and critic
        discount=fraction(0.99),  # γ
        tau=fraction(0.005),  # τ
        flow_steps=count(10),  # K
        distill_weight=nonnegative(1.0),  # α
    ))


class Field(nn.Module):
    action_dim: int
    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, *inputs):  # (B, ...), (B, A), and for the flow (B, 1) -> (B, A)
        return MLP((*self.hidden_dims, self.action_dim), activation=nn.gelu)(flat(inputs))


def gelu_norm(x):
    return nn.LayerNorm()(nn.gelu(x))


class Critic(nn.Module):
    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, obs, action):  # (B, ...), (B, A) -> (2, B)
        return ensemblize(MLP, 2)((*self.hidden_dims, 1), activation=gelu_norm)(flat((obs, action))).squeeze(-1)


class Agent(struct.PyTreeNode):
    flow: TrainState
    actor: TrainState
    critic: TrainState
    target_critic: TrainState
    action_space: Box = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs, action_space, config):
        flow_key, actor_key, critic_key = jax.random.split(key, 3)
        action, time = jnp.zeros((1, *action_space.shape)), jnp.zeros((1, 1))
        field, tx = Field(action.shape[-1], config.hidden_dims), optax.adam(config.lr)
        critic = TrainState.create(Critic(config.hidden_dims), critic_key, obs, action, tx=tx)
        return cls(TrainState.create(field, flow_key, obs, action, time, tx=tx),
                   TrainState.create(field, actor_key, obs, action, tx=tx),
                   critic, critic.target(), action_space, config)

    def action_of(self, obs, key):
        noise = jax.random.normal(key, (len(flat(obs)), *self.action_space.shape))
        return jnp.clip(self.actor(obs, noise), -1.0, 1.0)

    def critic_loss(self, params, batch, key):
        next_q = self.target_critic(batch["next_obs"], self.action_of(batch["next_obs"], key)).mean(axis=0)
        target = batch["reward"] + self.config.discount * (1.0 - batch["terminated"]) * next_q
        q = self.critic(batch["obs"], batch["action"], params=params)
        loss = jnp.square(q - target[None]).mean(axis=1).sum()
        return loss, dict(critic_loss=loss, q=q.mean())

    def flow_loss(self, params, batch, key):
        noise_key, time_key = jax.random.split(key)
        noise = jax.random.normal(noise_key, batch["action"].shape)
        time = jax.random.uniform(time_key, (len(noise), 1))
        between = (1.0 - time) * noise + time * batch["action"]
        velocity = self.flow(batch["obs"], between, time, params=params)
        loss = jnp.square(velocity - (batch["action"] - noise)).mean()
        return loss, dict(flow_loss=loss)

    def flow_action(self, obs, noise):
        def euler_step(step, x):
            time = jnp.full((len(x), 1), step / self.config.flow_steps)
            return x + self.flow(obs, x, time) / self.config.flow_steps

        return jnp.clip(jax.lax.fori_loop(0, self.config.flow_steps, euler_step, noise), -1.0, 1.0)

    def actor_loss(self, params, batch, key):
        noise = jax.random.normal(key, batch["action"].shape)
        action = self.actor(batch["obs"], noise, params=params)
        distance = jnp.square(action - self.flow_action(batch["obs"], noise)).mean()
        q = self.critic(batch["obs"], jnp.clip(action, -1.0, 1.0)).mean(axis=0)
        scale = jax.lax.stop_gradient(jnp.abs(q).mean())
        loss = self.config.distill_weight * distance - q.mean() / scale
        return loss, dict(actor_loss=loss, distance=distance)

    def update(self, batch, key):  # leaves (B, ...)
        critic_key, flow_key, actor_key = jax.random.split(key, 3)
        critic, critic_info = self.critic.minimize(self.critic_loss, batch, critic_key)
        flow, flow_info = self.flow.minimize(self.flow_loss, batch, flow_key)
        actor, actor_info = self.actor.minimize(self.actor_loss, batch, actor_key)
        target_critic = self.target_critic.track(critic, self.config.tau)
        agent = self.replace(flow=flow, actor=actor, critic=critic, target_critic=target_critic)
        return agent, critic_info | flow_info | actor_info


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
    """An action of μ with new noise, in the environment's units. Nothing is carried between steps."""
    return (), run.agent.action_space.from_unit(run.agent.action_of(obs, key))
