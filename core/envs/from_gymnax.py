"""Environments of gymnax >= 1.0, by their names there."""
import difflib

import jax

from core.envs.interface import Box, Discrete, TimeStep


class Env:
    def __init__(self, name: str, **params):
        try:
            import gymnax
        except ImportError as error:
            raise ImportError(f'environment "gymnax/{name}" needs the extra `envs`: pip install -e ".[envs]"') from error
        if name not in gymnax.registered_envs:
            close = difflib.get_close_matches(name, gymnax.registered_envs, n=1)
            hint = f'; did you mean "gymnax/{close[0]}"?' if close else ""
            raise ValueError(f'unknown environment "gymnax/{name}"{hint}')
        self.env, defaults = gymnax.make(name)
        self.params = defaults.replace(**params)
        self.max_steps = int(self.params.max_steps_in_episode)
        space = self.env.action_space(self.params)
        self.action_space = Discrete(int(space.n)) if hasattr(space, "n") else _box(space)

    def reset(self, key):
        obs, state = self.env.reset_env(key, self.params)
        return state, obs

    def step(self, key, state, action):
        # step_env, not step: the latter resets by itself. Its reset would be paid for on top of ours.
        obs, state, reward, terminated, _ = self.env.step_env(key, state, action, self.params)
        truncated = self.env.is_truncated(state, self.params)
        return state, TimeStep(obs, obs, reward, terminated, truncated & ~terminated, {})


def _box(space):
    low, high = (jax.numpy.broadcast_to(bound, space.shape).tolist() for bound in (space.low, space.high))
    return Box(tuple(low), tuple(high))
