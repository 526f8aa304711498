"""PPO with a memory: what has to be remembered, gradients through time, and memories that agree everywhere."""
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import ppo_memory
from core.envs import Discrete, ended
from core.errors import UserError
from core.evaluation import evaluate
from tests import probes

FILE = "algorithms/ppo_memory.py"
RECALL, LIMIT, WHOLE, VALUES, TIME, RATIO, LOSS = (
    "test_the_first_observation_is_remembered", "test_a_time_limit_is_not_the_end",
    "test_memories_are_those_of_whole_episodes", "test_values_are_those_of_the_steps_that_follow",
    "test_gradients_flow_through_time_to_the_start_of_an_episode", "test_no_policy_has_moved_before_the_first_step",
    "test_the_loss_is_that_of_ppo")
PLANTED_ERRORS = {  # and the test that has to notice
    "the memory outlives its episode": (FILE, "jnp.where(first[:, None], 0.0, memory)", "memory + 0 * first[:, None]",
                                        TIME),
    "the memory is always empty": (FILE, "jnp.where(first[:, None], 0.0, memory)", "0 * memory", TIME),
    "no gradient through time": (FILE, "return memory, memory\n\n        return jax",
                                 "return jax.lax.stop_gradient(memory), memory\n\n        return jax", TIME),
    "an episode goes on after its end": (FILE, "memory=memory, first=ended(step)), out",
                                         "memory=memory, first=ended(step) & False), out", WHOLE),
    "a time limit keeps the memory": (FILE, "first=ended(step)), out", "first=step.terminated), out", LIMIT),
    "the memory is not kept": (FILE, "memory=memory, first=ended(step)), out", "first=ended(step)), out", WHOLE),
    "learning starts from the memory after the rollout": (
        FILE, "| dict(memory=before)", "| dict(memory=run.memory)", RATIO),
    "minibatches of memories of other environments": (FILE, "| dict(memory=before)", "| dict(memory=before[::-1])",
                                                      RATIO),
    "learning starts from nothing": (FILE, 'params, batch["memory"], batch', 'params, 0 * batch["memory"], batch',
                                     RATIO),
    "steps and environments exchanged": (FILE, "batch = jax.tree.map(lambda x: x.swapaxes(0, 1), batch) | dict",
        "batch = jax.tree.map(lambda x: x.reshape(x.shape[1], x.shape[0], *x.shape[2:]), batch) | dict", RATIO),
    "memories in the order of time": (FILE, "obs.swapaxes(0, 1)))[1].swapaxes(0, 1)",
                                      "obs.swapaxes(0, 1)))[1].reshape(*first.shape, -1)", RATIO),
    "the end of a rollout starts an episode": (FILE, "run.obs, run.first, memory, action", "run.obs, ended(step), "
                                               "memory, action", WHOLE),
    "a successor without the memory": (FILE, "run.agent.actor_critic(flat, jnp.zeros(len(flat), bool), seen",
                                       "run.agent.actor_critic(flat, jnp.ones(len(flat), bool), seen", VALUES),
    "the value of a step for that of its successor": (FILE, "for x in (flat, after)]", "for x in (flat, flat)]",
                                                      VALUES),
    "values exchanged": (FILE, "for x in (flat, after)]", "for x in (after, flat)]", VALUES),
    "the successor after the reset": (FILE, "values(run, memory, step.next_obs)", "values(run, memory, step.obs)",
                                      "test_the_first_update_bootstraps_from_the_true_successor"),
    "evaluation forgets": (FILE, "return memory, run.agent", "return carry, run.agent", WHOLE),
    "evaluation samples": (FILE, 'method="actor").mode()', 'method="actor").sample(seed=key)', WHOLE),
    "an episode starts with ones": (FILE, "return jnp.zeros((num_envs, run", "return jnp.ones((num_envs, run", WHOLE),
    "entropy punished": (FILE, "- self.config.entropy_coef * entropy", "+ self.config.entropy_coef * entropy", LOSS),
    "ratio not clipped": (FILE, "jnp.clip(ratio, 1 - self.config.clip, 1 + self.config.clip)", "ratio", LOSS),
    "steps of all environments in a minibatch": (FILE, "if config.num_envs % config.num_minibatches:",
        "if config.num_envs * config.num_steps % config.num_minibatches:", "test_an_environment_is_in_one_minibatch"),
}


class Recall(NamedTuple):
    """Two or three steps. Only the first observation shows a sign; the reward is 1 for naming it at the last step. That
    is an end, or a limit whose observation has a mark."""

    limit: bool = False
    max_steps: int = 3
    action_space: Discrete = Discrete(2)

    def reset(self, key):
        sign_key, length_key = jax.random.split(key)
        sign = jax.random.rademacher(sign_key, (1,), jnp.float32)
        return (sign, jax.random.randint(length_key, (), 0, 2)), sign

    def step(self, key, state, action):
        sign, t = state
        last = t == 2
        return (sign, t + 1), probes.time_step(
            jnp.where(last & self.limit, jnp.full(1, 5.0), 0.0), last & (action == (sign[0] > 0)),
            terminated=last & (not self.limit), truncated=last & self.limit)


CONFIG = dict(num_envs=16, num_steps=12, env_steps=16 * 12 * 60, hidden_dims=(8,), memory_dim=8, lr=1e-2,
              num_minibatches=2)


def make_config(**changes):
    config = ppo_memory.get_config()
    config.update(CONFIG | changes)
    return ml_collections.FrozenConfigDict(config)


@pytest.fixture(autouse=True)
def loose_ranks(strict_ranks):
    with jax.numpy_rank_promotion("allow"):  # distrax broadcasts where it samples
        yield


def train(env, **changes):
    config = make_config(**changes)
    source, (init_key, key) = probes.batch(env, config.num_envs), jax.random.split(jax.random.key(0))
    step = functools.partial(ppo_memory.train_step, source=source, config=config)
    keys = jax.random.split(key, config.env_steps // (config.num_envs * config.num_steps))
    return jax.jit(lambda run, keys: jax.lax.scan(step, run, keys)[0])(ppo_memory.init(init_key, source, config), keys)


def test_the_first_observation_is_remembered():
    run = train(Recall())
    returns, _ = jax.jit(lambda key: evaluate(functools.partial(ppo_memory.act, run), probes.batch(Recall(), 64), key,
                                              ppo_memory.initial_carry(run, 64)))(jax.random.key(7))
    np.testing.assert_array_equal(returns, 1)


def test_a_time_limit_is_not_the_end():
    """Reward 1 for ever has the value 1 / (1 − γ), also right before the limit."""
    run, memory = train(probes.Clock(), discount=0.5, gae_lambda=0.5), jnp.zeros((1, 8))
    for t in range(3):
        memory = run.agent.actor_critic(memory, jnp.array([t == 0]), jnp.full((1, 1), float(t)), method="remember")
        np.testing.assert_allclose(run.agent.actor_critic(memory, method="critic"), 2.0, atol=0.15)


class Started(NamedTuple):
    run: ppo_memory.Run  # in the middle of episodes, with a policy that is far from uniform
    after: ppo_memory.Run  # one training step later, in tiny steps of the optimiser
    info: dict
    rolled: tuple  # what a rollout from `run` gives


@functools.cache
def started():
    config = make_config(num_steps=4, lr=1e-9, num_minibatches=4)
    source = probes.batch(Recall(limit=True), 16)
    run = ppo_memory.init(jax.random.key(1), source, config)
    params = jax.tree.map(jnp.copy, run.agent.actor_critic.params)
    params["policy"]["Dense_0"]["kernel"] *= 1000
    run = run._replace(agent=run.agent.replace(actor_critic=run.agent.actor_critic.replace(params=params)))
    step = jax.jit(lambda run, key: ppo_memory.train_step(run, key, source, config))
    run, _ = step(run, jax.random.key(2))
    return Started(run, *step(run, jax.random.key(3)), jax.jit(lambda run, key: ppo_memory.rollout(
        run, key, source, config))(run, jax.random.split(jax.random.key(3))[0]))  # the one of that step


def test_memories_are_those_of_whole_episodes():
    """Of acting, of learning, and of evaluation: step by step from zero where an episode starts."""
    run, _, _, (after, (obs, first, memory, *_, step)) = started()
    assert memory.shape == (4, 16, 8) and first.any() and not first.all()
    np.testing.assert_array_equal(first[1:], ended(step)[:-1])
    np.testing.assert_array_equal(after.first, ended(step)[-1])
    np.testing.assert_array_equal(after.memory, memory[-1])
    again = run.agent.recall(run.agent.actor_critic.params, run.memory, first.swapaxes(0, 1), obs.swapaxes(0, 1))
    np.testing.assert_allclose(again.swapaxes(0, 1), memory, atol=1e-6)
    t, e = np.argwhere(np.asarray(first[:2]))[0]
    carry = ppo_memory.initial_carry(run, 1)
    np.testing.assert_array_equal(carry, np.zeros((1, 8)))
    for k in range(t, t + 2):
        carry, action = ppo_memory.act(run, carry, obs[k, e][None], None)
        np.testing.assert_allclose(carry[0], memory[k, e], atol=1e-6)
        dist = run.agent.actor_critic(memory[k, e][None], method="actor")
        np.testing.assert_array_equal(action, dist.probs.argmax(axis=-1))


def test_values_are_those_of_the_steps_that_follow():
    run, _, _, (_, (_, _, memory, *_, step)) = started()
    value, after = ppo_memory.values(run, memory, step.next_obs)
    assert value.shape == after.shape == (4, 16)
    np.testing.assert_allclose(value[0], run.agent.actor_critic(memory[0], method="critic"), rtol=1e-5)
    goes_on = ~np.asarray(ended(step))[:-1]
    np.testing.assert_allclose(after[:-1][goes_on], value[1:][goes_on], rtol=1e-4, atol=1e-6)
    assert goes_on.any() and (np.abs(after[:-1] - value[1:])[~goes_on] > 1e-5).any()


def test_gradients_flow_through_time_to_the_start_of_an_episode():
    run = started().run
    first = jnp.zeros((1, 5), bool).at[0, 2].set(True)
    obs = jax.random.normal(jax.random.key(0), (1, 5, 1))

    def slope(t):
        return jax.jit(jax.grad(lambda memory, obs: run.agent.recall(
            run.agent.actor_critic.params, memory, first, obs)[0, t].sum(), argnums=(0, 1)))(run.memory[:1], obs)

    by_memory, by_obs = slope(1)
    assert (np.abs(by_memory) > 1e-7).any() and (by_obs[0, :2] != 0).all() and (by_obs[0, 2:] == 0).all()
    by_memory, by_obs = slope(4)
    assert (by_memory == 0).all() and (by_obs[0, :2] == 0).all() and (by_obs[0, 2:] != 0).all()


def rollout_as_a_batch(rolled, memory):
    _, (obs, first, _, action, log_prob, step) = rolled
    batch = dict(obs=obs, first=first, action=action, log_prob=log_prob, value=step.reward, advantage=step.reward)
    return {k: x.swapaxes(0, 1) for k, x in batch.items()} | dict(memory=memory)


def test_no_policy_has_moved_before_the_first_step():
    """Where the optimiser's steps are tiny all ratios stay 1, in each minibatch of each epoch: memories, steps and
    environments fit."""
    run, after, info, rolled = started()
    assert abs(info["approx_kl"]) < 1e-7 and info["clipped"] == 0
    assert (after.clock.env_steps, after.clock.updates) == (2 * 16 * 4, 2 * 4 * 4)
    params = run.agent.actor_critic.params
    assert abs(run.agent.loss(params, rollout_as_a_batch(rolled, run.memory))[1]["approx_kl"]) < 1e-7
    assert run.agent.loss(params, rollout_as_a_batch(rolled, run.memory[::-1]))[1]["approx_kl"] > 1e-5


def test_the_first_update_bootstraps_from_the_true_successor():
    """Then V is still V_old, and the value loss is ½ E[A²]: A by hand, with the memory of the end of an episode."""
    run, _, info, (_, (_, first, memory, *_, step)) = started()
    value, next_value = (np.float64(x) for x in ppo_memory.values(run, memory, step.next_obs))
    advantage, later = np.zeros(value.shape), 0.0
    for t in reversed(range(4)):
        delta = step.reward[t] + 0.99 * next_value[t] - value[t]
        advantage[t] = later = delta + 0.99 * 0.95 * ~np.asarray(step.truncated[t]) * later
    assert step.truncated.any() and not step.terminated.any()
    np.testing.assert_allclose(info["value_loss"], 0.5 * np.square(advantage).mean(), rtol=1e-3)


def test_the_loss_is_that_of_ppo():
    """Of the same distributions and values, by hand."""
    run, _, _, rolled = started()
    memory, log_prob = rolled[1][2], rolled[1][4]
    rng, flat = np.random.default_rng(0), np.asarray(memory).reshape(-1, 8)
    old, old_value, advantage = (rng.normal(size=64).astype(np.float32) for _ in range(3))
    old = np.asarray(log_prob).ravel() + 0.3 * old
    batch = rollout_as_a_batch(rolled, run.memory) | {
        k: x.reshape(4, 16).T for k, x in dict(log_prob=old, value=old_value, advantage=advantage).items()}
    loss, info = run.agent.loss(run.agent.actor_critic.params, batch)
    value, ratio = np.asarray(run.agent.actor_critic(flat, method="critic")), np.exp(np.ravel(log_prob) - old)
    p = np.asarray(run.agent.actor_critic(flat, method="actor").probs)
    A = (advantage - advantage.mean()) / advantage.std()
    actor = -np.minimum(ratio * A, np.clip(ratio, 0.8, 1.2) * A).mean()
    target = advantage + old_value
    clipped = old_value + np.clip(value - old_value, -0.2, 0.2)
    critic = 0.5 * np.maximum((value - target)**2, (clipped - target)**2).mean()
    entropy = -(p * np.log(p)).sum(axis=1).mean()
    np.testing.assert_allclose(info["actor_loss"], actor, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(info["value_loss"], critic, rtol=1e-3)
    np.testing.assert_allclose(loss, actor + 0.5 * critic - 0.01 * entropy, rtol=1e-3, atol=1e-5)


def test_an_environment_is_in_one_minibatch():
    with pytest.raises(UserError, match="num_envs = 16 is not divisible by num_minibatches = 3"):
        ppo_memory.init(jax.random.key(0), probes.batch(Recall(), 16), make_config(num_minibatches=3))
