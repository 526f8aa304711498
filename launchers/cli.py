"""What the launchers share: a function as a program, one-line errors, configs, sources of experience."""
import ast
import contextlib
import difflib
import functools
import importlib
import inspect
import os
import pathlib
import re
import sys
import textwrap
import traceback
import typing

import jax
import numpy as np
import tqdm
from absl import app, flags, logging
from flax.traverse_util import flatten_dict
from ml_collections import config_flags

from core import checkpoint, d4rl, files, minari
from core.config import check
from core.dataset import Dataset, read_arrays
from core.envs import Discrete, make_env
from core.errors import UserError
from core.evaluation import evaluate

ROOT = pathlib.Path(__file__).parents[1]


def run(function):
    """`function` as a program. Its keyword parameters are the flags, `Args:` of its docstring their help, `*names` what
    the command line gives without a name. A mistake of the user's, or a full disk, is one line and exit status 2. Any
    other exception keeps its traceback, and a line says in whose file it was."""
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
        except jax.errors.JaxRuntimeError as error:
            # What was raised on the host, inside of a program, comes as text: its traceback, the exception last.
            told = re.search(rf"^(?:.*\.)?{UserError.__name__}: (.+)$", str(error), re.M)
            if told:  # at exit, JAX tells it again
                sys.unraisablehook = lambda again: sys.__unraisablehook__(again) if not isinstance(
                    again.exc_value, jax.errors.JaxRuntimeError) else None
            sys.exit(_fail(told[1]) if told else _fail_loudly(error))
        except Exception as error:
            sys.exit(_fail_loudly(error))

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
            argv = [arg for arg in sys.argv if not SETTING.fullmatch(arg)]
            config_flags.DEFINE_config_file("config", None, "An algorithm file, or a file of configs/.", sys_argv=argv)
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
    message = "".join(c if c.isprintable() else " " for c in message)  # what a damaged file holds controls no terminal
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 2


def _fail_loudly(error):
    traceback.print_exception(error)
    file, line = culprit(error) or (__file__, 0)
    _fail(f"{type(error).__name__} in {file}, line {line}: {' '.join(str(error).split())}")
    return 1


def culprit(error):
    """(file, line) of the innermost frame of an exception that is neither of a package nor of this file, or None."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    libraries = os.path.dirname(os.__file__), "site-packages", "<frozen"
    own = [(file, line) for file, line in frames if file != __file__ and not any(part in file for part in libraries)]
    return own[-1] if own else None


# A setting of an environment need not stand in the config: the environment says which it has.
SETTING = re.compile(r"--?config\.((?:collect\.)?(?:eval_)?env_kwargs)\.(\w+)=(.*)", re.S)


def _parse(argv):
    logging.set_verbosity(logging.ERROR)
    try:
        rest = flags.FLAGS([_from_here(arg) for arg in argv if not SETTING.fullmatch(arg)])
        if "config" in flags.FLAGS and flags.FLAGS["config"].present and not hasattr(flags.FLAGS.config, "to_dict"):
            raise UserError(f'get_config() of {flags.FLAGS["config"].config_filename} gives no ConfigDict')
        for arg in argv:
            if match := SETTING.fullmatch(arg):
                apply_setting(flags.FLAGS.config, *match.groups())
        return rest
    except UserError as error:
        sys.exit(_fail(str(error)))
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("algorithms."):
            sys.exit(_fail_loudly(error))
        sys.exit(_fail(f'unknown algorithm "{error.name.removeprefix("algorithms.")}"'))
    except Exception as error:
        if culprit(error):  # the config is a program, too
            sys.exit(_fail_loudly(error))
        message = " ".join(str(error).split())
        if message[:1] in ("'", '"'):  # a KeyError, printed by its repr
            message = "the config has no key " + message.strip("'\"\\").replace("\\'", "").replace("\\n", ". ")
        sys.exit(_fail(message))


def _from_here(arg):
    """--config=configs/x.py means ours where the folder in which the program was started has no such file."""
    name, _, path = arg.partition("=")
    file = path.split(":")[0]
    if name.lstrip("-") != "config":
        return arg
    if not file.endswith(".py"):
        raise UserError(f"--config={path} is no Python file")
    ours = not pathlib.Path(file).exists() and (ROOT / file).is_file()
    return f"{name}={ROOT / path}" if ours else arg


def apply_setting(config, path, name, text):
    """config.env_kwargs.name = the value that `text` means."""
    words = {"true": True, "false": False}
    try:
        value = words.get(text.lower()) if text.lower() in words else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    *parents, last = path.split(".")
    section = config
    for parent in parents:
        if parent not in section:
            raise UserError(f'the config has no section "{parent}"')
        section = section[parent]
    with section.unlocked():
        if last not in section:
            section[last] = {}
        try:
            section[last][name] = value
        except TypeError as error:
            raise UserError(f"--config.{path}.{name}: {' '.join(str(error).split())}") from error


def check_seeds(**named):
    for name, seed in named.items():
        if not 0 <= seed < 2**31:
            raise UserError(f"--{name}={seed}: an integer from 0 to 2^31 - 1 is due")


def check_output(flag, path, *endings):
    """That a file of this name can be written, before much is computed for it."""
    if path is None:
        return
    path = pathlib.Path(path)
    if path.suffix not in endings:
        raise UserError(f"--{flag}={path} ends in none of {', '.join(endings)}")
    if not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UserError(f"--{flag}={path} cannot be written: {path.parent} is no folder that can be written to")


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


def check_folder(folder, config, resume):
    """That a new run can start in `folder`; with `resume`, that the very run which is there can go on."""
    folder = pathlib.Path(folder)
    stored = folder / "config.json"
    if not resume and (stored.exists() or checkpoint.steps(folder / "checkpoints")):
        raise UserError(f"workdir {folder} already holds a run: choose another, or go on with it by --resume")
    if resume and not stored.exists():
        raise UserError(f"nothing to resume: {stored} does not exist")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"workdir {folder} cannot be written: {existing} is no folder that can be written to")
    if resume:
        old = files.read(stored)
        changed = [f"{k} was {old.get(k)!r}, is {config.get(k)!r}" for k in sorted(old | config)
                   if old.get(k) != config.get(k)]
        if changed:
            raise UserError(f"cannot resume {folder} with a changed config: {'; '.join(changed)}")
        if (folder / "summary.json").exists() and (folder / "curve.png").exists():
            raise UserError(f"{folder} is finished: its budget is spent")


@contextlib.contextmanager
def open_folder(folder, config, resume):
    """The folder of a run, for this process alone, without what a killed process left half written."""
    check_folder(folder, config, resume)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with files.locked(folder):
        check_folder(folder, config, resume)  # another process may have been there until now
        files.sweep(folder)
        files.sweep(folder / "checkpoints")
        yield folder


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
    """The algorithm that a config is of, once every key of the config is found to be what its get_config says."""
    algorithm = algorithm_named(config.get("algorithm", ""))
    check(config, algorithm.get_config())
    return algorithm


def algorithm_named(name):
    known = [path.stem for path in (ROOT / "algorithms").glob("*.py") if path.stem != "__init__"]
    if name not in known:
        raise UserError(f'unknown algorithm "{name}"; {suggest(str(name), known)}')
    return importlib.import_module(f"algorithms.{name}")


def suggest(name, known):
    close = difflib.get_close_matches(name, known, n=1)
    names = textwrap.shorten(", ".join(sorted(known)), 200, placeholder=" …")
    return f'did you mean "{close[0]}"?' if close else f"known: {names}"


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
    return "updates", config.get("updates_per_step", 1)


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


READERS = {"minari:": minari.read, "d4rl:": d4rl.read}  # of data that are no .npz of ours


def read_dataset(path, env):
    """The transitions, if they are of this environment."""
    kind = next((kind for kind in READERS if path.startswith(kind)), "")
    name = path.removeprefix(kind)
    if kind != "minari:" and not pathlib.Path(name).exists():
        raise UserError(f'no data in "{path}": name a file by --config.dataset, or write one by launchers.collect')
    data = READERS[kind](name) if kind else read_arrays(name)
    obs = jax.eval_shape(env.reset, jax.random.key(0))[1]
    action, reward = (jax.ShapeDtypeStruct((1, *shape), np.float32) for shape in (env.action_space.shape, ()))
    due, found = (flatten_dict(tree, sep="/") for tree in (
        dict(obs=obs, action=action, next_obs=obs, reward=reward), data))
    for name, like in due.items():
        if name not in found:
            raise UserError(f'{path} has no "{name}"')
        if found[name].shape[1:] != like.shape[1:]:
            raise UserError(f"{path}: {name} {found[name].shape[1:]} where the environment has {like.shape[1:]}")
    if others := [name for name in found if name.startswith(("obs/", "next_obs/")) and name not in due]:
        raise UserError(f'{path} has "{others[0]}", which the environment has not')
    if isinstance(env.action_space, Discrete) and data["action"].dtype.kind == "f":
        raise UserError(f"{path}: action is of type {data['action'].dtype} where the environment counts its actions")
    if isinstance(env.action_space, Discrete) and not np.isin(data["action"], np.arange(env.action_space.n)).all():
        raise UserError(f"{path}: action is not always one of the {env.action_space.n} that the environment has")
    try:
        return Dataset.create(data, env.action_space)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def teams_of(config):
    """The number of each agent's team, where the evaluation environment has several agents that say so."""
    name, settings = eval_settings(config)
    if name.startswith("gymnasium/"):  # of one agent, and a simulator may take seconds to make
        return None
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
    """f(run, seed) -> what `evaluate` gives of one seed's evaluation episodes."""
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
