"""What the launchers share: reading a config, one-line errors, seeds on devices."""
import difflib
import functools
import importlib
import json
import os
import pathlib
import sys

import jax
import tqdm
from absl import app, flags, logging
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import config_flags

from core.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def run(main):
    """`main(argv)` as a program: a mistake of the user's, or a full disk, is one line and exit status 2."""
    def guarded(argv):
        logging.set_verbosity(logging.WARNING)
        try:
            return main(argv)
        except UserError as error:
            sys.exit(_fail(str(error)))
        except OSError as error:
            sys.exit(_fail(f"{error.filename or 'writing'}: {error.strerror or error}"))

    app.run(guarded, flags_parser=_parse)


def _fail(message):
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _parse(argv):
    try:
        return flags.FLAGS(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        message = " ".join(str(error).split())
        if message[:1] in ("'", '"'):  # a KeyError, printed by its repr
            message = "the config has no key " + message.strip("'\"\\").replace("\\'", "").replace("\\n", ". ")
        sys.exit(_fail(message))


def config_name():
    """Of the file that --config names, without its folder and ending."""
    if flags.FLAGS.config is None:
        raise UserError("say what to run: --config=configs/….py or --config=algorithms/….py")
    name = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
    if not pathlib.Path(name).exists():
        known = [f"{path.parent.name}/{path.name}" for path in ROOT.glob("*/*.py") if path.stem != "__init__"]
        raise UserError(f"no config {name}; {suggest(name, known)}")
    return pathlib.Path(name).stem


def open_folder(folder, config, resume):
    """A new folder, or with --resume the folder of the very run that is to go on."""
    folder = pathlib.Path(folder)
    stored = folder / "config.json"
    if not resume and stored.exists():
        raise UserError(f"workdir {folder} already holds a run: choose another, or go on with it by --resume")
    if resume and not stored.exists():
        raise UserError(f"nothing to resume: {stored} does not exist")
    if resume:
        old = json.loads(stored.read_text())
        changed = [f"{k} was {old.get(k)!r}, is {config.get(k)!r}" for k in sorted(old | config)
                   if old.get(k) != config.get(k)]
        if changed:
            raise UserError(f"cannot resume {folder} with a changed config: {'; '.join(changed)}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def stage_folder(name):
    """Of one stage of the pipeline collect, pretrain, finetune."""
    config = config_name()
    return pathlib.Path(flags.FLAGS.workdir or f"runs/{config}") / name


def section(config, name):
    if name not in config:
        raise UserError(f'the config has no section "{name}": it is none of a learned model that is trained in stages')
    return config[name]


def own_flags():
    return {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])
            if flag.name != "config"}


def progress_bar(unit, total, done=0):
    return tqdm.tqdm(total=total, initial=done, unit=unit, unit_scale=True, disable=jax.process_index() > 0,
                     mininterval=0.1 if sys.stderr.isatty() else 10.0)


def compilation_cache():
    """Programs compiled once on this machine start at once the next time."""
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(pathlib.Path.home() / ".cache" / "monograph")
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def algorithm_of(config):
    known = [path.stem for path in (ROOT / "algorithms").glob("*.py") if path.stem != "__init__"]
    if config.algorithm not in known:
        raise UserError(f'unknown algorithm "{config.algorithm}"; {suggest(config.algorithm, known)}')
    return importlib.import_module(f"algorithms.{config.algorithm}")


def suggest(name, known):
    close = difflib.get_close_matches(name, known, n=1)
    return f'did you mean "{close[0]}"?' if close else f"known: {', '.join(sorted(known))}"


def config_dict(config) -> dict:
    """As JSON would give it back, so that a stored config compares equal to a fresh one."""
    def plain(value):
        if hasattr(value, "items"):
            return config_dict(value)
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    return {k: plain(v) for k, v in config.items()}


def smoke(config):
    """The same program in seconds: two iterations, two evaluation episodes."""
    config.update(config.get("smoke", {}))
    iteration = config.num_envs * config.num_steps
    config.update(env_steps=2 * iteration, eval_every=iteration)
    if "eval_episodes" in config:
        config.eval_episodes = 2
    return config


def per_seed(fn, num_seeds, in_axes=0):
    """vmap over the seed axis. One seed is run as itself: an environment on the host cannot be vmapped."""
    if num_seeds > 1:
        return jax.vmap(fn, in_axes=in_axes)

    @functools.wraps(fn)
    def alone(*args):
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        pairs = zip(args, axes, strict=True)
        args = [arg if axis is None else jax.tree.map(lambda x: x[0], arg) for arg, axis in pairs]
        return jax.tree.map(lambda x: x[None], fn(*args))

    return alone


def seed_shardings(run, num_seeds, num_envs, mesh):
    """Of every leaf [S, ...]: the seeds over the devices, or, if they do not divide, the environments of each seed."""
    devices = mesh.size
    if num_seeds % devices == 0:
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec("devices")), run)
    if num_envs % devices:
        raise UserError(f"neither num_seeds = {num_seeds} nor num_envs = {num_envs} divides over {devices} devices")
    whole, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(None, "devices"))
    shardings = jax.tree.map(lambda _: whole, run)
    per_env = {k: jax.tree.map(lambda _: split, getattr(run, k)) for k in ("env_state", "obs")}
    return shardings._replace(**per_env)

