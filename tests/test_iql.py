"""IQL against its equations by hand, and on data whose values and best action are known."""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import iql
from core.dataset import Dataset
from core.envs import Box, Discrete
from core.errors import UserError
from tests import probes
from tests.probes import assert_close

IQL = "algorithms/iql.py"
LOSSES, ORDER, SUCCESSOR, NETWORKS, BATCHES, SCALE, GREEDY, RATE, BANDIT, CHAIN, REFUSED = (
    "test_losses_and_gradients_are_the_equations", "test_an_update_takes_its_steps_in_order",
    "test_a_target_depends_on_the_successor_only_where_the_episode_goes_on", "test_networks_start_as_the_config_says",
    "test_a_step_learns_from_all_of_the_data_in_units_of_the_networks", "test_returns_span_what_the_config_says",
    "test_acting_is_greedy_and_in_the_environments_units", "test_the_actors_learning_rate_falls_to_zero",
    "test_the_better_arm_of_a_bandit", "test_values_of_a_chain", "test_what_iql_cannot_learn_from")
PLANTED_ERRORS = {  # and the test that has to notice
    "the expectile of the other side": (IQL, "jnp.where(error < 0,", "jnp.where(error > 0,", LOSSES),
    "the error's sign": (IQL, ".min(axis=0) - value\n", ".min(axis=0) * -1 + value\n", LOSSES),
    "both sides alike": (IQL, "1.0 - self.config.expectile, self", "self.config.expectile, self", LOSSES),
    "value of the online critic": (IQL, 'error = self.target_critic(batch["obs"]', 'error = self.critic(batch["obs"]',
                                   LOSSES),
    "value of the larger critic": (IQL, ".min(axis=0) - value\n", ".max(axis=0) - value\n", LOSSES),
    "value of the critics' mean": (IQL, ".min(axis=0) - value\n", ".mean(axis=0) - value\n", LOSSES),
    "absolute errors": (IQL, "(weight * jnp.square(error)).mean()", "(weight * jnp.abs(error)).mean()", LOSSES),
    "advantage of the online critic": (IQL, 'q = self.target_critic(batch["obs"], batch["action"]).min',
                                       'q = self.critic(batch["obs"], batch["action"]).min', LOSSES),
    "advantage of the larger critic": (IQL, 'q = self.target_critic(batch["obs"], batch["action"]).min',
                                       'q = self.target_critic(batch["obs"], batch["action"]).max', LOSSES),
    "no baseline": (IQL, 'advantage = q - self.value(batch["obs"])', "advantage = q", LOSSES),
    "the value for the critic": (IQL, 'advantage = q - self.value(batch["obs"])',
                                 'advantage = self.value(batch["obs"]) - q', LOSSES),
    "temperature for its inverse": (IQL, "jnp.exp(self.config.inverse_temperature * advantage)",
                                    "jnp.exp(advantage / self.config.inverse_temperature)", LOSSES),
    "weights have no limit": (IQL, "jnp.minimum(jnp.exp(self.config.inverse_temperature * advantage), self.config"
                              ".max_weight)", "jnp.exp(self.config.inverse_temperature * advantage)", LOSSES),
    "weights clipped from below": (IQL, "weight = jnp.minimum(", "weight = jnp.maximum(", LOSSES),
    "the actor unlearns": (IQL, "loss = -(weight * self", "loss = (weight * self", LOSSES),
    "all actions alike": (IQL, "loss = -(weight * self", "loss = -(0 * weight + self", LOSSES),
    "a termination goes on": (IQL, '(1.0 - batch["terminated"]) * next_v', "next_v", SUCCESSOR),
    "a time limit is an end": (IQL, '(1.0 - batch["terminated"])',
                               '(1.0 - batch["terminated"]) * (1.0 - batch["truncated"])', SUCCESSOR),
    "value of this observation": (IQL, 'next_v = self.value(batch["next_obs"])', 'next_v = self.value(batch["obs"])',
                                  SUCCESSOR),
    "discount forgotten": (IQL, "self.config.discount * (1.0", "0.99 * (1.0", LOSSES),
    "one critic learns": (IQL, "jnp.square(q - target[None]).mean(axis=1).sum()", "jnp.square(q[0] - target).mean()",
                          LOSSES),
    "mean over the critics": (IQL, ".mean(axis=1).sum()", ".mean(axis=1).mean()", LOSSES),
    "the actor sees the old value": (IQL, "agent.actor.minimize(agent.actor_loss", "agent.actor.minimize(self."
                                     "actor_loss", ORDER),
    "the critic sees the old value": (IQL, "agent.critic.minimize(agent.critic_loss", "agent.critic.minimize(self."
                                      "critic_loss", ORDER),
    "the target does not move": (IQL, "agent.target_critic.track(critic, self.config.tau)", "agent.target_critic",
                                 ORDER),
    "the target follows the old critic": (IQL, "agent.target_critic.track(critic, ",
                                          "agent.target_critic.track(self.critic, ", ORDER),
    "the target jumps": (IQL, "track(critic, self.config.tau)", "track(critic, 1 - self.config.tau)", ORDER),
    "lr forgotten": (IQL, "optax.adam(config.lr)", "optax.adam(3e-4)", ORDER),
    "the actor's rate stays": (IQL, "optax.adam(optax.cosine_decay_schedule(config.lr, config.updates))",
                               "optax.adam(config.lr)", RATE),
    "every rate falls": (IQL, "config.updates)), optax.adam(config.lr)",
                         "config.updates)), optax.adam(optax.cosine_decay_schedule(config.lr, config.updates))", RATE),
    "the mean has no bounds": (IQL, "mean = jnp.tanh(MLP", "mean = (MLP", LOSSES),
    "deviation not clipped": (IQL, "jnp.exp(log_std)[None]", 'jnp.exp(self.get_variable("params", "log_std"))[None]',
                              NETWORKS),
    "variance for deviation": (IQL, "jnp.exp(log_std)[None]", "jnp.exp(2 * log_std)[None]", LOSSES),
    "actions in two units": (IQL, '(batch["action"] - centre) / half', 'batch["action"]', BATCHES),
    "actions not centred": (IQL, '(batch["action"] - centre) / half', 'batch["action"] / half', BATCHES),
    "rewards as they are": (IQL, 'run.reward_scale * batch["reward"]', 'batch["reward"]', BATCHES),
    "the same minibatch": (IQL, "source.sample(key, config.batch_size)",
                           "jax.tree.map(lambda x: x[:config.batch_size], source.data)", BATCHES),
    "updates are not counted": (IQL, "tick(updates=config.updates_per_step)", "tick(updates=1)", BATCHES),
    "the range divides": (IQL, "config.return_range / span", "span / config.return_range", SCALE),
    "the best return alone": (IQL, " - returns.min(where=there, initial=jnp.inf)", "", SCALE),
    "episodes that are not there": (IQL, "returns.max(where=there, initial=-jnp.inf)", "returns.max()", SCALE),
    "an episode goes on over its end": (IQL, "jnp.cumsum(done) - done", "jnp.cumsum(done)", SCALE),
    "a time limit ends no return": (IQL, 'data["terminated"] | data["truncated"]', 'data["terminated"]', SCALE),
    "all returns are equal": (IQL, "jnp.where(span > 0, config.return_range / span, 1.0)",
                              "config.return_range / span", CHAIN),
    "evaluation in units of the network": (IQL, "return (), run.agent.action_space.from_unit(run.agent.actor(obs).mode("
                                           "))", "return (), run.agent.actor(obs).mode()", GREEDY),
    "evaluation samples": (IQL, "run.agent.actor(obs).mode()", "run.agent.actor(obs).sample(seed=key)", GREEDY),
    "any action space": (IQL, "actions=(Box,), bounded=True", "actions=(Box,)", REFUSED),
    "discrete actions": (IQL, "actions=(Box,), bounded=True", "bounded=True", REFUSED),
}
SMALL = dict(updates=100, updates_per_step=3, batch_size=4, hidden_dims=(5, 4), discount=0.9, tau=0.3, lr=2e-3,
             expectile=0.8, inverse_temperature=2.0, max_weight=1.5, return_range=10.0)


def config_of(**changes):
    config = iql.get_config()
    config.update(SMALL | changes)
    return ml_collections.FrozenConfigDict(config)


@functools.cache
def programs(**changes):
    config = config_of(**changes)
    return tuple(jax.jit(functools.partial(function, config=config)) for function in (iql.init, iql.train_step))


def an_agent():
    """All weights and biases differ, those of the target critic, too."""
    agent = programs()[0](jax.random.key(0), probes.a_dataset()).agent

    def shake(state, seed):
        return state.replace(params=probes.shaken(state.params, seed))

    return agent.replace(actor=shake(agent.actor, 1), value=shake(agent.value, 4), critic=shake(agent.critic, 7),
                         target_critic=shake(agent.target_critic, 20))


def a_batch():
    data = probes.a_dataset().data
    return {**data, "action": jnp.tanh(data["action"])}


def mlp(params, x):
    layers = [params[f"Dense_{i}"] for i in range(len(params))]
    for i, layer in enumerate(layers):
        x = x @ layer["kernel"] + layer["bias"][None]
        x = jnp.where(x > 0, x, 0.0) if i + 1 < len(layers) else x
    return x


def critics(params, obs, action):  # both, by hand (2, B)
    (stacked,) = params.values()
    inputs = jnp.concatenate([obs, action], axis=1)
    return jnp.stack([mlp(jax.tree.map(lambda x, i=i: x[i], stacked), inputs)[:, 0] for i in range(2)])


def value_of(params, obs):
    return mlp(params["MLP_0"], obs)[:, 0]


def log_prob_of(params, obs, action):
    mean, log_std = jnp.tanh(mlp(params["MLP_0"], obs)), params["log_std"][None]
    return (-0.5 * ((action - mean) / jnp.exp(log_std)) ** 2 - log_std - 0.5 * jnp.log(2 * jnp.pi)).sum(axis=1)


def test_losses_and_gradients_are_the_equations():
    """With values of both signs of the error, actions of weights above and below the limit, either critic the smaller
    one somewhere."""
    agent, batch = an_agent(), a_batch()
    low = critics(agent.target_critic.params, batch["obs"], batch["action"])
    error = jnp.minimum(low[0], low[1]) - value_of(agent.value.params, batch["obs"])
    weight = jnp.exp(2.0 * error)
    assert 0 < (error > 0).sum() < 8 and 0 < (weight > 1.5).sum() < 8 and 0 < (low[0] < low[1]).sum() < 8

    def value_by_hand(params):
        u = jnp.minimum(low[0], low[1]) - value_of(params, batch["obs"])
        return jnp.where(u > 0, 0.8 * u**2, 0.2 * u**2).mean()

    def actor_by_hand(params):
        return -(jnp.clip(weight, max=1.5) * log_prob_of(params, batch["obs"], batch["action"])).mean()

    def critic_by_hand(params):
        next_v = jnp.where(batch["terminated"], 0.0, value_of(agent.value.params, batch["next_obs"]))
        q = critics(params, batch["obs"], batch["action"])
        y = batch["reward"] + 0.9 * next_v
        return ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()

    for name, by_hand in (("value", value_by_hand), ("actor", actor_by_hand), ("critic", critic_by_hand)):
        loss, params = getattr(agent, f"{name}_loss"), getattr(agent, name).params
        (value, info), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch)
        expected, slopes = jax.jit(jax.value_and_grad(by_hand))(params)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert info[f"{name}_loss"] == value
        assert_close(grads, slopes)


def test_what_the_log_says():
    agent, batch = an_agent(), a_batch()
    value = np.asarray(value_of(agent.value.params, batch["obs"]))
    low = np.min(critics(agent.target_critic.params, batch["obs"], batch["action"]), axis=0)
    _, info = agent.value_loss(agent.value.params, batch)
    np.testing.assert_allclose(info["value"], value.mean(), rtol=1e-5)
    _, info = agent.actor_loss(agent.actor.params, batch)
    np.testing.assert_allclose(info["advantage"], (low - value).mean(), rtol=1e-5)
    np.testing.assert_allclose(info["clipped"], (np.exp(2 * (low - value)) > 1.5).mean())
    _, info = agent.critic_loss(agent.critic.params, batch)
    np.testing.assert_allclose(info["q"], critics(agent.critic.params, batch["obs"], batch["action"]).mean(), rtol=1e-5)


def test_an_update_takes_its_steps_in_order():
    """Value, actor, critic, target critic, each from what came before it, by plain Adam."""
    agent, batch = an_agent(), a_batch()
    new, info = jax.jit(agent.update)(batch)

    def adam(params, loss):
        tx = optax.adam(2e-3)
        grads, _ = jax.jit(jax.grad(loss, has_aux=True))(params, batch)
        return optax.apply_updates(params, tx.update(grads, tx.init(params))[0]), grads

    def assert_moved(state, params, grads):
        """The first step of Adam shows little but the sign of a gradient, its first moment all."""
        assert_close(state.params, params)
        assert_close(state.opt_state[0].mu, jax.tree.map(lambda g: 0.1 * g, grads))

    value, grads = adam(agent.value.params, agent.value_loss)
    assert_moved(new.value, value, grads)
    halfway = agent.replace(value=agent.value.replace(params=value))
    assert_moved(new.actor, *adam(agent.actor.params, halfway.actor_loss))
    critic, grads = adam(agent.critic.params, halfway.critic_loss)
    assert_moved(new.critic, critic, grads)
    target = jax.tree.map(lambda new, old: 0.3 * new + 0.7 * old, critic, agent.target_critic.params)
    assert_close(new.target_critic.params, target)
    assert set(info) == {"value_loss", "value", "actor_loss", "advantage", "clipped", "critic_loss", "q"}


def test_a_target_depends_on_the_successor_only_where_the_episode_goes_on():
    """A time limit is no end: the third row terminates, the sixth is truncated."""
    agent, batch = an_agent(), a_batch()

    def loss_of_row(row):
        return agent.critic_loss(agent.critic.params, jax.tree.map(lambda x: x[None], row))[0]

    error = jax.jit(jax.vmap(loss_of_row))
    changed = error(batch) != error(batch | dict(next_obs=batch["next_obs"] + 1.0))
    np.testing.assert_array_equal(changed, np.arange(8) != 2)


def test_networks_start_as_the_config_says():
    data = probes.a_dataset()
    agent = programs(log_std_bounds=(-1.5, 0.5))[0](jax.random.key(0), data).agent
    assert_close(agent.target_critic.params, agent.critic.params, rtol=0)
    assert agent.target_critic.opt_state is None
    q = agent.critic(data.data["obs"], data.data["action"])
    assert q.shape == (2, 8) and not np.allclose(q[0], q[1])
    assert agent.value(data.data["obs"]).shape == (8,)
    assert [layer["kernel"].shape for layer in agent.actor.params["MLP_0"].values()] == [(2, 5), (5, 4), (4, 2)]
    np.testing.assert_array_equal(agent.actor.params["log_std"], 0.0)
    for log_std, expected in ((-9.0, -1.5), (0.3, 0.3), (9.0, 0.5)):
        dist = agent.actor(data.data["obs"], params={**agent.actor.params, "log_std": jnp.full(2, log_std)})
        np.testing.assert_allclose(dist.stddev(), np.exp(expected), rtol=1e-5)


def test_returns_span_what_the_config_says():
    """Of three episodes: to a termination, to a time limit, to where the data stop."""
    reward = np.float32([1, 2, 3, -4, 5, -6, 0.5, 0.5])
    init, _ = programs()
    for data, span in ((probes.a_dataset(reward=reward), 6 + 5), (probes.a_dataset(reward=reward - 9), 15)):
        assert init(jax.random.key(0), data).reward_scale == pytest.approx(10.0 / span, rel=1e-5)


def train(data, iterations, **changes):
    return probes.learn(*programs(**changes), data, iterations)


def test_a_step_learns_from_all_of_the_data_in_units_of_the_networks(monkeypatch):
    seen, data, config = [], probes.a_dataset(), config_of()
    run = programs()[0](jax.random.key(0), data)._replace(reward_scale=3.0)

    def update(agent, batch):
        jax.debug.callback(lambda **batch: seen.append(batch), **batch)
        return agent, {}

    monkeypatch.setattr(iql.Agent, "update", update)
    step = jax.jit(functools.partial(iql.train_step, config=config))
    for key in jax.random.split(jax.random.key(1), 8):
        after, _ = step(run, key, data)
    jax.effects_barrier()
    assert after.clock == (0, 3)
    assert len(seen) == 24 and all(batch["reward"].shape == (4,) for batch in seen)
    drawn = {name: np.concatenate([batch[name] for batch in seen]) for name in seen[0]}
    row = np.argmin(np.abs(drawn["obs"][:, :1] - np.asarray(data.data["obs"])[None, :, 0]), axis=1)
    assert set(row) == set(range(8)) and len({tuple(batch["reward"].tolist()) for batch in seen}) > 20
    np.testing.assert_allclose(drawn["reward"], 3 * data.data["reward"][row], rtol=1e-5)
    np.testing.assert_allclose(np.float32([1, 1]) + np.float32([2, 4]) * drawn["action"], data.data["action"][row],
                               rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(drawn["terminated"], row == 2)


def test_a_step_counts_and_logs_its_updates():
    run, info = train(probes.a_dataset(), 2)
    assert run.clock == (0, 6)
    assert run.agent.value.opt_state[0].count == run.agent.critic.opt_state[0].count == 6
    assert all(x.shape == () and np.isfinite(x) for x in info.values())


def test_the_actors_learning_rate_falls_to_zero():
    data = probes.a_dataset()
    runs = [train(data, iterations)[0].agent for iterations in (33, 34, 35)]  # of three updates each; 100 are due

    def moved(name, old, new):
        pairs = zip(*(jax.tree.leaves(getattr(agent, name).params) for agent in (old, new)), strict=True)
        return any((a != b).any() for a, b in pairs)

    assert moved("actor", *runs[:2]) and not moved("actor", *runs[1:])
    assert moved("value", *runs[1:]) and moved("critic", *runs[1:])


def test_acting_is_greedy_and_in_the_environments_units():
    run, _ = train(probes.a_dataset(), 2)
    obs = jax.random.normal(jax.random.key(2), (4, 2))
    carry, action = iql.act(run, (), obs, jax.random.key(0))
    mean = jnp.tanh(mlp(run.agent.actor.params["MLP_0"], obs))
    np.testing.assert_allclose(action, np.float32([[1, 1]]) + np.float32([[2, 4]]) * mean, rtol=1e-4)
    assert carry == ()


def test_seeds_together_are_the_seeds_alone():
    probes.compare_seeds(*programs(), probes.a_dataset())


LEARNING = dict(updates=600, updates_per_step=10, batch_size=32, hidden_dims=(16,), lr=1e-2, tau=0.1, max_weight=100.0)


def test_the_better_arm_of_a_bandit():
    """One step. Of the actions 0.5 and 1.5 (−0.25 and 0.25 in the networks' units) the second has reward 1, the first
    has 0. V is the expectile 0.9 of these rewards, which is 0.9. The better arm has e^β times the other's weight.
    Observations are dictionaries."""
    obs = dict(goal=np.zeros((16, 1), np.float32), state=np.zeros((16, 2), np.float32))
    data = Dataset.create(dict(
        obs=obs, next_obs=obs, action=np.float32([[0.5], [1.5]] * 8), reward=np.float32([0, 1] * 8),
        terminated=np.ones(16, bool), truncated=np.zeros(16, bool)), Box((-1.0,), (3.0,)))
    run, _ = train(data, 60, expectile=0.9, inverse_temperature=8.0, return_range=1.0, **LEARNING)
    obs = jax.tree.map(lambda x: x[:2], data.data["obs"])
    q = run.agent.critic(obs, jnp.float32([[-0.25], [0.25]]))
    np.testing.assert_allclose(q, [[0.0, 1.0]] * 2, atol=0.05)
    np.testing.assert_allclose(run.agent.value(obs), 0.9, atol=0.05)
    np.testing.assert_allclose(iql.act(run, (), obs, None)[1], 1.5, atol=0.05)


@pytest.mark.parametrize(("forever", "values"), [(False, [0.5, 1.0]), (True, [2.0])], ids=["end", "limit"])
def test_values_of_a_chain(forever, values):
    """Two steps, reward 1 at the end; or reward 1 for ever, cut by a time limit: 1 / (1 − γ) = 2. All returns are
    equal, so the rewards are not scaled."""
    second, column = np.arange(16) % 2 == 1, np.ones((16, 1), np.float32)
    data = Dataset.create(dict(
        obs=0 * column if forever else np.float32(second)[:, None], next_obs=column * (not forever), action=0 * column,
        reward=np.float32(second | forever), terminated=second & (not forever), truncated=second & forever), Box(
            (-1.0,), (1.0,)))
    run, _ = train(data, 60, discount=0.5, **LEARNING)
    assert run.reward_scale == 1.0
    obs, action = jnp.float32([[0.0], [1.0]])[:len(values)], jnp.zeros((len(values), 1))
    np.testing.assert_allclose(run.agent.critic(obs, action), np.broadcast_to(values, (2, len(values))), atol=0.05)
    np.testing.assert_allclose(run.agent.value(obs), values, atol=0.05)


@pytest.mark.parametrize(("space", "words"), [
    (Discrete(2), "discrete actions"), (Box((-1.0, -1.0), (1.0, np.inf)), "actions without bounds")])
def test_what_iql_cannot_learn_from(space, words):
    with pytest.raises(UserError, match=f'iql cannot act in "gymnax/Pendulum-v1", which has {words}'):
        iql.init(jax.random.key(0), probes.a_dataset().replace(action_space=space), config_of())
