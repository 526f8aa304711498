"""Hidden truth: what the environments share whose parameters the agent does not know.

Such an environment has a flat physical state x [d], a NamedTuple `Params` and

    truth, guess                        Params: the nominal truth, and what a learner believes at first
    start(key) -> x
    dynamics(params, x, action) -> x'   pure, for any params: a planner or a filter calls it with a belief's mean
    cost(x, action, next_x), terminal_cost(x)      what a planner minimises; the reward is −cost

and takes `reset`, `step`, `unknown` and the check of its options from here. A step's info["params"] is the truth that
the step obeyed: for measures, never for acting. What else it may have:

    parameter_error(params, truth)      the distance of two Params; without it Σ |Δ| over all their numbers
    informative                         the entries of x' that tell something about Params; without it all of them. An
                                        entry whose dependence on Params is a multiple of another entry's is left out
    shown                               {name: (i, j)}, pairs of numbers of the flat Params that a film draws
    draw(state) -> Scene, place(x) -> [2]   the picture, and the place in it that Params move

A belief about Params may be Gaussian: a positive number is stored as its logarithm, in a field named log_…, and every
number of Params is drawn, jumps and drifts by addition. So `spread` s multiplies a positive number by a log-uniform
factor in [1/s, s], and adds U(−log s, log s) to any other.

The options, all off by default:

    spread = 1               the truth of an episode is drawn at its reset
    jump_step = 0            after so many steps the truth jumps: by `jump_by`, pairs (field of Params, what is added
    jump_by = ()             to it), or without them to a fresh draw
    drift = 0                standard deviation of what is added to every number after every step
    process_noise = 0        standard deviation, per step and dimension of x
    observation_noise = 0    the same for the observation of x
    reveal = False           the observation is (x, Params) instead of x: the truth that the next step obeys
"""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from core.envs.interface import TimeStep
from core.errors import UserError


class State(NamedTuple):
    x: jax.Array  # [d]
    params: Any  # the truth of this episode, now
    t: jax.Array


class Unknown(NamedTuple):
    """What is unknown of a system. A belief is about θ, a tree; the dynamics f take φ [n], a function of θ."""

    guess: Any  # θ at first
    reduce: Callable[[Any], jax.Array]  # θ -> φ
    dynamics: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # f: φ, x [d], action [A] -> x' [d]
    truth: Callable[[Any], jax.Array]  # Params -> φ
    error: Callable[[jax.Array, Any], jax.Array]  # φ, Params -> the distance from φ to the truth
    error_name: str
    shown: dict[str, tuple[int, int]]  # {name: (i, j)}, entries of φ that a film draws together
    informative: tuple[int, ...]  # entries of x' that tell something about φ


def check(env: Any) -> None:
    """The options of `env` that contradict each other, or the factors of `spread`."""
    if env.spread < 1:
        raise UserError(f"spread = {env.spread}: a factor from 1 on, which means no spread")
    known = env.truth._fields
    if not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in env.jump_by):
        raise UserError(f"jump_by = {env.jump_by}: pairs of a name and what is added are due")
    if unknown := [name for name, _ in env.jump_by if name not in known]:
        raise UserError(f'jump_by names "{unknown[0]}", which is none of {", ".join(known)}')
    if env.jump_step >= env.max_steps:
        raise UserError(f"jump_step = {env.jump_step} never comes: an episode has max_steps = {env.max_steps}")


def reset(env: Any, key: jax.Array) -> tuple[State, jax.Array]:
    start_key, params_key, obs_key = jax.random.split(key, 3)
    state = State(env.start(start_key), draw(params_key, env.truth, env.spread), jnp.int32(0))
    return state, observation(env, obs_key, state)


def step(env: Any, key: jax.Array, state: State, action: jax.Array) -> tuple[State, TimeStep]:
    process_key, obs_key, params_key = jax.random.split(key, 3)
    action, t, obeyed = env.action_space.clip(action), state.t + 1, state.params
    x = add_noise(process_key, env.dynamics(obeyed, state.x, action), env.process_noise)
    reward = -env.cost(state.x, action, x)
    state = State(x, change(params_key, env, obeyed, t), t)
    obs = observation(env, obs_key, state)
    return state, TimeStep(obs, obs, reward, jnp.bool_(False), t >= env.max_steps, {"params": obeyed})


def observation(env: Any, key: jax.Array, state: State) -> jax.Array:
    """[d], or [d + p] with the flat Params where the environment reveals them."""
    x = add_noise(key, state.x, env.observation_noise)
    return jnp.append(x, flatten(state.params)) if env.reveal else x


def split(env: Any, obs: jax.Array) -> tuple[jax.Array, Any]:
    """(x [..., d], Params of leaves [..., *shape]) of obs [..., d + p]; (obs, None) where nothing is revealed."""
    if not getattr(env, "reveal", False):
        return obs, None
    truth, unravel = ravel_pytree(env.truth)
    x, params = jnp.split(obs, [obs.shape[-1] - truth.size], axis=-1)
    for _ in params.shape[:-1]:
        unravel = jax.vmap(unravel)
    return x, unravel(params)


def unknown(env: Any, about: str = "params", choices: tuple[str, ...] = ("params",)) -> Unknown:
    """θ = Params, φ the same flat. An environment that offers other θ names them in `choices` and describes them."""
    if about not in choices:
        raise UserError(f'about = "{about}" is none of {", ".join(choices)}')
    unravel, size = ravel_pytree(env.guess)[1], jax.eval_shape(env.start, jax.random.key(0)).size
    error = getattr(env, "parameter_error", difference)
    return Unknown(
        guess=env.guess, reduce=flatten, dynamics=lambda phi, x, action: env.dynamics(unravel(phi), x, action),
        truth=flatten, error=lambda phi, params: error(unravel(phi), params), error_name="parameter_error",
        shown=getattr(env, "shown", {}), informative=getattr(env, "informative", tuple(range(size))))


def flatten(tree: Any) -> jax.Array:
    return ravel_pytree(tree)[0]


def difference(params: Any, truth: Any) -> jax.Array:
    """Σ |Δ| over all numbers of two Params."""
    return jnp.abs(flatten(params) - flatten(truth)).sum()


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
