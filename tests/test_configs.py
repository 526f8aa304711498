"""Every config of configs/ trains, is evaluated and resumes; and what every file of the house has."""
import ast
import functools
import importlib
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import checkpoint, logging
from core.logging import finals
from launchers import cli, train
from launchers.evaluate import evaluate_run

ROOT = pathlib.Path(__file__).parents[1]
CLI, TRAIN = "launchers/cli.py", "launchers/train.py"
PLANTED_ERRORS = {
    "evaluation in the training environment": (CLI,
        ', **config.get("eval_env_kwargs", {})})', "})", "test_the_evaluation_environment_is_the_config_s"),
    "a smoke run of the whole budget": (CLI,
        'config[clock] = config.get("random_steps", 0) + 2 * iteration', "pass", "test_a_smoke_run_is_two_iterations"),
    "resume starts over": (TRAIN,
        'i, since, seconds, row, best = meta["iteration"]', "i, since, seconds, row, best = 0",
        "test_a_config_trains_and_resumes[ppo_cartpole]"),
}

SMALL = dict(num_steps=8, num_epochs=1, num_updates=2, random_steps=8, horizon=3, kept_elites=2)
SMALL_PLANNER = dict(num_samples=8, num_elites=4, num_iterations=1)
TIME_LIMIT = {"gymnax": "max_steps_in_episode", "jaxmarl": "max_steps", "gymnasium": "max_episode_steps"}


def names(folder):
    return sorted(path.stem for path in (ROOT / folder).glob("*.py") if path.stem != "__init__")


CONFIGS, ALGORITHMS = names("configs"), names("algorithms")


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def small(name):
    """The config with small networks and plans and short episodes: to compile takes most of the time here, and its
    programs are the same but for the sizes and for the one iteration of a search."""
    config = get_config(name)
    source = config.env.split("/")[0] if "/" in config.env else None
    if source == "gymnasium" and importlib.util.find_spec("mujoco") is None:
        pytest.skip("no mujoco")
    if source == "jaxmarl" and importlib.util.find_spec("jaxmarl") is None:
        pytest.skip("no jaxmarl")
    for section, sizes in ((config, SMALL), (config.get("planner", {}), SMALL_PLANNER)):
        section.update({key: min(size, section[key]) for key, size in sizes.items() if key in section})
    config.eval_episodes = 2
    if "hidden_dims" in config:
        config.hidden_dims = (8,) * len(config.hidden_dims)
    with config.unlocked():
        env_kwargs = dict(config.get("env_kwargs", {})) | {TIME_LIMIT.get(source, "max_steps"): 6}
        if "jump_step" in env_kwargs:
            env_kwargs["jump_step"] = 2
        config.env_kwargs = env_kwargs
    return config


@pytest.fixture(scope="module")
def quick():
    """No picture, and equal programs are compiled once: those of a config and of its resume, or of one that differs
    in its budget alone."""
    compile_job, jobs = train.compile_job, {}

    @functools.wraps(compile_job)
    def compile_once(algorithm, config, seeds, *rest):
        key = json.dumps([cli.config_dict(config), seeds.tolist(), *rest])
        if key not in jobs:
            jobs[key] = compile_job(algorithm, config, seeds, *rest)
        return jobs[key]._replace(run=jax.tree.map(jnp.copy, jobs[key].run))  # training reuses its memory

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_job", compile_once)
        patch.setattr(logging, "_curve", lambda *_: None)
        yield


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_trains_and_resumes(name, quick, tmp_path):
    config = small(name)
    summary = train.train(config, smoke=True, num_seeds=1, save_every=0.0, workdir=str(tmp_path))
    for final in finals(summary):
        assert np.isfinite(final["per_seed"]).all()
    written = (tmp_path / "metrics.csv").read_bytes()
    first, last = checkpoint.steps(tmp_path / "checkpoints")
    last.unlink()
    (tmp_path / "summary.json").unlink()
    resumed = train.train(config, smoke=True, num_seeds=1, save_every=0.0, workdir=str(tmp_path), resume=True)
    assert resumed["env_steps"] == summary["env_steps"] and checkpoint.steps(tmp_path / "checkpoints") == [first, last]
    if not config.env.startswith("gymnasium/"):  # a simulator on the host is in no checkpoint
        assert (tmp_path / "metrics.csv").read_bytes() == written
        assert resumed["final"] == summary["final"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_evaluate_repeats_the_score_of_training(algorithm, quick, tmp_path):
    configs = [name for name in CONFIGS if get_config(name).algorithm == algorithm]
    if not configs:
        pytest.skip("no config of its own")
    config = small(configs[0])
    summary = train.train(config, smoke=True, workdir=str(tmp_path))
    row = evaluate_run(run=str(tmp_path), smoke=True)
    for name, final in zip(summary["score"], finals(summary), strict=True):
        np.testing.assert_allclose(row[name], final["per_seed"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_runs_as_it_is(name, tmp_path):
    config = get_config(name)
    summary = train.train(config, smoke=True, num_seeds=2, workdir=str(tmp_path))
    assert all(np.isfinite(final["per_seed"]).all() for final in finals(summary))


def test_a_smoke_run_is_two_iterations():
    config = cli.smoke(small("pets_cartpole"))
    assert config.env_steps == 8 + 2 * 8 and config.eval_every == 8 and config.eval_episodes <= 2


def test_the_evaluation_environment_is_the_config_s():
    config = small("ekf_lqr_pursuit")
    with config.unlocked():
        config.eval_env_kwargs = dict(max_steps=4, process_noise=0.25)
    env, trained = cli.eval_env(config, 1).env, cli.train_env(config).env
    assert (env.max_steps, env.process_noise) == (4, 0.25) and (trained.max_steps, trained.process_noise) == (6, 0.0)
    with config.unlocked():
        config.update(eval_env="cartpole_swingup", env_kwargs={}, eval_env_kwargs={})
    assert type(cli.eval_env(config, 1).env).__module__ == "core.envs.cartpole_swingup"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_short_and_says_what_it_is(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 15
    assert ast.get_docstring(ast.parse(text))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithm_says_what_a_reader_has_to_know(name):
    text = (ROOT / "algorithms" / f"{name}.py").read_text()
    docstring = ast.get_docstring(ast.parse(text))
    for word in ("Departures", "Kept", "Decides", "Cost", "Expect"):
        assert f"{word}: " in docstring, f"{name}.py says nothing about: {word}"
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
            assert any(f'"{path.stem}' in text or module in tested for text in tests.values()), f"no test of {module}"
            continue
        assert module in used or module == "core", f"nobody uses {module}"
