"""SHAPER's policy by hand, whole trials, a generation by its parts, and a task that needs the memory."""
import functools
import inspect
import operator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import good_shepherd, shaper
from core.envs import Batch, Discrete, TimeStep, make_env
from core.errors import UserError
from core.evaluation import evaluate

FILE = "algorithms/shaper.py"
PARENT, GRU, COMMON, WHOLE, GENERATION, ACTS, START, MISTAKES, OPTIMUM = (
    "test_the_rest_is_the_parent", "test_the_policy_by_hand", "test_luck_is_common", "test_a_trial_is_one_episode",
    "test_a_generation_by_its_parts", "test_a_trial_is_what_act_plays",
    "test_weights_are_the_members_numbers", "test_mistakes_are_named", "test_a_cue_is_remembered")
PLANTED_ERRORS = {  # and the test that has to notice
    "noise without pairs": (FILE, "jnp.concatenate([noise, -noise])", "jnp.concatenate([noise, noise])", PARENT),
    "fitness of the wrong sign": (FILE, "(rankdata(fitness) - 1)", "(rankdata(-fitness) - 1)", PARENT),
    "the best member for the mean": (FILE, "mean=self.mean + step",
        "mean=self.mean + self.config.noise_std * noise[fitness.argmax()]", PARENT),
    "a learning rate of its own": (FILE, "optax.adam(self.config.lr).update", "optax.adam(0.01).update", PARENT),
    "the memory is not kept": (FILE, "return memory, nn.Dense", "return 0 * memory, nn.Dense", GRU),
    "the memory is not used": (FILE, "nn.Dense(self.num_actions)(memory)", "nn.Dense(self.num_actions)(obs)", GRU),
    "each member has trials of its own": (FILE, "in_axes=(None, 0, None, None))(run.agent, members, trial_key, source)",
        "in_axes=(None, 0, 0, None))(run.agent, members, jax.random.split(trial_key, config.population), source)",
        COMMON),
    "the same trials in every generation": (FILE, "members, trial_key, source)", "members, jax.random.key(0), source)",
                                            GENERATION),
    "ranks from one environment": (FILE, "reward.sum(axis=1).mean(axis=1)", "reward.sum(axis=1)[:, 0]", GENERATION),
    "ranks from the last step": (FILE, "reward.sum(axis=1).mean(axis=1)", "reward[:, -1].mean(axis=1)", GENERATION),
    "the best member is reported": (FILE, "population_return=fitness.mean()", "population_return=fitness.max()",
                                    GENERATION),
    "members without σ": (FILE, "config.noise_std * noise\n", "noise\n", GENERATION),
    "members around zero": (FILE, "run.agent.mean[None] + config", "0 * run.agent.mean[None] + config", GENERATION),
    "one step for each trial": (FILE, "tick(lives.sum(), 1)", "tick(lives.shape[0] * lives.shape[2], 1)", GENERATION),
    "steps of full trials": (FILE, "tick(lives.sum(), 1)", "tick(lives.size, 1)", GENERATION),
    "rewards after an end": (FILE, "(ts.reward * lives, lives)", "(ts.reward, lives)", WHOLE),
    "the last reward is lost": (FILE, "(ts.reward * lives, lives)",
                                "(ts.reward * (lives & ~ended(ts)), lives)", WHOLE),
    "an end is forgotten": (FILE, "memory, lives & ~ended(ts))", "memory, ~ended(ts))", WHOLE),
    "co-players alike": (FILE, "jax.random.split(reset_key, source.num_envs)",
                         "jnp.broadcast_to(reset_key, (source.num_envs,))", WHOLE),
    "environments draw alike": (FILE, "jax.random.split(env_key, source.num_envs)",
                                "jnp.broadcast_to(env_key, (source.num_envs,))", WHOLE),
    "every trial acts alike": (FILE, "jax.random.categorical(act_key, logits)",
                               "jax.random.categorical(act_key, logits[0], shape=(source.num_envs,))", ACTS),
    "the most likely action in training": (FILE, "jax.random.categorical(act_key, logits)", "logits.argmax(axis=1)",
                                           WHOLE),
    "the memory starts afresh in each step": (FILE, "memory, logits = agent.policy.apply(weights, memory, obs)",
        "memory, logits = agent.policy.apply(weights, 0 * memory, obs)", ACTS),
    "the first observation for ever": (FILE, "return (state, ts.obs, memory,", "return (state, obs, memory,", ACTS),
    "the mean plays for the member": (FILE, "agent.weights(member)", "agent.weights(agent.mean)", ACTS),
    "the memory starts at one": (FILE, "    return jnp.zeros((num_envs, run.agent.config.memory_dim))",
                                 "    return jnp.ones((num_envs, run.agent.config.memory_dim))", ACTS),
    "act keeps no memory": (FILE, "carry, logits = run.agent", "_, logits = run.agent", ACTS),
    "seeds start alike": (FILE, "policy.init(key, jnp.zeros", "policy.init(jax.random.key(0), jnp.zeros", START),
    "weights start at zero": (FILE, "return cls(mean, optax", "return cls(0 * mean, optax", START),
    "an odd population": (FILE, "if config.population % 2:", "if False:", MISTAKES),
    "any environment will do": (FILE, 'actions=(Discrete,), offers=("reset",)', "actions=(Discrete,)", MISTAKES),
}


class Cue(NamedTuple):
    """The first observation is a cue, −1 or 1; then only zeros. From the second step on, action 1 has reward 1 where
    the cue was 1, and action 0 where it was −1. A trial has a number of steps, 2 to 4, that is drawn; luck is added to
    every reward, and drawn in every step. Steps after the end pay 100."""

    luck: float = 0.0
    ends: bool = True
    max_steps: int = 4
    action_space: Discrete = Discrete(2)

    def reset(self, key):
        cue_key, length_key = jax.random.split(key)
        length = jax.random.randint(length_key, (), 2, 5) if self.ends else jnp.int32(4)
        cue = jax.random.rademacher(cue_key, (), jnp.float32)
        return (cue, length, jnp.int32(0)), cue[None]

    def step(self, key, state, action):
        cue, length, t = state
        right = jnp.where((t > 0) & (action == (cue > 0)), 1.0, 0.0) + self.luck * jax.random.normal(key)
        reward = jnp.where(t < length, right, 100.0)
        return (cue, length, t + 1), TimeStep(jnp.zeros(1), jnp.zeros(1), reward, t + 1 == length, jnp.bool_(False), {})


def make_config(**changes):
    config = shaper.get_config()
    config.update(dict(memory_dim=4) | changes)
    return ml_collections.FrozenConfigDict(config.to_dict())


def start(config, source, size=1.0):
    """The run, its weights `size` times as large."""
    run = jax.jit(functools.partial(shaper.init, source=source, config=config))(jax.random.key(3))
    return run._replace(agent=run.agent.replace(mean=size * run.agent.mean))


@functools.partial(jax.jit, static_argnames=("source", "config", "generations"))
def evolve(key, run, source, config, generations):
    def generation(run, key):
        return shaper.train_step(run, key, source, config)

    return jax.lax.scan(generation, run, jax.random.split(key, generations))


@pytest.mark.parametrize("name", ["Agent.draw", "Agent.update", "shape", "Run"])
def test_the_rest_is_the_parent(name):
    """Word for word, so that the tests of the parent are tests of the child."""
    own, parent = (inspect.getsource(operator.attrgetter(name)(module)) for module in (shaper, good_shepherd))
    assert own.replace("(P, D)", "(P, A)") == parent


def test_the_policy_by_hand():
    """Cho's cell: h' = (1 − z) n + z h, n = tanh(W x + b + r (U h + c))."""
    run, rng = start(make_config(), make_env("tabular_coplayer", 2)), np.random.default_rng(0)
    member, memory, obs = rng.normal(size=run.agent.mean.size), rng.normal(size=(3, 4)), rng.normal(size=(3, 5))
    weights = run.agent.weights(jnp.float32(member))
    after, logits = run.agent.policy.apply(weights, jnp.float32(memory), jnp.float32(obs))
    cell, head = (jax.tree.map(np.float64, weights["params"][name]) for name in ("GRUCell_0", "Dense_0"))

    def gate(of_input, of_memory):
        total = obs @ cell[of_input]["kernel"] + cell[of_input]["bias"] + memory @ cell[of_memory]["kernel"]
        return 1 / (1 + np.exp(-total))

    r, z = gate("ir", "hr"), gate("iz", "hz")
    new = np.tanh(obs @ cell["in"]["kernel"] + cell["in"]["bias"]
                  + r * (memory @ cell["hn"]["kernel"] + cell["hn"]["bias"]))
    expected = (1 - z) * new + z * memory
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, expected @ head["kernel"] + head["bias"], rtol=1e-4, atol=1e-5)


def test_weights_are_the_members_numbers():
    """All of them, each once; seeds start with their own."""
    source, config = make_env("tabular_coplayer", 2), make_config()
    run = start(config, source)
    numbers = jnp.arange(run.agent.mean.size, dtype=jnp.float32)
    leaves = [np.ravel(x) for x in jax.tree.leaves(run.agent.weights(numbers))]
    np.testing.assert_array_equal(np.sort(np.concatenate(leaves)), numbers)
    assert run.agent.mean.size == 3 * (5 * 4 + 4) + 3 * 4 * 4 + 4 + 4 * 2 + 2
    other = jax.jit(functools.partial(shaper.init, source=source, config=config))(jax.random.key(4))
    assert np.mean(run.agent.mean != other.agent.mean) > 0.8 and np.mean(run.agent.mean != 0) > 0.8


def test_luck_is_common():
    """Members that are almost alike meet the same co-players, and the same random numbers decide what they do: they
    earn the same, to the last bit, and the mean stays."""
    source, config = make_env("tabular_coplayer", 1, games=2, rounds=5), make_config(population=8, noise_std=1e-9)
    run = start(config, source)
    after, info = evolve(jax.random.key(0), run, source, config, 3)
    np.testing.assert_array_equal(info["grad_norm"], 0)
    np.testing.assert_array_equal(after.agent.mean, run.agent.mean)
    assert len(np.unique(info["population_return"])) > 1  # and drawn anew


def test_a_trial_is_one_episode():
    source = Batch(Cue(luck=0.1), 400)
    agent = start(make_config(), source, 0.0).agent  # so both actions are equally likely
    reward, lives = jax.jit(lambda key: shaper.trials(agent, agent.mean, key, source))(jax.random.key(0))
    assert reward.shape == lives.shape == (4, 400)
    length = np.asarray(lives.sum(axis=0))
    assert set(length) == {2, 3, 4}
    np.testing.assert_array_equal(lives, np.arange(4)[:, None] < length[None])
    assert (np.where(lives, 0, reward) == 0).all()
    luck = np.asarray(reward)[np.asarray(lives)] - np.round(reward)[np.asarray(lives)]
    assert len(np.unique(luck)) > 0.9 * len(luck) and abs(np.asarray(reward)[1].mean() - 0.5) < 0.1
    assert abs(np.asarray(reward)[length - 1, np.arange(400)].mean() - 0.5) < 0.1  # the last step is paid
    assert 0.3 < (np.round(reward)[1] == np.round(reward)[2])[length > 2].mean() < 0.7  # chance decides in each step


def test_a_trial_is_what_act_plays():
    """With weights so large that hardly any choice is left: the same returns on the same co-players, from a loop."""
    source, config = Batch(Cue(ends=False), 200), make_config()
    agent = start(config, source, 30.0).agent
    member = agent.mean + 1.0
    run = shaper.Run(agent.replace(mean=member), None)
    carry = shaper.initial_carry(run, 200)
    act, step = jax.jit(functools.partial(shaper.act, run)), jax.jit(jax.vmap(source.env.step, (None, 0, 0)))
    with jax.debug_key_reuse(False):
        reward, _ = jax.jit(lambda key: shaper.trials(agent, member, key, source))(jax.random.key(1))
        reset_key, _ = jax.random.split(jax.random.key(1))
        state, obs = jax.vmap(source.env.reset)(jax.random.split(reset_key, 200))
    for t in range(4):
        carry, action = act(carry, obs, jax.random.key(t))
        state, ts = step(jax.random.key(0), state, action)
        assert np.mean(np.asarray(ts.reward) == np.asarray(reward[t])) > 0.95
        obs = ts.obs
    assert 0 < reward[1:].mean() < 1 and len(np.unique(np.asarray(reward).sum(axis=0))) > 1
    undecided = start(config, source, 0.0)
    action = shaper.act(undecided, shaper.initial_carry(undecided, 400), jnp.zeros((400, 1)), jax.random.key(0))[1]
    assert 0.4 < action.mean() < 0.6


def test_a_generation_by_its_parts():
    source, config = Batch(Cue(luck=0.5), 3), make_config(population=6, noise_std=0.4)
    run, steps = start(config, source), 0
    for key in jax.random.split(jax.random.key(4)):
        with jax.debug_key_reuse(False):
            noise_key, trial_key = jax.random.split(key)
            noise = run.agent.draw(noise_key)
            play = jax.jit(lambda agent, member, key: shaper.trials(agent, member, key, source))
            played = [play(run.agent, run.agent.mean + 0.4 * x, trial_key) for x in noise]
            fitness = jnp.stack([reward.sum(axis=0).mean() for reward, _ in played])
            expected, _ = run.agent.update(noise, fitness)
            run, info = jax.jit(lambda run, key: shaper.train_step(run, key, source, config))(run, key)
        np.testing.assert_allclose(run.agent.opt_state[0].mu, expected.opt_state[0].mu, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(info["population_return"], fitness.mean(), rtol=1e-5)
        steps += sum(int(lives.sum()) for _, lives in played)
    assert (run.clock.env_steps, run.clock.updates) == (steps, 2) and steps < 2 * 6 * 4 * 3


def test_a_cue_is_remembered():
    """Without a memory half of the later actions are right, 1.5; with it all three."""
    source, config = Batch(Cue(ends=False), 8), make_config(population=32, lr=0.1, noise_std=0.2)
    run, _ = evolve(jax.random.key(0), start(config, source), source, config, 80)
    test = Batch(Cue(ends=False), 256)
    returns, _ = jax.jit(lambda run, key: evaluate(functools.partial(shaper.act, run), test, key,
                                                   shaper.initial_carry(run, 256)))(run, jax.random.key(1))
    assert returns.mean() > 2.7


def test_a_seed_is_the_same_alone():
    source, config = make_env("tabular_coplayer", 2, games=2, rounds=4), make_config(population=4)
    keys = jax.random.split(jax.random.key(0), 3)
    with jax.debug_key_reuse(False):
        together = jax.jit(jax.vmap(lambda key: evolve(key, shaper.init(key, source, config), source, config, 3)[0]))(
            keys)
        alone, _ = evolve(keys[1], shaper.init(keys[1], source, config), source, config, 3)
    np.testing.assert_allclose(together.agent.mean[1], alone.agent.mean, rtol=1e-3, atol=1e-4)
    assert (together.clock.env_steps == 3 * 4 * 2 * 8).all()


def test_mistakes_are_named():
    source = make_env("tabular_coplayer", 1)
    with pytest.raises(UserError, match="population = 7: has to be even"):
        shaper.init(jax.random.key(0), source, make_config(population=7))
    for name, words in (("learning_coplayer", "continuous actions"), ("gymnasium/CartPole-v1", 'no "reset"'),
                        ("iterated_matrix_game", "several agents")):
        with pytest.raises(UserError, match=words):
            shaper.init(jax.random.key(0), make_env(name, 1), make_config(env=name))
