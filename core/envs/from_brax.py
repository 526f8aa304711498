"""Environments of Brax by their names there: `brax/halfcheetah`. `episode_length` is their time limit, in steps.

They are built without Brax's wrappers, which would hide the true successor and start every episode in the same few
states. `done` is a termination, the time limit of this file a truncation. What Brax calls `time_out` is not read,
because in its inverted pendulum it is a fall. Actions lie in [-1, 1].
"""
import difflib
import importlib
import inspect
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from core.config import check_settings
from core.envs.from_gymnasium import without_deprecations
from core.envs.interface import Box, TimeStep
from core.errors import UserError


class State(NamedTuple):
    env: Any  # Brax's
    t: jax.Array


class Env:
    def __init__(self, name: str, /, episode_length: int = 1000, **kwargs):
        known = package("brax.envs", "brax", f'"brax/{name}"')._envs
        kind = find("brax", name, known)
        settings = dict(episode_length=episode_length) | kwargs
        check_settings(f"brax/{name}", settings, _settings(kind) | dict(episode_length=1000))
        # Inside a program, too, its constants are numbers. Brax warns that nobody maintains it.
        with (jax.ensure_compile_time_eval(), jax.numpy_rank_promotion("allow"), without_deprecations(),
              warnings.catch_warnings(action="ignore")):
            try:
                self.env = kind(**kwargs)
            except (TypeError, ValueError, AssertionError) as error:
                raise UserError(f'"brax/{name}" with {kwargs}: {" ".join(str(error).split())}') from error
        self.max_steps, self.action_space = episode_length, actions(self.env)

    def reset(self, key):
        return start(self.env, key)

    def step(self, key, state, action):
        return advance(self, state, action)


def start(env, key):
    """(state, Brax's observation) of a new episode."""
    with jax.numpy_rank_promotion("allow"):
        # The old form of a key: the package may split one twice.
        state = env.reset(jax.random.key_data(key))
    return State(jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.asarray(x).dtype), state), jnp.int32(0)), state.obs


def advance(ours, state, action):
    """A step of `ours.env`. The state keeps its types, also where the package writes a bare 0."""
    with jax.numpy_rank_promotion("allow"):
        env_state = ours.env.step(state.env, ours.action_space.clip(action))
    state = State(jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), env_state, state.env), state.t + 1)
    terminated = state.env.done.astype(bool)
    truncated = (state.t >= ours.max_steps) & ~terminated
    return state, TimeStep(state.env.obs, state.env.obs, state.env.reward, terminated, truncated, {})


def actions(env):
    return Box((-1.0,) * env.action_size, (1.0,) * env.action_size)


def package(module, extra, what):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f'{what} needs the extra `{extra}`: pip install -e ".[{extra}]"') from error


def find(source, name, known):
    """What `known` holds by this name."""
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f'did you mean "{source}/{close[0]}"?' if close else f"known: {', '.join(sorted(known))}"
    raise UserError(f'unknown environment "{source}/{name}"; {hint}')


def _settings(kind):
    """{name: default} of the parameters of a class and its parents: they hand on what they do not know."""
    made = [inspect.signature(parent.__init__).parameters for parent in reversed(kind.__mro__[:-1])]
    return {name: setting.default for parameters in made for name, setting in parameters.items()
            if setting.default is not setting.empty}
