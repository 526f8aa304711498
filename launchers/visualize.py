"""Film episodes of a run or of one of its checkpoints: a GIF or an MP4, by the ending of --out.

    python -m launchers.visualize --run=runs/x --out=episode.gif
    python -m launchers.visualize --run=runs/x --out=x.mp4 --seed_index=3 --episodes=4 --set=max_steps=100
"""
import ast
import pathlib

import jax
import numpy as np
from absl import flags

from core import render
from core.errors import UserError
from launchers import cli
from launchers.runs import drawable, load, play

FLAGS = flags.FLAGS
flags.DEFINE_string("run", None, "A run's folder, or one of its checkpoints.", required=True)
flags.DEFINE_string("out", None, "The file to write, .gif or .mp4.", required=True)
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
    if (suffix := pathlib.Path(FLAGS.out).suffix) not in writers:
        raise UserError(f"--out={FLAGS.out} ends neither in .gif nor in .mp4")
    algorithm, config, run, _ = load(FLAGS.run, FLAGS.best)
    if FLAGS.seed_index >= (num_seeds := len(jax.tree.leaves(run)[0])):
        raise UserError(f"--seed_index={FLAGS.seed_index}, but {FLAGS.run} has {num_seeds} seeds, from 0")
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
    writers[suffix](FLAGS.out, np.concatenate(frames), FLAGS.fps)
    returns = ", ".join(str(np.round(np.asarray(reward).sum(0), 2)) for _, reward in played)
    print(f"{FLAGS.out}: {sum(map(len, frames))} frames, {pathlib.Path(FLAGS.out).stat().st_size / 1e3:.0f} kB; "
          f"returns {returns}")


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


if __name__ == "__main__":
    cli.run(main)
