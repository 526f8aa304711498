"""Environments of Gymnasium, simulated on the host, behind the interface of `batch.Batch`.

    reset(key) -> (env_state, obs [E, ...])
    step(key, env_state, action [E, ...]) -> (env_state, TimeStep [E, ...])

Both are ordered callbacks out of the compiled program, so an algorithm scans and jits them like any other environment;
they cannot be vmapped (one seed per process) nor spread over devices. A callback costs 0.1 to 0.2 ms a step, whatever
the number of copies. In steps/s, on two cores, with the same actions again and again:

                            the loop below alone   inside a scan
    CartPole-v1     4 copies             102,000          27,000
    CartPole-v1    64 copies             131,000         110,000
    HalfCheetah-v5  4 copies              18,200          10,600
    HalfCheetah-v5 16 copies              19,800          16,500

The copies are stepped one after the other: Gymnasium's copies in processes were a quarter as fast at best.

The simulator's state stays on the host, and a checkpoint does not hold it. After a resume, the first step of every copy
ends in a time limit without reward that counts as no episode, and a fresh episode starts: a resumed run learns on, but
is not bit-exact. Episodes are fixed by the key of `reset` and the actions taken.

A planner finds in `env` what it finds in an environment of our own, where the cost is known (`mujoco_costs`).
"""
import difflib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback

from core.envs.interface import Box, Discrete, TimeStep
from core.envs.mujoco_costs import COSTS
from core.errors import UserError


class HostEnv(NamedTuple):
    cost: Callable  # x [O], action [A], next_x [O] -> []
    terminal_cost: Callable  # x [O] -> []
    max_steps: int
    action_space: Box | Discrete


class HostState(NamedTuple):
    clock: jax.Array  # steps since the reset, to notice when the host does not hold these episodes


class HostBatch:
    on_host, num_agents = True, None

    def __init__(self, name: str, num_envs: int, **kwargs):
        self.envs, self.num_envs, self.clock = [_make(name, kwargs) for _ in range(num_envs)], num_envs, 0
        simulator = self.envs[0]
        self.max_steps = simulator.spec.max_episode_steps
        if self.max_steps is None:
            raise UserError(f'"gymnasium/{name}" has no time limit: set env_kwargs.max_episode_steps')
        self.action_space, self.to_host = _actions(name, simulator.action_space)
        cost = _cost(name, simulator.spec.id, kwargs)
        self.env = HostEnv(cost, lambda x: jnp.zeros(()), self.max_steps, self.action_space)
        obs, flag = _array(name, simulator.observation_space, num_envs), jax.ShapeDtypeStruct((num_envs,), bool)
        number, length = (jax.ShapeDtypeStruct((num_envs,), dtype) for dtype in (np.float32, np.int32))
        episode = {"count": flag, "return": number, "length": length}
        self.shape = TimeStep(obs, obs, number, flag, flag, {"episode": episode})

    def reset(self, key: jax.Array) -> tuple[HostState, jax.Array]:
        obs = io_callback(self._reset, self.shape.obs, jax.random.key_data(key), ordered=True)
        return HostState(jnp.int32(0)), obs

    def step(self, key: jax.Array, env_state: HostState, action: jax.Array) -> tuple[HostState, TimeStep]:
        # One argument, because each costs the callback 30 µs.
        bits = jnp.append(jax.lax.bitcast_convert_type(action, jnp.int32).ravel(), env_state.clock)
        return HostState(env_state.clock + 1), io_callback(self._step, self.shape, bits, ordered=True)

    def _reset(self, key_data, clock=0):
        self.entropy, self.clock = np.asarray(key_data).tolist(), clock
        self.totals, self.lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, np.int32)
        seeds = np.random.SeedSequence([*self.entropy, clock]).generate_state(self.num_envs).tolist()
        obs = np.stack([env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds, strict=True)])
        return obs.astype(self.shape.obs.dtype)

    def _step(self, bits):
        bits = np.asarray(bits)
        step, clock = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), self.shape), int(bits[-1])
        if clock == self.clock:
            self._advance(step, self.to_host(bits[:-1].view(self.action_space.dtype)))
        else:  # these episodes were lost with the process that simulated them
            fresh = self._reset(self.entropy, clock)
            step = step._replace(obs=fresh, next_obs=fresh, truncated=np.ones(self.num_envs, bool))
        self.clock = clock + 1
        return step

    def _advance(self, step, actions):
        """Fill in `step`, one copy after the other."""
        for i, env in enumerate(self.envs):
            obs, reward, terminated, truncated, _ = env.step(actions[i])
            step.obs[i], step.next_obs[i], step.reward[i] = obs, obs, reward
            step.terminated[i], step.truncated[i] = terminated, truncated and not terminated
            self.totals[i] += reward
            self.lengths[i] += 1
            if terminated or truncated:
                episode = step.info["episode"]
                episode["count"][i], episode["return"][i], episode["length"][i] = True, self.totals[i], self.lengths[i]
                step.obs[i], self.totals[i], self.lengths[i] = env.reset()[0], 0.0, 0


def _make(name, kwargs):
    try:
        import gymnasium
    except ImportError as error:
        raise UserError(f'"gymnasium/{name}" needs the extra `mujoco`: pip install -e ".[mujoco]"') from error
    try:
        return gymnasium.make(name, **kwargs, disable_env_checker=True)
    except gymnasium.error.UnregisteredEnv as error:
        close = difflib.get_close_matches(name, gymnasium.registry, n=1)
        hint = f'; did you mean "gymnasium/{close[0]}"?' if close else ""
        raise UserError(f'unknown environment "gymnasium/{name}"{hint}') from error
    except gymnasium.error.DependencyNotInstalled as error:
        extra = 'the extra `mujoco`: pip install -e ".[mujoco]"' if "mujoco" in str(error).lower() else f"more: {error}"
        raise UserError(f'"gymnasium/{name}" needs {extra}') from error
    except TypeError as error:
        raise UserError(f'"gymnasium/{name}" with {kwargs}: {error}') from error


def _cost(name, registered, kwargs):
    """What is known of the environment as registered; settings of its own could change it."""
    if registered in COSTS and not kwargs.keys() - {"max_episode_steps"}:
        return COSTS[registered]

    def unknown(x, action, next_x):
        settings = f" with {kwargs}" if kwargs else ""
        raise UserError(f'the cost of "gymnasium/{name}"{settings} is unknown; known to planners are {", ".join(COSTS)}'
                        ", with no settings but max_episode_steps")

    return unknown


def _actions(name, space):
    """The action space as ours, and a function from a batch of our actions to what the simulators take."""
    from gymnasium import spaces
    if isinstance(space, spaces.Discrete):
        return Discrete(int(space.n)), lambda action: (action + space.start).tolist()
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise UserError(f'"gymnasium/{name}": actions are {space}; Discrete and flat Box are supported')
    return Box(tuple(space.low.tolist()), tuple(space.high.tolist())), lambda action: (
        np.clip(action.reshape(-1, *space.shape), space.low, space.high))


def _array(name, space, num_envs):
    """Shape and type of a batch of observations: floats as float32."""
    from gymnasium import spaces
    if not isinstance(space, spaces.Box):
        raise UserError(f'"gymnasium/{name}": observations are {space}; only Box is supported')
    return jax.ShapeDtypeStruct((num_envs, *space.shape), jax.dtypes.canonicalize_dtype(space.dtype))
