"""iCEM online: the filter against numpy, what the plan reads, when a carry starts again."""
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import icem_online
from core import ekf
from core.dataset import write_arrays
from core.envs import Transition, make_env
from core.errors import UserError

ICEM = "algorithms/icem_online.py"
FILTER, FROZEN, MODELS, SEARCH, STEP, REVEAL, REHEARSAL, READS = (
    "test_the_last_layer_is_a_kalman_filter", "test_a_frozen_model_is_taken_for_certain",
    "test_models_predict_what_their_equations_say", "test_a_plan_is_priced_by_the_model_or_by_the_truth",
    "test_a_step_acts_observes_and_starts_again", "test_the_truth_is_used_and_nothing_is_learnt",
    "test_a_rehearsal_keeps_the_weights", "test_weights_are_read_if_they_fit")
PLANTED_ERRORS = {  # and the test that has to notice
    "the first layer for the last": (ICEM, 'f"Dense_{len(self.config.hidden_dims)}"', '"Dense_0"', FILTER),
    "prior of one": (ICEM, "(self.theta(), self.config.prior_var)", "(self.theta(), 1.0)", FILTER),
    "R of one": (ICEM, '.full_like(agent.scaling["scale"], config.obs_var)', '.ones_like(agent.scaling["scale"])',
                 FILTER),
    "errors not scaled": (ICEM, ' - next_x) / self.scaling["scale"]', " - next_x)", FILTER),
    "never forgets": (ICEM, "and config.forgetting < 1:", "and False:", FILTER),
    "forgets without end": (ICEM, "10 * config.prior_var * before.mean.size", "jnp.inf", FILTER),
    "no drift": (ICEM, "carry.belief.predict(noise=carry.drift_var) if config.learn", "carry.belief if config.learn",
                 FILTER),
    "drift after forgetting": (ICEM, "carry.belief.predict(noise=carry.drift_var) if config.learn",
                               "carry.belief.predict(noise=2 * carry.drift_var) if config.learn", FILTER),
    "the first drift for ever": (ICEM, "drift_var=ekf.adapt_noise(", "nothing=ekf.adapt_noise(", FILTER),
    "noise is fixed": (ICEM, "if config.learn and config.noise_rate:", "if False:", FILTER),
    "R from the belief before": (ICEM, "ekf.adapt_R(carry.R, after,", "ekf.adapt_R(carry.R, before,", FILTER),
    "likelihood upside down": (ICEM, "nll=-info.log_lik", "nll=info.log_lik", FILTER),
    "half of the band": (ICEM, "nis_band(zero.size, 1, 0.9)", "nis_band(zero.size, 1, 0.5)", FILTER),
    "one linearisation": (ICEM, "carry.R, config.num_linearizations)", "carry.R)",
                          "test_physics_is_linearised_as_often_as_told"),
    "a frozen model doubts": (ICEM, "ekf.Diagonal.create(self.theta(), 0.0)",
                              "ekf.Diagonal.create(self.theta(), self.config.prior_var)", FROZEN),
    "inputs not centred": (ICEM, ' - self.scaling["centre"]) / self.scaling["spread"]', ') / self.scaling["spread"]',
                           MODELS),
    "inputs not spread": (ICEM, ' - self.scaling["centre"]) / self.scaling["spread"]', ' - self.scaling["centre"])',
                          MODELS),
    "change not scaled": (ICEM, 'return x + self.scaling["scale"] * self', "return x + self", MODELS),
    "features ignored": (ICEM, 'getattr(self.env, "features", lambda x: x)(x)', "x", MODELS),
    "physics starts from the truth": (ICEM, "weights=env.guess", "weights=env.truth", MODELS),
    "only one layer in the plan": (ICEM, "else {**self.weights, **theta}", "else self.weights", SEARCH),
    "plans with the first weights": (ICEM, "self.predict, self.insert(belief.params))", "self.predict, self.weights)",
                                     SEARCH),
    "the truth is not used": (ICEM, "model if truth is None else functools", "model if True else functools", SEARCH),
    "the end of a plan is free": (ICEM, "self.env.cost, self.env.terminal_cost, x)",
                                  "self.env.cost, lambda x: 0.0 * x[0], x)", SEARCH),
    "best and mean exchanged": (ICEM, '"best" if exact else "mean"', '"mean" if exact else "best"', SEARCH),
    "a learned model is exact": (ICEM, 'exact = truth is not None or self.config.model == "physics"', "exact = True",
                                 SEARCH),
    "a setting of the planner ignored": (ICEM, "**self.config.planner,",
                                         "**{**self.config.planner, 'init_std': 0.5},", SEARCH),
    "one key for all environments": (ICEM, "jax.random.split(key, len(obs)), carry",
                                     "jnp.broadcast_to(key, (len(obs),)), carry", SEARCH),
    "the plan is forgotten": (ICEM, "return carry._replace(plan=plan), action", "return carry, action", STEP),
    "belief survives the episode": (ICEM, "restart(ended(step), initial_carry(run, source.num_envs), carry)", "carry",
                                    STEP),
    "a fall is no end": (ICEM, "restart(ended(step), initial", "restart(step.terminated, initial", STEP),
    "learns across resets": (ICEM, "Transition.of(run.obs, action, step))",
                             "Transition.of(run.obs, action, step._replace(next_obs=step.obs)))", STEP),
    "learns from where it got to": (ICEM, "Transition.of(run.obs, action", "Transition.of(step.obs, action", STEP),
    "one key to plan and to step": (ICEM, "source.step(env_key, run", "source.step(act_key, run", STEP),
    "steps of one environment": (ICEM, "tick(env_steps=source.num_envs", "tick(env_steps=1", STEP),
    "the oracle learns": (ICEM, "return after if truth is None else", "return after if True else", REVEAL),
    "the truth is an input": (ICEM, "hidden.split(source.env, obs)[0][0], source.env", "obs[0], source.env", REVEAL),
    "a rehearsal from the plan of training": (ICEM, "._replace(plan=initial_carry(run, source.num_envs).plan)", "",
                                              REHEARSAL),
    "a rehearsal from the prior": (ICEM, "jax.tree.map(lambda leaf: leaf[index], run.carry)",
                                   "initial_carry(run, source.num_envs)", REHEARSAL),
    "every rehearsal with the first weights": (ICEM, "jnp.arange(source.num_envs) % config.num_envs",
                                               "jnp.zeros(source.num_envs, int)", REHEARSAL),
    "pretrained weights ignored": (ICEM, "(read_params(config.pretrained, params) if config.pretrained else params)",
                                   "params", READS),
    "any weights are read": (ICEM, "if found.get(name) != due.get(name):", "if False:", READS),
    "what is missing is not noticed": (ICEM, "found.keys() | due.keys()", "found.keys()", READS),
}

SMALL = dict(horizon=3, kept_elites=1, hidden_dims=(5,),
             planner=dict(num_samples=8, num_elites=3, num_iterations=1, decay=1.1, init_std=0.7, noise_beta=1.5,
                          momentum=0.2))


def make(env="linear_tracking", num_envs=1, env_kwargs=None, **changes):
    config = icem_online.get_config()
    config.env_kwargs = env_kwargs or {}
    config.update(SMALL | dict(env=env, num_envs=num_envs) | changes)
    return make_env(env, num_envs, **config.env_kwargs), ml_collections.FrozenConfigDict(config)


def init(env, config, seed=0):
    """A run whose scaling is not of ones."""
    run = jax.jit(functools.partial(icem_online.init, source=env, config=config))(jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 3))
    scaling = {name: value + jnp.exp(0.3 * jax.random.normal(next(keys), value.shape)) - 1
               for name, value in sorted(run.agent.scaling.items())}
    return run._replace(agent=run.agent.replace(scaling=scaling))


def some_transitions(n, seed=3):
    keys = jax.random.split(jax.random.key(seed), 3)
    x, action, next_x = (jax.random.normal(key, (n, size)) for key, size in zip(keys, (4, 2, 4), strict=True))
    no = jnp.zeros(n, bool)
    return Transition(x, action, 1.0 * no, next_x, no, no)


def learnt(run, data, env_kwargs=None):
    """The carry (1, ...) after all of the transitions, one at a time, and the reports (N, 1)."""
    def step(carry, step):
        carry = icem_online.observe(run, carry, jax.tree.map(lambda leaf: leaf[None], step))
        return carry, (carry.report, carry.R, carry.drift_var)

    return jax.jit(lambda data: jax.lax.scan(step, icem_online.initial_carry(run, 1), data))(data)


def rows_of(agent, data):
    """Features of the last layer (N, F), a one first, and y (N, D), in float64."""
    params = jax.tree.map(lambda v: np.asarray(v, np.float64), dict(weights=agent.weights, scaling=agent.scaling))
    x, u, next_x = (np.asarray(leaf, np.float64) for leaf in (data.obs, data.action, data.next_obs))
    z = (np.concatenate([x, u], axis=1) - params["scaling"]["centre"]) / params["scaling"]["spread"]
    first = params["weights"]["Dense_0"]
    features = np.tanh(z @ first["kernel"] + first["bias"])
    return np.concatenate([np.ones((len(z), 1)), features], axis=1), (next_x - x) / params["scaling"]["scale"]


def last_layer(theta):
    """Its numbers as the flat θ has them: biases (4,), kernel (5, 4)."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in (theta["bias"], theta["kernel"])])


def test_the_last_layer_is_a_kalman_filter():
    """With drift, forgetting up to its bound, and adaptive noise: mean, covariance, R, q and the four reports."""
    env, config = make(prior_var=0.3, obs_var=0.05, forgetting=0.4, drift_var=0.02, noise_rate=0.1)
    run, data = init(env, config), some_transitions(12)
    after, (report, R_log, q_log) = learnt(run, data)
    features, y = rows_of(run.agent, data)
    m, P, R, q = last_layer(run.agent.weights["Dense_1"]), 0.3 * np.eye(24), np.full(4, 0.05), 0.02
    for t in range(12):
        H = np.concatenate([np.eye(4) * value for value in features[t]], axis=1)  # of entry d: bias d, column d
        before = P + q * np.eye(24)
        before = before * np.clip(10 * 0.3 * 24 / np.trace(before), 1, 1 / 0.4)
        S = H @ before @ H.T + np.diag(R)
        K, miss = before @ H.T @ np.linalg.inv(S), y[t] - H @ m
        nis = miss @ np.linalg.inv(S) @ miss
        nll = 0.5 * (nis + np.linalg.slogdet(S)[1] + 4 * np.log(2 * np.pi))
        for name, value in dict(error=np.sqrt(np.mean(miss**2)), nis=nis, nll=nll).items():
            np.testing.assert_allclose(report[name][t, 0], value, rtol=2e-2, atol=2e-2, err_msg=f"{name} {t}")
        assert report["covered"][t, 0] == (report["nis"][t, 0] < 9.487729)  # 95% of χ²(4)
        P, moved = before - K @ S @ K.T, K @ miss
        m = m + moved
        R = R + 0.1 * ((y[t] - H @ m) ** 2 + np.diag(H @ P @ H.T) - R)
        q = max(q + 0.1 * np.mean(moved**2 + np.diag(P - before)), 0.0)
        np.testing.assert_allclose(R_log[t, 0], R, rtol=2e-2)
        np.testing.assert_allclose(q_log[t, 0], q, rtol=2e-2, atol=1e-4)
    np.testing.assert_allclose(after.belief.mean[0], m, rtol=2e-2, atol=2e-2)
    np.testing.assert_allclose(after.belief.var[0], np.diag(P), rtol=2e-2, atol=1e-3)
    assert 0 < np.mean(report["covered"]) < 1


def test_a_frozen_model_is_taken_for_certain():
    """Its errors are all noise: of variance R."""
    env, config = make(learn=False, obs_var=0.05, prior_var=0.3, noise_rate=0.1)
    run, data = init(env, config), some_transitions(5)
    after, (report, *_) = learnt(run, data)
    features, y = rows_of(run.agent, data)
    miss = y - features @ last_layer(run.agent.weights["Dense_1"]).reshape(6, 4)
    np.testing.assert_allclose(report["nis"][:, 0], (miss**2).sum(1) / 0.05, rtol=1e-3)
    np.testing.assert_array_equal(after.belief.mean[0], icem_online.initial_carry(run, 1).belief.mean[0])
    np.testing.assert_allclose(after.R, 0.05)


def test_physics_is_linearised_as_often_as_told():
    env, config = make("damped_pendulum", model="physics", adapt="all", prior_var=1.0, obs_var=1e-6,
                       num_linearizations=3)
    run = jax.jit(functools.partial(icem_online.init, source=env, config=config))(jax.random.key(0))
    x, action = jnp.array([[0.5, 3.0]]), jnp.array([[1.0]])
    next_x = env.env.dynamics(jax.tree.map(lambda leaf: leaf + 0.7, env.env.truth), x[0], action[0])[None]
    no = jnp.zeros(1, bool)
    after = jax.jit(functools.partial(icem_online.observe, run))(
        run.carry, Transition(x, action, jnp.zeros(1), next_x, no, no))
    before = ekf.Full.create(env.env.guess, 1.0)
    update = jax.jit(functools.partial(
        ekf.update, h=lambda theta: env.env.dynamics(theta, x[0], action[0]), obs=next_x[0], R=jnp.full(2, 1e-6)),
        static_argnames="num_iterations")
    once, often = (update(before, num_iterations=n)[0].mean for n in (1, 3))
    np.testing.assert_allclose(after.belief.mean[0], often, rtol=1e-3, atol=1e-4)
    assert np.abs(once - often).max() > 0.01


def test_models_predict_what_their_equations_say():
    env, config = make("cartpole_swingup")
    agent, x, u = init(env, config).agent, jnp.array([0.3, 0.5, -1.0, 2.0]), jnp.array([0.7])
    z = (np.array([np.sin(0.5), np.cos(0.5), 0.3, -1.0, 2.0, 0.7]) - agent.scaling["centre"]) / agent.scaling["spread"]
    (first, last), scale = (agent.weights[name] for name in ("Dense_0", "Dense_1")), agent.scaling["scale"]
    expected = x + scale * (np.tanh(z @ first["kernel"] + first["bias"]) @ last["kernel"] + last["bias"])
    np.testing.assert_allclose(agent.predict(agent.weights, x, u), expected, rtol=1e-4)
    env, config = make(model="physics", adapt="all")  # whose truth is not its guess
    agent, x, u = icem_online.Agent.create(jax.random.key(0), jnp.zeros(4), env.env, config), x, jnp.array([0.5, -1.0])
    guess = env.env.guess
    np.testing.assert_allclose(agent.predict(agent.theta(), x, u), guess.a @ x + guess.b @ u, rtol=1e-5)


def costs_of(env, predict, x, actions):
    """What each plan (H, N, A) costs from x, step by step."""
    totals = []
    for n in range(actions.shape[1]):
        now, total = x, 0.0
        for action in actions[:, n]:
            after = predict(now, action)
            now, total = after, total + env.cost(now, action, after)
        totals.append(total + env.terminal_cost(now))
    return np.array(totals)


@pytest.mark.parametrize("case", ["network", "physics", "truth"])
def test_a_plan_is_priced_by_the_model_or_by_the_truth(case, monkeypatch):
    """And the planner gets the config's settings, and a key of its own for every environment."""
    settings, plans = [], jax.random.normal(jax.random.key(9), (3, 4, 2))

    def icem(key, cost, plan, low, high, **kwargs):
        settings.append(kwargs)
        return plan, jnp.append(cost(plans), jax.random.uniform(key)), {}

    monkeypatch.setattr(icem_online.planning, "icem", icem)
    changes = dict(network={}, physics=dict(model="physics", adapt="all"), truth={})[case]
    env, config = make(num_envs=2, env_kwargs=dict(reveal=case == "truth", spread=1.5), **changes)
    run = init(env, config)
    carry = run.carry._replace(belief=run.carry.belief.replace(mean=run.carry.belief.mean + jnp.array([[0.1], [0.2]])))
    _, out = icem_online.act(run, carry, run.obs, jax.random.key(1))
    x, truth = icem_online.hidden.split(env.env, run.obs)
    for e in range(2):
        if case == "truth":
            predict = functools.partial(env.env.dynamics, jax.tree.map(lambda leaf, e=e: leaf[e], truth))
        else:
            moved = jax.tree.map(lambda leaf, e=e: leaf + 0.1 * (e + 1), run.agent.theta())
            weights = moved if case == "physics" else run.agent.weights | moved
            predict = functools.partial(run.agent.predict, weights)
        np.testing.assert_allclose(out[e, :4], costs_of(env.env, predict, x[e], plans), rtol=1e-4)
    assert out[0, 4] != out[1, 4]
    assert settings == [dict(config.planner) | dict(return_mode="mean" if case == "network" else "best")]


@pytest.fixture(scope="module")
def stepped():
    """(env, config, runs, infos, keys) of four train_steps in two environments whose episodes have three steps."""
    env, config = make(num_envs=2, env_kwargs=dict(max_steps=3, process_noise=0.1, spread=1.2), prior_var=0.01)
    run = init(env, config)
    step = jax.jit(functools.partial(icem_online.train_step, source=env, config=config))
    keys, runs, infos = jax.random.split(jax.random.key(5), 4), [run], []
    for key in keys:
        run, info = step(run, key)
        runs.append(run)
        infos.append(info)
    return env, config, runs, infos, keys


def test_a_step_acts_observes_and_starts_again(stepped):
    env, config, runs, infos, keys = stepped
    act, observe, step = jax.jit(icem_online.act), jax.jit(icem_online.observe), jax.jit(env.step)
    with jax.debug_key_reuse(False):
        for t, key in enumerate(keys):
            act_key, _, env_key = jax.random.split(key, 3)
            carry, action = act(runs[t], runs[t].carry, runs[t].obs, act_key)
            _, ts = step(env_key, runs[t].env_state, action)
            carry = observe(runs[t], carry, Transition.of(runs[t].obs, action, ts))
            x, u, next_x = (np.asarray(leaf) for leaf in (runs[t].obs, action, ts.next_obs))
            weights = [runs[t].agent.insert(jax.vmap(runs[t].carry.belief.unravel)(runs[t].carry.belief.mean))]
            error = [(runs[t].agent.predict(jax.tree.map(lambda leaf, e=e: leaf[e] if leaf.ndim > 2 or len(leaf) == 2
                                                         else leaf, weights[0]), x[e], u[e]) - next_x[e])
                     / runs[t].agent.scaling["scale"] for e in range(2)]
            expected = np.mean([np.sqrt(np.mean(np.square(row))) for row in error])
            np.testing.assert_allclose(infos[t]["error"], expected, rtol=1e-3)
            np.testing.assert_allclose(infos[t]["reward"], ts.reward.mean(), rtol=1e-5)
            first = icem_online.initial_carry(runs[t], 2)
            assert ts.truncated.all() == (t == 2)
            for mine, due in zip(*map(jax.tree.leaves, (runs[t + 1].carry, first if t == 2 else carry)), strict=True):
                np.testing.assert_allclose(mine, due, rtol=1e-5, atol=1e-6)
            assert not np.allclose(carry.belief.mean, first.belief.mean) and not np.allclose(carry.plan.mean, 0)
    np.testing.assert_array_equal([info["episode"]["count"] for info in infos], [0, 0, 2, 0])
    assert (runs[-1].clock.env_steps, runs[-1].clock.updates) == (8, 8)


def test_seeds_under_vmap_match_seeds_alone(stepped):
    env, config, runs, _, keys = stepped

    def step(run, key):
        return icem_online.train_step(run, key, env, config)[0]

    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), runs[0], runs[1])
    together = jax.jit(jax.vmap(step))(both, keys[:2])
    for mine, alone in zip(jax.tree.leaves(together), jax.tree.leaves(runs[2]), strict=True):
        np.testing.assert_allclose(mine[1], alone, rtol=1e-3, atol=1e-4)


def test_the_truth_is_used_and_nothing_is_learnt():
    env, config = make(env_kwargs=dict(reveal=True, process_noise=0.1), num_envs=2)
    run = jax.jit(functools.partial(icem_online.init, source=env, config=config))(jax.random.key(0))
    assert run.obs.shape == (2, 4 + 24) and run.agent.scaling["scale"].shape == (4,)
    _, ts = env.step(jax.random.key(2), run.env_state, jnp.ones((2, 2)))
    after = jax.jit(icem_online.observe)(run, run.carry, Transition.of(run.obs, jnp.ones((2, 2)), ts))
    assert (after.report["error"] > 0).all()
    kept, due = (carry._replace(report=0) for carry in (after, run.carry))
    jax.tree.map(np.testing.assert_array_equal, kept, due)


def test_a_rehearsal_keeps_the_weights(stepped, monkeypatch):
    """Episodes of the environment of the evaluation, from a fresh plan, with what every environment has learnt."""
    env, config, runs, _, _ = stepped
    calls, run, key = [], runs[2], jax.random.key(7)
    monkeypatch.setattr(icem_online, "evaluate", lambda *args: calls.append(args) or (jnp.array([1.0, 2.0, 6.0]), None))
    other = make_env("linear_tracking", 3, goal=(-5.0, -5.0, 0.0, 0.0))
    assert icem_online.measure(run, key, other, config) == {} and not calls
    config = ml_collections.FrozenConfigDict(config.to_dict() | dict(rehearse=True))
    assert icem_online.measure(run, key, other, config) == {"rehearsal": 3.0}
    (act, source, _, carry), = calls  # no observe
    assert source is other and act.args[0] is run and act.func is icem_online.act
    np.testing.assert_array_equal(carry.belief.mean, run.carry.belief.mean[jnp.array([0, 1, 0])])
    np.testing.assert_array_equal(carry.plan.mean, np.zeros((3, 3, 2)))
    assert not np.allclose(run.carry.plan.mean, 0)


def test_weights_are_read_if_they_fit(tmp_path):
    env, config = make()
    agent, path = init(env, config).agent, str(tmp_path / "model.npz")
    params = jax.tree.map(np.asarray, dict(weights=agent.weights, scaling=agent.scaling))

    def read(params):
        write_arrays(path, params)
        return icem_online.Agent.create(jax.random.key(9), jnp.zeros(4), env.env, make(pretrained=path)[1])

    agent = read(params)
    jax.tree.map(np.testing.assert_array_equal, params, dict(weights=agent.weights, scaling=agent.scaling))
    for changes, words in ((dict(hidden_dims=(6,)), r"Dense_0/bias has shape \(5,\), the config's network \(6,\)"),
                           (dict(hidden_dims=(5, 4)), "weights/Dense_2/bias has shape None")):
        with pytest.raises(UserError, match=words):
            icem_online.Agent.create(jax.random.key(9), jnp.zeros(4), env.env, make(pretrained=path, **changes)[1])
    with pytest.raises(UserError, match="scaling/scale has shape None"):
        read(params | dict(scaling={name: params["scaling"][name] for name in ("centre", "spread")}))


@pytest.mark.parametrize("belief", ["diagonal", "low_rank"])
def test_a_reduced_belief_has_its_form(belief):
    env, config = make(belief=belief, belief_rank=3, adapt="all", prior_var=0.05)
    prior = init(env, config).agent.prior()
    np.testing.assert_allclose(prior.var, 0.05, rtol=1e-5)
    assert isinstance(prior, ekf.Diagonal if belief == "diagonal" else ekf.LowRank)
    assert prior.mean.shape == (6 * 5 + 5 + 5 * 4 + 4,) and (belief == "diagonal" or prior.factor.shape[1] == 3)


REFUSED = {
    'model="physics" has no layers: adapt="all"': dict(model="physics"),
    'model="physics" has no weights to read': dict(model="physics", adapt="all", pretrained="a.npz"),
    'model="physics" needs an environment with hidden Params': dict(model="physics", adapt="all", env="particles"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_wrong_combinations_are_named(words):
    env, config = make(**REFUSED[words] | dict(env="linear_tracking"))
    if "needs" in words:
        env.env = SimpleNamespace(cost=None, terminal_cost=None)
    with pytest.raises(UserError, match=words):
        icem_online.init(jax.random.key(0), env, config)
