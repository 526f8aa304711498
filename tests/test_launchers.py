"""The launchers, as functions and as programs: what a run leaves, what a kill leaves, what a mistake says."""
import csv
import functools
import json
import os
import pathlib
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from algorithms import ppo
from core import checkpoint
from core.clock import Clock
from core.errors import UserError
from core.evaluation import by_team, iqm, score, summarize
from core.logging import read_metrics
from launchers import cli, runs
from launchers import train as launcher
from launchers.evaluate import evaluate_run
from launchers.train import train

ROOT = pathlib.Path(__file__).parents[1]
TINY = dict(env_steps=2560, eval_every=640, num_steps=16, num_envs=4, hidden_dims=(8,), eval_episodes=2)

TRAIN, CLI, RUNS = "launchers/train.py", "launchers/cli.py", "launchers/runs.py"
CHECKPOINT, LOGGING, EVALUATION = "core/checkpoint.py", "core/logging.py", "core/evaluation.py"
RESUMED, DAMAGED = "test_resumed_it_is_the_same_run", "test_a_damaged_checkpoint_is_named_and_the_one_before_it_used"
SCORES, FOLDER = "test_scores_by_hand", "test_a_folder_with_another_run_is_a_mistake"
PLANTED_ERRORS = {  # and the test that has to notice
    "key depends on the chunk": (TRAIN, "jax.random.fold_in(key, i), data)",
                                 "jax.random.fold_in(key, i - start), data)", "test_chunks_change_nothing"),
    "seeds share their keys": (TRAIN, "jax.random.fold_in(jax.random.key(seed), 1)\n",
                               "jax.random.fold_in(jax.random.key(0), 1)\n",
                               "test_every_seed_and_iteration_has_a_key_of_its_own"),
    "resume starts over": (TRAIN, 'i, since, seconds, row, best = meta["iteration"]',
                           "i, since, seconds, row, best = 0", RESUMED),
    "restored arrays thrown away": (TRAIN, 'return State(stored["run"], stored["totals"], meta)',
                                    "return State(state.run, state.totals, meta)", RESUMED),
    "rows of a lost stretch kept": (LOGGING, "*lines[:rows]]", "*lines]", RESUMED),
    "damage goes by unseen": (CHECKPOINT, "for path in reversed(steps(folder)):\n        try:",
                              "for path in steps(folder):\n        try:", DAMAGED),
    "non-finite loss ignored": (TRAIN, "    if (bad < 0).all():", "    if True:",
                                "test_a_loss_that_is_not_finite_stops_the_run"),
    "changed config accepted": (CLI, "if old.get(k) != config.get(k)]", "if False]", FOLDER),
    "pairs stay tuples": (CLI, "[plain(v) for v in value]", "list(value)", "test_a_stored_config_equals_a_fresh_one"),
    "an old run overwritten": (CLI, 'if not resume and (stored.exists() or checkpoint.steps(folder / "checkpoints")):',
                             "if False:", FOLDER),
    "evaluation on other episodes": (CLI, "jax.random.fold_in(jax.random.key(eval_seed), seed)",
                                     "jax.random.fold_in(jax.random.key(eval_seed + 1), seed)",
                                     "test_evaluation_has_its_own_environment_and_episodes"),
    "settings of the evaluation lost": (CLI, '{**config.get("env_kwargs", {}), **config.get("eval_env_kwargs", {})})',
                                        '{**config.get("env_kwargs", {})})',
                                        "test_evaluation_has_its_own_environment_and_episodes"),
    "means over the whole run": (TRAIN, "row_of(job, run, totals, stop - since,", "row_of(job, run, totals, stop,",
                                 "test_rows_are_means_since_the_row_before"),
    "the score of the first seed": (TRAIN, 'score = float(row["return"].mean())', 'score = float(row["return"][0])',
                                    "test_the_best_checkpoint_is_the_best_by_all_seeds"),
    "the worst for the best": (CHECKPOINT, "return max(known)[1]", "return min(known)[1]",
                               "test_the_best_checkpoint_is_the_best_by_all_seeds"),
    "the oldest is kept": (CHECKPOINT, "past[-keep:]", "past[:keep]",
                           "test_the_newest_and_the_best_are_kept"),
    "the best is not kept": (CHECKPOINT, "*sorted(scores, key=lambda path: (scores[path], path.name))[-1:]}",
                             "*sorted(scores, key=lambda path: (scores[path], path.name))[:1]}",
                             "test_the_newest_and_the_best_are_kept"),
    "a copy that training overwrites": (CHECKPOINT, "np.array(jax.random.key_data(leaf) if is_key(leaf) else leaf)",
                                        "np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf)",
                                        "test_a_checkpoint_is_a_copy"),
    "quartiles without fractions": (EVALUATION, "np.arange(1, n + 1) - 0.25 * n, 0.75 * n - np.arange(n)",
                                    "np.arange(1, n + 1) - n // 4, n - n // 4 - np.arange(n)", SCORES),
    "lengths go on after the end": (EVALUATION, "(total, length + alive, *told)", "(total, length + 1, *told)",
                                    "test_an_evaluation_is_of_one_episode_each"),
    "an interval of one seed": (EVALUATION, "if len(per_seed) > 1 else None", "if True else None", SCORES),
    "all arrays are read to act": (RUNS, "flags = [id(variable) in used", "flags = [True",
                                   "test_acting_reads_no_more_than_it_needs"),
}


@pytest.fixture(scope="module", autouse=True)
def no_key_check():
    with jax.debug_key_reuse(False):  # it misfires on a scan over keys under vmap
        yield


def tiny(**changes):
    config = ppo.get_config()
    config.update(TINY | changes)
    return config


def rows_of(workdir):
    return list(csv.DictReader((workdir / "metrics.csv").read_text().splitlines()))


def arrays(workdir):
    """Every array of the newest checkpoint, byte for byte, and metrics.csv."""
    with np.load(checkpoint.steps(workdir / "checkpoints")[-1]) as stored:
        content = {name: stored[name].tobytes() for name in stored.files if name != checkpoint.META}
    return content, (workdir / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    train(tiny(), num_seeds=2, workdir=workdir, save_every=0.0)
    return workdir


def test_a_run_leaves_the_files_that_were_promised(uninterrupted):
    names = {p.name for p in uninterrupted.iterdir()}
    assert names == {"config.json", "provenance.json", "metrics.csv", "summary.json", "curve.png", "checkpoints"}
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert set(summary["final"]) == {"mean", "iqm", "ci95", "per_seed"} and len(summary["final"]["per_seed"]) == 2
    assert summary["env_steps"] == 2560 and summary["env_steps_per_second"] > 0 and summary["seeds"] == [0, 1]
    assert summary["updates"] == 40 * 16 and summary["score"] == ["return"] and summary["smoke"] is False
    rows = rows_of(uninterrupted)
    assert [int(row["env_steps"]) for row in rows] == [640, 640, 1280, 1280, 1920, 1920, 2560, 2560]
    assert [int(row["updates"]) for row in rows[::2]] == [160, 320, 480, 640]
    assert summary["final"]["per_seed"] == pytest.approx([float(row["return"]) for row in rows[-2:]])
    assert json.loads((uninterrupted / "provenance.json").read_text())["versions"]["jax"]


def test_chunks_change_nothing(uninterrupted, tmp_path):
    train(tiny(), num_seeds=2, workdir=tmp_path / "run", chunk=3)
    assert arrays(tmp_path / "run") == arrays(uninterrupted)


def test_resumed_it_is_the_same_run(uninterrupted, tmp_path):
    """From a checkpoint between two rows, and from one at a row, with a row that the lost stretch had written."""
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    for path in checkpoint.steps(run / "checkpoints")[-1:]:
        path.unlink()
    (run / "summary.json").unlink()
    train(tiny(), num_seeds=2, workdir=run, resume=True, save_every=0.0, chunk=7)
    assert arrays(run) == arrays(uninterrupted)
    with pytest.raises(UserError, match="is finished"):
        train(tiny(), num_seeds=2, workdir=run, resume=True)


def test_sigterm_saves_and_a_resume_goes_on(uninterrupted, tmp_path):
    calls = []

    def told(job, *args):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return check(job, *args)

    check = launcher.check_finite
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit, match="SIGTERM"):
        patch.setattr(launcher, "check_finite", told)
        train(tiny(), num_seeds=2, workdir=tmp_path / "run", chunk=3)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[-1].stem == "step_000000000013"  # between two rows
    train(tiny(), num_seeds=2, workdir=tmp_path / "run", resume=True)
    assert arrays(tmp_path / "run") == arrays(uninterrupted)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(uninterrupted, tmp_path, capsys):
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    newest = checkpoint.steps(run / "checkpoints")[-1]
    data = newest.read_bytes()
    middle = slice(len(data) // 2, len(data) // 2 + 200)
    newest.write_bytes(data[: middle.start] + bytes(byte ^ 1 for byte in data[middle]) + data[middle.stop:])
    (run / "summary.json").unlink()
    train(tiny(), num_seeds=2, workdir=run, resume=True)
    output = capsys.readouterr().out
    assert newest.name in output and "damaged" in output
    assert arrays(run) == arrays(uninterrupted)
    os.truncate(newest, 10)
    with pytest.raises(UserError, match=newest.name):
        evaluate_run(run=str(newest), smoke=True)


def test_killed_before_its_summary_a_run_gets_it_on_resume(uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted, tmp_path / "run")
    before = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    after = train(tiny(), num_seeds=2, workdir=run, resume=True)
    assert before["final"]["per_seed"] == pytest.approx(after["final"]["per_seed"])
    assert (before["env_steps"], before["updates"]) == (after["env_steps"], after["updates"])


def test_every_seed_and_iteration_has_a_key_of_its_own():
    algorithm = SimpleNamespace(
        init=lambda key, source, config: jax.random.uniform(key),
        train_step=lambda run, key, source, config: (run, dict(noise=jax.random.uniform(key))))
    config = ml_collections.FrozenConfigDict(dict(env="pursuit_evasion", num_envs=1))
    init, step, *_ = launcher.programs(algorithm, config, 2, 0, None)
    seeds, zeros = np.array([3, 4]), (dict(noise=jnp.zeros(2)), jnp.full(2, -1, jnp.int32))
    run = init(seeds, ())
    got = [step(run, zeros, seeds, (), i, i + 1)[1][0]["noise"] for i in range(2)]
    fold = jax.random.fold_in
    want = [[jax.random.uniform(fold(fold(jax.random.key(s), 1), i)) for s in (3, 4)] for i in range(2)]
    np.testing.assert_array_equal(got, want)
    assert len(np.unique([*got, run])) == 6


def test_one_device_and_two_agree(uninterrupted, tmp_path):
    train(tiny(), num_seeds=2, devices=2, workdir=tmp_path / "seeds")
    assert_close(tmp_path / "seeds", uninterrupted, seed="1")
    train(tiny(), seed=1, devices=2, workdir=tmp_path / "envs")
    assert_close(tmp_path / "envs", uninterrupted, seed="1")
    with pytest.raises(UserError, match="num_envs = 3 divides over 2 devices"):
        train(tiny(num_envs=3, num_minibatches=3), devices=2, workdir=tmp_path / "no")


def test_two_processes_train_together(uninterrupted, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [program("train", *ARGS, "--num_seeds=2", f"--workdir={tmp_path}", f"--coordinator={address}",
                    "--num_processes=2", f"--process_id={i}", wait=False) for i in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert all(process.returncode == 0 for process in both), outputs
    for seed in "01":
        assert_close(tmp_path, uninterrupted, seed)


def assert_close(workdir, other, seed):
    """The same first evaluation to float tolerance: later ones may differ by an action that was a near tie."""
    mine, theirs = (next(row for row in rows_of(d) if row["seed"] == seed) for d in (workdir, other))
    for column in ("train_episodes", "value_loss", "entropy", "return"):
        assert float(mine[column]) == pytest.approx(float(theirs[column]), rel=2e-3), column


ARGS = ("--config=algorithms/ppo.py", *(f"--config.{name}={value}" for name, value in TINY.items()))


def program(name, *args, wait=True, env=()):
    """`python -m launchers.<name> …`"""
    process = subprocess.Popen([sys.executable, "-m", f"launchers.{name}", *map(str, args)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **dict(env)})
    if wait:
        process.output, process.error = process.communicate(timeout=300)
    return process


@pytest.mark.slow  # in this process they are in tests/test_survival.py
def test_killed_at_any_moment_and_resumed_it_is_the_same_run(tmp_path):
    """SIGKILL four times: while it starts, while it trains, while it writes."""
    config = (*ARGS, "--config.env_steps=25600", "--num_seeds=2", "--chunk=1", "--save_every=0")
    start = functools.partial(program, "train", *config, env={"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")})
    whole = start(f"--workdir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.error
    victim, moments = tmp_path / "victim", random.Random(time.time_ns())

    def written():
        return {path.name for path in (victim / "checkpoints").glob("*")}

    for kill in range(4):
        before, resume = written(), "--resume" if (victim / "config.json").exists() else "--noresume"
        process = start(resume, f"--workdir={victim}", wait=False)
        while kill > 0 and process.poll() is None and written() <= before:
            time.sleep(0.005)  # all but the first time, let it write something new
        time.sleep(moments.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    last = start("--resume", f"--workdir={victim}")
    assert last.returncode == 0, last.error
    assert arrays(victim) == arrays(tmp_path / "whole")
    assert not list((victim / "checkpoints").glob(".*"))


def test_a_mistake_is_one_line_of_a_program_too(tmp_path):
    """In this process they are in tests/test_mistakes.py."""
    done = program("train", *ARGS, "--config.num_env=8", f"--workdir={tmp_path / 'run'}")
    said = done.error.strip().splitlines()
    assert done.returncode == 2 and len(said) == 1 and "num_envs" in said[0] and not list(tmp_path.iterdir())


def test_a_folder_with_another_run_is_a_mistake(uninterrupted):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    with pytest.raises(UserError, match="already holds a run"):
        train(tiny(), num_seeds=2, workdir=uninterrupted)
    with pytest.raises(UserError, match="lr was 0.00025, is 1.0"):
        train(tiny(lr=1.0), num_seeds=2, workdir=uninterrupted, resume=True)
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")} == before


def test_wandb_absent_is_a_mistake_and_its_offline_mode_mirrors_every_seed(tmp_path):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="pip install wandb"):
        patch.setitem(sys.modules, "wandb", None)
        train(tiny(), workdir=tmp_path / "no", wandb="offline")
    train(tiny(), num_seeds=2, workdir=tmp_path / "run", wandb="offline")
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(UserError, match="not finite at env step [0-9]+ of seed 0"):
        train(tiny(lr=1e38, anneal_lr=False), num_seeds=2, workdir=tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.slow  # in this process they are in tests/test_survival.py
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    command = shlex.join([sys.executable, "-m", "launchers.train", *ARGS, f"--workdir={tmp_path}"])
    limited = f"ulimit -f 8; trap '' XFSZ; exec {command}"  # no file may grow beyond 8 KiB
    run = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"})
    assert run.returncode == 2 and run.stderr.strip().splitlines()[-1].startswith("error: "), run.stderr
    assert not list(tmp_path.glob("checkpoints/*")) and not (tmp_path / "summary.json").exists()


def test_evaluate_repeats_the_training_score_and_draws(uninterrupted, tmp_path):
    row = evaluate_run(run=str(uninterrupted), episodes=2, gif=str(tmp_path / "a.gif"), picture=str(tmp_path / "a.png"))
    final = json.loads((uninterrupted / "summary.json").read_text())["final"]["per_seed"]
    assert row["return"] == pytest.approx(final, abs=1e-3)
    assert {p.name for p in tmp_path.iterdir()} == {"a.gif", "a.png"}


def test_acting_reads_no_more_than_it_needs(uninterrupted):
    """Networks, not their optimiser; what is not read is zeros without memory."""
    _, _, run, meta = runs.load(uninterrupted)
    assert meta["iteration"] == 40 and meta["seed"] == 0
    actor_critic = run.agent.actor_critic
    assert float(jnp.abs(actor_critic.params["policy"]["Dense_0"]["kernel"]).sum()) > 0
    critic = jax.tree.leaves(actor_critic.params["value"])
    for unread in (*jax.tree.leaves(actor_critic.opt_state), *critic, run.obs):
        assert not np.asarray(unread).any() and np.asarray(unread).strides == (0,) * unread.ndim


class Steps:
    """An environment that pays its setting `pay` at each of three steps; an obs is the number of the step."""

    def __init__(self, pay=1.0):
        from core.envs import Discrete

        self.pay, self.max_steps, self.action_space = pay, 3, Discrete(2)

    def reset(self, key):
        return jnp.int32(0), jnp.zeros(1)

    def step(self, key, t, action):
        from core.envs import TimeStep

        obs, no = jnp.full(1, t + 1, jnp.float32), jnp.bool_(False)
        reward = self.pay + jax.random.uniform(key, maxval=0.1)
        return t + 1, TimeStep(obs, obs, reward, no, t + 1 >= 3, {})


class Play(SimpleNamespace):
    """A method that counts its iterations, and remembers within an episode how often it acted and observed."""

    @staticmethod
    def init(key, source, config):
        env_state, obs = source.reset(key)
        return PlayRun(Clock.start(), env_state, obs, jnp.float32(0))

    @staticmethod
    def train_step(run, key, source, config):
        count = run.count + 1
        return run._replace(count=count, clock=run.clock.tick(config.num_envs)), dict(count=count)

    @staticmethod
    def initial_carry(run, num_envs):
        return jnp.zeros(num_envs, jnp.int32)

    @staticmethod
    def act(run, carry, obs, key):
        return carry + 1, jnp.zeros(len(obs), jnp.int32)


@jax.tree_util.register_pytree_node_class
class PlayRun:
    def __init__(self, clock, env_state, obs, count):
        self.clock, self.env_state, self.obs, self.count = clock, env_state, obs, count

    def _replace(self, **changes):
        return PlayRun(**{**self.__dict__, **changes})

    def tree_flatten(self):
        return tuple(self.__dict__.values()), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


@pytest.fixture
def play(tmp_path):
    """Train `Play` on `Steps`."""
    from core.envs import Batch

    def play(num_seeds=3, method=Play, **changes):
        config = ml_collections.ConfigDict(dict(
            algorithm="play", env="steps", num_envs=2, num_steps=1, env_steps=24, eval_every=12, log_every=4,
            eval_episodes=5))
        for name, value in changes.items():
            config[name] = value
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "algorithm_of", lambda config: method)
            patch.setattr(cli, "make_env", lambda name, num_envs, **kwargs: Batch(Steps(**kwargs), num_envs))
            summary = train(config, num_seeds=num_seeds, workdir=tmp_path / "run", save_every=0.0)
        return summary, read_metrics(tmp_path / "run")

    return play


def test_rows_are_means_since_the_row_before(play):
    """Two iterations between rows: counts 1 2 | 3 4 | …; an evaluation at every third row, NaN in the others."""
    _, metrics = play()
    np.testing.assert_array_equal(metrics["env_steps"][:, 0], [4, 8, 12, 16, 20, 24])
    np.testing.assert_allclose(metrics["count"][:, 1], [1.5, 3.5, 5.5, 7.5, 9.5, 11.5])
    assert np.isfinite(metrics["return"]).all(1).tolist() == [False, False, True] * 2
    assert np.isnan(metrics["return"][[0, 1, 3, 4]]).all()


def test_evaluation_has_its_own_environment_and_episodes(play):
    class Measures(Play):
        @staticmethod
        def measure(run, key, source, config):
            return dict(pay=jnp.float32(source.env.pay), copies=jnp.int32(source.num_envs))

    summary, metrics = play(method=Measures, env_kwargs=dict(pay=2.0), eval_env_kwargs=dict(pay=5.0))
    assert (metrics["pay"] == 5).all() and (metrics["copies"] == 2).all()  # of the evaluation, num_envs of them
    assert 15 < summary["final"]["mean"] < 15.3
    np.testing.assert_array_equal(metrics["length"][2], 3)
    np.testing.assert_array_equal(metrics["return"][2], metrics["return"][5])  # the same episodes every time
    assert len(set(metrics["return"][2])) == 3  # but every seed its own
    from core.envs import Batch
    key = jax.random.fold_in(jax.random.key(1_000_000), 1)
    rewards, env = 0.0, Batch(Steps(5.0), 5)
    reset_key, key = jax.random.split(key)
    state, obs = env.reset(reset_key)
    for t in range(3):
        state, step = env.step(jax.random.split(jax.random.fold_in(key, t))[1], state, jnp.zeros(5, jnp.int32))
        rewards += step.reward
    assert metrics["return"][2, 1] == pytest.approx(float(rewards.mean()), rel=1e-5)


def test_the_best_checkpoint_is_the_best_by_all_seeds(play, tmp_path, capsys):
    """Returns fall, while the first seed's rise."""
    class Falls(Play):
        @staticmethod
        def measure(run, key, source, config):
            return {}

    calls, original = [], launcher.row_of

    def row_of(*args):
        calls.append(1)
        row = original(*args)
        return row | {"return": row["return"] * 0 + np.array([10.0 * len(calls), -20.0 * len(calls), 0.0])}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "row_of", row_of)
        play(method=Falls, eval_every=4)
    folder, _ = tmp_path / "run" / "checkpoints", capsys.readouterr()
    assert checkpoint.best(folder).stem == "step_000000000002" == checkpoint.steps(folder)[0].stem
    assert not capsys.readouterr().out
    (folder / "step_000000000009.npz").write_bytes(b"half")
    assert checkpoint.best(folder).stem == "step_000000000002" and "step_000000000009.npz" in capsys.readouterr().out


def test_arrays_are_restored_to_their_devices(tmp_path):
    mesh = jax.make_mesh((2,), ("devices",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    path = checkpoint.save(tmp_path, 1, dict(x=np.arange(4.0, dtype=np.float32)), dict(score=None))
    like = dict(x=jax.ShapeDtypeStruct((4,), jnp.float32, sharding=split))
    tree, _ = checkpoint.restore(path, like)
    assert tree["x"].sharding == split
    np.testing.assert_array_equal(tree["x"], np.arange(4.0))


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step, value in enumerate([1.0, 5.0, None, 2.0, None, 0.0]):
        checkpoint.save(tmp_path, step, dict(x=jnp.full(2, step)), dict(score=value))
    assert [path.stem[-1] for path in checkpoint.steps(tmp_path)] == ["1", "4", "5"]
    tree, meta = checkpoint.restore(checkpoint.best(tmp_path), dict(x=jnp.zeros(2, jnp.int32)))
    assert tree["x"].tolist() == [1, 1] and meta == dict(score=5.0, step=1)


def test_a_checkpoint_is_a_copy(tmp_path):
    """Training goes on while it is written, and reuses the memory."""
    x = np.zeros(1000)
    writer = checkpoint.Writer(tmp_path)
    hold = writer.thread.submit(time.sleep, 0.2)
    writer.save(1, dict(x=x, key=jax.random.key(3)), dict(score=None))
    x += 1
    hold.result()
    writer.close()
    tree, _ = checkpoint.restore(checkpoint.steps(tmp_path)[0], dict(x=np.ones(1000), key=jax.random.key(0)))
    assert not np.asarray(tree["x"]).any() and jax.random.key_data(tree["key"]).tolist() == [0, 3]


def test_a_writer_says_what_went_wrong_and_keeps_its_pauses_short(tmp_path):
    (tmp_path / "file").write_text("")
    writer = checkpoint.Writer(tmp_path / "file" / "checkpoints")
    writer.save(1, dict(x=np.zeros(3)), dict(score=None))
    with pytest.raises(OSError):
        writer.close()
    writer = checkpoint.Writer(tmp_path, every=0.5)
    writer.saved_at, writer.paused = time.perf_counter() - 1.0, 0.1
    assert not writer.due  # 0.1 s of every second would be too much
    writer.paused = 0.01
    assert writer.due


def test_an_evaluation_is_of_one_episode_each():
    """Episodes of different lengths: returns and lengths of the first of each copy alone."""
    from core.envs import Batch, Box, TimeStep
    from core.evaluation import evaluate

    class Falls:
        max_steps, action_space = 9, Box((-1.0,), (1.0,))

        def reset(self, key):
            end = jax.random.randint(key, (), 1, 6)
            return (jnp.int32(0), end), jnp.float32(end)[None]

        def step(self, key, state, action):
            t, end = state[0] + 1, state[1]
            obs = jnp.float32(end)[None]
            return (t, end), TimeStep(obs, obs, jnp.float32(t), t >= end, jnp.bool_(False), {})

    env = Batch(Falls(), 7)
    ends = np.asarray(env.reset(jax.random.split(jax.random.key(3))[0])[1])[:, 0]
    returns, length = evaluate(lambda carry, obs, key: (carry, jnp.zeros((7, 1))), env, jax.random.key(3))
    np.testing.assert_array_equal(length, ends)
    np.testing.assert_array_equal(returns, ends * (ends + 1) / 2)
    assert len(set(ends)) > 2

    def observe(carry, step):  # it holds the observation that was acted on, and another one as its successor
        return carry + (step.obs[:, 0] != step.next_obs[:, 0]) + 100 * (step.obs[:, 0] != seen[-1])

    seen = []

    def act(carry, obs, key):
        seen.append(obs[:, 0])
        return carry, carry[:, None]  # what was observed is what is done next

    class Tells(Falls):
        def step(self, key, state, action):
            state, step = super().step(key, state, action)
            obs = jnp.float32(10 * state[1] + state[0])[None]
            return state, step._replace(reward=action[0], obs=obs, next_obs=obs)

    returns, _ = evaluate(act, Batch(Tells(), 7), jax.random.key(3), jnp.zeros(7), observe)
    np.testing.assert_array_equal(returns, ends * (ends - 1) / 2)  # 0, then 1 after one transition, and so on


def test_scores_by_hand():
    assert iqm([8, 1, 2, 3, 100, 4]) == pytest.approx((0.5 * 2 + 3 + 4 + 0.5 * 8) / 3)
    assert iqm([1, 2, 3, 4, 5, 9, 99]) == pytest.approx((0.25 * 2 + 3 + 4 + 5 + 0.25 * 9) / 3.5)
    one, many = summarize([3.0]), summarize([1.0, 2.0, 3.0, 4.0, 5.0])
    assert one["ci95"] is None and one["iqm"] == 3.0 and many["per_seed"] == [1, 2, 3, 4, 5] and many["mean"] == 3
    assert many["ci95"][0] < many["iqm"] < many["ci95"][1]
    returns, length = jnp.array([[1.0, 2.0, -3.0], [3.0, 4.0, -5.0]]), jnp.array([4, 6])
    game = score(returns, length, (0, 0, 1))
    assert game["return_team0"] == 5 and game["return_team1"] == -4 and "return" not in game
    assert game["return_std_team0"] == 2 and game["return_std_team1"] == 1 and game["length"] == 5
    assert [game[f"return_agent{i}"] for i in range(3)] == [2, 3, -4]
    together = score(returns, length, None)
    assert together["return"] == 1 and together["return_std"] == 1
    assert by_team(returns[:, 0], None)["return"].tolist() == [1, 3]
    sums = dict(loss=np.array([6.0, 9.0]), episode=dict(
        {"count": np.array([2, 0]), "length": np.array([8, 0]), "return": np.array([[4.0, 2.0], [0.0, 0.0]])}))
    means = launcher.means_of(sums, 3, (0, 1))
    assert means["loss"].tolist() == [2, 3] and means["train_length"][0] == 4 and np.isnan(means["train_length"][1])
    assert means["train_return_team0"][0] == 2 and means["train_return_team1"][0] == 1


def test_a_stored_config_equals_a_fresh_one():
    """Also one with pairs in a tuple, as a jump of hidden parameters is told."""
    config = ml_collections.FrozenConfigDict(dict(a=1, b=dict(c=(("x", 0.5), ("y", 1.0)), d="s", e=[1, (2, 3)])))
    stored = cli.config_dict(config)
    assert json.loads(json.dumps(stored)) == stored
    assert stored["b"]["c"] == [["x", 0.5], ["y", 1.0]]


def test_all_launchers_are_functions_of_one_process():
    """Importing them defines no flags and starts nothing."""
    script = "import pathlib, importlib\n" \
             "for path in pathlib.Path('launchers').glob('*.py'): importlib.import_module(f'launchers.{path.stem}')\n" \
             "from absl import flags\nassert 'config' not in flags.FLAGS and 'run' not in flags.FLAGS\n" \
             "import jax._src.xla_bridge as bridge\nassert not bridge._backends"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_copied_file_trains_itself(tmp_path):
    for folder in ("algorithms", "configs", "core", "launchers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(tmp_path / "algorithms/ppo.py", tmp_path / "algorithms/mine.py")
    run = subprocess.run([sys.executable, "-m", "launchers.train", "--config=algorithms/mine.py", "--smoke",
                          "--workdir=run"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["algorithm"] == "mine"
