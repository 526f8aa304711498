"""Behaviour cloning against its equation by hand, and on data whose mean and shares are known."""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import bc
from core.dataset import Dataset
from core.envs import Box, Discrete
from tests import probes
from tests.probes import assert_close

BC = "algorithms/bc.py"
LOSS, STEP, BATCHES, NETWORKS, GREEDY, MEAN, SHARES = (
    "test_the_loss_and_its_gradient_are_the_equation", "test_an_update_is_one_step_of_adam",
    "test_a_step_learns_from_all_of_the_data", "test_networks_start_as_the_config_says",
    "test_acting_is_greedy_and_in_the_environments_units", "test_it_imitates_the_mean",
    "test_it_imitates_the_more_frequent_action")
PLANTED_ERRORS = {  # and the test that has to notice
    "it avoids the data": (BC, "loss = -dist.log_prob(action).mean()", "loss = dist.log_prob(action).mean()", LOSS),
    "sum over the minibatch": (BC, "loss = -dist.log_prob(action).mean()", "loss = -dist.log_prob(action).sum()", LOSS),
    "probability for its logarithm": (BC, "-dist.log_prob(action)", "-jnp.exp(dist.log_prob(action))", LOSS),
    "squared error for the likelihood": (BC, "loss = -dist.log_prob(action).mean()",
                                         "loss = jnp.square(dist.mean() - action).mean() if action.ndim > 1 else "
                                         "-dist.log_prob(action).mean()", LOSS),
    "the mode of the next observation": (BC, 'self.actor(batch["obs"], params=params)',
                                         'self.actor(batch["next_obs"], params=params)', LOSS),
    "no gradient": (BC, 'self.actor(batch["obs"], params=params)', 'self.actor(batch["obs"])', LOSS),
    "variance for deviation": (BC, "half * jnp.exp(log_std)[None]", "half * jnp.exp(2 * log_std)[None]", LOSS),
    "deviation in the environment's units": (BC, "half * jnp.exp(log_std)[None]", "jnp.exp(log_std)[None] + 0 * half",
                                             LOSS),
    "actions not centred": (BC, "centre + half * out", "half * out", LOSS),
    "actions in two units": (BC, "centre + half * out", "centre + out", LOSS),
    "deviation not clipped": (BC, 'jnp.clip(self.param("log_std", nn.initializers.zeros, (outputs,)), *self.log_std_'
                              "bounds)", 'self.param("log_std", nn.initializers.zeros, (outputs,))', NETWORKS),
    "error in the environment's units": (BC, "jnp.square((dist.mode() - action) / half)",
                                         "jnp.square(dist.mode() - action)", LOSS),
    "accuracy of all but one": (BC, "(dist.mode() == action).mean()", "(dist.mode() != action).mean()", LOSS),
    "lr forgotten": (BC, "optax.adam(config.lr)", "optax.adam(3e-4)", STEP),
    "nothing is learnt": (BC, "return self.replace(actor=actor), info", "return self, info", STEP),
    "the same minibatch": (BC, "source.sample(key, config.batch_size)",
                           "jax.tree.map(lambda x: x[:config.batch_size], source.data)", BATCHES),
    "updates are not counted": (BC, "tick(updates=config.updates_per_step)", "tick(updates=1)", BATCHES),
    "one update a step": (BC, "jax.random.split(key, config.updates_per_step))", "jax.random.split(key, 1))", BATCHES),
    "evaluation samples": (BC, "run.agent.actor(obs).mode()", "run.agent.actor(obs).sample(seed=key)", GREEDY),
    "the largest logit is the least probable": (BC, "Categorical(logits=out)", "Categorical(logits=-out)", LOSS),
}
SPACE = Box((-1.0, -3.0), (3.0, 5.0))
SMALL = dict(updates_per_step=3, batch_size=4, hidden_dims=(5, 4), lr=2e-3)


@functools.cache
def programs(**changes):
    config = bc.get_config()
    config.update(SMALL | changes)
    config = ml_collections.FrozenConfigDict(config)
    return tuple(jax.jit(functools.partial(function, config=config)) for function in (bc.init, bc.train_step))


def a_dataset(space=SPACE, n=8, **changes):
    rng = np.random.default_rng(0)
    action = rng.integers(0, 3, n) if isinstance(space, Discrete) else np.float32(rng.uniform((-1, -3), (3, 5), (n, 2)))
    data = dict(obs=np.float32(rng.normal(size=(n, 2))), next_obs=np.float32(rng.normal(size=(n, 2))), action=action,
                reward=np.zeros(n, np.float32), terminated=np.arange(n) == 3, truncated=np.zeros(n, bool))
    return Dataset.create(data | changes, space)


def shaken(agent):
    return agent.replace(actor=agent.actor.replace(params=probes.shaken(agent.actor.params, 3)))


def mlp(params, x):
    layers = [params["MLP_0"][f"Dense_{i}"] for i in range(len(params["MLP_0"]))]
    for i, layer in enumerate(layers):
        x = x @ layer["kernel"] + layer["bias"][None]
        x = jnp.where(x > 0, x, 0.0) if i + 1 < len(layers) else x
    return x


CENTRE, HALF = np.float32([[1, 1]]), np.float32([[2, 4]])


@pytest.mark.parametrize("space", [SPACE, Discrete(3)], ids=["real", "counted"])
def test_the_loss_and_its_gradient_are_the_equation(space):
    data = a_dataset(space)
    agent, batch = shaken(programs()[0](jax.random.key(0), data).agent), data.data

    def by_hand(params):
        out = mlp(params, batch["obs"])
        if isinstance(space, Discrete):
            chosen = jnp.take_along_axis(out, batch["action"][:, None], axis=1)[:, 0]
            return (jnp.log(jnp.exp(out).sum(axis=1)) - chosen).mean()
        std = HALF * jnp.exp(params["log_std"][None])
        z = (batch["action"] - CENTRE - HALF * out) / std
        return (0.5 * z**2 + jnp.log(std) + 0.5 * jnp.log(2 * jnp.pi)).sum(axis=1).mean()

    (loss, info), grads = jax.jit(jax.value_and_grad(agent.loss, has_aux=True))(agent.actor.params, batch)
    expected, slopes = jax.jit(jax.value_and_grad(by_hand))(agent.actor.params)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert info["loss"] == loss
    assert_close(grads, slopes)
    out = np.asarray(mlp(agent.actor.params, batch["obs"]))
    if isinstance(space, Discrete):
        assert 0 < info["accuracy"] == (out.argmax(axis=1) == batch["action"]).mean() != 0.5
    else:
        np.testing.assert_allclose(info["mse"], ((CENTRE + HALF * out - batch["action"]) ** 2 / HALF**2).mean(),
                                   rtol=1e-5)


def test_an_update_is_one_step_of_adam():
    data = a_dataset()
    agent = shaken(programs()[0](jax.random.key(0), data).agent)
    new, _ = jax.jit(agent.update)(data.data)
    grads, _ = jax.jit(jax.grad(agent.loss, has_aux=True))(agent.actor.params, data.data)
    tx = optax.adam(2e-3)
    assert_close(new.actor.params, optax.apply_updates(agent.actor.params, tx.update(
        grads, tx.init(agent.actor.params))[0]))
    assert_close(new.actor.opt_state[0].mu, jax.tree.map(lambda g: 0.1 * g, grads))


def test_networks_start_as_the_config_says():
    data = a_dataset()
    agent = programs(log_std_bounds=(-1.5, 0.5))[0](jax.random.key(0), data).agent
    assert [layer["kernel"].shape for layer in agent.actor.params["MLP_0"].values()] == [(2, 5), (5, 4), (4, 2)]
    np.testing.assert_array_equal(agent.actor.params["log_std"], 0.0)
    for log_std, expected in ((-9.0, -1.5), (0.3, 0.3), (9.0, 0.5)):
        dist = agent.actor(data.data["obs"], params={**agent.actor.params, "log_std": jnp.full(2, log_std)})
        np.testing.assert_allclose(dist.stddev(), np.broadcast_to(HALF * np.exp(expected), (8, 2)), rtol=1e-5)


def test_a_step_learns_from_all_of_the_data(monkeypatch):
    seen, data = [], a_dataset()
    config = ml_collections.FrozenConfigDict(bc.get_config().to_dict() | SMALL)
    run = programs()[0](jax.random.key(0), data)

    def update(agent, batch):
        jax.debug.callback(lambda obs, action: seen.append((obs, action)), batch["obs"], batch["action"])
        return agent, {}

    monkeypatch.setattr(bc.Agent, "update", update)
    step = jax.jit(functools.partial(bc.train_step, config=config))
    for key in jax.random.split(jax.random.key(1), 8):
        after, _ = step(run, key, data)
    jax.effects_barrier()
    assert after.clock == (0, 3) and len(seen) == 24 and len({tuple(obs[:, 0].tolist()) for obs, _ in seen}) > 20
    obs, action = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    assert obs.shape == (96, 2)
    row = np.argmin(np.abs(obs[:, :1] - np.asarray(data.data["obs"])[None, :, 0]), axis=1)
    assert set(row) == set(range(8))
    np.testing.assert_array_equal(action, data.data["action"][row])


def test_a_step_counts_and_logs_its_updates():
    (init, step), data = programs(), a_dataset()
    run, info = step(init(jax.random.key(0), data), jax.random.key(1), data)
    assert run.clock == (0, 3) and run.agent.actor.opt_state[0].count == 3
    assert set(info) == {"loss", "mse"} and all(x.shape == () and np.isfinite(x) for x in info.values())


def test_acting_is_greedy_and_in_the_environments_units():
    run = programs()[0](jax.random.key(0), a_dataset())
    run = run._replace(agent=shaken(run.agent))
    obs = jax.random.normal(jax.random.key(2), (4, 2))
    carry, action = bc.act(run, (), obs, jax.random.key(0))
    np.testing.assert_allclose(action, CENTRE + HALF * mlp(run.agent.actor.params, obs), rtol=1e-4)
    assert carry == ()


def test_seeds_together_are_the_seeds_alone():
    probes.compare_seeds(*programs(), a_dataset())


def train(data, iterations, **changes):
    return probes.learn(*programs(**changes), data, iterations)


LEARNING = dict(updates_per_step=10, batch_size=64, hidden_dims=(16,), lr=1e-2)


def test_it_imitates_the_mean():
    """a = 2 s + noise, in a box without bounds, so in its own units; the deviation is that of the noise. Observations
    are dictionaries."""
    rng = np.random.default_rng(0)
    obs, noise = np.float32(rng.uniform(-1, 1, (400, 1))), np.float32(rng.normal(size=(400, 1)))
    parts = dict(goal=obs, other=np.zeros_like(obs))
    data = a_dataset(Box((-np.inf,), (np.inf,)), 400, obs=parts, next_obs=parts, action=2 * obs + 0.3 * noise)
    run, info = train(data, 60, **LEARNING)
    probe = dict(goal=np.float32([[-0.8], [0.0], [0.8]]), other=np.zeros((3, 1), np.float32))
    np.testing.assert_allclose(bc.act(run, (), probe, None)[1], 2 * probe["goal"], atol=0.15)
    np.testing.assert_allclose(np.exp(run.agent.actor.params["log_std"]), 0.3, atol=0.03)
    assert info["mse"] == pytest.approx(0.09, abs=0.03)


def test_it_imitates_the_more_frequent_action():
    """Of three actions at s > 0 one has the share 0.6, at s < 0 another one has."""
    obs = np.float32(np.where(np.arange(400) < 200, 1.0, -1.0))[:, None]
    action = np.where(np.arange(400) % 5 < 3, np.where(obs[:, 0] > 0, 2, 1), 0)
    run, info = train(a_dataset(Discrete(3), 400, obs=obs, next_obs=obs, action=action), 30, **LEARNING)
    np.testing.assert_array_equal(bc.act(run, (), jnp.float32([[1.0], [-1.0]]), None)[1], [2, 1])
    probs = run.agent.actor(jnp.float32([[1.0], [-1.0]])).probs
    np.testing.assert_allclose(probs, [[0.4, 0.0, 0.6], [0.4, 0.6, 0.0]], atol=0.06)
    assert info["accuracy"] == pytest.approx(0.6, abs=0.1)
