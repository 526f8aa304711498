"""What the launchers share: a function as a program, one-line errors, configs, sources of experience."""
import difflib
import functools
import importlib
import inspect
import json
import os
import pathlib
import re
import sys
import typing

import jax
import tqdm
from absl import app, flags, logging
from ml_collections import config_flags

from core import minari
from core.dataset import Dataset
from core.envs import make_env
from core.errors import UserError
from core.evaluation import evaluate

ROOT = pathlib.Path(__file__).parents[1]


def run(function):
    """`function` as a program. Its keyword parameters are the flags, `Args:` of its docstring their help, `*names` what
    the command line gives without a name. A mistake of the user's, or a full disk, is one line and exit status 2."""
    parameters, positional = define_flags(function)

    def main(argv):
        logging.set_verbosity(logging.WARNING)
        try:
            if len(argv) > 1 and not positional:
                raise UserError(f'"{argv[1]}" is not a flag: they begin with --')
            for name in parameters:
                if flags.FLAGS[name].default is None and not flags.FLAGS[name].present and name in REQUIRED:
                    raise UserError(f"--{name} is missing: {' '.join(flags.FLAGS[name].help.split())}")
            function(*argv[1:], **{name: flags.FLAGS[name].value for name in parameters})
        except UserError as error:
            sys.exit(_fail(str(error)))
        except OSError as error:
            sys.exit(_fail(f"{error.filename or 'writing'}: {error.strerror or error}"))

    app.run(main, flags_parser=_parse)


REQUIRED = set()


def define_flags(function):
    """([names], whether there are positional parameters)."""
    help_of = dict(re.findall(r"^ +(\w+): (.+?)(?=^ +\w+: |\Z)", inspect.getdoc(function), re.M | re.S))
    makers = {bool: flags.DEFINE_bool, int: flags.DEFINE_integer, float: flags.DEFINE_float, str: flags.DEFINE_string,
              list[str]: flags.DEFINE_list}
    names = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            continue
        names.append(name)
        default, kind = parameter.default, parameter.annotation
        if default is parameter.empty:
            REQUIRED.add(name)
            default = None
        if name == "config":
            config_flags.DEFINE_config_file("config", None, "An algorithm file, or a file of configs/.")
            continue
        text = " ".join(help_of[name].split())
        if typing.get_origin(kind) is typing.Literal:
            flags.DEFINE_enum(name, default, list(typing.get_args(kind)), text)
            continue
        kind = next((k for k in typing.get_args(kind) if k is not type(None)), kind) if kind not in makers else kind
        makers[kind](name, default, text)
    for name in names:  # so that --help lists them
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[name])
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    return names, inspect.Parameter.VAR_POSITIONAL in kinds


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


def config_name(config):
    """Of the file that --config names, without its folder and ending; from Python, of the algorithm."""
    if config is None:
        raise UserError("say what to run: --config=configs/….py or --config=algorithms/….py")
    if "config" not in flags.FLAGS or not flags.FLAGS.is_parsed() or flags.FLAGS["config"].value is not config:
        return config.algorithm
    name, *argument = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")
    if not pathlib.Path(name).exists():
        known = [f"{path.parent.name}/{path.name}" for path in ROOT.glob("*/*.py") if path.stem != "__init__"]
        raise UserError(f'no file "{name}"; {suggest(name, known)}')
    return "_".join([pathlib.Path(name).stem, *argument])


def open_folder(folder, config, resume):
    """A new folder, or with `resume` the folder of the very run that is to go on."""
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


def stage_folder(config, workdir, stage):
    """Of one stage of the pipeline collect, pretrain, finetune."""
    return pathlib.Path(workdir or f"runs/{config_name(config)}") / stage


def section(config, name):
    if name not in config:
        raise UserError(f'the config has no section "{name}": it is none of a learned model that is trained in stages')
    return config[name]


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


def iteration_of(config):
    """(name of the clock that the budget counts by, what one train_step adds to it)."""
    if "env_steps" in config:
        return "env_steps", config.num_envs * config.num_steps
    return "updates", 1


def smoke(config):
    """The same program in seconds: two iterations, two evaluation episodes."""
    config.update(config.get("smoke", {}))
    clock, iteration = iteration_of(config)
    config[clock] = config.get("random_steps", 0) + 2 * iteration
    config.eval_every = iteration
    if "log_every" in config:
        config.log_every = iteration
    if "eval_episodes" in config:
        config.eval_episodes = min(config.eval_episodes, 2)
    return config


def train_env(config):
    return make_env(config.env, config.num_envs, **config.get("env_kwargs", {}))


def eval_settings(config):
    """(name, settings) of the environment that a run is evaluated in."""
    return (config.get("eval_env", config.env),
            {**config.get("env_kwargs", {}), **config.get("eval_env_kwargs", {})})


def eval_env(config, num_envs):
    name, settings = eval_settings(config)
    return make_env(name, num_envs, **settings)


def source_of(config):
    """What experience comes from: the data set that the config names, else its environment."""
    if "dataset" not in config:
        return train_env(config)
    env = make_env(config.env, 1, **config.get("env_kwargs", {}))
    return read_dataset(config.dataset, env)


def read_dataset(path, env):
    """The transitions, if they are of this environment."""
    if not path.startswith("minari:") and not pathlib.Path(path).exists():
        raise UserError(f'no data in "{path}": name a file by --config.dataset, or write one by launchers.collect')
    data = (minari.read(path.removeprefix("minari:")) if path.startswith("minari:") else Dataset.load(path).data)
    due = dict(obs=jax.eval_shape(env.reset, jax.random.key(0))[1].shape[1:], action=env.action_space.shape)
    for name in ("obs", "action", "next_obs", "reward"):
        if name not in data:
            raise UserError(f'{path} has no "{name}"')
        if name in due and data[name].shape[1:] != due[name]:
            raise UserError(f"{path}: {name} {data[name].shape[1:]} where the environment has {due[name]}")
    return Dataset.create(data, env.action_space)


def teams_of(config):
    """The number of each agent's team, where the evaluation environment has several agents that say so."""
    name, settings = eval_settings(config)
    return getattr(make_env(name, 1, **settings).env, "teams", None)


def moved(algorithm, run, config):
    """The run as if it had been started in the evaluation environment."""
    if eval_settings(config) == (config.env, {**config.get("env_kwargs", {})}):
        return run
    return rebind(algorithm, run, eval_env(config, config.get("num_envs", 1)), config)


def rebind(algorithm, run, env, config):
    """The run as if it had been started in `env`, of `num_envs` copies: its arrays, and what is fixed of that
    environment. So a planner knows the costs where it is evaluated. A run on a data set has nothing of an environment.
    """
    if "dataset" in config:
        return run
    like = jax.eval_shape(lambda key: algorithm.init(key, env, config), jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(run))


def episodes_of(algorithm, config, episodes, eval_seed):
    """f(run, seed) -> returns [E] or [E, N] and lengths [E] of one seed's evaluation episodes."""
    def play(run, seed):
        env, run = eval_env(config, episodes), moved(algorithm, run, config)
        act, observe = policy(algorithm, run)
        key = jax.random.fold_in(jax.random.key(eval_seed), seed)
        return evaluate(act, env, key, start_carry(algorithm, run, episodes), observe)

    return play


def start_carry(algorithm, run, num_envs):
    return algorithm.initial_carry(run, num_envs) if hasattr(algorithm, "initial_carry") else ()


def policy(algorithm, run):
    """(act, observe or None) of one seed's run, as `core.evaluation.evaluate` takes them."""
    observe = functools.partial(algorithm.observe, run) if hasattr(algorithm, "observe") else None
    return functools.partial(algorithm.act, run), observe


def per_seed(fn, num_seeds, in_axes=0):
    """vmap over the seed axis. One seed is run as itself: a batch of one axis more is slower on a CPU."""
    if num_seeds > 1:
        return jax.vmap(fn, in_axes=in_axes)

    @functools.wraps(fn)
    def alone(*args):
        axes = in_axes if isinstance(in_axes, tuple) else (in_axes,) * len(args)
        pairs = zip(args, axes, strict=True)
        args = [arg if axis is None else jax.tree.map(lambda x: x[0], arg) for arg, axis in pairs]
        return jax.tree.map(lambda x: x[None], fn(*args))

    return alone
