"""Runs on disk, for the launchers that look at them: reading one back, an episode of it, a figure."""
import contextlib
import io
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from PIL import Image

from core import checkpoint, files, render
from core.envs import Transition, ended, make_env
from core.envs.from_gymnasium import draw_without_display
from core.errors import UserError
from core.logging import read_metrics
from launchers import cli


def load(path, best=False):
    """(algorithm, config, run [S, ...], meta) of a run's folder or of one of its checkpoints; meta["seed"] is the first
    of the run's seeds. Of the run only those arrays are read that acting needs; the others are zeros."""
    path = pathlib.Path(path)
    folder = path if (path / "config.json").exists() else path.parent.parent
    if not (folder / "config.json").exists():
        raise UserError(f"no run in {path}: it has no config.json")
    config, seed, num_seeds = read_config(folder)
    algorithm = cli.algorithm_of(config)
    if not hasattr(algorithm, "act"):
        raise UserError(f'"{config.algorithm}" in {folder} has no policy: it only fits a model')
    source = cli.source_of(config)
    init = cli.per_seed(lambda seed: algorithm.init(jax.random.key(seed), source, config), num_seeds)
    like = jax.eval_shape(init, jax.ShapeDtypeStruct((num_seeds,), jnp.int32))
    needed = read_by_acting(algorithm, like, cli.eval_env(config, 1))
    if path == folder and not checkpoint.steps(folder / "checkpoints"):
        raise UserError(f"{folder} holds no checkpoint yet")
    if path == folder and not best:
        tree, meta = checkpoint.restore_newest(folder / "checkpoints", dict(run=like), dict(run=needed))
    else:
        file = path if path != folder else checkpoint.best(folder / "checkpoints")
        tree, meta = checkpoint.restore(file, dict(run=like), dict(run=needed))
    return algorithm, config, tree["run"], meta | dict(seed=seed, iteration=meta["step"])


def read_config(folder):
    """(config, first seed, number of seeds) of the config.json in a run's folder, which somebody else may have made."""
    path = pathlib.Path(folder) / "config.json"
    stored = files.read(path, algorithm=str, env=str, seed=int, num_seeds=int, eval_seed=int)
    num_seeds, seed, _ = (stored.pop(k) for k in ("num_seeds", "seed", "eval_seed"))
    for name, kind in dict(dataset=str, eval_env=str, env_kwargs=dict, eval_env_kwargs=dict).items():
        if not isinstance(stored.get(name, kind()), kind):
            raise UserError(f"{path} is damaged: {name} is {stored[name]!r:.60}")
    if not 1 <= num_seeds < 2**31 or not 0 <= seed < 2**31:
        raise UserError(f"{path} is damaged: {num_seeds} seeds from {seed} on")
    try:
        config = ml_collections.FrozenConfigDict(stored)
        cli.algorithm_of(config)  # which checks the config
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    return config, seed, num_seeds


def read_by_acting(algorithm, like, env):
    """A tree like the run's [S, ...]: which of its arrays an episode reads. The program of an episode says so."""
    run = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), like)

    def episode(run, key):
        act, observe = cli.policy(algorithm, run)
        (env_state, obs), carry = env.reset(key), cli.start_carry(algorithm, run, 1)
        carry, action = act(carry, obs, key)
        _, step = env.step(key, env_state, action)
        carry = carry if observe is None else observe(carry, Transition.of(obs, action, step))
        return act(carry, obs, key)

    with jax.debug_key_reuse(False):
        jaxpr = jax.make_jaxpr(episode)(run, jax.random.key(0)).jaxpr
    used = {id(variable) for variable in jaxpr.outvars}
    for eqn in reversed(jaxpr.eqns):
        if used & {id(variable) for variable in eqn.outvars}:
            used |= {id(variable) for variable in eqn.invars}
    flags = [id(variable) in used for variable in jaxpr.invars[:-1]]
    return jax.tree.unflatten(jax.tree.structure(like), flags)


def play(algorithm, run, env, key, steps=None):
    """(states [T + 1, ...], reward [T, ...], carries [T + 1, ...]) of one episode of the unbatched `env`, of its first
    `steps` at most. Carries are those of one environment, (1, ...)."""
    act, observe = cli.policy(algorithm, run)

    def step(before, key):
        state, obs, carry = before
        act_key, env_key = jax.random.split(key)
        carry, action = act(carry, obs[None], act_key)
        state, ts = env.step(env_key, state, action[0])
        if observe is not None:
            carry = observe(carry, jax.tree.map(lambda x: jnp.asarray(x)[None], Transition.of(obs, action[0], ts)))
        return (state, ts.obs, carry), (state, ts.reward, carry, ended(ts))

    @jax.jit
    def episode(key):
        reset_key, key = jax.random.split(key)
        state, obs = env.reset(reset_key)
        carry = cli.start_carry(algorithm, run, 1)
        keys = jax.random.split(key, min(steps or env.max_steps, env.max_steps))
        _, (states, reward, carries, done) = jax.lax.scan(step, (state, obs, carry), keys)
        states, carries = jax.tree.map(
            lambda first, rest: jnp.concatenate([jnp.asarray(first)[None], rest]), (state, carry), (states, carries))
        return states, reward, carries, done

    states, reward, carries, done = episode(key)
    length = int(done.argmax()) + 1 if done.any() else len(reward)
    states, carries = jax.tree.map(lambda x: x[:length + 1], (states, carries))
    return states, reward[:length], carries


def watch(algorithm, run, name, kwargs, key, steps=None):
    """(pictures [T, H, W, 3], reward [T or T - 1]) of one episode of a Gymnasium environment, by its own renderer.
    There is no picture of the state at its end: by then the environment has started afresh."""
    env, start = host_renderer(name, kwargs)
    act, observe = (f and jax.jit(f) for f in cli.policy(algorithm, run))
    reset_key, key = jax.random.split(key)
    (state, obs), carry = env.reset(reset_key), cli.start_carry(algorithm, run, 1)
    pictures, rewards = [start.render()], []
    for step_key in jax.random.split(key, min(steps or env.max_steps, env.max_steps)):
        carry, action = act(carry, obs, step_key)
        state, ts = env.step(step_key, state, action)
        rewards.append(ts.reward[0])
        if ended(ts).any():
            break
        carry = observe(carry, Transition.of(obs, action, ts)) if observe else carry
        obs = ts.obs
        pictures.append(start.render())
    start.close()  # while OpenGL is still there
    return np.stack(pictures), np.array(rewards)


def host_renderer(name, kwargs):
    """The Gymnasium environment `name` in one copy, and its simulator, to be closed, if that makes pictures here."""
    draw_without_display()
    try:
        env = make_env(name, 1, **{**kwargs, "render_mode": "rgb_array"})
        simulator = env.spare[0].envs[0]  # which the first reset takes
        simulator.reset(seed=0)
        if np.ndim(simulator.render()) != 3:
            raise ValueError("its renderer makes no pictures")
    except UserError:
        raise
    except Exception as error:  # a missing pygame, OpenGL or display, each with an exception of its own
        words = " ".join(str(error).split())[:150]
        needs = "; without a screen, install libegl1 or libosmesa6, and leave MUJOCO_GL unset"
        hint = needs if "gl" in words.lower() or "display" in words.lower() else ""
        raise UserError(f'environment "{name}" cannot be drawn here: {words}{hint}') from error
    return env, simulator


def host_film(pictures, reward, height):
    """Pictures [T, H, W, 3] scaled to `height`, the returns so far beside them; and the return."""
    size = render.even(height * pictures.shape[2] / pictures.shape[1]), height
    left = np.stack([np.asarray(Image.fromarray(picture).resize(size)) for picture in pictures])
    square = render.Scene((0, 0), (1, 1), [])
    right = render.film([square] * len(pictures), reward[:len(pictures) - 1], height)[:, :, render.even(height):]
    return np.concatenate([left, right], axis=2), reward.sum()


def drawable(name, **kwargs):
    """The environment `name`, unbatched, if it can be drawn."""
    env = getattr(make_env(name, 1, **kwargs), "env", None)
    if not hasattr(env, "draw"):
        raise UserError(f'environment "{name}" cannot be drawn: it has no draw(state)')
    env.draw(jax.device_get(jax.jit(env.reset)(jax.random.key(0))[0]))  # it may refuse: before an episode is played
    return env


@contextlib.contextmanager
def figure(path, **kwargs):
    """A figure to draw on, which is `path` once all is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.backend_bases import FigureCanvasBase

    kind = pathlib.Path(path).suffix[1:] or "png"
    if kind not in FigureCanvasBase.get_supported_filetypes():
        raise UserError(f"{path}: a picture ends in .png, .pdf or .svg")
    fig, axes = plt.subplots(layout="constrained", **kwargs)
    yield fig, axes
    picture = io.BytesIO()
    try:
        fig.savefig(picture, format=kind, dpi=120)
    except ValueError as error:  # a name that matplotlib takes for a formula
        raise UserError(f"{path} cannot be drawn: {' '.join(str(error).split())}") from error
    finally:
        plt.close(fig)
    files.write(path, picture.getvalue())


def regret(folder, against):
    """Reward that the run `against` got more than that of `folder` up to every row, [rows, seeds]: what it cost not to
    know. Both log `reward`, the mean of a step since the row before."""
    mine, other = read_metrics(folder), read_metrics(against)
    for path, metrics in ((folder, mine), (against, other)):
        if "reward" not in metrics:
            raise UserError(f"{path} logs no reward of its training steps: there is no regret to it")
    for name in ("seed", "env_steps"):
        if not np.array_equal(other[name], mine[name]):
            raise UserError(f"{against} and {folder} differ in {name}: regret is paired by seed and step")
    num_envs = files.read(pathlib.Path(folder) / "config.json", num_envs=int)["num_envs"]
    span = np.diff(mine["env_steps"], axis=0, prepend=0) / num_envs
    return np.cumsum((other["reward"] - mine["reward"]) * span, axis=0)
