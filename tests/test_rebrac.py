"""ReBRAC against its equations by hand, and on data whose values and best action are known."""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import rebrac
from core.dataset import Dataset
from core.envs import Box, Discrete
from core.errors import UserError
from tests import probes
from tests.probes import assert_close, float64

REBRAC = "algorithms/rebrac.py"
LOSSES, ORDER, SUCCESSOR, NEXT, NOISE, NETWORKS, BATCHES, COUNTS, GREEDY, BANDIT, CHAIN, REFUSED, LOG = (
    "test_losses_and_gradients_are_the_equations", "test_an_update_takes_its_steps_in_order",
    "test_a_target_depends_on_the_successor_only_where_the_episode_goes_on",
    "test_the_next_action_is_one_of_the_same_episode", "test_smoothing_noise_is_clipped_and_so_is_the_action",
    "test_networks_start_as_the_config_says", "test_a_step_learns_from_all_of_the_data_in_units_of_the_networks",
    "test_a_step_counts_and_logs_its_updates", "test_acting_is_greedy_and_in_the_environments_units",
    "test_the_best_action_of_a_bandit_under_a_penalty", "test_values_of_a_chain", "test_what_rebrac_cannot_learn_from",
    "test_what_the_log_says")
PLANTED_ERRORS = {  # and the test that has to notice
    "the action instead of the next one": (REBRAC, "unit_action(next_index)", "unit_action(index)", NEXT),
    "the penalty of this action": (REBRAC, 'next_action - batch["next_action"]', 'next_action - batch["action"]',
                                   LOSSES),
    "the action before": (REBRAC, "index + 1", "index - 1", NEXT),
    "a next action beyond a time limit": (REBRAC, '~(batch["terminated"] | batch["truncated"])', '~batch["terminated"]',
                                          NEXT),
    "a next action beyond a termination": (REBRAC, '~(batch["terminated"] | batch["truncated"])', '~batch["truncated"]',
                                           NEXT),
    "a next action beyond the data": (REBRAC, " & (next_index > index)", "", NEXT),
    "a penalty without a next action": (REBRAC, 'batch["has_next"] * jnp', "jnp", LOSSES),
    "the critic's penalty is a bonus": (REBRAC, "next_q - self.config", "next_q + self.config", LOSSES),
    "one penalty for both": (REBRAC, "self.config.critic_penalty", "self.config.actor_penalty", LOSSES),
    "the critic's penalty forgotten": (REBRAC, "next_q - self.config.critic_penalty * penalty", "next_q", LOSSES),
    "a distance, not its square": (REBRAC, 'jnp.square(action - batch["action"])', 'jnp.abs(action - batch["action"])',
                                   LOSSES),
    "a mean over the action": (REBRAC, 'jnp.square(action - batch["action"]).sum(',
                               'jnp.square(action - batch["action"]).mean(', LOSSES),
    "the online actor's next action": (REBRAC, "self.target_actor(obs)", "self.actor(obs)", LOSSES),
    "the online critic's target": (REBRAC, 'self.target_critic(batch["next_obs"]', 'self.critic(batch["next_obs"]',
                                   LOSSES),
    "the larger target critic": (REBRAC, "next_action).min(axis=0)", "next_action).max(axis=0)", LOSSES),
    "the larger critic": (REBRAC, 'batch["obs"], action).min(', 'batch["obs"], action).max(', LOSSES),
    "the actor asks the target critic": (REBRAC, 'self.critic(batch["obs"], action).min',
                                         'self.target_critic(batch["obs"], action).min', LOSSES),
    "Q as it is": (REBRAC, "penalty - q / scale", "penalty - q", LOSSES),
    "Q against its signed mean": (REBRAC, "jnp.abs(q).mean()", "q.mean()", LOSSES),
    "a gradient through the scale": (REBRAC, "jax.lax.stop_gradient(jnp.abs(q).mean())", "jnp.abs(q).mean()", LOSSES),
    "the actor makes Q small": (REBRAC, "penalty - q / scale", "penalty + q / scale", LOSSES),
    "a termination goes on": (REBRAC, '(1.0 - batch["terminated"]) * next_v', "next_v", SUCCESSOR),
    "a time limit is an end": (REBRAC, '(1.0 - batch["terminated"])',
                               '(1.0 - batch["terminated"]) * (1.0 - batch["truncated"])', SUCCESSOR),
    "discount forgotten": (REBRAC, "self.config.discount * (1.0", "0.99 * (1.0", LOSSES),
    "one critic learns": (REBRAC, "jnp.square(q - target[None]).mean(axis=1).sum()",
                          "jnp.square(q[0] - target).mean()", LOSSES),
    "no smoothing": (REBRAC, "jnp.clip(action + noise, -1.0, 1.0)", "action", LOSSES),
    "noise is not clipped": (REBRAC, "jnp.clip(noise, -self.config.smoothing_clip, self.config.smoothing_clip)",
                             "noise", NOISE),
    "noise clipped from above": (REBRAC, "jnp.clip(noise, -self.config.smoothing_clip,", "jnp.clip(noise, -9.0,",
                                 NOISE),
    "an action outside the box": (REBRAC, "jnp.clip(action + noise, -1.0, 1.0)", "action + noise", NOISE),
    "no LayerNorm": (REBRAC, "nn.LayerNorm()(nn.relu(x))", "nn.relu(x)", LOSSES),
    "LayerNorm before the ReLU": (REBRAC, "nn.LayerNorm()(nn.relu(x))", "nn.relu(nn.LayerNorm()(x))", LOSSES),
    "the actor has no bounds": (REBRAC, "jnp.tanh(MLP", "(MLP", LOSSES),
    "the actor sees the old critic": (REBRAC, "agent.actor.minimize(agent.actor_loss",
                                      "agent.actor.minimize(self.actor_loss", ORDER),
    "the actor learns from the first minibatch": (REBRAC, "lambda x: x[-1], batches", "lambda x: x[0], batches", ORDER),
    "every critic update starts anew": (REBRAC, "return critic.minimize(", "return self.critic.minimize(", ORDER),
    "no delay": (REBRAC, "rounds = config.updates_per_step // config.policy_delay", "rounds = config.updates_per_step",
                 COUNTS),
    "the target critic does not move": (REBRAC, "self.target_critic.track(critic, self.config.tau)",
                                        "self.target_critic", ORDER),
    "the target critic follows the old critic": (REBRAC, "self.target_critic.track(critic,",
                                                 "self.target_critic.track(self.critic,", ORDER),
    "the target critic jumps": (REBRAC, "track(critic, self.config.tau)", "track(critic, 1 - self.config.tau)", ORDER),
    "the target actor does not move": (REBRAC, "agent.target_actor.track(actor, self.config.tau)", "agent.target_actor",
                                       ORDER),
    "the target actor follows the old actor": (REBRAC, "agent.target_actor.track(actor,",
                                               "agent.target_actor.track(agent.actor,", ORDER),
    "lr forgotten": (REBRAC, "optax.adam(config.lr)", "optax.adam(3e-4)", ORDER),
    "actions in two units": (REBRAC, "return (action - centre) / half", "return action", NEXT),
    "actions not centred": (REBRAC, "return (action - centre) / half", "return action / half", NEXT),
    "the same minibatch": (REBRAC, "sample(source, sample_key,", "sample(source, jax.random.key(0),", BATCHES),
    "one minibatch for all critic updates": (REBRAC, "index = jax.random.randint(key, shape, 0, source.size)",
        "index = jnp.broadcast_to(jax.random.randint(key, shape[1:], 0, source.size)[None], shape)", BATCHES),
    "updates are not counted": (REBRAC, "tick(updates=config.updates_per_step)", "tick(updates=rounds)", COUNTS),
    "the log has the last update": (REBRAC, "jax.tree.map(jnp.mean, critic_info)",
                                    "jax.tree.map(lambda x: x[-1], critic_info)", ORDER),
    "evaluation in units of the network": (REBRAC, "return (), run.agent.action_space.from_unit(run.agent.actor(obs))",
                                           "return (), run.agent.actor(obs)", GREEDY),
    "evaluation of the target actor": (REBRAC, "from_unit(run.agent.actor(obs))", "from_unit(run.agent.target_actor(obs"
                                       "))", GREEDY),
    "any action space": (REBRAC, "actions=(Box,), bounded=True", "actions=(Box,)", REFUSED),
    "any delay": (REBRAC, "if config.updates_per_step % config.policy_delay:", "if False:", REFUSED),
}
SMALL = dict(updates=100, updates_per_step=4, batch_size=4, hidden_dims=(9, 8), discount=0.9, tau=0.3, lr=2e-3,
             actor_penalty=0.7, critic_penalty=0.4, smoothing_std=0.3, smoothing_clip=0.2, policy_delay=2)


def config_of(**changes):
    config = rebrac.get_config()
    config.update(SMALL | changes)
    return ml_collections.FrozenConfigDict(config)


@functools.cache
def programs(**changes):
    config = config_of(**changes)
    return tuple(jax.jit(functools.partial(function, config=config)) for function in (rebrac.init, rebrac.train_step))


def an_agent(**changes):
    """All weights and biases differ, those of the targets, too."""
    agent = programs(**changes)[0](jax.random.key(0), probes.a_dataset()).agent

    def shake(state, seed):
        return state.replace(params=probes.shaken(state.params, seed))

    return agent.replace(**{name: shake(getattr(agent, name), i) for i, name in enumerate((
        "actor", "target_actor", "critic", "target_critic"))})


def a_batch(seed=0):
    """All eight rows in their order, then moved."""
    data, rng = probes.a_dataset(seed=seed).data, np.random.default_rng(30 + seed)
    action = np.float32(rng.uniform(-1, 1, (9, 2)))
    return {**data, "action": jnp.asarray(action[:-1]), "next_action": jnp.asarray(action[1:]),
            "has_next": jnp.arange(8) % 3 != 1}


def mlp(params, x, norm=False):
    """By hand, in float64."""
    layers = sum(name.startswith("Dense") for name in params)
    for i in range(layers):
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"][None]
        if i + 1 < layers:
            x = np.maximum(x, 0.0)
        if norm and i + 1 < layers:
            centred = x - x.mean(axis=1, keepdims=True)
            x = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
            x = x * params[f"LayerNorm_{i}"]["scale"][None] + params[f"LayerNorm_{i}"]["bias"][None]
    return x


def actions(params, obs):
    return np.tanh(mlp(params["MLP_0"], obs))


def critics(params, obs, action):  # both (2, B)
    (stacked,) = params.values()
    inputs = np.concatenate([obs, action], axis=1)
    return np.stack([mlp(jax.tree.map(lambda x, i=i: x[i], stacked), inputs, norm=True)[:, 0] for i in range(2)])


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


def target_of(agent, batch, key):
    """y by hand, where the noise of three quarters of the actions is clipped or leaves the box."""
    noise = np.clip(0.3 * np.float64(jax.random.normal(key, (8, 2))), -0.2, 0.2)
    next_action = np.clip(actions(float64(agent.target_actor.params), batch["next_obs"]) + noise, -1, 1)
    both = critics(float64(agent.target_critic.params), batch["next_obs"], next_action)
    penalty = batch["has_next"] * ((next_action - batch["next_action"]) ** 2).sum(axis=1)
    assert 0 < (both[0] < both[1]).sum() < 8 and 0 < (np.abs(noise) == 0.2).sum() < 16
    next_v = np.minimum(both[0], both[1]) - 0.4 * penalty
    return np.where(batch["terminated"], batch["reward"], batch["reward"] + 0.9 * next_v), penalty


def test_losses_and_gradients_are_the_equations():
    """In float64, by differences. Either critic is the smaller one somewhere."""
    agent, batch, key = an_agent(), a_batch(), jax.random.key(3)
    rows = float64(batch) | dict(terminated=np.asarray(batch["terminated"]))
    y, _ = target_of(agent, rows, jax.random.key(3))

    def critic_by_hand(params):
        q = critics(params, rows["obs"], rows["action"])
        return ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()

    critic, actor = float64(agent.critic.params), float64(agent.actor.params)
    both = critics(critic, rows["obs"], actions(actor, rows["obs"]))
    low = np.minimum(both[0], both[1])
    assert 0 < (both[0] < both[1]).sum() < 8 and 0 < (low < 0).sum() < 8

    def actor_by_hand(params):
        action = actions(params, rows["obs"])
        q = critics(critic, rows["obs"], action)
        return (0.7 * ((action - rows["action"]) ** 2).sum(axis=1) - np.minimum(q[0], q[1]) / np.abs(low).mean()).mean()

    assert_is(agent.critic_loss, critic_by_hand, agent.critic.params, batch, key)
    assert_is(agent.actor_loss, actor_by_hand, agent.actor.params, batch)


def test_what_the_log_says():
    agent, batch, key = an_agent(), a_batch(), jax.random.key(3)
    rows = float64(batch) | dict(terminated=np.asarray(batch["terminated"]))
    y, penalty = target_of(agent, rows, jax.random.key(3))
    loss, info = agent.critic_loss(agent.critic.params, batch, key)
    q = critics(float64(agent.critic.params), rows["obs"], rows["action"])
    assert_close(info, dict(critic_loss=((q - y) ** 2).mean(axis=1).sum(), q=q.mean(), next_penalty=penalty.mean()))
    assert loss == info["critic_loss"]
    loss, info = agent.actor_loss(agent.actor.params, batch)
    action = actions(float64(agent.actor.params), rows["obs"])
    assert_close(info, dict(actor_loss=loss, penalty=((action - rows["action"]) ** 2).sum(axis=1).mean()))


def test_an_update_takes_its_steps_in_order():
    """Two of the critic, each with its own minibatch and key; one of the actor with the second; both targets."""
    agent, batches = an_agent(), jax.tree.map(lambda *x: jnp.stack(x), a_batch(0), a_batch(1))
    new, info = jax.jit(agent.update)(batches, jax.random.key(1))
    first, last = (jax.tree.map(lambda x, i=i: x[i], batches) for i in range(2))
    tx, state, critic, losses = optax.adam(2e-3), agent.critic.opt_state, agent.critic.params, []
    for batch, key in zip((first, last), jax.random.split(jax.random.key(1), 2), strict=True):
        loss = jax.jit(jax.grad(agent.replace(critic=agent.critic.replace(params=critic)).critic_loss, has_aux=True))
        grads, logged = loss(critic, batch, key)
        steps, state = tx.update(grads, state)
        critic = optax.apply_updates(critic, steps)
        losses.append(logged["critic_loss"])
    assert_close(new.critic.params, critic)
    assert_close(new.critic.opt_state[0].mu, state[0].mu)
    halfway = agent.replace(critic=agent.critic.replace(params=critic))
    grads, _ = jax.jit(jax.grad(halfway.actor_loss, has_aux=True))(agent.actor.params, last)
    steps, _ = tx.update(grads, tx.init(agent.actor.params))
    assert_close(new.actor.opt_state[0].mu, jax.tree.map(lambda g: 0.1 * g, grads))
    assert_close(new.actor.params, optax.apply_updates(agent.actor.params, steps))
    for name, online in (("critic", critic), ("actor", new.actor.params)):
        target = jax.tree.map(lambda new, old: 0.3 * new + 0.7 * old, online, getattr(agent, f"target_{name}").params)
        assert_close(getattr(new, f"target_{name}").params, target)
    assert set(info) == {"critic_loss", "q", "next_penalty", "actor_loss", "penalty"}
    np.testing.assert_allclose(info["critic_loss"], np.mean(losses), rtol=1e-4)


def test_a_target_depends_on_the_successor_only_where_the_episode_goes_on():
    """A time limit is no end: the third row terminates, the sixth is truncated. And on the next action only where there
    is one."""
    agent, batch = an_agent(), a_batch()

    @jax.jit
    @jax.vmap
    def error(row):
        return agent.critic_loss(agent.critic.params, jax.tree.map(lambda x: x[None], row), jax.random.key(0))[0]

    changed = error(batch) != error(batch | dict(next_obs=batch["next_obs"] + 1.0))
    np.testing.assert_array_equal(changed, np.arange(8) != 2)
    changed = error(batch) != error(batch | dict(next_action=batch["next_action"] + 1.0))
    np.testing.assert_array_equal(changed, batch["has_next"] & (np.arange(8) != 2))


def test_the_next_action_is_one_of_the_same_episode():
    """None after a termination, a time limit, and the last step of the data."""
    data = probes.a_dataset()
    batch = jax.jit(rebrac.sample, static_argnums=2)(data, jax.random.key(0), (2, 64))
    assert batch["next_action"].shape == (2, 64, 2) and batch["has_next"].shape == (2, 64)
    row = np.argmin(np.abs(batch["reward"][..., None] - data.data["reward"][None, None]), axis=-1)
    assert set(row.flat) == set(range(8))
    np.testing.assert_array_equal(batch["has_next"], ~np.isin(row, (2, 5, 7)))
    unit = (np.float64(data.data["action"]) - [1, 1]) / [2, 4]
    np.testing.assert_allclose(batch["action"], unit[row], atol=1e-6)
    there = np.asarray(batch["has_next"])
    np.testing.assert_allclose(batch["next_action"][there], unit[row[there] + 1], atol=1e-6)


def test_smoothing_noise_is_clipped_and_so_is_the_action():
    """Most of the noise here is larger than the clip, on either side."""
    agent, obs = an_agent(smoothing_std=5.0), probes.a_dataset().data["obs"]
    moved = agent.target_action(obs, jax.random.key(0)) - agent.target_actor(obs)
    assert np.abs(moved).max() <= 0.2 + 1e-6
    assert (np.isclose(moved, 0.2, atol=1e-6)).sum() > 2 and (np.isclose(moved, -0.2, atol=1e-6)).sum() > 2
    action = an_agent(smoothing_std=5.0, smoothing_clip=9.0).target_action(obs, jax.random.key(0))
    assert (action == 1.0).any() and (action == -1.0).any() and np.abs(action).max() == 1.0


def test_networks_start_as_the_config_says():
    data = probes.a_dataset()
    agent = programs()[0](jax.random.key(0), data).agent
    for name in ("actor", "critic"):
        target = getattr(agent, f"target_{name}")
        assert_close(target.params, getattr(agent, name).params, rtol=0)
        assert target.opt_state is None
    q = agent.critic(data.data["obs"], data.data["action"])
    assert q.shape == (2, 8) and not np.allclose(q[0], q[1])
    assert [layer["kernel"].shape for layer in agent.actor.params["MLP_0"].values()] == [(2, 9), (9, 8), (8, 2)]


def train(data, iterations, **changes):
    return probes.learn(*programs(**changes), data, iterations)


def test_a_step_learns_from_all_of_the_data_in_units_of_the_networks(monkeypatch):
    seen, data, config = [], probes.a_dataset(), config_of()

    def update(agent, batches, key):
        jax.debug.callback(lambda **batch: seen.append(batch), **batches)
        return agent, {}

    run = programs()[0](jax.random.key(0), data)
    monkeypatch.setattr(rebrac.Agent, "update", update)
    step = jax.jit(functools.partial(rebrac.train_step, config=config))
    for key in jax.random.split(jax.random.key(1), 8):
        step(run, key, data)
    jax.effects_barrier()
    assert len(seen) == 16 and all(batch["reward"].shape == (2, 4) for batch in seen)
    drawn = np.concatenate([batch["reward"] for batch in seen])
    assert set(drawn.flat) == set(np.asarray(data.data["reward"])) and len({tuple(x) for x in drawn.tolist()}) > 25


def test_a_step_counts_and_logs_its_updates():
    """Four updates of the critic in an iteration, two of the actor."""
    run, info = train(probes.a_dataset(), 2)
    assert run.clock == (0, 8)
    assert run.agent.critic.opt_state[0].count == 8 and run.agent.actor.opt_state[0].count == 4
    assert all(x.shape == () and np.isfinite(x) for x in info.values())


def test_acting_is_greedy_and_in_the_environments_units():
    run = programs()[0](jax.random.key(0), probes.a_dataset())._replace(agent=an_agent())
    obs = np.random.default_rng(2).normal(size=(4, 2))
    carry, action = rebrac.act(run, (), jnp.float32(obs), None)
    expected = [[1, 1]] + np.float64([[2, 4]]) * actions(float64(run.agent.actor.params), obs)
    np.testing.assert_allclose(action, expected, rtol=1e-4, atol=1e-5)
    assert carry == ()


def test_seeds_together_are_the_seeds_alone():
    probes.compare_seeds(*programs(), probes.a_dataset(), atol=3e-5)


LEARNING = dict(updates_per_step=20, batch_size=32, hidden_dims=(16, 16), lr=3e-3, tau=0.1, smoothing_std=0.0,
                discount=0.5, critic_penalty=1.0)


def test_the_best_action_of_a_bandit_under_a_penalty():
    """One step, reward 1 − (a − ½)²; the mean of the actions is 0. Q is the reward. Where β₁ = 1 / Q(¼) the loss
    β₁ π² − Q(π) / |Q(π)|₀ has its minimum at π = ¼, half way. Observations are dictionaries."""
    unit = np.linspace(-1, 1, 32, dtype=np.float32)[:, None]
    obs = dict(goal=np.ones((32, 1), np.float32), state=np.ones((32, 2), np.float32))
    data = Dataset.create(dict(
        obs=obs, next_obs=obs, action=1 + 2 * unit, reward=1 - (unit[:, 0] - 0.5) ** 2, terminated=np.ones(32, bool),
        truncated=np.zeros(32, bool)), Box((-1.0,), (3.0,)))
    run, _ = train(data, 60, actor_penalty=1 / 0.9375, **LEARNING)
    q = run.agent.critic(data.data["obs"], jnp.asarray(unit))
    np.testing.assert_allclose(q, np.broadcast_to(data.data["reward"], (2, 32)), atol=0.1)
    np.testing.assert_allclose(rebrac.act(run, (), obs, None)[1], 1.5, atol=0.15)


def test_values_of_a_chain():
    """Two steps, reward 1 at the end. The data's second action is ½ or −½, so an actor that imitates has 0 and is ¼
    away, in squares: Q = γ (1 − β₂ / 4) = 3/8 at the first step."""
    second = np.arange(32) % 2 == 1
    action = np.where(second, np.where(np.arange(32) % 4 == 1, 0.5, -0.5), 0.0)
    data = Dataset.create(dict(
        obs=np.float32(second)[:, None], next_obs=np.ones((32, 1), np.float32), action=np.float32(action)[:, None],
        reward=np.float32(second), terminated=second, truncated=second & False), Box((-1.0,), (1.0,)))
    run, _ = train(data, 60, actor_penalty=20.0, **LEARNING)
    q = run.agent.critic(jnp.float32([[0.0], [1.0]]), jnp.float32([[0.0], [0.5]]))
    np.testing.assert_allclose(q, [[0.375, 1.0]] * 2, atol=0.05)
    np.testing.assert_allclose(rebrac.act(run, (), jnp.ones((1, 1)), None)[1], 0.0, atol=0.1)


@pytest.mark.parametrize(("space", "words"), [
    (Discrete(2), "discrete actions"), (Box((-1.0, -1.0), (1.0, np.inf)), "actions without bounds")])
def test_what_rebrac_cannot_learn_from(space, words):
    with pytest.raises(UserError, match=f'rebrac cannot act in "gymnax/Pendulum-v1", which has {words}'):
        rebrac.init(jax.random.key(0), probes.a_dataset().replace(action_space=space), config_of())
    with pytest.raises(UserError, match="policy_delay = 3 does not divide updates_per_step = 4"):
        rebrac.init(jax.random.key(0), probes.a_dataset(), config_of(policy_delay=3))
