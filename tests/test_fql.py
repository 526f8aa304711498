"""FQL against its equations by hand, a flow whose solution is known, and data whose values and actions are known."""
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import fql
from core.dataset import Dataset
from core.envs import Box, Discrete
from core.errors import UserError
from tests import probes
from tests.probes import assert_close, float64

FQL = "algorithms/fql.py"
LOSSES, EULER, ORDER, SUCCESSOR, NETWORKS, BATCHES, COUNTS, GREEDY, BANDIT, CHAIN, REFUSED, TRAFFIC, LOG = (
    "test_losses_and_gradients_are_the_equations", "test_euler_steps_follow_a_linear_field",
    "test_an_update_takes_its_steps_from_what_was_before_it",
    "test_a_target_depends_on_the_successor_only_where_the_episode_goes_on", "test_networks_start_as_the_config_says",
    "test_a_step_learns_from_all_of_the_data_in_units_of_the_networks", "test_a_step_counts_and_logs_its_updates",
    "test_acting_draws_from_the_policy_in_the_environments_units", "test_the_better_arm_of_a_bandit",
    "test_values_of_a_chain", "test_what_fql_cannot_learn_from", "test_no_gradient_flows_into_the_other_networks",
    "test_what_the_log_says")
PLANTED_ERRORS = {  # and the test that has to notice
    "a velocity from the data to the noise": (FQL, '(batch["action"] - noise)', '(noise - batch["action"])', LOSSES),
    "noise at the end of the way": (FQL, '(1.0 - time) * noise + time * batch["action"]',
                                    'time * noise + (1.0 - time) * batch["action"]', LOSSES),
    "the flow learns at the action": (FQL, '(batch["obs"], between, time, params=params)',
                                      '(batch["obs"], batch["action"], time, params=params)', LOSSES),
    "one time for all rows": (FQL, "(len(noise), 1))", "(1, 1)) * jnp.ones((len(noise), 1))", LOSSES),
    "a time for each number": (FQL, "between = (1.0 - time) * noise", "between = (1.0 - time**2) * noise", LOSSES),
    "steps of another size": (FQL, "time) / self.config.flow_steps\n", "time) / (self.config.flow_steps + 1)\n", EULER),
    "one step less": (FQL, "fori_loop(0, self", "fori_loop(1, self", EULER),
    "time at the end of a step": (FQL, "step / self.config.flow_steps)", "(step + 1) / self.config.flow_steps)", EULER),
    "time stands still": (FQL, "step / self.config.flow_steps)", "0 * step / self.config.flow_steps)", EULER),
    "every step from the noise": (FQL, "return x + self.flow(obs, x, time)", "return x + self.flow(obs, noise, time)",
                                  EULER),
    "a way back": (FQL, "return x + self.flow(", "return x - self.flow(", EULER),
    "the flow leaves the box": (FQL, "jnp.clip(jax.lax.fori_loop(0, self.config.flow_steps, euler_step, noise), -1.0, "
                                "1.0)", "jax.lax.fori_loop(0, self.config.flow_steps, euler_step, noise)", EULER),
    "imitation of the data": (FQL, 'action - self.flow_action(batch["obs"], noise)', 'action - batch["action"]',
                              LOSSES),
    "distance in absolute numbers": (FQL, 'jnp.square(action - self.flow', "jnp.abs(action - self.flow", LOSSES),
    "imitation of a clipped action": (FQL, "jnp.square(action - self", "jnp.square(jnp.clip(action, -1.0, 1.0) - self",
                                      LOSSES),
    "Q outside the box": (FQL, 'self.critic(batch["obs"], jnp.clip(action, -1.0, 1.0))',
                          'self.critic(batch["obs"], action)', LOSSES),
    "Q of the smaller critic": (FQL, "1.0)).mean(axis=0)", "1.0)).min(axis=0)", LOSSES),
    "the actor asks the target critic": (FQL, 'q = self.critic(batch["obs"], jnp', 'q = self.target_critic(batch["obs"]'
                                         ", jnp", LOSSES),
    "the actor makes Q small": (FQL, "distance - q.mean() / scale", "distance + q.mean() / scale", LOSSES),
    "Q as it is": (FQL, "distance - q.mean() / scale", "distance - q.mean()", LOSSES),
    "Q against its signed mean": (FQL, "jnp.abs(q).mean()", "q.mean()", LOSSES),
    "a gradient through the scale": (FQL, "jax.lax.stop_gradient(jnp.abs(q).mean())", "jnp.abs(q).mean()", LOSSES),
    "the weight divides": (FQL, "self.config.distill_weight * distance", "distance / self.config.distill_weight",
                           LOSSES),
    "a termination goes on": (FQL, '(1.0 - batch["terminated"]) * next_q', "next_q", SUCCESSOR),
    "a time limit is an end": (FQL, '(1.0 - batch["terminated"])',
                               '(1.0 - batch["terminated"]) * (1.0 - batch["truncated"])', SUCCESSOR),
    "action of this observation": (FQL, 'self.action_of(batch["next_obs"], key)', 'self.action_of(batch["obs"], key)',
                                   LOSSES),
    "value of this observation": (FQL, 'self.target_critic(batch["next_obs"]', 'self.target_critic(batch["obs"]',
                                  LOSSES),
    "target of the online critic": (FQL, 'self.target_critic(batch["next_obs"]', 'self.critic(batch["next_obs"]',
                                    LOSSES),
    "target of the smaller critic": (FQL, "key)).mean(axis=0)", "key)).min(axis=0)", LOSSES),
    "discount forgotten": (FQL, "self.config.discount * (1.0", "0.99 * (1.0", LOSSES),
    "one critic learns": (FQL, "jnp.square(q - target[None]).mean(axis=1).sum()", "jnp.square(q[0] - target).mean()",
                          LOSSES),
    "no LayerNorm": (FQL, "nn.LayerNorm()(nn.gelu(x))", "nn.gelu(x)", LOSSES),
    "another activation": (FQL, "1), activation=gelu_norm)", "1), activation=nn.gelu)", LOSSES),
    "ReLU in the flow": (FQL, "activation=nn.gelu)", "activation=nn.relu)", LOSSES),
    "an action without bounds": (FQL, "jnp.clip(self.actor(obs, noise), -1.0, 1.0)", "self.actor(obs, noise)", LOSSES),
    "the actor sees the new critic": (FQL, "actor, actor_info = self.actor.minimize(self.actor_loss",
        "actor, actor_info = self.actor.minimize(self.replace(critic=critic).actor_loss", ORDER),
    "the actor sees the new flow": (FQL, "actor, actor_info = self.actor.minimize(self.actor_loss",
        "actor, actor_info = self.actor.minimize(self.replace(flow=flow).actor_loss", ORDER),
    "the target does not move": (FQL, "self.target_critic.track(critic, self.config.tau)", "self.target_critic", ORDER),
    "the target follows the old critic": (FQL, "self.target_critic.track(critic, ",
                                          "self.target_critic.track(self.critic, ", ORDER),
    "the target jumps": (FQL, "track(critic, self.config.tau)", "track(critic, 1 - self.config.tau)", ORDER),
    "the flow stays": (FQL, "self.replace(flow=flow, actor=actor,", "self.replace(actor=actor,", ORDER),
    "lr forgotten": (FQL, "optax.adam(config.lr)", "optax.adam(1e-4)", ORDER),
    "actions in two units": (FQL, '(batch["action"] - centre) / half', 'batch["action"]', BATCHES),
    "actions not centred": (FQL, '(batch["action"] - centre) / half', 'batch["action"] / half', BATCHES),
    "the same minibatch": (FQL, "source.sample(sample_key, config.batch_size)",
                           "jax.tree.map(lambda x: x[:config.batch_size], source.data)", BATCHES),
    "updates are not counted": (FQL, "tick(updates=config.updates_per_step)", "tick(updates=1)", COUNTS),
    "evaluation in units of the network": (FQL, "run.agent.action_space.from_unit(run.agent.action_of(obs, key))",
                                           "run.agent.action_of(obs, key)", GREEDY),
    "evaluation of the flow": (FQL, "run.agent.action_of(obs, key))",
        "run.agent.flow_action(obs, jax.random.normal(key, (len(obs), *run.agent.action_space.shape))))", GREEDY),
    "one noise for all": (FQL, "noise = jax.random.normal(key, (len(flat(obs)), *self.action_space.shape))",
        "noise = jnp.zeros((len(flat(obs)), 1)) + jax.random.normal(key, (1, *self.action_space.shape))", GREEDY),
    "any action space": (FQL, "actions=(Box,), bounded=True", "actions=(Box,)", REFUSED),
}
SMALL = dict(updates=100, updates_per_step=3, batch_size=4, hidden_dims=(9, 8), discount=0.9, tau=0.3, lr=2e-3,
             flow_steps=3, distill_weight=0.7)


def config_of(**changes):
    config = fql.get_config()
    config.update(SMALL | changes)
    return ml_collections.FrozenConfigDict(config)


@functools.cache
def programs(**changes):
    config = config_of(**changes)
    return tuple(jax.jit(functools.partial(function, config=config)) for function in (fql.init, fql.train_step))


def an_agent():
    """All weights and biases differ, those of the target critic, too."""
    agent = programs()[0](jax.random.key(0), probes.a_dataset()).agent

    def shake(state, seed):
        return state.replace(params=probes.shaken(state.params, seed))

    return agent.replace(**{name: shake(getattr(agent, name), i) for i, name in enumerate((
        "flow", "actor", "critic", "target_critic"))})


def a_batch():
    data = probes.a_dataset().data
    return {**data, "action": jnp.tanh(data["action"])}


def in_float64(batch):
    return float64(batch) | dict(terminated=np.asarray(batch["terminated"]))


def mlp(params, *inputs, norm=False):
    """By hand, in float64."""
    x, layers = np.concatenate(inputs, axis=1), sum(name.startswith("Dense") for name in params)
    for i in range(layers):
        x = x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"][None]
        if i + 1 < layers:
            x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        if norm and i + 1 < layers:
            centred = x - x.mean(axis=1, keepdims=True)
            x = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
            x = x * params[f"LayerNorm_{i}"]["scale"][None] + params[f"LayerNorm_{i}"]["bias"][None]
    return x


def critics(params, obs, action):  # both (2, B)
    (stacked,) = params.values()
    return np.stack([mlp(jax.tree.map(lambda x, i=i: x[i], stacked), obs, action, norm=True)[:, 0] for i in range(2)])


def noise_of(key, shape=(8, 2)):
    return np.float64(jax.random.normal(key, shape))


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


def solution(agent, obs, x):
    """Three steps of Euler by hand, then the box."""
    for time in (0, 1 / 3, 2 / 3):
        x = x + mlp(float64(agent.flow.params)["MLP_0"], obs, x, np.full((len(x), 1), time)) / 3
    return np.clip(x, -1, 1)


def targets(agent, rows, key):
    action = mlp(float64(agent.actor.params)["MLP_0"], rows["next_obs"], noise_of(key))
    assert 0 < (np.abs(action) > 1).sum() < 16
    both = critics(float64(agent.target_critic.params), rows["next_obs"], np.clip(action, -1, 1))
    return np.where(rows["terminated"], rows["reward"], rows["reward"] + 0.9 * (both[0] + both[1]) / 2)


def test_losses_and_gradients_are_the_equations():
    """In float64, by differences. Some actions leave the box; some values are negative."""
    agent, batch, rows = an_agent(), a_batch(), in_float64(a_batch())
    y, noise = targets(agent, rows, jax.random.key(1)), noise_of(jax.random.key(3))
    critic, actor = float64(agent.critic.params), float64(agent.actor.params)

    def critic_by_hand(params):
        q = critics(params, rows["obs"], rows["action"])
        return ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()

    noise_key, time_key = jax.random.split(jax.random.key(2))
    start, time = noise_of(noise_key), np.float64(jax.random.uniform(time_key, (8, 1)))

    def flow_by_hand(params):
        between = start + time * (rows["action"] - start)
        return ((mlp(params["MLP_0"], rows["obs"], between, time) - rows["action"] + start) ** 2).sum() / 16

    def q_of(params):
        action = mlp(params["MLP_0"], rows["obs"], noise)
        return critics(critic, rows["obs"], np.clip(action, -1, 1)).mean(axis=0), action

    q, action = q_of(actor)
    assert 0 < (np.abs(action) > 1).sum() < 16 and 0 < (q < 0).sum() < 8
    goal, scale = solution(agent, rows["obs"], noise), np.abs(q).mean()

    def actor_by_hand(params):
        q, action = q_of(params)
        return 0.7 * ((action - goal) ** 2).mean() - q.mean() / scale

    assert_is(agent.critic_loss, critic_by_hand, agent.critic.params, batch, jax.random.key(1))
    assert_is(agent.flow_loss, flow_by_hand, agent.flow.params, batch, jax.random.key(2))
    assert_is(agent.actor_loss, actor_by_hand, agent.actor.params, batch, jax.random.key(3))


def test_what_the_log_says():
    agent, batch, rows = an_agent(), a_batch(), in_float64(a_batch())
    loss, info = agent.critic_loss(agent.critic.params, batch, jax.random.key(1))
    q = critics(float64(agent.critic.params), rows["obs"], rows["action"])
    assert_close(info, dict(critic_loss=loss, q=q.mean()))
    loss, info = agent.flow_loss(agent.flow.params, batch, jax.random.key(2))
    assert_close(info, dict(flow_loss=loss))
    loss, info = agent.actor_loss(agent.actor.params, batch, jax.random.key(3))
    noise = noise_of(jax.random.key(3))
    action = mlp(float64(agent.actor.params)["MLP_0"], rows["obs"], noise)
    assert_close(info, dict(actor_loss=loss, distance=((action - solution(agent, rows["obs"], noise)) ** 2).mean()))


def test_no_gradient_flows_into_the_other_networks():
    """Of each loss into the agent: only the network that it is the loss of has one. So the distance to the flow does
    not move the flow, nor does Q; the critic does not follow the actor."""
    agent, batch = an_agent(), a_batch()

    def losses(agent):
        return (agent.actor_loss(agent.actor.params, batch, jax.random.key(3))[0]
                + agent.critic_loss(agent.critic.params, batch, jax.random.key(1))[0]
                + agent.flow_loss(agent.flow.params, batch, jax.random.key(2))[0])

    names = "flow", "actor", "critic", "target_critic"
    parts = {name: getattr(agent, name).params for name in names}

    def joint(parts):
        return losses(agent.replace(**{name: getattr(agent, name).replace(params=parts[name]) for name in names}))

    grads = jax.jit(jax.grad(joint))(parts)
    for name, args in (("flow", 2), ("actor", 3), ("critic", 1)):
        loss = functools.partial(getattr(agent, f"{name}_loss"), batch=batch, key=jax.random.key(args))
        assert_close(grads[name], jax.jit(jax.grad(loss, has_aux=True))(parts[name])[0])
    assert all((x == 0).all() for x in jax.tree.leaves(grads["target_critic"]))


class Linear:
    """v(s, x, t) = c (s − x) + t, in the place of a network."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, obs, x, time):
        return self.rate * (obs - x) + time


@pytest.mark.parametrize(("steps", "rate"), [(1, 1.0), (4, 1.0), (4, 0.0), (200, 1.0)])
def test_euler_steps_follow_a_linear_field(steps, rate):
    """x' = c (s − x) + t. A step of 1/K is x <- x + (c (s − x) + k / K) / K. With many steps x(1) is
    s + (x(0) − s + 1) e^(−1) for c = 1."""
    agent, rng = an_agent(), np.random.default_rng(0)
    agent = agent.replace(flow=Linear(rate), config=config_of(flow_steps=steps))
    obs, noise = rng.uniform(-1.5, 1.5, (6, 2)), 2 * rng.normal(size=(6, 2))
    x = noise
    for k in range(steps):
        x = x + (rate * (obs - x) + k / steps) / steps
    action = jax.jit(lambda obs, noise: agent.flow_action(obs, noise))(jnp.float32(obs), jnp.float32(noise))
    assert 0 < (np.abs(x) > 1).sum() < 12
    np.testing.assert_allclose(action, np.clip(x, -1, 1), atol=1e-5)
    if steps == 200:
        np.testing.assert_allclose(action, np.clip(obs + (noise - obs + 1) / np.e, -1, 1), atol=0.01)


def test_an_update_takes_its_steps_from_what_was_before_it():
    """All three losses see the networks from before, the target critic the new critic."""
    agent, batch = an_agent(), a_batch()
    new, info = jax.jit(agent.update)(batch, jax.random.key(1))
    for name, key in zip(("critic", "flow", "actor"), jax.random.split(jax.random.key(1), 3), strict=True):
        state, tx = getattr(agent, name), optax.adam(2e-3)
        grads, logged = jax.jit(jax.grad(getattr(agent, f"{name}_loss"), has_aux=True))(state.params, batch, key)
        steps, _ = tx.update(grads, tx.init(state.params))
        assert_close(getattr(new, name).opt_state[0].mu, jax.tree.map(lambda g: 0.1 * g, grads))
        assert_close(getattr(new, name).params, optax.apply_updates(state.params, steps))
        assert_close({key: info.pop(key) for key in logged}, logged)
    target = jax.tree.map(lambda new, old: 0.3 * new + 0.7 * old, new.critic.params, agent.target_critic.params)
    assert_close(new.target_critic.params, target)
    assert not info


def test_a_target_depends_on_the_successor_only_where_the_episode_goes_on():
    """A time limit is no end: the third row terminates, the sixth is truncated."""
    agent, batch = an_agent(), a_batch()

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
    q = agent.critic(data.data["obs"], data.data["action"])
    assert q.shape == (2, 8) and not np.allclose(q[0], q[1])
    for name, inputs in (("actor", 4), ("flow", 5)):
        shapes = [layer["kernel"].shape for layer in getattr(agent, name).params["MLP_0"].values()]
        assert shapes == [(inputs, 9), (9, 8), (8, 2)]


def train(data, iterations, **changes):
    return probes.learn(*programs(**changes), data, iterations)


def test_a_step_learns_from_all_of_the_data_in_units_of_the_networks(monkeypatch):
    seen, data, config = [], probes.a_dataset(), config_of()

    def update(agent, batch, key):
        jax.debug.callback(lambda **batch: seen.append(batch), **batch)
        return agent, {}

    run = programs()[0](jax.random.key(0), data)
    monkeypatch.setattr(fql.Agent, "update", update)
    step = jax.jit(functools.partial(fql.train_step, config=config))
    for key in jax.random.split(jax.random.key(1), 8):
        step(run, key, data)
    jax.effects_barrier()
    assert len(seen) == 24 and all(batch["reward"].shape == (4,) for batch in seen)
    drawn = {name: np.concatenate([batch[name] for batch in seen]) for name in seen[0]}
    row = np.argmin(np.abs(drawn["obs"][:, :1] - np.asarray(data.data["obs"])[None, :, 0]), axis=1)
    assert set(row) == set(range(8)) and len({tuple(batch["reward"].tolist()) for batch in seen}) > 20
    np.testing.assert_allclose(drawn["reward"], data.data["reward"][row])
    np.testing.assert_allclose(np.float32([1, 1]) + np.float32([2, 4]) * drawn["action"], data.data["action"][row],
                               rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(drawn["terminated"], row == 2)


def test_a_step_counts_and_logs_its_updates():
    run, info = train(probes.a_dataset(), 2)
    assert run.clock == (0, 6)
    assert all(getattr(run.agent, name).opt_state[0].count == 6 for name in ("flow", "actor", "critic"))
    assert all(x.shape == () and np.isfinite(x) for x in info.values())


def test_acting_draws_from_the_policy_in_the_environments_units():
    run = programs()[0](jax.random.key(0), probes.a_dataset())._replace(agent=an_agent())
    obs = np.random.default_rng(2).normal(size=(6, 2))
    carry, action = fql.act(run, (), jnp.float32(obs), jax.random.key(4))
    mean = mlp(float64(run.agent.actor.params)["MLP_0"], obs, noise_of(jax.random.key(4), (6, 2)))
    assert (np.abs(mean) > 1).any()
    np.testing.assert_allclose(action, [[1, 1]] + np.float64([[2, 4]]) * np.clip(mean, -1, 1), rtol=1e-4, atol=1e-5)
    assert carry == ()


def test_seeds_together_are_the_seeds_alone():
    probes.compare_seeds(*programs(), probes.a_dataset(), atol=3e-5)


LEARNING = dict(updates_per_step=20, batch_size=32, hidden_dims=(16, 16), lr=3e-3, tau=0.1, flow_steps=5, discount=0.5)


def test_the_better_arm_of_a_bandit():
    """One step. Half of the actions are −½, half ½, with reward 0 and 1. The flow takes about half of the noise to each
    arm: what a normal distribution cannot. The policy takes the better arm. Observations are dictionaries."""
    unit = np.float32([[-0.5], [0.5]] * 16)
    obs = dict(goal=np.ones((32, 1), np.float32), state=np.ones((32, 2), np.float32))
    data = Dataset.create(dict(
        obs=obs, next_obs=obs, action=1 + 2 * unit, reward=np.float32(unit[:, 0] > 0), terminated=np.ones(32, bool),
        truncated=np.zeros(32, bool)), Box((-1.0,), (3.0,)))
    run, _ = train(data, 80, distill_weight=0.3, **LEARNING)
    np.testing.assert_allclose(run.agent.critic(obs, unit), np.broadcast_to(data.data["reward"], (2, 32)), atol=0.1)
    flow = run.agent.flow_action(data.data["obs"], jnp.linspace(-2.0, 2.0, 32)[:, None])
    assert (np.abs(np.abs(flow) - 0.5) < 0.25).mean() > 0.75 and 0.3 < (flow > 0).mean() < 0.7
    action = fql.act(run, (), obs, jax.random.key(0))[1]
    assert (action > 1.5).all()


def test_values_of_a_chain():
    """Two steps, reward 1 at the end: γ = ½ and 1. All actions of the data are 0.3; so are the flow's and, where α is
    large, the policy's."""
    second, column = np.arange(32) % 2 == 1, np.ones((32, 1), np.float32)
    data = Dataset.create(dict(
        obs=np.float32(second)[:, None], next_obs=column, action=0.3 * column, reward=np.float32(second),
        terminated=second, truncated=second & False), Box((-1.0,), (1.0,)))
    run, _ = train(data, 80, distill_weight=30.0, **LEARNING)
    q = run.agent.critic(jnp.float32([[0.0], [1.0]]), jnp.full((2, 1), 0.3))
    np.testing.assert_allclose(q, [[0.5, 1.0]] * 2, atol=0.05)
    action = fql.act(run, (), column, jax.random.key(0))[1]
    np.testing.assert_allclose(action, 0.3, atol=0.2)
    np.testing.assert_allclose(action.mean(), 0.3, atol=0.05)


@pytest.mark.parametrize(("space", "words"), [
    (Discrete(2), "discrete actions"), (Box((-1.0, -1.0), (1.0, np.inf)), "actions without bounds")])
def test_what_fql_cannot_learn_from(space, words):
    with pytest.raises(UserError, match=f'fql cannot act in "gymnax/Pendulum-v1", which has {words}'):
        fql.init(jax.random.key(0), probes.a_dataset().replace(action_space=space), config_of())
