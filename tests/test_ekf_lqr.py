import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import ekf_lqr
from core.envs import make_env

EKF_LQR = "algorithms/ekf_lqr.py"
FILM, EPISODE, DRIFT, RIDGE = (
    "test_what_is_filmed_is_the_belief_pushed_through_the_plan",
    "test_an_episode_starts_with_a_fresh_belief_and_plan_and_its_end_is_learnt_from",
    "test_drift_is_added_before_every_step", "test_the_belief_about_a_linear_system_is_ridge_regression")
PLANTED_ERRORS = {  # and the test that has to notice
    "information is a cost": (EKF_LQR, "total - config.info_weight * nats", "total + config.info_weight * nats",
        "test_objective_is_the_equation[gain-joint]"),
    "information unweighted": (EKF_LQR, "total - config.info_weight * nats", "total - nats",
        "test_objective_is_the_equation[gain-joint]"),
    "independent is joint": (EKF_LQR, 'cov if explore == "independent" else left', "left",
        "test_objective_is_the_equation[gain-independent]"),
    "joint is independent": (EKF_LQR, 'cov if explore == "independent" else left', "cov",
        "test_objective_is_the_equation[gain-joint]"),
    "terminal cost forgotten": (EKF_LQR, "return total + jax.vmap(single.terminal_cost, -1)(x)", "return total",
        "test_objective_is_the_equation[gain-none]"),
    "cost of the wrong state": (EKF_LQR, "jax.vmap(single.cost, (-1, 0, -1))(x, action, next_x)",
        "jax.vmap(single.cost, (-1, 0, -1))(next_x, action, next_x)", "test_objective_is_the_equation[gain-none]"),
    "perfect knowledge plans with the belief": (EKF_LQR, "if perfect else", "if False else",
        "test_perfect_knowledge_plans_with_the_truth"),
    "the frozen learn": (EKF_LQR, 'if config.knowledge != "belief":', 'if config.knowledge == "perfect":',
        "test_only_the_belief_learns"),
    "learns from the reset observation": (EKF_LQR, "(run.belief, run.obs, action, step.next_obs, t)",
        "(run.belief, run.obs, action, step.obs, t)", EPISODE),
    "belief survives the episode": (EKF_LQR,
        "jax.tree.map(functools.partial(where, ended(step)), fresh(env, config), ",
        "jax.tree.map(lambda new, old: old, fresh(env, config), ", EPISODE),
    "no drift": (EKF_LQR, "belief.predict(noise=noise)", "belief", DRIFT),
    "drift does not decay": (EKF_LQR, "config.drift_var * config.drift_decay**t", "config.drift_var", DRIFT),
    "R of one": (EKF_LQR, "R = jnp.full(x.shape, config.obs_var)", "R = jnp.ones(x.shape)", RIDGE),
    "belief's parameters for φ's": (EKF_LQR, "jacobian @ belief.cov @ jacobian.T", "jacobian @ jacobian.T",
        "test_objective_is_the_equation[cost-joint]"),
    "return forgets the newest reward": (EKF_LQR, '{"return": total + step.reward}', '{"return": total}',
        "test_the_return_is_the_sum_of_rewards"),
    "film of another plan": (EKF_LQR, "(run.belief, run.plan.mean, run", "(run.belief, 0 * run.plan.mean, run", FILM),
    "film of variances alone": (EKF_LQR, "cov[jnp.ix_(*[jnp.array(ij)] * 2)]",
        "jnp.diag(cov[jnp.array(ij), jnp.array(ij)])", FILM),
    "film of the belief, not its error": (EKF_LQR, "(error[jnp.array(ij)], cov", "(phi[jnp.array(ij)], cov", FILM),
    "film of a shrunken cloud": (EKF_LQR, '"hip,pq,hjq->hij", J, cov, J', '"hip,pq,hjq->hij", J, cov @ cov, J', FILM),
    "prior of one": (EKF_LQR, "model_of(env, config).guess, config.prior_var)", "model_of(env, config).guess, 1.0)",
        RIDGE),
}

SMALL = dict(num_steps=4, horizon=5, num_samples=24, num_elites=6, kept_elites=2, num_iterations=1)


def make(env="pursuit_evasion_lqr", num_envs=2, env_kwargs=None, **changes):
    config = ekf_lqr.get_config()
    config.env_kwargs = env_kwargs or {}
    config.update(SMALL | dict(env=env, num_envs=num_envs) | changes)
    return make_env(env, num_envs, **config.env_kwargs), ml_collections.FrozenConfigDict(config)


def start(env, config, seed=0):
    """A fresh run, and a key to go on with. Compiled as one: op by op, a dozen draws take longer than all the rest."""
    init_key, key = jax.random.split(jax.random.key(seed))
    return jax.jit(functools.partial(ekf_lqr.init, env=env, config=config))(init_key), key


def advance(env, config, iterations=1):
    run, key = start(env, config)
    step = jax.jit(functools.partial(ekf_lqr.train_step, env=env, config=config))
    for step_key in jax.random.split(key, iterations):
        run, _ = step(run, step_key)
    return run


def a_belief(env, config):
    """Of one environment, correlated, so that no part of it can stand for another."""
    belief, plan = jax.tree.map(lambda x: x[0], ekf_lqr.fresh(env, config))
    root = jax.random.normal(jax.random.key(5), belief.cov.shape)
    mean = belief.mean + 0.1 * jax.random.normal(jax.random.key(6), belief.mean.shape)
    return belief.replace(mean=mean, cov=0.1 * root @ root.T), plan


def by_hand(env, config, belief, x, actions, explore):
    """J of one plan (H, A) in float64, from stacked Jacobians of θ, not of φ."""
    model, single = ekf_lqr.model_of(env, config), env.env

    def dynamics(mean, x, action):
        return model.dynamics(model.phi(belief.unravel(mean)), x, action)

    states, J, total = [x], [], 0.0
    dynamics, jacobian = jax.jit(dynamics), jax.jit(jax.jacfwd(dynamics))
    for action in actions:
        next_x = dynamics(belief.mean, states[-1], action)
        J.append(np.asarray(jacobian(belief.mean, states[-1], action), np.float64)[np.array(single.informative)])
        total += float(single.cost(states[-1], action, next_x))
        states.append(next_x)
    total += float(single.terminal_cost(states[-1]))
    P, r = np.asarray(belief.cov, np.float64), config.obs_var
    if explore == "independent":
        nats = sum(0.5 * np.linalg.slogdet(np.eye(len(H)) + H @ P @ H.T / r)[1] for H in J)
    elif explore == "joint":
        H = np.concatenate(J)
        nats = 0.5 * np.linalg.slogdet(np.eye(len(H)) + H @ P @ H.T / r)[1]
    else:
        nats = 0.0
    return total - config.info_weight * nats


@pytest.mark.parametrize("explore", ["none", "independent", "joint"])
@pytest.mark.parametrize("about", ["gain", "cost"])
def test_objective_is_the_equation(about, explore):
    """With so large a weight that information is not lost among the task's costs."""
    env, config = make(about=about, explore=explore, info_weight=100.0 if about == "gain" else 1e5)
    belief, _ = a_belief(env, config)
    x = env.env.start(jax.random.key(1))
    actions = jax.random.normal(jax.random.key(2), (5, 3, 2))
    model = ekf_lqr.model_of(env, config)
    phi = jax.flatten_util.ravel_pytree(model.phi(belief.params))
    cov = ekf_lqr.cov_of_phi(belief, model)
    objective = functools.partial(ekf_lqr.objective, phi=phi, task=None, explore=explore, env=env, config=config)
    J = jax.jit(objective)(actions, x=x, cov=cov)
    expected = [by_hand(env, config, belief, x, actions[:, n], explore) for n in range(3)]
    np.testing.assert_allclose(J, expected, rtol=2e-3)


def test_information_for_the_task_is_less_than_information():
    """About one direction it is at most the whole, and not nothing where the task depends on what is unknown."""
    env, config = make(explore="task", info_weight=1.0)
    _, joint = make(explore="joint", info_weight=1.0)
    _, none = make(explore="none")
    belief, plan = a_belief(env, config)
    model, x = ekf_lqr.model_of(env, config), env.env.start(jax.random.key(1))
    phi, cov = jax.flatten_util.ravel_pytree(belief.params), ekf_lqr.cov_of_phi(belief, model)
    task = ekf_lqr.what_matters(plan.mean, x, phi, env, config)
    actions = jax.random.normal(jax.random.key(2), (5, 3, 2))
    base = ekf_lqr.objective(actions, x, phi, cov, None, "none", env, none)
    about_task = base - ekf_lqr.objective(actions, x, phi, cov, task, "task", env, config)
    about_all = base - ekf_lqr.objective(actions, x, phi, cov, None, "joint", env, joint)
    assert (about_task > 1e-3).all() and (about_task <= about_all + 1e-4).all()


def transitions(env, config, steps):
    """x, u, x' (steps, ...) of the first environment under random actions, and the run after them."""
    (run, key), rows = start(env, config), []
    interact = jax.jit(functools.partial(ekf_lqr.interact, env=env, config=config))
    for step_key in jax.random.split(key, steps):
        before = run
        run, _ = interact(before, step_key)
        action = env.action_space.sample(jax.random.split(jax.random.clone(step_key))[0], (env.num_envs,))
        rows.append((before.obs[0], action[0], run.obs[0]))
    return [np.asarray(jnp.stack(column), np.float64) for column in zip(*rows, strict=True)], run


def test_the_belief_about_a_linear_system_is_ridge_regression():
    env, config = make("linear_tracking", about="params", actions="random", prior_var=0.7, obs_var=0.05)
    (x, u, next_x), run = transitions(env, config, 12)
    features = np.concatenate([x, u], axis=1)
    guess = np.concatenate([np.asarray(env.env.guess.a), np.asarray(env.env.guess.b)], axis=1)
    precision = features.T @ features / 0.05 + np.eye(6) / 0.7
    rows = np.linalg.solve(precision, features.T @ next_x / 0.05 + guess.T / 0.7).T
    learnt = jax.tree.map(lambda p: p[0], run.belief)
    np.testing.assert_allclose(learnt.params.a, rows[:, :4], atol=2e-3)
    np.testing.assert_allclose(learnt.params.b, rows[:, 4:], atol=2e-3)
    np.testing.assert_allclose(learnt.var.sum(), 4 * np.trace(np.linalg.inv(precision)), rtol=1e-3)


def test_drift_is_added_before_every_step():
    settings = dict(about="params", actions="random", prior_var=0.5, obs_var=1e8, num_envs=1)
    env, config = make("linear_tracking", drift_var=0.1, drift_decay=0.5, drift_floor=0.04, **settings)
    _, run = transitions(env, config, 3)
    np.testing.assert_allclose(run.belief.var, 0.5 + 0.1 + 0.05 + 0.04, rtol=1e-4)


@pytest.mark.parametrize("about, settings", [
    ("gain", {}), ("cost", dict(prior_var=9.0, num_linearizations=8)),
    pytest.param("cost", dict(env_kwargs=dict(infinite_horizon=True), prior_var=25.0, num_linearizations=8),
                 marks=pytest.mark.slow)])
def test_the_gain_is_learnt(about, settings):
    env, config = make(about=about, actions="random", num_steps=50, num_envs=4, **settings)
    run = advance(env, config, 4)
    gain = jax.vmap(lambda belief: ekf_lqr.model_of(env, config).phi(belief.params))(run.belief)
    error = jax.vmap(env.env.gain_error)(gain, run.env_state.env.params).mean()
    assert run.measures["gain_error"] == pytest.approx(float(error), rel=1e-5)
    assert error < (0.15 if about == "gain" or env.env.infinite_horizon else 0.4)


def test_only_the_belief_learns():
    for knowledge in ("belief", "frozen", "perfect"):
        env, config = make(knowledge=knowledge, drift_var=0.1)
        belief, _ = a_belief(env, config)
        learn = jax.jit(functools.partial(ekf_lqr.learn, model=ekf_lqr.model_of(env, config), config=config))
        new, nis, nats = learn(belief, jnp.arange(8.0), jnp.ones(2), jnp.arange(8.0) ** 2, 0)
        same = np.array_equal(new.mean, belief.mean) and np.array_equal(new.cov, belief.cov)
        assert same == (nis == 0) == (nats == 0) == (knowledge != "belief")


def test_perfect_knowledge_plans_with_the_truth():
    """A belief that is the truth, and perfect knowledge with a wrong one, choose the same action."""
    env, perfect = make(knowledge="perfect", num_iterations=2)
    _, believing = make(num_iterations=2)
    run, _ = start(env, perfect)
    truth, x = env.env.truth, run.obs[0]
    belief, plan = jax.tree.map(lambda v: v[0], (run.belief, run.plan))
    right = belief.replace(mean=env.env.gain_of(truth).reshape(-1))
    belief = belief.replace(mean=-10 * right.mean)  # a pursuer that flees
    choose = jax.jit(functools.partial(ekf_lqr.decide, x=x, truth=truth, env=env), static_argnames="config")
    key = jax.random.key(3)
    _, a = choose(key, belief, plan, config=perfect)
    _, b = choose(jax.random.clone(key), right, plan, config=believing)
    _, c = choose(jax.random.clone(key), belief, plan, config=believing)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert not np.allclose(a, c)


def test_an_episode_starts_with_a_fresh_belief_and_plan_and_its_end_is_learnt_from():
    env, config = make(env_kwargs=dict(max_steps=4), actions="plan")
    run = advance(env, config)
    for mine, theirs in zip(jax.tree.leaves((run.belief, run.plan)), jax.tree.leaves(ekf_lqr.fresh(env, config)),
                            strict=True):
        np.testing.assert_array_equal(mine, theirs)
    longer, _ = make(env_kwargs=dict(max_steps=5))
    going_on = advance(longer, config)
    for name in ("gain_error", "variance", "return"):
        np.testing.assert_allclose(run.measures[name], going_on.measures[name], rtol=1e-5)


def test_the_return_is_the_sum_of_rewards():
    env, config = make(num_steps=1, actions="random", num_envs=1)
    _, run = transitions(env, config, 6)
    np.testing.assert_allclose(run.measures["return"], run.env_state.episode_return[0], rtol=1e-6)


@pytest.mark.parametrize("about, env_name", [("cost", "pursuit_evasion_lqr"), ("params", "linear_tracking")])
def test_what_is_filmed_is_the_belief_pushed_through_the_plan(about, env_name):
    """Against a loop over the plan, and its derivative by differences."""
    env, config = make(env_name, about=about, num_envs=1, horizon=20)
    run, key = start(env, config)
    belief, plan = a_belief(env, config)
    plan = plan._replace(mean=jax.random.normal(key, plan.mean.shape))
    run = run._replace(belief=jax.tree.map(lambda x: x[None], belief), plan=jax.tree.map(lambda x: x[None], plan))
    of_phi, (mean, cov) = jax.jit(functools.partial(ekf_lqr.imagine, env=env, config=config))(run)
    model, dynamics = ekf_lqr.model_of(env, config), jax.jit(ekf_lqr.model_of(env, config).dynamics)

    def leads(theta):
        x, places = run.obs[0], []
        for action in plan.mean:
            x = dynamics(model.phi(belief.unravel(jnp.float32(theta))), x, action)
            places.append(np.asarray(env.env.place(x), np.float64))
        return np.stack(places)

    theta, step = np.asarray(belief.mean, np.float64), 1e-2
    J = np.stack([(leads(theta + e) - leads(theta - e)) / (2 * step) for e in step * np.eye(len(theta))], axis=-1)
    np.testing.assert_allclose(mean, leads(theta), rtol=1e-4)
    expected = J @ np.asarray(belief.cov)[None] @ J.transpose(0, 2, 1)
    np.testing.assert_allclose(cov / expected.max(), expected / expected.max(), atol=0.02)
    phi, truth = model.phi(belief.params), model.phi_of_truth(env.env.truth)
    error, _ = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.subtract, phi, truth))
    whole = ekf_lqr.cov_of_phi(belief, model)
    for name, (i, j) in model.shown.items():
        np.testing.assert_allclose(of_phi[name][0], [error[i], error[j]], rtol=1e-4)
        np.testing.assert_allclose(of_phi[name][1], [[whole[i, i], whole[i, j]], [whole[j, i], whole[j, j]]], rtol=1e-3)


def test_seeds_under_vmap_match_seeds_alone():
    env, config = make(num_envs=1)

    def error(key):
        init_key, key = jax.random.split(key)
        run = ekf_lqr.init(init_key, env, config)
        return ekf_lqr.train_step(run, key, env, config)[0].belief.mean

    with jax.debug_key_reuse(False):  # it misfires on a scan over keys under vmap
        keys = jax.random.split(jax.random.key(0), 3)
        together, alone = jax.jit(jax.vmap(error))(keys), jax.jit(error)(keys[1])
    np.testing.assert_allclose(together[1], alone, rtol=1e-4, atol=1e-5)


def test_train_step_is_traced_once():
    (env, config), traces = make(num_envs=1), []

    @jax.jit
    def step(run, key):
        traces.append(1)
        return ekf_lqr.train_step(run, key, env, config)

    run, _ = start(env, config)
    for i in range(3):
        run, _ = step(run, jax.random.key(i))
    assert len(traces) == 1
