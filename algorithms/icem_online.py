"""iCEM online: plan with a model that a Kalman filter fits to every new transition of the episode.

    J(u_1:T) = Σ_{k=1..T} c(x_k, u_k, x_{k+1}) + c_T(x_{T+1}),  x_1 = x,  x_{k+1} = x_k + σ g(m; z_k)
    u  = first action of iCEM's mean plan if the model is a network, of its cheapest plan if    act, Agent.search
         the equations are exact (physics, or reveal)
    y  = (x' − x) / σ = g(θ; z) + v,  v ~ N(0, R)      what the transition says about θ         observe, Agent.learn
    m⁻ = m,  P⁻ = (P + q I) / λ,  H = ∂g/∂θ at m⁻,  S = H P⁻ H' + R,  K = P⁻ H' S⁻¹             core.ekf.update
    m  = m⁻ + K (y − g(m⁻; z)),  P = (I − K H) P⁻
    R <- R + ρ (e² + diag(H P H') − R),  e = y − g(m; z) and H = ∂g/∂θ, both at the new m       ekf.adapt_R
    q <- max(q + ρ mean((m − m⁻)² + diag(P − P⁻)), 0)                                           ekf.adapt_noise

    x state (D,), u action (A,), x' true successor; c, c_T costs of the environment, T horizon; z = (features(x), u),
    standardised; σ scale of changes (D,); θ the n weights that learn, ~ N(m, P); q drift, λ forgetting, ρ noise_rate.
    model="mlp"         g is a network: the file `pretrained`, or random weights
    model="physics"     g = (f(θ; x, u) − x) / σ, f the environment's equations, θ its hidden Params, σ = 1
    adapt               "all": every weight. "last_layer": those of the last layer, in which g is linear. With a full P
                        and q = ρ = 0 the filter is then Bayesian linear regression; with λ < 1, recursive least squares
    belief              P is full, diagonal (VD-EKF), or diagonal plus low rank (LO-FI)
    learn=False         m = m_0, P = 0, R = R_0: the lower baseline
    env_kwargs.reveal   obs also holds the true Params: the plan uses them, m = m_0: the upper baseline

Papers: iCEM (Pinneri et al., 2020, arXiv:2008.06389; pseudo-code in core/planning.py), VD-EKF and LO-FI (Chang et al.,
2022; 2023, arXiv:2305.19535), `num_linearizations` > 1 (Bell & Cathey, 1993). To plan with a network that a Kalman
filter updates is ours, and so is that a plan uses m and ignores P.
Departures: iCEM executes its mean plan where the model is a network, because the cheapest plan exploits the errors of a
network (its paper: the cheapest). λ acts only while tr P < 10 tr P_0 (without it P grows without bound).
Reads of the environment: action_space, cost, terminal_cost; features if there are any; guess and dynamics for physics;
dynamics and the shown Params under reveal, with any model.
Ends: a fall and the time limit are the same. The filter uses the last transition; then `carry` starts again, so nothing
learnt passes to the next episode. A plan does not know of ends.
Random: first weights (agent_key, only without `pretrained`), samples (act_key, split by environment), first reset and
every step (env_key of init and of train_step).
Kept: `Run`, which is the checkpoint; `carry` changes at every step, `agent` never.
Decides: model and pretrained (the default network is random); adapt; horizon. drift_var: with 0, the default, the
filter hardly learns once the truth has jumped; too large, it forgets what pretraining gave. prior_var: how far the
first steps move θ. For the last layer of a pretrained network drift_var=1e-4 and prior_var=1e-3 are good.
Cost: a step of one environment simulates 100 plans of 25 steps (40 + 3 kept, 32, 25); that dominates for the last layer
and for physics. With all weights of a network and a full P the filter, O(n² D), does.
Expect: configs/adapt_cartpole.py: train_return 169 [145, 173], IQM of 32 seeds, 2 ms a step and seed on 2 CPU cores.
"""
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
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
        belief=choice("full", "diagonal", "low_rank"),
        belief_rank=count(8),  # of low_rank
        prior_var=positive(0.1),  # P_0 = prior_var · I
        obs_var=positive(1e-3),  # R_0 = obs_var · I
        num_linearizations=count(1),  # of g in one update; physics is so curved that it takes 4
        forgetting=positive(1.0),  # λ
        drift_var=nonnegative(0.0),  # q_0
        noise_rate=fraction(0.0),  # ρ
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
    belief: ekf.Belief  # N(m, P) about θ
    R: jax.Array  # (D,)
    drift_var: jax.Array  # q
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
        if not self.config.learn:
            return ekf.Diagonal.create(self.theta(), 0.0)
        low_rank = functools.partial(ekf.LowRank.create, rank=self.config.belief_rank)
        forms = dict(full=ekf.Full.create, diagonal=ekf.Diagonal.create, low_rank=low_rank)
        return forms[self.config.belief](self.theta(), self.config.prior_var)

    def search(self, key, belief, plan, x, truth):  # -> the plan that the next step starts from, action (A,)
        model = functools.partial(self.predict, self.insert(belief.params))
        dynamics = model if truth is None else functools.partial(self.env.dynamics, truth)
        cost = functools.partial(planning.trajectory_cost, dynamics, self.env.cost, self.env.terminal_cost, x)
        exact = truth is not None or self.config.model == "physics"
        return planning.icem(key, cost, plan, *self.env.action_space.bounds, **self.config.planner,
                             return_mode="best" if exact else "mean")[:2]

    def learn(self, carry, x, action, next_x):
        """The carry after one transition of one environment."""
        config, zero = self.config, jnp.zeros_like(next_x)  # the filter observes 0 = (g − y) + v: innovation y − g

        def error(theta):  # g − y, (D,)
            return (self.predict(self.insert(theta), x, action) - next_x) / self.scaling["scale"]

        before = carry.belief.predict(noise=carry.drift_var) if config.learn else carry.belief
        if config.learn and config.forgetting < 1:
            before = before.forget(config.forgetting, 10 * config.prior_var * before.mean.size)
        after, info = ekf.update(before, error, zero, carry.R, config.num_linearizations)
        carry = carry._replace(report=dict(
            error=jnp.sqrt(jnp.square(info.innovation).mean()), nll=-info.log_lik, nis=info.nis,
            covered=1.0 * (info.nis < ekf.nis_band(zero.size, 1, 0.9)[1])))  # below the 95% quantile: 0.95 if right
        if config.learn and config.noise_rate:
            carry = carry._replace(R=ekf.adapt_R(carry.R, after, error, zero, config.noise_rate),
                                   drift_var=ekf.adapt_noise(carry.drift_var, before, after, config.noise_rate))
        return carry._replace(belief=after)  # with P = 0 it is the belief before


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
    return repeat(Carry(agent.prior(), R, jnp.float32(config.drift_var), plan, report), num_envs)


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
    clock = run.clock.tick(env_steps=source.num_envs, updates=source.num_envs * learns)
    run = run._replace(carry=carry, env_state=env_state, obs=step.obs, clock=clock)
    return run, info | dict(episode=jax.tree.map(jnp.sum, step.info["episode"]))


def measure(run, key, source, config):
    """`rehearsal`: the return of episodes of `source` with the weights of the moment, which stay fixed."""
    if not config.rehearse:
        return {}
    index = jnp.arange(source.num_envs) % config.num_envs  # whose weights each episode plays with
    carry = jax.tree.map(lambda leaf: leaf[index], run.carry)._replace(plan=initial_carry(run, source.num_envs).plan)
    return {"rehearsal": evaluate(functools.partial(act, run), source, key, carry)[0].mean()}
