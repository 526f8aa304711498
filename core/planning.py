"""Optimisers of action sequences: iCEM and CEM. Each is one pure function

    (key, cost_fn, carry, low [A], high [A], *, settings) -> (carry, action [A], info)

    cost_fn(actions [H, N, A]) -> [N]   the costs of N plans; time is the leading axis; the caller simulates them
    carry = initial_carry(...)          where the next search starts; a search returns it shifted by one step. The
                                        caller restarts it when an episode starts, else old plans enter the new episode
    info["plan"] [H, A]                 the plan whose first action is `action`
    info["cost"] [I]                    the lowest cost of each iteration, that of its kept elites included

A cost that is not finite counts as infinite, −∞ included. Such a plan is never an elite and has no weight in a mean,
also when no plan has a finite cost.

Coloured noise: y = C z turns white z [H] into noise whose power falls as f^−β. It equals the FFT method of Timmer and
König (1995) with the normalisation of the package `colorednoise`, which leaves the constant component out of the unit
variance: for H = 30 the true standard deviation is 1.03 (β = 0.25), 1.15 (2), 1.20 (3.5). Action dimensions and plans
are independent.

    Algorithm 1 of iCEM (Pinneri et al., 2020, arXiv:2008.06389)                             here
     1  μ <- μ of the last step shifted by one, its last action repeated; σ <- σ_init        shift, icem
     4  N_i <- max(2K, N_{i−1} / γ)                                                          population_sizes
     5  samples <- clip(μ + σ ⊙ C^β(H)), N_i of them                                         icem
     7  first iteration: add ξK shifted elites of the last step, with a new last action      icem
     9  later iterations: add ξK elites of the iteration before, with their known costs      icem
    11  last iteration: the first sample is μ itself                                         icem
    13  μ, σ <- α (μ, σ) + (1 − α) mean and standard deviation of the K elites               moments
    14  execute the first action of the cheapest plan, or of μ (`return_mode`)               icem

    K num_elites, N_0 num_samples, γ decay, σ_init init_std, β noise_beta, α momentum, ξK the elites in the carry.
"""
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry_2x32

from core.errors import UserError

CostFn = Callable[[jax.Array], jax.Array]
Info = dict[str, jax.Array]


class Carry(NamedTuple):
    mean: jax.Array  # [H, A]
    elites: jax.Array  # [H, kept_elites, A]
    costs: jax.Array  # [kept_elites], inf where there is no such plan yet


def initial_carry(low: jax.Array, high: jax.Array, horizon: int, kept_elites: int = 0) -> Carry:
    """low, high [A]: the middle of the box at every step, and no elites yet. CEM keeps none."""
    middle = jnp.float32(low) / 2 + jnp.float32(high) / 2
    mean = jnp.broadcast_to(middle, (horizon, middle.size))
    elites = jnp.broadcast_to(middle, (horizon, kept_elites, middle.size))
    return Carry(mean, elites, jnp.full(kept_elites, jnp.inf, jnp.float32))


def icem(key: jax.Array, cost_fn: CostFn, carry: Carry, low: jax.Array, high: jax.Array, *, num_samples: int,
         num_elites: int, num_iterations: int, init_std: float = 0.5, noise_beta: float = 2.0, decay: float = 1.25,
         momentum: float = 0.1, return_mode: str = "best") -> tuple[Carry, jax.Array, Info]:
    """iCEM, Algorithm 1 above.

    `init_std` is in half-widths of the box. `return_mode` "best" executes the cheapest plan: for an exact model. "mean"
    executes μ: for a learnt model, where the cheapest sample exploits model error.
    """
    (horizon, num_kept, action_dim), box = carry.elites.shape, (low[None, None], high[None, None])
    sizes = population_sizes(num_samples, num_elites, num_iterations, decay)
    if num_kept > num_elites:
        raise UserError(f"kept_elites = {num_kept} of num_elites = {num_elites}: there cannot be more")
    # All noise in one call: the last num_kept columns give the shifted elites their new last action.
    noise = coloured_noise(key, noise_beta, (horizon, sum(sizes) + num_kept, action_dim))
    noise = jnp.split(noise, np.cumsum(sizes), axis=1)
    mean, std = carry.mean, jnp.broadcast_to(init_std * (high - low) / 2, carry.mean.shape)
    last_action = mean[-1:, None] + std[-1:, None] * noise[-1][-1:]
    elites, costs, best = jnp.concatenate([carry.elites[:-1], jnp.clip(last_action, *box)]), carry.costs, []
    for i in range(num_iterations):  # not a scan: the populations differ in size
        actions = jnp.clip(mean[:, None] + std[:, None] * noise[i], *box)
        if i == num_iterations - 1:
            actions = jnp.concatenate([mean[:, None], actions[:, 1:]], axis=1)
        if i == 0:  # the carried costs belong to the state of the last step
            actions = jnp.concatenate([actions, elites], axis=1)
            exists = jnp.append(jnp.ones(num_samples, bool), jnp.isfinite(costs))
            costs = jnp.where(exists, evaluate(cost_fn, actions), jnp.inf)
        else:
            costs = jnp.append(evaluate(cost_fn, actions), costs[:num_kept])
            actions = jnp.concatenate([actions, elites[:, :num_kept]], axis=1)
        elites, costs = select(actions, costs, num_elites)
        elite_mean, elite_var = moments(elites, costs, mean, jnp.square(std))
        mean = momentum * mean + (1 - momentum) * elite_mean
        std = momentum * std + (1 - momentum) * jnp.sqrt(elite_var)
        best.append(costs[0])
    plan = jnp.where(jnp.isfinite(costs[0]), elites[:, 0], mean) if return_mode == "best" else mean
    carry = Carry(shift(mean), shift(elites[:, :num_kept]), costs[:num_kept])
    return carry, plan[0], {"plan": plan, "cost": jnp.stack(best)}


def cem(key: jax.Array, cost_fn: CostFn, carry: Carry, low: jax.Array, high: jax.Array, *, num_samples: int,
        num_elites: int, num_iterations: int, momentum: float = 0.1) -> tuple[Carry, jax.Array, Info]:
    """The CEM of PETS (Chua et al., 2018): normals cut at two standard deviations, which always fit in the box.

        σ² <- min(σ², (μ − low)² / 4, (high − μ)² / 4),   μ, σ² <- α (μ, σ²) + (1 − α) moments of the elites

    It starts from σ = (high − low) / 4 and executes the first action of μ. The paper also stops at a small variance.
    """
    population_sizes(num_samples, num_elites, num_iterations, decay=1.0)  # refuses what cannot be
    middle = initial_carry(low, high, 1).mean
    noise = jax.random.truncated_normal(key, -2.0, 2.0, (num_iterations, len(carry.mean), num_samples, low.size))

    def iterate(state, noise):
        mean, var = state
        room = jnp.minimum(mean - low[None], high[None] - mean)
        std = jnp.sqrt(jnp.minimum(var, jnp.square(room / 2)))
        actions = mean[:, None] + std[:, None] * noise
        elites, costs = select(actions, evaluate(cost_fn, actions), num_elites)
        elite_mean, elite_var = moments(elites, costs, mean, var)
        mean = momentum * mean + (1 - momentum) * elite_mean
        return (mean, momentum * var + (1 - momentum) * elite_var), costs[0]

    var = jnp.broadcast_to(jnp.square(high - low) / 16, carry.mean.shape)
    (mean, _), best = lax.scan(iterate, (carry.mean, var), noise)
    return carry._replace(mean=jnp.concatenate([mean[1:], middle])), mean[0], {"plan": mean, "cost": best}


def trajectory_cost(dynamics: Callable, cost: Callable, terminal_cost: Callable, x: jax.Array,
                    actions: jax.Array) -> jax.Array:
    """Σ_t cost(x_t, a_t, x_{t+1}) + terminal_cost(x_H) from x [d] for actions [H, N, A] -> [N].

    `dynamics(x [d], action [A]) -> [d]` and the costs are functions of one plan; they are vmapped here.
    """
    def step(carry, action):
        x, total = carry
        next_x = jax.vmap(dynamics)(x, action)
        return (next_x, total + jax.vmap(cost)(x, action, next_x)), None

    num_plans = actions.shape[1]
    start = jnp.broadcast_to(x, (num_plans, *x.shape)), jnp.zeros(num_plans)
    (x, total), _ = lax.scan(step, start, actions)
    return total + jax.vmap(terminal_cost)(x)


def population_sizes(num_samples: int, num_elites: int, num_iterations: int, decay: float) -> tuple[int, ...]:
    if num_elites > num_samples:
        raise UserError(f"num_elites = {num_elites} of num_samples = {num_samples}: there cannot be more")
    sizes = [num_samples]
    for _ in range(num_iterations - 1):
        sizes.append(max(2 * num_elites, int(sizes[-1] / decay)))
    return tuple(sizes)


def evaluate(cost_fn: CostFn, actions: jax.Array) -> jax.Array:
    """[H, N, A] -> [N], inf where the cost is not a finite number."""
    costs = cost_fn(actions)
    return jnp.where(jnp.isfinite(costs), costs, jnp.inf)


def select(actions: jax.Array, costs: jax.Array, num_elites: int) -> tuple[jax.Array, jax.Array]:
    """The cheapest of [H, N, A] and [N] -> [H, E, A] and [E], best first. On a CPU, top_k is eight times an argsort."""
    negative, index = lax.top_k(-costs, num_elites)
    return actions[:, index], -negative


def moments(elites: jax.Array, costs: jax.Array, mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance over the elites [H, E, A] of finite cost [E] -> [H, A] twice; `mean, var` if there are none."""
    good = jnp.isfinite(costs)
    weight = (good / jnp.maximum(good.sum(), 1))[None, :, None]
    elite_mean = (weight * elites).sum(axis=1)
    elite_var = (weight * jnp.square(elites - elite_mean[:, None])).sum(axis=1)
    return jnp.where(good.any(), elite_mean, mean), jnp.where(good.any(), elite_var, var)


def shift(plan: jax.Array) -> jax.Array:
    """[H, ...] without its first step, the last one repeated."""
    return jnp.concatenate([plan[1:], plan[-1:]])


def coloured_noise(key: jax.Array, beta: float, shape: tuple[int, int, int]) -> jax.Array:
    """[H, N, A] of power f^−beta along H."""
    horizon, num_plans, action_dim = shape
    white = normal(key, (horizon, num_plans * action_dim))
    return (colouring(horizon, beta) @ white).reshape(shape)


def colouring(horizon: int, beta: float) -> np.ndarray:
    """C [H, H] with C z coloured: column j is the part of the j-th normal in the series. The identity for beta = 0."""
    if beta == 0:
        return np.eye(horizon, dtype=np.float32)
    frequency = np.fft.rfftfreq(horizon)
    scale = np.maximum(frequency, 1 / horizon) ** (-beta / 2)
    real = np.diag(scale).astype(complex)  # one row per normal
    imaginary = 1j * real
    edges = [0, horizon // 2] if horizon % 2 == 0 else [0]  # components that are real
    real[edges] *= np.sqrt(2)
    spectrum = np.concatenate([real, np.delete(imaginary, edges, axis=0)])
    power = scale[1:] ** 2
    power[-1] *= ((1 + horizon % 2) / 2) ** 2
    std = 2 * np.sqrt(power.sum()) / horizon
    return np.float32(np.fft.irfft(spectrum, horizon).T / std)


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normals from 23 bits each. jax.random.normal uses one of the two words that threefry makes; its hashing
    takes half the time of a plan on a CPU."""
    size = int(np.prod(shape))
    bits = threefry_2x32(jax.random.bits(key, (2,)), lax.iota(jnp.uint32, size))
    bits = lax.optimization_barrier(bits).reshape(shape)  # else XLA computes the hash once for each use
    unit = ((bits >> 9).astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-22 - 1  # in (−1, 1), symmetric
    return np.float32(np.sqrt(2)) * lax.erf_inv(unit)
