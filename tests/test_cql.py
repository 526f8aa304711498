"""CQL against its equations by hand, and on data whose values, integrals and best action are known."""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import cql
from core.dataset import Dataset
from core.envs import Box, Discrete
from core.errors import UserError
from tests import probes
from tests.probes import assert_close, float64

CQL = "algorithms/cql.py"
LOSSES, PARTITION, ORDER, SUCCESSOR, NETWORKS, BATCHES, COUNTS, GREEDY, BANDIT, REFUSED, LOG = (
    "test_losses_and_gradients_are_the_equations", "test_the_partition_function_is_an_integral_over_the_box",
    "test_an_update_takes_its_steps_in_order",
    "test_a_target_depends_on_the_successor_only_where_the_episode_goes_on",
    "test_networks_start_as_the_config_says", "test_a_step_learns_from_all_of_the_data_in_units_of_the_networks",
    "test_a_step_counts_and_logs_its_updates", "test_acting_is_greedy_and_in_the_environments_units",
    "test_values_of_a_bandit_under_the_penalty", "test_what_cql_cannot_learn_from", "test_what_the_log_says")
PLANTED_ERRORS = {  # and the test that has to notice
    "the penalty is a bonus": (CQL, "error + self.config.cql_alpha * gap", "error - self.config.cql_alpha * gap",
                               LOSSES),
    "no penalty": (CQL, "(error + self.config.cql_alpha * gap)", "error", LOSSES),
    "cql_alpha forgotten": (CQL, "self.config.cql_alpha * gap", "gap", LOSSES),
    "the data's action is not pushed up": (CQL, "(self.log_partition(params, batch, partition_key) - q)",
                                           "self.log_partition(params, batch, partition_key)", LOSSES),
    "the data's action is pushed down": (CQL, "partition_key) - q)", "partition_key) + q)", LOSSES),
    "the penalty has no gradient": (CQL, "self.log_partition(params, batch", "self.log_partition(None, batch", LOSSES),
    "no importance weights": (CQL, "q - jnp.concatenate(log_densities)[None]",
                              "q - 0 * jnp.concatenate(log_densities)[None]", PARTITION),
    "actions weighted by their density": (CQL, "q - jnp.concatenate(log_densities)", "q + jnp.concatenate(log_densities"
                                          ")", PARTITION),
    "uniform density of [0, 1]": (CQL, "-shape[-1] * jnp.log(2.0)", "0.0 * shape[-1]", PARTITION),
    "uniform density of one dimension": (CQL, "-shape[-1] * jnp.log(2.0)", "-jnp.log(2.0)", LOSSES),
    "the inverse of the uniform density": (CQL, "-shape[-1] * jnp.log(2.0)", "shape[-1] * jnp.log(2.0)", PARTITION),
    "uniform actions of one half": (CQL, "shape, minval=-1.0, maxval=1.0", "shape", PARTITION),
    "actions of s' judged at s'": (CQL, 'self.critic(batch["obs"], action, params=params), out',
                                   'self.critic(batch["next_obs"], action, params=params), out', LOSSES),
    "no actions of s'": (CQL, 'zip(("obs", "next_obs")', 'zip(("obs", "obs")', LOSSES),
    "no actions of s": (CQL, 'zip(("obs", "next_obs")', 'zip(("next_obs", "next_obs")', LOSSES),
    "densities of the other kind": (CQL, "log_densities.append(log_prob)", "log_densities.insert(1, log_prob)", LOSSES),
    "a sum for a mean of the actions": (CQL, " - jnp.log(log_ratio.shape[1])", "", PARTITION),
    "a mean over a third of the actions": (CQL, "jnp.log(log_ratio.shape[1])", "jnp.log(shape[0])", PARTITION),
    "log-sum-exp over the batch": (CQL, "jax.nn.logsumexp(log_ratio, axis=1)", "jax.nn.logsumexp(log_ratio, axis=2)",
                                   LOSSES),
    "the largest for the log-sum-exp": (CQL, "jax.nn.logsumexp(log_ratio, axis=1)", "log_ratio.max(axis=1)", LOSSES),
    "a mean for the log-sum-exp": (CQL, "jax.nn.logsumexp(log_ratio, axis=1)", "log_ratio.mean(axis=1)", LOSSES),
    "the target critic is pushed down": (CQL, 'self.critic(batch["obs"], action, params=params), out',
                                         'self.target_critic(batch["obs"], action, params=params) * 0 + self.target_cri'
                                         'tic(batch["obs"], action), out', LOSSES),
    "one action for all": (CQL, "jax.random.split(policy_key, shape[0])", "jnp.broadcast_to(policy_key, shape[:1])",
                           LOSSES),
    "the data's next action": (CQL, 'self.target_critic(batch["next_obs"], next_action)',
                               'self.target_critic(batch["next_obs"], batch["action"])', LOSSES),
    "next action of this observation": (CQL, 'next_action, _ = self.actor(batch["next_obs"])',
                                        'next_action, _ = self.actor(batch["obs"])', LOSSES),
    "target from the online critic": (CQL, 'self.target_critic(batch["next_obs"], next_action)',
                                      'self.critic(batch["next_obs"], next_action)', LOSSES),
    "a target has a gradient": (CQL, 'self.target_critic(batch["next_obs"], next_action)',
                                'self.critic(batch["next_obs"], next_action, params=params)', LOSSES),
    "the larger critic": (CQL, "next_action).min(axis=0)", "next_action).max(axis=0)", LOSSES),
    "critics averaged": (CQL, "next_action).min(axis=0)", "next_action).mean(axis=0)", LOSSES),
    "a termination goes on": (CQL, '(1.0 - batch["terminated"]) * next_v', "next_v", SUCCESSOR),
    "a time limit is an end": (CQL, '(1.0 - batch["terminated"])',
                               '(1.0 - batch["terminated"]) * (1.0 - batch["truncated"])', SUCCESSOR),
    "an end is a time limit": (CQL, '(1.0 - batch["terminated"])', '(1.0 - batch["truncated"])', SUCCESSOR),
    "discount forgotten": (CQL, "self.config.discount * (1.0", "0.99 * (1.0", LOSSES),
    "half of the loss lost": (CQL, "error = 0.5 * jnp.square", "error = jnp.square", LOSSES),
    "one critic learns": (CQL, "(error + self.config.cql_alpha * gap).sum()",
                          "(error + self.config.cql_alpha * gap)[0]", LOSSES),
    "a mean over the critics": (CQL, "* gap).sum()", "* gap).mean()", LOSSES),
    "the policy trusts the larger critic": (CQL, 'batch["obs"], action).min(axis=0)',
                                            'batch["obs"], action).max(axis=0)', LOSSES),
    "the data's action judged": (CQL, 'q = self.critic(batch["obs"], action).min',
                                 'q = self.critic(batch["obs"], batch["action"]).min', LOSSES),
    "the policy avoids reward": (CQL, "self.temperature() * log_prob - q", "self.temperature() * log_prob + q", LOSSES),
    "the policy seeks certainty": (CQL, "(self.temperature() * log_prob - q)", "(-self.temperature() * log_prob - q)",
                                   LOSSES),
    "no gradient through the action": (CQL, 'q = self.critic(batch["obs"], action).min',
                                       'q = self.critic(batch["obs"], jax.lax.stop_gradient(action)).min', LOSSES),
    "sign of the temperature": (CQL, "temperature * (entropy - target_entropy)",
                                "temperature * (target_entropy - entropy)", LOSSES),
    "target entropy of one dimension": (CQL, "self.config.target_entropy * self.action_space.shape[0]",
                                        "self.config.target_entropy", LOSSES),
    "target_entropy forgotten": (CQL, "self.config.target_entropy * self", "-1.0 * self", LOSSES),
    "the temperature stays": (CQL, 'agent.temperature.minimize(agent.temperature_loss, actor_info["entropy"])',
                              "agent.temperature, dict(temperature=agent.temperature())", ORDER),
    "the target does not move": (CQL, "self.target_critic.track(critic, self.config.tau)", "self.target_critic", ORDER),
    "the target follows the old critic": (CQL, "self.target_critic.track(critic, ",
                                          "self.target_critic.track(self.critic, ", ORDER),
    "the target jumps": (CQL, "track(critic, self.config.tau)", "track(critic, 1 - self.config.tau)", ORDER),
    "the policy learns from the old critic": (CQL, "agent.actor.minimize(agent.actor_loss",
                                              "self.actor.minimize(self.actor_loss", ORDER),
    "lr forgotten": (CQL, "optax.adam(config.lr)", "optax.adam(3e-4)", ORDER),
    "actor_lr forgotten": (CQL, "optax.adam(config.actor_lr)", "optax.adam(config.lr)", ORDER),
    "the critic has the actor's rate": (CQL, "critic_key, obs, action, tx=tx", "critic_key, obs, action, tx=actor_tx",
                                        ORDER),
    "the temperature has the critic's rate": (CQL, "temperature_key, tx=actor_tx", "temperature_key, tx=tx", ORDER),
    "deviation not clipped": (CQL, "jnp.clip(log_std, *self.log_std_bounds)", "log_std", NETWORKS),
    "initial temperature for its logarithm": (CQL, "constant(jnp.log(self.init_value))", "constant(self.init_value)",
                                              NETWORKS),
    "actions in two units": (CQL, '(batch["action"] - centre) / half', 'batch["action"]', BATCHES),
    "actions not centred": (CQL, '(batch["action"] - centre) / half', 'batch["action"] / half', BATCHES),
    "the same minibatch": (CQL, "source.sample(sample_key, config.batch_size)",
                           "jax.tree.map(lambda x: x[:config.batch_size], source.data)", BATCHES),
    "updates are not counted": (CQL, "tick(updates=config.updates_per_step)", "tick(updates=1)", COUNTS),
    "the log has the first critic": (CQL, "gap=gap.mean()", "gap=gap[0]", LOG),
    "evaluation in units of the network": (CQL, "return (), run.agent.action_space.from_unit(run.agent.actor(obs).mode("
                                           "))", "return (), run.agent.actor(obs).mode()", GREEDY),
    "evaluation samples": (CQL, "run.agent.actor(obs).mode()", "run.agent.actor(obs).sample_and_log_prob(key)[0]",
                           GREEDY),
    "any action space": (CQL, "actions=(Box,), bounded=True", "actions=(Box,)", REFUSED),
    "discrete actions": (CQL, "actions=(Box,), bounded=True", "bounded=True", REFUSED),
}
SMALL = dict(updates=100, updates_per_step=3, batch_size=4, hidden_dims=(5, 4), discount=0.9, tau=0.3, lr=2e-3,
             actor_lr=5e-3, cql_alpha=0.6, num_actions=3, init_temperature=0.4, target_entropy=-0.7,
             log_std_bounds=(-1.0, 0.5))


def config_of(**changes):
    config = cql.get_config()
    config.update(SMALL | changes)
    return ml_collections.FrozenConfigDict(config)


@functools.cache
def programs(**changes):
    config = config_of(**changes)
    return tuple(jax.jit(functools.partial(function, config=config)) for function in (cql.init, cql.train_step))


def an_agent(**changes):
    """All weights and biases differ, those of the target critic, too."""
    agent = programs(**changes)[0](jax.random.key(0), probes.a_dataset()).agent

    def shake(state, seed):
        return state.replace(params=probes.shaken(state.params, seed))

    return agent.replace(actor=shake(agent.actor, 1), critic=shake(agent.critic, 28),
                         target_critic=shake(agent.target_critic, 17), temperature=shake(agent.temperature, 4))


def a_batch():
    """All eight rows in their order, with actions in the networks' units."""
    data = probes.a_dataset().data
    return {**data, "action": jnp.float32(np.random.default_rng(30).uniform(-1, 1, (8, 2)))}


def mlp(params, x):
    """By hand, in float64."""
    for i in range(len(params)):
        x = np.maximum(x, 0.0) if i else x
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"][None]
    return x


def critics(params, obs, action):  # both (2, B)
    (stacked,) = params.values()
    inputs = np.concatenate([obs, action], axis=1)
    return np.stack([mlp(jax.tree.map(lambda x, i=i: x[i], stacked), inputs)[:, 0] for i in range(2)])


def sample(params, obs, key):
    """Actions (B, A) of the policy and their log-probabilities (B,), whose noise is that of `key`."""
    mean, log_std = np.split(mlp(params["MLP_0"], obs), 2, axis=1)
    log_std, noise = np.clip(log_std, -1.0, 0.5), np.float64(jax.random.normal(key, mean.shape))
    u = mean + np.exp(log_std) * noise
    log_normal = -0.5 * noise**2 - 0.5 * np.log(2 * np.pi) - log_std
    return np.tanh(u), (log_normal - np.log(1 - np.tanh(u) ** 2)).sum(axis=1)


def assert_is(loss, by_hand, params, *args):
    """The value, and the gradient of every leaf along a random direction, by differences."""
    (value, info), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, *args)
    leaves, treedef = jax.tree.flatten(float64(params))
    np.testing.assert_allclose(value, by_hand(jax.tree.unflatten(treedef, leaves)), rtol=1e-4)
    rng = np.random.default_rng(5)
    for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
        way = rng.normal(size=leaf.shape)
        up, down = (by_hand(jax.tree.unflatten(treedef, [*leaves[:i], leaf + h * way, *leaves[i + 1:]]))
                    for h in (1e-6, -1e-6))
        np.testing.assert_allclose((np.float64(grad) * way).sum(), (up - down) / 2e-6, rtol=1e-3, atol=1e-5)
    return info


def critic_terms(agent, rows, key):
    """A function of the critics' weights: their squared errors (2, B), and log Z − Q (2, B), by hand."""
    next_key, partition_key = jax.random.split(key)
    uniform_key, now_key, later_key = jax.random.split(partition_key, 3)
    actor = float64(agent.actor.params)
    low = critics(float64(agent.target_critic.params), rows["next_obs"], sample(actor, rows["next_obs"], next_key)[0])
    assert 0 < (low[0] < low[1]).sum() < 8
    y = np.where(rows["terminated"], rows["reward"], rows["reward"] + 0.9 * np.minimum(low[0], low[1]))
    drawn = [(action, np.full(8, np.log(0.25)))
             for action in np.float64(jax.random.uniform(uniform_key, (3, 8, 2), minval=-1.0, maxval=1.0))]
    for obs, key in ((rows["obs"], now_key), (rows["next_obs"], later_key)):
        drawn += [sample(actor, obs, key) for key in jax.random.split(key, 3)]

    def terms(params):
        q = critics(params, rows["obs"], rows["action"])
        ratios = [np.exp(critics(params, rows["obs"], action)) / np.exp(log_prob)[None] for action, log_prob in drawn]
        return (q - y[None]) ** 2, np.log(np.mean(ratios, axis=0)) - q

    return terms


def test_losses_and_gradients_are_the_equations():
    """In float64, by differences. Either critic is the smaller one somewhere."""
    agent, batch = an_agent(), a_batch()
    rows = float64(batch) | dict(terminated=np.asarray(batch["terminated"]))
    terms = critic_terms(agent, rows, jax.random.key(3))

    def critic_by_hand(params):
        error, gap = terms(params)
        return sum(0.5 * error[i].mean() + 0.6 * gap[i].mean() for i in range(2))

    critic, alpha = float64(agent.critic.params), np.exp(np.float64(agent.temperature.params["log"]))
    both = critics(critic, rows["obs"], sample(float64(agent.actor.params), rows["obs"], jax.random.key(4))[0])
    assert 0 < (both[0] < both[1]).sum() < 8

    def actor_by_hand(params):
        action, log_prob = sample(params, rows["obs"], jax.random.key(4))
        q = critics(critic, rows["obs"], action)
        return (alpha * log_prob - np.minimum(q[0], q[1])).mean()

    assert_is(agent.critic_loss, critic_by_hand, agent.critic.params, batch, jax.random.key(3))
    assert_is(agent.actor_loss, actor_by_hand, agent.actor.params, batch, jax.random.key(4))
    assert_is(agent.temperature_loss, lambda params: np.exp(params["log"]) * (0.3 + 2 * 0.7), agent.temperature.params,
              jnp.float32(0.3))


def test_what_the_log_says():
    agent, batch = an_agent(), a_batch()
    rows = float64(batch) | dict(terminated=np.asarray(batch["terminated"]))
    error, gap = critic_terms(agent, rows, jax.random.key(3))(float64(agent.critic.params))
    _, info = agent.critic_loss(agent.critic.params, batch, jax.random.key(3))
    q = critics(float64(agent.critic.params), rows["obs"], rows["action"])
    assert_close(info, dict(critic_loss=(0.5 * error + 0.6 * gap).mean(axis=1).sum(), q=q.mean(), gap=gap.mean()))
    loss, info = agent.actor_loss(agent.actor.params, batch, jax.random.key(4))
    log_prob = sample(float64(agent.actor.params), rows["obs"], jax.random.key(4))[1]
    assert_close(info, dict(actor_loss=loss, entropy=-log_prob.mean()))
    _, info = agent.temperature_loss(agent.temperature.params, 0.3)
    np.testing.assert_allclose(info["temperature"], np.exp(agent.temperature.params["log"]), rtol=1e-5)


def test_the_partition_function_is_an_integral_over_the_box():
    """Of many actions, against a sum over a grid. The policy is wide, so no action of the box is rare."""
    agent, batch = an_agent(num_actions=4000, log_std_bounds=(-1.0, 1.0)), a_batch()
    x, (kernel, bias) = np.linspace(-1, 1, 201)[:-1] + 0.005, (np.zeros((4, 4)), np.float32([0.2, -0.3, 1.0, 0.6]))
    last = dict(kernel=jnp.float32(kernel), bias=jnp.asarray(bias))
    agent = agent.replace(actor=agent.actor.replace(params={"MLP_0": {**agent.actor.params["MLP_0"], "Dense_2": last}}))
    grid = np.stack(np.meshgrid(x, x), axis=-1).reshape(-1, 2)
    estimate = jax.jit(agent.log_partition)(agent.critic.params, batch, jax.random.key(0))
    for i, obs in enumerate(np.float64(batch["obs"])):
        q = critics(float64(agent.critic.params), np.broadcast_to(obs, grid.shape), grid)
        np.testing.assert_allclose(estimate[:, i], np.log(4 * np.exp(q).mean(axis=1)), atol=0.05)


def test_an_update_takes_its_steps_in_order():
    """Critic, target critic, actor with the new critic, temperature, each by plain Adam."""
    agent, batch = an_agent(), a_batch()
    new, info = jax.jit(agent.update)(batch, jax.random.key(1))
    critic_key, actor_key = jax.random.split(jax.random.key(1))

    def adam(params, lr, loss, *args):
        tx = optax.adam(lr)
        grads, info = jax.jit(jax.grad(loss, has_aux=True))(params, *args)
        return optax.apply_updates(params, tx.update(grads, tx.init(params))[0]), grads, info

    def assert_moved(state, params, grads):
        """The first step of Adam shows little but the sign of a gradient, its first moment all."""
        assert_close(state.params, params)
        assert_close(state.opt_state[0].mu, jax.tree.map(lambda g: 0.1 * g, grads))

    critic, grads, _ = adam(agent.critic.params, 2e-3, agent.critic_loss, batch, critic_key)
    assert_moved(new.critic, critic, grads)
    target = jax.tree.map(lambda new, old: 0.3 * new + 0.7 * old, critic, agent.target_critic.params)
    assert_close(new.target_critic.params, target)
    halfway = agent.replace(critic=agent.critic.replace(params=critic))
    actor, grads, actor_info = adam(agent.actor.params, 5e-3, halfway.actor_loss, batch, actor_key)
    assert_moved(new.actor, actor, grads)
    temperature, grads, _ = adam(agent.temperature.params, 5e-3, agent.temperature_loss, actor_info["entropy"])
    assert_moved(new.temperature, temperature, grads)
    assert set(info) == {"critic_loss", "q", "gap", "actor_loss", "entropy", "temperature"}


def test_a_target_depends_on_the_successor_only_where_the_episode_goes_on():
    """A time limit is no end: the third row terminates, the sixth is truncated. Without the penalty, whose actions of
    s' depend on it everywhere."""
    agent, batch = an_agent(cql_alpha=0.0), a_batch()

    @jax.jit
    @jax.vmap
    def error(row):
        return agent.critic_loss(agent.critic.params, jax.tree.map(lambda x: x[None], row), jax.random.key(0))[0]

    changed = error(batch) != error(batch | dict(next_obs=batch["next_obs"] + 1.0))
    np.testing.assert_array_equal(changed, np.arange(8) != 2)


def test_networks_start_as_the_config_says():
    data = probes.a_dataset()
    agent = programs()[0](jax.random.key(0), data).agent
    assert_close(agent.target_critic.params, agent.critic.params, rtol=0)
    assert agent.target_critic.opt_state is None
    np.testing.assert_allclose(agent.temperature(), 0.4, rtol=1e-6)
    q = agent.critic(data.data["obs"], data.data["action"])
    assert q.shape == (2, 8) and not np.allclose(q[0], q[1])
    assert [layer["kernel"].shape for layer in agent.actor.params["MLP_0"].values()] == [(2, 5), (5, 4), (4, 4)]
    last = dict(kernel=jnp.eye(4), bias=jnp.float32([0.0, 0.0, -9.0, 9.0]))
    dist = agent.actor(data.data["obs"], params={"MLP_0": {**agent.actor.params["MLP_0"], "Dense_2": last}})
    np.testing.assert_array_equal(dist.log_std, np.float32([[-1.0, 0.5]] * 8))


def train(data, iterations, **changes):
    return probes.learn(*programs(**changes), data, iterations)


def test_a_step_learns_from_all_of_the_data_in_units_of_the_networks(monkeypatch):
    seen, data, config = [], probes.a_dataset(), config_of()

    def update(agent, batch, key):
        jax.debug.callback(lambda **batch: seen.append(batch), **batch)
        return agent, {}

    run = programs()[0](jax.random.key(0), data)
    monkeypatch.setattr(cql.Agent, "update", update)
    step = jax.jit(functools.partial(cql.train_step, config=config))
    for key in jax.random.split(jax.random.key(1), 8):
        step(run, key, data)
    jax.effects_barrier()
    assert len(seen) == 24 and all(batch["reward"].shape == (4,) for batch in seen)
    drawn = {name: np.concatenate([batch[name] for batch in seen]) for name in seen[0]}
    row = np.argmin(np.abs(drawn["obs"][:, :1] - np.asarray(data.data["obs"])[None, :, 0]), axis=1)
    assert set(row) == set(range(8)) and len({tuple(batch["reward"].tolist()) for batch in seen}) > 20
    np.testing.assert_allclose(drawn["reward"], data.data["reward"][row])
    np.testing.assert_allclose(np.float32([[1, 1]]) + np.float32([[2, 4]]) * drawn["action"], data.data["action"][row],
                               rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(drawn["terminated"], row == 2)


def test_a_step_counts_and_logs_its_updates():
    run, info = train(probes.a_dataset(), 2)
    assert run.clock == (0, 6)
    assert run.agent.critic.opt_state[0].count == run.agent.actor.opt_state[0].count == 6
    assert all(x.shape == () and np.isfinite(x) for x in info.values())


def test_acting_is_greedy_and_in_the_environments_units():
    run = programs()[0](jax.random.key(0), probes.a_dataset())._replace(agent=an_agent())
    obs = np.random.default_rng(2).normal(size=(4, 2))
    carry, action = cql.act(run, (), jnp.float32(obs), jax.random.key(0))
    mean = mlp(float64(run.agent.actor.params)["MLP_0"], obs)[:, :2]
    np.testing.assert_allclose(action, [[1, 1]] + np.float64([[2, 4]]) * np.tanh(mean), rtol=1e-4, atol=1e-5)
    assert carry == ()


def test_seeds_together_are_the_seeds_alone():
    probes.compare_seeds(*programs(), probes.a_dataset(), atol=3e-5)


LEARNING = dict(updates_per_step=20, batch_size=32, hidden_dims=(16, 16), lr=3e-3, actor_lr=3e-3, tau=0.1,
                discount=0.5, num_actions=12, target_entropy=-2.0, init_temperature=0.1, log_std_bounds=(-10.0, 2.0))


def test_values_of_a_bandit_under_the_penalty():
    """One step, reward 1 − (a − ½)², actions uniform over the box, so β(a) = ½. Where the loss has no slope,
    β (Q − r) + c (exp Q / Z − β) = 0, so Q + 2 c exp Q / Z = r + c: found by bisection. Q is flatter than r, and its
    best action the same. A narrow policy sees little of Z, and all of that at its own actions, where Q gets lower than
    this: so the tolerance is wide. Observations are dictionaries."""
    unit = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    obs = dict(goal=np.ones((64, 1), np.float32), state=np.ones((64, 2), np.float32))
    reward = 1 - (unit[:, 0] - 0.5) ** 2
    data = Dataset.create(dict(
        obs=obs, next_obs=obs, action=1 + 2 * unit, reward=reward, terminated=np.ones(64, bool),
        truncated=np.zeros(64, bool)), Box((-1.0,), (3.0,)))
    run, _ = train(data, 80, cql_alpha=0.5, **LEARNING)
    expected, log_z = np.float64(reward), 0.0
    for _ in range(200):
        log_z = 0.5 * log_z + 0.5 * np.log(2 * np.exp(expected).mean())
        low, high = np.full(64, -20.0), np.full(64, 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            above = middle + np.exp(middle - log_z) > reward + 0.5
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        expected = middle
    q = run.agent.critic(data.data["obs"], jnp.asarray(unit))
    np.testing.assert_allclose(q, np.stack([expected] * 2), atol=0.2)
    assert np.abs(expected - reward).max() > 0.3  # the penalty is no small thing
    np.testing.assert_allclose(cql.act(run, (), obs, None)[1], 2.0, atol=0.4)


@pytest.mark.parametrize(("forever", "values"), [(False, [0.5, 1.0]), (True, [2.0])], ids=["end", "limit"])
def test_values_of_a_chain(forever, values):
    """Two steps, reward 1 at the end; or reward 1 at every step, cut by a time limit: 1 / (1 − γ). All actions do the
    same, and there is no penalty. y has no entropy, so the temperature does not matter."""
    second = np.arange(32) % 2 == 1
    now, later = (np.zeros(32), np.zeros(32)) if forever else (second, np.ones(32))
    data = Dataset.create(dict(
        obs=np.float32(now)[:, None], next_obs=np.float32(later)[:, None], reward=np.float32(forever | second),
        action=np.linspace(-1, 1, 32, dtype=np.float32)[:, None], terminated=second & (not forever),
        truncated=second & forever), Box((-1.0,), (1.0,)))
    run, _ = train(data, 30, cql_alpha=0.0, **(LEARNING | dict(num_actions=1, init_temperature=5.0)))
    obs = jnp.float32([[0.0], [1.0]])[:len(values)]
    action = cql.act(run, (), obs, None)[1]
    np.testing.assert_allclose(run.agent.critic(obs, action), np.stack([values] * 2), atol=0.08)


@pytest.mark.parametrize(("space", "words"), [
    (Discrete(2), "discrete actions"), (Box((-1.0, -1.0), (1.0, np.inf)), "actions without bounds")])
def test_what_cql_cannot_learn_from(space, words):
    with pytest.raises(UserError, match=f'cql cannot act in "gymnax/Pendulum-v1", which has {words}'):
        cql.init(jax.random.key(0), probes.a_dataset().replace(action_space=space), config_of())
