"""SAC against its equations by hand, and on probes whose best action and value are known."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from algorithms import sac
from core.envs import Batch, Box, TimeStep
from core.errors import UserError
from tests import probes
from tests.probes import assert_close

SAC = "algorithms/sac.py"
LOSSES, ORDER, STORED, WARM, UPDATES, NETWORKS, GREEDY, SHAPES = (
    "test_losses_and_gradients_are_the_equations", "test_an_update_takes_its_steps_in_order",
    "test_what_is_stored_is_what_happened", "test_random_steps_come_first_and_count",
    "test_a_step_makes_its_updates_from_all_of_the_buffer", "test_networks_start_as_the_config_says",
    "test_acting_is_greedy_and_in_the_environments_units", "test_a_dictionary_of_observations")
PLANTED_ERRORS = {  # and the test that has to notice
    "target from the online critic": (SAC, 'self.target_critic(batch["next_obs"], next_action)',
                                      'self.critic(batch["next_obs"], next_action)', LOSSES),
    "no bonus for entropy": (SAC, "next_q - self.temperature() * next_log_prob", "next_q", LOSSES),
    "entropy punished": (SAC, "next_q - self.temperature()", "next_q + self.temperature()", LOSSES),
    "the larger critic": (SAC, "next_action).min(axis=0)", "next_action).max(axis=0)", LOSSES),
    "the policy trusts the larger critic": (SAC, 'batch["obs"], action).min(axis=0)',
                                            'batch["obs"], action).max(axis=0)', LOSSES),
    "critics averaged": (SAC, "next_action).min(axis=0)", "next_action).mean(axis=0)", LOSSES),
    "a termination goes on": (SAC, '(1.0 - batch["terminated"]) * next_v', "next_v", LOSSES),
    "next action of this observation": (SAC, 'self.actor(batch["next_obs"])', 'self.actor(batch["obs"])', LOSSES),
    "next action of the mode": (SAC, "self.target_critic(batch[\"next_obs\"], next_action)",
                                "self.target_critic(batch[\"next_obs\"], self.actor(batch[\"next_obs\"]).mode())",
                                LOSSES),
    "half of the loss lost": (SAC, "loss = 0.5 * jnp.square(q", "loss = jnp.square(q", LOSSES),
    "one critic learns": (SAC, "jnp.square(q - target[None]).mean(axis=1).sum()",
                          "jnp.square(q[0] - target).mean()", LOSSES),
    "mean over the critics": (SAC, ".mean(axis=1).sum()", ".mean(axis=1).mean()", LOSSES),
    "stored action judged": (SAC, 'q = self.critic(batch["obs"], action).min', 'q = self.critic(batch["obs"], batch['
                             '"action"]).min', LOSSES),
    "the policy avoids reward": (SAC, "(self.temperature() * log_prob - q)", "(self.temperature() * log_prob + q)",
                                 LOSSES),
    "the policy seeks certainty": (SAC, "(self.temperature() * log_prob - q)", "(-self.temperature() * log_prob - q)",
                                   LOSSES),
    "no gradient through the action": (SAC, 'q = self.critic(batch["obs"], action).min',
                                       'q = self.critic(batch["obs"], jax.lax.stop_gradient(action)).min', LOSSES),
    "sign of the temperature": (SAC, "temperature * (entropy - target_entropy)",
                                "temperature * (target_entropy - entropy)", LOSSES),
    "target entropy of one dimension": (SAC, "self.config.target_entropy * self.action_space.shape[0]",
                                        "self.config.target_entropy", LOSSES),
    "the temperature's gradient in the policy": (SAC, "agent.temperature.minimize(agent.temperature_loss, actor_info["
                                                 "\"entropy\"])", "agent.temperature, {}", ORDER),
    "the target does not move": (SAC, "self.target_critic.track(critic, self.config.tau)", "self.target_critic", ORDER),
    "the target follows the old critic": (SAC, "self.target_critic.track(critic, ",
                                          "self.target_critic.track(self.critic, ", ORDER),
    "the target jumps": (SAC, "track(critic, self.config.tau)", "track(critic, 1 - self.config.tau)", ORDER),
    "the policy learns from the old critic": (SAC, "agent.actor.minimize(agent.actor_loss",
                                              "self.actor.minimize(self.actor_loss", ORDER),
    "one key for both actions": (SAC, "minimize(agent.actor_loss, batch, actor_key)",
                                 "minimize(agent.actor_loss, batch, critic_key)", ORDER),
    "deviation clipped after use": (SAC, "TanhNormal(mean, jnp.clip(log_std, *self.log_std_bounds))",
                                    "TanhNormal(mean, log_std)", NETWORKS),
    "the observation after the reset": (SAC, "next_obs=step.next_obs", "next_obs=step.obs", STORED),
    "the observation after the step": (SAC, "transition = dict(obs=run.obs,", "transition = dict(obs=step.obs,",
                                       STORED),
    "a time limit is an end": (SAC, "terminated=step.terminated.astype", "terminated=(step.terminated | step.truncated)"
                               ".astype", STORED),
    "an end is a time limit": (SAC, "terminated=step.terminated.astype", "terminated=step.truncated.astype", STORED),
    "actions in two units": (SAC, "source.action_space.from_unit(action))", "action)", STORED),
    "the environment's action stored": (SAC, "dict(obs=run.obs, action=action,",
                                        "dict(obs=run.obs, action=source.action_space.from_unit(action),", STORED),
    "random actions of one half": (SAC, "source.action_space.shape), minval=-1.0,",
                                   "source.action_space.shape), minval=0.0,", WARM),
    "random steps of every environment": (SAC, "config.random_steps // source.num_envs", "config.random_steps", WARM),
    "steps of one environment counted": (SAC, 'steps = len(flat["reward"])', 'steps = len(transitions["reward"])',
                                         WARM),
    "random steps are forgotten": (SAC, "return store(run, transitions)", "return run", WARM),
    "one update for all steps": (SAC, "config.num_envs * config.num_steps * config.updates_per_step",
                                 "config.updates_per_step", UPDATES),
    "updates are not counted": (SAC, "tick(updates=num_updates)", "tick(updates=1)", UPDATES),
    "the same minibatch": (SAC, "run.buffer.sample(sample_key, config.batch_size)",
                           "jax.tree.map(lambda x: x[:config.batch_size], run.buffer.data)", UPDATES),
    "training is greedy": (SAC, "sample_and_log_prob(key)[0]", "mode()", UPDATES),
    "evaluation samples": (SAC, "run.agent.actor(obs).mode()", "run.agent.actor(obs).sample_and_log_prob(key)[0]",
                           GREEDY),
    "evaluation in units of the network": (SAC, "return (), run.agent.action_space.from_unit(run.agent.actor(obs).mode"
                                           "())", "return (), run.agent.actor(obs).mode()", GREEDY),
    "initial temperature for its logarithm": (SAC, "constant(jnp.log(self.init_value))", "constant(self.init_value)",
                                              NETWORKS),
    "target_entropy forgotten": (SAC, "self.config.target_entropy * self", "-1.0 * self", LOSSES),
    "discount forgotten": (SAC, "self.config.discount * (1.0", "0.99 * (1.0", LOSSES),
    "lr forgotten": (SAC, "optax.adam(config.lr)", "optax.adam(3e-4)", ORDER),
    "a single row is written by itself": ("core/dataset.py", "return old.at[index].set(rows, unique",
                                          "return old.at[index[:-1]].set(rows[:-1], unique",
                                          "test_one_transition_a_step_does_not_copy_the_buffer"),
    "any action space": (SAC, "actions=(Box,), bounded=True", "actions=(Box,)", "test_what_sac_cannot_act_in"),
    "discrete actions": (SAC, "actions=(Box,), bounded=True", "bounded=True", "test_what_sac_cannot_act_in"),
}


class Line(NamedTuple):
    """A point that its action moves by half its size. Two steps: those that started above 0 end, the others are cut by
    the time limit. The reward is 10 plus the new place."""

    max_steps: int = 2
    action_space: Box = Box((-1.0, -3.0), (3.0, 5.0))

    def reset(self, key):
        x = jax.random.uniform(key, (2,), minval=-0.1, maxval=0.1)
        return (x, x[0] > 0, jnp.int32(0)), x

    def step(self, key, state, action):
        x, falls, t = state[0] + 0.5 * action, state[1], state[2] + 1
        last = t >= self.max_steps
        return (x, falls, t), TimeStep(x, x, 10 + x[0], last & falls, last & ~falls, {})


SMALL = dict(num_envs=3, num_steps=2, env_steps=60, random_steps=13, buffer_size=40, batch_size=4, hidden_dims=(5, 4),
             updates_per_step=2, discount=0.9, tau=0.3, lr=2e-3, target_entropy=-0.7, init_temperature=0.4)


def make(env=None, **changes):
    config = sac.get_config()
    config.update(SMALL | changes)
    return Batch(env or Line(), config.num_envs), ml_collections.FrozenConfigDict(config)


def an_agent(config, env, seed=0):
    """All weights and biases differ, those of the target critic, too."""
    _, obs = env.reset(jax.random.key(5))
    agent = jax.jit(lambda key: sac.Agent.create(key, obs, env.action_space, config))(jax.random.key(seed))

    def shake(state, seed):
        return state.replace(params=probes.shaken(state.params, seed))

    return agent.replace(actor=shake(agent.actor, 1), critic=shake(agent.critic, 7),
                         target_critic=shake(agent.target_critic, 17), temperature=shake(agent.temperature, 4))


def a_batch(size=6, seed=7):
    keys = jax.random.split(jax.random.key(seed), 4)
    return dict(obs=jax.random.normal(keys[0], (size, 2)), next_obs=jax.random.normal(keys[1], (size, 2)),
                action=jnp.tanh(jax.random.normal(keys[2], (size, 2))), reward=jax.random.normal(keys[3], (size,)),
                terminated=jnp.float32(jnp.arange(size) % 3 == 0))


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


def policy(params, obs, noise):  # action and log-probability by hand
    mean, log_std = jnp.split(mlp(params["MLP_0"], obs), 2, axis=1)
    u = mean + jnp.exp(log_std) * noise
    normal = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    return jnp.tanh(u), (normal - jnp.log(1 - jnp.tanh(u) ** 2)).sum(axis=1)


def test_losses_and_gradients_are_the_equations():
    env, config = make()
    agent, batch, key = an_agent(config, env), a_batch(), jax.random.key(3)
    noise = jax.random.normal(jax.random.clone(key), (6, 2))
    alpha = jnp.exp(agent.temperature.params["log"])

    def critic_by_hand(params):
        next_action, next_log_prob = policy(agent.actor.params, batch["next_obs"], noise)
        next_q = critics(agent.target_critic.params, batch["next_obs"], next_action)
        soft = jnp.minimum(next_q[0], next_q[1]) - alpha * next_log_prob
        y = batch["reward"] + 0.9 * jnp.where(batch["terminated"] == 1, 0.0, soft)
        q = critics(params, batch["obs"], batch["action"])
        return 0.5 * ((q[0] - y) ** 2).mean() + 0.5 * ((q[1] - y) ** 2).mean()

    def actor_by_hand(params):
        action, log_prob = policy(params, batch["obs"], noise)
        q = critics(agent.critic.params, batch["obs"], action)
        return (alpha * log_prob - jnp.minimum(q[0], q[1])).mean()

    for critic, obs in ((agent.critic, batch["obs"]), (agent.target_critic, batch["next_obs"])):
        first, second = jax.jit(lambda critic, obs: critics(
            critic.params, obs, policy(agent.actor.params, obs, noise)[0]))(critic, obs)
        assert 0 < (first < second).sum() < 6  # each of the two is the smaller one somewhere
    for loss, by_hand, params in ((agent.critic_loss, critic_by_hand, agent.critic.params),
                                  (agent.actor_loss, actor_by_hand, agent.actor.params)):
        (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, jax.random.clone(key))
        expected, slopes = jax.jit(jax.value_and_grad(by_hand))(params)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert_close(grads, slopes)
    entropy = jnp.float32(0.3)
    value, slope = jax.value_and_grad(lambda params: agent.temperature_loss(params, entropy)[0])(
        agent.temperature.params)
    np.testing.assert_allclose(value, alpha * (0.3 + 2 * 0.7), rtol=1e-5)
    np.testing.assert_allclose(slope["log"], value, rtol=1e-5)  # so α falls where the entropy is above its target


def test_what_the_log_says():
    env, config = make()
    agent, batch, key = an_agent(config, env), a_batch(), jax.random.key(3)
    loss, info = jax.jit(agent.critic_loss)(agent.critic.params, batch, jax.random.clone(key))
    assert info["critic_loss"] == loss
    q = jax.jit(critics)(agent.critic.params, batch["obs"], batch["action"])
    np.testing.assert_allclose(info["q"], q.mean(), rtol=1e-5)
    loss, info = jax.jit(agent.actor_loss)(agent.actor.params, batch, jax.random.clone(key))
    noise = jax.random.normal(key, (6, 2))
    assert info["actor_loss"] == loss
    log_prob = jax.jit(policy)(agent.actor.params, batch["obs"], noise)[1]
    np.testing.assert_allclose(info["entropy"], -log_prob.mean(), rtol=1e-4)
    _, info = agent.temperature_loss(agent.temperature.params, 0.0)
    np.testing.assert_allclose(info["temperature"], jnp.exp(agent.temperature.params["log"]), rtol=1e-6)


def test_an_update_takes_its_steps_in_order():
    """Critic, target critic, actor, temperature, each from what came before it, by plain Adam."""
    env, config = make()
    agent, batch, key = an_agent(config, env), a_batch(), jax.random.key(3)
    new, info = jax.jit(agent.update)(batch, jax.random.clone(key))
    critic_key, actor_key = jax.random.split(key)

    def adam(params, loss, *args):
        tx = optax.adam(2e-3)
        grads, info = jax.jit(jax.grad(loss, has_aux=True))(params, *args)
        return optax.apply_updates(params, tx.update(grads, tx.init(params))[0]), grads, info

    def assert_moved(state, params, grads):
        """The first step of Adam shows little but the sign of a gradient, its first moment all."""
        assert_close(state.params, params)
        assert_close(state.opt_state[0].mu, jax.tree.map(lambda g: 0.1 * g, grads))

    critic, grads, _ = adam(agent.critic.params, agent.critic_loss, batch, critic_key)
    assert_moved(new.critic, critic, grads)
    target = jax.tree.map(lambda new, old: 0.3 * new + 0.7 * old, critic, agent.target_critic.params)
    assert_close(new.target_critic.params, target)
    halfway = agent.replace(critic=agent.critic.replace(params=critic))
    actor, grads, actor_info = adam(agent.actor.params, halfway.actor_loss, batch, actor_key)
    assert_moved(new.actor, actor, grads)
    temperature, grads, _ = adam(agent.temperature.params, agent.temperature_loss, actor_info["entropy"])
    assert_moved(new.temperature, temperature, grads)
    assert set(info) == {"critic_loss", "q", "actor_loss", "entropy", "temperature"}


def test_a_target_depends_on_the_successor_only_where_the_episode_goes_on():
    env, config = make()
    agent, batch, key = an_agent(config, env), a_batch(), jax.random.key(3)

    def loss_of_row(row):
        return agent.critic_loss(agent.critic.params, jax.tree.map(lambda x: x[None], row), jax.random.clone(key))[0]

    error = jax.jit(jax.vmap(loss_of_row))
    changed = error(batch) != error(batch | dict(next_obs=batch["next_obs"] + 1.0))
    np.testing.assert_array_equal(changed, batch["terminated"] == 0)


def test_networks_start_as_the_config_says():
    env, config = make(log_std_bounds=(-1.5, 0.5))
    _, obs = env.reset(jax.random.key(5))
    agent = jax.jit(lambda key: sac.Agent.create(key, obs, env.action_space, config))(jax.random.key(0))
    np.testing.assert_allclose(agent.temperature(), 0.4, rtol=1e-6)
    assert_close(agent.target_critic.params, agent.critic.params, rtol=0)
    assert agent.target_critic.opt_state is None
    q = agent.critic(obs, jnp.zeros((3, 2)))
    assert q.shape == (2, 3) and not np.allclose(q[0], q[1])
    kernels = [layer["kernel"].shape for layer in agent.actor.params["MLP_0"].values()]
    assert kernels == [(2, 5), (5, 4), (4, 4)]
    wide = sac.Actor(2, (32,), config.log_std_bounds)
    dist, _ = wide.init_with_output(jax.random.key(0), 1e4 * jax.random.normal(jax.random.key(1), (50, 2)))
    assert dist.log_std.min() == -1.5 and dist.log_std.max() == 0.5


def stored(run):
    return {name: np.asarray(x)[:int(run.buffer.size)] for name, x in run.buffer.data.items()}


@functools.cache
def started():
    env, config = make()
    init_key, key = jax.random.split(jax.random.key(0))
    run = jax.jit(functools.partial(sac.init, source=env, config=config))(init_key)
    step = jax.jit(functools.partial(sac.train_step, source=env, config=config))
    return run, *step(run, key), env


def test_what_is_stored_is_what_happened():
    """Of random and of chosen actions: the environment got them stretched to its box, and moved by half of that."""
    _, run, _, env = started()
    data, centre, half = stored(run), np.float32([1, 1]), np.float32([2, 4])
    np.testing.assert_allclose(data["next_obs"], data["obs"] + 0.5 * (centre + half * data["action"]), atol=1e-5)
    np.testing.assert_allclose(data["reward"], 10 + data["next_obs"][:, 0], rtol=1e-5)
    first, second = data["obs"][:, :][0:3], data["obs"][3:6]  # of the three environments
    assert (np.abs(first) <= 0.1).all()
    np.testing.assert_allclose(second, data["next_obs"][0:3], rtol=1e-5)
    ends = np.arange(18) // 3 % 2 == 1  # the second step of each episode
    falls = np.tile(np.float32(first[:, 0] > 0), 6)[:18]
    np.testing.assert_array_equal(data["terminated"][:3], 0)
    np.testing.assert_array_equal(data["terminated"][3:6], falls[:3])
    assert set(data["terminated"]) == {0.0, 1.0} and not data["terminated"][~ends].any()
    again = data["obs"][6:9]  # a fresh episode
    assert (np.abs(again) <= 0.1).all() and not np.allclose(again, first)


def test_random_steps_come_first_and_count():
    """13 of them in three environments are four each."""
    run, after, _, _ = started()
    assert run.clock == (12, 0) and run.buffer.size == 12
    assert after.clock.env_steps == 18 and after.buffer.size == 18
    env, config = make(random_steps=600, buffer_size=600)
    action = stored(jax.jit(functools.partial(sac.init, source=env, config=config))(jax.random.key(1)))["action"]
    assert action.min() < -0.98 and action.max() > 0.98
    np.testing.assert_allclose(action.mean(axis=0), 0.0, atol=0.12)
    np.testing.assert_allclose(action.var(axis=0), 1 / 3, atol=0.05)


def test_a_step_makes_its_updates_from_all_of_the_buffer():
    """Two steps in three environments, two updates for each. A minibatch is drawn from what there is, the steps just
    taken included, and the actions are samples of the policy, not its mode."""
    run, after, info, env = started()
    assert after.clock.updates == 12
    assert after.agent.critic.opt_state[0].count == after.agent.actor.opt_state[0].count == 12
    assert np.isfinite([info[name] for name in ("critic_loss", "q", "actor_loss", "entropy", "temperature")]).all()
    data = stored(after)
    mode = run.agent.actor(data["obs"][12:15]).mode()
    assert (np.abs(data["action"][12:15] - mode) > 1e-3).all()
    seen = []
    config = run.agent.config

    def update(agent, batch, key):
        jax.debug.callback(lambda reward: seen.append(np.asarray(reward)), batch["reward"])
        return agent, {}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sac.Agent, "update", update)
        jax.jit(functools.partial(sac.train_step, source=env, config=config))(run, jax.random.key(4))
        jax.effects_barrier()
    assert len(seen) == 12 and all(len(x) == 4 for x in seen)
    known = set(np.concatenate(seen).tolist())
    assert len(known) > 12 and len({tuple(x) for x in seen}) == 12 and 0.0 not in known


def test_one_transition_a_step_does_not_copy_the_buffer():
    env, config = make(num_envs=1, num_steps=1, updates_per_step=1, random_steps=4, buffer_size=9973)
    run = jax.eval_shape(functools.partial(sac.init, source=env, config=config), jax.random.key(0))

    def train(run, key):
        def iteration(i, run):
            return sac.train_step(run, jax.random.fold_in(key, i), env, config)[0]

        return jax.lax.fori_loop(0, 3, iteration, run)

    with jax.debug_key_reuse(False):
        program = jax.jit(train, donate_argnums=0).lower(run, jax.random.key(0)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 9973 * 4  # one number of each transition


def test_acting_is_greedy_and_in_the_environments_units():
    run, *_ = started()
    obs = jax.random.normal(jax.random.key(2), (4, 2))
    carry, action = sac.act(run, (), obs, jax.random.key(0))
    mean, _ = jnp.split(mlp(run.agent.actor.params["MLP_0"], obs), 2, axis=1)
    np.testing.assert_allclose(action, np.float32([[1, 1]]) + np.float32([[2, 4]]) * jnp.tanh(mean), rtol=1e-4)
    assert carry == ()


class Goals(NamedTuple):
    """Observations are a dictionary; the reward is the distance to the goal, at once."""

    max_steps: int = 1
    action_space: Box = Box((-1.0,), (1.0,))

    def reset(self, key):
        obs = dict(goal=jax.random.uniform(key, (1,), minval=-0.5, maxval=0.5), state=jnp.zeros(2))
        return obs, obs

    def step(self, key, obs, action):
        reward = -jnp.square(action[0] - obs["goal"][0])
        return obs, TimeStep(obs, obs, reward, jnp.array(True), jnp.array(False), {})


LEARNING = dict(num_envs=4, num_steps=1, random_steps=40, env_steps=2000, buffer_size=2000, batch_size=64,
                hidden_dims=(32, 32), updates_per_step=1, lr=3e-3, target_entropy=-2.0, tau=0.05)


def train(env, iterations, **changes):
    env, config = make(env, **(LEARNING | changes))
    init_key, key = jax.random.split(jax.random.key(0))
    step = functools.partial(sac.train_step, source=env, config=config)
    run = jax.jit(functools.partial(sac.init, source=env, config=config))(init_key)
    return jax.jit(lambda run, keys: jax.lax.scan(step, run, keys))(run, jax.random.split(key, iterations))[0]


def test_a_dictionary_of_observations():
    """And the best action is found: the goal itself."""
    run = train(Goals(), 150)
    assert set(run.buffer.data["obs"]) == {"goal", "state"} and run.buffer.data["obs"]["state"].shape == (2000, 2)
    obs = dict(goal=jnp.float32([[-0.4], [0.0], [0.4]]), state=jnp.zeros((3, 2)))
    np.testing.assert_allclose(sac.act(run, (), obs, None)[1], obs["goal"], atol=0.1)


class Chain(NamedTuple):
    """Two steps, nothing to choose, reward 1 at the end; or, `forever`, reward 1 at every step, cut by a time limit."""

    forever: bool = False
    max_steps: int = 2
    action_space: Box = Box((-1.0,), (1.0,))

    def reset(self, key):
        return jnp.int32(0), jnp.zeros(1)

    def step(self, key, t, action):
        reward, last = jnp.where(self.forever, 1.0, jnp.float32(t == 1)), t == 1
        obs = jnp.zeros(1) if self.forever else jnp.ones(1)
        return t + 1, probes.time_step(obs, reward, last & (not self.forever), last & self.forever)


@pytest.mark.parametrize(("forever", "values"), [(False, [0.5, 1.0]), (True, [2.0])], ids=["end", "limit"])
def test_values_of_a_chain(forever, values):
    """With next to no temperature. A time limit is not the end: 1 / (1 − γ) = 2."""
    run = train(Chain(forever), 150, discount=0.5, init_temperature=1e-4)
    obs, action = jnp.float32([[0.0], [1.0]])[:len(values)], jnp.zeros((len(values), 1))
    np.testing.assert_allclose(run.agent.critic(obs, action), np.broadcast_to(values, (2, len(values))), atol=0.05)


@pytest.mark.parametrize(("space", "words"), [
    (probes.Discrete(2), "discrete actions"), (Box((-1.0, -1.0), (1.0, np.inf)), "actions without bounds")])
def test_what_sac_cannot_act_in(space, words):
    env, config = make(Line(action_space=space))
    with pytest.raises(UserError, match=f'sac cannot act in "gymnax/Pendulum-v1", which has {words}'):
        sac.init(jax.random.key(0), env, config)

