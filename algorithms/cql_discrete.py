"""Conservative Q-learning for discrete actions (Kumar et al., 2020, arXiv:2006.04779).
Child of cql.py; the diff is the method.

    y    = r + γ (1 − terminated) min_i Q̄_i(s', a'),   a' = argmax_a min_i Q_i(s', a)          critic_loss
    L_Q  = Σ_i ½ E[(Q_i(s, a) − y)²] + c E[log Z_i(s) − Q_i(s, a)]           i = 1, 2          critic_loss      (Eq. 4)
    Z_i  = Σ_a exp Q_i(s, a)                                                                   critic_loss
    Q̄_i <- τ Q_i + (1 − τ) Q̄_i                                                                 update

    Q critic, Q̄ target critic; E the mean over a minibatch of (s, a, r, s', terminated), drawn with replacement from the
    data set. c is cql_alpha. Q chooses the next action and Q̄ judges it (double Q-learning, van Hasselt et al., 2016,
    arXiv:1509.06461). log Z − Q(s, a) is the negative log-likelihood of the data's action under the softmax of Q, so c
    pushes Q down where it is large and up at the actions of the data. Against its parent: Z is a sum and no estimate;
    there is no actor and no temperature.

    train_step   updates_per_step times: draw a minibatch, one step of Adam on L_Q, one of Q̄ with the new Q

Ends: at a time limit (truncated) y bootstraps from s', at any other end (terminated) it is r.
Random: first weights (init), minibatches (the keys that train_step splits).
Departures from the authors' code: for Atari they have one critic, of quantiles, that is copied into the target every
2,000 updates; here there are the two critics of the parent and its moving target. Weights start orthogonal (√2, last
layers 1).
Kept: `Run`: agent (critics, optimiser, target critic), clock. The data are not in it.
Decides: the data; cql_alpha, against the scale of the rewards; tau.
Cost: an update at hidden_dims (256, 256), batch_size 256 and CartPole's sizes takes 0.3 GFLOP: 5 forward passes of both
critics, where a gradient counts as two. Steps of an environment are taken in evaluation only.
Expect: 430 on CartPole from data with return 122, where cloning has 156, IQM of 8 seeds, with
configs/cql_discrete_cartpole.py. 30 s for all seeds on 2 CPU cores.
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
from core.envs import Discrete, require
from core.networks import MLP, ensemblize, flat
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="gymnax/CartPole-v1",  # for evaluation, and whose actions the data have
        dataset="runs/cql_discrete_cartpole/collect/data.npz",  # or minari:NAME, or d4rl:PATH.hdf5
        updates=count(20_000),  # the budget of one seed
        updates_per_step=count(10),  # in one train_step
        eval_every=count(2000),  # updates
        eval_episodes=count(32),
        batch_size=count(256),
        hidden_dims=count((256, 256)),
        lr=positive(3e-4),
        discount=fraction(0.99),  # γ
        tau=fraction(0.005),  # τ
        cql_alpha=nonnegative(1.0),  # c
    ))


class Critic(nn.Module):
    num_actions: int
    hidden_dims: tuple[int, ...]

    @nn.compact
    def __call__(self, obs):  # (B, ...) -> (2, B, num_actions)
        return ensemblize(MLP, 2)((*self.hidden_dims, self.num_actions))(flat(obs))


class Agent(struct.PyTreeNode):
    critic: TrainState
    target_critic: TrainState
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, obs, action_space, config):
        critic = TrainState.create(Critic(action_space.n, config.hidden_dims), key, obs, tx=optax.adam(config.lr))
        return cls(critic, critic.target(), config)

    def critic_loss(self, params, batch):
        next_action = self.best(batch["next_obs"])
        next_v = of_action(self.target_critic(batch["next_obs"]), next_action).min(axis=0)
        target = batch["reward"] + self.config.discount * (1.0 - batch["terminated"]) * next_v
        all_q = self.critic(batch["obs"], params=params)  # (2, B, num_actions)
        q = of_action(all_q, batch["action"])
        error = 0.5 * jnp.square(q - target[None]).mean(axis=1)
        gap = (jax.nn.logsumexp(all_q, axis=2) - q).mean(axis=1)
        loss = (error + self.config.cql_alpha * gap).sum()
        return loss, dict(critic_loss=loss, q=q.mean(), gap=gap.mean())

    def best(self, obs):  # (B, ...) -> (B,)
        return self.critic(obs).min(axis=0).argmax(axis=-1)

    def update(self, batch):  # leaves (B, ...)
        critic, info = self.critic.minimize(self.critic_loss, batch)
        return self.replace(critic=critic, target_critic=self.target_critic.track(critic, self.config.tau)), info


def of_action(q, action):  # (2, B, num_actions), (B,) -> (2, B)
    return jnp.take_along_axis(q, action[None, :, None], axis=2).squeeze(2)


class Run(NamedTuple):
    agent: Agent
    clock: Clock


def init(key, source, config):
    require(source, config, actions=(Discrete,))
    one = jax.tree.map(lambda x: x[:1], source.data["obs"])
    return Run(Agent.create(key, one, source.action_space, config), Clock.start())


def train_step(run, key, source, config):
    def update(agent, key):
        return agent.update(source.sample(key, config.batch_size))

    agent, info = jax.lax.scan(update, run.agent, jax.random.split(key, config.updates_per_step))
    run = run._replace(agent=agent, clock=run.clock.tick(updates=config.updates_per_step))
    return run, jax.tree.map(jnp.mean, info)


def act(run, carry, obs, key):
    """The best action for the smaller critic. Nothing is carried between steps."""
    return (), run.agent.best(obs)
