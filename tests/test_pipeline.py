"""Collect, pretrain, finetune, as programs, of a stand-in method in a stand-in environment whose truth is known.

    x' = 0.9 x + 0.2 u + noise, as long as |x| < 0.4; what is seen is (x, t / 20), so the data say where they are from
"""
import csv
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from core import minari
from core.dataset import Dataset, last_steps, read_arrays
from core.envs import Box, Discrete
from core.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
COLLECT, PRETRAIN, FINETUNE = (f"launchers/{name}.py" for name in ("collect", "pretrain", "finetune"))
EPISODES, RESUMED, POLICY = "test_episodes_are_whole_and_in_order", "test_killed_and_resumed", "test_a_policy_collects"
MODEL, MISTAKE = "test_the_model_is_that_of_the_training_episodes", "test_a_mistake_is_one_line"
PLANTED_ERRORS = {
    "one environment's steps among another's": (
        COLLECT, "np.concatenate([x[:n, e] for e, n in enumerate(rows)])", "x[:max(rows)].reshape(-1, *x.shape[2:])",
        EPISODES),
    "episodes cut short": (COLLECT, "[n - 1] + 1 for e", "[n - 1] for e", EPISODES),
    "one episode too many": (COLLECT, "[n - 1] + 1 for e", "[-1] + 1 for e", EPISODES),
    "the section ignored": (COLLECT, "config[name] = value", "config[name] = config[name]", EPISODES),
    "a key for all steps": (COLLECT, "fold_in(jax.random.fold_in(key, 1), state.t)", "fold_in(key, 1)", EPISODES),
    "keys start over on resume": (COLLECT, "fold_in(key, 1), state.t)", "fold_in(key, 1), state.t + 99 * FLAGS.resume)",
                                  f"{RESUMED}[collect]"),
    "memory goes on over an end": (COLLECT, "where(ended(ts), new, old)", "old", POLICY),
    "the next episode's start for the successor": (COLLECT, "next_obs=ts.next_obs", "next_obs=ts.obs", POLICY),
    "finished data collected again": (COLLECT, 'if (folder / "summary.json").exists():', "if False:",
                                      f"{MISTAKE}[finished]"),
    "holdout is trained on": (PRETRAIN, "compiled(model, train.data, *span)", "compiled(model, (train.data | {}) and "
                              "jax.tree.map(lambda x, y: jnp.resize(y, x.shape), train.data, holdout.data), *span)",
                              MODEL),
    "training data for holdout": (PRETRAIN, "holdout=holdout.data)", "holdout=train.data)", MODEL),
    "the same minibatch for ever": (PRETRAIN, "fold_in(jax.random.fold_in(key, 1), i)", "fold_in(key, 1)", MODEL),
    "first weights written": (PRETRAIN, "model, seconds = train_model(model,", "_, seconds = train_model("
                              "jax.tree.map(jnp.copy, model),", MODEL),
    "one step ahead for ever": (PRETRAIN, "return obs, jnp.stack([", 'return now["next_obs"], jnp.stack([', MODEL),
    "resume starts over": (PRETRAIN, 'i, seconds, saved = meta["update"],', "i, seconds, saved = 0,",
                           f"{RESUMED}[pretrain]"),
    "finetune from nothing": (FINETUNE, "config.pretrained, FLAGS.workdir = str(weights), str(folder)",
                              "FLAGS.workdir = str(folder)", "test_finetune_starts_from_the_stored_weights"),
    "all of Minari is one episode": ("core/minari.py", "        begin = end\n", "",
                                     "test_minari_gives_back_what_was_put_into_it"),
    "one step less in Minari": ("core/minari.py", "e.observations[1:]", "e.observations[:-1]",
                                "test_minari_gives_back_what_was_put_into_it"),
    "Minari is needed": ("core/minari.py", "except ImportError", "except KeyError",
                         "test_without_minari_its_extra_is_named"),
}
CONFIG = "--config=algorithms/linear.py"


@pytest.fixture(scope="session")
def house(tmp_path_factory):
    """A copy of the house in which the stand-ins live, too."""
    house = tmp_path_factory.mktemp("house")
    for folder in ("algorithms", "configs", "core", "launchers"):
        shutil.copytree(ROOT / folder, house / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tests/stand_ins/linear.py", house / "algorithms")
    shutil.copy(ROOT / "tests/stand_ins/drift.py", house / "core/envs")
    return house


@pytest.fixture(scope="session")
def launch(house):
    def launch(name, *args, wait=True, limit=""):
        command = shlex.join([sys.executable, "-m", f"launchers.{name}", *map(str, args)])
        process = subprocess.Popen(["bash", "-c", f"{limit} exec {command}"], cwd=house, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, "PYTHONPATH": str(house)})
        if wait:
            process.output, process.error = process.communicate(timeout=300)
        return process

    return launch


@pytest.fixture(scope="session")
def collected(launch, tmp_path_factory):
    folder = tmp_path_factory.mktemp("collected")
    process = launch("collect", CONFIG, f"--workdir={folder}")
    assert process.returncode == 0, process.error
    return folder


@pytest.fixture(scope="session")
def pretrained(launch, collected):
    process = launch("pretrain", CONFIG, f"--workdir={collected}")
    assert process.returncode == 0, process.error
    return collected


@pytest.fixture(scope="session")
def finetuned(launch, pretrained):
    process = launch("finetune", CONFIG, f"--workdir={pretrained}", "--num_seeds=2")
    assert process.returncode == 0, process.error
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
    episodes = split_at_ends(data)
    assert len(episodes) == 50 and len({len(e["obs"]) for e in episodes}) > 5
    for episode in episodes:
        assert_whole(episode)
    assert len(np.unique(data["action"])) == len(data["action"])
    noise = data["next_obs"][:, 0] - 0.9 * data["obs"][:, 0] - 0.2 * data["action"][:, 0]
    assert np.std(noise) == pytest.approx(0.05, rel=0.1)  # collect's, not the 0.5 of finetune
    summary = json.loads((collected / "collect/summary.json").read_text())
    assert summary["episodes"] == 50 and summary["transitions"] == len(noise)
    length = np.array([len(e["obs"]) for e in episodes])  # a reward of 1 a step
    half = 1.96 * length.std() / 50**0.5
    assert summary["returns"]["mean"] == pytest.approx(length.mean(), rel=1e-5)
    assert summary["returns"]["ci95"] == pytest.approx([length.mean() - half, length.mean() + half], rel=1e-5)


@pytest.mark.parametrize("stage", ["collect", "pretrain"])
def test_killed_and_resumed(stage, pretrained, launch, tmp_path):
    """SIGKILL once there is a checkpoint: resumed, it leaves the same files, byte for byte."""
    args = (CONFIG, f"--workdir={tmp_path}", "--save_every=0", f"--data={pretrained / 'collect/data.npz'}")
    args = args[:3] if stage == "collect" else args
    process = launch(stage, *args, wait=False)
    while process.poll() is None and not list((tmp_path / stage / "checkpoints").glob("step_*")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / stage / "summary.json").exists()
    resumed = launch(stage, *args, "--resume")
    assert resumed.returncode == 0, resumed.error
    for name in {"collect": ["data.npz"], "pretrain": ["model.npz", "metrics.csv"]}[stage]:
        assert (tmp_path / stage / name).read_bytes() == (pretrained / stage / name).read_bytes()


def test_the_model_is_that_of_the_training_episodes(pretrained):
    """Its weights are the least squares of those, its errors the noise, ahead what its own predictions lead to."""
    folder, truth = pretrained / "pretrain", np.array([[-0.1, 0], [0, 0], [0.2, 0], [0, 1 / 20]])
    with open(folder / "metrics.csv") as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == 20 and [row["update"] for row in rows] == [90 * (k + 1) for k in range(20)]
    key = jax.random.fold_in(jax.random.key(0), 3)
    sides = Dataset.load(pretrained / "collect/data.npz").split(0.2, key)
    weights = read_arrays(folder / "model.npz")["layer"]["w"]

    def regression(data):
        inputs = np.concatenate([data["obs"], data["action"], np.ones((len(data["obs"]), 1))], axis=1)
        return inputs, data["next_obs"] - data["obs"]

    inputs, change = regression(sides[0].data)
    np.testing.assert_allclose(weights, np.linalg.lstsq(inputs, change)[0], atol=3e-3)
    np.testing.assert_allclose(weights, truth, atol=0.03)
    inputs, change = regression(sides[1].data)
    error = np.sqrt(np.square(inputs @ weights - change)[:, 0].mean())
    assert rows[-1]["holdout_error"] == pytest.approx(error, rel=1e-4) == pytest.approx(0.05, rel=0.2)
    assert rows[0]["loss"] > 1.3 * rows[-1]["loss"] and rows[-1]["train_error"] == pytest.approx(0.05, rel=0.2)

    ahead = json.loads((folder / "summary.json").read_text())["open_loop_error"]
    window = sides[1].sample_trajectories(jax.random.key(0), 256, len(ahead))
    obs = window["obs"][0]
    for action, next_obs, error in zip(window["action"], window["next_obs"], ahead, strict=True):
        obs = obs + np.concatenate([obs, action, np.ones((len(obs), 1))], axis=1) @ weights
        assert error == pytest.approx(np.sqrt(np.square(obs - next_obs).mean()), rel=1e-3)
    assert len(ahead) > 5 and {p.name for p in folder.glob("*.*")} == {
        "config.json", "provenance.json", "summary.json", "metrics.csv", "model.npz", "error.png"}


def test_finetune_starts_from_the_stored_weights(finetuned):
    weight = np.abs(read_arrays(finetuned / "pretrain/model.npz")["layer"]["w"]).sum()
    with open(finetuned / "finetune/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0", "1"] * 2 and (finetuned / "finetune/curve.png").exists()
    assert [float(row["weight"]) for row in rows] == pytest.approx([weight] * 4, rel=1e-6)
    assert json.loads((finetuned / "finetune/provenance.json").read_text())["flags"]["num_seeds"] == 2


def test_a_policy_collects(finetuned, launch, tmp_path):
    """The stand-in's policy says in its action how many steps it remembers: those of its own episode."""
    process = launch("collect", CONFIG, f"--workdir={tmp_path}", f"--run={finetuned / 'finetune'}")
    assert process.returncode == 0, process.error
    data = Dataset.load(tmp_path / "collect/data.npz").data
    np.testing.assert_allclose(data["action"][:, 0], data["obs"][:, 1], atol=1e-6)
    episodes = split_at_ends(data)
    assert len(episodes) == 50
    for episode in episodes:
        assert_whole(episode)


MISTAKES = {
    "finished": ("collect", [], "finished collection"),
    "typo": ("collect", ["--config.collect.episods=3", "--workdir={tmp}"], "episodes"),
    "no data": ("pretrain", ["--workdir={tmp}"], "collect/data.npz"),
    "damaged data": ("pretrain", ["--workdir={tmp}", "--data={house}/damaged.npz"], "damaged.npz"),
    "other data": ("pretrain", ["--workdir={tmp}", "--data={house}/other.npz"], "obs (3,) where the environment has"),
    "no method of a model": ("pretrain", ["--config=algorithms/ppo.py", "--workdir={tmp}"], '"pretrain"'),
    "no weights": ("finetune", ["--workdir={tmp}"], "pretrain/model.npz"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, collected, house, launch, tmp_path):
    stored = collected / "collect/data.npz"
    data = Dataset.load(stored).data
    Dataset.create(data | dict(obs=np.zeros((len(data["reward"]), 3)))).save(house / "other.npz")
    (house / "damaged.npz").write_bytes(stored.read_bytes()[:-9])
    stage, args, culprit = MISTAKES[name]
    before = stored.stat().st_mtime_ns
    places = dict(tmp=tmp_path / "run", house=house)
    process = launch(stage, CONFIG, f"--workdir={collected}", *[arg.format(**places) for arg in args])
    assert process.returncode != 0 and culprit in process.error, process.error
    assert len(process.error.strip().splitlines()) == 1, process.error
    assert not list(tmp_path.iterdir()) and stored.stat().st_mtime_ns == before


def test_a_full_disk_is_one_line_and_leaves_no_half_file(launch, tmp_path):
    process = launch("collect", CONFIG, f"--workdir={tmp_path}", limit="ulimit -f 8; trap '' XFSZ; "
                     "JAX_ENABLE_COMPILATION_CACHE=false")  # no file may grow beyond 8 KiB
    assert process.returncode == 2 and process.error.strip().splitlines()[-1].startswith("error: "), process.error
    assert not (tmp_path / "collect/data.npz").exists() and not (tmp_path / "collect/summary.json").exists()


def transitions():
    obs, flags = np.arange(14, dtype=np.float32).reshape(7, 2), np.arange(7)
    return dict(obs=obs, action=obs[:, :1], next_obs=obs + 2, reward=obs[:, 0], terminated=flags == 2,
                truncated=flags == 6)


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
            ("test/discrete-v0", transitions() | dict(action=np.arange(7, dtype=np.int32) % 3), Discrete(3))):
        minari.write(name, data, space)
        jax.tree.map(np.testing.assert_array_equal, minari.read(name), data)
    for culprit, function in (("already", minari.require_free), ("test/no-v0", lambda _: minari.read("test/no-v0")),
                              ("no name", lambda _: minari.read("no name"))):
        with pytest.raises(UserError, match=culprit):
            function("test/box-v0")


def test_without_minari_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(UserError, match=r"minari is not installed: pip install -e .\.\[offline\]"):
        minari.read("test/box-v0")
