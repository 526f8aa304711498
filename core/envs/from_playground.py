"""Environments of MuJoCo Playground by their names there: `playground/CartpoleBalance`.

The settings are the keys of the environment's own config. `episode_length` is the time limit, `impl` the simulator:
"warp" by default, but "jax" takes an eighth of the time on a CPU. The package's wrappers are left out; ends are told
apart as in `from_brax`. Of observations in parts a policy gets `state`: `privileged_state` is for critics alone.
"""
import subprocess

import jax

from core.config import check_settings
from core.envs.from_brax import actions, advance, find, package, start
from core.envs.from_gymnasium import without_deprecations
from core.errors import UserError


class Env:
    def __init__(self, name: str, /, **kwargs):
        registry = package("mujoco_playground", "playground", f'"playground/{name}"').registry
        find("playground", name, dict.fromkeys(registry.ALL_ENVS))
        config = registry.get_default_config(name)
        check_settings(f"playground/{name}", kwargs, config.to_dict())
        with jax.ensure_compile_time_eval(), jax.numpy_rank_promotion("allow"), without_deprecations():
            try:
                config.update(kwargs)
                self.env = registry.load(name, config=config)
            except (TypeError, KeyError, ValueError, AssertionError, NotImplementedError) as error:
                raise UserError(f'"playground/{name}" with {kwargs}: {" ".join(str(error).split())}') from error
            except (OSError, subprocess.CalledProcessError) as error:
                raise UserError(f'"playground/{name}" needs files of robots that the package downloads from GitHub at '
                                f'its first use, and could not: {" ".join(str(error).split())}') from error
        if config.action_repeat != 1:
            raise UserError(f'"playground/{name}" repeats actions: set env_kwargs.action_repeat to 1')
        self.max_steps, self.action_space = config.episode_length, actions(self.env)

    def reset(self, key):
        state, obs = start(self.env, key)
        return state, _seen(obs)

    def step(self, key, state, action):
        state, step = advance(self, state, action)
        return state, step._replace(obs=_seen(step.obs), next_obs=_seen(step.next_obs))


def _seen(obs):
    return obs["state"] if isinstance(obs, dict) and "privileged_state" in obs else obs
