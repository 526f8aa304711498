"""Environments of Gymnasium, simulated on the host, behind the interface of `batch.Batch`.

    reset(key) -> (env_state, obs [E, ...])
    step(key, env_state, action [E, ...]) -> (env_state, TimeStep [E, ...])

Both call the host out of the compiled program, so an algorithm scans, jits and vmaps them like any other environment.
Under a vmap over S seeds, one call steps S x E simulators, and seed i is simulated as if it were alone. Nested vmaps do
not work. Where seeds are spread over devices, each device makes its own calls.

A call costs 0.1 to 0.2 ms, whatever the number of copies and seeds. In steps/s, one seed, on two quiet cores, always
with the same actions:

                            the loop below alone   inside a scan
    CartPole-v1     4 copies             102,000          27,000
    CartPole-v1    64 copies             131,000         110,000
    HalfCheetah-v5  4 copies              18,200          10,600
    HalfCheetah-v5 16 copies              19,800          16,500

Four seeds of 4 copies in one program take together 2.3 (CartPole) and 1.4 (HalfCheetah) times as many steps/s as one
seed, measured on busy cores.

The simulators are stepped one after the other: Gymnasium's own copies in processes were a quarter as fast at best.

`env_state` says which episodes the simulators hold: the key of `reset` and the number of steps since. It goes through
every call, so calls run in the order of the steps. A call that is repeated gives the same answer again. The simulators
themselves are in no checkpoint. After a resume, the first step of every copy ends in a time limit without reward that
counts as no episode, and a fresh episode starts: a resumed run learns on, but is not bit-exact. Episodes are fixed by
the key of `reset` and the actions taken.

Observations are a Box or a Dict of such: a dictionary of arrays [E, ...]. Where the simulator reports `success` or
`is_success`, an episode succeeded if one of its steps did: `info["episode"]["success"]`. A number of a simulator that
is not finite ends the program in one line.

A planner finds in `env` what it finds in an environment of our own, where the cost is known (`mujoco_costs`).
"""
import collections
import contextlib
import ctypes.util
import difflib
import functools
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from core.envs.interface import Box, Discrete, TimeStep
from core.envs.mujoco_costs import COSTS
from core.errors import UserError

KEYS_KEPT = 256
# By the first word of an environment's name, the packages that register it. The extra is called as the first of them.
PACKAGES = {"dm_control": ("dm_control", "shimmy"), "Meta-World": ("metaworld",)}


class HostEnv(NamedTuple):
    cost: Callable  # x [O], action [A], next_x [O] -> []
    terminal_cost: Callable  # x [O] -> []
    max_steps: int
    action_space: Box | Discrete


class HostState(NamedTuple):
    key: jax.Array  # [2] the words of the key of `reset`
    clock: jax.Array  # steps since then


class HostBatch:
    on_host, num_agents = True, None

    def __init__(self, name: str, num_envs: int, /, **kwargs):
        self.name, self.num_envs, self.make = name, num_envs, functools.partial(_make, name, kwargs)
        self.spare, self.lock = [Simulators(self.make, num_envs)], threading.Lock()
        self.simulators = collections.OrderedDict()  # of each key of `reset`, the one used last at the end
        simulator = self.spare[0].envs[0]
        self.max_steps = _time_limit(simulator)
        if self.max_steps is None:
            raise UserError(f'"gymnasium/{name}" has no time limit: set env_kwargs.max_episode_steps')
        self.action_space, self.to_host = _actions(name, simulator.action_space)
        cost = _cost(name, simulator.spec.id, kwargs)
        self.env = HostEnv(cost, no_cost, self.max_steps, self.action_space)
        obs, flag = _arrays(name, simulator.observation_space, num_envs), jax.ShapeDtypeStruct((num_envs,), bool)
        number, length = (jax.ShapeDtypeStruct((num_envs,), dtype) for dtype in (np.float32, np.int32))
        self.reports_success = reports_success(simulator)
        episode = {"count": flag, "return": number, "length": length} | (
            {"success": flag} if self.reports_success else {})
        self.shape = TimeStep(obs, obs, number, flag, flag, {"episode": episode})
        clock = jax.ShapeDtypeStruct((), np.int32)
        self.call_reset = call_host(self._reset, (clock, obs))
        self.call_step = call_host(self._step, (clock, self.shape))
        logging.getLogger("jax._src.callback").addFilter(is_no_user_error)  # which the launchers print as one line

    def reset(self, key: jax.Array) -> tuple[HostState, jax.Array]:
        words = jax.random.key_data(key)
        clock, obs = self.call_reset(words)
        return HostState(words, clock), obs

    def step(self, key: jax.Array, env_state: HostState, action: jax.Array) -> tuple[HostState, TimeStep]:
        # One argument, because each costs the call 30 µs.
        words = jax.lax.bitcast_convert_type(action, jnp.uint32).ravel()
        clock, step = self.call_step(jnp.concatenate([words, env_state.key, env_state.clock[None].astype(jnp.uint32)]))
        return env_state._replace(clock=clock), step

    def _of(self, key, num_seeds):
        """The simulators of the seed whose `reset` had this key. Those of keys long unused are taken for new ones."""
        with self.lock:  # each device calls from a thread of its own
            if key not in self.simulators:
                if len(self.simulators) >= max(KEYS_KEPT, 4 * num_seeds):
                    self.spare.append(self.simulators.popitem(last=False)[1])
                self.simulators[key] = self.spare.pop() if self.spare else Simulators(self.make, self.num_envs)
            self.simulators.move_to_end(key)
            return self.simulators[key]

    def _reset(self, words):
        """[S, 2] -> clocks [S] and observations [S, E, ...]."""
        keys, clocks = [tuple(key) for key in np.asarray(words).tolist()], np.zeros(len(words), np.int32)
        obs = empty(self.shape.obs, len(keys))
        for i, key in enumerate(keys):
            self._of(key, len(keys)).reset(key, 0, obs, i)
        self.check(clocks, observation=obs)
        return clocks, obs

    def _step(self, words):
        """[S, …] -> clocks [S] and time steps [S, E, ...]."""
        words = np.asarray(words)
        steps, clocks = empty(self.shape, len(words)), words[:, -1].astype(np.int32) + 1
        for i, row in enumerate(words):
            simulators = self._of(tuple(row[-3:-1].tolist()), len(words))
            simulators.step(row, self.to_host(row[:-3].view(self.action_space.dtype)), steps, i)
        self.check(clocks, observation=steps.next_obs, reward=steps.reward)
        self.check(clocks, observation=steps.obs)
        return clocks, steps

    def check(self, clocks, **numbers):
        """Raises UserError at a number [S, E, ...] that is not finite: a simulation that diverged."""
        for what, tree in numbers.items():
            parts = tree if isinstance(tree, dict) else {"": tree}
            for part, x in parts.items():
                if x.dtype.kind == "f" and not np.isfinite(x).all():
                    seed, copy, *entry = np.argwhere(~np.isfinite(x))[0].tolist()
                    where = what + (f' "{part}"' if part else "") + (f" at {entry}" if entry else "")
                    raise UserError(f'"gymnasium/{self.name}" gave {x[seed, copy, *entry]} in the {where}, in step '
                                    f"{clocks[seed]} of a seed, copy {copy}: the simulation diverged")


def call_host(function, shape):
    """`function`, of words [S, n] for S seeds, as a JAX function of those of one, words [n] -> `shape`. The vmap over
    seeds is one call. Its order and repetitions are safe as the docstring of this file says, so it can be `pure`."""
    def together(words):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(words), *x.shape), x.dtype), shape)
        return jax.pure_callback(function, shapes, words)

    @custom_vmap
    def alone(words):
        return jax.tree.map(lambda x: x[0], together(words[None]))

    @alone.def_vmap
    def of_all_seeds(num_seeds, batched, words):
        return together(words), jax.tree.map(lambda _: True, shape)

    return alone


class Simulators:
    """The E simulators of one seed."""

    def __init__(self, make, num_envs):
        self.envs, self.key, self.clock, self.last = [make() for _ in range(num_envs)], None, 0, None

    def reset(self, key, clock, obs, seed):
        """Fill in row `seed` of `obs` [S, E, ...]."""
        self.key, self.clock, self.last = key, clock, None
        self.totals, self.lengths = np.zeros(len(self.envs)), np.zeros(len(self.envs), np.int32)
        self.succeeded = np.zeros(len(self.envs), bool)
        seeds = np.random.SeedSequence([*key, clock]).generate_state(len(self.envs)).tolist()
        for i, env in enumerate(self.envs):
            if env.spec.namespace == "Meta-World":  # which draws the goal before it takes the seed
                env.reset(seed=seeds[i])
            put(obs, (seed, i), env.reset(seed=seeds[i])[0])

    def step(self, words, actions, steps, seed):
        """Fill in row `seed` of `steps` [S, E, ...]. `words` are the actions, the key and the clock of the call."""
        *key, clock = words[-3:].tolist()
        key = tuple(key)
        if self.last is not None and self.last[0] == words.tobytes():  # the same call again
            _, last, row = self.last
            jax.tree.map(lambda new, old: np.copyto(new[seed], old[row]), steps, last)
            return
        if (key, clock) == (self.key, self.clock):
            self.advance(actions, steps, seed)
        else:  # these episodes were lost with the process that simulated them
            self.reset(key, clock, steps.obs, seed)
            jax.tree.map(lambda new, old: np.copyto(new[seed], old[seed]), steps.next_obs, steps.obs)
            steps.truncated[seed] = True
        self.clock, self.last = clock + 1, (words.tobytes(), steps, seed)

    def advance(self, actions, steps, seed):
        """One copy after the other."""
        for i, env in enumerate(self.envs):
            obs, reward, terminated, truncated, info = env.step(actions[i])
            at, episode = (seed, i), steps.info["episode"]
            put(steps.obs, at, obs)
            put(steps.next_obs, at, obs)
            steps.reward[at], steps.terminated[at], steps.truncated[at] = (
                reward, terminated, truncated and not terminated)
            self.totals[i] += reward
            self.lengths[i] += 1
            self.succeeded[i] |= success(info)
            if terminated or truncated:
                episode["count"][at], episode["return"][at] = True, self.totals[i]
                episode["length"][at] = self.lengths[i]
                if "success" in episode:
                    episode["success"][at] = self.succeeded[i]
                put(steps.obs, at, env.reset()[0])
                self.totals[i], self.lengths[i], self.succeeded[i] = 0.0, 0, False


def empty(shape, num_seeds):
    return jax.tree.map(lambda x: np.zeros((num_seeds, *x.shape), x.dtype), shape)


def put(batch, at, obs):
    """Write the observation of one copy into its place of a batch [S, E, ...]."""
    if isinstance(batch, dict):
        for name, x in batch.items():
            x[at] = obs[name]
    else:
        batch[at] = obs


def success(info):
    return bool(info.get("success", info.get("is_success", False)))


def reports_success(simulator):
    """Whether its steps say if the task is done: found out by one of them."""
    simulator.reset(seed=0)
    simulator.action_space.seed(0)
    info = simulator.step(simulator.action_space.sample())[-1]
    return "success" in info or "is_success" in info


def is_no_user_error(record):
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))


def no_cost(x):
    return jnp.zeros(())


def _make(name, kwargs):
    # The config may be somebody else's, and looking at a run must not execute what it names.
    if ":" in f"{name}{kwargs.get('env_id', '')}":
        raise UserError(f'"gymnasium/{name}" would import a module: import it in the config file or in the algorithm, '
                        "which registers the environment, and name the environment alone")
    try:
        import gymnasium
    except ImportError as error:
        raise UserError(f'"gymnasium/{name}" needs the extra `mujoco`: pip install -e ".[mujoco]"') from error
    _register(name)
    spec = gymnasium.registry.get(name)
    of_mujoco = name.split("/")[0] in PACKAGES or spec and str(spec.entry_point).startswith("gymnasium.envs.mujoco")
    try:
        with without_deprecations() if of_mujoco else contextlib.nullcontext():
            return gymnasium.make(name, **kwargs, disable_env_checker=True)
    except gymnasium.error.UnregisteredEnv as error:
        close = difflib.get_close_matches(name, gymnasium.registry, n=1)
        hint = f'; did you mean "gymnasium/{close[0]}"?' if close else ""
        raise UserError(f'unknown environment "gymnasium/{name}"{hint}') from error
    except gymnasium.error.DependencyNotInstalled as error:
        extra = 'the extra `mujoco`: pip install -e ".[mujoco]"' if "mujoco" in str(error).lower() else f"more: {error}"
        raise UserError(f'"gymnasium/{name}" needs {extra}') from error
    except ImportError as error:
        raise UserError(f'"gymnasium/{name}" needs more: {" ".join(str(error).split())}') from error
    except (TypeError, ValueError, AssertionError, gymnasium.error.Error) as error:
        raise UserError(f'"gymnasium/{name}" with {kwargs}: {" ".join(str(error).split())}') from error


def _register(name):
    """Import the packages of the environment, if it is one of those above."""
    packages = PACKAGES.get(name.split("/")[0], ())
    if packages:
        draw_without_display()  # dm_control asks for it at its import
    try:
        for package in packages:
            importlib.import_module(package)
    except ImportError as error:
        raise UserError(f'"gymnasium/{name}" needs the extra `{packages[0]}`: '
                        f'pip install -e ".[{packages[0]}]"') from error


def draw_without_display():
    """Have MuJoCo draw where there is no screen, with the library for it that is here. Who has said how, is heard."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY") and not os.environ.get("WAYLAND_DISPLAY"):
        if library := next((name for name in ("EGL", "OSMesa") if ctypes.util.find_library(name)), None):
            os.environ.setdefault("MUJOCO_GL", library.lower())


@contextlib.contextmanager
def without_deprecations():
    """MuJoCo 4 warns at every load of a half cheetah that a word in the package's file is deprecated."""
    if importlib.util.find_spec("mujoco") is None:
        yield
        return
    try:
        import mujoco
    except Exception as error:  # OpenGL's own exceptions
        raise UserError(f"MuJoCo cannot be loaded with MUJOCO_GL={os.environ.get('MUJOCO_GL')}, whose library is not "
                        f"installed, it seems: {error}") from error
    before = mujoco.get_mju_user_warning()

    def warn(text):
        if "deprecated" not in text:
            (before or functools.partial(print, "MuJoCo:", file=sys.stderr))(text)

    mujoco.set_mju_user_warning(warn)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def _cost(name, registered, kwargs):
    """What is known of the environment as registered; settings of its own could change it."""
    if registered in COSTS and not kwargs.keys() - {"max_episode_steps"}:
        return COSTS[registered]

    def unknown(x, action, next_x):
        settings = f" with {kwargs}" if kwargs else ""
        raise UserError(f'the cost of "gymnasium/{name}"{settings} is unknown; known to planners are {", ".join(COSTS)}'
                        ", with no settings but max_episode_steps")

    return unknown


def _time_limit(simulator):
    """In steps: the one that Gymnasium knows, else that of dm_control."""
    theirs = getattr(getattr(simulator.unwrapped, "_env", None), "_step_limit", np.inf)
    return simulator.spec.max_episode_steps or (int(theirs) if np.isfinite(theirs) else None)


def _actions(name, space):
    """The action space as ours, and a function from a batch of our actions to what the simulators take."""
    from gymnasium import spaces
    if isinstance(space, spaces.Discrete):
        return Discrete(int(space.n)), lambda action: (action + space.start).tolist()
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise UserError(f'"gymnasium/{name}": actions are {space}; Discrete and flat Box are supported')
    return Box(tuple(space.low.tolist()), tuple(space.high.tolist())), lambda action: (
        np.clip(action.reshape(-1, *space.shape), space.low, space.high))


def _arrays(name, space, num_envs):
    """Shapes and types of a batch of observations: floats as float32."""
    from gymnasium import spaces

    def array(part):
        if not isinstance(part, spaces.Box):
            raise UserError(f'"gymnasium/{name}": observations are {space}; only Box and a Dict of Box are supported')
        return jax.ShapeDtypeStruct((num_envs, *part.shape), jax.dtypes.canonicalize_dtype(part.dtype))

    return {key: array(part) for key, part in space.items()} if isinstance(space, spaces.Dict) else array(space)
