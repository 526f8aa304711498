import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import ekf_lqr
from core import planning
from core.envs import Transition, make_env
from core.errors import UserError
from core.evaluation import evaluate

EKF_LQR = "algorithms/ekf_lqr.py"
OBJECTIVE, TASK, LEARN, EPISODE, DRIFT, RIDGE, REVEAL, COPIES, SETTINGS, LOGGED = (
    "test_objective_is_the_equation", "test_information_for_the_task_is_that_of_its_direction",
    "test_only_a_learner_that_is_told_nothing_learns",
    "test_an_episode_ends_in_a_fresh_start_after_its_last_transition", "test_drift_is_added_before_every_update",
    "test_the_belief_about_a_linear_system_is_ridge_regression",
    "test_who_is_shown_the_truth_plans_with_it", "test_every_environment_plans_by_itself",
    "test_settings_reach_the_planner_and_the_filter", "test_what_is_logged_is_what_happened")
PLANTED_ERRORS = {  # and the test that has to notice
    "information is a cost": (EKF_LQR, "total - self.config.info_weight * nats",
        "total + self.config.info_weight * nats", OBJECTIVE),
    "information unweighted": (EKF_LQR, "total - self.config.info_weight * nats", "total - nats", OBJECTIVE),
    "independent is joint": (EKF_LQR, 'cov if self.config.explore == "independent" else posterior', "posterior",
        OBJECTIVE),
    "joint is independent": (EKF_LQR, 'cov if self.config.explore == "independent" else posterior', "cov", OBJECTIVE),
    "terminal cost forgotten": (EKF_LQR, "return total + jax.vmap(self.env.terminal_cost, -1)(x)", "return total",
        OBJECTIVE),
    "cost of the wrong state": (EKF_LQR, "jax.vmap(self.env.cost, (-1, 0, -1))(x, action, next_x)",
        "jax.vmap(self.env.cost, (-1, 0, -1))(next_x, action, next_x)", OBJECTIVE),
    "all rows are informative": (EKF_LQR, "f(phi, x, action)[rows]", "f(phi, x, action)[rows - 2]", OBJECTIVE),
    "belief's parameters for φ's": (EKF_LQR, "jacobian @ belief.cov @ jacobian.T", "jacobian @ jacobian.T", OBJECTIVE),
    "perfect knowledge plans with the belief": (EKF_LQR, "if truth is None else self.unknown.truth(truth)", "", REVEAL),
    "perfect knowledge explores": (EKF_LQR, 'if truth is None and self.config.explore != "none":',
        'if self.config.explore != "none":', REVEAL),
    "who is told learns": (EKF_LQR, "if truth is not None or not self.config.learn:", "if not self.config.learn:",
        LEARN),
    "who must not learn does": (EKF_LQR, "if truth is not None or not self.config.learn:", "if truth is not None:",
        LEARN),
    "learns from the reset observation": (EKF_LQR, "Transition.of(run.obs, action, step)",
        "Transition.of(run.obs, action, step._replace(next_obs=step.obs))", EPISODE),
    "belief survives the episode": (EKF_LQR, "carry = restart(ended(step), initial_carry(run, source.num_envs), carry)",
        "pass", EPISODE),
    "measured after the restart": (EKF_LQR, "jax.vmap(run.agent.measure)(carry.belief, ",
        "jax.vmap(run.agent.measure)(restart(ended(step), initial_carry(run, source.num_envs), carry).belief, ",
        EPISODE),
    "no drift": (EKF_LQR, "carry.belief.predict(noise=drift)", "carry.belief", DRIFT),
    "drift does not decay": (EKF_LQR, "config.drift_var * config.drift_decay**carry.t", "config.drift_var", DRIFT),
    "drift has no floor": (EKF_LQR, "config.drift_decay**carry.t, config.drift_floor)",
        "config.drift_decay**carry.t, 0.0)", DRIFT),
    "R of one": (EKF_LQR, "jnp.full(x.shape, config.obs_var)", "jnp.ones(x.shape)", RIDGE),
    "prior of one": (EKF_LQR, "self.unknown.guess, self.config.prior_var)", "self.unknown.guess, 1.0)", RIDGE),
    "one key for all environments": (EKF_LQR, "jax.random.split(key, len(obs))",
        "jnp.broadcast_to(key, (len(obs),))", COPIES),
    "the slope at no plan": (EKF_LQR, "self.slope(plan.mean, x, phi)", "self.slope(0 * plan.mean, x, phi)", TASK),
    "the slope of information too": (EKF_LQR, "self.objective(actions[:, None], x, phi)[0]",
        "self.objective(actions[:, None], x, phi, jnp.eye(phi.size))[0]", TASK),
    "the task is not told": (EKF_LQR, 'if self.config.explore == "task" else None', "if False else None", TASK),
    "planner's settings dropped": (EKF_LQR, "**self.config.planner, return_mode",
        "**(dict(self.config.planner) | dict(init_std=0.5)), return_mode", SETTINGS),
    "one linearization": (EKF_LQR, "jnp.full(x.shape, config.obs_var), config.num_linearizations)",
        "jnp.full(x.shape, config.obs_var))", SETTINGS),
    "mean of plans": (EKF_LQR, 'return_mode="best"', 'return_mode="mean"', SETTINGS),
    "a plan is not carried on": (EKF_LQR, "return carry._replace(plan=plan), action", "return carry, action", COPIES),
    "steps of one environment": (EKF_LQR, "steps = config.num_envs * config.num_steps", "steps = config.num_steps",
        LOGGED),
    "NIS for nats": (EKF_LQR, "information=carry.nats", "information=carry.nis", LOGGED),
    "episodes not counted": (EKF_LQR, "jax.tree.map(jnp.sum, episode)", "jax.tree.map(jnp.mean, episode)", LOGGED),
}
PLANNER = dict(num_samples=24, num_elites=6, num_iterations=1)
SMALL = dict(num_steps=4, horizon=5, kept_elites=2)


def make(env="pursuit_evasion_lqr", num_envs=2, env_kwargs=None, planner=None, **changes):
    config = ekf_lqr.get_config()
    config.env_kwargs = env_kwargs or {}
    config.update(SMALL | dict(env=env, num_envs=num_envs, planner=PLANNER | (planner or {})) | changes)
    return make_env(env, num_envs, **config.env_kwargs), ml_collections.FrozenConfigDict(config)


def agent_of(*args, **changes):
    env, config = make(*args, **changes)
    return ekf_lqr.Agent(config, env.env)


def start(env, config, seed=0):
    """A fresh run, and a key to go on with. Compiled as one: op by op, a dozen draws take longer than all the rest."""
    init_key, key = jax.random.split(jax.random.key(seed))
    return jax.jit(functools.partial(ekf_lqr.init, source=env, config=config))(init_key), key


def advance(env, config):
    run, key = start(env, config)
    return jax.jit(functools.partial(ekf_lqr.train_step, source=env, config=config))(run, key)


def a_belief(agent):
    """Correlated, so that no part of it can stand for another."""
    belief = agent.start().belief
    root = jax.random.normal(jax.random.key(5), belief.cov.shape)
    mean = belief.mean + 0.1 * jax.random.normal(jax.random.key(6), belief.mean.shape)
    return belief.replace(mean=mean, cov=0.1 * root @ root.T)


def jacobians(agent, belief, x, actions):
    """The costs along one plan (H, A) and ∂x'/∂θ of its informative rows, in float64."""
    unknown, env = agent.unknown, agent.env

    def dynamics(mean, x, action):
        return unknown.dynamics(unknown.reduce(belief.unravel(mean)), x, action)

    def step(x, action):
        next_x = dynamics(belief.mean, x, action)
        return next_x, (env.cost(x, action, next_x), jax.jacfwd(dynamics)(belief.mean, x, action))

    last, (costs, J) = jax.jit(functools.partial(jax.lax.scan, step))(x, actions)
    total = np.asarray(costs, np.float64).sum() + float(env.terminal_cost(last))
    return total, np.asarray(J, np.float64)[:, np.array(unknown.informative)]


def nats_of(H, P, r):
    return 0.5 * np.linalg.slogdet(np.eye(len(H)) + H @ P @ H.T / r)[1]


@pytest.mark.parametrize("about", ["gain", "cost"])
def test_objective_is_the_equation(about):
    """With so large a weight that information is not lost among the task's costs."""
    weight = 100.0 if about == "gain" else 1e5
    agents = {name: agent_of(about=about, explore=name, info_weight=weight) for name in ("independent", "joint")}
    agent = agents["joint"]
    belief, x = a_belief(agent), agent.env.start(jax.random.key(1))
    actions = jax.random.normal(jax.random.key(2), (5, 3, 2))

    @jax.jit
    def program(belief):
        phi, cov = agent.unknown.reduce(belief.params), agent.covariance(belief)
        return {name: a.objective(actions, x, phi, cov) for name, a in agents.items()} | {
            "none": agent.objective(actions, x, phi)}

    J, P, r = program(belief), np.asarray(belief.cov, np.float64), agent.config.obs_var
    for n in range(3):
        total, H = jacobians(agent, belief, x, actions[:, n])
        np.testing.assert_allclose(J["none"][n], total, rtol=1e-3)
        independent, joint = sum(nats_of(rows, P, r) for rows in H), nats_of(np.concatenate(H), P, r)
        np.testing.assert_allclose(J["independent"][n], total - weight * independent, rtol=2e-3)
        np.testing.assert_allclose(J["joint"][n], total - weight * joint, rtol=2e-3)


@pytest.fixture
def searches(monkeypatch):
    """Of every search for a plan, its arguments. Instead of searching, it draws an action from its key."""
    calls = []

    def icem(key, cost, plan, low, high, **settings):
        calls.append(dict(cost=cost, plan=plan, settings=settings))
        return plan._replace(mean=plan.mean + 1.0), jax.random.uniform(key, low.shape), {}

    monkeypatch.setattr(planning, "icem", icem)
    return calls


def test_information_for_the_task_is_that_of_its_direction(searches):
    """I(g'φ; y) by hand, and g by differences along the plan that the search starts from."""
    agent = agent_of(explore="task", info_weight=1e3)
    belief, x, plan = a_belief(agent), agent.env.start(jax.random.key(1)), agent.start().plan
    plan = plan._replace(mean=jax.random.normal(jax.random.key(3), plan.mean.shape))
    actions = jax.random.normal(jax.random.key(2), (5, 3, 2))

    @jax.jit
    def program(belief):
        agent.plan(jax.random.key(4), belief, plan, x)
        cost = searches[-1]["cost"]
        phi = cost.keywords["phi"]
        J = jax.vmap(lambda phi: agent.objective(plan.mean[:, None], x, phi)[0])
        shifts = 0.01 * jnp.eye(phi.size)
        slope = (J(phi[None] + shifts) - J(phi[None] - shifts)) / 0.02
        return cost.keywords["task"][:, 0], slope, (agent.objective(actions, x, phi) - cost(actions)) / 1e3

    task, slope, nats = program(belief)
    np.testing.assert_allclose(task, slope, rtol=0.05, atol=0.02 * np.abs(slope).max())
    P, g = np.asarray(belief.cov, np.float64), np.asarray(task, np.float64)
    for n in range(3):
        H = np.concatenate(jacobians(agent, belief, x, actions[:, n])[1])
        left = P - P @ H.T @ np.linalg.solve(H @ P @ H.T + agent.config.obs_var * np.eye(len(H)), H @ P)
        np.testing.assert_allclose(nats[n], -0.5 * np.log(g @ left @ g / (g @ P @ g)), rtol=0.01)


@functools.cache
def random_episode(steps, **changes):
    """x, u, x' (steps, ...) of the first environment under random actions, and the run after them."""
    env, config = make(actions="random", num_steps=1, **changes)
    (run, key), rows = start(env, config), []
    step = jax.jit(functools.partial(ekf_lqr.train_step, source=env, config=config))
    for step_key in jax.random.split(key, steps):
        before = run
        run, _ = step(before, step_key)
        act_key = jax.random.split(jax.random.split(jax.random.clone(step_key), 1)[0])[0]
        rows.append((before.obs[0], env.action_space.sample(act_key, (env.num_envs,))[0], run.obs[0]))
    return [np.asarray(jnp.stack(column), np.float64) for column in zip(*rows, strict=True)], run


def test_the_belief_about_a_linear_system_is_ridge_regression():
    (x, u, next_x), run = random_episode(12, env="linear_tracking", about="params", prior_var=0.7, obs_var=0.05)
    features, guess = np.concatenate([x, u], axis=1), run.agent.env.guess
    guess = np.concatenate([np.asarray(guess.a), np.asarray(guess.b)], axis=1)
    precision = features.T @ features / 0.05 + np.eye(6) / 0.7
    rows = np.linalg.solve(precision, features.T @ next_x / 0.05 + guess.T / 0.7).T
    learnt = jax.tree.map(lambda p: p[0], run.carry.belief)
    np.testing.assert_allclose(learnt.params.a, rows[:, :4], atol=2e-3)
    np.testing.assert_allclose(learnt.params.b, rows[:, 4:], atol=2e-3)
    np.testing.assert_allclose(learnt.var.sum(), 4 * np.trace(np.linalg.inv(precision)), rtol=1e-3)


def test_drift_is_added_before_every_update():
    agent = agent_of("linear_tracking", about="params", prior_var=0.5, obs_var=1e8, drift_var=0.1, drift_decay=0.5,
                     drift_floor=0.04)
    carry, learn = agent.start(), jax.jit(agent.learn)
    for _ in range(3):
        carry = learn(carry, transition(agent))
    np.testing.assert_allclose(carry.belief.var, 0.5 + 0.1 + 0.05 + 0.04, rtol=1e-4)


def transition(agent):
    d = agent.env.start(jax.random.key(0)).size
    x = jnp.arange(1.0, 1.0 + d) / d
    truth = jax.flatten_util.ravel_pytree(agent.env.truth)[0] if agent.env.reveal else jnp.zeros(0)
    obs, next_obs = jnp.append(x, truth), jnp.append(x**2 + 0.3, truth)
    return Transition(obs, jnp.ones(agent.env.action_space.shape), 0.0, next_obs, False, False)


def test_only_a_learner_that_is_told_nothing_learns():
    for told, learn in ((False, True), (False, False), (True, True)):
        agent = agent_of(learn=learn, drift_var=0.1, env_kwargs=dict(reveal=told))
        carry = agent.start()._replace(belief=a_belief(agent))
        new = jax.jit(agent.learn)(carry, transition(agent))
        same = np.array_equal(new.belief.mean, carry.belief.mean) and np.array_equal(new.belief.cov, carry.belief.cov)
        assert same == (new.nis == 0) == (new.nats == 0) == (told or not learn)


def test_who_is_shown_the_truth_plans_with_it(searches):
    """And explores nothing; who is not shown it plans with the mean of its belief."""
    for told in (True, False):
        agent = agent_of(env_kwargs=dict(reveal=told), explore="joint")
        belief, step = a_belief(agent), transition(agent)
        agent.plan(jax.random.key(0), belief, agent.start().plan, step.obs)
        cost = searches[-1]["cost"].keywords
        expected = agent.env.gain_of(agent.env.truth).ravel() if told else belief.mean
        np.testing.assert_allclose(cost["phi"], expected, rtol=1e-6)
        np.testing.assert_array_equal(cost["x"], step.obs[:8])
        assert (cost["cov"] is None) == told and cost["task"] is None


def test_every_environment_plans_by_itself(searches):
    """Each with a key of its own, and from the plan that its last search left."""
    env, config = make(num_envs=3)
    run, key = start(env, config)
    carry, action = ekf_lqr.act(run, run.carry, run.obs, key)
    assert (np.diff(action, axis=0) != 0).all()
    np.testing.assert_array_equal(carry.plan.mean, run.carry.plan.mean + 1)


def test_settings_reach_the_planner_and_the_filter(searches):
    settings = dict(num_samples=11, num_elites=3, num_iterations=2, decay=1.1, init_std=0.2, noise_beta=0.7,
                    momentum=0.3)
    agent = agent_of(planner=settings, horizon=6, kept_elites=1)
    carry = agent.start()
    agent.plan(jax.random.key(3), carry.belief, carry.plan, jnp.ones(8))
    assert searches[0]["settings"] == settings | dict(return_mode="best")
    assert searches[0]["plan"].elites.shape == (6, 1, 2)

    def updated(num_linearizations):
        agent = agent_of(about="cost", prior_var=9.0, num_linearizations=num_linearizations)
        return jax.jit(agent.learn)(agent.start(), transition(agent)).belief.mean

    assert np.abs(updated(1) - updated(8)).max() > 0.01


@pytest.fixture(scope="module")
def ended():
    """(traces, runs and infos of three train_steps) of two environments whose episodes end with the second step."""
    (env, config), traces = make(env_kwargs=dict(max_steps=4), num_steps=2), []
    run, key = start(env, config)

    @jax.jit
    def step(run, key):
        traces.append(1)
        return ekf_lqr.train_step(run, key, env, config)

    rows = [(run, None)]
    for step_key in jax.random.split(key, 3):
        rows.append(step(rows[-1][0], step_key))
    return traces, rows


def test_an_episode_ends_in_a_fresh_start_after_its_last_transition(ended):
    """As if it had not ended, but for what is kept of it: the last transition is learnt from, and then measured."""
    _, ((_, _), (before, _), (run, _), (after, _)) = ended
    fresh = ekf_lqr.initial_carry(run, 2)
    jax.tree.map(np.testing.assert_array_equal, run.carry, fresh)
    assert (before.carry.t == 2).all() and (after.carry.t == 2).all()
    assert np.abs(before.carry.plan.mean).max() + np.abs(before.carry.plan.elites).max() > 0

    env, config = make(env_kwargs=dict(max_steps=2), num_steps=1, actions="random", num_envs=1)
    first, key = start(env, config)
    step = jax.jit(functools.partial(ekf_lqr.train_step, source=env, config=config))
    second, _ = step(first, key)
    last, _ = step(second, jax.random.key(9))

    @jax.jit
    def by_hand(key):
        act_key, env_key = jax.random.split(jax.random.split(key, 1)[0])
        action = env.action_space.sample(act_key, (1,))
        _, ts = env.step(env_key, second.env_state, action)
        carry = ekf_lqr.observe(second, second.carry, Transition.of(second.obs, action, ts))
        return carry.belief, ts

    belief, ts = by_hand(jax.random.key(9))
    assert ts.truncated.all() and (ts.next_obs != ts.obs).any()
    np.testing.assert_allclose(last.measures["variance"], belief.var.sum(), rtol=1e-5)
    error = env.env.gain_error(belief.mean[0].reshape(2, 4), env.env.truth)
    np.testing.assert_allclose(last.measures["gain_error"], error, rtol=1e-4)


def test_what_is_logged_is_what_happened(ended):
    traces, ((_, _), (_, first), (run, info), (_, _)) = ended
    assert len(traces) == 1
    assert (run.clock.env_steps, run.clock.updates) == (8, 8)
    assert first["episode"]["count"] == 0 and info["episode"]["count"] == 2 and info["episode"]["length"] == 8
    np.testing.assert_allclose(4 * (first["reward"] + info["reward"]), info["episode"]["return"], rtol=1e-5)
    assert 0 < info["information"] < 10 and not np.isclose(info["information"], info["nis"])
    assert ekf_lqr.measure(run, None, None, None) is run.measures


@pytest.mark.parametrize("about, settings", [
    ("gain", {}), ("cost", dict(prior_var=9.0, num_linearizations=8)),
    pytest.param("cost", dict(env_kwargs=dict(infinite_horizon=True), prior_var=25.0, num_linearizations=8),
                 marks=pytest.mark.slow)])
def test_the_gain_is_learnt(about, settings):
    env, config = make(about=about, actions="random", num_steps=200, num_envs=4, **settings)
    run, _ = advance(env, config)
    unknown = run.agent.unknown
    gain = jax.vmap(lambda belief: unknown.reduce(belief.params).reshape(2, 4))(run.carry.belief)
    error = jax.vmap(env.env.gain_error)(gain, run.env_state.env.params).mean()
    assert run.measures["gain_error"] == pytest.approx(float(error), rel=1e-5)
    assert error < (0.15 if about == "gain" or env.env.infinite_horizon else 0.4)


@pytest.mark.parametrize("name", ["unicycle_pursuit", "planar_drone_wind", "cartpole_swingup", "cartpole_balance"])
def test_it_starts_on_every_hidden_environment(name):
    """Each of which has few things of its own that a belief needs."""
    run, info = jax.eval_shape(lambda: advance(*make(name, about="params", explore="independent", num_steps=1)))
    assert run.measures["parameter_error"].shape == info["nis"].shape == ()


@pytest.mark.slow
def test_who_knows_the_wind_flies_better_than_who_does_not():
    """And who learns it: 5,312, 5,291 and 5,607 is what they lost at the time of writing."""
    def lost(env_kwargs=None, **changes):
        env, config = make("planar_drone_wind", about="params", num_envs=8, horizon=25, obs_var=1e-4, kept_elites=3,
                           planner=dict(num_samples=100, num_elites=10, num_iterations=3), env_kwargs=env_kwargs,
                           **changes)
        run, key = start(env, config)
        act, observe = (functools.partial(f, run) for f in (ekf_lqr.act, ekf_lqr.observe))
        play = jax.jit(lambda key: evaluate(act, env, key, ekf_lqr.initial_carry(run, 8), observe)[0])
        return -np.asarray(play(key)).mean()

    knows, learns, stays = lost(dict(reveal=True)), lost(), lost(learn=False)
    assert max(knows, learns) + 150 < stays, (knows, learns, stays)


@pytest.mark.parametrize("changes, words", [
    (dict(about="weather"), "gain, cost"), (dict(env="pursuit_evasion"), 'no "unknown"')])
def test_a_mistake_is_named(changes, words):
    env, config = make(**changes)
    with pytest.raises(UserError, match=words):
        jax.eval_shape(lambda: ekf_lqr.init(jax.random.key(0), env, config))


def test_seeds_under_vmap_match_seeds_alone(ended):
    """Of three seeds together, the second is the one that ran alone."""
    env, config = make(env_kwargs=dict(max_steps=4), num_steps=2)
    _, ((run, _), (alone, _), *_) = ended
    others = [start(env, config, seed)[0] for seed in (1, 2)]
    runs = jax.tree.map(lambda *leaves: jnp.stack(leaves), others[0], run, others[1])
    _, key = jax.random.split(jax.random.key(0))
    with jax.debug_key_reuse(False):  # it misfires on a scan over keys under vmap
        keys = jnp.stack([jax.random.key(5), jax.random.split(key, 3)[0], jax.random.key(6)])
        step = jax.jit(jax.vmap(functools.partial(ekf_lqr.train_step, source=env, config=config)))
        together, _ = step(runs, keys)
    mean = together.carry.belief.mean
    np.testing.assert_allclose(mean[1], alone.carry.belief.mean, rtol=1e-4, atol=1e-5)
    assert (mean[0] != mean[1]).any() and (mean[2] != mean[1]).any()
