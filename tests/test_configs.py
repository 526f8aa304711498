"""Every config of configs/ fits, every algorithm trains, resumes and is evaluated; and what each file has to have."""
import ast
import functools
import importlib
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from core import checkpoint, logging
from core.dataset import write_arrays
from core.logging import finals
from launchers import cli, train
from launchers.evaluate import evaluate_run
from tests.keys import reuse_checked

ROOT = pathlib.Path(__file__).parents[1]
CLI, TRAIN = "launchers/cli.py", "launchers/train.py"
PLANTED_ERRORS = {
    "evaluation in the training environment": (CLI,
        ', **config.get("eval_env_kwargs", {})})', "})", "test_the_evaluation_environment_is_the_config_s"),
    "a smoke run of the whole budget": (CLI,
        'config[clock] = config.get("random_steps", 0) + 2 * iteration', "pass", "test_a_smoke_run_is_two_iterations"),
    "resume starts over": (TRAIN,
        'i, since, seconds, row, best = meta["iteration"]', "i, since, seconds, row, best = 0",
        "test_an_algorithm_trains_resumes_and_is_evaluated[ppo]"),
}

SMALL = dict(num_steps=8, num_epochs=1, num_updates=2, random_steps=8, horizon=3, kept_elites=2, num_linearizations=1,
             buffer_size=64, batch_size=8, num_simulations=2, unroll=1, n_step=1, updates_per_step=2)
SMALL_PLANNER = dict(num_samples=8, num_elites=4, num_iterations=1)
TIME_LIMIT = {"gymnax": "max_steps_in_episode", "jaxmarl": "max_steps", "gymnasium": "max_episode_steps",
              "brax": "episode_length", "playground": "episode_length"}
PACKAGES = {"gymnasium/dm_control/": "shimmy", "gymnasium/": "mujoco", "jaxmarl/": "jaxmarl", "brax/": "brax",
            "pgx/": "pgx", "playground/": "mujoco_playground"}  # the first that fits


def names(folder):
    return sorted(path.stem for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")


def load_config(name, folder="configs"):
    return importlib.import_module(f"{folder}.{name}").get_config()


def missing(config):
    """The package of its environment, if that is not installed."""
    package = next((package for source, package in PACKAGES.items() if config.env.startswith(source)), None)
    return package if package and importlib.util.find_spec(package) is None else None


def get_config(name, folder="configs"):
    config = load_config(name, folder)
    if package := missing(config):
        pytest.skip(f"no {package}")
    return config


CONFIGS, ALGORITHMS = names("configs"), names("algorithms")


def shrink(section, sizes):
    section.update({key: min(size, section[key]) for key, size in sizes.items() if key in section})


def small(config):
    """A config with small networks and plans and short episodes. Its programs are the same but for the sizes and for
    the one iteration of a search: to compile takes most of the time here."""
    shrink(config, SMALL)
    shrink(config.get("planner", {}), SMALL_PLANNER)
    for dims in {"hidden_dims", "critic_dims"}.intersection(config):
        config[dims] = (8,) * len(config[dims])
    config.eval_episodes = 2
    if "num_simulations" in config:  # its buffer holds whole windows before the first update
        config.update(num_envs=2, random_steps=20)
    source = config.env.split("/")[0]
    limit = {TIME_LIMIT.get(source, "max_steps"): 6} if source not in ("pgx", "infinite_matrix_game") else {}
    with config.unlocked():
        config.smoke = {}
        config.env_kwargs = dict(config.get("env_kwargs", {})) | limit
        if "jump_step" in config.env_kwargs:
            config.env_kwargs.jump_step = 2
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_fits_its_algorithm_and_its_environment(name, tmp_path):
    """With its own sizes, as shapes: nothing is compiled. A training step gives a run like the one it was given."""
    config = with_data(get_config(name), tmp_path)
    shrink(config, dict(num_linearizations=1))
    shrink(config.get("planner", {}), dict(num_iterations=1))  # both are loops that would be traced many times
    config = ml_collections.FrozenConfigDict(config.to_dict())
    algorithm, source, key = cli.algorithm_of(config), cli.source_of(config), jax.random.key(0)
    with reuse_checked(config.algorithm):
        run = jax.eval_shape(functools.partial(algorithm.init, source=source, config=config), key)
        after, _ = jax.eval_shape(functools.partial(algorithm.train_step, source=source, config=config), run, key)
        returns, length, *_ = jax.eval_shape(cli.episodes_of(algorithm, config, 2, 0), run, np.int32(0))
    assert jax.tree.structure(after) == jax.tree.structure(run)
    assert all(a.shape == b.shape and a.dtype == b.dtype
               for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(run), strict=True))
    assert returns.shape[0] == 2 and length.shape == (2,)


def with_data(config, folder):
    """An offline method's config names a data set of its environment's sizes; any other config stays as it is."""
    if "dataset" in config:
        env, rng = cli.make_env(config.env, 1, **config.get("env_kwargs", {})), np.random.default_rng(0)
        obs = jax.tree.map(lambda x: np.float32(rng.normal(size=(12, *x.shape[1:]))), jax.eval_shape(
            env.reset, jax.random.key(0))[1])
        ends, action = np.arange(12) % 4 == 3, env.action_space.sample(jax.random.key(1), (12,))
        config.dataset = str(folder / "data.npz")
        write_arrays(config.dataset, dict(obs=obs, next_obs=obs, action=action, terminated=ends, truncated=ends & False,
                                          reward=np.float32(rng.normal(size=12))))
    return config


def is_child(name):
    return "Child of" in (ROOT / "algorithms" / f"{name}.py").read_text()


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if is_child(name) else name for name in ALGORITHMS])
def test_an_algorithm_trains_resumes_and_is_evaluated(name, tmp_path, monkeypatch):
    """By its first config; a child has the hooks of its parent. Start and resume share their programs."""
    configs = [config for other in CONFIGS if (config := load_config(other)).algorithm == name and not missing(config)]
    config = (configs or [get_config(name, "algorithms")])[0]
    if not hasattr(cli.algorithm_of(config), "act"):
        pytest.skip("it only fits a model")
    job = functools.cache(lambda *_: compile_job(*arguments))
    compile_job, arguments = train.compile_job, []

    def compile_once(*args):
        arguments[:] = args
        return job()._replace(run=jax.tree.map(jnp.copy, job().run))  # training reuses its memory

    monkeypatch.setattr(train, "compile_job", compile_once)
    monkeypatch.setattr(logging, "_curve", lambda *_: None)
    config = with_data(small(config), tmp_path)
    with reuse_checked(name):
        summary = train.train(config, smoke=True, save_every=0.0, workdir=str(tmp_path))
    written = (tmp_path / "metrics.csv").read_bytes()
    with reuse_checked(name):
        row = evaluate_run(run=str(tmp_path), smoke=True)
    for column, final in zip(summary["score"], finals(summary), strict=True):
        assert np.isfinite(final["per_seed"]).all()
        np.testing.assert_allclose(row[column], final["per_seed"], rtol=1e-5)

    first, last = checkpoint.steps(tmp_path / "checkpoints")
    last.unlink()
    (tmp_path / "summary.json").unlink()
    with reuse_checked(name):
        resumed = train.train(config, smoke=True, save_every=0.0, workdir=str(tmp_path), resume=True)
    assert checkpoint.steps(tmp_path / "checkpoints") == [first, last]
    if not config.env.startswith("gymnasium/"):  # a simulator on the host is in no checkpoint
        assert resumed["final"] == summary["final"] and (tmp_path / "metrics.csv").read_bytes() == written


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_runs_as_it_is(name, tmp_path):
    config = with_data(get_config(name), tmp_path)
    with reuse_checked(config.algorithm):
        summary = train.train(config, smoke=True, num_seeds=2, workdir=str(tmp_path))
    assert all(np.isfinite(final["per_seed"]).all() for final in finals(summary))


def test_a_smoke_run_is_two_iterations():
    config = cli.smoke(get_config("pets_cartpole"))
    iteration = config.num_envs * config.num_steps
    assert config.env_steps == config.random_steps + 2 * iteration
    assert config.eval_every == iteration and config.eval_episodes <= 2


def test_the_evaluation_environment_is_the_config_s():
    config = small(get_config("ekf_lqr_pursuit"))
    with config.unlocked():
        config.eval_env_kwargs = dict(max_steps=4, process_noise=0.25)
    env, trained = cli.eval_env(config, 1).env, cli.train_env(config).env
    assert (env.max_steps, env.process_noise) == (4, 0.25) and (trained.max_steps, trained.process_noise) == (6, 0.0)
    with config.unlocked():
        config.update(eval_env="cartpole_swingup", env_kwargs={}, eval_env_kwargs={})
    assert type(cli.eval_env(config, 1).env).__module__ == "core.envs.cartpole_swingup"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_short_and_says_what_it_is(name):
    """15 lines, without its docstring and empty lines."""
    text = (ROOT / "configs" / f"{name}.py").read_text()
    docstring = ast.get_docstring(ast.parse(text), clean=False)
    assert docstring
    assert sum(bool(line.strip()) for line in text.replace(f'"""{docstring}"""', "").splitlines()) <= 15


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_says_what_a_reader_has_to_know(name):
    text = (ROOT / "algorithms" / f"{name}.py").read_text()
    docstring = ast.get_docstring(ast.parse(text))
    for word in ("Departures", "Kept", "Decides", "Cost", "Expect"):
        assert re.search(rf"\b{word}\b", docstring, re.I), f"{name}.py says nothing about: {word}"
    assert 'algorithm=pathlib.Path(__file__).stem' in text, "a copied file would launch another one"


def imported(path):
    """The modules that a file imports, and what it imports from them: core.envs, core.envs.hidden."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def test_every_file_of_core_has_a_user_and_a_test():
    """An environment is used by its name in a config, or else it needs a test."""
    users = [path for folder in ("core", "algorithms", "launchers") for path in (ROOT / folder).rglob("*.py")]
    used = {module for path in users for module in imported(path)}
    tests = {path.name: path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    tested = {module for name in tests for module in imported(ROOT / "tests" / name)}
    for path in sorted((ROOT / "core").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if path.parent.name == "envs" and "class Env" in path.read_text():
            name = path.stem.removeprefix("from_")
            assert module in tested or any(f'"{name}' in text for text in tests.values()), f"no test of {module}"
            continue
        assert module in used or module == "core", f"nobody uses {module}"
