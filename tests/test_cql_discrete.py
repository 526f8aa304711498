"""Discrete CQL: what differs from its parent by hand, and on data whose values and best action are known."""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import cql_discrete
from core.dataset import Dataset
from core.envs import Discrete
from core.errors import UserError
from tests import probes
from tests.test_cql import assert_close, float64, mlp

CQL = "algorithms/cql_discrete.py"
LOSS, ORDER, SUCCESSOR, NETWORKS, BATCHES, COUNTS, GREEDY, BANDIT, REFUSED, LOG = (
    "test_the_loss_and_its_gradient_are_the_equation", "test_an_update_takes_its_steps_in_order",
    "test_a_target_depends_on_the_successor_only_where_the_episode_goes_on",
    "test_networks_start_as_the_config_says", "test_a_step_learns_from_all_of_the_data",
    "test_a_step_counts_and_logs_its_updates", "test_acting_is_greedy_for_the_smaller_critic",
    "test_values_of_a_bandit_under_the_penalty", "test_what_discrete_cql_cannot_learn_from", "test_what_the_log_says")
PLANTED_ERRORS = {  # and the test that has to notice
    "the penalty is a bonus": (CQL, "error + self.config.cql_alpha * gap", "error - self.config.cql_alpha * gap", LOSS),
    "no penalty": (CQL, "(error + self.config.cql_alpha * gap)", "error", LOSS),
    "cql_alpha forgotten": (CQL, "self.config.cql_alpha * gap", "gap", LOSS),
    "the data's action is not pushed up": (CQL, "(jax.nn.logsumexp(all_q, axis=2) - q)",
                                           "jax.nn.logsumexp(all_q, axis=2)", LOSS),
    "log-sum-exp over the batch": (CQL, "(jax.nn.logsumexp(all_q, axis=2) - q).mean(axis=1)",
                                   "jax.nn.logsumexp(all_q, axis=1).mean(axis=1) - q.mean(axis=1)", LOSS),
    "the largest for the log-sum-exp": (CQL, "jax.nn.logsumexp(all_q, axis=2)", "all_q.max(axis=2)", LOSS),
    "a mean over the actions": (CQL, "jax.nn.logsumexp(all_q, axis=2)", "jax.nn.logsumexp(all_q, axis=2) - jnp.log(all_"
                                "q.shape[2])", LOG),
    "the target critic is pushed down": (CQL, "jax.nn.logsumexp(all_q, axis=2)",
                                         'jax.nn.logsumexp(self.target_critic(batch["obs"]), axis=2)', LOSS),
    "the target critic chooses": (CQL, "return self.critic(obs).min", "return self.target_critic(obs).min", LOSS),
    "the online critic judges": (CQL, 'of_action(self.target_critic(batch["next_obs"]), next_action)',
                                 'of_action(self.critic(batch["next_obs"]), next_action)', LOSS),
    "a target has a gradient": (CQL, 'of_action(self.target_critic(batch["next_obs"]), next_action)',
                                'of_action(self.critic(batch["next_obs"], params=params), next_action)', LOSS),
    "the data's next action": (CQL, 'batch["next_obs"]), next_action)', 'batch["next_obs"]), batch["action"])', LOSS),
    "the best action of this observation": (CQL, 'self.best(batch["next_obs"])', 'self.best(batch["obs"])', LOSS),
    "the successor's values of this observation": (CQL, 'self.target_critic(batch["next_obs"])',
                                                   'self.target_critic(batch["obs"])', LOSS),
    "the larger target critic": (CQL, "next_action).min(axis=0)", "next_action).max(axis=0)", LOSS),
    "the larger critic chooses": (CQL, "self.critic(obs).min(axis=0)", "self.critic(obs).max(axis=0)", GREEDY),
    "the first critic chooses": (CQL, "self.critic(obs).min(axis=0)", "self.critic(obs)[0]", GREEDY),
    "the worst action": (CQL, ".argmax(axis=-1)", ".argmin(axis=-1)", GREEDY),
    "a termination goes on": (CQL, '(1.0 - batch["terminated"]) * next_v', "next_v", SUCCESSOR),
    "a time limit is an end": (CQL, '(1.0 - batch["terminated"])',
                               '(1.0 - batch["terminated"]) * (1.0 - batch["truncated"])', SUCCESSOR),
    "discount forgotten": (CQL, "self.config.discount * (1.0", "0.99 * (1.0", LOSS),
    "half of the loss lost": (CQL, "error = 0.5 * jnp.square", "error = jnp.square", LOSS),
    "one critic learns": (CQL, "(error + self.config.cql_alpha * gap).sum()",
                          "(error + self.config.cql_alpha * gap)[0]", LOSS),
    "a mean over the critics": (CQL, "* gap).sum()", "* gap).mean()", LOSS),
    "the target does not move": (CQL, "self.target_critic.track(critic, self.config.tau)", "self.target_critic", ORDER),
    "the target follows the old critic": (CQL, "self.target_critic.track(critic, ",
                                          "self.target_critic.track(self.critic, ", ORDER),
    "the target jumps": (CQL, "track(critic, self.config.tau)", "track(critic, 1 - self.config.tau)", ORDER),
    "lr forgotten": (CQL, "optax.adam(config.lr)", "optax.adam(3e-4)", ORDER),
    "the same minibatch": (CQL, "source.sample(key, config.batch_size)",
                           "jax.tree.map(lambda x: x[:config.batch_size], source.data)", BATCHES),
    "updates are not counted": (CQL, "tick(updates=config.updates_per_step)", "tick(updates=1)", COUNTS),
    "the log has the first critic": (CQL, "gap=gap.mean()", "gap=gap[0]", LOG),
    "one network for both critics": (CQL, "return ensemblize(MLP, 2)((*self.hidden_dims, self.num_actions))(flat(obs))",
                                     "return MLP((*self.hidden_dims, self.num_actions))(flat(obs))[None].repeat(2, 0)",
                                     NETWORKS),
    "any action space": (CQL, ", actions=(Discrete,))", ")", REFUSED),
}
SMALL = dict(updates=100, updates_per_step=3, batch_size=4, hidden_dims=(5, 4), discount=0.9, tau=0.3, lr=2e-3,
             cql_alpha=0.6)


def config_of(**changes):
    config = cql_discrete.get_config()
    config.update(SMALL | changes)
    return ml_collections.FrozenConfigDict(config)


@functools.cache
def programs(**changes):
    config = config_of(**changes)
    return tuple(jax.jit(functools.partial(function, config=config))
                 for function in (cql_discrete.init, cql_discrete.train_step))


def a_dataset():
    """Three actions, and eight rows: the third terminates, the sixth is truncated."""
    return probes.a_dataset(action=jnp.int32([0, 2, 1, 1, 0, 2, 2, 0])).replace(action_space=Discrete(3))


def an_agent():
    """All weights and biases differ, those of the target critic, too."""
    agent = programs()[0](jax.random.key(0), a_dataset()).agent
    critic, target = (agent.critic.replace(params=probes.shaken(agent.critic.params, seed)) for seed in (2, 10))
    return agent.replace(critic=critic, target_critic=target.target())


def critics(params, obs):  # all values (2, B, 3), by hand
    (stacked,) = params.values()
    return np.stack([mlp(jax.tree.map(lambda x, i=i: x[i], stacked), obs) for i in range(2)])


def critic_terms(agent, rows):
    """A function of the critics' weights: their squared errors (2, B), and log Z − Q (2, B), by hand."""
    online, judged = (critics(float64(state.params), rows["next_obs"]) for state in (agent.critic, agent.target_critic))
    chosen = np.minimum(online[0], online[1]).argmax(axis=1)
    assert (chosen != online[0].argmax(axis=1)).any() and (chosen != online[1].argmax(axis=1)).any()
    assert (chosen != np.minimum(judged[0], judged[1]).argmax(axis=1)).any() and len(set(chosen)) > 1
    first, second = (judged[i, np.arange(8), chosen] for i in range(2))
    assert 0 < (first < second).sum() < 8
    y = np.where(rows["terminated"], rows["reward"], rows["reward"] + 0.9 * np.minimum(first, second))

    def terms(params):
        q = critics(params, rows["obs"])
        taken = q[:, np.arange(8), rows["action"]]
        return (taken - y[None]) ** 2, np.log(np.exp(q).sum(axis=2)) - taken

    return terms


def test_the_loss_and_its_gradient_are_the_equation():
    """In float64, by differences of every leaf along a random direction."""
    agent, rows = an_agent(), jax.tree.map(np.asarray, a_dataset().data)
    terms, rng = critic_terms(agent, rows), np.random.default_rng(5)

    def by_hand(params):
        error, gap = terms(params)
        return sum(0.5 * error[i].mean() + 0.6 * gap[i].mean() for i in range(2))

    (loss, _), grads = jax.jit(jax.value_and_grad(agent.critic_loss, has_aux=True))(agent.critic.params, rows)
    leaves, treedef = jax.tree.flatten(float64(agent.critic.params))
    np.testing.assert_allclose(loss, by_hand(jax.tree.unflatten(treedef, leaves)), rtol=1e-4)
    for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
        way = rng.normal(size=leaf.shape)
        up, down = (by_hand(jax.tree.unflatten(treedef, [*leaves[:i], leaf + h * way, *leaves[i + 1:]]))
                    for h in (1e-6, -1e-6))
        np.testing.assert_allclose((np.float64(grad) * way).sum(), (up - down) / 2e-6, rtol=1e-3, atol=1e-5)


def test_what_the_log_says():
    agent, rows = an_agent(), jax.tree.map(np.asarray, a_dataset().data)
    error, gap = critic_terms(agent, rows)(float64(agent.critic.params))
    loss, info = agent.critic_loss(agent.critic.params, rows)
    q = critics(float64(agent.critic.params), rows["obs"])[:, np.arange(8), rows["action"]]
    assert_close(info, dict(critic_loss=(0.5 * error + 0.6 * gap).mean(axis=1).sum(), q=q.mean(), gap=gap.mean()))
    assert loss == info["critic_loss"]


def test_an_update_takes_its_steps_in_order():
    agent, batch = an_agent(), a_dataset().data
    new, info = jax.jit(agent.update)(batch)
    tx = optax.adam(2e-3)
    grads, _ = jax.jit(jax.grad(agent.critic_loss, has_aux=True))(agent.critic.params, batch)
    critic = optax.apply_updates(agent.critic.params, tx.update(grads, tx.init(grads))[0])
    assert_close(new.critic.params, critic)
    assert_close(new.critic.opt_state[0].mu, jax.tree.map(lambda g: 0.1 * g, grads))
    target = jax.tree.map(lambda new, old: 0.3 * new + 0.7 * old, critic, agent.target_critic.params)
    assert_close(new.target_critic.params, target)
    assert set(info) == {"critic_loss", "q", "gap"}


def test_a_target_depends_on_the_successor_only_where_the_episode_goes_on():
    agent, batch = an_agent(), a_dataset().data

    @jax.jit
    @jax.vmap
    def error(row):
        return agent.critic_loss(agent.critic.params, jax.tree.map(lambda x: x[None], row))[0]

    changed = error(batch) != error(batch | dict(next_obs=batch["next_obs"] + 1.0))
    np.testing.assert_array_equal(changed, np.arange(8) != 2)


def test_networks_start_as_the_config_says():
    agent, data = programs()[0](jax.random.key(0), a_dataset()).agent, a_dataset().data
    assert_close(agent.target_critic.params, agent.critic.params, rtol=0)
    assert agent.target_critic.opt_state is None
    q = agent.critic(data["obs"])
    assert q.shape == (2, 8, 3) and not np.allclose(q[0], q[1])
    (stacked,) = agent.critic.params.values()
    assert [layer["kernel"].shape for layer in stacked.values()] == [(2, 2, 5), (2, 5, 4), (2, 4, 3)]


def train(data, iterations, **changes):
    return probes.learn(*programs(**changes), data, iterations)


def test_a_step_learns_from_all_of_the_data(monkeypatch):
    seen, data, config = [], a_dataset(), config_of()

    def update(agent, batch):
        jax.debug.callback(lambda **batch: seen.append(batch), **batch)
        return agent, {}

    run = programs()[0](jax.random.key(0), data)
    monkeypatch.setattr(cql_discrete.Agent, "update", update)
    step = jax.jit(functools.partial(cql_discrete.train_step, config=config))
    for key in jax.random.split(jax.random.key(1), 8):
        step(run, key, data)
    jax.effects_barrier()
    assert len(seen) == 24 and all(batch["reward"].shape == (4,) for batch in seen)
    drawn = {name: np.concatenate([batch[name] for batch in seen]) for name in seen[0]}
    row = np.argmin(np.abs(drawn["reward"][:, None] - np.asarray(data.data["reward"])[None]), axis=1)
    assert set(row) == set(range(8)) and len({tuple(batch["reward"].tolist()) for batch in seen}) > 20
    for name, values in drawn.items():
        np.testing.assert_array_equal(values, data.data[name][row])


def test_a_step_counts_and_logs_its_updates():
    run, info = train(a_dataset(), 2)
    assert run.clock == (0, 6) and run.agent.critic.opt_state[0].count == 6
    assert all(x.shape == () and np.isfinite(x) for x in info.values())


def test_acting_is_greedy_for_the_smaller_critic():
    run = programs()[0](jax.random.key(0), a_dataset())._replace(agent=an_agent())
    obs = np.random.default_rng(2).normal(size=(40, 2))
    carry, action = cql_discrete.act(run, (), jnp.float32(obs), jax.random.key(0))
    q = critics(float64(run.agent.critic.params), np.float64(np.float32(obs)))
    np.testing.assert_array_equal(action, np.minimum(q[0], q[1]).argmax(axis=1))
    for other in (q[0], q[1], np.maximum(q[0], q[1])):
        assert (action != other.argmax(axis=1)).any()
    assert carry == () and action.dtype == jnp.int32


def test_seeds_together_are_the_seeds_alone():
    probes.compare_seeds(*programs(), a_dataset(), atol=3e-5)


LEARNING = dict(updates_per_step=20, batch_size=64, hidden_dims=(16, 16), lr=3e-3, tau=0.1, discount=0.5)


def test_values_of_a_bandit_under_the_penalty():
    """One step, rewards 0, 1 and 3, of which the data have 5, 2 and 1 of 8. Where the loss has no slope,
    β (Q − r) + c (p − β) = 0 with p the softmax of Q: found by iteration. Action 2 is rare and stays the best.
    Observations are dictionaries."""
    share, reward = np.float64([5, 2, 1]) / 8, np.float64([0, 1, 3])
    action = np.tile(np.repeat([0, 1, 2], [5, 2, 1]), 8)
    obs = dict(goal=np.ones((64, 1), np.float32), state=np.ones((64, 2), np.float32))
    data = Dataset.create(dict(
        obs=obs, next_obs=obs, action=np.int32(action), reward=np.float32(reward[action]),
        terminated=np.ones(64, bool), truncated=np.zeros(64, bool)), Discrete(3))
    run, _ = train(data, 80, **(LEARNING | dict(cql_alpha=0.3)))
    q = reward
    for _ in range(500):
        p = np.exp(q) / np.exp(q).sum()
        q = 0.9 * q + 0.1 * (reward + 0.3 * (1 - p / share))
    np.testing.assert_allclose(run.agent.critic(data.data["obs"])[:, 0], [q, q], atol=0.12)
    assert np.abs(q - reward).max() > 0.5 and q.argmax() == 2
    np.testing.assert_array_equal(cql_discrete.act(run, (), obs, None)[1], 2)


@pytest.mark.parametrize(("forever", "values"), [(False, [0.5, 1.0]), (True, [2.0])], ids=["end", "limit"])
def test_values_of_a_chain(forever, values):
    """Two steps, reward 1 at the end; or reward 1 at every step, cut by a time limit: 1 / (1 − γ). Without a penalty.
    Either action does the same."""
    second = np.arange(32) % 2 == 1
    now, later = (np.ones(32), np.ones(32)) if forever else (second, np.ones(32))
    data = Dataset.create(dict(
        obs=np.float32(now)[:, None], next_obs=np.float32(later)[:, None], reward=np.float32(forever | second),
        action=np.arange(32) // 2 % 2, terminated=second & (not forever), truncated=second & forever), Discrete(2))
    run, _ = train(data, 40, **(LEARNING | dict(cql_alpha=0.0)))
    q = run.agent.critic(jnp.float32([[0.0], [1.0]])[-len(values):])
    np.testing.assert_allclose(q, np.broadcast_to(np.array(values)[None, :, None], q.shape), atol=0.08)


def test_what_discrete_cql_cannot_learn_from():
    with pytest.raises(UserError, match='cql_discrete cannot act in "gymnax/CartPole-v1", which has continuous'):
        cql_discrete.init(jax.random.key(0), probes.a_dataset(), config_of())
