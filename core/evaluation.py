"""How good a policy is: full episodes, and the statistics of many seeds."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

from core.envs.batch import where
from core.envs.interface import Transition, ended


def evaluate(act: Callable, env: Any, key: jax.Array, carry: Any = (),
             observe: Callable | None = None) -> tuple[jax.Array, ...]:
    """Undiscounted returns [E] or [E, N] and lengths [E] of exactly one full episode in each of `env`'s E copies; and
    where the environment reports something of an episode, {name: [E] or [E, N]}: whether it had `success`, and means
    over its steps.

    `act(carry, obs, key) -> (carry, action)`; `carry` is what the policy remembers at the start of an episode;
    `observe(carry, transition) -> carry` lets it learn within the episode. The episodes are fixed by `key`. To take the
    first E episodes that end would favour short ones.
    """
    reset_key, key = jax.random.split(key)
    env_state, obs = env.reset(reset_key)
    agents = () if env.num_agents is None else (env.num_agents,)

    def unfinished(state):
        return any_of(state[-1])

    def step(state):
        t, env_state, obs, carry, (total, length, *told), alive = state
        act_key, env_key = jax.random.split(jax.random.fold_in(key, t))
        carry, action = act(carry, obs, act_key)
        env_state, ts = env.step(env_key, env_state, action)
        if observe is not None:
            carry = observe(carry, Transition.of(obs, action, ts))
        total = total + where(alive, ts.reward, 0.0)
        told = [{name: x + where(alive, ts.info["episode"][name], 0.0) for name, x in seen.items()} for seen in told]
        return t + 1, env_state, ts.obs, carry, (total, length + alive, *told), alive & ~ended(ts)

    played = jnp.zeros((env.num_envs, *agents)), jnp.zeros(env.num_envs, jnp.int32)
    told = {"success": jnp.zeros(env.num_envs)} if getattr(env, "reports_success", False) else {}
    told |= dict.fromkeys(getattr(env, "reports", ()), played[0])
    played += (told,) if told else ()
    start = (jnp.int32(0), env_state, obs, carry, played, jnp.ones(env.num_envs, bool))
    *_, played, _ = jax.lax.while_loop(unfinished, step, start)
    return played


@custom_vmap
def any_of(flags: jax.Array) -> jax.Array:
    """Whether one of them is true: under vmap one of all seeds, so that a loop goes on for all or for none. A condition
    of each seed would make XLA choose between the old and the new value of every array, at every step."""
    return flags.any()


@any_of.def_vmap
def _any_of_all_seeds(num_seeds, batched, flags):
    return flags.any(), False


def by_team(returns: jax.Array, teams: tuple[int, ...] | None) -> dict[str, jax.Array]:
    """{"return": [E]} of returns [E] or [E, N], or with several teams {"return_team0": [E], ...}: the returns of a
    team's agents are added, those of opponents never."""
    if returns.ndim == 1:
        return {"return": returns}
    teams = np.array(teams if teams is not None else [0] * returns.shape[1])
    totals = [returns[:, teams == team].sum(axis=1) for team in np.unique(teams)]
    return {f"return_team{t}": x for t, x in enumerate(totals)} if len(totals) > 1 else {"return": totals[0]}


def score(returns: jax.Array, length: jax.Array, teams: tuple[int, ...] | None,
          told: dict[str, jax.Array] | None = None) -> dict[str, jax.Array]:
    """Scalars of one seed's evaluation: returns [E] or [E, N], lengths [E], and what the environment reports."""
    totals = by_team(returns, teams)
    agents = {f"return_agent{n}": r for n, r in enumerate(returns.mean(axis=0))} if returns.ndim == 2 else {}
    stds = {name.replace("return", "return_std", 1): x.std() for name, x in totals.items()}
    told = {name: x.mean() for name, x in by_agent(told or {}).items()}
    return {name: x.mean() for name, x in totals.items()} | stds | {"length": length.mean()} | told | agents


def by_agent(told: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """{name: [E]} of what is [E] or [E, N]: each agent has a column of its own."""
    alone = {name: x for name, x in told.items() if x.ndim == 1}
    return alone | {f"{name}_agent{n}": x[:, n] for name, x in told.items() if x.ndim == 2 for n in range(x.shape[1])}


def iqm(x: np.ndarray) -> float:
    """Interquartile mean: the mean of the middle half, fractional weights at its edges (Agarwal et al., 2021)."""
    x = np.sort(np.asarray(x, np.float64).ravel())
    n = len(x)
    weight = np.clip(np.minimum(np.arange(1, n + 1) - 0.25 * n, 0.75 * n - np.arange(n)), 0.0, 1.0)
    return float((weight * x).sum() / weight.sum())


def summarize(per_seed: np.ndarray, resamples: int = 2000) -> dict[str, Any]:
    """Mean, IQM and the 95% percentile-bootstrap interval of the IQM over seeds, one value per seed. One seed has no
    interval: None."""
    per_seed = np.asarray(per_seed, np.float64)
    rng = np.random.default_rng(0)  # of the interval only, so that a table comes out the same twice
    samples = rng.choice(per_seed, (resamples, len(per_seed)))
    ci95 = np.percentile([iqm(s) for s in samples], [2.5, 97.5]).tolist() if len(per_seed) > 1 else None
    return dict(mean=float(per_seed.mean()), iqm=iqm(per_seed), ci95=ci95, per_seed=per_seed.tolist())


def cell(per_seed: np.ndarray) -> str:
    """IQM [95% CI] of one value per seed, to print."""
    return words(summarize(per_seed))


def words(summary: dict[str, Any]) -> str:
    low, high = summary["ci95"] or (None, None)
    return f"{summary['iqm']:.4g}" + (f" [{low:.4g}, {high:.4g}]" if summary["ci95"] else " (1 seed)")
