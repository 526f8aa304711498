"""Runs on disk, for the launchers that look at them: reading one back, and an episode of it."""
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections

from core import checkpoint
from core.envs import make_env
from core.errors import UserError
from core.evaluation import ended
from launchers import cli


def load(path, best=False):
    """(algorithm, config, run [S, ...], meta) of a run's folder or of one of its checkpoints."""
    path = pathlib.Path(path)
    folder = path if (path / "config.json").exists() else path.parent.parent
    if not (folder / "config.json").exists():
        raise UserError(f"no run in {path}: it has no config.json")
    stored = json.loads((folder / "config.json").read_text())
    num_seeds, _, _ = (stored.pop(k) for k in ("num_seeds", "seed", "eval_seed"))
    config = ml_collections.FrozenConfigDict(stored)
    algorithm = cli.algorithm_of(config)
    env = make_env(config.env, config.num_envs, **config.get("env_kwargs", {}))
    init = cli.per_seed(lambda seed: algorithm.init(jax.random.key(seed), env, config), num_seeds)
    like = jax.eval_shape(init, jnp.arange(num_seeds))
    if path != folder:
        return algorithm, config, *checkpoint.restore(path, like)
    if not checkpoint.steps(folder / "checkpoints"):
        raise UserError(f"{folder} holds no checkpoint yet")
    if best:
        return algorithm, config, *checkpoint.restore(checkpoint.best(folder / "checkpoints"), like)
    return algorithm, config, *checkpoint.restore_newest(folder / "checkpoints", like)


def start_carry(algorithm, run, num_envs):
    return algorithm.initial_carry(run, num_envs) if hasattr(algorithm, "initial_carry") else ()


def play(algorithm, run, env, key, steps=None):
    """(states [T + 1, ...], reward [T, ...]) of one episode of the unbatched `env`, of its first `steps` at most."""
    def step(before, key):
        state, obs, carry = before
        act_key, env_key = jax.random.split(key)
        carry, action = algorithm.act(run, carry, obs[None], act_key)
        state, ts = env.step(env_key, state, action[0])
        return (state, ts.obs, carry), (state, ts.reward, ended(ts))

    @jax.jit
    def episode(key):
        reset_key, key = jax.random.split(key)
        state, obs = env.reset(reset_key)
        keys = jax.random.split(key, min(steps or env.max_steps, env.max_steps))
        _, (states, reward, done) = jax.lax.scan(step, (state, obs, start_carry(algorithm, run, 1)), keys)
        states = jax.tree.map(lambda first, rest: jnp.concatenate([jnp.asarray(first)[None], rest]), state, states)
        return states, reward, done

    states, reward, done = episode(key)
    length = int(done.argmax()) + 1 if done.any() else len(reward)
    return jax.tree.map(lambda x: x[:length + 1], states), reward[:length]


def drawable(name, **kwargs):
    """The environment `name`, unbatched, if it can be drawn."""
    env = getattr(make_env(name, 1, **kwargs), "env", None)
    if not hasattr(env, "draw"):
        raise UserError(f'environment "{name}" cannot be drawn: it has no draw(state)')
    return env
