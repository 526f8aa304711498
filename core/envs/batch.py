"""`num_envs` copies of one environment, each starting a fresh episode when the last one ends."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from core.envs.interface import TimeStep, ended


class BatchState(NamedTuple):
    env: Any
    episode_return: jax.Array  # (E,) or (E, N), of the running episode
    episode_length: jax.Array  # (E,)
    episode_success: Any  # (E,) whether a step of it had success; () where the environment does not say
    episode_sums: dict  # {name: (E,) or (E, N)} of what the environment reports, over the running episode


class Batch:
    """The interface that algorithms see: E copies, auto-reset.

        reset(key) -> (env_state, obs [E, ...])
        step(key, env_state, action [E, ...]) -> (env_state, TimeStep [E, ...])

    `info["episode"]` holds the count, return and length of the episodes that ended with this step and zeros elsewhere,
    so a sum over any stretch of steps counts every episode exactly once. Where the environment says which steps have
    `success`, it also holds whether one step of the episode had. Of each name that it `reports` it holds the mean over
    the steps of the episode.
    """

    def __init__(self, env, num_envs: int):
        self.env, self.num_envs = env, num_envs
        self.max_steps, self.action_space = env.max_steps, env.action_space
        self.num_agents = getattr(env, "num_agents", None)
        self.reports_success, self.reports = getattr(env, "reports_success", False), getattr(env, "reports", ())

        def fresh(key):
            return jax.vmap(env.reset)(jax.random.split(key, num_envs))

        @custom_vmap
        def start_over(key, done, state, obs):
            """Fresh episodes where `done`. To draw them costs more than many a step, and most steps end none."""
            return jax.lax.cond(
                done.any(), lambda: restart(done, fresh(key), (state, obs)), lambda: (state, obs))

        @start_over.def_vmap
        def start_over_in_all_seeds(num_seeds, batched, *args):
            """The seeds as one batch, so that `cond` stays a branch: under a plain vmap all steps would pay."""
            args = [x if b is True else jax.tree.map(lambda x, b: x if b else repeat(x, num_seeds), x, b)
                    for x, b in zip(args, batched, strict=True)]

            def redraw(key, done, state, obs):
                return restart(done, fresh(key), (state, obs))

            started = jax.lax.cond(
                args[1].any(), lambda: jax.vmap(redraw)(*args), lambda: (args[2], args[3]))
            return started, jax.tree.map(lambda _: True, started)

        self.start_over, self.fresh = start_over, fresh

    def reset(self, key: jax.Array) -> tuple[BatchState, jax.Array]:
        state, obs = self.fresh(key)
        agents = () if self.num_agents is None else (self.num_agents,)
        success = jnp.zeros(self.num_envs, bool) if self.reports_success else ()
        zeros = jnp.zeros((self.num_envs, *agents)), jnp.zeros(self.num_envs, jnp.int32)
        sums = {name: jnp.zeros_like(zeros[0]) for name in self.reports}
        return BatchState(state, *zeros, success, sums), obs

    def step(self, key: jax.Array, env_state: BatchState, action: jax.Array) -> tuple[BatchState, TimeStep]:
        step_key, reset_key = jax.random.split(key)
        state, step = jax.vmap(self.env.step)(jax.random.split(step_key, self.num_envs), env_state.env, action)
        done = ended(step)
        state, obs = self.start_over(reset_key, done, state, step.obs)
        total, length = env_state.episode_return + step.reward, env_state.episode_length + 1
        episode = {"count": done, "return": where(done, total, 0.0), "length": where(done, length, 0)}
        success = ()
        if self.reports_success:
            success = env_state.episode_success | step.info["success"]
            episode["success"], success = success & done, success & ~done
        sums = {name: env_state.episode_sums[name] + step.info[name] for name in self.reports}
        episode |= {name: where(done, jax.vmap(jnp.divide)(x, length), 0.0) for name, x in sums.items()}
        sums = {name: where(done, 0.0, x) for name, x in sums.items()}
        env_state = BatchState(state, where(done, 0.0, total), where(done, 0, length), success, sums)
        return env_state, step._replace(obs=obs, info=step.info | {"episode": episode})


def restart(done: jax.Array, fresh: Any, old: Any) -> Any:
    """Of every leaf [E, ...]: that of `fresh` where [E] `done`, else that of `old`."""
    return jax.tree.map(lambda new, old: where(done, new, old), fresh, old)


def repeat(tree: Any, n: int) -> Any:
    """Every leaf n times: [n, ...]."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x))), tree)


def where(done: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    """`new` where [E] `done`, else `old` [E, ...]; typed keys included."""
    shape = jnp.broadcast_shapes(jnp.shape(new), jnp.shape(old))
    mask = done.reshape(done.shape + (1,) * (len(shape) - 1))
    return jnp.where(jnp.broadcast_to(mask, shape), new, old)
