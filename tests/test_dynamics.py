"""Fitting a network to a data set: the loss, the held out episodes, the three errors, against numpy."""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import dynamics
from core.dataset import Dataset
from core.errors import UserError

FILE = "algorithms/dynamics.py"
LOSS, HOLDOUT, POISON, ERRORS, ROLLOUT, LEARNS = (
    "test_the_loss_is_its_equation", "test_whole_episodes_are_held_out_by_the_seeds_key",
    "test_nothing_of_the_held_out_episodes_is_learnt", "test_the_errors_are_root_mean_squares",
    "test_a_rollout_uses_its_own_predictions", "test_it_learns_a_linear_system")
PLANTED_ERRORS = {
    "mean over the entries": (FILE, "jnp.square(self.errors(batch, params)).sum(-1).mean()",
                              "jnp.square(self.errors(batch, params)).mean()", LOSS),
    "errors not scaled": (FILE, '(predicted - batch["next_obs"]) / self.scaling["scale"][None]',
                          'predicted - batch["next_obs"]', LOSS),
    "inputs not centred": (FILE, ' - self.scaling["centre"][None]) / ', ") / ", LOSS),
    "inputs not spread": (FILE, ' - self.scaling["centre"][None]) / self.scaling["spread"][None]',
                          ' - self.scaling["centre"][None])', LOSS),
    "change not scaled": (FILE, 'x + self.scaling["scale"][None] * self', "x + self", LOSS),
    "x itself is predicted": (FILE, 'return x + self.scaling["scale"]', 'return self.scaling["scale"]', LOSS),
    "features ignored": (FILE, 'getattr(self.env, "features", lambda x: x)(x)', "x", LOSS),
    "no gradient": (FILE, 'self.predict(batch["obs"], batch["action"], params)',
                    'self.predict(batch["obs"], batch["action"])', LEARNS),
    "scaling of all data": (FILE, 'data["next_obs"] - data["obs"], trained[:, None]',
                            'data["next_obs"] - data["obs"], jnp.ones_like(trained)[:, None]', POISON),
    "minibatches of all data": (FILE, "(config.batch_size,), 0, run.num_trained)",
                                "(config.batch_size,), 0, source.size)", POISON),
    "never the last training transition": (FILE, "(config.batch_size,), 0, run.num_trained)",
                                           "(config.batch_size,), 0, run.num_trained - 1)",
                                           "test_minibatches_are_drawn_from_all_of_the_training_transitions"),
    "held out first": (FILE, "Run(agent, jnp.argsort(~trained)", "Run(agent, jnp.argsort(trained)", POISON),
    "transitions held out, not episodes": (FILE, "luck[episode] <", "luck <", HOLDOUT),
    "the same episodes for every seed": (FILE, "draw_holdout(holdout_key,", "draw_holdout(jax.random.key(0),", HOLDOUT),
    "an episode goes on over its end": (FILE, "jnp.cumsum(done) - done, done.sum()", "jnp.cumsum(done), done.sum()",
                                        HOLDOUT),
    "a time limit is no end": (FILE, '(data["terminated"] | data["truncated"])', 'data["terminated"]', HOLDOUT),
    "one episode too many": (FILE, "luck[episode] < jnp.sort", "luck[episode] <= jnp.sort", HOLDOUT),
    "nothing held out of few": (FILE, "jnp.round(share * count).astype(int), 1, count - 1)",
                                "jnp.round(share * count).astype(int), 0, count - 1)", HOLDOUT),
    "everything held out": (FILE, "1, count - 1)", "1, count)", HOLDOUT),
    "one episode is taken": (FILE, "source.longest == source.size", "False", "test_one_episode_is_refused"),
    "errors exchanged": (FILE, "square.mean(where=held_out), train_error=square.mean(where=~held_out)",
                         "square.mean(where=~held_out), train_error=square.mean(where=held_out)", ERRORS),
    "no root": (FILE, "jax.tree.map(jnp.sqrt, errors)", "errors", ERRORS),
    "one step ahead for ever": (FILE, 'jax.lax.scan(step, source.data["obs"][start], source.data["action"][index])',
                                'jax.lax.scan(lambda x, now: (agent.predict(*now), None), source.data["obs"][start], '
                                '(source.data["obs"][index], source.data["action"][index]))', ROLLOUT),
    "the state before the last": (FILE, 'source.data["next_obs"][index[-1]]', 'source.data["obs"][index[-1]]', ROLLOUT),
    "rollouts of training episodes": (FILE, "held_out[source.starts] &", "~held_out[source.starts] &", ROLLOUT),
    "windows over an end": (FILE, "(source.left >= agent.config.rollout_steps)", "(source.left >= 1)", ROLLOUT),
    "no windows, no error": (FILE, "jnp.where(possible.any(), error, jnp.nan)", "error", ROLLOUT),
    "the learning rate stays": (FILE, "optax.cosine_decay_schedule(config.lr, config.updates)", "config.lr",
                                "test_the_learning_rate_falls_to_zero"),
    "updates not counted": (FILE, "clock=run.clock.tick(updates=1)", "clock=run.clock",
                            "test_the_learning_rate_falls_to_zero"),
}
LENGTHS = 7, 4, 9, 5, 8, 4  # of the episodes; the last one is cut where the data stop


def config_of(**changes):
    config = dynamics.get_config()
    config.update(dict(hidden_dims=(5,), batch_size=16, rollout_steps=4, num_windows=64) | changes)
    return ml_collections.FrozenConfigDict(config)


def a_dataset(lengths=LENGTHS, seed=0, **changes):
    """Of the cart-pole's sizes, means and standard deviations far from 0 and 1."""
    n, rng = sum(lengths), np.random.default_rng(seed)
    last = np.cumsum(lengths) - 1
    obs, action, change = (rng.normal(mean, std, (n, d)) for mean, std, d in ((2, 3, 4), (1, 2, 1), (0.5, 0.2, 4)))
    data = dict(obs=obs, action=action, next_obs=obs + change, reward=np.zeros(n))
    data = {name: np.float32(leaf) for name, leaf in data.items()} | changes
    ends = np.isin(np.arange(n), last)
    truncated = np.isin(np.arange(n), last[:-1:2])
    return Dataset.create(data | dict(truncated=truncated, terminated=ends & ~truncated & (np.arange(n) < n - 1)))


@functools.cache
def program(name, **changes):
    function, config = getattr(dynamics, name), config_of(**changes)
    return jax.jit(lambda *args: function(*args, config))


def init(data, seed=0, **changes):
    return program("init", **changes)(jax.random.key(seed), data)


def numbers(run):
    """(scaling, kernels and biases), in float64."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), run.agent.params)
    return params["scaling"], [params["weights"][name] for name in sorted(params["weights"])]


def predict(run, x, action):
    """x̂' of (N, 4) and (N, 1) by the docstring's equations."""
    scaling, (first, last) = numbers(run)
    features = np.stack([np.sin(x[:, 1]), np.cos(x[:, 1]), x[:, 0], x[:, 2], x[:, 3]], axis=1)
    z = (np.concatenate([features, action], axis=1) - scaling["centre"]) / scaling["spread"]
    hidden = np.tanh(z @ first["kernel"] + first["bias"])
    return x + scaling["scale"] * (hidden @ last["kernel"] + last["bias"])


def test_the_loss_is_its_equation():
    data = a_dataset()
    run = init(data)
    scaling, _ = numbers(run)
    assert not np.allclose(scaling["centre"], 0) and not np.allclose(scaling["spread"], 1)
    loss, info = run.agent.loss(run.agent.dynamics.params, data.data)
    x, action, next_x = (np.asarray(data.data[name], np.float64) for name in ("obs", "action", "next_obs"))
    error = (predict(run, x, action) - next_x) / scaling["scale"]
    assert loss == info["loss"] == pytest.approx(np.square(error).sum(1).mean(), rel=1e-4)


def held_out(run):
    return np.sort(np.asarray(run.order[run.num_trained:]))


@pytest.mark.parametrize("share, count", [(0.3, 2), (0.01, 1), (0.99, 5)])
def test_whole_episodes_are_held_out_by_the_seeds_key(share, count):
    data, starts = a_dataset(), np.cumsum((0, *LENGTHS))
    draw, drawn = jax.jit(dynamics.draw_holdout), set()
    for seed in range(8):
        mask = np.asarray(draw(jax.random.key(seed), data.data, share))
        whole = [bool(mask[a:b].all()) for a, b in zip(starts, starts[1:], strict=False)]
        assert [bool(mask[a:b].any()) for a, b in zip(starts, starts[1:], strict=False)] == whole
        assert sum(whole) == count
        drawn.add(tuple(whole))
    assert len(drawn) > 2
    both = [tuple(held_out(init(data, seed))) for seed in (0, 1, 2)]
    assert len(set(both)) > 1 and sorted(init(data).order.tolist()) == list(range(data.size))


def poisoned():
    """A data set whose held out transitions are not a number, and its run before that is known."""
    data = a_dataset()
    index = held_out(init(data))
    next_obs = data.data["next_obs"].at[index].set(jnp.nan)
    return a_dataset(next_obs=np.asarray(next_obs), obs=np.asarray(data.data["obs"].at[index].set(jnp.nan)))


def test_nothing_of_the_held_out_episodes_is_learnt():
    data = poisoned()
    run, step = init(data), program("train_step")
    for key in jax.random.split(jax.random.key(1), 10):
        run, info = step(run, key, data)
        assert np.isfinite(info["loss"])
    errors = program("measure")(run, jax.random.key(0), data)
    assert np.isfinite(errors["train_error"]) and np.isnan(errors["holdout_error"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run.agent.params))


def test_minibatches_are_drawn_from_all_of_the_training_transitions():
    """The last of them alone has a change that is far off: some minibatch must see it."""
    data = a_dataset()
    run = init(data)
    last = int(run.order[run.num_trained - 1])
    far = a_dataset(next_obs=np.asarray(data.data["next_obs"].at[last].set(1e3)))
    losses = [program("train_step")(run, key, far)[1]["loss"] for key in jax.random.split(jax.random.key(1), 12)]
    assert max(losses) > 1e3 > min(losses)


def test_the_errors_are_root_mean_squares():
    data = a_dataset()
    run = init(data)
    errors = program("measure")(run, jax.random.key(0), data)
    x, action, next_x = (np.asarray(data.data[name], np.float64) for name in ("obs", "action", "next_obs"))
    square = np.square((predict(run, x, action) - next_x) / numbers(run)[0]["scale"])
    mask = np.isin(np.arange(data.size), held_out(run))
    assert errors["holdout_error"] == pytest.approx(np.sqrt(square[mask].mean()), rel=1e-4)
    assert errors["train_error"] == pytest.approx(np.sqrt(square[~mask].mean()), rel=1e-4)


def test_a_rollout_uses_its_own_predictions():
    """One episode is held out, of as many steps as a rollout, of more, or of fewer."""
    for lengths, windows in (((4, 4), 1), ((6, 6), 3), ((3, 3, 9, 9, 9), 0)):
        data = a_dataset(lengths)
        for seed in range(40):
            run = init(data, seed)
            index = held_out(run)
            if windows or len(index) == 3:
                break
        error = program("measure")(run, jax.random.key(0), data)["rollout_error"]
        x, action, next_x = (np.asarray(data.data[name], np.float64) for name in ("obs", "action", "next_obs"))
        own = []
        for start in index[:windows]:
            now = x[start:start + 1]
            for t in range(4):
                now = predict(run, now, action[start + t:start + t + 1])
            own.append(np.square((now - next_x[start + 3]) / numbers(run)[0]["scale"]).mean())
        if windows:
            assert np.sqrt(min(own)) * 0.999 <= error <= np.sqrt(max(own)) * 1.001
        else:
            assert np.isnan(error)


def test_the_learning_rate_falls_to_zero():
    data, changes = a_dataset(), dict(updates=3, lr=0.5)
    run, moved = init(data, **changes), []
    for key in jax.random.split(jax.random.key(1), 4):
        before, (run, _) = run.agent.params["weights"], program("train_step", **changes)(run, key, data)
        moved.append(max(float(jnp.abs(a - b).max()) for a, b in zip(*map(
            jax.tree.leaves, (before, run.agent.params["weights"])), strict=True)))
    assert moved[0] == pytest.approx(0.5, rel=1e-2) and moved[3] == 0 < moved[2] < moved[1]
    assert (run.clock.updates, run.clock.env_steps) == (4, 0)


def test_it_learns_a_linear_system():
    rng, n = np.random.default_rng(0), 400
    obs, action = rng.normal(size=(n, 2)), rng.normal(size=(n, 1))
    obs[:, 0] = 0.7  # an angle that never changes, and neither does its change
    change = np.stack([np.zeros(n), 0.1 * obs[:, 1] + 0.3 * action[:, 0]], axis=1)
    data = a_dataset((20,) * 20, obs=np.float32(obs), action=np.float32(action), next_obs=np.float32(obs + change))
    changes = dict(env="damped_pendulum", updates=600, lr=1e-2, hidden_dims=(16,))
    run = init(data, **changes)
    assert run.agent.scaling["spread"][0] == run.agent.scaling["scale"][0] == 1
    before = program("measure", **changes)(run, jax.random.key(0), data)
    fit = jax.jit(lambda run, keys, data: jax.lax.scan(
        lambda run, key: dynamics.train_step(run, key, data, config_of(**changes)), run, keys)[0])
    run = fit(run, jax.random.split(jax.random.key(1), 600), data)
    after = program("measure", **changes)(run, jax.random.key(0), data)
    assert after["holdout_error"] < 0.1 and after["holdout_error"] < 0.2 * before["holdout_error"]
    assert after["train_error"] < 0.1


def test_a_rollout_longer_than_all_episodes_is_refused():
    with pytest.raises(UserError, match="rollout_steps = 10, but the longest episode has 9 steps"):
        dynamics.init(jax.random.key(0), a_dataset(), config_of(rollout_steps=10))


def test_one_episode_is_refused():
    with pytest.raises(UserError, match="the data are one episode, so none can be held out"):
        dynamics.init(jax.random.key(0), a_dataset((9,)), config_of())
