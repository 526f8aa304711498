"""The contract holds methods of four kinds: offline, off-policy, two players that both learn, evolution strategies.

Each of tests/kinds/ is trained by the launcher itself on a probe with a known optimum, killed and resumed, spread over
two devices, and compared with its seeds run alone.
"""
import importlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core import checkpoint
from core.dataset import write_arrays
from core.logging import read_metrics
from launchers import cli
from launchers.train import train
from tests import probes

KINDS = "offline", "off_policy", "two_players", "evolution"
TRAIN, CLI, BATCH = "launchers/train.py", "launchers/cli.py", "core/envs/batch.py"
LEARNS, RESUMES, SPREAD, ALONE = (
    "test_it_finds_the_optimum", "test_killed_and_resumed_it_is_the_same_run", "test_two_devices_change_nothing",
    "test_a_seed_is_the_same_alone")
PLANTED_ERRORS = {
    "the data set is folded into the program": (
        TRAIN, "return algorithm.train_step(run, key, data if offline else source, config)",
        "return algorithm.train_step(run, key, source, config)", "test_a_data_set_is_an_argument"),
    "two seeds share a device's keys": (TRAIN, "jax.random.fold_in(jax.random.key(seed), 0), data",
                                        "jax.random.fold_in(jax.random.key(0), 0), data", ALONE),
    "sums go on after a row": (TRAIN, "since, totals = stop, job.zeros()", "since = stop", LEARNS),
    "opponents' returns are added": ("core/evaluation.py", "if len(totals) > 1 else", "if len(totals) > 9 else",
                                     LEARNS),
    "random steps are not counted": ("tests/kinds/off_policy.py", "run.clock.tick(config.num_envs))", "run.clock)",
                                     LEARNS),
    "every seed plays the same episodes": ("launchers/cli.py", "jax.random.fold_in(jax.random.key(eval_seed), seed)",
                                           "jax.random.key(eval_seed)", "test_every_seed_is_evaluated_on_its_own"),
    "one device's seeds on the other": (TRAIN, "out_specs=split.spec", "out_specs=whole.spec", SPREAD),
    "a reset in every step": (BATCH, "args[1].any(), lambda: jax.vmap(redraw)(*args), lambda: (args[2], args[3]))",
                              "args[1].any() | True, lambda: jax.vmap(redraw)(*args), lambda: (args[2], args[3]))",
                              "test_a_step_pays_for_a_reset_only_where_an_episode_ended"),
    "checkpoints lose the sums": (TRAIN, 'return State(stored["run"], stored["totals"], meta)',
                                  'return State(stored["run"], state.totals, meta)', RESUMES),
}


@pytest.fixture(scope="module", autouse=True)
def house():
    """The launchers know the methods of tests/kinds and the probes by name. The check of reused keys is off, because it
    misfires on a scan over keys under vmap."""
    with pytest.MonkeyPatch.context() as patch, jax.debug_key_reuse(False):
        patch.setattr(cli, "algorithm_of", lambda config: importlib.import_module(f"tests.kinds.{config.algorithm}"))
        patch.setattr(cli, "make_env", probes.make_env)
        yield


@pytest.fixture(scope="module")
def config_of(tmp_path_factory):
    """A data set of the actions 0.5, and each kind's config."""
    path = tmp_path_factory.mktemp("data") / "data.npz"
    ends = np.arange(60) % 3 == 2
    noise = np.random.default_rng(0).uniform(-0.2, 0.2, (60, 1))
    write_arrays(path, dict(obs=np.zeros((60, 1), np.float32), action=np.float32(0.5 + noise - noise.mean()),
                            reward=np.zeros(60, np.float32), next_obs=np.zeros((60, 1), np.float32), terminated=ends,
                            truncated=np.zeros(60, bool)))

    def config_of(kind):
        config = importlib.import_module(f"tests.kinds.{kind}").get_config()
        if kind == "offline":
            config.dataset = str(path)
        return config

    return config_of


@pytest.fixture(scope="module")
def trained(config_of, tmp_path_factory):
    """{kind: (folder, summary)} of two seeds, checkpoints as often as there can be."""
    runs = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("trained") / kind
        runs[kind] = folder, train(config_of(kind), num_seeds=2, seed=3, workdir=folder, save_every=0.0)
    return runs


@pytest.mark.parametrize("kind", KINDS)
def test_it_finds_the_optimum(trained, kind):
    folder, summary = trained[kind]
    metrics = read_metrics(folder)
    if kind == "two_players":
        assert summary["score"] == ["return_team0", "return_team1"] and "return" not in metrics
        assert summary["final"]["return_team0"]["per_seed"] == summary["final"]["return_team1"]["per_seed"] == [-2, -2]
        assert (metrics["first"][-1] > 0.9).all() and (metrics["second"][-1] > 0.9).all()
        assert metrics["first"][-1].mean() > metrics["first"][0].mean()  # means since the last row, not since the first
        np.testing.assert_allclose(metrics["train_episodes"], 1600)
    else:
        best = dict(offline=0.0, off_policy=1.0, evolution=0.0)[kind]
        assert summary["final"]["per_seed"] == pytest.approx([best] * 2, abs=0.01)
    steps, updates = dict(offline=(0, 300), off_policy=(160, 300), two_players=(3200, 50), evolution=(1600, 100))[kind]
    assert (summary["env_steps"], summary["updates"]) == (steps, updates)
    assert (metrics["env_steps"][-1] == steps).all() and (metrics["updates"][-1] == updates).all()


def arrays_of(folder):
    newest = checkpoint.steps(folder / "checkpoints")[-1]
    with np.load(newest) as stored:
        return {name: stored[name].tobytes() for name in stored.files if name != checkpoint.META}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_it_is_the_same_run(trained, config_of, kind, tmp_path):
    """Its newest checkpoint is lost; the one before it is of a moment between two rows."""
    whole, _ = trained[kind]
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    *before, last = checkpoint.steps(tmp_path / "run" / "checkpoints")
    last.unlink()
    assert before
    train(config_of(kind), num_seeds=2, seed=3, workdir=tmp_path / "run", resume=True)
    assert arrays_of(tmp_path / "run") == arrays_of(whole)
    assert (tmp_path / "run" / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_two_devices_change_nothing(trained, config_of, kind, tmp_path):
    train(config_of(kind), num_seeds=2, seed=3, workdir=tmp_path / "run", devices=2)
    assert_close(tmp_path / "run", trained[kind][0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_the_same_alone(trained, config_of, kind, tmp_path):
    """And with its environments, where it has some, spread over two devices."""
    devices = 1 if kind == "offline" else 2
    train(config_of(kind), seed=4, workdir=tmp_path / "run", devices=devices)
    assert_close(tmp_path / "run", trained[kind][0], seed=1)


def assert_close(run, whole, seed=slice(None)):
    ours, theirs = read_metrics(run), read_metrics(whole)
    assert list(ours) == list(theirs)
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name].squeeze(), values[:, seed].squeeze(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_every_seed_is_evaluated_on_its_own(tmp_path):
    """A policy that learns nothing: its score differs by seed, and is the same at every evaluation."""
    config = importlib.import_module("tests.kinds.evolution").get_config()
    config.update(env="probe/Match", env_steps=32, eval_every=16, eval_episodes=7, algorithm="guess")
    guess = type("guess", (), dict(
        init=lambda key, source, config: importlib.import_module("tests.kinds.evolution").Run(
            jnp.zeros(()), importlib.import_module("core.clock").Clock.start(), *source.reset(key)),
        train_step=lambda run, key, source, config: (run._replace(clock=run.clock.tick(16)), {}),
        act=lambda run, carry, obs, key: (carry, jnp.zeros(len(obs), jnp.int32))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "algorithm_of", lambda config: guess)
        train(config, num_seeds=6, workdir=tmp_path / "run")
    returns = read_metrics(tmp_path / "run")["return"]
    np.testing.assert_array_equal(returns[0], returns[1])
    assert len(set(returns[0])) > 2


def test_a_data_set_is_an_argument(config_of):
    """Not a constant that is folded into the program: the program of twice the data is as long."""
    from launchers import train as launcher

    config = config_of("offline")
    source = cli.source_of(config)
    _, step, *_ = launcher.programs(cli.algorithm_of(config), config, 1, 0, None)
    init, *_ = launcher.programs(cli.algorithm_of(config), config, 1, 0, None)
    seeds = np.zeros(1, np.int32)
    run = jax.eval_shape(init, seeds, source)
    totals = (dict(loss=jnp.zeros(1)), jnp.full(1, -1))
    jaxpr = jax.make_jaxpr(step)(run, totals, seeds, source, 0, 1)
    assert not any(np.size(constant) >= source.size for constant in jaxpr.consts)


def test_a_step_pays_for_a_reset_only_where_an_episode_ended():
    """Under a vmap over seeds, too: `cond` stays a branch, and a reset that is not needed is not run."""
    env, count = probes.batch(probes.Clock(), 3), []

    class Counting:
        max_steps, action_space = 3, env.action_space
        step = env.env.step

        @staticmethod
        def reset(key):
            jax.debug.callback(lambda: count.append(1))
            return env.env.reset(key)

    batch = type(env)(Counting(), 3)
    keys, action = jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 3), jnp.int32)
    states, _ = jax.jit(jax.vmap(batch.reset))(keys)
    jax.effects_barrier()
    step, counts = jax.jit(jax.vmap(batch.step)), []
    for i in range(4):
        count.clear()
        states, _ = step(jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys), states, action)
        jax.block_until_ready(states)
        jax.effects_barrier()
        counts.append(len(count) > 0)
    assert counts == [False, False, True, False]
