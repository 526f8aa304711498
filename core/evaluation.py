"""How good a policy is: full episodes, and the statistics of many seeds."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core.envs.interface import TimeStep


def evaluate(act: Callable, env: Any, key: jax.Array, carry: Any = ()) -> tuple[jax.Array, jax.Array]:
    """Undiscounted returns [E] or [E, N] and lengths [E] of exactly one full episode in each of `env`'s E copies.

    `act(carry, obs, key) -> (carry, action)`; `carry` is what the policy remembers at the start of an episode. The
    episodes are fixed by `key`. Taking the first E episodes to end instead would favour short ones.
    """
    reset_key, key = jax.random.split(key)
    env_state, obs = env.reset(reset_key)
    agents = () if env.num_agents is None else (env.num_agents,)

    def unfinished(state):
        return state[-1].any()

    def step(state):
        t, env_state, obs, carry, total, length, alive = state
        act_key, env_key = jax.random.split(jax.random.fold_in(key, t))
        carry, action = act(carry, obs, act_key)
        env_state, ts = env.step(env_key, env_state, action)
        total = total + jnp.where(alive.reshape(-1, *(1 for _ in agents)), ts.reward, 0.0)
        return t + 1, env_state, ts.obs, carry, total, length + alive, alive & ~ended(ts)

    total, length = jnp.zeros((env.num_envs, *agents)), jnp.zeros(env.num_envs, jnp.int32)
    start = (jnp.int32(0), env_state, obs, carry, total, length, jnp.ones(env.num_envs, bool))
    *_, total, length, _ = jax.lax.while_loop(unfinished, step, start)
    return total, length


def ended(step: TimeStep) -> jax.Array:
    return step.terminated | step.truncated


def iqm(x: np.ndarray) -> float:
    """Interquartile mean: the mean of the middle half, fractional weights at its edges (Agarwal et al., 2021)."""
    x = np.sort(np.asarray(x, np.float64).ravel())
    n = len(x)
    weight = np.clip(np.minimum(np.arange(1, n + 1) - 0.25 * n, 0.75 * n - np.arange(n)), 0.0, 1.0)
    return float((weight * x).sum() / weight.sum())


def summarize(per_seed: np.ndarray, resamples: int = 2000) -> dict[str, Any]:
    """Mean, IQM and the 95% percentile-bootstrap interval of the IQM over seeds, one value per seed."""
    per_seed = np.asarray(per_seed, np.float64)
    rng = np.random.default_rng(0)  # of the interval only, so that a table comes out the same twice
    samples = rng.choice(per_seed, (resamples, len(per_seed)))
    low, high = np.percentile([iqm(s) for s in samples], [2.5, 97.5])
    return dict(mean=float(per_seed.mean()), iqm=iqm(per_seed), ci95=[float(low), float(high)],
                per_seed=per_seed.tolist())
