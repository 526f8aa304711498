"""Hidden truth: what the environments share whose parameters the agent does not know.

Such an environment has a flat physical state x [d], a NamedTuple `Params` and

    truth, guess                        Params: the nominal truth, and what a learner believes at first
    start(key) -> x
    dynamics(params, x, action) -> x'   pure, for any params: a planner or a filter calls it with a belief's mean
    cost(x, action, next_x), terminal_cost(x)      what a planner minimises; the reward is −cost

and, if it can be drawn,

    draw(state) -> Scene, place(x) -> [2]   the picture, and where in it lies what Params move
    shown                                   {name: (i, j)}, numbers of the flat Params that make a picture together

A belief about Params may be Gaussian: what must be positive is there as its logarithm, in fields named log_…, and
every number of Params is drawn, jumps and drifts by addition. So `spread` s multiplies what is positive by a
log-uniform factor in [1/s, s], and adds U(−log s, log s) to the rest.

The options, all off by default:

    spread = 1               the truth of an episode, drawn at its reset
    jump_step = 0            after so many steps the truth jumps: by `jump_by`, pairs (field of Params, what is added
    jump_by = ()             to it), or without them to a fresh draw
    drift = 0                standard deviation of what is added to every number after every step
    process_noise = 0        standard deviation, per step and dimension of x
    observation_noise = 0    the same for what the agent sees, which is x
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from core.envs.interface import TimeStep


class State(NamedTuple):
    x: jax.Array  # [d]
    params: Any  # the truth of this episode, now
    t: jax.Array


def reset(env: Any, key: jax.Array) -> tuple[State, jax.Array]:
    start_key, params_key, obs_key = jax.random.split(key, 3)
    x = env.start(start_key)
    return State(x, draw(params_key, env.truth, env.spread), jnp.int32(0)), add_noise(obs_key, x, env.observation_noise)


def step(env: Any, key: jax.Array, state: State, action: jax.Array) -> tuple[State, TimeStep]:
    process_key, obs_key, params_key = jax.random.split(key, 3)
    action, t = env.action_space.clip(action), state.t + 1
    x = add_noise(process_key, env.dynamics(state.params, state.x, action), env.process_noise)
    reward = -env.cost(state.x, action, x)
    obs = add_noise(obs_key, x, env.observation_noise)
    state = State(x, change(params_key, env, state.params, t), t)
    return state, TimeStep(obs, obs, reward, jnp.bool_(False), t >= env.max_steps, {})


def draw(key: jax.Array, truth: Any, spread: float) -> Any:
    """Params whose every number is off by U(−log spread, log spread)."""
    flat, unravel = ravel_pytree(truth)
    limit = jnp.log(jnp.float32(spread))
    return unravel(flat + jax.random.uniform(key, flat.shape, minval=-limit, maxval=limit))


def change(key: jax.Array, env: Any, params: Any, t: jax.Array) -> Any:
    """The truth after step t: what the transition from x_t to x_{t+1} obeys."""
    draw_key, drift_key = jax.random.split(key)
    if env.jump_step:
        shifted = params._replace(**{name: getattr(params, name) + by for name, by in env.jump_by})
        new = shifted if env.jump_by else draw(draw_key, env.truth, env.spread)
        params = jax.tree.map(lambda new, old: jnp.where(t == env.jump_step, new, old), new, params)
    if env.drift:
        flat, unravel = ravel_pytree(params)
        params = unravel(add_noise(drift_key, flat, env.drift))
    return params


def add_noise(key: jax.Array, x: jax.Array, std: float) -> jax.Array:
    return x + std * jax.random.normal(key, x.shape) if std else x
