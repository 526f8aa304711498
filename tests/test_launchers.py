"""The launchers as programs: what a user types, what a kill leaves, what a mistake says."""
import csv
import functools
import importlib.util
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

import ml_collections
import pytest

from launchers import cli

ROOT = pathlib.Path(__file__).parents[1]
TINY = ("--config=algorithms/ppo.py", "--config.env_steps=2560", "--config.eval_every=640", "--config.num_steps=16",
        "--config.num_envs=4", "--config.hidden_dims=(8,)", "--config.eval_episodes=2")

TRAIN, CLI = "launchers/train.py", "launchers/cli.py"
CHECKPOINT, LOGGING = "core/checkpoint.py", "core/logging.py"
KILLED = "test_killed_at_any_moment_and_resumed_it_is_the_same_run"
PLANTED_ERRORS = {  # and the test that has to notice
    "key depends on the chunk": (TRAIN, "jax.random.fold_in(key, i))", "jax.random.fold_in(key, i - start))",
                                 "test_chunks_change_nothing"),
    "seeds share their keys": (TRAIN, "jax.random.fold_in(jax.random.key(seed), 1)",
                               "jax.random.fold_in(jax.random.key(0), 1)",
                               "test_every_seed_and_iteration_has_a_key_of_its_own"),
    "resume starts over": (TRAIN, "i, seconds, row = meta[\"iteration\"]", "i, seconds, row = 0", KILLED),
    "restored arrays thrown away": (TRAIN, "run, meta = checkpoint.restore_newest(folder, run)",
                                    "_, meta = checkpoint.restore_newest(folder, run)", KILLED),
    "rows of a lost stretch kept": (LOGGING, "splitlines(keepends=True)[: rows + 1]", "splitlines(keepends=True)",
                                    "test_a_damaged_checkpoint_is_named_and_the_one_before_it_used"),
    "damage not noticed": (CHECKPOINT, "    verify(path)\n    target", "    target",
                           "test_a_damaged_checkpoint_is_named_and_the_one_before_it_used"),
    "non-finite loss ignored": (TRAIN, "if (bad >= 0).any():", "if (bad > 10**9).any():",
                                "test_a_loss_that_is_not_finite_stops_the_run"),
    "changed config accepted": (CLI, "if old.get(k) != config.get(k)]", "if False]",
                                "test_a_folder_with_another_run_is_a_mistake"),
    "pairs stay tuples": (CLI, "[plain(v) for v in value]", "list(value)", "test_a_stored_config_equals_a_fresh_one"),
    "an old run overwritten": (CLI, "if not resume and stored.exists():", "if False:",
                               "test_a_folder_with_another_run_is_a_mistake"),
    "evaluation on other episodes": (TRAIN, "jax.random.key(FLAGS.eval_seed)), sums))", "jax.random.key(i)), sums))",
                                     "test_evaluate_repeats_the_training_score_and_draws"),
}


@pytest.fixture
def launch():
    """Start `python -m launchers.<name> …` in `cwd`; wait for it unless told otherwise."""
    def launch(name, *args, cwd=ROOT, wait=True, env=()):
        settings = {"PYTHONPATH": str(cwd), **dict(env)}
        process = subprocess.Popen([sys.executable, "-m", f"launchers.{name}", *map(str, args)], cwd=cwd, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **settings})
        if not wait:
            return process
        process.output, process.error = process.communicate(timeout=300)
        return process

    return launch


def rows_of(workdir):
    return list(csv.DictReader((workdir / "metrics.csv").read_text().splitlines()))


def arrays(workdir):
    """Every array of the newest checkpoint, byte for byte, and metrics.csv."""
    import orbax.checkpoint as ocp

    newest = sorted((workdir / "checkpoints").glob("step_*"))[-1]
    stored = ocp.StandardCheckpointer().restore(newest / "arrays")
    return {k: v.tobytes() for k, v in stored.items()}, (workdir / "metrics.csv").read_text()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run([sys.executable, "-m", "launchers.train", *TINY, "--num_seeds=2", f"--workdir={workdir}"], cwd=ROOT,
                   check=True, capture_output=True)
    return workdir


def test_a_run_leaves_the_files_that_were_promised(uninterrupted):
    names = {p.name for p in uninterrupted.iterdir()}
    assert names == {"config.json", "provenance.json", "metrics.csv", "summary.json", "curve.png", "checkpoints"}
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert set(summary["final"]) == {"mean", "iqm", "ci95", "per_seed"} and len(summary["final"]["per_seed"]) == 2
    assert summary["env_steps"] == 2560 and summary["env_steps_per_second"] > 0 and summary["seeds"] == [0, 1]
    rows = rows_of(uninterrupted)
    assert [int(row["env_steps"]) for row in rows] == [640, 640, 1280, 1280, 1920, 1920, 2560, 2560]
    assert summary["final"]["per_seed"] == pytest.approx([float(row["return"]) for row in rows[-2:]])
    assert json.loads((uninterrupted / "provenance.json").read_text())["versions"]["jax"]


def test_chunks_change_nothing(uninterrupted, launch, tmp_path):
    assert launch("train", *TINY, "--num_seeds=2", "--chunk=3", f"--workdir={tmp_path}").returncode == 0
    assert arrays(tmp_path) == arrays(uninterrupted)


def test_killed_at_any_moment_and_resumed_it_is_the_same_run(launch, tmp_path):
    """SIGKILL five times: while it starts, while it trains, while it writes."""
    config = (*TINY, "--config.env_steps=25600", "--num_seeds=2", "--chunk=1")  # 40 evaluations, 40 checkpoints
    launch = functools.partial(launch, env={"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")})  # it may break
    assert launch("train", *config, f"--workdir={tmp_path / 'whole'}").returncode == 0
    victim, moments = tmp_path / "victim", random.Random(time.time_ns())

    def written():
        return {path.name for path in (victim / "checkpoints").glob("*")}

    for kill in range(5):
        before, resume = written(), "--resume" if (victim / "config.json").exists() else "--noresume"
        process = launch("train", *config, resume, f"--workdir={victim}", wait=False)
        while kill > 0 and process.poll() is None and written() <= before:
            time.sleep(0.005)  # all but the first time, let it write something new
        time.sleep(moments.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    last = launch("train", *config, "--resume", f"--workdir={victim}")
    assert last.returncode == 0, last.error
    assert arrays(victim) == arrays(tmp_path / "whole")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(uninterrupted, launch, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1]
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = victim.read_bytes()
    victim.write_bytes(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:])
    resumed = launch("train", *TINY, "--num_seeds=2", "--resume", f"--workdir={tmp_path / 'run'}")
    assert resumed.returncode == 0, resumed.error
    assert newest.name in resumed.output and victim.name in resumed.output and "damaged" in resumed.output
    assert arrays(tmp_path / "run") == arrays(uninterrupted)
    os.truncate(victim, 10)
    evaluated = launch("evaluate", f"--run={newest}", "--smoke")
    assert evaluated.returncode == 2 and victim.name in evaluated.error and len(evaluated.error.splitlines()) == 1


def test_killed_before_its_summary_a_run_gets_it_on_resume(uninterrupted, launch, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    resumed = launch("train", *TINY, "--num_seeds=2", "--resume", f"--workdir={tmp_path / 'run'}")
    assert resumed.returncode == 0, resumed.error
    final = [json.loads((run / "summary.json").read_text())["final"] for run in (uninterrupted, tmp_path / "run")]
    assert final[0]["per_seed"] == pytest.approx(final[1]["per_seed"])


def test_seeds_of_one_program_are_the_seeds_run_solo(uninterrupted, launch, tmp_path):
    assert launch("train", *TINY, "--seed=1", f"--workdir={tmp_path}").returncode == 0
    assert_close(tmp_path, uninterrupted, seed="1")


def test_every_seed_and_iteration_has_a_key_of_its_own():
    """In a process of its own: two launchers cannot be imported into one, their flags have the same names."""
    script = """if True:
        import jax, ml_collections, numpy as np
        from types import SimpleNamespace
        from launchers import train

        train.FLAGS.mark_as_parsed()
        algorithm = SimpleNamespace(
            init=lambda key, env, config: jax.random.uniform(key), measure=None,
            train_step=lambda run, key, env, config: (run, dict(noise=jax.random.uniform(key))))
        config = ml_collections.FrozenConfigDict(dict(env="pursuit_evasion", num_envs=1))
        programs, seeds = train.build(algorithm, config, 2), np.array([3, 4])
        run = programs.init(seeds)
        got = [programs.train(run, programs.zeros(run), seeds, i, i + 1)[1][0]["noise"] for i in range(2)]
        fold = jax.random.fold_in
        want = [[jax.random.uniform(fold(fold(jax.random.key(s), 1), i)) for s in (3, 4)] for i in range(2)]
        np.testing.assert_array_equal(got, want)
        assert len(np.unique([*got, run])) == 6
        """
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_one_device_and_four_agree(uninterrupted, launch, tmp_path):
    run = launch("train", *TINY, "--num_seeds=2", "--devices=2", f"--workdir={tmp_path / 'seeds'}")
    assert run.returncode == 0, run.error
    assert_close(tmp_path / "seeds", uninterrupted, seed="1")
    run = launch("train", *TINY, "--seed=1", "--devices=4", f"--workdir={tmp_path / 'envs'}")
    assert run.returncode == 0, run.error
    assert_close(tmp_path / "envs", uninterrupted, seed="1")
    run = launch("train", *TINY, "--num_seeds=2", "--devices=3", f"--workdir={tmp_path / 'no'}")
    assert run.returncode == 2 and "3 devices" in run.error


def test_two_processes_train_together(uninterrupted, launch, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    both = [launch("train", *TINY, "--num_seeds=2", f"--workdir={tmp_path}", f"--coordinator={address}",
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


MISTAKES = {
    "unknown key": (["--config.learning_rte=1"], "learning_rte"),
    "near key": (["--config.num_env=8"], "num_envs"),
    "wrong type": (["--config.num_envs=many"], "num_envs"),
    "unknown environment": (["--config.env=gymnax/CartPol-v1"], "gymnax/CartPole-v1"),
    "unknown source": (["--config.env=gymnas/CartPole-v1"], "gymnas/CartPole-v1"),
    "unknown algorithm": (["--config.algorithm=pppo"], '"ppo"'),
    "minibatches": (["--config.num_minibatches=7"], "num_minibatches = 7"),
    "missing config": (["--config=configs/nothing.py"], "configs/nothing.py"),
    "nothing to resume": (["--resume"], "config.json"),
    "misspelt flag": (["--num_seedz=2"], "num_seedz"),
    "bad folder": (["--workdir=/dev/null/x"], "/dev/null"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(name, launch, tmp_path):
    args, culprit = MISTAKES[name]
    run = launch("train", *TINY, f"--workdir={tmp_path / 'run'}", *args)
    assert run.returncode != 0
    assert len(run.error.strip().splitlines()) == 1 and culprit in run.error, run.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args, culprit", [
    (["--config=configs/ppo_cartpol.py"], "configs/ppo_cartpole.py"),
    (["--config=configs/ekf_lqr_pursuit.py", "--config.explore=joynt"], '"joynt" is none of none, independent'),
])
def test_what_a_config_says_may_be_a_mistake_too(args, culprit, launch, tmp_path):
    run = launch("train", *args, f"--workdir={tmp_path / 'run'}")
    assert run.returncode == 2 and len(run.error.strip().splitlines()) == 1 and culprit in run.error, run.error
    assert not list(tmp_path.iterdir())


def test_a_folder_with_another_run_is_a_mistake(uninterrupted, launch):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    again = launch("train", *TINY, "--num_seeds=2", f"--workdir={uninterrupted}")
    assert again.returncode == 2 and "already holds a run" in again.error and len(again.error.splitlines()) == 1
    changed = launch("train", *TINY, "--num_seeds=2", f"--workdir={uninterrupted}", "--resume", "--config.lr=1.0")
    assert changed.returncode == 2 and "lr was 0.00025, is 1.0" in changed.error
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")} == before


def test_wandb_absent_is_a_mistake_and_its_offline_mode_mirrors_every_seed(launch, tmp_path):
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "wandb.py").write_text("raise ImportError('no wandb')")
    run = launch("train", *TINY, f"--workdir={tmp_path / 'run'}", "--wandb=offline",
                 env={"PYTHONPATH": f"{tmp_path / 'absent'}:{ROOT}"})
    assert run.returncode == 2 and "pip install wandb" in run.error and len(run.error.splitlines()) == 1
    run = launch("train", *TINY, "--num_seeds=2", f"--workdir={tmp_path / 'run'}", "--wandb=offline")
    assert run.returncode == 0, run.error
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2


def test_a_loss_that_is_not_finite_stops_the_run(launch, tmp_path):
    run = launch("train", *TINY, "--num_seeds=2", f"--workdir={tmp_path}", "--config.lr=1e38", "--noconfig.anneal_lr")
    assert run.returncode == 2 and "not finite at env step" in run.error and "seed 0" in run.error, run.error
    assert not (tmp_path / "summary.json").exists()


def test_a_full_disk_is_one_line_and_loses_nothing(launch, tmp_path):
    command = shlex.join([sys.executable, "-m", "launchers.train", *TINY, f"--workdir={tmp_path}"])
    limited = f"ulimit -f 8; trap '' XFSZ; exec {command}"  # no file may grow beyond 8 KiB
    run = subprocess.run(["bash", "-c", limited], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"})
    assert run.returncode == 2 and run.stderr.strip().splitlines()[-1].startswith("error: "), run.stderr


def test_evaluate_repeats_the_training_score_and_draws(uninterrupted, launch, tmp_path):
    run = launch("evaluate", f"--run={uninterrupted}", "--episodes=2", f"--gif={tmp_path / 'a.gif'}",
                 f"--picture={tmp_path / 'a.png'}")
    assert run.returncode == 0, run.error
    final = json.loads((uninterrupted / "summary.json").read_text())["final"]["per_seed"]
    for score, line in zip(final, run.output.splitlines()[1:3], strict=True):
        assert float(line.split()[3]) == pytest.approx(score, abs=1e-3)
    assert {p.name for p in tmp_path.iterdir()} == {"a.gif", "a.png"}


def test_a_stored_config_equals_a_fresh_one():
    """Also one with pairs in a tuple, as a jump of hidden parameters is told."""
    config = ml_collections.FrozenConfigDict(dict(a=1, b=dict(c=(("x", 0.5), ("y", 1.0)), d="s", e=[1, (2, 3)])))
    stored = cli.config_dict(config)
    assert json.loads(json.dumps(stored)) == stored
    assert stored["b"]["c"] == [["x", 0.5], ["y", 1.0]]


TRAIN_EACH = """
import sys
from absl import flags
from launchers import train

for config in sys.argv[2:]:
    print(config)
    flags.FLAGS(["train", f"--config=configs/{config}", "--smoke", f"--workdir={sys.argv[1]}/{config}"])
    train.main([])
"""
CONFIGS = sorted(p.name for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("family", sorted({name.split("_")[0] for name in CONFIGS}))
def test_every_config_runs(family, tmp_path):
    """Those of one family in one process: to start a process takes longer than to train for two iterations."""
    configs = [name for name in CONFIGS if name.split("_")[0] == family]
    if importlib.util.find_spec("mujoco") is None:
        configs = [name for name in configs if "gymnasium/" not in (ROOT / "configs" / name).read_text()]
    run = subprocess.run([sys.executable, "-c", TRAIN_EACH, tmp_path, *configs], cwd=ROOT, text=True,
                         capture_output=True)
    assert run.returncode == 0, run.stdout.splitlines()[-1] + run.stderr
    assert all((tmp_path / config / "summary.json").exists() for config in configs)


def test_a_copied_file_trains_itself(launch, tmp_path):
    for folder in ("algorithms", "configs", "core", "launchers"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(tmp_path / "algorithms/ppo.py", tmp_path / "algorithms/mine.py")
    run = launch("train", "--config=algorithms/mine.py", "--smoke", "--workdir=run", cwd=tmp_path)
    assert run.returncode == 0, run.error
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["algorithm"] == "mine"

    begin, end = "<!-- results: written by launchers.report -->\n", "<!-- end of results -->\n"
    (tmp_path / "README.md").write_text(f"before\n{begin}old\n{end}after\n")
    assert launch("report", "--run=run", cwd=tmp_path).returncode == 0
    before, after = (tmp_path / "README.md").read_text().split(begin)
    rows, after = after.split(end)
    mine = next(row for row in rows.splitlines() if "mine.py" in row)
    assert before == "before\n" and after == "after\n" and "old" not in rows
    assert f"**{summary['final']['iqm']:.4g}**" in mine and "--config=algorithms/mine.py" in mine
