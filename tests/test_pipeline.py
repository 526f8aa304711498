"""Collect, pretrain, finetune, of a stand-in method in a stand-in environment whose truth is known.

    x' = 0.9 x + 0.2 u + noise, as long as |x| < 0.4; obs is (x, t / 20), so the data say where they are from
"""
import functools
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import ml_collections
import numpy as np
import pytest

import core.envs
from algorithms import dynamics, pqn
from core import checkpoint, minari
from core.dataset import Dataset, last_steps, read_arrays
from core.envs import Box, Discrete
from core.errors import UserError
from core.logging import read_metrics
from launchers import cli
from launchers.collect import collect
from launchers.finetune import finetune
from launchers.pretrain import pretrain
from tests.stand_ins import drift, linear

ROOT = pathlib.Path(__file__).parents[1]
COLLECT, PRETRAIN, FINETUNE = (f"launchers/{name}.py" for name in ("collect", "pretrain", "finetune"))
EPISODES, RESUMED, NOISE, RANDOM = (
    "test_episodes_are_whole_and_in_order", "test_what_was_interrupted_goes_on",
    "test_exploration_noise_is_in_half_widths_and_independent", "test_a_share_of_discrete_actions_is_random")
MODEL, MISTAKE, STARTS = ("test_the_model_is_that_of_the_first_seed", "test_a_mistake_is_named",
                          "test_finetune_starts_from_the_stored_weights")
PLANTED_ERRORS = {
    "one environment's steps among another's": (
        COLLECT, "np.concatenate([x[:n, e] for e, n in enumerate(rows)])", "x[:max(rows)].reshape(-1, *x.shape[2:])",
        EPISODES),
    "episodes cut short": (COLLECT, "[n - 1] + 1 for e", "[n - 1] for e", EPISODES),
    "one episode too many": (COLLECT, "[n - 1] + 1 for e", "[-1] + 1 for e", EPISODES),
    "the section ignored": (COLLECT, "config[name] = value", "config[name] = config[name]", EPISODES),
    "a key for all steps": (COLLECT, "fold_in(jax.random.fold_in(key, 1), state.t)", "fold_in(key, 1)", EPISODES),
    "a step is lost in a checkpoint": (COLLECT, "checkpoint.save(folder, int(state.t), state,",
                                       "checkpoint.save(folder, int(state.t), state._replace(t=state.t + 1),", RESUMED),
    "memory goes on over an end": (COLLECT, "carry = restart(ended(ts), fresh, carry)", "carry = carry", EPISODES),
    "nothing is observed": (COLLECT, "observe(carry, transition)\n", "carry\n", EPISODES),
    "the truth in the data": (COLLECT, "transition._asdict() | shown", "transition._asdict()", EPISODES),
    "one noise for all environments": (COLLECT, "jax.random.normal(key, action.shape)",
                                       "jax.random.normal(key, (1, *action.shape[1:]))", NOISE),
    "noise in units of the action": (COLLECT, "noise * half * jax", "noise * jax", NOISE),
    "the action is stored before it is clipped": (
        COLLECT, "return env.action_space.clip(action + noise * half * jax.random.normal(key, action.shape))",
        "return action + noise * half * jax.random.normal(key, action.shape)", NOISE),
    "no noise": (COLLECT, "action = explore(noise_key, action)", "action = explore(noise_key, action) * 0 + action",
                 NOISE),
    "every action is random": (COLLECT, "jax.random.uniform(whether_key, action.shape) < random",
                               "jax.random.uniform(whether_key, action.shape) < 1.0", RANDOM),
    "no action is random": (COLLECT, "< random, other, action)", "< random, action, action)", RANDOM),
    "the share of the policy's actions": (COLLECT, "< random, other, action)", "< random, action, other)", RANDOM),
    "one coin for all environments": (COLLECT, "jax.random.uniform(whether_key, action.shape)",
                                      "jax.random.uniform(whether_key)", RANDOM),
    "one random action for all environments": (COLLECT, "env.action_space.sample(which_key, action.shape)",
                                               "env.action_space.sample(which_key)", RANDOM),
    "a share above 1": (COLLECT, "or not 0 <= random <= 1:", "or random < 0:", MISTAKE),
    "random actions in a box": (COLLECT, "if random and not isinstance(env.action_space, Discrete):", "if False:",
                                MISTAKE),
    "a fresh policy for the trained one": (COLLECT, "trained_actor(run, config) if run else", "",
                                           "test_a_trained_policy_collects"),
    "finished data collected again": (COLLECT, 'if (folder / "summary.json").exists():', "if False:", MISTAKE),
    "a run is started in other environments": (COLLECT, 'its.get("num_envs", 1)', "config.num_envs",
                                               "test_a_run_is_started_in_as_many_environments_as_it_had"),
    "an offline method has its own environments": (
        COLLECT, 'config.num_envs = section.get("num_envs", 1)', "config.num_envs = 1",
        "test_an_offline_method_says_how_many_environments_collect_for_it"),
    "smoke is not small": (COLLECT, "episodes = 2 if smoke else episodes", "episodes = episodes",
                           "test_smoke_goes_through_all_stages"),
    "the last seed's model": (PRETRAIN, "np.asarray(x[0])", "np.asarray(x[-1])", MODEL),
    "first weights written": (PRETRAIN, 'checkpoint.restore_newest(folder / "checkpoints", '
                              "dict(run=jax.eval_shape(init, jnp.arange(num_seeds))))",
                              "(dict(run=init(jnp.arange(num_seeds))), 0)", MODEL),
    "pretrain's section ignored": (PRETRAIN, "own[name] = value", "own[name] = own[name]", MODEL),
    "a finished model is trained again": (PRETRAIN, 'if (folder / "model.npz").exists():', "if False:", MISTAKE),
    "finetune from nothing": (FINETUNE, "config.to_dict() | dict(pretrained=str(weights))", "config.to_dict()", STARTS),
    "seeds of finetune": (FINETUNE, "num_seeds=num_seeds", "num_seeds=1", STARTS),
    "all of Minari is one episode": ("core/minari.py", "        begin = end\n", "",
                                     "test_minari_gives_back_what_was_put_into_it"),
    "one step less in Minari": ("core/minari.py", "lambda x: x[1:], e.observations", "lambda x: x[:-1], e.observations",
                                "test_minari_gives_back_what_was_put_into_it"),
    "images lose details in Minari": ("core/minari.py", '{"jpeg_encoding": False}', '{"jpeg_encoding": True}',
                                      "test_minari_gives_back_what_was_put_into_it"),
    "images are numbers with a comma in Minari": ("core/minari.py", 'if tree.dtype.kind == "f":', "if True:",
                                                  "test_minari_gives_back_what_was_put_into_it"),
    "Minari is needed": ("core/minari.py", "except ImportError", "except KeyError",
                         "test_without_minari_its_extra_is_named"),
}


def move_in(patch):
    """The stand-ins become a part of the house: patch(object, name, value)."""
    algorithm_of = cli.algorithm_of
    patch(core.envs, "HERE", pathlib.Path(__file__).with_name("stand_ins"))
    patch(cli, "algorithm_of", lambda config: linear if config.algorithm == "linear" else algorithm_of(config))
    sys.modules["core.envs.drift"] = drift


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    with pytest.MonkeyPatch.context() as patch:
        move_in(patch.setattr)
        yield
        del sys.modules["core.envs.drift"]


def config_of(**changes):
    config = linear.get_config()
    for name, value in changes.items():
        config[name].update(value)
    return config


@pytest.fixture(scope="module")
def collected(stand_ins, tmp_path_factory):
    folder = tmp_path_factory.mktemp("collected")
    collect(config_of(), workdir=str(folder))
    return folder


@pytest.fixture(scope="module")
def pretrained(collected):
    pretrain(config_of(), workdir=str(collected), num_seeds=2, save_every=0.0)
    return collected


@pytest.fixture(scope="module")
def finetuned(pretrained):
    finetune(config_of(), workdir=str(pretrained), num_seeds=2)
    return pretrained


def split_at_ends(data):
    cuts = last_steps(data)[:-1] + 1
    pieces = {k: np.split(np.asarray(v), cuts[cuts < len(v)]) for k, v in data.items()}
    return [dict(zip(pieces, episode, strict=True)) for episode in zip(*pieces.values(), strict=True)]


def assert_whole(episode):
    obs, next_obs = episode["obs"], episode["next_obs"]
    assert obs[0, 1] == 0 and abs(obs[0, 0]) <= 0.1
    np.testing.assert_array_equal(next_obs[:-1], obs[1:])
    assert episode["terminated"][-1] == (abs(next_obs[-1, 0]) > 0.4)
    assert episode["terminated"][-1] or len(obs) == 20 and episode["truncated"][-1]
    assert next_obs[-1, 1] == pytest.approx(len(obs) / 20)


def test_episodes_are_whole_and_in_order(collected):
    assert {p.name for p in (collected / "collect").iterdir()} == {
        "data.npz", "data.png", "config.json", "provenance.json", "summary.json"}
    data = Dataset.load(collected / "collect/data.npz").data
    assert data["obs"].shape[1:] == data["next_obs"].shape[1:] == (2,)  # without what the environment reveals
    episodes = split_at_ends(data)
    assert len(episodes) == 50 and len({len(e["obs"]) for e in episodes}) > 5
    for episode in episodes:
        assert_whole(episode)
    noise = data["next_obs"][:, 0] - 0.9 * data["obs"][:, 0] - 0.2 * data["action"][:, 0]
    assert len(np.unique(noise)) > 0.95 * len(noise)
    assert np.std(noise) == pytest.approx(0.05, rel=0.1)  # collect's, not the 0.5 of finetune
    explored = data["action"][:, 0] - data["obs"][:, 1]  # the method acts by the number of steps that it has observed
    assert abs(explored.mean()) < 0.1 and np.corrcoef(explored, data["obs"][:, 1])[0, 1] < 0.1
    summary = json.loads((collected / "collect/summary.json").read_text())
    assert summary["episodes"] == 50 and summary["transitions"] == len(noise)
    length = np.array([len(e["obs"]) for e in episodes])  # a reward of 1 a step
    half = 1.96 * length.std() / 50**0.5
    assert summary["returns"]["mean"] == pytest.approx(length.mean(), rel=1e-5)
    assert summary["returns"]["ci95"] == pytest.approx([length.mean() - half, length.mean() + half], rel=1e-5)


def test_exploration_noise_is_in_half_widths_and_independent(collected):
    """0.3 of half a box of [−1, 3]; what is stored is what was done."""
    data = Dataset.load(collected / "collect/data.npz").data
    action = np.asarray(data["action"][:, 0])
    noise = action - data["obs"][:, 1]
    inside = action > -1
    assert action.min() == -1 and 0.5 < inside.mean() < 1
    assert np.std(noise) == pytest.approx(0.6, rel=0.12) and len(np.unique(noise[inside])) == inside.sum()


def test_a_share_of_discrete_actions_is_random(tmp_path, monkeypatch):
    """0.3 of the actions, of two: 0.15 of them differ from the policy's. In each environment on its own."""
    monkeypatch.setattr(core.envs, "HERE", pathlib.Path(core.envs.__file__).parent)
    config = pqn.get_config()
    config.update(num_envs=4, hidden_dims=(4,))
    config.collect = dict(episodes=160, random_actions=0.3)
    collect(config, workdir=str(tmp_path))
    data = Dataset.load(tmp_path / "collect/data.npz").data
    env, config = cli.make_env(config.env, 4), ml_collections.FrozenConfigDict(config)
    run = jax.jit(functools.partial(pqn.init, source=env, config=config))(jax.random.fold_in(jax.random.key(0), 0))
    other = np.asarray(pqn.act(run, (), data["obs"], None)[1] != data["action"])
    assert other.mean() == pytest.approx(0.15, abs=0.02)
    steps = np.reshape([len(episode["obs"]) for episode in split_at_ends(data)], (4, 40)).sum(axis=1)
    number = sum(1 * x[:steps.min()] for x in np.split(other, np.cumsum(steps)[:-1]))  # (T,) of the four environments
    assert (number * (number - 1)).mean() / 12 == pytest.approx(0.15**2, abs=0.01)


def test_a_trained_policy_collects(finetuned, tmp_path):
    """Without noise: its action says what it learnt, and how many steps of its own episode it has observed."""
    collect(config_of(collect=dict(action_noise=0.0)), workdir=str(tmp_path), run=str(finetuned / "finetune"), seed=1)
    data = Dataset.load(tmp_path / "collect/data.npz").data
    weight = read_metrics(finetuned / "finetune")["weight"][-1, 0]
    assert weight > 0.1
    np.testing.assert_allclose(data["action"][:, 0], data["obs"][:, 1] + weight / 10, atol=1e-5)
    assert len(split_at_ends(data)) == 50
    assert json.loads((tmp_path / "collect/config.json").read_text())["run"] == str(finetuned / "finetune")


def test_what_was_interrupted_goes_on(collected, tmp_path, monkeypatch):
    """Stopped after a checkpoint and resumed, it leaves the same data, byte for byte."""
    save = checkpoint.save

    def save_and_stop(folder, step, *args):
        save(folder, step, *args)
        if step > 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            collect(config_of(), workdir=str(tmp_path), save_every=0.0)
    assert not (tmp_path / "collect/summary.json").exists()
    collect(config_of(), workdir=str(tmp_path), resume=True)
    assert (tmp_path / "collect/data.npz").read_bytes() == (collected / "collect/data.npz").read_bytes()
    assert not (tmp_path / "collect/checkpoints").exists()


def test_killed_and_resumed(collected, tmp_path):
    """SIGKILL at a moment of its own, once there is a checkpoint."""
    code = ("from tests.test_pipeline import *; move_in(setattr); "
            f"collect(config_of(), workdir={str(tmp_path)!r}, save_every=0.0)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((tmp_path / "collect/checkpoints").glob("step_*.npz")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "collect/summary.json").exists()
    collect(config_of(), workdir=str(tmp_path), resume=True)
    assert (tmp_path / "collect/data.npz").read_bytes() == (collected / "collect/data.npz").read_bytes()


def test_the_model_is_that_of_the_first_seed(pretrained):
    """The least squares of its training episodes; the score is the error of the others."""
    folder, data = pretrained / "pretrain", cli.read_dataset(
        str(pretrained / "collect/data.npz"), core.envs.make_env("drift", 1))
    params = read_arrays(folder / "model.npz")
    config = json.loads((folder / "config.json").read_text())
    for name in ("num_seeds", "seed", "eval_seed"):
        config.pop(name)
    assert config["env_kwargs"] == dict(noise=0.5) and config["updates"] == 400 and config["hidden_dims"] == []
    run = jax.jit(lambda key: dynamics.init(key, data, ml_collections.FrozenConfigDict(config)))(
        jax.random.fold_in(jax.random.key(0), 0))
    trained = np.asarray(run.order[:run.num_trained])
    data = {name: np.asarray(leaf, np.float64) for name, leaf in data.data.items()}
    inputs, change = np.concatenate([data["obs"], data["action"]], axis=1), data["next_obs"] - data["obs"]
    scaling, layer = params["scaling"], params["weights"]["Dense_0"]
    np.testing.assert_allclose(scaling["centre"], inputs[trained].mean(0), rtol=1e-4)
    z = np.append((inputs - scaling["centre"]) / scaling["spread"], np.ones((len(inputs), 1)), axis=1)
    y, fitted = change / scaling["scale"], np.append(layer["kernel"], layer["bias"][None], axis=0)
    np.testing.assert_allclose(fitted[:, 0], np.linalg.lstsq(z[trained], y[trained])[0][:, 0], atol=0.05)
    metrics, summary = read_metrics(folder), json.loads((folder / "summary.json").read_text())
    held_out = np.delete(np.arange(len(y)), trained)
    for name, index in (("holdout_error", held_out), ("train_error", trained)):
        error = np.sqrt(np.square(z @ fitted - y)[index].mean())
        assert metrics[name][-1, 0] == pytest.approx(error, rel=1e-3) and metrics[name][-1, 1] != metrics[name][-1, 0]
    assert summary["score"] == ["holdout_error"] and summary["updates"] == 400 and (folder / "curve.png").exists()
    np.testing.assert_array_equal(metrics["updates"][:, 0], [100, 200, 300, 400])


def test_finetune_starts_from_the_stored_weights(finetuned):
    weight = np.abs(read_arrays(finetuned / "pretrain/model.npz")["weights"]["Dense_0"]["kernel"]).sum()
    metrics = read_metrics(finetuned / "finetune")
    np.testing.assert_array_equal(metrics["seed"], [[0, 1]] * 2)
    np.testing.assert_allclose(metrics["weight"], weight, rtol=1e-5)


def test_a_killed_pretraining_still_writes_its_model(pretrained, tmp_path):
    """Killed between the end of training and the writing of the model."""
    before = read_arrays(pretrained / "pretrain/model.npz")
    (pretrained / "pretrain/model.npz").rename(tmp_path / "model.npz")
    pretrain(config_of(), workdir=str(pretrained), num_seeds=2, resume=True)
    after = read_arrays(pretrained / "pretrain/model.npz")
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_smoke_goes_through_all_stages(tmp_path):
    assert collect(config_of(), workdir=str(tmp_path), smoke=True)["episodes"] == 2
    assert pretrain(config_of(pretrain=dict(rollout_steps=1)), workdir=str(tmp_path), smoke=True)["updates"] == 2
    assert finetune(config_of(), workdir=str(tmp_path), smoke=True)["env_steps"] == 4


CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("icem_online_*.py"))


@pytest.mark.parametrize("name", CONFIGS)
def test_sections_of_a_config_fit(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    stage = importlib.import_module("launchers.collect").settings(config, smoke=True)
    assert stage[0].num_envs == 2 and stage[1] == 2 and stage[2] > 0 and not stage[0].learn
    own = importlib.import_module("launchers.pretrain").settings(config, "data.npz")
    assert own.dataset == "data.npz" and own.hidden_dims == config.hidden_dims and own.updates == 10_000


def test_an_offline_method_says_how_many_environments_collect_for_it():
    settings = importlib.import_module("launchers.collect").settings
    config = importlib.import_module("configs.iql_pendulum").get_config()
    assert [settings(config, smoke)[0].num_envs for smoke in (False, True)] == [20, 2]
    del config.collect
    config.collect = dict(episodes=3)
    assert settings(config, False)[0].num_envs == 1
    for value in (0, 2.5):
        config.collect = ml_collections.ConfigDict(dict(episodes=3, num_envs=value))
        with pytest.raises(UserError, match=f"config.collect.num_envs = {value}: has to be an integer from 1 on"):
            settings(config, False)


def test_a_run_is_started_in_as_many_environments_as_it_had(monkeypatch):
    """Whatever the number of those that collect."""
    launcher = importlib.import_module("launchers.collect")
    its = ml_collections.FrozenConfigDict(dict(env="drift", num_envs=3))
    method = SimpleNamespace(init=lambda key, source, config: np.zeros(source.num_envs))
    monkeypatch.setattr(launcher, "load", lambda path: (method, its, np.ones((2, 3)), {}))
    config = ml_collections.FrozenConfigDict(dict(env="drift", num_envs=5))
    np.testing.assert_array_equal(launcher.trained_actor("runs/x", config)[1], np.ones(3))
    seen = []
    method.init = lambda key, source, config: seen.append((source.num_envs, source.env.max_steps)) or np.zeros(3)
    launcher.trained_actor("runs/x", config)
    assert seen == [(3, 20)]


MISTAKES = {
    "finished collection": (collect, {}, {}),
    "finished model": (pretrain, {}, {}),
    'config.collect has "episods"': (collect, dict(collect=dict(episods=3)), dict(workdir="new")),
    'config.pretrain has "epochs"': (pretrain, dict(pretrain=dict(epochs=3)), dict(workdir="new")),
    "random_actions = 1.5: has to be": (collect, dict(collect=dict(random_actions=1.5)), dict(workdir="new")),
    "but the actions are continuous": (collect, dict(collect=dict(random_actions=0.5)), dict(workdir="new")),
    "no data in": (pretrain, {}, dict(workdir="new")),
    "damaged.npz": (pretrain, {}, dict(workdir="new", data="damaged.npz")),
    r"obs \(3,\) where the environment has": (pretrain, {}, dict(workdir="new", data="other.npz")),
    "pretrain/model.npz": (finetune, {}, dict(workdir="new")),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_named(words, pretrained, tmp_path):
    launch, changes, flags = MISTAKES[words]
    stored = pretrained / "collect/data.npz"
    data = Dataset.load(stored).data
    Dataset.create(data | dict(obs=np.zeros((len(data["reward"]), 3)))).save(tmp_path / "other.npz")
    (tmp_path / "damaged.npz").write_bytes(stored.read_bytes()[:-9])
    flags = dict(workdir=str(pretrained)) | {name: str(tmp_path / value) for name, value in flags.items()}
    before = stored.stat().st_mtime_ns
    with pytest.raises(UserError, match=words) as error:
        launch(config_of(**changes), **flags)
    assert "\n" not in str(error.value) and stored.stat().st_mtime_ns == before
    assert not (tmp_path / "new").exists()


def test_a_config_without_stages_is_refused():
    config = importlib.import_module("configs.ppo_cartpole").get_config()
    for launch, words in ((collect, '"collect"'), (pretrain, '"pretrain"'), (finetune, "cannot start from stored")):
        with pytest.raises(UserError, match=words):
            launch(config)


def transitions():
    obs, flags = np.arange(14, dtype=np.float32).reshape(7, 2), np.arange(7)
    return dict(obs=obs, action=obs[:, :1], next_obs=obs + 2, reward=obs[:, 0], terminated=flags == 2,
                truncated=flags == 6)


def parts(**steps):
    """Observations that are dictionaries, of images, which no encoding may change, and of numbers."""
    images = np.random.default_rng(0).integers(0, 256, (8, 33, 34, 3), np.uint8)
    images[4] = images[3]  # where one episode ends and the next one begins, a successor is no first observation
    return {name: dict(image=images[step:step + 7], goal=np.arange(7, dtype=np.float32) + step)
            for name, step in steps.items()}


def stand_in_for_minari():
    """What core.minari needs of that package, in memory."""
    stored = {}

    def parse(name):
        if "-v" not in name:
            raise ValueError(name)

    return SimpleNamespace(
        list_local_datasets=lambda: stored, load_dataset=lambda name: stored[name],
        create_dataset_from_buffers=lambda name, buffers, **spaces: stored.update({name: buffers}),
        data_collector=SimpleNamespace(EpisodeBuffer=lambda **episode: SimpleNamespace(**episode)),
        dataset=SimpleNamespace(minari_dataset=SimpleNamespace(parse_dataset_id=parse)))


@pytest.mark.parametrize("package", ["minari", "a stand-in"])
def test_minari_gives_back_what_was_put_into_it(package, tmp_path, monkeypatch):
    pytest.importorskip("gymnasium")
    if package == "minari":
        pytest.importorskip("minari")
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    else:
        monkeypatch.setitem(sys.modules, "minari", stand_in_for_minari())
    for name, data, space in (
            ("test/box-v0", transitions(), Box((-1.0,), (1.0,))),
            ("test/discrete-v0", transitions() | dict(action=np.arange(7, dtype=np.int32) % 3), Discrete(3)),
            ("test/dict-v0", transitions() | parts(obs=0, next_obs=1), Box((-1.0,), (1.0,)))):
        minari.write(name, data, space)
        jax.tree.map(np.testing.assert_array_equal, minari.read(name), data)
    if package == "minari":
        spaces = minari.package().load_dataset("test/dict-v0").observation_space
        assert {(x.low.min(), x.high.max()) for x in spaces.values()} == {(0, 255), (-np.inf, np.inf)}
    for culprit, function in (("already", minari.require_free), ("test/no-v0", lambda _: minari.read("test/no-v0")),
                              ("no name", lambda _: minari.read("no name"))):
        with pytest.raises(UserError, match=culprit):
            function("test/box-v0")


def test_without_minari_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(UserError, match=r"minari is not installed: pip install -e .\.\[offline\]"):
        minari.read("test/box-v0")
