"""Dynamics: fit a network to the transitions of a data set, by Adam on the squared error of the change.

    L(θ) = mean over a minibatch of |g_θ(z̃) − y|²,  y = (x' − x) / σ      Agent.loss (D · train_error² on average)
    x̂'   = x + σ g_θ(z̃)                                                   Agent.predict

    x, x' obs and next_obs (D,); u action (A,); z = (features(x), u), z̃ = (z − centre) / spread. centre, spread (I,) are
    mean and standard deviation of z, σ (D,) is that of x' − x, over the training transitions; below 1e-6 it becomes 1.

A share `holdout` of the episodes is held out: drawn with holdout_key, so others for every seed; neither the network nor
the scaling sees them. `measure`, at every evaluation, returns:

    holdout_error, train_error   root mean square of g − y over held out or training transitions and over the D numbers
    rollout_error                root mean square of (x̂ − x) / σ, `rollout_steps` steps after the start of a window. x̂
                                 follows from its own predictions and the recorded actions. `num_windows` windows, each
                                 in one held out episode, the same at every evaluation; NaN if all those are too short

No paper: the network and the loss are those of most work on learned models (e.g. Nagabandi et al., 2018). Departures:
minibatches are drawn with replacement; the learning rate falls to zero along a cosine; targets are scaled, not centred.
Episodes: the last step of one is used like any other, with the true successor. Random: first weights, held out episodes
(init), minibatches (train_step), windows (measure). Kept: `Run` is the checkpoint; the data are not in it.
Decides: the data (`collect.episodes` of the config that collects), updates, lr. Cost: updates, each a pass forwards and
one backwards over batch_size transitions; with over 3 · eval_every · batch_size in the data set, the measurements.
Expect: holdout_error 0.017, rollout_error 0.19 with the data of configs/icem_online_linear.py, one seed, 4 s on a CPU.
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
from core.config import count, fraction, positive
from core.envs import make_env
from core.errors import UserError
from core.networks import MLP
from core.train_state import TrainState


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="cartpole_swingup",  # whose features the network sees
        env_kwargs=dict(),
        dataset="runs/icem_online_cartpole/collect/data.npz",
        updates=count(10_000),
        eval_every=count(500),  # updates
        hidden_dims=count((64, 64)),
        lr=positive(1e-3),  # at first
        batch_size=count(64),
        holdout=fraction(0.2),  # of the episodes
        rollout_steps=count(25),  # of rollout_error
        num_windows=count(256),  # of rollout_error, too
    ))


class Agent(struct.PyTreeNode):
    dynamics: TrainState
    scaling: dict  # centre, spread, scale
    env: Any = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, data, trained, config):
        """`trained` (N,): whether the network learns from a transition."""
        env = make_env(config.env, 1, **config.env_kwargs).env
        agent = cls(None, None, env, config)
        z, change, where = agent.inputs(data["obs"], data["action"]), data["next_obs"] - data["obs"], trained[:, None]
        spread, scale = (jnp.where(std < 1e-6, 1.0, std) for std in (z.std(0, where=where), change.std(0, where=where)))
        network = MLP((*config.hidden_dims, change.shape[1]), activation=nn.tanh)
        tx = optax.adam(optax.cosine_decay_schedule(config.lr, config.updates))
        return agent.replace(dynamics=TrainState.create(network, key, z[0], tx=tx),
                             scaling=dict(centre=z.mean(0, where=where), spread=spread, scale=scale))

    @property
    def params(self):
        """What launchers.pretrain writes to model.npz, for the key `pretrained` of icem_online."""
        return dict(weights=self.dynamics.params, scaling=self.scaling)

    def inputs(self, x, action):  # (..., D), (..., A) -> (..., I)
        return jnp.concatenate([getattr(self.env, "features", lambda x: x)(x), action], axis=-1)

    def predict(self, x, action, params=None):  # (B, D), (B, A) -> (B, D)
        z = (self.inputs(x, action) - self.scaling["centre"][None]) / self.scaling["spread"][None]
        return x + self.scaling["scale"][None] * self.dynamics(z, params=params)

    def errors(self, batch, params=None):  # leaves (B, ...) -> g − y, (B, D)
        predicted = self.predict(batch["obs"], batch["action"], params)
        return (predicted - batch["next_obs"]) / self.scaling["scale"][None]

    def loss(self, params, batch):
        loss = jnp.square(self.errors(batch, params)).sum(-1).mean()
        return loss, dict(loss=loss)


class Run(NamedTuple):
    agent: Agent
    order: jax.Array  # (N,) row numbers: the num_trained transitions that train the network, then the held out ones
    num_trained: jax.Array
    clock: Clock


def init(key, source, config):
    if source.longest == source.size:
        raise UserError("the data are one episode, so none can be held out: two or more are needed")
    if source.longest < config.rollout_steps:
        raise UserError(f"rollout_steps = {config.rollout_steps}, but the longest episode has {source.longest} steps")
    agent_key, holdout_key = jax.random.split(key)
    trained = ~draw_holdout(holdout_key, source.data, config.holdout)
    agent = Agent.create(agent_key, source.data, trained, config)
    return Run(agent, jnp.argsort(~trained), trained.sum(), Clock.start())


def draw_holdout(key, data, share):
    """(N,) whether the episode of a transition is held out: a `share` of them, at least one, but not all."""
    done = (data["terminated"] | data["truncated"]).at[-1].set(True)
    episode, count = jnp.cumsum(done) - done, done.sum()  # (N,) the episode's number, of each transition
    luck = jnp.where(jnp.arange(len(done)) < count, jax.random.uniform(key, done.shape), jnp.inf)  # of each episode
    number = jnp.clip(jnp.round(share * count).astype(int), 1, count - 1)  # the smallest are held out
    return luck[episode] < jnp.sort(luck)[number]


def train_step(run, key, source, config):
    """One step of Adam on a minibatch of training transitions."""
    index = run.order[jax.random.randint(key, (config.batch_size,), 0, run.num_trained)]
    batch = jax.tree.map(lambda leaf: leaf[index], source.data)
    dynamics, info = run.agent.dynamics.minimize(run.agent.loss, batch)
    return run._replace(agent=run.agent.replace(dynamics=dynamics), clock=run.clock.tick(updates=1)), info


def measure(run, key, source, config):
    held_out = jnp.ones(source.size, bool).at[run.order].set(jnp.arange(source.size) >= run.num_trained)
    one = {name: source.data[name][:, None] for name in ("obs", "action", "next_obs")}
    square = jnp.square(jax.lax.map(run.agent.errors, one, batch_size=4096)).mean((1, 2))
    errors = dict(holdout_error=square.mean(where=held_out), train_error=square.mean(where=~held_out),
                  rollout_error=jnp.square(rollout_errors(run.agent, key, held_out, source)).mean())
    return jax.tree.map(jnp.sqrt, errors)


def rollout_errors(agent, key, held_out, source):
    """(x̂ − x) / σ after `rollout_steps` steps, of windows drawn with replacement from the held out episodes."""
    # starts: every row, longest remaining first; left: steps from there to the end of its episode
    possible = held_out[source.starts] & (source.left >= agent.config.rollout_steps)
    chosen = jax.random.randint(key, (agent.config.num_windows,), 0, jnp.maximum(possible.sum(), 1))
    start = source.starts[jnp.argsort(~possible)][chosen]
    index = start[None] + jnp.arange(agent.config.rollout_steps)[:, None]  # (T, W)

    def step(x, action):
        return agent.predict(x, action), None

    x, _ = jax.lax.scan(step, source.data["obs"][start], source.data["action"][index])
    error = (x - source.data["next_obs"][index[-1]]) / agent.scaling["scale"][None]
    return jnp.where(possible.any(), error, jnp.nan)
