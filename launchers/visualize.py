"""Film episodes of a run or of one of its checkpoints: a GIF or an MP4, by the ending of --out.

    python -m launchers.visualize --run=runs/x --out=episode.gif
    python -m launchers.visualize --run=runs/x --out=x.mp4 --seed_index=3 --episodes=4 --set=max_steps=100

A method that learns within the episode that it is judged by (it has `measure`, not `act`) is filmed as it ran, with
the same keys: the first episode, and beside it the 2σ ellipses of the belief about φ, less the truth, which is the
cross. Orange are the ellipses of where the plan leads. `--figure` draws what a run of such a method logged:

    python -m launchers.visualize --run=runs/joint --out=joint.gif --figure=joint.png --against=runs/perfect
"""
import ast
import pathlib

import jax
import numpy as np
from absl import flags

from core import ekf, render
from core.envs import make_env
from core.errors import UserError
from core.logging import read_metrics
from launchers import cli
from launchers.runs import drawable, figure, load, play, regret, replay

FLAGS = flags.FLAGS
flags.DEFINE_string("run", None, "A run's folder, or one of its checkpoints.", required=True)
flags.DEFINE_string("out", None, "The film to write, .gif or .mp4.")
flags.DEFINE_string("figure", None, "The picture to write of what a run with a belief logged, .png or .pdf.")
flags.DEFINE_string("against", None, "The run whose return --figure takes regret to, paired by seed.")
flags.DEFINE_integer("seed_index", 0, "Which of the run's seeds.", lower_bound=0)
flags.DEFINE_integer("episodes", 1, "Episodes, one after another.", lower_bound=1)
flags.DEFINE_integer("steps", None, "Steps of each at most.", lower_bound=1)
flags.DEFINE_list("set", [], "Other settings of the environment: name=value,name=value.")
flags.DEFINE_integer("eval_seed", 1_000_000, "Fixes the episodes.")
flags.DEFINE_bool("best", False, "The best checkpoint by evaluation return, where no checkpoint is named.")
flags.DEFINE_float("fps", 10.0, "Frames a second.", lower_bound=1.0)
flags.DEFINE_integer("height", 384, "Pixels.", lower_bound=64)


def main(_):
    cli.compilation_cache()
    writers = {".gif": render.write_gif, ".mp4": render.write_mp4}
    if not FLAGS.out and not FLAGS.figure:
        raise UserError("say what to make: --out=film.gif, or --figure=picture.png")
    if FLAGS.out and pathlib.Path(FLAGS.out).suffix not in writers:
        raise UserError(f"--out={FLAGS.out} ends neither in .gif nor in .mp4")
    algorithm, config, run, meta = load(FLAGS.run, FLAGS.best)
    if FLAGS.seed_index >= (num_seeds := len(jax.tree.leaves(run)[0])):
        raise UserError(f"--seed_index={FLAGS.seed_index}, but {FLAGS.run} has {num_seeds} seeds, from 0")
    if FLAGS.figure:
        draw_figure(config)
    if FLAGS.out:
        learns_as_it_is_judged = hasattr(algorithm, "measure")
        if learns_as_it_is_judged and not hasattr(algorithm, "imagine"):
            raise UserError(f"{config.algorithm} cannot be filmed: it learns as it is judged and has no `imagine`")
        shoot = film_of_run if learns_as_it_is_judged else film_of_policy
        frames, returns = shoot(algorithm, config, run, meta)
        writers[pathlib.Path(FLAGS.out).suffix](FLAGS.out, frames, FLAGS.fps)
        print(f"{FLAGS.out}: {len(frames)} frames, {pathlib.Path(FLAGS.out).stat().st_size / 1e3:.0f} kB; "
              f"returns {', '.join(str(np.round(x, 2)) for x in returns)}")


def film_of_policy(algorithm, config, run, _):
    """(frames, returns) of fresh episodes."""
    run = jax.tree.map(lambda x: x[FLAGS.seed_index], run)
    env = changed(config)
    keys = jax.random.split(jax.random.key(FLAGS.eval_seed), FLAGS.episodes)
    played = [play(algorithm, run, env, key, FLAGS.steps) for key in keys]
    films = [render.scenes(env, states) for states, _ in played]

    # One camera for all episodes: frames of one size.
    low = np.min([scene.low for film in films for scene in film], axis=0)
    high = np.max([scene.high for film in films for scene in film], axis=0)
    films = [[scene._replace(low=low, high=high) for scene in film] for film in films]
    frames = [render.film(film, reward, FLAGS.height) for film, (_, reward) in zip(films, played, strict=True)]
    return np.concatenate(frames), [np.asarray(reward).sum(0) for _, reward in played]


def film_of_run(algorithm, config, run, meta):
    """(frames, returns) of the first episode that the method learnt in, and its belief beside it."""
    if FLAGS.set or FLAGS.episodes > 1 or FLAGS.best:
        raise UserError(f"{config.algorithm} is filmed as it ran: --set, --episodes and --best do not apply")
    env = drawable(config.env, **config.get("env_kwargs", {}))
    seeds = np.arange(meta["seed"], meta["seed"] + len(jax.tree.leaves(run)[0]))
    runs, (of_phi, future) = replay(algorithm, config, seeds, FLAGS.seed_index)
    restarts = np.flatnonzero(runs.env_state.episode_length[1:, 0] == 0)
    length = min([*(restarts + 1), len(runs.obs), (FLAGS.steps or len(runs.obs)) + 1])
    arena = render.scenes(env, jax.tree.map(lambda x: x[:length, 0], runs.env_state.env))
    for scene, mean, cov in zip(arena, *future, strict=False):
        scene.shapes[:0] = [render.ellipse(mean[k], cov[k], render.ORANGE) for k in range(4, len(mean), 5)]
    returns = runs.env_state.episode_return[:length, 0]
    width = 2.5 * max((np.abs(mean[0]) + 2 * np.sqrt(np.diagonal(cov[0]))).max() for mean, cov in of_phi.values())
    beliefs = [render.gaussians({name: (mean[t], cov[t]) for name, (mean, cov) in of_phi.items()}, width,
                                f"belief less truth, 2 standard deviations; width {width:.3g}") for t in range(length)]
    films = render.film(arena, np.diff(returns), FLAGS.height), render.film(beliefs, height=FLAGS.height)
    if not np.array_equal(runs.measures["return"][meta["iteration"]], run.measures["return"][FLAGS.seed_index]):
        print("note: computed on other devices, this is another trajectory than the one that was stored")
    return np.concatenate(films, axis=2), returns[-1:]


def changed(config):
    """The run's environment, unbatched, with the settings of --set."""
    try:
        return drawable(config.env, **{**config.get("env_kwargs", {}), **dict(setting(text) for text in FLAGS.set)})
    except TypeError as error:
        raise UserError(f"--set={','.join(FLAGS.set)}: {error}") from error


def setting(text):
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        raise UserError(f"--set={text}: not of the form name=value with a number, string or True and False") from None


def draw_figure(config):
    """What the belief knew and what that was worth, against environment steps: medians and quartiles of the seeds."""
    logged = read_metrics(FLAGS.run)
    steps, num_seeds = logged["env_steps"][:, 0], logged["seed"].shape[1]
    error = next((name for name in ("gain_error", "parameter_error") if name in logged), None)
    if error is None or "nis" not in logged:
        raise UserError(f"{FLAGS.run} logged no error, NIS and information of a belief: nothing for --figure")
    worth, what = logged["return"], "return"
    if FLAGS.against:
        worth, what = regret(FLAGS.run, FLAGS.against), f"regret to {pathlib.Path(FLAGS.against).name}"
    span = np.diff(steps, prepend=0)  # every logged value is a mean over so many steps
    nats = np.cumsum(logged["information"] * span[:, None] / config.num_envs, axis=0)
    env = make_env(config.env, 1, **config.get("env_kwargs", {})).env
    d = jax.eval_shape(env.start, jax.random.key(0)).size
    with figure(FLAGS.figure, nrows=2, ncols=2, figsize=(9, 6), sharex=True) as (fig, axes):
        (error_ax, nis_ax), (nats_ax, worth_ax) = axes
        for ax, values, title in ((error_ax, logged[error], error.replace("_", " ")), (nats_ax, nats, "nats gained"),
                                  (worth_ax, worth, what)):
            low, middle, high = np.percentile(values, [25, 50, 75], axis=1)
            ax.fill_between(steps, low, high, alpha=0.25, linewidth=0)
            ax.plot(steps, middle)
            ax.set_title(title)
        error_ax.set_ylim(bottom=0)
        nats_ax.set_ylim(bottom=0)
        worth_ax.axhline(0, color="grey", linewidth=0.8)
        nis_ax.fill_between(steps, *ekf.nis_band(d, span * num_seeds), color="tab:green", alpha=0.4, step="pre")
        nis_ax.plot(steps, logged["nis"].mean(axis=1))
        nis_ax.set(yscale="log", title=f"NIS, mean of seeds; 95 % band of χ²({d})")
        for ax in axes.flat:
            ax.spines[["top", "right"]].set_visible(False)
        axes[1, 0].set_xlabel("environment steps")
        axes[1, 1].set_xlabel("environment steps")
        fig.suptitle(f"{pathlib.Path(FLAGS.run).name}: {config.algorithm} on {config.env}, {num_seeds} seeds")


if __name__ == "__main__":
    cli.run(main)
