"""PQN against its equations by hand, and on probes whose values are known."""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import pqn
from core.envs import Batch
from core.envs.interface import Box
from core.errors import UserError
from tests import probes

PQN = "algorithms/pqn.py"
NETWORK, LOSS, UPDATE, TARGETS, EXPLORES, EPOCH, GREEDY, CLOCK = (
    "test_the_network_is_normalised", "test_loss_is_the_equation",
    "test_update_is_clipped_annealed_radam_over_every_sample", "test_targets_by_brute_force",
    "test_exploration_falls_linearly", "test_every_epoch_sees_every_sample_once", "test_acting_is_greedy",
    "test_the_clock_counts_what_was_taken")
PLANTED_ERRORS = {  # and the test that has to notice
    "layers not normalised": (PQN, "x = nn.relu(nn.LayerNorm()(nn.Dense(dim, kernel_init=orthogonal(2**0.5))(x)))",
                              "x = nn.relu(nn.Dense(dim, kernel_init=orthogonal(2**0.5))(x))", NETWORK),
    "normalised after the activation": (PQN, "nn.relu(nn.LayerNorm()(nn.Dense(dim, kernel_init=orthogonal(2**0.5))(x)"
                                        "))", "nn.LayerNorm()(nn.relu(nn.Dense(dim, kernel_init=orthogonal(2**0.5))("
                                        "x)))", NETWORK),
    "patches transposed": ("core/networks.py", "for i in range(size) for j in range(size)]",
                           "for j in range(size) for i in range(size)]", NETWORK),
    "convolution without activation": (PQN, "x = nn.relu(nn.LayerNorm()(nn.Dense(self.channels, kernel_init=orthogonal"
                                       "(2**0.5))(patches(x))))", "x = nn.LayerNorm()(nn.Dense(self.channels, "
                                       "kernel_init=orthogonal(2**0.5))(patches(x)))", NETWORK),
    "value of another action": (PQN, 'batch["action"][:, None], axis=1)', '0 * batch["action"][:, None], axis=1)',
                                LOSS),
    "value of the best action": (PQN, 'q = jnp.take_along_axis(self.q(batch["obs"], params=params), batch["action"]'
                                 "[:, None], axis=1).squeeze(1)", 'q = self.q(batch["obs"], params=params).max(axis=1)',
                                 LOSS),
    "half of the loss lost": (PQN, "loss = 0.5 * jnp.square", "loss = jnp.square", LOSS),
    "discount for trace": (PQN, "step.truncated, config.discount, config.trace)",
                           "step.truncated, config.trace, config.discount)", TARGETS),
    "a time limit is an end": (PQN, "step.terminated, step.truncated, config.discount",
                               "step.terminated | step.truncated, step.truncated, config.discount", TARGETS),
    "an end is a time limit": (PQN, "step.terminated, step.truncated, config.discount",
                               "step.truncated, step.terminated, config.discount", TARGETS),
    "sums cross a time limit": (PQN, "step.terminated, step.truncated, config.discount",
                                "step.terminated, 0 * step.truncated, config.discount", TARGETS),
    "successor is the reset observation": (PQN, "value(run, step.next_obs)", "value(run, step.obs)", TARGETS),
    "value of this observation": (PQN, "value(run, step.next_obs)", "value(run, obs)", TARGETS),
    "mean for max": (PQN, "run.agent.q(obs.reshape(-1, *obs.shape[2:])).max(axis=1)",
                     "run.agent.q(obs.reshape(-1, *obs.shape[2:])).mean(axis=1)", TARGETS),
    "reward in the environment's units": (PQN, "reward = config.reward_scale * step.reward", "reward = step.reward",
                                          TARGETS),
    "observation after the step": (PQN, "(run.obs, action, step)", "(step.obs, action, step)", TARGETS),
    "gradients not clipped": (PQN, "optax.clip_by_global_norm(config.max_grad_norm)", "optax.identity()", UPDATE),
    "Adam for RAdam": (PQN, "optax.radam(", "optax.adam(", UPDATE),
    "learning rate stays": (PQN, "optax.linear_schedule(config.lr, 0.0, updates)", "config.lr", UPDATE),
    "a schedule too short": (PQN, "// batch * config.num_epochs * config.num_minibatches",
                             "// batch * config.num_epochs", UPDATE),
    "one epoch only": (PQN, "jax.random.split(key, self.config.num_epochs)", "jax.random.split(key, 1)", UPDATE),
    "same minibatch every time": (PQN, "lambda x: x[index], batch", "lambda x: x[: index.shape[0]], batch", EPOCH),
    "never greedy": (PQN, "< epsilon, random,", "< 1.0, random,", EXPLORES),
    "always greedy": (PQN, "< epsilon, random,", "< 0.0, random,", EXPLORES),
    "exploration of its complement": (PQN, "< epsilon, random,", "> epsilon, random,", EXPLORES),
    "exploration over the whole budget": (PQN, "(config.epsilon_steps * config.env_steps)", "config.env_steps",
                                          EXPLORES),
    "exploration rises": (PQN, "(config.final_epsilon - config.init_epsilon)",
                          "(config.init_epsilon - config.final_epsilon)", EXPLORES),
    "exploration goes below its end": (PQN, "config.env_steps), 0.0, 1.0)", "config.env_steps), 0.0, 9.0)",
                                         EXPLORES),
    "one random action for all": (PQN, "randint(which_key, (len(q),), 0, q.shape[1])",
                                  "randint(which_key, (1,), 0, q.shape[1])", EXPLORES),
    "the last action is never random": (PQN, "(len(q),), 0, q.shape[1])", "(len(q),), 0, q.shape[1] - 1)", EXPLORES),
    "the worst action": (PQN, "return (), run.agent.q(obs).argmax(", "return (), run.agent.q(obs).argmin(", GREEDY),
    "updates of one epoch counted": (PQN, "config.num_envs * config.num_steps, config.num_epochs * config.num_minib",
                                     "config.num_envs * config.num_steps, config.num_minib", CLOCK),
    "continuous actions": (PQN, "require(source, config, actions=(Discrete,))", "require(source, config)",
                           "test_mistakes_are_named"),
}

SMALL = dict(num_envs=4, num_steps=6, env_steps=4 * 6 * 10, hidden_dims=(5, 4), discount=0.9, trace=0.7, num_epochs=2,
             num_minibatches=3, init_epsilon=0.9, final_epsilon=0.3, epsilon_steps=0.5, reward_scale=0.5, lr=0.01)


def make(env, **changes):
    config = pqn.get_config()
    config.update(SMALL | changes)
    return Batch(env, config.num_envs), ml_collections.FrozenConfigDict(config)


def start(env, **changes):
    env, config = make(env, **changes)
    return jax.jit(functools.partial(pqn.init, source=env, config=config))(jax.random.key(0)), env, config


def layer_norm(x, params):
    mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * params["scale"] + params["bias"]


def network(params, x):
    """By hand, in float64."""
    params, x = jax.tree.map(lambda p: np.asarray(p, np.float64), params), np.asarray(x, np.float64)
    last = len(params) // 2
    for i in range(last):
        layer = params[f"Dense_{i}"]
        if i == 0 and x.ndim == 4:
            kernel = layer["kernel"].reshape(3, 3, x.shape[-1], -1)
            h, w = x.shape[1] - 2, x.shape[2] - 2
            out = np.zeros((len(x), h, w, kernel.shape[-1]))
            for row in range(h):
                for column in range(w):
                    out[:, row, column] = np.einsum("bijc,ijco->bo", x[:, row:row + 3, column:column + 3], kernel)
            x = out + layer["bias"]
        else:
            x = x.reshape(len(x), -1) @ layer["kernel"] + layer["bias"]
        x = np.maximum(layer_norm(x, params[f"LayerNorm_{i}"]), 0)
    return x.reshape(len(x), -1) @ params[f"Dense_{last}"]["kernel"] + params[f"Dense_{last}"]["bias"]


@pytest.mark.parametrize("shape", [(7,), (5, 4, 2)], ids=["vector", "image"])
def test_the_network_is_normalised(shape):
    obs = jax.random.normal(jax.random.key(0), (6, *shape)) > 0  # flags, as in MinAtar
    net = pqn.QNetwork(3, (5, 4), channels=3 if len(shape) > 1 else 0)
    params = probes.shaken(net.init(jax.random.key(1), obs)["params"])
    np.testing.assert_allclose(net.apply({"params": params}, obs), network(params, obs), rtol=1e-4, atol=1e-5)


def a_batch():
    keys = jax.random.split(jax.random.key(1), 3)
    return dict(obs=jax.random.normal(keys[0], (24, 2)), action=jax.random.randint(keys[1], (24,), 0, 3),
                target=jax.random.normal(keys[2], (24,)))


def test_loss_is_the_equation():
    """And its gradient, by finite differences in the direction of all parameters at once."""
    run, *_ = start(probes.Walk())
    batch, params = a_batch(), probes.shaken(run.agent.q.params)

    def by_hand(params):
        q = network(params, batch["obs"])[np.arange(24), batch["action"]]
        return 0.5 * np.mean((q - np.asarray(batch["target"], np.float64)) ** 2), q

    loss, info = run.agent.loss(params, batch)
    expected, q = by_hand(params)
    np.testing.assert_allclose([loss, info["loss"], info["q"]], [expected, expected, q.mean()], rtol=1e-4)
    ones = jax.tree.map(jnp.ones_like, params)
    slope = jax.jvp(lambda params: run.agent.loss(params, batch)[0], (params,), (ones,))[1]
    ends = [by_hand(jax.tree.map(lambda x, h=h: np.asarray(x, np.float64) + h, params))[0] for h in (-1e-6, 1e-6)]
    np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 2e-6, rtol=1e-3, atol=1e-5)


def test_targets_by_brute_force():
    """What the update is given, against the definition of the λ-return: the weighted sum of all n-step returns."""
    run, env, config = start(probes.Walk(), num_steps=12, num_minibatches=1, env_steps=480)
    agent = run.agent.replace(q=run.agent.q.replace(params=probes.shaken(run.agent.q.params)))
    run, key = run._replace(agent=agent), jax.random.key(3)
    given = []

    def update(agent, batch, key):
        given.append(batch)
        return agent, {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pqn.Agent, "update", update)
        pqn.train_step(run, jax.random.clone(key), env, config)
    _, (obs, action, step) = pqn.rollout(run, jax.random.split(key)[0], env, config)
    best = network(agent.q.params, step.next_obs.reshape(-1, 2)).max(axis=1).reshape(12, 4)
    terminated, truncated = np.asarray(step.terminated), np.asarray(step.truncated)
    assert terminated.any() and truncated.any()
    expected = np.zeros((12, 4))
    for e in range(4):
        for t in range(12):
            weight, rewards, scale = 1.0, 0.0, 1.0
            for k in range(t, 12):
                rewards += scale * 0.5 * float(step.reward[k, e])
                scale *= 0.9
                n_step = rewards + (0.0 if terminated[k, e] else scale * best[k, e])
                if terminated[k, e] or truncated[k, e] or k == 11:
                    expected[t, e] += weight * n_step
                    break
                expected[t, e] += weight * 0.3 * n_step
                weight *= 0.7
    np.testing.assert_allclose(given[0]["target"].reshape(12, 4), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(given[0]["obs"].reshape(12, 4, 2), obs)
    np.testing.assert_array_equal(given[0]["action"].reshape(12, 4), action)
    np.testing.assert_array_equal(obs[0], run.obs)


def test_update_is_clipped_annealed_radam_over_every_sample():
    """One minibatch an epoch, so the order does not matter: the same steps by hand, on unflattened parameters."""
    changes = dict(num_epochs=4, num_minibatches=1, env_steps=48, max_grad_norm=0.01, lr=0.1)
    run, _, config = start(probes.Walk(), **changes)
    agent, batch = run.agent, a_batch()
    new, _ = jax.jit(agent.update)(batch, jax.random.key(1))
    tx = optax.chain(optax.clip_by_global_norm(0.01), optax.radam(optax.linear_schedule(0.1, 0.0, 8)))
    params, state = agent.q.params, tx.init(agent.q.params)
    gradient = jax.jit(jax.grad(agent.loss, has_aux=True))
    for _ in range(4):
        grads = gradient(params, batch)[0]
        assert sum(jnp.square(g).sum() for g in jax.tree.leaves(grads)) > 0.01**2
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), new.q.params, params)
    more, *_ = start(probes.Walk(), **changes | dict(num_minibatches=2))
    for tx, updates in ((agent.q.tx, 8), (more.agent.q.tx, 16)):  # the learning rate ends at 0
        ones = jax.tree.map(jnp.ones_like, params)
        state, step = tx.init(params), jax.jit(tx.update)
        sizes = []
        for _ in range(updates + 1):
            moved, state = step(ones, state, params)
            sizes.append(max(float(jnp.abs(x).max()) for x in jax.tree.leaves(moved)))
        assert sizes[-1] < 1e-8 < sizes[-2]


def test_every_epoch_sees_every_sample_once():
    run, *_ = start(probes.Walk(), num_epochs=1, num_minibatches=4, max_grad_norm=1e-30)
    batch = a_batch()
    _, info = jax.jit(run.agent.update)(batch, jax.random.key(1))
    np.testing.assert_allclose(info["loss"], run.agent.loss(run.agent.q.params, batch)[0], rtol=1e-4)


def test_exploration_falls_linearly():
    """From 0.9 to 0.3 over the first half of 240 steps, and not further. A third of the random actions is the best."""
    run, *_ = start(probes.Walk())
    obs = jnp.zeros((3000, 2))
    best = int(run.agent.q(obs[:1]).argmax())
    explore = jax.jit(lambda steps, key: pqn.explore(
        run._replace(obs=obs, clock=run.clock._replace(env_steps=steps)), key))
    for steps, epsilon in ((0, 0.9), (60, 0.6), (120, 0.3), (240, 0.3)):
        counts = np.bincount(explore(jnp.int32(steps), jax.random.key(steps)), minlength=3) / 3000
        expected = np.full(3, epsilon / 3)
        expected[best] += 1 - epsilon
        np.testing.assert_allclose(counts, expected, atol=0.035)


def test_acting_is_greedy():
    run, *_ = start(probes.Walk())
    run = run._replace(agent=run.agent.replace(q=run.agent.q.replace(params=probes.shaken(run.agent.q.params))))
    obs = 3 * jax.random.normal(jax.random.key(0), (20, 2))
    carry, action = pqn.act(run, (), obs, jax.random.key(1))
    expected = network(run.agent.q.params, obs).argmax(axis=1)
    assert carry == () and len(set(expected)) > 1
    np.testing.assert_array_equal(action, expected)


def test_the_clock_counts_what_was_taken():
    run, env, config = start(probes.Walk())
    after, info = jax.jit(functools.partial(pqn.train_step, source=env, config=config))(run, jax.random.key(1))
    assert after.clock == (24, 6) and np.isfinite(info["loss"]) and np.isfinite(info["q"])
    assert info["episode"]["count"] > 0


LEARNING = dict(num_envs=8, num_steps=8, num_minibatches=2, env_steps=64 * 80, hidden_dims=(16,), lr=0.01,
                init_epsilon=1.0, final_epsilon=0.5, reward_scale=1.0)


def train(env, **changes):
    run, env, config = start(env, **(LEARNING | changes))
    step = functools.partial(pqn.train_step, source=env, config=config)
    return jax.jit(lambda run, keys: jax.lax.scan(step, run, keys))(run, jax.random.split(jax.random.key(1), 80))[0]


@pytest.mark.parametrize(("env", "obs", "values"), [
    (probes.Match(), [-1.0, 1.0], [1.0, 1.0]), (probes.Chain(), [0.0, 1.0], [0.5, 1.0]),
    (probes.Clock(), [0.0, 1.0, 2.0], [2.0] * 3)], ids=["match", "chain", "time limit"])
def test_values_are_learnt(env, obs, values):
    """A time limit is not the end: reward 1 for ever has the value 1 / (1 − γ)."""
    run = train(env, discount=0.5)
    obs = jnp.float32(obs)[:, None]
    np.testing.assert_allclose(run.agent.q(obs).max(axis=1), values, atol=0.07)
    if isinstance(env, probes.Match):
        np.testing.assert_array_equal(pqn.act(run, (), obs, None)[1], [0, 1])


@pytest.mark.parametrize(("env", "changes", "words"), [
    (probes.Walk(action_space=Box((-1.0,), (1.0,))), {}, "pqn cannot act in .* which has continuous actions"),
    (probes.Walk(), dict(num_minibatches=5), "num_envs . num_steps = 24 is not divisible by num_minibatches = 5"),
    (probes.Walk(), dict(channels=4), "channels = 4, but an observation has 1 axes")])
def test_mistakes_are_named(env, changes, words):
    env, config = make(env, **changes)
    with pytest.raises(UserError, match=words):
        pqn.init(jax.random.key(0), env, config)
