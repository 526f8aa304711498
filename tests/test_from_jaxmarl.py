"""The adapter gives JaxMARL's own numbers, and ours behind its signature give ours."""
import sys
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.envs import Batch, Discrete, from_jaxmarl, make_env, pursuit_evasion
from core.envs.from_jaxmarl import AsJaxMARL, Env
from core.errors import UserError

jaxmarl = pytest.importorskip("jaxmarl")

UNUSED = jax.random.key(0)  # where nothing is drawn
JAXMARL = "core/envs/from_jaxmarl.py"
PLANTED_ERRORS = {
    "dones mixed": (JAXMARL, "over & ~truncated, truncated, info", "truncated, over & ~truncated, info"),
    "MPE's limit one step early": (JAXMARL, "return env.max_steps + any(", "return env.max_steps + 0 * any("),
    "agents' rewards swapped": (JAXMARL,
        "[reward[agent] for agent in self.agents]", "[reward[agent] for agent in self.agents[::-1]]"),
    "agents' actions swapped": (JAXMARL, "self.spaces, action, strict=True", "self.spaces, action[::-1], strict=True"),
    "mask dropped": (JAXMARL,
        "self._stack(_theirs(self.env.get_avail_actions, state.env)).astype(bool) & self.own",
        "jnp.asarray(self.own)"),
    "padding available": (JAXMARL,
        "np.arange(widths.max())[None] < widths[:, None]", "np.arange(widths.max())[None] < widths[:, None] + 1"),
    "padding before the observation": (JAXMARL, "(0, size - v.size)", "(size - v.size, 0)"),
    "a time limit kills agents": (JAXMARL, "for agent in self.agents]) & ~truncated}", "for agent in self.agents])}"),
    "Box actions not clipped": (JAXMARL,
        "return jnp.clip(action[:space.shape[0]], low, high)", "return action[:space.shape[0]]"),
    "step hides the end": (JAXMARL, "_theirs(self.env.step_env, key", "_theirs(self.env.step, key"),
    "no reset in JaxMARL's step": (JAXMARL, 'jnp.where(dones["__all__"], new, old)', "old"),
    "our agents' rows mixed": (JAXMARL,
        "jnp.stack([actions[agent] for agent in self.agents]))",
        "jnp.stack([actions[agent] for agent in self.agents[::-1]]))"),
}


def test_names_and_packages(monkeypatch):
    with pytest.raises(UserError, match='did you mean "jaxmarl/MPE_simple_spread_v3"'):
        Env("MPE_simple_spred_v3")
    with pytest.raises(UserError, match='no setting "num_agnts"; it has .*num_landmarks'):
        Env("MPE_simple_spread_v3", num_agnts=2)
    with pytest.raises(UserError, match="num_agents = 0"):
        Env("MPE_simple_spread_v3", num_agents=0)
    with pytest.raises(UserError, match="no time limit"):
        Env("coin_game")
    mixed = SimpleNamespace(n=3), SimpleNamespace(shape=(2,), low=-1.0, high=1.0)
    for spaces in (mixed, mixed[::-1]):
        with pytest.raises(UserError, match="every agent's actions have to be Discrete"):
            from_jaxmarl._common("mixed", spaces)
    monkeypatch.setitem(sys.modules, "jaxmarl", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[envs\]"'):
        Env("MPE_simple_spread_v3")


@pytest.mark.parametrize("name, kwargs", [("MPE_simple_spread_v3", {}), ("MPE_simple_tag_v3", {}),
                                          ("MPE_simple_speaker_listener_v4", {"action_type": "Continuous"})])
def test_adapter_is_jaxmarl(name, kwargs):
    """The same keys give the same numbers for a whole episode, which the time limit ends."""
    env, theirs = Env(name, **kwargs), jaxmarl.make(name, **kwargs)
    n, step, their_step = env.num_agents, jax.jit(env.step), jax.jit(theirs.step_env)
    with jax.numpy_rank_promotion("allow"):
        obs, their_state = theirs.reset(jax.random.key(1))
    state, stacked = env.reset(jax.random.key(1))
    first = jax.tree.map(jnp.shape, state), jax.tree.map(lambda x: (x.dtype, x.weak_type), state)
    sizes = [theirs.observation_space(agent).shape[0] for agent in theirs.agents]

    def check(stacked, obs):
        for row, size, agent in zip(stacked, sizes, theirs.agents, strict=True):
            np.testing.assert_allclose(row[:size], obs[agent], atol=1e-6)
            assert not row[size:max(sizes)].any()

    check(stacked, obs)
    for t in range(26):
        action = env.action_space.sample(jax.random.key(t), (n,))
        if isinstance(env.action_space, Discrete):
            own = {a: action[i] for i, a in enumerate(theirs.agents)}
        else:
            own = {a: action[i, :theirs.action_space(a).shape[0]] for i, a in enumerate(theirs.agents)}
        with jax.numpy_rank_promotion("allow"):
            obs, their_state, reward, done, _ = their_step(jax.random.key(100 + t), their_state, own)
        state, ts = step(jax.random.key(100 + t), state, action)
        check(ts.next_obs, obs)
        np.testing.assert_allclose(ts.reward, [reward[a] for a in theirs.agents], rtol=1e-5, atol=1e-5)
        assert (ts.truncated, ts.terminated) == (t == 25, False) == (done["__all__"], False)
        assert not ts.info["agent_done"].any()
    assert env.max_steps == 26
    assert first == (jax.tree.map(jnp.shape, state), jax.tree.map(lambda x: (x.dtype, x.weak_type), state))  # one trace


def test_adversaries_are_a_team():
    """And where there are none, there is one team alone, which needs no numbers."""
    assert make_env("jaxmarl/MPE_simple_tag_v3", 1).env.teams == (0, 0, 0, 1)
    for name in ("MPE_simple_spread_v3", "MPE_simple_speaker_listener_v4"):
        assert not hasattr(make_env(f"jaxmarl/{name}", 1).env, "teams")


def test_speaker_and_listener_are_padded_and_masked():
    env = Env("MPE_simple_speaker_listener_v4")
    state, obs = env.reset(jax.random.key(1))
    assert env.masked and env.action_space == Discrete(5) and obs.shape == (2, 11 + 5)
    np.testing.assert_array_equal(obs[:, -5:], [[1, 1, 1, 0, 0], [1] * 5])
    assert not Env("MPE_simple_spread_v3").masked
    step = jax.jit(env.step)
    for own, padded in (([2, 4], [3, 4]), ([2, 0], [4, 0])):  # beyond the speaker's three: its last
        a, b = (step(jax.random.key(2), state, jnp.int32(x))[1].next_obs for x in (own, padded))
        np.testing.assert_array_equal(a, b)
        assert a[1, 10] == 1.0  # the listener hears word 2


def test_continuous_actions_are_clipped_and_padding_ignored():
    env = Env("MPE_simple_speaker_listener_v4", action_type="Continuous")
    state, _ = env.reset(jax.random.key(1))
    step = jax.jit(env.step)
    inside = jnp.float32([[0, 1, 0.5, 0, 0], [0, 1, 0, 0.5, 1]])
    outside = jnp.float32([[-3, 9, 0.5, 7, -7], [0, 2, -1, 0.5, 9]])
    a, b = (step(jax.random.key(2), state, x)[1] for x in (inside, outside))
    np.testing.assert_array_equal(a.next_obs, b.next_obs)
    np.testing.assert_allclose(a.next_obs[1, 8:11], [0, 1, 0.5])
    np.testing.assert_array_equal(a.next_obs[:, -5:], [[1, 1, 1, 0, 0], [1] * 5])


class Actions(NamedTuple):
    n: int
    dtype: type = jnp.int32


class Duel:
    """JaxMARL's interface: two agents that differ in all; `left` dies at step 2, a 3 of `right` ends it all."""
    agents, num_agents, max_steps = ["left", "right"], 2, 4

    def action_space(self, agent):
        return Actions({"left": 2, "right": 4}[agent])

    def obs(self, t):
        return {"left": jnp.full(2, t, jnp.float32), "right": jnp.full((1, 3), 10 + t, jnp.float32)}

    def reset(self, key):
        return self.obs(0), {"step": jnp.int32(0)}

    def step_env(self, key, state, actions):
        t = state["step"] + 1
        over = (actions["right"] == 3) | (t >= 4)
        done = {"left": (t >= 2) | over, "right": over, "__all__": over}
        return self.obs(t), {"step": t}, {"left": 1.0 * t, "right": -1.0 * t, "__all__": 0.0}, done, {}

    def get_avail_actions(self, state):
        return {"left": jnp.array([1, state["step"] % 2]), "right": jnp.array([0, 1, 1, 1])}


@pytest.fixture
def duel(monkeypatch):
    monkeypatch.setattr(jaxmarl, "registered_envs", ["duel"])
    monkeypatch.setattr(jaxmarl, "make", lambda name: Duel())
    return Env("duel")


def test_deaths_ends_and_time_limits(duel):
    state, obs = duel.reset(UNUSED)
    np.testing.assert_array_equal(obs, [[0, 0, 0, 1, 0, 0, 0], [10, 10, 10, 0, 1, 1, 1]])
    for t in range(1, 5):
        _, ts = duel.step(UNUSED, state, jnp.int32([0, 3]))
        assert (ts.terminated, ts.truncated) == (t < 4, t == 4)
        np.testing.assert_array_equal(ts.info["agent_done"], [t < 4, t < 4])
        state, ts = duel.step(UNUSED, state, jnp.int32([0, 1]))
        assert (ts.terminated, ts.truncated) == (False, t == 4)
        np.testing.assert_array_equal(ts.info["agent_done"], [t in (2, 3), False])
        np.testing.assert_array_equal(ts.reward, [t, -t])
        np.testing.assert_array_equal(ts.next_obs, [[t, t, 0, 1, t % 2, 0, 0], [10 + t] * 3 + [0, 1, 1, 1]])


def test_masks_follow_the_state_also_across_a_reset(duel):
    env = Batch(duel, 2)
    env_state, obs = env.reset(jax.random.key(0))
    action = jnp.int32([[0, 1], [0, 3]])  # the second copy ends at every step
    for t in range(6):
        odd = t % 4 % 2 == 1  # a new episode after four steps
        np.testing.assert_array_equal(obs[0, :, 3:], [[1, odd, 0, 0], [0, 1, 1, 1]])
        np.testing.assert_array_equal(obs[1, :, 3:], [[1, 0, 0, 0], [0, 1, 1, 1]])
        env_state, ts = env.step(jax.random.key(t), env_state, action)
        obs = ts.obs
        np.testing.assert_array_equal(ts.next_obs[:, 0, 4], [not odd, 1])


def test_ours_behind_jaxmarl_signature():
    """JaxMARL's own logging wrapper runs them, and the numbers are those of our interface."""
    from jaxmarl.wrappers.baselines import LogWrapper
    ours = pursuit_evasion.Env(num_agents=4)
    env = AsJaxMARL(ours)
    wrapped = LogWrapper(env)
    assert env.agents == ["agent_0", "agent_1", "agent_2", "agent_3"] and env.action_space("agent_3").shape == (2,)
    assert env.observation_space("agent_0").shape == (16,) and env.observation_space("agent_0").contains(jnp.zeros(16))
    obs, state = wrapped.reset(jax.random.key(1))
    mine, stacked = ours.reset(jax.random.key(1))
    total, step = 0, jax.jit(ours.step)
    for t in range(25):
        np.testing.assert_allclose([obs[a] for a in env.agents], stacked, atol=1e-6)
        action = {a: env.action_space(a).sample(jax.random.key(10 * t + i)) for i, a in enumerate(env.agents)}
        obs, state, reward, dones, infos = wrapped.step(jax.random.key(t), state, action)
        mine, ts = step(UNUSED, mine, jnp.stack(list(action.values())))
        stacked, total = ts.obs, total + ts.reward
        np.testing.assert_allclose([reward[a] for a in env.agents], ts.reward, atol=1e-6)
        assert all(bool(d) == (t == 24) for d in dones.values()) and set(dones) == {*env.agents, "__all__"}
    np.testing.assert_allclose(infos["returned_episode_returns"], total, rtol=1e-5)
    assert infos["truncated"].tolist() == [True] * 4
    assert state.env_state.t == 0 and not state.env_state.agents[:, 2:].any()  # begun anew
    np.testing.assert_allclose([obs[a] for a in env.agents], ours.observe(state.env_state.agents), atol=1e-6)
