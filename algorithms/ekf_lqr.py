"""Dual control: plan under a Gaussian belief about unknown dynamics, act, learn from the transition that followed
(Palafox et al., 2026, arXiv:2601.21988; the idea is Feldbaum's, 1960).

    x' = f(φ, x, u) + w,   w ~ N(0, R)          the system as assumed: φ = φ(θ), θ is unknown     env.unknown(about)
    θ ~ N(m, P)                                 the belief: m_0 = guess, P_0 = prior_var · 1       Carry.belief
    m, P <- EKF(m, P + Q_t; x, u, x')           one update on every transition                    Agent.learn
    J(u_1:H) = Σ_{t=1..H} c(x_t, u_t, x_{t+1}) + c_end(x_{H+1}) − λ I(u_1:H)                       Agent.objective
               along x_{t+1} = f(φ(m), x_t, u_t), from the x of now
    I(u_1:H) = Σ_{t=1..H} ½ log det(1 + R⁻¹ D_t Σ_t D_t')     the nats that H steps will bring     core.ekf.information
    D_t      = ∂f/∂φ at (φ(m), x_t, u_t), the informative rows;  Σ_1 = ∂φ/∂θ P (∂φ/∂θ)'           Agent.covariance

    explore="none"         I = 0: certainty equivalence
    explore="independent"  Σ_t = Σ_1: each step uses today's covariance, so repeated information is counted repeatedly
    explore="joint"        Σ_{t+1} = Σ_t − Σ_t D_t' (D_t Σ_t D_t' + R)⁻¹ D_t Σ_t: I is the mutual information of φ and
                           the next H states
    explore="task"         I = ½ log(g'Σ_1 g / g'Σ_{H+1} g), the nats about the one number g'φ, Σ_t as in joint;
                           g = ∂J/∂φ without I, along the mean of the last search, shifted by one step (not along the
                           plan that was executed)                                                 Agent.slope

One step, in every environment:

    1  plan      u_1:H <- iCEM(J), from the last plan shifted by one step; u = u_1        act, Agent.plan
    2  act       x' <- environment(u)                                                    train_step
    3  observe   m, P <- EKF(m, P + Q_t; x, u, x')                                       observe, Agent.learn
    4  restart   belief and plan <- their first values, where the episode ended          train_step, initial_carry

Symbols: θ a tree, φ (n,), x (d,), u (A,); m (p,) is θ made flat, P (p, p) its covariance: belief.mean, belief.cov; Σ_t
(n, n) the covariance of φ: cov; D_t jacobian; R obs_var · 1, in the filter and in I: right if obs_var =
env_kwargs.process_noise²; Q_t max(drift_var · drift_decay^t, drift_floor) · 1; λ info_weight; H horizon; c env.cost,
c_end env.terminal_cost. Where the environment reveals its truth (env_kwargs.reveal), the plan uses the true φ with I =
0, and nothing is learnt: perfect knowledge. With learn=False the belief keeps its first value.

Departures: I is in nats and is not divided by the number of parameters. The authors' code learns one step late; here
the filter uses the newest transition before the next plan. Their I is `independent`; `joint` and `task` are ours. I
counts only the rows that the environment calls informative. A row left out is zero or a small multiple (dt / 2 or dt)
of a kept one, but at a clipped speed, so I is slightly too low. The filter itself uses every row.
Reads of the environment, beyond reset and step: unknown(about), cost, terminal_cost, action_space and the revealed
truth; for measures alone, info["params"].
Kept: `Run`, which is the checkpoint: the belief, the plan and t of every environment (Carry), env_state, obs, the clock
and the belief's error after the newest transition. No knowledge passes from one episode to the next.
Random: the samples of iCEM, or the random actions (act_key, split by environment for iCEM); the first reset (init's
key); later resets, noise and truths (env_key).
Ends: an end by a fall and one by the time limit are the same here. The filter uses the last transition, then step 4. A
plan does not know of ends: its H steps look past them.
Decides: explore and info_weight. In pursuit_evasion_lqr without noise, against explore="none" (gain error 0.16): a
weight of 5 loses no return; 50 loses 1,700 with independent (error 0.03) and 70 with joint (error 0.06). obs_var: too
large a variance slows learning. prior_var: how far the first transitions move the belief.
Cost: a step simulates 1,700 plans of 20 steps (num_samples, shrinking by decay); this dominates. To explore, every one
of these steps is differentiated. The filter takes num_linearizations Jacobians a step.
Expect: gain error 0.16 [0.12, 0.23] (IQM [95% interval] over 64 seeds) after the 250 steps of pursuit_evasion_lqr. All
64 seeds together take 17 s on 2 CPU cores, including compilation, without evaluation.
"""
import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import struct

from core import ekf, planning
from core.clock import Clock
from core.config import choice, count, fraction, nonnegative, positive, whole
from core.envs import Box, Transition, ended, hidden, repeat, require, restart


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="pursuit_evasion_lqr",
        env_kwargs=dict(process_noise=0.0, reveal=False),  # its own settings
        num_envs=count(1),  # each with its own truth, belief and plan
        num_steps=count(1),  # of each environment in one train_step
        env_steps=count(250),  # one episode
        log_every=count(10),  # env steps between rows of metrics.csv
        eval_every=count(250),  # env steps between evaluations
        eval_episodes=count(1),  # of each seed; each starts from the prior, so one more seed tells as much
        about="gain",  # what is unknown: "params", or here also "gain" or "cost"
        learn=True,
        explore=choice("none", "independent", "joint", "task"),
        info_weight=nonnegative(50.0),  # λ, task cost for a nat
        actions=choice("plan", "random"),
        prior_var=positive(0.5),
        obs_var=positive(0.01),
        num_linearizations=count(1),  # of f in one update; about="cost" is so curved that it takes 8
        drift_var=nonnegative(0.0),
        drift_decay=fraction(1.0),
        drift_floor=nonnegative(0.0),
        horizon=count(20),
        kept_elites=whole(15),  # plans that the next iteration and the next step start from
        planner=dict(num_samples=count(500), num_elites=count(50), num_iterations=count(5), decay=positive(1.25),
                     init_std=positive(0.5), noise_beta=nonnegative(2.0),
                     momentum=fraction(0.1)),  # of iCEM: core/planning.py
    ))


class Carry(NamedTuple):
    """What one environment carries within an episode. In Run every leaf has a leading axis E."""

    belief: ekf.Full
    plan: planning.Carry
    t: jax.Array  # updates of the filter in this episode
    nis: jax.Array  # of the newest transition: ν'S⁻¹ν of its error ν, d on average if the belief is right
    nats: jax.Array  # nats about θ that this transition gave


class Agent(struct.PyTreeNode):
    """The formulas above for one environment. It holds no arrays."""

    config: Any = struct.field(pytree_node=False)
    env: Any = struct.field(pytree_node=False)

    @property
    def unknown(self):
        return self.env.unknown(self.config.about)

    def start(self):
        """The Carry at the start of an episode."""
        belief = ekf.Full.create(self.unknown.guess, self.config.prior_var)
        plan = planning.initial_carry(*self.env.action_space.bounds, self.config.horizon, self.config.kept_elites)
        return Carry(belief, plan, jnp.int32(0), jnp.float32(0), jnp.float32(0))

    def plan(self, key, belief, plan, obs):
        """What the next search starts from, and the first action of the cheapest plan found."""
        (x, truth), cov, task = hidden.split(self.env, obs), None, None
        phi = self.unknown.reduce(belief.params) if truth is None else self.unknown.truth(truth)
        if truth is None and self.config.explore != "none":
            cov = self.covariance(belief)
            task = self.slope(plan.mean, x, phi) if self.config.explore == "task" else None
        cost = functools.partial(self.objective, x=x, phi=phi, cov=cov, task=task)
        plan, action, _ = planning.icem(
            key, cost, plan, *self.env.action_space.bounds, **self.config.planner, return_mode="best")
        return plan, action

    def objective(self, actions, x, phi, cov=None, task=None):
        """J (N,) of plans (H, N, A) from x (d,), for φ (n,) of covariance (n, n); I = 0 without a covariance.

        Inside the scan, states are (d, N): plans on the last axis, so that a CPU computes many in one instruction."""
        f, rows = self.unknown.dynamics, jnp.array(self.unknown.informative)
        R = jnp.full(len(self.unknown.informative), self.config.obs_var)

        def step(carry, action):
            x, cov, total = carry
            next_x = jax.vmap(f, (None, -1, 0), -1)(phi, x, action)
            total = total + jax.vmap(self.env.cost, (-1, 0, -1))(x, action, next_x)
            if cov is not None:
                derivative = jax.jacrev(lambda phi, x, action: f(phi, x, action)[rows])
                jacobian = jax.vmap(derivative, (None, -1, 0), -1)(phi, x, action)  # (rows, n, N)
                nats, posterior = ekf.information(cov, jacobian, R, task)
                total = total - self.config.info_weight * nats
                cov = cov if self.config.explore == "independent" else posterior
            return (next_x, cov, total), None

        num_plans = actions.shape[1]
        if cov is not None and self.config.explore != "independent":  # independent keeps one (n, n) for all plans
            cov = jnp.broadcast_to(cov[..., None], (*cov.shape, num_plans))
        start = (jnp.broadcast_to(x[:, None], (x.size, num_plans)), cov, jnp.zeros(num_plans))
        (x, _, total), _ = jax.lax.scan(step, start, actions)
        return total + jax.vmap(self.env.terminal_cost, -1)(x)

    def covariance(self, belief):
        """Σ_1 (n, n). Computed once for all plans, so that a step of a plan differentiates f alone."""
        jacobian = jax.jacfwd(lambda mean: self.unknown.reduce(belief.unravel(mean)))(belief.mean)
        return jacobian @ belief.cov @ jacobian.T

    def slope(self, actions, x, phi):
        """g = ∂J/∂φ along the plan `actions` (H, A), with I = 0: (n, 1)."""
        return jax.grad(lambda phi: self.objective(actions[:, None], x, phi)[0])(phi)[:, None]

    def learn(self, carry, step):
        """The Carry after one update of the filter on a transition."""
        (x, truth), (next_x, _) = hidden.split(self.env, step.obs), hidden.split(self.env, step.next_obs)
        if truth is not None or not self.config.learn:
            return carry
        config, f = self.config, self.unknown.dynamics
        drift = jnp.maximum(config.drift_var * config.drift_decay**carry.t, config.drift_floor)  # Q_t
        belief, info = ekf.update(
            carry.belief.predict(noise=drift), lambda theta: f(self.unknown.reduce(theta), x, step.action), next_x,
            jnp.full(x.shape, config.obs_var), config.num_linearizations)
        return carry._replace(belief=belief, t=carry.t + 1, nis=info.nis, nats=info.information)

    def measure(self, belief, params):
        """How far the belief is from the truth, and how sure it is."""
        error = self.unknown.error(self.unknown.reduce(belief.params), params)
        return {self.unknown.error_name: error, "variance": belief.var.sum()}


class Run(NamedTuple):
    agent: Agent
    carry: Carry
    env_state: Any
    obs: jax.Array
    clock: Clock
    measures: dict  # of the belief after the newest transition, before a restart


def init(key, source, config):
    require(source, config, actions=(Box,), offers=("unknown", "cost", "terminal_cost"))
    agent, (env_state, obs) = Agent(config, source.env), source.reset(key)
    carry = repeat(agent.start(), source.num_envs)
    measures = {agent.unknown.error_name: jnp.float32(0), "variance": jnp.float32(0)}
    return Run(agent, carry, env_state, obs, Clock.start(), measures)


def train_step(run, key, source, config):
    """`num_steps` of plan, act, observe, restart, in every environment."""
    def env_step(run, key):
        act_key, env_key = jax.random.split(key)
        carry, action = act(run, run.carry, run.obs, act_key)
        env_state, step = source.step(env_key, run.env_state, action)
        carry = observe(run, carry, Transition.of(run.obs, action, step))
        measures = jax.tree.map(jnp.mean, jax.vmap(run.agent.measure)(carry.belief, step.info["params"]))
        info = dict(reward=step.reward, nis=carry.nis, information=carry.nats), step.info["episode"]
        carry = restart(ended(step), initial_carry(run, source.num_envs), carry)
        return run._replace(carry=carry, env_state=env_state, obs=step.obs, measures=measures), info

    run, (info, episode) = jax.lax.scan(env_step, run, jax.random.split(key, config.num_steps))
    steps = config.num_envs * config.num_steps
    learns = config.learn and not getattr(source.env, "reveal", False)
    run = run._replace(clock=run.clock.tick(env_steps=steps, updates=steps * learns))
    return run, jax.tree.map(jnp.mean, info) | dict(episode=jax.tree.map(jnp.sum, episode))


def initial_carry(run, num_envs):
    return repeat(run.agent.start(), num_envs)


def act(run, carry, obs, key):
    agent = run.agent
    if agent.config.actions == "random":
        return carry, agent.env.action_space.sample(key, (len(obs),))
    plan, action = jax.vmap(agent.plan)(jax.random.split(key, len(obs)), carry.belief, carry.plan, obs)
    return carry._replace(plan=plan), action


def observe(run, carry, step):
    return jax.vmap(run.agent.learn)(carry, step)


def measure(run, key, source, config):
    """The belief's error and variance after the newest transition, mean over environments."""
    return run.measures
