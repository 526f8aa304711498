"""Environments on the host against their own physics, recounted episodes, and a simulator that echoes."""
import functools
import importlib.util
import os
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from algorithms import ppo
from core import checkpoint
from core.dataset import Dataset, ReplayBuffer
from core.envs import from_gymnasium, make_env
from core.errors import UserError
from core.evaluation import evaluate, score
from launchers import cli
from launchers.collect import collect
from launchers.evaluate import evaluate_run
from launchers.train import means_of
from tests.test_mistakes import run_program

gymnasium = pytest.importorskip("gymnasium")

FILE, COSTS = "core/envs/from_gymnasium.py", "core/envs/mujoco_costs.py"
CLI, EVALUATION = "launchers/cli.py", "core/evaluation.py"
DEVICES, RECYCLED, DICT, FINITE, LINE, OWN, SUCCESS, NOISE, DATA, LIMIT, SCREEN, FIRST, DRAWN = (
    "test_seeds_on_two_devices_are_as_on_one", "test_simulators_of_keys_long_unused_are_taken_again",
    "test_a_dictionary_of_observations_keeps_its_parts", "test_a_number_that_is_not_finite_is_named",
    "test_a_simulation_that_diverges_ends_in_one_line", "test_an_error_of_a_simulator_keeps_its_traceback",
    "test_an_episode_succeeds_once", "test_mujoco_s_deprecations_are_silent", "test_dictionaries_go_through_data_sets",
    "test_the_time_limit_of_dm_control_is_known", "test_mujoco_draws_without_a_screen",
    "test_success_of_the_episode_that_is_played_counts_alone", "test_the_key_fixes_what_is_drawn_before_the_seed")
LOST, AGAIN, SEEDS = (
    "test_episodes_lost_with_their_process_start_afresh", "test_a_call_that_is_repeated_gives_the_same_step",
    "test_seeds_under_vmap_are_simulated_as_alone")
PENDULUM, REACHER, CHEETAH, UNKNOWN = (
    "test_the_planner_is_told_what_the_inverted_pendulum_pays", "test_the_planner_is_told_what_the_reacher_pays",
    "test_the_planner_is_told_nearly_what_the_half_cheetah_pays", "test_a_cost_that_is_not_known_is_refused")
PLANTED_ERRORS = {
    "successor is the reset observation": (FILE, "put(steps.obs, at, env.reset()[0])",
                                           "put(steps.next_obs, at, env.reset()[0])"),
    "no reset": (FILE, "put(steps.obs, at, env.reset()[0])", "env.reset()"),
    "flags swapped": (FILE, "reward, terminated, truncated and not terminated)",
                      "reward, truncated and not terminated, terminated)"),
    "end at the limit counted twice": (FILE, "truncated and not terminated", "truncated"),
    "episodes counted at terminations alone": (FILE, "if terminated or truncated:", "if terminated:"),
    "return goes on": (FILE, "= 0.0, 0, False", "= self.totals[i], 0, False"),
    "length goes on": (FILE, "= 0.0, 0, False", "= 0.0, self.lengths[i], False"),
    "one seed for all copies": (FILE, "env.reset(seed=seeds[i])[0]", "env.reset(seed=seeds[0])[0]"),
    "unseeded": (FILE, "env.reset(seed=seeds[i])[0]", "env.reset()[0]"),
    "key ignored": (FILE, "SeedSequence([*key, clock])", "SeedSequence([clock])"),
    "actions not clipped": (FILE, "np.clip(action.reshape(-1, *space.shape), space.low, space.high)",
                            "action.reshape(-1, *space.shape)"),
    "actions start at zero": (FILE, "(action + space.start)", "action"),
    "actions mixed": (FILE, "env.step(actions[i])", "env.step(actions[-1 - i])"),
    "lost episodes go on": (FILE, "if (key, clock) == (self.key, self.clock):", "if self.key == key:", LOST),
    "lost episodes of another key go on": (FILE, "if (key, clock) == (self.key, self.clock):",
                                           "if clock == self.clock:", RECYCLED),
    "lost episodes start as at first": (FILE, "self.reset(key, clock, steps.obs", "self.reset(key, 0, steps.obs", LOST),
    "lost episodes have no successor": (FILE, "np.copyto(new[seed], old[seed]), steps.next_obs", "None, steps.next_obs",
                                        LOST),
    "lost episodes are terminations": (FILE, "steps.truncated[seed] = True", "steps.terminated[seed] = True", LOST),
    "clock stands": (FILE, "self.clock, self.last = clock + 1", "self.clock, self.last = clock"),
    "a call repeated is a step": (FILE, "if self.last is not None and", "if False and", AGAIN),
    "a call repeated by another seed": (FILE, "old[row])", "old[0])", AGAIN),
    "the last call outlives a reset": (FILE, "self.key, self.clock, self.last = key, clock, None",
                                       "self.key, self.clock = key, clock", AGAIN),
    "one set of simulators for all seeds": (FILE, "return self.simulators[key]",
                                            "return next(iter(self.simulators.values()))", SEEDS),
    "seeds share a key": (FILE, ".reset(key, 0, obs, i)", ".reset(keys[0], 0, obs, i)", SEEDS),
    "seeds share actions": (FILE, "self.to_host(row[:-3]", "self.to_host(words[0, :-3]", SEEDS),
    "seeds fill in one row": (FILE, "steps.reward[at], steps.term", "steps.reward[0, i], steps.term", SEEDS),
    "simulators by the place in the call": (FILE, "self._of(tuple(row[-3:-1].tolist()), len(words))",
                                            "[*self.simulators.values()][i]", DEVICES),
    "simulators are never taken again": (FILE, "if len(self.simulators) >= max", "if False and max", RECYCLED),
    "simulators in use are taken again": (FILE, "            self.simulators.move_to_end(key)\n", "", RECYCLED),
    "simulators of few keys are kept": (FILE, "max(KEYS_KEPT, 4 * num_seeds)", "1", RECYCLED),
    "few keys a seed are kept": (FILE, "max(KEYS_KEPT, 4 * num_seeds)", "KEYS_KEPT", RECYCLED),
    "the newest simulators are taken": (FILE, "popitem(last=False)", "popitem(last=True)", RECYCLED),
    "parts of observations in data are not compared": (CLI, "if found[name].shape[1:] != like.shape[1:]:",
                                                       "if False:", DATA),
    "parts that the environment has not": (CLI, "and name not in due]:", "and False]:", DATA),
    "parts of observations that lack": (CLI, "if name not in found:", "if False:", DATA),
    "parts of an observation mixed": (FILE, "x[at] = obs[name]", "x[at] = obs[min(obs)]", DICT),
    "parts of lost observations": (FILE, "parts = tree if isinstance(tree, dict) else", "parts =", FINITE),
    "observations are not checked": (FILE, "observation=steps.next_obs, reward", "reward", FINITE),
    "rewards are not checked": (FILE, ", reward=steps.reward)", ")", FINITE),
    "first observations are not checked": (FILE, "self.check(clocks, observation=obs)", "pass", FINITE),
    "observations after an end are not checked": (FILE, "self.check(clocks, observation=steps.obs)", "pass", FINITE),
    "infinity passes": (FILE, "not np.isfinite(x).all()", "np.isnan(x).any()", FINITE),
    "another copy is blamed": (FILE, "seed, copy, *entry =", "copy, seed, *entry =", FINITE),
    "JAX prints a traceback, too": (FILE, "return not (record.exc_info and", "return True or (record.exc_info and",
                                    LINE),
    "a traceback for a line": (CLI, "sys.exit(_fail(told[1]) if told else _fail_loudly(error))",
                               "sys.exit(_fail_loudly(error))", LINE),
    "a line for a traceback": (CLI, "sys.exit(_fail(told[1]) if told else _fail_loudly(error))",
                               'sys.exit(_fail(told[1] if told else "something"))', OWN),
    "the last step alone has success": (FILE, "self.succeeded[i] |= success(info)",
                                        "self.succeeded[i] = success(info)", SUCCESS),
    "success goes on": (FILE, "= 0.0, 0, False", "= 0.0, 0, self.succeeded[i]", SUCCESS),
    "success at every step": (FILE, """                if "success" in episode:
                    episode["success"][at]""", """            if "success" in episode:
                episode["success"][at]""", SUCCESS),
    "one word for success": (FILE, 'info.get("success", info.get("is_success", False))', 'info.get("success", False)',
                             SUCCESS),
    "everything reports success": (FILE, 'return "success" in info or "is_success" in info', "return True", SUCCESS),
    "success of the next episode": (EVALUATION, 'where(alive, ts.info["episode"][name], 0.0)',
                                    'ts.info["episode"][name]', FIRST),
    "success of the last copy alone": (EVALUATION, "x + where(alive, ts", "where(alive, ts", FIRST),
    "goals of Meta-World by chance": (FILE, 'if env.spec.namespace == "Meta-World":', "if False:", DRAWN),
    "packages are loud": (FILE, 'name.split("/")[0] in PACKAGES or spec', "spec", DRAWN),
    "no time limit of dm_control": (FILE, "int(theirs) if np.isfinite(theirs) else None", "None", LIMIT),
    "dm_control's limit before ours": (FILE, "simulator.spec.max_episode_steps or (", "None or (", LIMIT),
    "a screen is not looked for": (FILE, 'not os.environ.get("DISPLAY") and', "", SCREEN),
    "what was chosen is lost": (FILE, 'os.environ.setdefault("MUJOCO_GL", library.lower())',
                                'os.environ["MUJOCO_GL"] = library.lower()', SCREEN),
    "films of hosts need our pictures": (
        "launchers/evaluate.py", "host_renderer(env_name, settings)[1].close() if on_host else drawable(", "drawable(",
        LINE),
    "MuJoCo's deprecations": (FILE, 'if "deprecated" not in text:', "if True:", NOISE),
    "MuJoCo's other warnings are lost": (FILE, 'if "deprecated" not in text:', "if False:", NOISE),
    "MuJoCo's warnings stay ours": (FILE, "mujoco.set_mju_user_warning(before)", "pass", NOISE),
    "pendulum falls later": (COSTS, "<= 0.2)", "<= 0.25)", PENDULUM),
    "pendulum falls to one side": (COSTS, "jnp.abs(next_x[1])", "next_x[1]", PENDULUM),
    "pendulum of the old state": (COSTS, "jnp.abs(next_x[1])", "jnp.abs(x[1])", PENDULUM),
    "pendulum that is nowhere stands": (COSTS, "jnp.isfinite(next_x).all() & ", "", PENDULUM),
    "pendulum pays for falling": (COSTS, "return -(jnp.isfinite", "return (jnp.isfinite", PENDULUM),
    "reacher of the old state": (COSTS, "jnp.square(next_x[8:10])", "jnp.square(x[8:10])", REACHER),
    "reacher's distance squared": (COSTS, "jnp.sqrt(jnp.square(next_x[8:10]).sum())",
                                   "jnp.square(next_x[8:10]).sum()", REACHER),
    "reacher moves for free": (COSTS, "sum()) + jnp.square(action).sum()", "sum())", REACHER),
    "cheetah runs backwards": (COSTS, "- next_x[8]", "+ next_x[8]", CHEETAH),
    "cheetah of the old state": (COSTS, "- next_x[8]", "- x[8]", CHEETAH),
    "cheetah jumps": (COSTS, "- next_x[8]", "- next_x[9]", CHEETAH),
    "cheetah's effort": (COSTS, "0.1 * jnp.square(action)", "1.0 * jnp.square(action)", CHEETAH),
    "costs known whatever the settings": (FILE, ' and not kwargs.keys() - {"max_episode_steps"}', "", UNKNOWN),
    "a time limit is a setting": (FILE, ' - {"max_episode_steps"}', "", REACHER),
    "terminal cost": (FILE, "return jnp.zeros(())", "return jnp.ones(())", REACHER),
}


class Echo(gymnasium.Env):
    """The observation and the reward are the action that arrived."""

    def __init__(self, actions, observations=None):
        self.action_space = actions
        self.observation_space = observations or gymnasium.spaces.Box(-100, 100, (2,), np.float64)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.full(2, self.np_random.random()), {}

    def step(self, action):
        return np.broadcast_to(action, 2) / 3, float(np.sum(action)) / 3, False, False, {}


@pytest.fixture
def echo():
    gymnasium.register("Echo-v0", Echo, max_episode_steps=3)
    gymnasium.register("Endless-v0", Echo)
    yield functools.partial(make_env, "gymnasium/Echo-v0")
    del gymnasium.registry["Echo-v0"], gymnasium.registry["Endless-v0"]


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def play(key, env, policy, steps):
    """obs (T, E, ...) before each of `steps` steps, and the steps, stacked; the state and observation at the end."""
    def step(carry, t):
        env_state, obs = carry
        env_state, ts = env.step(key, env_state, policy(t, obs))
        return (env_state, ts.obs), (obs, ts)

    carry, (obs, ts) = jax.lax.scan(step, env.reset(key), jnp.arange(steps))
    return obs, ts, carry


def balance(t, obs):
    return (obs[:, 2] + obs[:, 3] > 0).astype(jnp.int32)


def fall(t, obs):
    return jnp.zeros(obs.shape[0], jnp.int32)


def check_statistics(ts):
    """Against a recount of rewards and flags."""
    done, reward = np.asarray(ts.terminated | ts.truncated), np.asarray(ts.reward, np.float64)
    assert not (ts.terminated & ts.truncated).any()
    for e in range(done.shape[1]):
        ends = np.flatnonzero(done[:, e])
        first = [0, *(ends[:-1] + 1)]
        totals = [reward[a:b + 1, e].sum() for a, b in zip(first, ends, strict=True)]
        episode = jax.tree.map(lambda x, e=e: np.asarray(x)[:, e], ts.info["episode"])
        np.testing.assert_array_equal(episode["count"], done[:, e])
        np.testing.assert_allclose(episode["return"][ends], totals, rtol=1e-6)
        np.testing.assert_array_equal(episode["length"][ends], ends - first + 1)
        assert not episode["return"][~done[:, e]].any() and not episode["length"][~done[:, e]].any()


def test_a_time_limit_keeps_the_true_successor():
    env = make_env("gymnasium/CartPole-v1", 2, max_episode_steps=5)
    assert (env.max_steps, env.action_space.n, env.on_host, env.num_agents) == (5, 2, True, None)
    obs, ts, (_, last) = play(jax.random.key(0), env, balance, 12)
    at_end = np.arange(12) % 5 == 4
    np.testing.assert_array_equal(ts.truncated, np.stack([at_end, at_end], 1))
    assert not ts.terminated.any()
    # Euler's method, as CartPole has it: positions move by the velocities before the step.
    np.testing.assert_allclose(ts.next_obs[..., 0], obs[..., 0] + 0.02 * obs[..., 1], atol=1e-6)
    np.testing.assert_allclose(ts.next_obs[..., 2], obs[..., 2] + 0.02 * obs[..., 3], atol=1e-6)
    np.testing.assert_array_equal(ts.obs[~at_end], ts.next_obs[~at_end])
    fresh = np.asarray(ts.obs[at_end])
    assert (np.abs(fresh) <= 0.05).all() and (np.abs(fresh - ts.next_obs[at_end]).max(-1) > 1e-3).all()
    assert len(np.unique(fresh)) == fresh.size
    np.testing.assert_array_equal(np.concatenate([obs[1:], last[None]]), ts.obs)
    check_statistics(ts)


def test_a_fall_is_a_termination_also_at_the_limit():
    _, ts, _ = play(jax.random.key(0), make_env("gymnasium/CartPole-v1", 2), fall, 60)
    assert ts.terminated.sum() >= 10 and not ts.truncated.any()
    check_statistics(ts)
    first = int(np.argmax(np.asarray(ts.terminated)[:, 0])) + 1
    _, again, _ = play(jax.random.key(0), make_env("gymnasium/CartPole-v1", 2, max_episode_steps=first), fall, first)
    assert again.terminated[-1, 0] and not again.truncated[-1, 0]
    check_statistics(again)


def test_the_key_fixes_the_episodes():
    env = make_env("gymnasium/CartPole-v1", 2)
    one, same, other = (play(jax.random.key(k), env, fall, 30) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (np.abs(one[0][0] - other[0][0]) > 1e-5).all()
    assert (np.abs(one[0][0, 0] - one[0][0, 1]) > 1e-5).all()  # the copies differ
    test = jax.jit(lambda key: evaluate(lambda carry, obs, key: (carry, balance(0, obs)), env, key))
    returns, length = test(jax.random.key(5))
    np.testing.assert_array_equal(returns, length)
    np.testing.assert_array_equal(test(jax.random.key(5))[0], returns)


def test_real_actions_arrive_clipped_and_floats_are_single(echo):
    env = echo(2, actions=gymnasium.spaces.Box(np.float32([-1, -2]), np.float32([1, 3])))
    assert env.action_space == ((-1.0, -2.0), (1.0, 3.0))
    actions = jnp.float32([[5, -5], [0.5, 2.5]])
    obs, ts, _ = play(jax.random.key(0), env, lambda t, obs: actions, 3)
    np.testing.assert_allclose(ts.next_obs[1], np.float32([[1, -2], [0.5, 2.5]]) / 3)
    np.testing.assert_allclose(ts.reward[1], np.float32([-1, 3]) / 3)
    assert (ts.obs.dtype, ts.reward.dtype, ts.info["episode"]["return"].dtype) == (jnp.float32,) * 3
    check_statistics(ts)


def test_discrete_actions_start_where_theirs_do(echo):
    env = echo(2, actions=gymnasium.spaces.Discrete(3, start=-1))
    _, ts, _ = play(jax.random.key(0), env, lambda t, obs: jnp.int32([0, 2]), 3)
    np.testing.assert_allclose(ts.reward[0] * 3, [-1, 1], rtol=1e-6)


def test_episodes_lost_with_their_process_start_afresh():
    """Of 2 seeds after a resume: one time limit that counts nothing, then fresh episodes, counted from zero."""
    keys, steps, actions = jax.random.split(jax.random.key(0), 2), 4, jnp.zeros((2, 2), jnp.int32)
    env, other = make_env("gymnasium/CartPole-v1", 2), make_env("gymnasium/CartPole-v1", 2)
    env_state = jax.jit(jax.vmap(lambda key: play(key, env, balance, steps)[2][0]))(keys)
    start, step = jax.jit(jax.vmap(other.reset))(keys)[1], jax.jit(jax.vmap(other.step))
    for state in (env_state, env_state._replace(clock=env_state.clock + 1, key=env_state.key + 1)):
        state, lost = step(keys, state, actions)
        assert lost.truncated.all() and not lost.terminated.any() and not lost.reward.any()
        assert not jax.tree.reduce(lambda a, b: a + b.sum(), lost.info, 0)
        np.testing.assert_array_equal(lost.obs, lost.next_obs)
        assert (np.abs(lost.obs) <= 0.05).all() and len(np.unique(np.stack([lost.obs, start]))) == 2 * start.size
    assert [int(clock) for clock in state.clock] == [6, 6]
    assert [simulators.clock for simulators in other.simulators.values()][-2:] == [6, 6]
    lengths = []
    for _ in range(40):
        state, ts = step(keys, state, actions)
        lengths.append(ts.info["episode"]["length"][0, 0])
    lengths = np.asarray(lengths)
    np.testing.assert_array_equal(lengths[lengths > 0][0], np.flatnonzero(lengths)[0] + 1)


def test_a_call_that_is_repeated_gives_the_same_step():
    """A reset by the same key forgets the call; after it the episodes go on."""
    env, keys = make_env("gymnasium/CartPole-v1", 2), jax.random.split(jax.random.key(0), 2)
    actions = jnp.ones((2, 2), jnp.int32)
    reset, step = jax.jit(jax.vmap(env.reset)), jax.jit(jax.vmap(env.step))
    state, obs = reset(keys)
    first = step(keys, state, actions)
    jax.tree.map(np.testing.assert_array_equal, step(keys, state, actions), first)
    assert not np.array_equal(first[1].obs[0], first[1].obs[1])
    again, same = reset(keys)
    np.testing.assert_array_equal(obs, same)
    jax.tree.map(np.testing.assert_array_equal, step(keys, again, actions), first)
    second = step(keys, first[0], actions)
    assert not second[1].truncated.any() and (second[1].obs != first[1].obs).all()


def test_seeds_under_vmap_are_simulated_as_alone():
    """In a loop whose length is an argument, and in an evaluation, where one seed ends before the other."""
    env, tests = make_env("gymnasium/CartPole-v1", 2), make_env("gymnasium/CartPole-v1", 3)

    def seed(key, steps):
        def step(i, state):
            (env_state, obs), total = state
            action = jax.random.randint(jax.random.fold_in(key, i), (2,), 0, 2)
            env_state, ts = env.step(key, env_state, action)
            return (env_state, ts.obs), total + ts.reward + 100 * ts.info["episode"]["return"] + 7 * ts.terminated

        played = jax.lax.fori_loop(0, steps, step, (env.reset(key), jnp.zeros(2)))
        return played, evaluate(lambda carry, obs, key: (carry, fall(0, obs)), tests, jax.random.fold_in(key, 999))

    keys = jax.random.split(jax.random.key(0), 3)
    with jax.debug_key_reuse(False):  # it misfires under vmap
        together, alone = jax.jit(jax.vmap(seed, (0, None)))(keys, 60), jax.jit(seed)
        for i in (2, 0, 1):
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[i], b), together, alone(keys[i], 60))  # noqa: B023
    assert len(np.unique(together[0][0][1])) == 3 * 2 * 4 and together[0][1].min() > 100
    (*_, one), (*_, other) = env.simulators.values(), tests.simulators.values()
    assert (len(env.simulators), len(one.envs), len(other.envs)) == (3, 2, 3)


def seed_alone(env):
    """(observations, rewards, returns of episodes) of a seed's steps in two copies, half of them one way."""
    def seed(key):
        action = jax.random.randint(key, (40, env.num_envs), 0, 2)
        _, ts, _ = play.__wrapped__(key, env, lambda t, obs: action[t], 40)
        return ts.next_obs, ts.reward, ts.info["episode"]["return"]

    return seed


def test_seeds_on_two_devices_are_as_on_one():
    """Each device calls the host with two of the four seeds."""
    env, keys = make_env("gymnasium/CartPole-v1", 2), jax.random.split(jax.random.key(0), 4)
    mesh = jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = PartitionSpec("devices")
    with jax.debug_key_reuse(False):
        together = jax.vmap(seed_alone(env))
        one = jax.device_get(jax.jit(together)(keys))
        spread = jax.shard_map(together, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        two = jax.jit(spread)(jax.device_put(keys, NamedSharding(mesh, split)))
    assert len(two[0].devices()) == 2 and one[2].max() > 5
    jax.tree.map(np.testing.assert_array_equal, one, jax.device_get(two))


def test_simulators_of_keys_long_unused_are_taken_again(monkeypatch):
    """Of four keys a seed those stay that were used last; one whose simulators are gone loses its episodes."""
    monkeypatch.setattr(from_gymnasium, "KEYS_KEPT", 2)
    env, action = make_env("gymnasium/CartPole-v1", 2), jnp.zeros(2, jnp.int32)
    keys, (reset, step) = jax.random.split(jax.random.key(0), 8), (jax.jit(env.reset), jax.jit(env.step))
    with jax.debug_key_reuse(False):  # each key names its simulators, again and again
        first, second = reset(keys[0])[0], reset(keys[1])[0]
        simulators = next(iter(env.simulators.values()))
        for key in keys[2:7]:
            reset(key)
            first, ts = step(key, first, action)
            assert not ts.truncated.any()
        assert len(env.simulators) == 4 and not env.spare and simulators in env.simulators.values()
        assert not step(keys[6], reset(keys[6])[0], action)[1].truncated.any()
        assert step(keys[1], second, action)[1].truncated.all()
        three = jax.random.split(keys[7], 3)
        states = jax.jit(jax.vmap(env.reset))(three)[0]
        assert len(env.simulators) == 7
        ts = jax.jit(jax.vmap(env.step))(three, states, jnp.zeros((3, 2), jnp.int32))[1]
        assert not ts.truncated.any()


class Reach(gymnasium.Env):
    """The place is the number of steps; the goal, which is drawn, is reached in passing."""

    action_space = gymnasium.spaces.Discrete(2)
    observation_space = gymnasium.spaces.Dict(
        image=gymnasium.spaces.Box(0, 255, (2, 3), np.uint8), goal=gymnasium.spaces.Box(-9, 9, (2,), np.float64),
        place=gymnasium.spaces.Box(-9, 99, (), np.float64))

    def __init__(self, word="is_success", spoilt=None, how=None):
        self.word, self.spoilt, self.how = word, spoilt, how

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.goal, self.place = self.np_random.uniform(1, 4, 2), 0.0
        return self.seen("first"), {}

    def seen(self, when):
        image = np.full((2, 3), 250 + self.place, np.uint8)
        obs = dict(image=image, goal=self.goal, place=np.float64(self.place))
        if self.spoilt == when:
            obs["goal"] = np.array([0, self.how])
        return obs

    def step(self, action):
        self.place += 1
        reward = self.how if self.spoilt == "reward" and self.place == 2 else self.place
        info = {self.word: float(self.place == 2 and action == 1)} if self.word else {}
        return self.seen({2: "middle", 4: "last"}.get(self.place, "other")), reward, False, False, info


@pytest.fixture
def reach():
    gymnasium.register("Reach-v0", Reach, max_episode_steps=4)
    yield functools.partial(make_env, "gymnasium/Reach-v0")
    del gymnasium.registry["Reach-v0"]


def test_a_dictionary_of_observations_keeps_its_parts(reach):
    env = reach(2)
    obs, ts, (state, last) = play(jax.random.key(0), env, fall_in_dict, 8)
    assert {name: (x.shape, str(x.dtype)) for name, x in last.items()} == {
        "image": ((2, 2, 3), "uint8"), "goal": ((2, 2), "float32"), "place": ((2,), "float32")}
    at_end = np.arange(8) % 4 == 3
    np.testing.assert_array_equal(ts.next_obs["place"][:, 1], [1, 2, 3, 4, 1, 2, 3, 4])
    np.testing.assert_array_equal(ts.obs["place"][:, 1], [1, 2, 3, 0, 1, 2, 3, 0])
    np.testing.assert_array_equal(ts.next_obs["image"][:, 1, 0, 2], [251, 252, 253, 254] * 2)
    goals, first = np.asarray(ts.obs["goal"]), np.asarray(obs["goal"][0])
    assert (goals[:3] == first).all() and (goals[3] != first).all() and len(np.unique(goals)) == 12
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new[~at_end], old[~at_end]), ts.obs, ts.next_obs)
    lost = jax.jit(reach(2).step)(jax.random.key(0), state, jnp.zeros(2, jnp.int32))[1]
    assert lost.truncated.all() and (lost.next_obs["image"] == 250).all()
    jax.tree.map(np.testing.assert_array_equal, lost.next_obs, lost.obs)
    test = jax.jit(lambda key: evaluate(lambda carry, obs, key: (carry, fall_in_dict(0, obs)), env, key))
    np.testing.assert_array_equal(test(jax.random.key(5))[0], [10, 10])


def test_dictionaries_go_through_data_sets(reach, tmp_path, monkeypatch):
    """Collected, written, read for the same environment, and kept by a replay buffer."""
    guess = SimpleNamespace(init=lambda key, env, config: jnp.zeros(()),
                            act=lambda run, carry, obs, key: (carry, fall_in_dict(0, obs)))
    monkeypatch.setattr(cli, "algorithm_of", lambda config: guess)
    config = ml_collections.ConfigDict(dict(
        algorithm="guess", env="gymnasium/Reach-v0", num_envs=2, collect=dict(episodes=3)))
    collect(config, workdir=tmp_path)
    file, env = str(tmp_path / "collect" / "data.npz"), reach(1)
    data = cli.read_dataset(file, env).data
    assert {name: x.dtype.name for name, x in data["next_obs"].items()} == dict(
        image="uint8", goal="float32", place="float32")
    np.testing.assert_array_equal(data["obs"]["place"], [0, 1, 2, 3] * 3)
    np.testing.assert_array_equal(data["next_obs"]["image"][:, 1, 2], [251, 252, 253, 254] * 3)
    assert len(np.unique(data["obs"]["goal"])) == 6
    batch = ReplayBuffer.from_dataset(Dataset.create(data), 20).sample(jax.random.key(0), 5)
    np.testing.assert_array_equal(batch["next_obs"]["place"], batch["obs"]["place"] + 1)
    for changes, words in (
            (dict(obs=data["obs"]["goal"]), 'has no "obs/goal"'),
            (dict(next_obs={k: v for k, v in data["next_obs"].items() if k != "place"}), 'has no "next_obs/place"'),
            (dict(obs=data["obs"] | dict(goal=np.zeros((12, 3)))), r"obs/goal \(3,\) where the environment has \(2,\)"),
            (dict(obs=data["obs"] | dict(wind=np.zeros(12))), '"obs/wind", which the environment has not')):
        Dataset.create(data | changes).save(tmp_path / "other.npz")
        with pytest.raises(UserError, match=words):
            cli.read_dataset(str(tmp_path / "other.npz"), env)


def fall_in_dict(t, obs):
    return jnp.zeros(len(obs["place"]), jnp.int32)


@pytest.mark.parametrize("word", ["is_success", "success", None])
def test_an_episode_succeeds_once(reach, word):
    """Copy 1 alone acts as the goal asks, in the second step of four, and in the second episode of three."""
    env = reach(2, word=word)
    assert env.reports_success == bool(word)
    _, ts, _ = play(jax.random.key(0), env, lambda t, obs: jnp.int32([0, (t >= 4) & (t < 8)]), 12)
    episode = ts.info["episode"]
    assert ("success" in episode) == bool(word)
    test = jax.jit(lambda key: evaluate(lambda carry, obs, key: (carry, jnp.int32([0, 1])), env, key))
    if word:
        np.testing.assert_array_equal(np.argwhere(episode["success"]), [[7, 1]])
        sums = jax.tree.map(lambda x: np.asarray(x).sum()[None], episode)
        assert means_of(dict(episode=sums), 12, None)["train_success"] == 1 / 6
        np.testing.assert_array_equal(test(jax.random.key(5))[2]["success"], [False, True])
        assert score(*test(jax.random.key(5))[:2], None, test(jax.random.key(5))[2])["success"] == 0.5
    else:
        assert len(test(jax.random.key(5))) == 2 and "success" not in score(*test(jax.random.key(5)), None)


def test_success_of_the_episode_that_is_played_counts_alone(monkeypatch):
    """Copies whose episodes ended early go on, with success, while the first one still plays."""
    gymnasium.register("Early-v0", Early, max_episode_steps=9)
    env = make_env("gymnasium/Early-v0", 3)
    test = jax.jit(lambda key: evaluate(lambda carry, obs, key: (carry, jnp.int32([0, 1, 2])), env, key))
    returns, length, told = test(jax.random.key(5))
    del gymnasium.registry["Early-v0"]
    np.testing.assert_array_equal(length, [9, 2, 2])
    np.testing.assert_array_equal(told["success"], [True, False, True])


class Early(gymnasium.Env):
    """Actions but 0 end the episode in its second step; action 1 has no success in the first episode."""

    action_space, observation_space = gymnasium.spaces.Discrete(3), gymnasium.spaces.Box(0, 9, (1,))
    episodes = 0

    def reset(self, seed=None, options=None):
        self.episodes, self.steps = 1 if seed is not None else self.episodes + 1, 0
        return np.zeros(1), {}

    def step(self, action):
        self.steps += 1
        success = action != 1 or self.episodes > 1
        return np.zeros(1), 0.0, action > 0 and self.steps == 2, False, {"success": success}


@pytest.mark.parametrize("spoilt, how, words", [
    ("first", np.nan, r'nan in the observation "goal" at \[1\], in step 0 of a seed, copy 0'),
    ("middle", -np.inf, r'-inf in the observation "goal" at \[1\], in step 2 of a seed, copy 0'),
    ("last", np.nan, r'nan in the observation "goal" at \[1\], in step 4 of a seed, copy 0'),
    ("reward", np.nan, "nan in the reward, in step 2 of a seed, copy 0"),
    ("late", np.inf, r'inf in the observation "goal" at \[1\], in step 4 of a seed, copy 1')])
def test_a_number_that_is_not_finite_is_named(reach, spoilt, how, words, monkeypatch):
    """In the first observation, in that of a step, in a reward, in the first one of the next episode."""
    if spoilt == "late":
        def reset(self, seed=None, options=None, ordinary=Reach.reset):
            obs, info = ordinary(self, seed, options)
            return (obs if seed is not None or self.word else obs | dict(goal=np.array([0, how]))), info

        monkeypatch.setattr(Reach, "reset", reset)
    env = reach(2, word="is_success", spoilt=spoilt, how=how)
    for simulator in env.spare[0].envs[1:]:
        simulator.unwrapped.word = None
    with pytest.raises(jax.errors.JaxRuntimeError, match=f'UserError: "gymnasium/Reach-v0" gave {words}'):
        jax.block_until_ready(play(jax.random.key(0), env, fall_in_dict, 6))


DIVERGES = '''
"""An environment that diverges, or fails, in its 31st step."""
import gymnasium
import numpy as np

from algorithms import ppo


class Diverges(gymnasium.Env):
    action_space, observation_space = gymnasium.spaces.Discrete(2), gymnasium.spaces.Box(0, 9, (2,))
    steps = 0

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, fails=False, render_mode=None):
        self.fails, self.render_mode = fails, render_mode

    def render(self):
        return np.full((20, 30, 3), 10 * self.steps, np.uint8)

    def reset(self, seed=None, options=None):
        self.steps = 0 if seed is not None else self.steps
        return np.zeros(2), {}

    def step(self, action):
        self.steps += 1
        if self.fails and self.steps > 30:
            raise KeyError("my own mistake")
        return np.array([0, np.nan if self.steps > 30 else 1.0]), 1.0, False, False, {}


def get_config():
    if "Diverges-v0" not in gymnasium.registry:
        gymnasium.register("Diverges-v0", Diverges, max_episode_steps=5)
    config = ppo.get_config()
    config.update(env="gymnasium/Diverges-v0", env_kwargs=dict(fails=False), num_envs=2, num_steps=8, hidden_dims=(4,))
    config.update(num_minibatches=1, num_epochs=1, env_steps=160, eval_every=16, eval_episodes=2)
    return config
'''


@pytest.mark.filterwarnings("ignore")
def test_a_simulation_that_diverges_ends_in_one_line(tmp_path, capfd):
    """The checkpoint before it is whole."""
    (tmp_path / "mine.py").write_text(DIVERGES)
    with jax.debug_key_reuse(False):
        status = run_program("train", [f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}",
                                       "--save_every=0"])
        said = capfd.readouterr().err.replace("\r", "\n").strip().splitlines()
        assert status == 2 and said[-1].startswith('error: "gymnasium/Diverges-v0" gave nan in the observation at [1]')
        assert not any("Traceback" in line for line in said) and sum("error" in line for line in said) == 1
        newest = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
        assert not list(tmp_path.rglob("*.partial")) and newest.stem == "step_000000000003"
        film = tmp_path / "film.gif"
        assert evaluate_run(run=str(newest), episodes=2, gif=str(film))["return"].tolist() == [5]
    with Image.open(film) as pictures:
        assert pictures.n_frames == 5 and pictures.size == (576 + 256, 384)


@pytest.mark.filterwarnings("ignore")
def test_an_error_of_a_simulator_keeps_its_traceback(tmp_path, capfd):
    (tmp_path / "mine.py").write_text(DIVERGES)
    with jax.debug_key_reuse(False):
        assert run_program("train", [f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}",
                                     "--config.env_kwargs.fails=True"]) == 1
    said = capfd.readouterr().err
    assert "Traceback" in said and "in step" in said and "KeyError: 'my own mistake'" in said


def test_mujoco_s_deprecations_are_silent(capfd, monkeypatch):
    """And nothing else: what MuJoCo warns of is told, and whoever listened before does so again."""
    mujoco = pytest.importorskip("mujoco")
    heard = []
    make_env("gymnasium/HalfCheetah-v5", 1)
    assert "settotalmass" not in "".join(capfd.readouterr())
    mujoco.set_mju_user_warning(heard.append)
    make_env("gymnasium/HalfCheetah-v5", 1)
    assert not heard and mujoco.get_mju_user_warning() == heard.append

    def warns(*args, **kwargs):
        mujoco.get_mju_user_warning()("deprecated")
        mujoco.get_mju_user_warning()("unstable")
        raise TypeError("made")

    monkeypatch.setattr(gymnasium, "make", warns)
    with pytest.raises(UserError, match="made"):
        make_env("gymnasium/HalfCheetah-v5", 1)
    mujoco.set_mju_user_warning(None)
    with pytest.raises(UserError, match="made"):
        make_env("gymnasium/HalfCheetah-v5", 1)
    assert heard == ["unstable"] and capfd.readouterr().err == "MuJoCo: unstable\n"


class Draws(Reach):
    """It draws the goal of an episode before it takes the seed, as Meta-World does, and MuJoCo warns at its start."""

    def __init__(self):
        super().__init__()
        if "mujoco" in sys.modules and (warn := sys.modules["mujoco"].get_mju_user_warning()):
            warn("deprecated and loud")

    def reset(self, seed=None, options=None):
        goal = self.np_random.uniform(1, 4, 2)
        obs, info = super().reset(seed=seed)
        self.goal = goal
        return obs | dict(goal=goal), info


def test_the_key_fixes_what_is_drawn_before_the_seed(monkeypatch, capfd):
    """Names that begin with a package's import it, and are as silent as its other environments."""
    monkeypatch.setitem(sys.modules, "metaworld", SimpleNamespace())
    gymnasium.register("Meta-World/Draws-v0", Draws, max_episode_steps=4)
    gymnasium.register("Draws-v0", Draws, max_episode_steps=4)
    mujoco = pytest.importorskip("mujoco")
    mujoco.set_mju_user_warning(print)
    try:
        goals = [jax.device_get(jax.jit(make_env(f"gymnasium/{name}", 2).reset)(jax.random.key(0))[1]["goal"])
                 for name in ("Meta-World/Draws-v0", "Meta-World/Draws-v0", "Draws-v0")]
    finally:
        mujoco.set_mju_user_warning(None)
        del gymnasium.registry["Meta-World/Draws-v0"], gymnasium.registry["Draws-v0"]
    np.testing.assert_array_equal(goals[0], goals[1])
    assert (goals[0] != goals[2]).any() and len(np.unique(goals[0])) == 4
    assert capfd.readouterr().out == 2 * "deprecated and loud\n"  # of the one that is no package's


def test_the_time_limit_of_dm_control_is_known(echo):
    """Gymnasium does not know it; a limit that was asked for goes before it."""
    box = gymnasium.spaces.Box(-1, 1, (2,))

    class Control(Echo):
        def __init__(self, limit):
            super().__init__(box)
            self._env = SimpleNamespace(_step_limit=limit)

    gymnasium.register("Control-v0", Control)
    assert make_env("gymnasium/Control-v0", 1, limit=1000.0).max_steps == 1000
    assert make_env("gymnasium/Control-v0", 1, limit=1000.0, max_episode_steps=7).max_steps == 7
    with pytest.raises(UserError, match="has no time limit"):
        make_env("gymnasium/Control-v0", 1, limit=np.inf)
    del gymnasium.registry["Control-v0"]


def test_mujoco_draws_without_a_screen(monkeypatch):
    """By the first of two libraries that is here, unless somebody has chosen or there is a screen."""
    found = {"OSMesa": "libOSMesa.so"}
    monkeypatch.setattr(from_gymnasium.ctypes.util, "find_library", found.get)
    monkeypatch.setattr(sys, "platform", "linux")

    def chosen(**environment):
        for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        from_gymnasium.draw_without_display()
        return os.environ.get("MUJOCO_GL")

    assert chosen() == "osmesa" and chosen(DISPLAY=":0") is None and chosen(WAYLAND_DISPLAY="0") is None
    found["EGL"] = "libEGL.so"
    assert chosen() == "egl" and chosen(MUJOCO_GL="glfw") == "glfw"
    found.clear()
    assert chosen() is None


@pytest.mark.parametrize("name, kwargs", [("dm_control/cartpole-swingup-v0", {}),
                                          ("Meta-World/MT1", dict(env_name="reach-v3", seed=1))])
@pytest.mark.filterwarnings("ignore")
def test_the_packages_themselves(name, kwargs, monkeypatch):
    """Where they are installed: the key fixes the goal, the time limit is the package's."""
    for package in from_gymnasium.PACKAGES[name.split("/")[0]]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"no {package}")
    env, other = (make_env(f"gymnasium/{name}", 2, **kwargs) for _ in range(2))
    action = jnp.zeros((2, len(env.action_space.low)))
    obs, ts, _ = play(jax.random.key(0), env, lambda t, obs: action, env.max_steps)
    again = play(jax.random.key(0), other, lambda t, obs: action, env.max_steps)
    jax.tree.map(np.testing.assert_array_equal, (obs, ts), again[:2])
    assert ts.truncated[-1].all() and not ts.truncated[:-1].any() and not ts.terminated.any()
    assert all(np.abs(x[0, 0] - x[0, 1]).max() > 1e-4 for x in jax.tree.leaves(obs))
    assert env.max_steps in (500, 1000) and ("success" in ts.info["episode"]) == name.startswith("Meta")


def test_ppo_runs_on_the_host_as_anywhere():
    """After three iterations, the run sees what the simulators show, and has taken as many steps as they have."""
    config = ppo.get_config()
    config.update(env="gymnasium/CartPole-v1", num_envs=2, num_steps=8, hidden_dims=(8,), num_minibatches=2)
    config = ml_collections.FrozenConfigDict(config)
    env = make_env(config.env, config.num_envs)

    @jax.jit
    def train(key):
        def step(i, run):
            return ppo.train_step(run, jax.random.fold_in(key, i), env, config)[0]

        return jax.lax.fori_loop(0, 3, step, ppo.init(jax.random.fold_in(key, 9), env, config))

    run = train(jax.random.key(0))
    (simulators,) = env.simulators.values()
    np.testing.assert_allclose(run.obs, [simulator.unwrapped.state for simulator in simulators.envs], rtol=1e-6)
    assert int(run.env_state.clock) == simulators.clock == 3 * config.num_steps
    again = train(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, run, again)


def rewards(name, steps):
    """(T, E): what random steps pay, what a planner is told, and whether they end the episode."""
    pytest.importorskip("mujoco")
    env = make_env(f"gymnasium/{name}", 2, max_episode_steps=steps // 2)
    low, high = jnp.float32(env.action_space.low), jnp.float32(env.action_space.high)

    def policy(t, obs):
        shape = (2, low.size)
        unit = jax.random.uniform(jax.random.fold_in(jax.random.key(7), t), shape)
        return jnp.broadcast_to(low, shape) + unit * jnp.broadcast_to(high - low, shape)

    obs, ts, _ = play(jax.random.key(0), env, policy, steps)
    actions = jax.vmap(policy)(jnp.arange(steps), obs)
    told = -jax.vmap(jax.vmap(env.env.cost))(obs, actions, ts.next_obs)
    assert env.env.max_steps == steps // 2 and env.env.action_space == env.action_space
    assert env.env.terminal_cost(obs[0, 0]) == 0 and told.dtype == jnp.float32
    return np.asarray(ts.reward), np.asarray(told), np.asarray(ts.terminated)


def test_the_planner_is_told_what_the_inverted_pendulum_pays():
    paid, told, terminated = rewards("InvertedPendulum-v5", 200)
    np.testing.assert_array_equal(told, paid)
    np.testing.assert_array_equal(told, ~terminated)
    assert terminated.sum() > 20
    cost = make_env("gymnasium/InvertedPendulum-v5", 1).env.cost
    nowhere = jnp.float32([jnp.nan, 0, 0, 0])
    assert cost(nowhere, jnp.zeros(1), nowhere) == 0


def test_the_planner_is_told_what_the_reacher_pays():
    paid, told, _ = rewards("Reacher-v5", 200)
    np.testing.assert_allclose(told, paid, rtol=1e-6, atol=1e-6)


def test_the_planner_is_told_nearly_what_the_half_cheetah_pays():
    """The speed at the end of a step is not its mean over the step, but the simulator's own."""
    paid, told, _ = rewards("HalfCheetah-v5", 400)
    np.testing.assert_allclose(told - paid, 0, atol=1.2)
    assert np.std(told - paid) < 0.3 and abs(np.mean(told - paid)) < 0.02
    env = gymnasium.make("HalfCheetah-v5").unwrapped
    x, _ = env.reset(seed=0)
    action = np.float32([1, -1, 0.5, 0, -0.5, 1])
    for _ in range(5):
        next_x, *_ = env.step(action)
        cost = make_env("gymnasium/HalfCheetah-v5", 1).env.cost(*map(jnp.float32, (x, action, next_x)))
        np.testing.assert_allclose(-cost, env.data.qvel[0] - 0.1 * 3.5, rtol=1e-5)
        x = next_x


def test_a_cost_that_is_not_known_is_refused():
    x, action = jnp.zeros(4), jnp.zeros(1)
    with pytest.raises(UserError, match='the cost of "gymnasium/CartPole-v1" is unknown; known to planners are Inv'):
        jax.jit(make_env("gymnasium/CartPole-v1", 1).env.cost)(x, action, x)
    pytest.importorskip("mujoco")
    with pytest.raises(UserError, match='"gymnasium/HalfCheetah-v5" with {\'ctrl_cost_weight\': 0.0} is unknown'):
        make_env("gymnasium/HalfCheetah-v5", 1, ctrl_cost_weight=0.0).env.cost(x, action, x)


def test_mistakes_are_named(echo, monkeypatch):
    spaces = gymnasium.spaces
    box, tree = spaces.Box(-1, 1, (2,)), spaces.Dict(a=spaces.Box(-1, 1), b=spaces.Discrete(2))
    for name, kwargs, words in [
            ("CartPol-v1", {}, 'unknown environment "gymnasium/CartPol-v1"; did you mean "gymnasium/CartPole-v1"'),
            ("CartPole-v1", dict(gravity=9), "unexpected keyword argument 'gravity'"),
            ("Endless-v0", dict(actions=box), "no time limit: set env_kwargs.max_episode_steps"),
            ("Echo-v0", dict(actions=tree), "actions are Dict.*; Discrete and flat Box are supported"),
            ("Echo-v0", dict(actions=spaces.MultiBinary(2)), "actions are MultiBinary"),
            ("Echo-v0", dict(actions=box, observations=tree), "observations are Dict.*; only Box and a Dict of")]:
        with pytest.raises(UserError, match=words):
            make_env(f"gymnasium/{name}", 1, **kwargs)

    def missing(*args, **kwargs):
        raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed")

    for package, name in (("dm_control", "dm_control/cheetah-run-v0"), ("metaworld", "Meta-World/MT1")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf'needs the extra `{package}`: pip install -e "\.\[{package}\]"'):
            make_env(f"gymnasium/{name}", 1)
    monkeypatch.setattr(gymnasium, "make", missing)
    with pytest.raises(UserError, match=r'needs the extra `mujoco`: pip install -e "\.\[mujoco\]"'):
        make_env("gymnasium/HalfCheetah-v5", 1)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match=r'needs the extra `mujoco`: pip install -e "\.\[mujoco\]"'):
        make_env("gymnasium/CartPole-v1", 1)
