import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import icem_online
from core.dataset import write_arrays
from core.envs import make_env
from core.errors import UserError

ICEM = "algorithms/icem_online.py"
REGRESSION, LORA, MODELS, FRESH, WINDOW, FORESEEN, PRETRAIN, ORACLE = (
    "test_the_last_layer_is_bayesian_linear_regression", "test_lora_moves_the_weights_within_their_bases",
    "test_models_predict_what_their_equations_say", "test_an_episode_starts_afresh_and_its_end_is_learnt_from",
    "test_what_learns_from_the_window_keeps_to_it", "test_what_was_foreseen_is_judged_before_it_is_learnt",
    "test_pretraining_learns_a_linear_system", "test_the_oracle_plans_with_the_truth_and_the_others_with_their_weights")
PLANTED_ERRORS = {  # and the test that has to notice
    "the first layer for the last": (ICEM, 'f"Dense_{len(config.hidden)}"', '"Dense_0"', REGRESSION),
    "prior of one": (ICEM, ".create(theta, config.prior_var)\n", ".create(theta, 1.0)\n", REGRESSION),
    "R of one": (ICEM, "jnp.full_like(scale, config.obs_var)", "jnp.ones_like(scale)", REGRESSION),
    "errors not scaled": (ICEM, 'seen["next_obs"]) / params["scaling"]["scale"]', 'seen["next_obs"])', REGRESSION),
    "never forgets": (ICEM, "and config.forgetting < 1:", "and False:", "test_forgetting_is_exponential"),
    "no drift": (ICEM, "mind.belief.predict(noise=mind.drift_var) if", "mind.belief if",
                 "test_drift_is_added_before_a_step"),
    "singular values lost": (ICEM, "(U * S[None])[:, :r]", "U[:, :r]", LORA),
    "smallest directions": (ICEM, "(U * S[None])[:, :r], Vt[:r]", "(U * S[None])[:, -r:], Vt[-r:]", LORA),
    "A the other way round": (ICEM, "left @ A @ right", "left @ A.T @ right", LORA),
    "LoRA in place of the weights": (ICEM, 'weights[name]["kernel"] + left', 'left', LORA),
    "one P for all": (ICEM, '"k,kij->ij", value, P)', '"k,kij->ij", value, P[:1].repeat(len(P), 0))', LORA),
    "inputs not centred": (ICEM, ' - scaling["centre"]) / scaling["spread"]', ') / scaling["spread"]', MODELS),
    "residual to nothing": (ICEM, 'if config.model == "residual" else x', "if False else x", MODELS),
    "residual to the truth": (ICEM, "env.env.dynamics(env.env.guess, x", "env.env.dynamics(env.env.truth, x", MODELS),
    "change not scaled": (ICEM, 'return nominal + scaling["scale"] * network', "return nominal + network", MODELS),
    "belief survives the episode": (ICEM, "jax.tree.map(functools.partial(where, over(run.last)), first, ",
                                    "jax.tree.map(lambda new, old: old, first, ", FRESH),
    "stale elites across episodes": (ICEM, "run._replace(mind=mind, plan=plan), jax", "run._replace(mind=mind), jax",
                                     FRESH),
    "learns across resets": (ICEM, "next_obs=step.next_obs, reward", "next_obs=step.obs, reward", FRESH),
    "the empty window counts": (ICEM, ".mean(where=mind.known)", ".mean()", WINDOW),
    "the empty window is absorbed": (ICEM, "jnp.where(mind.known, 0.0, jnp.inf)", "jnp.where(mind.known, 0.0, 0.0)",
                                     WINDOW),
    "refit starts from what it knows": (ICEM, "start = prior(fixed, env, config).belief", "start = mind.belief",
                                        WINDOW),
    "window forgets the newest": (ICEM, "jnp.concatenate([old[1:], new[None]])",
                                  "jnp.concatenate([new[None], old[1:]])", WINDOW),
    "gradient ascends": (ICEM, "(mean + updates, opt_state)", "(mean - updates, opt_state)", WINDOW),
    "judged after it is learnt": (ICEM, "mind = mind._replace(belief=after)",
                                  "(mind, (_, info)) = mind._replace(belief=after), absorb(after, seen, mind.R)",
                                  FORESEEN),
    "likelihood upside down": (ICEM, "nll=-info.log_lik", "nll=info.log_lik", FORESEEN),
    "half of the band": (ICEM, "nis_band(mind.R.size, 1, 0.9)", "nis_band(mind.R.size, 1, 0.5)", FORESEEN),
    "the oracle guesses": (ICEM, 'known = config.learner == "oracle"', "known = False", ORACLE),
    "plans with the first weights": (ICEM, "placed(mind.belief.params, fixed, config), env.env",
                                     "fixed.params, env.env", ORACLE),
    "noise is fixed": (ICEM, "and config.noise_rate:", "and False:", "test_noise_follows_what_is_seen"),
    "score of another episode": (ICEM, "jnp.where(over(run.last), 0.0, run.score)", "run.score",
                                 "test_scores_are_sums_of_rewards"),
    "rehearsal without a fresh start": (ICEM, "other = start(reset_key, run.fixed, run.mind, env, config)",
                                        "other = run", "test_scores_are_sums_of_rewards"),
    "scaled to nothing": (ICEM, "jnp.where(std < 1e-6, 1.0, std)", "std", PRETRAIN),
    "pretrained weights ignored": (ICEM, "if config.pretrained:", "if False:", PRETRAIN),
}

SMALL = dict(horizon=3, num_samples=8, num_elites=3, kept_elites=1, num_iterations=1, hidden=(5,), window=6)


def make(env="linear_tracking", num_envs=1, env_kwargs=None, **changes):
    config = icem_online.get_config()
    config.env_kwargs = env_kwargs or {}
    config.update(SMALL | dict(env=env) | changes)
    return make_env(env, num_envs, **config.env_kwargs), ml_collections.FrozenConfigDict(config)


def a_mind(env, config, seed=0):
    """Mind and fixed part, its scaling not of ones."""
    fixed = jax.jit(functools.partial(icem_online.fixed_part, env=env, config=config))(jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 3))
    scaling = {name: jnp.exp(0.3 * jax.random.normal(next(keys), value.shape))
               for name, value in sorted(fixed.params["scaling"].items())}
    fixed = fixed._replace(params=fixed.params | dict(scaling=scaling))
    return icem_online.prior(fixed, env, config), fixed


def some_transitions(n, seed=3):
    keys = jax.random.split(jax.random.key(seed), 3)
    sizes = dict(obs=4, action=2, next_obs=4)
    return {name: jax.random.normal(key, (n, size)) for key, (name, size) in zip(keys, sizes.items(), strict=True)}


def learnt(mind, fixed, data, env, config):
    """After all of the transitions, one at a time: mind, info (N, …)."""
    def step(mind, seen):
        return icem_online.learn(mind, seen, fixed, env, config)

    return jax.jit(lambda mind, data: jax.lax.scan(step, mind, data))(mind, data)


def rows_of(fixed, data):
    """Features of the last layer (N, F) and what it should say (N, D), in float64."""
    params = jax.tree.map(lambda v: np.asarray(v, np.float64), fixed.params)
    x, u, next_x = (np.asarray(data[name], np.float64) for name in ("obs", "action", "next_obs"))
    z = (np.concatenate([x, u], axis=1) - params["scaling"]["centre"]) / params["scaling"]["spread"]
    first = params["weights"]["Dense_0"]
    features = np.tanh(z @ first["kernel"] + first["bias"])
    return np.concatenate([np.ones((len(z), 1)), features], axis=1), (next_x - x) / params["scaling"]["scale"]


def first_last_layer(fixed):
    last = fixed.params["weights"]["Dense_1"]
    return np.concatenate([np.asarray(last["bias"], np.float64)[None], np.asarray(last["kernel"], np.float64)])


def regression(fixed, features, y, prior_var, obs_var, discount=1.0):
    """Mean (F, D) and covariance (F, F) of the last layer, bias first: ridge from its first weights, exponentially
    weighted."""
    start, weight = first_last_layer(fixed), discount ** np.arange(len(y) - 1, -1, -1)
    precision = discount ** len(y) * np.eye(features.shape[1]) / prior_var + (features.T * weight) @ features / obs_var
    cov = np.linalg.inv(precision)
    return start + cov @ (features.T * weight) @ (y - features @ start) / obs_var, cov


def last_layer(mind):
    last = mind.belief.params["Dense_1"]
    return np.concatenate([last["bias"][None], last["kernel"]])


def test_the_last_layer_is_bayesian_linear_regression():
    env, config = make(prior_var=0.3, obs_var=0.05)
    mind, fixed = a_mind(env, config)
    data = some_transitions(30)
    after, _ = learnt(mind, fixed, data, env, config)
    mean, cov = regression(fixed, *rows_of(fixed, data), 0.3, 0.05)
    np.testing.assert_allclose(last_layer(after), mean, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(after.belief.var[:4], cov[0, 0], rtol=1e-3)  # the biases of the four outputs
    np.testing.assert_allclose(np.trace(after.belief.cov), 4 * np.trace(cov), rtol=1e-3)


def test_forgetting_is_exponential():
    env, config = make(prior_var=0.3, obs_var=0.05, forgetting=0.9)
    mind, fixed = a_mind(env, config)
    data = some_transitions(20)
    after, _ = learnt(mind, fixed, data, env, config)
    mean, _ = regression(fixed, *rows_of(fixed, data), 0.3, 0.05, discount=0.9)
    np.testing.assert_allclose(last_layer(after), mean, rtol=1e-3, atol=2e-3)


def test_drift_is_added_before_a_step():
    env, config = make(drift_var=0.2, prior_var=0.1, obs_var=0.05)
    mind, fixed = a_mind(env, config)
    data = some_transitions(1)
    after, _ = learnt(mind, fixed, data, env, config)
    mean, _ = regression(fixed, *rows_of(fixed, data), 0.3, 0.05)
    np.testing.assert_allclose(last_layer(after), mean, rtol=1e-3, atol=1e-3)


def test_noise_follows_what_is_seen():
    """Of changes far from what is foreseen, R grows; of those that are as foreseen, it shrinks."""
    env, config = make(noise_rate=0.1, obs_var=0.05, prior_var=1e-4)
    mind, fixed = a_mind(env, config)
    data = some_transitions(20)
    foreseen = jax.vmap(lambda x, u: icem_online.predict(fixed.params, x, u, env, config))(data["obs"], data["action"])
    far, _ = learnt(mind, fixed, data | {"next_obs": 5 * data["next_obs"]}, env, config)
    near, _ = learnt(mind, fixed, data | {"next_obs": foreseen}, env, config)
    assert (far.R > 0.5).all() and far.drift_var > 0
    np.testing.assert_allclose(near.R, 0.05 * 0.9**20, rtol=0.1)


@pytest.mark.parametrize("learner", ["gradient", "refit"])
def test_what_learns_from_the_window_keeps_to_it(learner):
    """Of 4, and of 9 transitions: the window holds 6."""
    env, config = make(learner=learner, prior_var=0.3, obs_var=0.05, num_updates=1, lr=1e-2)
    mind, fixed = a_mind(env, config)
    for n in (4, 9):
        data = some_transitions(n)
        after, _ = learnt(mind, fixed, data, env, config)
        held = {name: value[-6:] for name, value in data.items()}
        np.testing.assert_array_equal(after.window["obs"][-len(held["obs"]):], held["obs"])
        if learner == "refit":
            mean, _ = regression(fixed, *rows_of(fixed, held), 0.3, 0.05)
            np.testing.assert_allclose(last_layer(after), mean, rtol=1e-3, atol=1e-3)
    if learner == "gradient":
        theta, tx = last_layer(mind).astype(np.float64), optax.adam(1e-2)
        state, features_y = tx.init(jnp.float32(theta)), rows_of(fixed, some_transitions(9))
        for t in range(1, 10):
            features, y = (v[max(0, t - 6):t] for v in features_y)
            gradient = 2 * features.T @ (features @ theta - y) / len(y)
            updates, state = tx.update(jnp.float32(gradient), state)
            theta = theta + np.asarray(updates, np.float64)
        np.testing.assert_allclose(last_layer(after), theta, rtol=1e-3, atol=1e-4)


def test_what_was_foreseen_is_judged_before_it_is_learnt():
    env, config = make(prior_var=0.3, obs_var=0.05)
    mind, fixed = a_mind(env, config)
    data = some_transitions(5)
    _, info = learnt(mind, fixed, data, env, config)
    features, y = rows_of(fixed, data)
    for i in range(5):
        mean, cov = regression(fixed, features[:i], y[:i], 0.3, 0.05)
        S, miss = features[i] @ cov @ features[i] + 0.05, y[i] - features[i] @ mean
        np.testing.assert_allclose(info["error"][i], np.sqrt(np.mean(miss**2)), rtol=1e-3)
        np.testing.assert_allclose(info["nis"][i], miss @ miss / S, rtol=5e-3)
        np.testing.assert_allclose(info["nll"][i], 0.5 * (miss @ miss / S + 4 * np.log(2 * np.pi * S)), rtol=5e-3)
        assert info["covered"][i] == (miss @ miss / S < 9.488)  # 95% of χ²(4)
    scale, std = np.asarray(fixed.params["scaling"]["scale"]), np.sqrt(0.05 + 0.3 * np.square(features[0]).sum())
    for far, covered in ((1.4, True), (1.7, False)):  # 4 · 1.4² < 9.49 < 4 · 1.7²; the median of χ²(4) is 3.4
        y = features[:1] @ first_last_layer(fixed) + far * std
        one = jax.tree.map(lambda v: v[:1], data)
        _, info = learnt(mind, fixed, one | {"next_obs": one["obs"] + jnp.float32(y * scale)}, env, config)
        assert info["covered"][0] == covered


@pytest.mark.parametrize("adapt", ["lora_xs", "tiny_lora"])
def test_lora_moves_the_weights_within_their_bases(adapt, tmp_path):
    _, drawn = a_mind(*make())  # orthogonal, so that no direction is larger than another
    weights = jax.tree.map(lambda v: v * jnp.exp(jax.random.normal(jax.random.key(9), v.shape)), drawn.params)
    write_arrays(tmp_path / "weights.npz", jax.tree.map(np.asarray, weights))
    env, config = make(adapt=adapt, lora_rank=3, lora_size=7, pretrained=str(tmp_path / "weights.npz"))
    _, fixed = a_mind(env, config)
    theta = icem_online.start_of(fixed, config)
    first = icem_online.placed(theta, fixed, config)["weights"]
    for before, after in zip(*map(jax.tree.leaves, (fixed.params["weights"], first)), strict=True):
        np.testing.assert_array_equal(before, after)
    theta = {name: jax.random.normal(jax.random.key(i), v.shape) for i, (name, v) in enumerate(theta.items())}
    moved = icem_online.placed(theta, fixed, config)["weights"]
    for name, layer in fixed.params["weights"].items():
        W = np.asarray(layer["kernel"], np.float64)
        U, S, Vt = np.linalg.svd(W, full_matrices=False)
        A = np.asarray(theta[name], np.float64)
        if adapt == "tiny_lora":
            P = np.asarray(fixed.bases[name][2], np.float64)
            assert A.shape == (7,) and P.shape == (7, 3, 3) and not np.allclose(P[0], P[1])
            A = sum(v * matrix for v, matrix in zip(A, P, strict=True))
        left, right = np.asarray(fixed.bases[name][0], np.float64), np.asarray(fixed.bases[name][1], np.float64)
        np.testing.assert_allclose(left @ right, (U[:, :3] * S[:3]) @ Vt[:3], atol=1e-5)
        np.testing.assert_allclose(moved[name]["kernel"], W + left @ A @ right, atol=1e-5)
        np.testing.assert_array_equal(moved[name]["bias"], layer["bias"])


def test_models_predict_what_their_equations_say():
    kwargs = dict(a=tuple(map(tuple, np.eye(4).tolist())))  # the truth is not the guess
    x, u = jnp.arange(4.0), jnp.array([0.5, -1.0])
    nominal = {}
    for model in ("mlp", "residual", "physics"):
        env, config = make(env_kwargs=kwargs, model=model, adapt="all")
        _, fixed = a_mind(env, config)
        params, guess = fixed.params, env.env.guess
        nominal["physics"] = nominal["residual"] = np.asarray(guess.a @ x + guess.b @ u)
        nominal["mlp"] = np.asarray(x)
        expected = nominal[model]
        if model != "physics":
            features, _ = rows_of(fixed, dict(obs=x[None], action=u[None], next_obs=x[None]))
            expected = expected + np.asarray(params["scaling"]["scale"]) * (features @ first_last_layer(fixed))[0]
        np.testing.assert_allclose(icem_online.predict(params, x, u, env, config), expected, rtol=1e-4)


def test_the_belief_about_physics_is_about_the_hidden_params():
    env, config = make(model="physics", adapt="all", prior_var=1.0, obs_var=1e-6)
    fixed = icem_online.fixed_part(jax.random.key(0), env, config)
    data, truth = some_transitions(20), env.env.truth
    data["next_obs"] = jax.vmap(env.env.dynamics, (None, 0, 0))(truth, data["obs"], data["action"])
    after, _ = learnt(icem_online.prior(fixed, env, config), fixed, data, env, config)
    assert env.env.parameter_error(after.belief.params, truth) < 0.01


def test_the_oracle_plans_with_the_truth_and_the_others_with_their_weights():
    env, oracle = make(num_samples=64, num_elites=8, num_iterations=3, learner="oracle", model="physics", adapt="all")
    _, frozen = make(num_samples=64, num_elites=8, num_iterations=3, learner="none", model="physics", adapt="all")
    truth, key, x = env.env.truth, jax.random.key(3), jnp.zeros(4)
    fixed = icem_online.fixed_part(jax.random.key(0), env, frozen)
    mind = icem_online.prior(fixed, env, frozen)
    flipped = jax.tree.map(jnp.negative, truth)

    def action(config, params):
        plan = icem_online.planning.initial_carry(*env.action_space.bounds, 3, 1)
        believing = mind._replace(belief=mind.belief.replace(mean=jax.flatten_util.ravel_pytree(params)[0]))
        choose = jax.jit(functools.partial(icem_online.decide, fixed=fixed, env=env, config=config))
        return choose(jax.random.clone(key), believing, plan, x, truth if config.learner == "oracle" else None)[1]

    np.testing.assert_allclose(action(oracle, flipped), action(frozen, truth), rtol=1e-5)
    assert not np.allclose(action(frozen, flipped), action(frozen, truth))


def run_of(env, config, steps, seed=0):
    init_key, key = jax.random.split(jax.random.key(seed))
    run = jax.jit(functools.partial(icem_online.init, env=env, config=config))(init_key)
    step, runs = jax.jit(functools.partial(icem_online.train_step, env=env, config=config)), []
    for step_key in jax.random.split(key, steps):
        run, _ = step(run, step_key)
        runs.append(run)
    return runs


def test_an_episode_starts_afresh_and_its_end_is_learnt_from():
    env, config = make(num_envs=2, env_kwargs=dict(max_steps=3))
    runs = run_of(env, config, 4)
    first = icem_online.fresh(runs[0].fixed, env, config)
    for mine, fresh in zip(*map(jax.tree.leaves, ((runs[2].mind, runs[2].plan), first)), strict=True):
        np.testing.assert_array_equal(mine, fresh)
    assert not np.allclose(runs[1].mind.belief.mean, first[0].belief.mean)
    assert not np.allclose(runs[1].plan.mean, first[1].mean)
    np.testing.assert_array_equal([run.last["truncated"][0] for run in runs], [False, False, True, False])
    for run in runs:
        true = jax.vmap(env.env.dynamics, (None, 0, 0))(env.env.truth, run.last["obs"], run.last["action"])
        np.testing.assert_allclose(run.last["next_obs"], true, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(runs[1].mind.window["next_obs"][:, -1], runs[1].last["next_obs"])


def test_scores_are_sums_of_rewards():
    env, config = make(num_envs=2, env_kwargs=dict(max_steps=3), eval_steps=3)
    runs = run_of(env, config, 5)
    rewards = np.array([run.last["reward"] for run in runs])
    with jax.debug_key_reuse(False):
        scores = [icem_online.measure(run, jax.random.key(0), env, config) for run in runs]
    for t, (low, high) in enumerate(((0, 1), (0, 2), (0, 3), (3, 4), (3, 5))):
        np.testing.assert_allclose(scores[t]["return"], rewards[low:high].sum(0).mean(), rtol=1e-5)
    still = np.square(np.array([0.0, 5.0, 0.0, 0.0])).sum() * 3  # what three steps near the start cost
    for score in scores:
        assert abs(score["goal_cost"] - still) < 15


@pytest.mark.parametrize("model", ["mlp", "residual"])
def test_pretraining_learns_a_linear_system(model, tmp_path):
    """One that has an action without effect, and a state that never moves."""
    kwargs = dict(a=tuple(map(tuple, (np.eye(4) + 0.1 * np.eye(4, k=1)).tolist())))
    env, config = make(env_kwargs=kwargs, model=model, hidden=(32,), pretrain=dict(
        num_updates=3000, batch_size=32, lr=1e-2, holdout=0.2), pretrained=str(tmp_path / "weights.npz"))
    data = some_transitions(400)
    data["obs"] = data["obs"].at[:, 3].set(2.0)
    data["next_obs"] = jax.vmap(env.env.dynamics, (None, 0, 0))(env.env.truth, data["obs"], data["action"])
    data["next_obs"] = data["next_obs"].at[:, 3].set(2.0)
    train, test = ({name: v[part] for name, v in data.items()} for part in (slice(300), slice(300, None)))
    model = icem_online.pretrain_init(jax.random.key(0), train, env, config)
    before = icem_online.pretrain_test(model, test, env, config)["error"]

    @jax.jit
    def fit(model, keys):
        return jax.lax.scan(lambda m, key: icem_online.pretrain_step(m, key, train, env, config), model, keys)

    model, info = fit(model, jax.random.split(jax.random.key(1), 3000))
    after = icem_online.pretrain_test(model, test, env, config)["error"]
    assert after < 0.1 and after < 0.1 * before
    assert info["loss"][-100:].mean() < 4 * 0.05**2
    np.testing.assert_array_equal(model.scaling["spread"][3], 1.0)
    write_arrays(config.pretrained, jax.tree.map(np.asarray, model.params))
    fixed = icem_online.fixed_part(jax.random.key(2), env, config)
    for stored, read in zip(*map(jax.tree.leaves, (model.params, fixed.params)), strict=True):
        np.testing.assert_array_equal(stored, read)


@pytest.mark.parametrize("belief", ["diagonal", "low_rank"])
def test_reduced_beliefs_learn_all_weights(belief):
    """A system whose changes are half of what the network says."""
    env, config = make(adapt="all", belief=belief, prior_var=0.05, obs_var=1e-3, hidden=(16,))
    mind, fixed = a_mind(env, config)
    data = some_transitions(300)
    says = jax.vmap(lambda x, u: icem_online.predict(fixed.params, x, u, env, config))(data["obs"], data["action"])
    data["next_obs"] = data["obs"] + 0.5 * (says - data["obs"])
    _, info = learnt(mind, fixed, data, env, config)
    assert info["error"][-50:].mean() < 0.15 * info["error"][:5].mean()


def test_seeds_under_vmap_match_seeds_alone():
    env, config = make()

    def mean(key):
        init_key, key = jax.random.split(key)
        run = icem_online.init(init_key, env, config)
        return icem_online.train_step(run, key, env, config)[0].mind.belief.mean

    with jax.debug_key_reuse(False):
        keys = jax.random.split(jax.random.key(0), 3)
        together, alone = jax.jit(jax.vmap(mean))(keys), jax.jit(mean)(keys[1])
    np.testing.assert_allclose(together[1], alone, rtol=1e-3, atol=1e-4)


def test_wrong_choices_are_named():
    for name in ("model", "adapt", "learner", "belief"):
        env, config = make(**{name: "x"})
        with pytest.raises(UserError, match=f'{name} = "x" is none of'):
            icem_online.init(jax.random.key(0), env, config)
