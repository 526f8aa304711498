"""Second stage of a learned model: fit it to collected data.

    python -m launchers.pretrain --config=configs/x.py --workdir=runs/x          # runs/x/collect/data.npz
    python -m launchers.pretrain --config=configs/x.py --data=minari:cartpole/random-v0

Writes `runs/x/pretrain/model.npz`, the weights. `config.pretrain.holdout` of the episodes, whole ones, are kept from
the model and tell how good it is. Update i uses the key fold_in(fold_in(key(seed), 1), i).
"""
import functools
import json
import pathlib
import resource
import time

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from ml_collections import config_flags

from core import checkpoint, minari
from core.dataset import Dataset, last_steps, write_arrays
from core.envs import make_env
from core.errors import UserError
from core.logging import Logger, read_metrics, write
from launchers import cli
from launchers.runs import figure

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "A file of configs/ with a section `pretrain`.")
flags.DEFINE_string("workdir", None, "Folder of all three stages; by default runs/ and the name of the config.")
flags.DEFINE_string("data", None, "An .npz or minari:NAME, instead of what collect wrote into workdir.")
flags.DEFINE_integer("seed", 0, "Fixes the split, the first weights and the minibatches.")
flags.DEFINE_bool("resume", False, "Go on from the newest checkpoint.")
flags.DEFINE_float("save_every", 5.0, "Seconds between checkpoints, at least.")
flags.DEFINE_bool("smoke", False, "Ten updates.")

EVALUATIONS, WINDOWS = 20, 256


def read_data(path, env):
    """The transitions, if they are of this environment."""
    if not path.startswith("minari:") and not pathlib.Path(path).exists():
        raise UserError(f"no data in {path}: run launchers.collect first, or name another file by --data")
    data = minari.read(path.removeprefix("minari:")) if path.startswith("minari:") else Dataset.load(path).data
    due = dict(obs=jax.eval_shape(env.reset, jax.random.key(0))[1].shape[1:], action=env.action_space.shape)
    for name in ("obs", "action", "next_obs", "reward"):
        if name not in data:
            raise UserError(f'{path} has no "{name}"')
        if name in due and data[name].shape[1:] != due[name]:
            raise UserError(f"{path}: {name} {data[name].shape[1:]} where the environment has {due[name]}")
    return Dataset.create(data)


def build(algorithm, env, config, train, holdout):
    """init() -> model, fit(model, start, stop) -> (model, summed info), test(model) -> {name: value}."""
    key, split_key = jax.random.key(FLAGS.seed), jax.random.fold_in(jax.random.key(FLAGS.seed), 2)
    sides = dict(train=train.sample(split_key, holdout.size), holdout=holdout.data)  # as many of each

    def init(data):
        return algorithm.pretrain_init(jax.random.fold_in(key, 0), data, env, config)

    def update(model, data, i):
        return algorithm.pretrain_step(model, jax.random.fold_in(jax.random.fold_in(key, 1), i), data, env, config)

    @functools.partial(jax.jit, donate_argnums=0)
    def fit(model, data, start, stop):
        def iteration(i, state):
            model, info = update(state[0], data, i)
            return model, jax.tree.map(jnp.add, state[1], info)

        _, info = jax.eval_shape(update, model, data, 0)
        return jax.lax.fori_loop(start, stop, iteration, (model, jax.tree.map(lambda x: jnp.zeros_like(x), info)))

    @jax.jit
    def test(model, sides):
        tested = {side: algorithm.pretrain_test(model, data, env, config) for side, data in sides.items()}
        return {f"{side}_{name}": value for side, values in tested.items() for name, value in values.items()}

    model = jax.jit(init)(train.data)
    compiled = fit.lower(model, train.data, 0, 1).compile()
    return (model, lambda model, *span: compiled(model, train.data, *span), lambda model: test(model, sides))


def train_model(model, fit, test, updates, folder, meta, logger):
    """(model, seconds) after all `updates`; between them, rows of metrics.csv and checkpoints."""
    stops = sorted({updates * (k + 1) // EVALUATIONS for k in range(EVALUATIONS)})
    bar = cli.progress_bar(" updates", updates, meta["update"])
    i, seconds, saved = meta["update"], meta["seconds"], time.perf_counter()
    for stop in [stop for stop in stops if stop > i]:
        began = time.perf_counter()
        model, sums = jax.block_until_ready(fit(model, i, stop))
        seconds += time.perf_counter() - began
        row = {k: np.asarray(v) for k, v in (test(model) | {k: v / (stop - i) for k, v in sums.items()}).items()}
        if bad := [k for k, v in row.items() if not np.isfinite(v).all()]:
            raise UserError(f"{bad[0]} is not finite after update {stop}: nothing is stored of it")
        bar.update(stop - i)
        i = stop
        logger.write(i, {k: v.reshape(1) for k, v in row.items()})
        if stop == updates or time.perf_counter() - saved > FLAGS.save_every:
            meta = dict(update=i, rows=logger.rows, seconds=seconds, score=float(i))
            checkpoint.save(folder / "checkpoints", i, model, meta)
            saved = time.perf_counter()
    bar.close()
    return model, seconds


def open_loop(algorithm, params, holdout, env, config):
    """[L] root mean square errors of predictions 1 … L steps ahead, over windows of held out episodes, and [L] those of
    the guess that nothing moves."""
    lengths = np.diff(np.unique(last_steps(holdout.data)), prepend=-1)
    length = min(int(np.median(lengths)), 2 * config.get("horizon", 25))
    window = holdout.sample_trajectories(jax.random.key(FLAGS.seed), WINDOWS, length)

    def step(obs, now):
        obs = jax.vmap(lambda *one: algorithm.predict(params, *one, env, config))(obs, now["action"])
        return obs, jnp.stack([jnp.sqrt(jnp.square(guess - now["next_obs"]).mean())
                               for guess in (obs, window["obs"][0])])

    return np.asarray(jax.jit(lambda: jax.lax.scan(step, window["obs"][0], window)[1])()).T


def draw(path, metrics, ahead, title):
    with figure(path, ncols=1 + (ahead is not None), figsize=(10, 4), squeeze=False) as (fig, axes):
        name = next(k for k in metrics if k.startswith("holdout_")).removeprefix("holdout_")
        for side, style in (("train", "--"), ("holdout", "-")):
            axes[0, 0].plot(metrics["update"], metrics[f"{side}_{name}"], style, color="tab:blue", label=side)
        axes[0, 0].set(xlabel="updates", ylabel=name, yscale="log" if metrics[f"train_{name}"].min() > 0 else "linear")
        if ahead is not None:
            for error, label, color in zip(ahead, ("model", "nothing moves"), ("tab:blue", "gray"), strict=True):
                axes[0, 1].plot(range(1, len(error) + 1), error, color=color, label=label)
            axes[0, 1].set(xlabel="steps ahead, holdout", ylabel="error", yscale="log")
        for ax in axes[0]:
            ax.legend(frameon=False)
        fig.suptitle(title)


def main(_):
    cli.compilation_cache()
    folder = cli.stage_folder("pretrain")
    section, algorithm = cli.section(FLAGS.config, "pretrain"), cli.algorithm_of(FLAGS.config)
    config = ml_collections.FrozenConfigDict(FLAGS.config)
    if not hasattr(algorithm, "pretrain_init"):
        raise UserError(f'algorithm "{config.algorithm}" has no pretrain_init: it learns no model beforehand')
    if (folder / "summary.json").exists():
        raise UserError(f"{folder} holds a finished model: choose another workdir")
    env = make_env(config.env, config.num_envs, **config.get("env_kwargs", {}))
    source = FLAGS.data or str(folder.parent / "collect" / "data.npz")
    split_key = jax.random.fold_in(jax.random.key(FLAGS.seed), 3)
    train, holdout = read_data(source, env).split(section.holdout, split_key)
    updates = section.get("num_updates") or section.num_epochs * -(-train.size // section.batch_size)
    updates = min(updates, 10) if FLAGS.smoke else updates
    began = time.perf_counter()
    model, fit, test = build(algorithm, env, config, train, holdout)
    compile_seconds, meta = time.perf_counter() - began, dict(update=0, rows=None, seconds=0.0)

    stored = cli.config_dict(config) | dict(seed=FLAGS.seed, data=source)
    cli.open_folder(folder, stored, FLAGS.resume)
    if FLAGS.resume and checkpoint.steps(folder / "checkpoints"):
        model, meta = checkpoint.restore_newest(folder / "checkpoints", model)
    logger = Logger(folder, stored, cli.own_flags(), [FLAGS.seed], meta["rows"], clock="update")
    model, seconds = train_model(model, fit, test, updates, folder, meta, logger)

    write_arrays(folder / "model.npz", model.params)
    ahead = open_loop(algorithm, model.params, holdout, env, config) if hasattr(algorithm, "predict") else None
    metrics = {k: v[:, 0] for k, v in read_metrics(folder).items()}
    draw(folder / "error.png", metrics, ahead, f"{config.algorithm} on {config.env}: {train.size:,} transitions")
    last = {k: float(v[-1]) for k, v in metrics.items() if k not in ("update", "seed")}
    summary = dict(
        algorithm=config.algorithm, env=config.env, data=source, seed=FLAGS.seed, updates=updates,
        transitions=train.size, holdout_transitions=holdout.size, **last,
        open_loop_error=None if ahead is None else ahead[0].tolist(), compile_seconds=compile_seconds, seconds=seconds,
        updates_per_second=updates / seconds, device=jax.devices()[0].device_kind,
        peak_rss_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    write(folder / "summary.json", json.dumps(summary, indent=1))  # last: it says that all is there
    words = ", ".join(f"{k} {v:.4g}" for k, v in last.items())
    print(f"{updates:,} updates, {words}, {seconds:.1f} s, compiled {compile_seconds:.1f} s: {folder / 'model.npz'}")


if __name__ == "__main__":
    cli.run(main)
