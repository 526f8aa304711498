"""Dual control: plan under a Gaussian belief over unknown dynamics, act, observe, learn (Palafox et al., 2026,
arXiv:2601.21988; dual control is Feldbaum's, 1960).

    x' = f(φ(θ), x, u) + w                the system; θ is not known
    b  = N(m, P) over θ                   the belief; an extended Kalman filter on (x, u, x')             learn
    J(u_1:H) = Σ_t c(x_t, u_t) + c_H(x_H) − λ I(u_1:H),   x_{t+1} = f(φ(m), x_t, u_t)                     objective
    I = Σ_t ½ log det(I + R⁻¹ H_t P_t H_t'),   H_t = ∂f/∂φ at x_t, u_t, rows that φ reaches               objective

    explore="none"         I = 0: certainty equivalence, which learns from what it happens to see
    explore="independent"  P_t = P: every step is credited as if the ones before had taught nothing
    explore="joint"        P_{t+1} = P_t downdated by step t: the mutual information of θ and the whole trajectory
    explore="task"         joint, about g'φ alone, g = ∂J/∂φ along the last plan: what the task's cost depends on

    knowledge="belief"     learn;  "frozen": never learn;  "perfect": plan with the truth, which bounds them all
    about="params"         θ = φ = the environment's hidden Params, whatever system it is
    about="gain"           the pursuer's gain G: x' is linear in G, so the filter is an exact Kalman filter
    about="cost"           the logarithms of its diagonal Q, with R = I: only the ratio can be seen in what it does

    m, P mean and cov; λ info_weight; R obs_var · I; c the environment's cost; H horizon. One belief and one plan per
    environment; both start afresh with an episode. The planner is core.planning.icem.

Departures: information is in nats and not divided by the number of parameters; the newest transition is learnt from
before the next plan; the noise R of the filter and of the information is the same.
"""
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from jax.flatten_util import ravel_pytree

from core import ekf, planning
from core.envs.batch import where
from core.envs.pursuit_evasion_lqr import Params
from core.errors import check_choices
from core.evaluation import ended


def get_config():
    return ml_collections.ConfigDict(dict(
        algorithm=pathlib.Path(__file__).stem,  # so a copied file launches itself
        env="pursuit_evasion_lqr",
        env_kwargs=dict(process_noise=0.0),  # its own settings
        num_envs=1,  # each with its own truth, belief and plan
        num_steps=1,  # of the episode in one train_step
        env_steps=250,
        eval_every=10,
        knowledge="belief",  # or frozen, perfect
        about="gain",  # or cost, params
        explore="none",  # or independent, joint, task
        info_weight=50.0,  # λ, task cost for a nat
        actions="plan",  # or random
        prior_var=0.5,  # P_0 = prior_var · I
        obs_var=0.01,  # R = obs_var · I
        num_linearizations=1,  # of f in one update; about="cost" is so curved that it takes 8
        drift_var=0.0,  # Q_t = max(drift_var · drift_decay^t, drift_floor) · I, what θ may move in a step
        drift_decay=1.0,
        drift_floor=0.0,
        horizon=20,
        num_samples=500,
        num_elites=50,
        num_iterations=5,
        population_decay=1.25,  # of iCEM, from iteration to iteration
        kept_elites=15,
        init_std=0.5,  # of the box
        noise_beta=2.0,
    ))


class Model(NamedTuple):
    """What is unknown of a system, and how it enters the dynamics."""

    guess: Any  # θ at first
    phi: Callable  # θ -> what the dynamics take
    dynamics: Callable  # φ, x, u -> x'
    phi_of_truth: Callable  # the environment's Params -> φ
    shown: dict  # {name: two entries of φ}, what a film shows of it


def model_of(env, config):
    single = env.env
    if config.about == "params":
        return Model(single.guess, lambda theta: theta, single.dynamics, lambda params: params, single.shown)
    of_gain = {"gain in x: position, velocity": (0, 2), "gain in y: position, velocity": (5, 7)}
    if config.about == "gain":
        return Model(single.gain_of(single.guess), lambda gain: gain, single.pursue, single.gain_of, of_gain)

    def gain_of_cost(log_q):
        return single.gain_of(Params(log_q, jnp.zeros(2)))

    return Model(single.guess.log_q, gain_of_cost, single.pursue, single.gain_of, of_gain)


class Run(NamedTuple):
    belief: ekf.Full  # (E, ...)
    plan: planning.Carry  # (E, ...)
    env_state: Any
    obs: jax.Array
    measures: dict  # of the last step


def init(key, env, config):
    check_choices(config, knowledge=("belief", "frozen", "perfect"), about=("params", "gain", "cost"),
                  explore=("none", "independent", "joint", "task"), actions=("plan", "random"))
    env_state, obs = env.reset(key)
    belief, plan = fresh(env, config)
    nothing = {k: jnp.float32(0) for k in ("return", error_name(config), "variance")}
    return Run(belief, plan, env_state, obs, nothing)


def fresh(env, config):
    """The belief and the plan at the start of an episode, (E, ...)."""
    start = (ekf.Full.create(model_of(env, config).guess, config.prior_var),
             planning.initial_carry(*env.action_space.bounds, config.horizon, config.kept_elites))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (env.num_envs, *x.shape)), start)


def objective(actions, x, phi, cov, task, explore, env, config):
    """J of plans (H, N, A) from x, with the belief N(mean, cov) over the flat φ: (N,). Plans are the minor axis."""
    mean, unravel = phi
    single, model = env.env, model_of(env, config)
    rows = jnp.array(single.informative)
    noise = jnp.full(len(single.informative), config.obs_var)

    def seen(mean, x, action):  # the part of x' that φ reaches
        return model.dynamics(unravel(mean), x, action)[rows]

    def step(carry, action):
        x, cov, total = carry
        next_x = jax.vmap(model.dynamics, (None, -1, 0), -1)(unravel(mean), x, action)
        total = total + jax.vmap(single.cost, (-1, 0, -1))(x, action, next_x)
        if explore != "none":
            H = jax.vmap(jax.jacrev(seen), (None, -1, 0), -1)(mean, x, action)  # (rows, |φ|, N)
            nats, left = ekf.information(cov, H, noise, task)
            total = total - config.info_weight * nats
            cov = cov if explore == "independent" else left
        return (next_x, cov, total), None

    N = actions.shape[1]
    if explore in ("joint", "task"):
        cov = jnp.broadcast_to(cov[..., None], (*cov.shape, N))
    start = (jnp.broadcast_to(x[:, None], (x.size, N)), cov, jnp.zeros(N))
    (x, _, total), _ = jax.lax.scan(step, start, actions)
    return total + jax.vmap(single.terminal_cost, -1)(x)


def decide(key, belief, plan, x, truth, env, config):
    """The first action of the best plan found, and what the next search starts from. One environment."""
    model = model_of(env, config)
    perfect = config.knowledge == "perfect"
    mean, unravel = ravel_pytree(model.phi_of_truth(truth) if perfect else model.phi(belief.params))
    cov = cov_of_phi(belief, model)
    task = what_matters(plan.mean, x, (mean, unravel), env, config) if config.explore == "task" else None
    phi, explore = (mean, unravel), config.explore
    cost = functools.partial(objective, x=x, phi=phi, cov=cov, task=task, explore=explore, env=env, config=config)
    plan, action, _ = planning.icem(
        key, cost, plan, *env.action_space.bounds, num_samples=config.num_samples, num_elites=config.num_elites,
        num_iterations=config.num_iterations, init_std=config.init_std, noise_beta=config.noise_beta,
        decay=config.population_decay)
    return plan, action


def cov_of_phi(belief, model):
    """∂φ/∂θ P (∂φ/∂θ)': once per plan, so that a step of a plan differentiates only what φ does to x'."""
    def phi(mean):
        return ravel_pytree(model.phi(belief.unravel(mean)))[0]

    jacobian = jax.jacfwd(phi)(belief.mean)
    return jacobian @ belief.cov @ jacobian.T


def what_matters(actions, x, phi, env, config):
    """g = ∂J/∂φ along the plan `actions` (H, A), without information: (|φ|, 1)."""
    mean, unravel = phi

    def cost(mean):
        return objective(actions[:, None], x, (mean, unravel), None, None, "none", env, config)[0]

    return jax.grad(cost)(mean)[:, None]


def learn(belief, x, action, next_x, t, model, config):
    """One step of the filter on the newest transition."""
    if config.knowledge != "belief":
        return belief, jnp.float32(0), jnp.float32(0)
    noise = jnp.maximum(config.drift_var * config.drift_decay**t, config.drift_floor)

    def observe(theta):
        return model.dynamics(model.phi(theta), x, action)

    R = jnp.full(x.shape, config.obs_var)
    belief, info = ekf.update(belief.predict(noise=noise), observe, next_x, R, config.num_linearizations)
    return belief, info.nis, info.information


def train_step(run, key, env, config):
    """`num_steps` of plan, act, observe, learn, in every environment."""
    step = functools.partial(interact, env=env, config=config)
    run, info = jax.lax.scan(step, run, jax.random.split(key, config.num_steps))
    return run, jax.tree.map(jnp.mean, info)


def interact(run, key, env, config):
    plan_key, env_key = jax.random.split(key)
    truth, t = run.env_state.env.params, run.env_state.episode_length
    if config.actions == "random":
        plan, action = run.plan, env.action_space.sample(plan_key, (env.num_envs,))
    else:
        choose, keys = functools.partial(decide, env=env, config=config), jax.random.split(plan_key, env.num_envs)
        plan, action = jax.vmap(choose)(keys, run.belief, run.plan, run.obs, truth)
    total = run.env_state.episode_return
    env_state, step = env.step(env_key, run.env_state, action)
    observe = functools.partial(learn, model=model_of(env, config), config=config)
    belief, nis, nats = jax.vmap(observe)(run.belief, run.obs, action, step.next_obs, t)
    measures = measure_step(belief, truth, env, config) | {"return": total + step.reward}
    belief, plan = jax.tree.map(functools.partial(where, ended(step)), fresh(env, config), (belief, plan))
    return Run(belief, plan, env_state, step.obs, jax.tree.map(jnp.mean, measures)), dict(nis=nis, information=nats)


def measure_step(belief, truth, env, config):
    """How far the belief's φ is from the truth, and how sure it is. (E,) each."""
    model, single = model_of(env, config), env.env
    error = single.parameter_error if config.about == "params" else single.gain_error
    return {error_name(config): jax.vmap(lambda b, truth: error(model.phi(b.params), truth))(belief, truth),
            "variance": belief.var.sum(-1)}


def error_name(config):
    return "parameter_error" if config.about == "params" else "gain_error"


def measure(run, key, env, config):
    """What a run of this method is judged by: the task's reward so far and the belief's error, at this moment."""
    return run.measures


def imagine(run, env, config):
    """For a film, of the first environment: {name: (mean (2,), cov (2, 2))} of φ less its truth, and mean (H, 2) and
    cov (H, 2, 2) of where the plan leads, J P J' with J = ∂place/∂φ along it. Only what θ makes uncertain counts."""
    first = (run.belief, run.plan.mean, run.obs, run.env_state.env.params)
    (belief, plan, x, truth), model = jax.tree.map(lambda leaf: leaf[0], first), model_of(env, config)
    (phi, unravel), cov = ravel_pytree(model.phi(belief.params)), cov_of_phi(belief, model)
    error = phi - ravel_pytree(model.phi_of_truth(truth))[0]

    def places(phi):
        def step(x, action):
            x = model.dynamics(unravel(phi), x, action)
            return x, env.env.place(x)

        return jax.lax.scan(step, x, plan)[1]

    J = jax.jacfwd(places)(phi)  # (H, 2, |φ|)
    of_phi = {name: (error[jnp.array(ij)], cov[jnp.ix_(*[jnp.array(ij)] * 2)]) for name, ij in model.shown.items()}
    return of_phi, (places(phi), jnp.einsum("hip,pq,hjq->hij", J, cov, J))
