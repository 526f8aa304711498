"""iCEM online, the weights moved by gradient steps on a window of transitions instead of a filter.
Child of icem_online.py; the diff is the method.

    L(θ) = mean over the last `window` transitions of the episode of |g(θ; z) − y|²                      Agent.learn
    after every step: `num_updates` steps of Adam on L, from the θ and with the moments of the last step

The symbols, what is random and when an episode starts again are as in icem_online.py. There is no belief, P = 0:
nll, nis and covered are those of errors with variance R = obs_var, which stays. Moments and window start again
with the episode; until the window is full, its empty rows do not count.

Departures: no paper; the usual baseline of online learning. Kept: `Run`; its carry holds θ, Adam's moments, the window.
Decides: lr, num_updates. Cost: that of the parent, and num_updates · window forward and backward passes a step.
Expect: configs/adapt_cartpole.py:icem_online_gradient: regret 10.8 [4.7, 18.7] to the truth where the filter has 0.9,
32 seeds, 1.6 ms a step and seed on two CPU cores.
"""
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import linen as nn
from flax import struct
from flax.traverse_util import flatten_dict

from core import ekf, planning
from core.clock import Clock
from core.config import choice, count, fraction, nonnegative, positive, whole
from core.dataset import read_arrays
from core.envs import Box, Transition, ended, hidden, repeat, require, restart
from core.errors import UserError
from core.evaluation import evaluate
from core.networks import MLP


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="cartpole_swingup",
        env_kwargs=dict(reveal=False),  # the environment's own settings
        num_envs=count(1),  # each with its own truth, belief and plan
        num_steps=choice(1),  # of every environment in one train_step
        env_steps=count(200),  # one episode
        log_every=count(5),
        eval_every=count(200),
        eval_episodes=count(1),  # of each seed: fresh ones, in which it learns from the prior again
        rehearse=False,  # also play evaluation episodes with the weights of the moment, which stay fixed: `rehearsal`
        model=choice("mlp", "physics"),
        hidden_dims=count((64, 64)),
        pretrained="",  # file of weights and scaling (algorithms/dynamics.py); none: random weights
        learn=True,
        adapt=choice("last_layer", "all"),
        obs_var=positive(1e-3),  # R = obs_var · I
        window=count(50),
        num_updates=count(5),
        lr=positive(1e-3),
        horizon=count(25),
        kept_elites=whole(3),  # from one step to the next
        planner=dict(num_samples=count(40), num_elites=count(10), num_iterations=count(3), decay=positive(1.25),
                     init_std=positive(0.5), noise_beta=nonnegative(2.0), momentum=fraction(0.1)),
        # launchers.collect and launchers.pretrain read these two sections
        collect=dict(episodes=count(20), num_envs=count(10), learn=False, env_kwargs=dict(reveal=True),
                     action_noise=nonnegative(0.3)),
        pretrain=dict(updates=count(10_000), eval_every=count(500), batch_size=count(64), lr=positive(1e-3),
                      holdout=fraction(0.2), rollout_steps=count(25)),
    ))


class Carry(NamedTuple):  # of one environment, within an episode
    belief: ekf.Belief  # θ, as N(θ, 0)
    R: jax.Array  # (D,)
    opt_state: Any
    window: tuple  # x, action, next_x of the last transitions (W, ...), the newest last, and whether there is one (W,)
    plan: planning.Carry
    report: dict  # what the newest transition said about the belief before it: error, nll, nis, covered


class Agent(struct.PyTreeNode):
    weights: Any  # all weights at the start of an episode: of the network, or the guessed Params
    scaling: dict  # centre (I,) and spread (I,) of z, scale (D,) of changes
    env: Any = struct.field(pytree_node=False)
    config: Any = struct.field(pytree_node=False)

    @classmethod
    def create(cls, key, x, env, config):
        agent = cls(None, None, env, config)
        z = agent.inputs(x, jnp.zeros(env.action_space.shape))
        scaling = dict(centre=jnp.zeros_like(z), spread=jnp.ones_like(z), scale=jnp.ones_like(x))
        if config.model == "physics":
            return agent.replace(weights=env.guess, scaling=scaling)
        params = dict(weights=agent.network(x.size).init(key, z)["params"], scaling=scaling)
        return agent.replace(**(read_params(config.pretrained, params) if config.pretrained else params))

    def network(self, out_dim):
        return MLP((*self.config.hidden_dims, out_dim), activation=nn.tanh)

    def inputs(self, x, action):  # (..., D), (..., A) -> (..., I)
        return jnp.concatenate([getattr(self.env, "features", lambda x: x)(x), action], axis=-1)

    def theta(self):  # at the start of an episode
        last = f"Dense_{len(self.config.hidden_dims)}"
        return self.weights if self.config.adapt == "all" else {last: self.weights[last]}

    def insert(self, theta):  # -> all weights, θ among them
        return theta if self.config.adapt == "all" else {**self.weights, **theta}

    def predict(self, weights, x, action):  # (D,), (A,) -> (D,)
        if self.config.model == "physics":
            return self.env.dynamics(weights, x, action)
        z = (self.inputs(x, action) - self.scaling["centre"]) / self.scaling["spread"]
        return x + self.scaling["scale"] * self.network(x.size).apply({"params": weights}, z)

    def prior(self):
        return ekf.Diagonal.create(self.theta(), 0.0)

    def search(self, key, belief, plan, x, truth):  # -> the plan that the next step starts from, action (A,)
        model = functools.partial(self.predict, self.insert(belief.params))
        dynamics = model if truth is None else functools.partial(self.env.dynamics, truth)
        cost = functools.partial(planning.trajectory_cost, dynamics, self.env.cost, self.env.terminal_cost, x)
        exact = truth is not None or self.config.model == "physics"
        return planning.icem(key, cost, plan, *self.env.action_space.bounds, **self.config.planner,
                             return_mode="best" if exact else "mean")[:2]

    def learn(self, carry, x, action, next_x):
        """The carry after one transition of one environment."""
        config, zero = self.config, jnp.zeros_like(next_x)

        def error(theta, x=x, action=action, next_x=next_x):  # g − y, (D,)
            return (self.predict(self.insert(theta), x, action) - next_x) / self.scaling["scale"]

        def loss(mean):
            *transitions, filled = window
            errors = jax.vmap(functools.partial(error, carry.belief.unravel(mean)))(*transitions)
            return jnp.square(errors).sum(-1).mean(where=filled)

        def update(state, _):
            mean, opt_state = state
            updates, opt_state = optax.adam(config.lr).update(jax.grad(loss)(mean), opt_state)
            return (mean + updates, opt_state), None

        newest = x, action, next_x, jnp.bool_(True)
        window = jax.tree.map(lambda old, new: jnp.concatenate([old[1:], new[None]]), carry.window, newest)
        _, info = ekf.update(carry.belief, error, zero, carry.R)
        carry = carry._replace(report=dict(
            error=jnp.sqrt(jnp.square(info.innovation).mean()), nll=-info.log_lik, nis=info.nis,
            covered=1.0 * (info.nis < ekf.nis_band(zero.size, 1, 0.9)[1])))  # below the 95% quantile: 0.95 if right
        start = carry.belief.mean, carry.opt_state
        (mean, opt_state), _ = jax.lax.scan(update, start, None, length=config.num_updates * config.learn)
        return carry._replace(belief=carry.belief.replace(mean=mean), opt_state=opt_state, window=window)


def read_params(path, like):  # -> weights and scaling; their names and shapes must be those of `like`
    found, due = ({name: leaf.shape for name, leaf in flatten_dict(tree, sep="/").items()}
                  for tree in (read_arrays(path), like))
    for name in sorted(found.keys() | due.keys()):
        if found.get(name) != due.get(name):
            raise UserError(f"{path}: {name} has shape {found.get(name)}, the config's network {due.get(name)}")
    return jax.tree.map(jnp.asarray, read_arrays(path))


class Run(NamedTuple):
    agent: Agent
    carry: Carry  # (E, ...)
    env_state: Any
    obs: jax.Array
    clock: Clock


def init(key, source, config):
    require(source, config, actions=(Box,), bounded=True, offers=("cost", "terminal_cost"))
    refused = {'has no layers: adapt="all"': config.adapt != "all", 'has no weights to read: pretrained=""':
               config.pretrained, "needs an environment with hidden Params": not hasattr(source.env, "guess")}
    if config.model == "physics" and (problems := [words for words, holds in refused.items() if holds]):
        raise UserError(f'model="physics" {problems[0]}')
    agent_key, env_key = jax.random.split(key)
    env_state, obs = source.reset(env_key)
    agent = Agent.create(agent_key, hidden.split(source.env, obs)[0][0], source.env, config)
    run = Run(agent, None, env_state, obs, Clock.start())
    return run._replace(carry=initial_carry(run, source.num_envs))


def initial_carry(run, num_envs):
    agent, config = run.agent, run.agent.config
    plan = planning.initial_carry(*agent.env.action_space.bounds, config.horizon, config.kept_elites)
    R = jnp.full_like(agent.scaling["scale"], config.obs_var)
    report = dict.fromkeys(("error", "nll", "nis", "covered"), jnp.float32(0))
    belief, x, action = agent.prior(), jnp.zeros_like(R), jnp.zeros(agent.env.action_space.shape)
    window = *(repeat(leaf, config.window) for leaf in (x, action, x)), jnp.zeros(config.window, bool)
    return repeat(Carry(belief, R, optax.adam(config.lr).init(belief.mean), window, plan, report), num_envs)


def act(run, carry, obs, key):
    x, truth = hidden.split(run.agent.env, obs)  # no truth, unless the environment reveals it
    plan, action = jax.vmap(run.agent.search)(jax.random.split(key, len(obs)), carry.belief, carry.plan, x, truth)
    return carry._replace(plan=plan), action


def observe(run, carry, step):
    x, truth = hidden.split(run.agent.env, step.obs)
    after = jax.vmap(run.agent.learn)(carry, x, step.action, hidden.split(run.agent.env, step.next_obs)[0])
    return after if truth is None else carry._replace(report=after.report)


def train_step(run, key, source, config):
    """One step of every environment: act, step, observe; where an episode ended, the carry starts again."""
    act_key, _, env_key = jax.random.split(key, 3)  # the second is unused; without it, published numbers change
    carry, action = act(run, run.carry, run.obs, act_key)
    env_state, step = source.step(env_key, run.env_state, action)
    carry = observe(run, carry, Transition.of(run.obs, action, step))
    info = jax.tree.map(jnp.mean, carry.report | dict(reward=step.reward))
    carry = restart(ended(step), initial_carry(run, source.num_envs), carry)
    learns = config.learn and not getattr(source.env, "reveal", False)
    clock = run.clock.tick(env_steps=source.num_envs, updates=source.num_envs * learns * config.num_updates)
    run = run._replace(carry=carry, env_state=env_state, obs=step.obs, clock=clock)
    return run, info | dict(episode=jax.tree.map(jnp.sum, step.info["episode"]))


def measure(run, key, source, config):
    """`rehearsal`: the return of episodes of `source` with the weights of the moment, which stay fixed."""
    if not config.rehearse:
        return {}
    index = jnp.arange(source.num_envs) % config.num_envs  # whose weights each episode plays with
    carry = jax.tree.map(lambda leaf: leaf[index], run.carry)._replace(plan=initial_carry(run, source.num_envs).plan)
    return {"rehearsal": evaluate(functools.partial(act, run), source, key, carry)[0].mean()}
