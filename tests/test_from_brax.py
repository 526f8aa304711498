"""Brax and MuJoCo Playground: ends told apart, true successors, fresh draws, mistakes by name.

Of a stand-in, and of the packages themselves where they are installed.
"""
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.envs import make_env
from core.errors import UserError
from tests.stand_ins import brax

BRAX, PLAYGROUND = "core/envs/from_brax.py", "core/envs/from_playground.py"
ENDS, MISTAKES = "test_falls_and_time_limits_are_told_apart", "test_mistakes_are_named"
PLANTED_ERRORS = {
    "a fall is a time limit": (BRAX, "reward, terminated, truncated", "reward, truncated, terminated", ENDS),
    "Brax's word for a time limit": (BRAX, "(state.t >= ours.max_steps) & ~terminated",
                                     'state.env.info["time_out"].astype(bool)', ENDS),
    "a fall at the limit is both": (BRAX, " & ~terminated", "", ENDS),
    "a step too late": (BRAX, "state.t >= ours", "state.t > ours", ENDS),
    "the clock stands": (BRAX, "state.t + 1)", "state.t)", ENDS),
    "actions are not clipped": (BRAX, "ours.action_space.clip(action)", "action", ENDS),
    "a key of the new form": (BRAX, "jax.random.key_data(key)", "key", ENDS),
    "another type after a step": (BRAX, "jnp.asarray(new, old.dtype)", "new", ENDS),
    "privileged policy": (PLAYGROUND, 'return obs["state"] if', 'return obs["privileged_state"] if', ENDS),
    "the reset of another shape": (PLAYGROUND, "return state, _seen(obs)", "return state, obs", ENDS),
    "settings go nowhere": (PLAYGROUND, "config.update(kwargs)", "pass", "test_settings_arrive"),
    "Brax's settings go nowhere": (BRAX, "self.env = kind(**kwargs)", "self.env = kind()", "test_settings_arrive"),
    "settings are not checked": (BRAX, "check_settings(f", "str(f", MISTAKES),
    "settings of Playground are not checked": (PLAYGROUND, "check_settings(f", "str(f", MISTAKES),
    "repeated actions": (PLAYGROUND, "config.action_repeat != 1", "False", MISTAKES),
    "parameters without default are settings": (BRAX, "if setting.default is not setting.empty", "", MISTAKES),
    "a missing download is a traceback": (PLAYGROUND, "except (OSError, sub", "except (sub", MISTAKES),
    "a missing package is a traceback": (BRAX, "except ImportError", "except KeyError", MISTAKES),
}
NAMES = "brax/slide", "playground/Slide"


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "brax.envs", brax.envs)
    monkeypatch.setitem(sys.modules, "mujoco_playground", brax)


def play(env, action, steps):
    """Observations before each step [T, E, 2], the steps, and the state at the end."""
    def step(carry, key):
        env_state, obs = carry
        env_state, ts = env.step(key, env_state, action)
        return (env_state, ts.obs), (obs, ts)

    def run(key):
        reset_key, key = jax.random.split(key)
        return jax.lax.scan(step, env.reset(reset_key), jax.random.split(key, steps))

    (env_state, _), (obs, ts) = jax.jit(run)(jax.random.key(0))
    return np.asarray(obs), jax.device_get(ts), env_state


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", NAMES)
def test_falls_and_time_limits_are_told_apart(name):
    """Copy 0 is pushed off by 0.25 a step, its action of 9 clipped; the others stand still until their limit. Every
    episode starts from a fresh draw. An episode that falls in its last step did not run out of time."""
    env = make_env(name, 3, episode_length=6)
    assert (env.max_steps, env.action_space) == (6, ((-1.0, -1.0), (1.0, 1.0)))
    obs, ts, _ = play(env, jnp.float32([[9, 0], [0, 0], [1, -1]]), 18)
    np.testing.assert_allclose(ts.next_obs[:, 0, 0], obs[:, 0, 0] + 0.25, atol=1e-6)
    np.testing.assert_allclose(ts.next_obs[:, 1:], obs[:, 1:], atol=1e-6)
    np.testing.assert_array_equal(ts.terminated, ts.next_obs[..., 0] > 1)
    assert ts.terminated[:, 0].sum() >= 3 and not ts.terminated[:, 1:].any() and not ts.truncated[:, 0].any()
    np.testing.assert_array_equal(np.argwhere(ts.truncated[:, 1])[:, 0], [5, 11, 17])
    done = ts.terminated | ts.truncated
    np.testing.assert_array_equal(ts.obs[~done], ts.next_obs[~done])
    fresh = ts.obs[done][:, 0]
    assert len(np.unique(fresh)) == len(fresh) and (fresh >= -0.1).all() and (fresh < 1).all()
    assert (ts.reward == 1).all() and ts.reward.dtype == np.float32 and obs.shape == (18, 3, 2)
    limit = int(np.argmax(ts.terminated[:, 0])) + 1
    _, ts, _ = play(make_env(name, 3, episode_length=limit), jnp.float32([[9, 0], [0, 0], [1, -1]]), limit)
    assert ts.terminated[-1, 0] and not ts.truncated[-1, 0] and ts.truncated[-1, 1]


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("name", NAMES)
def test_settings_arrive(name):
    env = make_env(name, 1, push=0.5)
    assert env.env.env.push == 0.5 and env.max_steps == (1000 if name.startswith("brax") else 500)


@pytest.mark.usefixtures("stand_in")
def test_mistakes_are_named(monkeypatch):
    for name, kwargs, words in (
            ("brax/slid", {}, 'unknown environment "brax/slid"; did you mean "brax/slide"'),
            ("brax/ant", {}, 'unknown environment "brax/ant"; known: slide'),
            ("playground/Slid", {}, 'unknown environment "playground/Slid"; did you mean "playground/Slide"'),
            ("brax/slide", dict(pull=1), 'no setting "pull"; it has backend, episode_length, n_frames, push$'),
            ("brax/slide", dict(episode_length=0), "episode_length = 0 .* above 0"),
            ("brax/slide", dict(backend="fast"), '"brax/slide" with .*: backend should be generalized or spring'),
            ("playground/Slide", dict(pull=1), 'no setting "pull"; it has action_repeat, episode_length, noise, push'),
            ("playground/Slide", dict(push="far"), "push = 'far'"),
            ("playground/Slide", dict(noise=dict(level=-1.0)), '"playground/Slide" with .*: no such noise'),
            ("playground/SlideTwice", {}, "repeats actions: set env_kwargs.action_repeat to 1"),
            ("playground/SlideRobot", {}, "files of robots that the package downloads .*, and could not: git")):
        with pytest.raises(UserError, match=words):
            make_env(name, 1, **kwargs)
    make_env("playground/SlideTwice", 1, action_repeat=1)
    for module, extra, name in (("brax.envs", "brax", "brax/slide"), ("mujoco_playground", "playground",
                                                                      "playground/Slide")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match=rf'"{name}" needs the extra `{extra}`: pip install -e "\.\[{extra}\]"'):
            make_env(name, 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name, kwargs, terminates", [
    ("brax/inverted_pendulum", dict(backend="spring"), True), ("playground/CartpoleBalance", dict(impl="jax"), False)])
def test_the_packages_themselves(name, kwargs, terminates):
    if importlib.util.find_spec("brax" if name.startswith("brax") else "mujoco_playground") is None:
        pytest.skip("it is not installed")
    env = make_env(name, 2, episode_length=30, **kwargs)
    obs, ts, _ = play(env, jnp.ones((2, 1)), 60)
    assert ts.terminated.any() == terminates and ts.truncated.any() != terminates
    done = ts.terminated | ts.truncated
    np.testing.assert_array_equal(obs[1:][~done[:-1]], ts.next_obs[:-1][~done[:-1]])
    assert len(np.unique(ts.obs[done][:, 0])) == done.sum() and np.isfinite(ts.next_obs).all()
