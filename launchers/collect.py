"""Whole episodes of a config's own method, or of a trained one, into a data set: the first stage of a learned model.

    python -m launchers.collect --config=configs/x.py --workdir=runs/x                     # runs/x/collect/data.npz
    python -m launchers.collect --config=configs/x.py --workdir=runs/x --run=runs/ppo_x    # as that run's policy acts

`config.collect` holds the number of `episodes`, the standard deviation `action_noise` of what is added to every action
(in half widths of the box, which then clips it) or, where actions are discrete, the share `random_actions` of actions
that are random instead, uniform over all, and keys that replace those of the config meanwhile. The method acts
and, where it has `observe`, learns within an episode, as in an evaluation. Where the environment reveals its hidden
truth, the data do not hold it. An offline method does not collect its data: --run says whose policy does, and
`collect.num_envs` in how many environments (1 unless it is there).

Each of the `num_envs` environments gives the same number of its first episodes (one more at most), however long they
are: the episodes that end first would be the short ones. They lie one after another in `data.npz`, each in the order of
time. Step t uses the key fold_in(fold_in(key(seed), 1), t).
"""
import json
import resource
import shutil
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from core import checkpoint, files
from core import minari as minari_datasets
from core.dataset import Dataset, last_steps
from core.envs import Box, Discrete, Transition, ended, hidden, make_env, restart
from core.errors import UserError
from core.logging import provenance
from launchers import cli
from launchers.runs import figure, load


def collect(config, *, workdir: str | None = None, run: str | None = None, seed: int = 0, resume: bool = False,
            minari: str | None = None, save_every: float = 5.0, smoke: bool = False) -> dict[str, Any]:
    """Write a data set of whole episodes and return what summary.json holds.

    Args:
        workdir: Folder of all three stages; by default runs/ and the name of the config.
        run: Collect with the method and the first seed of this run.
        seed: Fixes the episodes.
        resume: Go on from the newest checkpoint.
        minari: Write a Minari dataset of this name, too.
        save_every: Seconds between checkpoints, at least.
        smoke: Two episodes.
    """
    cli.compilation_cache()
    cli.check_seeds(seed=seed)
    folder = cli.stage_folder(config, workdir, "collect")
    config, episodes, noise, random = settings(config, smoke)
    if minari:
        minari_datasets.require_free(minari)
    if (folder / "summary.json").exists():
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # it may have been killed before it did so itself
        raise UserError(f"{folder} holds a finished collection: choose another workdir")
    env, began = cli.train_env(config), time.perf_counter()
    quota = np.array([len(part) for part in np.array_split(np.arange(episodes), env.num_envs)])
    actor = trained_actor(run, config) if run else untrained_actor(config, env, seed)
    program, state = compile_programs(*actor, env, quota, noise, random, seed)
    compile_seconds, seconds = time.perf_counter() - began, 0.0

    stored = cli.config_dict(config) | dict(seed=seed, episodes=episodes, action_noise=noise, random_actions=random,
                                           run=run)
    with cli.open_folder(folder, stored, resume):
        checkpoints = None if getattr(env, "on_host", False) else folder / "checkpoints"  # no simulator fits into one
        if resume and checkpoints and checkpoint.steps(checkpoints):
            state, meta = checkpoint.restore_newest(checkpoints, state)
            seconds = meta["seconds"]
        if not resume:
            typed = provenance(dict(seed=seed, run=run, minari=minari))
            files.write(folder / "provenance.json", json.dumps(typed, indent=1))
            files.write(folder / "config.json", json.dumps(stored, indent=1))
        state, seconds = fill(program, state, quota, checkpoints, seconds, save_every)

        data = whole_episodes(jax.tree.map(np.asarray, state.record), quota)
        returns = returns_of(data)
        if not np.isfinite(returns).all():
            raise UserError(f"the return of episode {np.argmin(np.isfinite(returns))} is not finite: nothing is stored")
        Dataset.create(data).save(folder / "data.npz")
        if minari:
            minari_datasets.write(minari, data, env.action_space)
        draw(folder / "data.png", data, returns, f"{config.env}: {episodes} episodes")
        mean, half = float(returns.mean()), float(1.96 * returns.std() / episodes**0.5)
        summary = dict(
            algorithm=config.algorithm, env=config.env, run=run, seed=seed, episodes=episodes,
            transitions=len(data["reward"]), returns=dict(mean=mean, ci95=[mean - half, mean + half]),
            compile_seconds=compile_seconds, seconds=seconds,
            env_steps_per_second=int(state.t) * env.num_envs / seconds,
            peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, device=jax.devices()[0].device_kind)
        files.write(folder / "summary.json", json.dumps(summary, indent=1))  # last: it says that all is there
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        print(f"{episodes} episodes, {len(data['reward']):,} transitions, return {mean:.4g} ± {half:.2g}, "
              f"{seconds:.1f} s, compiled {compile_seconds:.1f} s: {folder / 'data.npz'}")
        return summary


def settings(config, smoke):
    """(the config with the keys of its section `collect` in the place of its own, episodes, action_noise,
    random_actions)."""
    cli.algorithm_of(config)  # which checks the config
    section = cli.section(config, "collect").to_dict()
    episodes, noise = section.pop("episodes", 0), section.pop("action_noise", 0.0)
    random = section.pop("random_actions", 0.0)
    if type(random) not in (int, float) or not 0 <= random <= 1:
        raise UserError(f"config.collect.random_actions = {random!r}: has to be a number from 0 to 1")
    config = ml_collections.ConfigDict(config.to_dict())
    if "dataset" in config:  # an offline method has no environments of its own
        config.num_envs = section.get("num_envs", 1)
    for name, value in dict(episodes=episodes, num_envs=config.num_envs).items():
        if type(value) is not int or value < 1:
            raise UserError(f"config.collect.{name} = {value!r}: has to be an integer from 1 on")
    for name, value in section.items():
        if name not in config:
            raise UserError(f'config.collect has "{name}", which the config has not; {cli.suggest(name, list(config))}')
        try:
            config[name] = value
        except TypeError as error:
            raise UserError(f"config.collect.{name}: {error}") from error
    cli.algorithm_of(config)
    episodes = 2 if smoke else episodes
    config.num_envs = min(config.num_envs, episodes)
    return ml_collections.FrozenConfigDict(config), episodes, noise, random


def untrained_actor(config, env, seed):
    """(algorithm, run) of a config, as it starts."""
    algorithm = cli.algorithm_of(config)
    if not hasattr(algorithm, "act"):
        raise UserError(f'"{config.algorithm}" does not act: collect with another run by --run')
    if "dataset" in config:
        raise UserError(f'"{config.algorithm}" learns from data: collect with the run of another method by --run')
    key = jax.random.fold_in(jax.random.key(seed), 0)
    return algorithm, jax.jit(lambda key: algorithm.init(key, env, config))(key)


def trained_actor(path, config):
    """(algorithm, run) of the first seed of a run, as if it had been started in the environment of `config`."""
    algorithm, its, run, _ = load(path)
    if its.env != config.env:
        raise UserError(f'{path} is a run in "{its.env}", the config is about "{config.env}"')
    env = make_env(config.env, its.get("num_envs", 1), **config.get("env_kwargs", {}))
    return algorithm, cli.rebind(algorithm, jax.tree.map(lambda x: x[0], run), env, its)


class Collection(NamedTuple):
    """Everything needed to go on, besides the run that acts."""

    env_state: Any
    obs: jax.Array
    carry: Any
    t: jax.Array  # steps so far
    count: jax.Array  # (E,) episodes ended so far
    record: dict  # (T, E, ...), rows from t on are empty


def compile_programs(algorithm, run, env, quota, noise, random, seed):
    """`program(state, stop)`, compiled, and the state that it starts from."""
    act, observe = cli.policy(algorithm, run)
    fresh, key = cli.start_carry(algorithm, run, env.num_envs), jax.random.key(seed)
    if noise and not isinstance(env.action_space, Box):
        raise UserError(f"config.collect.action_noise = {noise}, but the actions are discrete")
    if random and not isinstance(env.action_space, Discrete):
        raise UserError(f"config.collect.random_actions = {random}, but the actions are continuous")

    def explore(key, action):
        """The action (E, ...) that is taken, and stored."""
        if random:
            whether_key, which_key = jax.random.split(key)
            other = env.action_space.sample(which_key, action.shape)
            return jnp.where(jax.random.uniform(whether_key, action.shape) < random, other, action)
        if not noise:
            return action
        half = jnp.broadcast_to(env.action_space.scale[1], action.shape)
        return env.action_space.clip(action + noise * half * jax.random.normal(key, action.shape))

    def step(state, key):
        act_key, noise_key, env_key = jax.random.split(key, 3)
        carry, action = act(state.carry, state.obs, act_key)
        action = explore(noise_key, action)
        env_state, ts = env.step(env_key, state.env_state, action)
        transition = Transition.of(state.obs, action, ts)
        carry = carry if observe is None else observe(carry, transition)
        carry = restart(ended(ts), fresh, carry)
        shown = dict(obs=hidden.split(env.env, transition.obs)[0], next_obs=hidden.split(env.env, ts.next_obs)[0])
        return state._replace(env_state=env_state, obs=ts.obs, carry=carry), transition._asdict() | shown

    def start():
        env_state, obs = env.reset(jax.random.fold_in(key, 2))
        state = Collection(env_state, obs, fresh, jnp.int32(0), jnp.zeros(env.num_envs, jnp.int32), {})
        _, row = jax.eval_shape(step, state, jax.random.key(0))
        length = int(quota[0]) * env.max_steps
        return state._replace(record=jax.tree.map(lambda x: jnp.zeros((length, *x.shape), x.dtype), row))

    def advance(state):
        after, row = step(state, jax.random.fold_in(jax.random.fold_in(key, 1), state.t))
        record = jax.tree.map(lambda old, new: old.at[state.t].set(new), state.record, row)
        return after._replace(t=state.t + 1, record=record, count=state.count + (row["terminated"] | row["truncated"]))

    def program(state, stop):
        return jax.lax.while_loop(
            lambda state: (state.count < quota).any() & (state.t < stop), advance, state)

    state = jax.tree.map(jnp.copy, jax.jit(start)())  # its parts are donated, so no two may be one array
    return jax.jit(program, donate_argnums=0).lower(state, 0).compile(), state


def fill(program, state, quota, folder, seconds, save_every):
    """The state when every environment has given its episodes, and the seconds that took. Checkpoints between."""
    total = len(state.record["truncated"])
    bar = cli.progress_bar(" episodes", int(quota.sum()), int(np.minimum(state.count, quota).sum()))
    size, saved = 1, time.perf_counter()
    while (done := np.minimum(state.count, quota).sum()) < quota.sum() and state.t < total:
        began = time.perf_counter()
        state = jax.block_until_ready(program(state, min(int(state.t) + size, total)))
        took = time.perf_counter() - began
        seconds += took
        bar.update(int(np.minimum(state.count, quota).sum() - done))
        size = size if took > 0.25 else 2 * size
        if folder and time.perf_counter() - saved > save_every:
            checkpoint.save(folder, int(state.t), state, dict(seconds=seconds, score=None))
            saved = time.perf_counter()
    bar.close()
    if (state.count < quota).any():
        raise UserError(f"an episode did not end within the environment's max_steps = {total // quota[0]}")
    return state, seconds


def whole_episodes(record, quota):
    """(T, E, ...) -> (N, ...): of environment e its first quota[e] episodes, one environment after the other."""
    done = record["terminated"] | record["truncated"]
    rows = [np.flatnonzero(done[:, e])[n - 1] + 1 for e, n in enumerate(quota)]
    return jax.tree.map(lambda x: np.concatenate([x[:n, e] for e, n in enumerate(rows)]), record)


def returns_of(data):
    """(episodes,), summed over the agents where there are several."""
    ends = np.unique(last_steps(data))
    return np.add.reduceat(data["reward"].reshape(ends[-1] + 1, -1).sum(1), np.append(0, ends[:-1] + 1))


def draw(path, data, returns, title):
    obs = jax.tree.leaves(data["obs"])[0].reshape(len(data["reward"]), -1)
    with figure(path, ncols=2, figsize=(10, 4)) as (fig, (left, right)):
        left.plot(returns, ".", color="tab:blue")
        left.set(xlabel="episode", ylabel="return")
        right.plot(obs[:, 0], obs[:, 1 % obs.shape[1]], ",", color="tab:blue")
        right.set(xlabel="first entry of obs", ylabel="second entry")
        fig.suptitle(title)


if __name__ == "__main__":
    cli.run(collect)
