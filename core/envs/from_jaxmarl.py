"""Environments of JaxMARL 0.2 by their names there, with its dictionaries stacked over agents; and ours the other way.

Where agents differ, observations are flattened and padded with zeros to the longest, and actions to the widest space.
Then, and where the game itself forbids actions at times, `masked` is true and the last A numbers of every agent's
observation are a mask, 1 for each of the A actions (Discrete) or action components (Box) that it has now. In the
observation the mask also belongs to the right episode after a reset, and reaches a policy wherever that is evaluated.
A padded action component is ignored; an action number beyond an agent's own is taken for its last.

JaxMARL does not say who plays against whom. In MPE the names do: adversaries are the first team, the others the second.

JaxMARL knows only `done`. An end at the time limit is a truncation here, any other a termination. In some games an
agent ends before the episode does (a unit dies): `info["agent_done"]` [N], which a time limit never sets.
"""
import difflib
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from core.config import check_settings
from core.envs.interface import Box, Discrete, TimeStep
from core.errors import UserError


class State(NamedTuple):
    env: Any  # JaxMARL's
    t: jax.Array


class Env:
    def __init__(self, name: str, /, **kwargs):
        jaxmarl = _jaxmarl(f'environment "jaxmarl/{name}"')
        if name not in jaxmarl.registered_envs:
            close = difflib.get_close_matches(name, jaxmarl.registered_envs, n=1)
            hint = f'; did you mean "jaxmarl/{close[0]}"?' if close else ""
            raise UserError(f'unknown environment "jaxmarl/{name}"{hint}')
        with jax.ensure_compile_time_eval():  # inside a program, too, its constants are numbers
            if kwargs:
                check_settings(f"jaxmarl/{name}", kwargs, _settings(type(jaxmarl.make(name))))
            try:
                self.env = jaxmarl.make(name, **kwargs)
            except (TypeError, ValueError, AssertionError) as error:
                raise UserError(f'"jaxmarl/{name}" with {kwargs}: {error}') from error
        self.agents, self.num_agents, self.max_steps = self.env.agents, self.env.num_agents, _episode_length(self.env)
        self.spaces = [self.env.action_space(agent) for agent in self.agents]
        self.action_space = _common(name, self.spaces)
        widths = np.array([_width(space) for space in self.spaces])
        self.own = np.arange(widths.max())[None] < widths[:, None]  # [N, A] not padding
        adversaries = [agent.startswith(("adversary", "leadadversary", "eve")) for agent in self.agents]
        if 0 < sum(adversaries) < len(self.agents):
            self.teams = tuple(int(not adversary) for adversary in adversaries)
        base = jaxmarl.environments.MultiAgentEnv
        self.forbids = type(self.env).get_avail_actions is not base.get_avail_actions
        self.masked = self.forbids or not self.own.all()

    def reset(self, key):
        obs, env_state = _theirs(self.env.reset, key)
        state = State(_strong(env_state), jnp.int32(0))
        return state, self.observe(obs, state)

    def step(self, key, state, action):
        actions = {agent: _fit(space, a) for agent, space, a in zip(self.agents, self.spaces, action, strict=True)}
        # step_env, not step: the latter resets by itself, and would hide the true successor.
        obs, env_state, reward, done, _ = _theirs(self.env.step_env, key, state.env, actions)
        state, over = State(_strong(env_state), state.t + 1), done["__all__"]
        truncated = over & (state.t >= self.max_steps)
        info = {"agent_done": jnp.stack([done[agent] for agent in self.agents]) & ~truncated}
        reward = jnp.stack([reward[agent] for agent in self.agents]).astype(jnp.float32)
        obs = self.observe(obs, state)
        return state, TimeStep(obs, obs, reward, over & ~truncated, truncated, info)

    def observe(self, obs, state):
        """JaxMARL's dictionary -> [N, ...], with the mask behind where there is one."""
        obs = self._stack(obs)
        if not self.masked:
            return obs
        return jnp.concatenate([obs.reshape(self.num_agents, -1), self.available(state).astype(obs.dtype)], axis=1)

    def available(self, state):
        """[N, A] bool."""
        if not self.forbids:
            return jnp.asarray(self.own)
        return self._stack(_theirs(self.env.get_avail_actions, state.env)).astype(bool) & self.own

    def _stack(self, values):
        values = [jnp.asarray(values[agent]) for agent in self.agents]
        if len({v.shape for v in values}) == 1:
            return jnp.stack(values)
        size = max(v.size for v in values)
        return jnp.stack([jnp.pad(v.ravel(), (0, size - v.size)) for v in values])


class AsJaxMARL:
    """One of our multi-agent environments, unbatched, behind JaxMARL's signature: agent_i is row i, `step` resets.

    The infos say per agent what its dones cannot: whether an end was a time limit.
    """

    def __init__(self, env: Any):
        self.spaces = _jaxmarl("AsJaxMARL").environments.spaces
        self.env, self.num_agents, self.max_steps = env, env.num_agents, env.max_steps
        self.agents = [f"agent_{i}" for i in range(env.num_agents)]
        self.obs_shape = jax.eval_shape(env.reset, jax.random.key(0))[1].shape[1:]

    def reset(self, key):
        state, obs = self.env.reset(key)
        return self._split(obs), state

    def step_env(self, key, state, actions):
        state, step = self.env.step(key, state, jnp.stack([actions[agent] for agent in self.agents]))
        done = jnp.broadcast_to(step.terminated | step.truncated, (self.num_agents,))
        infos = {"truncated": jnp.broadcast_to(step.truncated, (self.num_agents,))}
        return self._split(step.obs), state, self._split(step.reward), self._split(done) | {"__all__": done[0]}, infos

    def step(self, key, state, actions):
        step_key, reset_key = jax.random.split(key)
        obs, state, reward, dones, infos = self.step_env(step_key, state, actions)
        fresh = self.reset(reset_key)
        obs, state = jax.tree.map(lambda new, old: jnp.where(dones["__all__"], new, old), fresh, (obs, state))
        return obs, state, reward, dones, infos

    def observation_space(self, agent):
        return self.spaces.Box(-jnp.inf, jnp.inf, self.obs_shape)

    def action_space(self, agent):
        space = self.env.action_space
        if isinstance(space, Discrete):
            return self.spaces.Discrete(space.n)
        return self.spaces.Box(np.float32(space.low), np.float32(space.high), space.shape)

    def _split(self, x):
        return {agent: x[i] for i, agent in enumerate(self.agents)}


def _jaxmarl(what):
    try:
        import jaxmarl.environments.spaces
    except ImportError as error:
        raise UserError(f'{what} needs the extra `envs`: pip install -e ".[envs]"') from error
    return jaxmarl


def _theirs(function, *args):
    """JaxMARL broadcasts across ranks; our own code may be checked not to."""
    with jax.numpy_rank_promotion("allow"):
        return function(*args)


def _episode_length(env):
    """Steps until the time limit ends an episode."""
    if not hasattr(env, "max_steps"):
        raise UserError(f"{env.name} has no time limit that could be told from a termination")
    # Compared with the step counter, which MPE and SMAX do before they raise it.
    return env.max_steps + any(game in type(env).__module__ for game in (".mpe.", ".smax."))


def _width(space):
    return space.n if hasattr(space, "n") else space.shape[0]


def _settings(kind):
    """{name: default} of the parameters of a class and its parents: they hand on what they do not know."""
    made = [inspect.signature(parent.__init__).parameters for parent in reversed(kind.__mro__[:-1])]
    return {name: setting.default for parameters in made for name, setting in parameters.items()
            if setting.kind is setting.POSITIONAL_OR_KEYWORD and name != "self"}


def _common(name, spaces):
    """One space that holds every agent's."""
    if all(hasattr(space, "n") for space in spaces):
        return Discrete(max(int(space.n) for space in spaces))
    if any(hasattr(space, "n") or len(space.shape) != 1 for space in spaces):
        raise UserError(f"jaxmarl/{name}: every agent's actions have to be Discrete, or every agent's a flat Box")
    width = max(space.shape[0] for space in spaces)
    low, high = np.full(width, np.inf), np.full(width, -np.inf)
    for space in spaces:
        own = slice(space.shape[0])
        low[own], high[own] = np.minimum(low[own], space.low), np.maximum(high[own], space.high)
    return Box(tuple(low.tolist()), tuple(high.tolist()))


def _fit(space, action):
    """An action of the common space as one of the agent's own."""
    if hasattr(space, "n"):
        return jnp.minimum(action, space.n - 1).astype(space.dtype)
    low, high = (jnp.broadcast_to(jnp.asarray(bound, jnp.float32), space.shape) for bound in (space.low, space.high))
    return jnp.clip(action[:space.shape[0]], low, high)


def _strong(state):
    """Explicit dtypes: a reset that writes a bare 0 would otherwise cost a second trace."""
    return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.asarray(x).dtype), state)
