"""Environments on the host against their own physics, recounted episodes, and a simulator that echoes."""
import functools
import sys

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import ppo
from core.envs import make_env
from core.errors import UserError
from core.evaluation import evaluate

gymnasium = pytest.importorskip("gymnasium")

FILE, COSTS = "core/envs/from_gymnasium.py", "core/envs/mujoco_costs.py"
LOST, AGAIN, SEEDS = (
    "test_episodes_lost_with_their_process_start_afresh", "test_a_call_that_is_repeated_gives_the_same_step",
    "test_seeds_under_vmap_are_simulated_as_alone")
PENDULUM, REACHER, CHEETAH, UNKNOWN = (
    "test_the_planner_is_told_what_the_inverted_pendulum_pays", "test_the_planner_is_told_what_the_reacher_pays",
    "test_the_planner_is_told_nearly_what_the_half_cheetah_pays", "test_a_cost_that_is_not_known_is_refused")
PLANTED_ERRORS = {
    "successor is the reset observation": (FILE, "                steps.obs[at], self.totals[i]",
                                           "                steps.next_obs[at], self.totals[i]"),
    "no reset": (FILE, "= env.reset()[0], 0.0, 0", "= env.reset()[0] * 0 + obs, 0.0, 0"),
    "flags swapped": (FILE, "= terminated, truncated and not terminated", "= truncated and not terminated, terminated"),
    "end at the limit counted twice": (FILE, "truncated and not terminated", "truncated"),
    "episodes counted at terminations alone": (FILE, "if terminated or truncated:", "if terminated:"),
    "return goes on": (FILE, "= env.reset()[0], 0.0, 0", "= env.reset()[0], self.totals[i], 0"),
    "length goes on": (FILE, "= env.reset()[0], 0.0, 0", "= env.reset()[0], 0.0, self.lengths[i]"),
    "one seed for all copies": (FILE, "env.reset(seed=seed)", "env.reset(seed=seeds[0])"),
    "unseeded": (FILE, "env.reset(seed=seed)", "env.reset()"),
    "key ignored": (FILE, "SeedSequence([*key, clock])", "SeedSequence([clock])"),
    "actions not clipped": (FILE, "np.clip(action.reshape(-1, *space.shape), space.low, space.high)",
                            "action.reshape(-1, *space.shape)"),
    "actions start at zero": (FILE, "(action + space.start)", "action"),
    "actions mixed": (FILE, "env.step(actions[i])", "env.step(actions[-1 - i])"),
    "lost episodes go on": (FILE, "if (key, clock) == (self.key, self.clock):", "if self.key == key:", LOST),
    "lost episodes of another key go on": (FILE, "if (key, clock) == (self.key, self.clock):",
                                           "if clock == self.clock:", LOST),
    "lost episodes start as at first": (FILE, "self.reset(key, clock)", "self.reset(key, 0)", LOST),
    "lost episodes are terminations": (FILE, "steps.truncated[seed] = True", "steps.terminated[seed] = True", LOST),
    "clock stands": (FILE, "self.clock, self.last = clock + 1", "self.clock, self.last = clock"),
    "a call repeated is a step": (FILE, "if self.last is not None and", "if False and", AGAIN),
    "a call repeated by another seed": (FILE, "old[row])", "old[0])", AGAIN),
    "the last call outlives a reset": (FILE, "self.key, self.clock, self.last = key, clock, None",
                                       "self.key, self.clock = key, clock", AGAIN),
    "one set of simulators for all seeds": (FILE, "return self.simulators[i]", "return self.simulators[0]", SEEDS),
    "seeds share a key": (FILE, ".reset(key.tolist(), clock=0) for i, key in enumerate(np.asarray(words))",
                          ".reset(np.asarray(words)[0].tolist(), clock=0) for i, key in enumerate(words)", SEEDS),
    "seeds share actions": (FILE, "self.to_host(row[:-3]", "self.to_host(words[0, :-3]", SEEDS),
    "seeds fill in one row": (FILE, "steps.reward[at] = obs, obs", "steps.reward[0, i] = obs, obs", SEEDS),
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
    assert [int(clock) for clock in state.clock] == [simulators.clock for simulators in other.simulators] == [6, 6]
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
    assert (len(env.simulators), len(env.simulators[2].envs), len(tests.simulators[2].envs)) == (3, 2, 3)


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
    np.testing.assert_allclose(run.obs, [simulator.unwrapped.state for simulator in env.simulators[0].envs], rtol=1e-6)
    assert int(run.env_state.clock) == env.simulators[0].clock == 3 * config.num_steps
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
    box, tree = spaces.Box(-1, 1, (2,)), spaces.Dict(a=spaces.Discrete(2))
    for name, kwargs, words in [
            ("CartPol-v1", {}, 'unknown environment "gymnasium/CartPol-v1"; did you mean "gymnasium/CartPole-v1"'),
            ("CartPole-v1", dict(gravity=9), "unexpected keyword argument 'gravity'"),
            ("Endless-v0", dict(actions=box), "no time limit: set env_kwargs.max_episode_steps"),
            ("Echo-v0", dict(actions=tree), "actions are Dict.*; Discrete and flat Box are supported"),
            ("Echo-v0", dict(actions=spaces.MultiBinary(2)), "actions are MultiBinary"),
            ("Echo-v0", dict(actions=box, observations=tree), "observations are Dict.*; only Box is supported")]:
        with pytest.raises(UserError, match=words):
            make_env(f"gymnasium/{name}", 1, **kwargs)

    def missing(*args, **kwargs):
        raise gymnasium.error.DependencyNotInstalled("MuJoCo is not installed")

    monkeypatch.setattr(gymnasium, "make", missing)
    with pytest.raises(UserError, match=r'needs the extra `mujoco`: pip install -e "\.\[mujoco\]"'):
        make_env("gymnasium/HalfCheetah-v5", 1)
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(UserError, match=r'needs the extra `mujoco`: pip install -e "\.\[mujoco\]"'):
        make_env("gymnasium/CartPole-v1", 1)
