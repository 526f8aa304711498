"""The children of icem_online: what each does otherwise than its parent, against numpy, and that it is nothing more."""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import icem_online_gradient, icem_online_lora, icem_online_refit
from core.dataset import write_arrays
from core.envs import make_env
from core.errors import UserError
from launchers.fork import difference
from tests.test_icem_online import SMALL, last_layer, rows_of, some_transitions

LORA, GRADIENT, REFIT = (f"algorithms/icem_online_{name}.py" for name in ("lora", "gradient", "refit"))
BASES, DESCENT, WINDOW = (
    "test_lora_moves_the_kernels_within_their_bases", "test_gradient_steps_are_adam_on_the_window",
    "test_a_refit_is_a_regression_on_the_window")
PLANTED_ERRORS = {
    "singular values lost": (LORA, "(U * S[None])[:, :r]", "U[:, :r]", BASES),
    "smallest directions": (LORA, "(U * S[None])[:, :r], Vt[:r]", "(U * S[None])[:, -r:], Vt[-r:]", BASES),
    "A the other way round": (LORA, "left @ A @ right", "left @ A.T @ right", BASES),
    "LoRA in place of the weights": (LORA, 'weights[name]["kernel"] + left', "left", BASES),
    "one P for all": (LORA, '"k,kij->ij", theta[name], P)', '"k,kij->ij", theta[name], P[:1].repeat(len(P), 0))',
                      BASES),
    "one P for all layers": (LORA, "agent.weights.items(), strict=True):\n",
                             "agent.weights.items(), strict=True):\n            key = keys[0]\n", BASES),
    "a rank of its own": (LORA, "min(config.lora_rank, S.size)", "S.size", BASES),
    "the best sample of a network": (LORA, '"mean" if truth is None else "best"', '"best"',
                                     "test_lora_executes_the_mean"),
    "the empty window counts": (GRADIENT, ".mean(where=filled)", ".mean()", DESCENT),
    "gradient ascends": (GRADIENT, "(mean + updates, opt_state)", "(mean - updates, opt_state)", DESCENT),
    "moments are forgotten": (GRADIENT, "start = carry.belief.mean, carry.opt_state",
                              "start = carry.belief.mean, optax.adam(config.lr).init(carry.belief.mean)", DESCENT),
    "one update": (GRADIENT, "length=config.num_updates * config.learn", "length=1", DESCENT),
    "a window that forgets the newest": (GRADIENT, "jnp.concatenate([old[1:], new[None]])",
                                         "jnp.concatenate([new[None], old[1:]])", DESCENT),
    "the newest transition alone": (GRADIENT, "(*transitions)\n", "(*(x[-1:] for x in transitions))\n", DESCENT),
    "the empty window is absorbed": (REFIT, "jnp.where(filled, 0.0, jnp.inf)", "jnp.where(filled, 0.0, 0.0)", WINDOW),
    "refit starts from what it learnt": (REFIT, "self.prior(), window)", "carry.belief, window)", WINDOW),
    "a refit that forgets the newest": (REFIT, "jnp.concatenate([old[1:], new[None]])",
                                        "jnp.concatenate([new[None], old[1:]])", WINDOW),
}


@functools.cache
def make(algorithm, env="linear_tracking", **changes):
    config = algorithm.get_config()
    config.env_kwargs = {}
    config.update(SMALL | dict(env=env) | changes)
    env, config = make_env(env, 1), ml_collections.FrozenConfigDict(config)
    run = jax.jit(functools.partial(algorithm.init, source=env, config=config))(jax.random.key(0))
    scaling = jax.tree.map(lambda x: x + 0.1 * (1 + jnp.arange(x.size)), run.agent.scaling)
    return run._replace(agent=run.agent.replace(scaling=scaling)), env


def learnt(algorithm, run, data):
    """The carries (N, 1, ...) after each of the transitions."""
    def step(carry, step):
        carry = algorithm.observe(run, carry, jax.tree.map(lambda leaf: leaf[None], step))
        return carry, carry

    return jax.jit(lambda data: jax.lax.scan(step, algorithm.initial_carry(run, 1), data)[1])(data)


@pytest.mark.parametrize("adapt", ["lora_xs", "tiny_lora"])
def test_lora_moves_the_kernels_within_their_bases(adapt, tmp_path):
    params = dict(scaling=dict(centre=np.zeros(6), spread=np.ones(6), scale=np.ones(4)), weights={
        f"Dense_{i}": dict(kernel=np.random.default_rng(i).normal(size=shape), bias=np.ones(shape[1]))
        for i, shape in enumerate(((6, 5), (5, 4)))})  # unlike fresh ones, their singular values differ
    write_arrays(tmp_path / "model.npz", jax.tree.map(np.float32, params))
    run, _ = make(icem_online_lora, adapt=adapt, lora_rank=3, lora_size=7, pretrained=str(tmp_path / "model.npz"))
    agent, theta = run.agent, run.agent.theta()
    assert not any(leaf.any() for leaf in jax.tree.leaves(theta))
    jax.tree.map(np.testing.assert_array_equal, agent.insert(theta), agent.weights)
    theta = {name: jax.random.normal(jax.random.key(i), v.shape) for i, (name, v) in enumerate(theta.items())}
    moved = agent.insert(theta)
    assert not np.allclose(agent.bases["Dense_0"][2], agent.bases["Dense_1"][2])
    for name, layer in agent.weights.items():
        W = np.asarray(layer["kernel"], np.float64)
        U, S, Vt = np.linalg.svd(W, full_matrices=False)
        A = np.asarray(theta[name], np.float64)
        if adapt == "tiny_lora":
            P = np.asarray(agent.bases[name][2], np.float64)
            assert A.shape == (7,) and P.shape == (7, 3, 3) and not np.allclose(P[0], P[1])
            A = sum(v * matrix for v, matrix in zip(A, P, strict=True))
        left, right = (np.asarray(base, np.float64) for base in agent.bases[name][:2])
        assert A.shape == (3, 3)
        np.testing.assert_allclose(left @ right, (U[:, :3] * S[:3]) @ Vt[:3], atol=1e-5)
        np.testing.assert_allclose(moved[name]["kernel"], W + left @ A @ right, atol=1e-5)
        np.testing.assert_array_equal(moved[name]["bias"], layer["bias"])


def test_lora_learns_what_it_can_explain():
    """Of transitions that another A would have made."""
    run, _ = make(icem_online_lora, lora_rank=3, obs_var=1e-3, prior_var=1.0)
    data = some_transitions(60)
    A = {name: 0.5 * jnp.ones_like(leaf) for name, leaf in run.agent.theta().items()}
    next_x = jax.vmap(functools.partial(run.agent.predict, run.agent.insert(A)))(data.obs, data.action)
    error = learnt(icem_online_lora, run, data._replace(next_obs=next_x)).report["error"]
    assert error[-10:].mean() < 0.1 * error[:3].mean()


def test_lora_executes_the_mean(monkeypatch):
    seen, (run, _) = [], make(icem_online_lora)
    monkeypatch.setattr(icem_online_lora.planning, "icem", lambda *args, **kwargs: seen.append(kwargs) or (
        args[2], jnp.zeros(2), {}))
    icem_online_lora.act(run, run.carry, run.obs, jax.random.key(0))
    assert seen[0].pop("return_mode") == "mean" and seen[0] == dict(run.agent.config.planner)


def test_gradient_steps_are_adam_on_the_window():
    """Of 9 transitions; the window holds 6."""
    run, _ = make(icem_online_gradient, window=6, num_updates=2, lr=1e-2, obs_var=0.05)
    data = some_transitions(9)
    after = learnt(icem_online_gradient, run, data)
    features, y = rows_of(run.agent, data)
    theta, tx = last_layer(run.agent.weights["Dense_1"]).reshape(6, 4), optax.adam(1e-2)
    state = tx.init(jnp.float32(theta))
    for t in range(9):
        miss = y[t] - features[t] @ theta
        np.testing.assert_allclose(after.report["nis"][t, 0], (miss**2).sum() / 0.05, rtol=1e-3)
        kept = slice(max(0, t - 5), t + 1)
        for _ in range(2):
            gradient = 2 * features[kept].T @ (features[kept] @ theta - y[kept]) / len(y[kept])
            updates, state = tx.update(jnp.float32(gradient), state)
            theta = theta + np.asarray(updates, np.float64)
        np.testing.assert_allclose(after.belief.mean[t, 0], theta.ravel(), rtol=1e-3, atol=1e-4)
    assert not after.belief.var.any()


def test_a_refit_is_a_regression_on_the_window():
    """Of 9 transitions; the window holds 6."""
    run, _ = make(icem_online_refit, window=6, prior_var=0.3, obs_var=0.05)
    data = some_transitions(9)
    after = learnt(icem_online_refit, run, data)
    features, y = rows_of(run.agent, data)
    start = last_layer(run.agent.weights["Dense_1"]).reshape(6, 4)
    for t in (3, 8):
        rows = slice(max(0, t - 5), t + 1)
        cov = np.linalg.inv(np.eye(6) / 0.3 + features[rows].T @ features[rows] / 0.05)
        mean = start + cov @ features[rows].T @ (y[rows] - features[rows] @ start) / 0.05
        np.testing.assert_allclose(after.belief.mean[t, 0], mean.ravel(), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(after.belief.var[t, 0, :4], cov[0, 0], rtol=1e-3)
    frozen, _ = make(icem_online_refit, window=6, learn=False)
    carry = jax.jit(functools.partial(icem_online_refit.observe, frozen))(
        frozen.carry, jax.tree.map(lambda leaf: leaf[:1], data))
    np.testing.assert_array_equal(carry.belief.mean, frozen.carry.belief.mean)


DIFFERS = {  # what a child may do otherwise
    "lora": {"get_config", "Agent", "Agent.create", "Agent.theta", "Agent.insert", "Agent.predict", "Agent.search",
             "init"},
    "gradient": {"module", "get_config", "Carry", "Agent.prior", "Agent.learn", "init", "initial_carry", "train_step"},
    "refit": {"get_config", "Carry", "Agent.learn", "initial_carry", "train_step"},
}


@pytest.mark.parametrize("child", DIFFERS)
def test_the_diff_is_the_method(child):
    lines = list(difference(f"icem_online_{child}"))
    places = {line.strip("@ ").removesuffix(".error") for line in lines if line.startswith("@@")}
    assert places <= DIFFERS[child], places
    assert sum(line[0] in "+-" for line in lines) < 90


@pytest.mark.parametrize("algorithm", [icem_online_gradient, icem_online_refit])
def test_a_wrong_combination_is_named(algorithm):
    with pytest.raises(UserError, match='model="physics" has no layers'):
        make(algorithm, model="physics")
