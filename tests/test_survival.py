"""Runs survive a kill and a full disk at every file operation; damaged and untrusted folders are told in one line.

The runs are of numpy alone, so each start is a fork of a few milliseconds. `python -m tests.kill` kills real ones.
"""
import contextlib
import errno
import gc
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import ml_collections
import numpy as np
import pytest

from algorithms import ppo
from core import checkpoint, files
from core import logging as logs
from core.clock import Clock
from core.envs import make_env
from core.errors import UserError
from launchers import adaptation, cli, fork, report, runs, visualize
from launchers import train as launcher
from tests import kill

FILES, CHECKPOINT, LOGGING, CLI = "core/files.py", "core/checkpoint.py", "core/logging.py", "launchers/cli.py"
TRAIN, RUNS, HOST = "launchers/train.py", "launchers/runs.py", "core/envs/from_gymnasium.py"
EVERYWHERE, JSON = "test_a_run_survives_whatever_strikes", "test_damaged_json_is_named"
METRICS, STORED = "test_damaged_metrics_are_named", "test_damaged_checkpoints_are_named"
PLANTED_ERRORS = {
    "written in place": (FILES, "        yield partial\n", "        yield path\n", EVERYWHERE),
    "halves stay": (CLI, "        files.sweep(folder)\n", "", EVERYWHERE),
    "halves of checkpoints stay": (CLI, '        files.sweep(folder / "checkpoints")\n', "", EVERYWHERE),
    "a failed write leaves its half": (FILES, "            partial.unlink()", "            pass", EVERYWHERE),
    "a full disk is nowhere": (FILES, "            error.filename = str(path)  # a full", "            pass  # a full",
                               EVERYWHERE),
    "half a row stays": (FILES, "            file.truncate(size)\n", "", EVERYWHERE),
    "two processes": (FILES, "fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", EVERYWHERE),
    "a shared lock": (FILES, "fcntl.LOCK_EX |", "fcntl.LOCK_SH |", EVERYWHERE),
    "a fork holds the lock": (FILES, "    os.register_at_fork(after_in_child=release)\n", "",
                              "test_a_fork_does_not_hold_the_lock"),
    "the lock is kept": (FILES, "    finally:\n        release()", "    finally:\n        pass",
                         "test_a_folder_is_of_one_process"),
    "rows in doubt stay": (LOGGING, "*lines[:rows]]", "*lines]", EVERYWHERE),
    "lost rows unseen": (LOGGING, "if len(lines) < rows:", "if False:", METRICS),
    "torn rows unseen": (LOGGING, """text[-1] != "\\n" or """, "", METRICS),
    "ragged rows unseen": (LOGGING, " or any(len(row) != len(header) for row in rows)", "", METRICS),
    "seeds in any order": (LOGGING, " or (values[:, 1].reshape(-1, num_seeds) != seeds).any()", "", METRICS),
    "the summary before its picture": (
        LOGGING, '        _curve(self.workdir, summary["score"])\n        files.write(self.workdir / "summary.json", '
        "json.dumps(summary, indent=1))\n", '        files.write(self.workdir / "summary.json", json.dumps(summary, '
        'indent=1))\n        _curve(self.workdir, summary["score"])\n', "test_a_run_without_its_picture_gets_it"),
    "finished without its picture": (CLI, ' and (folder / "curve.png").exists()', "",
                                     "test_a_run_without_its_picture_gets_it"),
    "old checkpoints stay": (TRAIN, '        checkpoint.prune(folder, meta["step"])\n', "        pass\n", EVERYWHERE),
    "damaged ones count as newest": (CHECKPOINT, 'if path.name <= f"step_{step:012d}.npz"]', "]",
                                     "test_a_whole_checkpoint_outlives_damaged_later_ones"),
    "training goes on without checkpoints": (TRAIN, "                writer.check()\n", "",
                                             "test_training_stops_soon_after_a_checkpoint_failed"),
    "meta of any kind": (CHECKPOINT, """if type(meta["step"]) is not int or type(meta["score"]) not in""",
                         """if type(meta["score"]) not in""", STORED),
    "any depth": (FILES, "    except RecursionError:", "    except KeyError:", JSON),
    "any size": (FILES, "parse_int=whole_number", "parse_int=int", JSON),
    "true is a number": (FILES, " or isinstance(value[name], bool)", "", JSON),
    "any number of seeds": (RUNS, "if not 1 <= num_seeds < 2**31 or", "if", JSON),
    "a module is imported": (HOST, """    if ":" in f"{name}{kwargs.get('env_id', '')}":""", "    if False:",
                             "test_a_name_imports_nothing"),
    "any file is a method": (CLI, "    if name not in known:", "    if False:",
                             "test_only_files_of_algorithms_are_methods"),
    "a terminal obeys": (CLI, "c if c.isprintable() else", "c if True else", "test_a_message_is_one_plain_line"),
}


# ---- runs of numpy

class Run(NamedTuple):
    clock: Clock
    x: np.ndarray


def numpy_job(algorithm, config, seeds, eval_seed, num_devices):
    """x of seed s is multiplied and gets larger by s, ten times a chunk."""
    def train(run, totals, start, stop):
        for i in range(start, stop):
            run = Run(Clock(run.clock.env_steps + 10, run.clock.updates + 1), run.x * 1.25 + seeds[:, None] + i)
            totals = ({"loss": totals[0]["loss"] + run.x[:, 0]}, totals[1])
        return run, totals

    zeros = np.zeros(2, np.int64)
    return launcher.Job(
        config, "env_steps", 10, Run(Clock(zeros, zeros), np.zeros((2, 50))),
        lambda: ({"loss": np.zeros(2)}, np.full(2, -1)), train, lambda run: {"return": -run.x[:, 1]},
        lambda run: {f"measure{i}": run.x[:, i] for i in range(12)},
        ["return"], ["return"], lambda tree: tree)


def go(folder):
    config = ml_collections.ConfigDict(dict(algorithm="x", env="y", env_steps=50, eval_every=25, log_every=25))
    launcher.train(config, seed=3, num_seeds=2, workdir=str(folder), resume=(folder / "config.json").exists(),
                   save_every=0.0, chunk=1)


class Bar(contextlib.nullcontext):
    def update(self, count):
        pass

    def set_postfix(self, values):
        pass


def prepare():
    """No part of JAX runs in a fork, nor does a disk have to follow."""
    launcher.compile_job, launcher.use_devices = numpy_job, lambda *_: 1
    launcher.jax = SimpleNamespace(
        process_index=lambda: 0, process_count=lambda: 1, tree=launcher.jax.tree,
        devices=lambda: [SimpleNamespace(device_kind="none")])
    cli.progress_bar, cli.algorithm_of, cli.teams_of = lambda *_: Bar(), lambda _: None, lambda _: None
    logs.provenance, checkpoint.place = lambda settings: settings, lambda value, like, name: value
    logs._curve = lambda workdir, names: files.write(workdir / "curve.png", bytes(3000))
    launcher.summarize = lambda values: dict(mean=0.0, iqm=0.0, ci95=[0.0, 0.0], per_seed=values.tolist())
    os.fsync = lambda descriptor: None


def full(path):
    """Every write from now on meets a full disk."""
    def refuse(event, args):
        if event == "os.mkdir" or event == "open" and args[2] & os.O_WRONLY:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(refuse)
    os.fsync = fsync
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def no_file_beyond(size, die):
    """The write that would make a file larger is cut short. Then the process dies, or that is an error."""
    def go_limited(folder):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if die else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        go(folder)

    return go_limited


def strike(root):
    """Everything that can strike, one at a time; prints what was wrong afterwards, and how many there were."""
    prepare()
    gc.freeze()  # a fork copies what it counts
    folder, log, count = root / "run", root / "log", {}
    assert kill.wait(kill.start(lambda: go(folder), folder, log)) == 0, log.read_text()
    due = kill.left(folder)

    def check(kind, what, status, words):
        """After the strike: what is left is sound, what was said is one line, and the run ends as if nothing was."""
        count[kind] = count.get(kind, 0) + 1
        said = log.read_text()
        if status == 2 and not (said.count("\n") == 1 and said.startswith(f"error: {folder}") and words in said):
            print(kind, what, "said", repr(said))
        if status == 2 and list(folder.rglob("*.partial")):
            print(kind, what, "left", list(folder.rglob("*.partial")))
        if status == 2 and (folder / "metrics.csv").exists() and (text := (folder / "metrics.csv").read_text()):
            logs.parse(text, "half a row")
        again = kill.wait(kill.start(lambda: go(folder), folder, log))
        if again or kill.left(folder) != due:
            print(kind, what, "ended with", again, log.read_text() or kill.left(folder)[0])

    def clear():
        shutil.rmtree(folder, ignore_errors=True)

    for kind, meets, span in ("kill", kill.dies, 1), ("full", full, 2):
        for operation in itertools.count(1, span):
            clear()
            status = kill.wait(kill.start(lambda: go(folder), folder, log, operation, meets))
            if status == 0:
                break
            check(kind, operation, status, "No space left on device")
    for size, die in itertools.product((1, 160, 260, 390, 700, 2900), (True, False)):
        clear()
        status = kill.wait(kill.start(lambda: no_file_beyond(size, die)(folder), folder, log))  # noqa: B023
        check("torn", (size, die), status, "File too large")

    clear()  # a second process, while the first one rests
    child = kill.start(lambda: go(folder), folder, log, 30, lambda _: os.kill(os.getpid(), signal.SIGSTOP))
    os.waitpid(child, os.WUNTRACED)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("run/**/*")}
    second = kill.wait(kill.start(lambda: go(folder), folder, root / "second"))
    said = (root / "second").read_text()
    if second != 2 or said != f"error: {folder} is in use: another process writes there\n":
        print("the second process ended with", second, said)
    if before != {path: path.stat().st_mtime_ns for path in root.rglob("run/**/*")}:
        print("the second process wrote")
    os.kill(child, signal.SIGCONT)
    if kill.wait(child) or kill.left(folder) != due:
        print("the first process was disturbed")
    print(json.dumps(count))


def test_a_run_survives_whatever_strikes(tmp_path):
    """A kill, and a full disk, at every file operation; writes cut short; two processes."""
    script = "import pathlib, sys; from tests.test_survival import strike; strike(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], cwd=cli.ROOT, text=True,
                          capture_output=True, timeout=300)
    *wrong, count = done.stdout.splitlines() or [done.stderr]
    assert not wrong and done.returncode == 0, "\n".join([*wrong, count, done.stderr])
    count = json.loads(count)
    assert count["kill"] > 35 and count["full"] > 17 and count["torn"] == 12


def test_a_folder_is_of_one_process(tmp_path):
    with files.locked(tmp_path):
        with pytest.raises(UserError, match=f"{tmp_path} is in use"), files.locked(tmp_path):
            pass
    with files.locked(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_fork_does_not_hold_the_lock(tmp_path):
    script = """if True:
        import os, pathlib, sys, time
        from core import files
        folder = pathlib.Path(sys.argv[1])
        with files.locked(folder):
            if not os.fork():  # the lock goes before this process comes to the next line
                print(os.getpid(), flush=True)
                time.sleep(60)
            os.wait()
        """
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=cli.ROOT, stdout=subprocess.PIPE,
                               start_new_session=True)
    process.stdout.readline()
    process.kill()  # and its fork lives
    process.wait()
    try:
        with files.locked(tmp_path):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()


@pytest.fixture
def numpy_runs(tmp_path, monkeypatch):
    """`go` in this process."""
    for name, value in dict(compile_job=numpy_job, use_devices=lambda *_: 1).items():
        monkeypatch.setattr(launcher, name, value)
    for name in ("algorithm_of", "teams_of"):
        monkeypatch.setattr(cli, name, lambda _: None)
    monkeypatch.setattr(checkpoint, "place", lambda value, like, name: value)
    monkeypatch.setattr(logs, "provenance", lambda settings: settings)
    return tmp_path / "run$x_{"  # no formula


def test_a_run_without_its_picture_gets_it(numpy_runs, monkeypatch):
    def no_room(workdir, names):
        raise OSError(errno.ENOSPC, "No space left on device", "curve.png")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(logs, "_curve", no_room)
        go(numpy_runs)
    assert not (numpy_runs / "summary.json").exists()
    go(numpy_runs)
    (numpy_runs / "curve.png").unlink()
    go(numpy_runs)
    assert (numpy_runs / "curve.png").stat().st_size > 1000
    with pytest.raises(UserError, match="is finished"):
        go(numpy_runs)


def test_training_stops_soon_after_a_checkpoint_failed(numpy_runs, monkeypatch):
    """At the next chunk, not at the next checkpoint."""
    def save(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "step")

    count = itertools.count(1)
    job = numpy_job(None, None, np.array([0, 1]), 0, 1)
    config = ml_collections.ConfigDict(dict(env_steps=400, eval_every=400))

    def train(run, totals, start, stop):
        while writer and not writer[0].pending.done():
            pass
        return job.train(run, totals, start, stop) if next(count) else None

    writer, original = [], checkpoint.Writer.save

    def due(self):
        return not writer

    monkeypatch.setattr(checkpoint, "_write", save)
    monkeypatch.setattr(checkpoint.Writer, "due", property(due))
    monkeypatch.setattr(checkpoint.Writer, "save", lambda self, *args: (original(self, *args), writer.append(self)))
    state = launcher.State(job.run, job.zeros(), launcher.START)
    logger = SimpleNamespace(rows=0, seeds=[0, 1], write=lambda row: None)
    with pytest.raises(OSError, match="step"):
        launcher.fit(job._replace(config=config, train=train), state, numpy_runs, logger, 0.0, 2, 1)
    assert next(count) == 3


def test_a_whole_checkpoint_outlives_damaged_later_ones(tmp_path):
    for step in (2, 4):
        checkpoint.save(tmp_path, step, dict(x=np.ones(2)), dict(score=float("nan")))
    for step in (7, 8):
        (tmp_path / f"step_{step:012d}.npz").write_bytes(b"PK")
    checkpoint.save(tmp_path, 5, dict(x=np.ones(2)), dict(score=None))
    assert [path.stem[-1] for path in checkpoint.steps(tmp_path)] == ["4", "5"]
    with pytest.raises(UserError, match="no best checkpoint"):
        checkpoint.best(tmp_path)


# ---- damaged folders

META = np.frombuffer(b'{"step": 1, "score": null}', np.uint8)


@pytest.mark.parametrize("content", [
    dict(x=np.zeros(2)), {"meta.json": np.frombuffer(b"{", np.uint8)}, {"meta.json": np.frombuffer(b"[]", np.uint8)},
    {"meta.json": np.frombuffer(b'{"step": "a", "score": 1}', np.uint8)},
    {"meta.json": np.frombuffer(b'{"step": 1, "score": {}}', np.uint8)},
    {"meta.json": np.frombuffer(b'{"step": 1}', np.uint8)}, {"meta.json": np.frombuffer(b"[" * 100_000, np.uint8)},
    {"meta.json": META, "x": np.array([{}])}, None])
def test_damaged_checkpoints_are_named(tmp_path, content):
    path = tmp_path / "step_000000000001.npz"
    with open(path, "wb") as file:
        np.save(file, np.zeros(3)) if content is None else np.savez(file, **content)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=path.name) as error:
        checkpoint.restore(path, dict(x=np.zeros(2)))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no usable checkpoint"):
        checkpoint.restore_newest(tmp_path, dict(x=np.zeros(2)))


READERS = {
    "config.json": {
        "resume": lambda folder: cli.check_folder(folder, {}, True), "evaluate": lambda folder: runs.load(folder),
        "visualize": lambda folder: visualize.draw_figure(folder, "x.png", None),
        "adaptation": lambda folder: adaptation.read_run(folder, folder),
        "regret": lambda folder: runs.regret(folder, folder)},
    "summary.json": {"adaptation": lambda folder: adaptation.read_run(folder, folder),
                     "report": lambda folder: report.adopt(folder, None)},
    "provenance.json": {"report": lambda folder: report.adopt(folder, None)}}
BAD_JSON = {
    "empty": b"", "cut": b'{"a": ', "a list": b"[]", "a number": b"3", "not UTF-8": b'{"a": "\x80"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"), "deep": b"[" * 100_000, "deeper": b'{"a":' * 100_000,
    "a huge number": b'{"a": ' + b"1" * 400 + b"}", "a number without end": b'{"a": ' + b"1" * 10_000 + b"}",
    "half a pair": b'{"a": "\\ud800"}'}


@pytest.fixture
def run_folder(tmp_path):
    config = cli.config_dict(ppo.get_config()) | dict(seed=0, num_seeds=2, eval_seed=1, env_kwargs={})
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "summary.json").write_text(json.dumps(dict(train_seconds=1.0, env_steps=1, seeds=[0])))
    (tmp_path / "provenance.json").write_text("{}")
    (tmp_path / "metrics.csv").write_text("env_steps,seed,reward\n1,0,2\n1,1,2\n")
    return tmp_path


@pytest.mark.parametrize("name, reader", [(name, reader) for name, readers in READERS.items() for reader in readers])
def test_damaged_json_is_named(run_folder, name, reader):
    before = json.loads((run_folder / name).read_text())
    for content in BAD_JSON.values():
        (run_folder / name).write_bytes(content)
        assert_names(READERS[name][reader], run_folder, name)
    (run_folder / name).unlink()
    (run_folder / name).mkdir()
    assert_names(READERS[name][reader], run_folder, name)
    (run_folder / name).rmdir()
    changes = [] if reader != "evaluate" else [
        dict(num_seeds="two"), dict(num_seeds=0), dict(num_seeds=True), dict(num_seeds=2**40), dict(seed=-1),
        dict(seed=None), dict(algorithm=3), dict(algorithm="../core/ekf"), dict(algorithm="__init__"),
        dict(algorithm=["ppo"]), dict(env=3), dict(num_envs="many"), dict(num_envs=0), dict(hidden_dims=3),
        dict(lr={}), dict(init_std=10**18), {"a.b": 1}, dict(dataset=3), dict(eval_env=3), dict(eval_env_kwargs=3)]
    for change in changes:
        (run_folder / name).write_text(json.dumps(before | change))
        assert_names(READERS[name][reader], run_folder, name)
    for missing in ("algorithm", "env", "num_seeds", "lr") if reader == "evaluate" else ():
        (run_folder / name).write_text(json.dumps({k: v for k, v in before.items() if k != missing}))
        assert_names(READERS[name][reader], run_folder, name)


def assert_names(function, folder, name):
    with pytest.raises(UserError, match=name) as error:
        function(folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


HEADER = b"env_steps,seed,x\n"


@pytest.mark.parametrize("text", [
    b"", b"\n", b"1,0,2\n1,1,2\n", HEADER, HEADER + b"1,0,2\n1,1\n", HEADER + b"1,0,2\n1,1,2", HEADER + b"1,0,2,3\n",
    HEADER + b"1,0,2\n1,1,two\n", HEADER + b"1,0,2\n1,1,2\n2,0,2\n", HEADER + b"1,0,\x80\n", HEADER + b"1,,2\n",
    HEADER + b"1,0,2\n1,1,2\n2,1,2\n2,0,2\n", HEADER + b'1,0,"2\n', HEADER + b"1,0,\0\n", HEADER + b"\n1,0,2\n",
    b"env_steps,seed,seed\n1,0,2\n", HEADER + b"1,0," + b"1" * 200_000 + b"\n", None])
def test_damaged_metrics_are_named(tmp_path, text):
    path = tmp_path / "metrics.csv"
    if text is not None:
        path.write_bytes(text)
    assert_names(logs.read_metrics, tmp_path, "metrics.csv")
    path.write_text("env_steps,seed,x\n1,0,2\n1,1,2\n2,0,")
    logs.Logger(tmp_path, {}, {}, [0, 1], rows=2)  # a torn row that the checkpoint does not count
    short = "it has 2 rows, and its checkpoint"
    assert_names(lambda folder: logs.Logger(folder, {}, {}, [0, 1], rows=4), tmp_path, short)
    if text is not None:
        path.write_bytes(text)
        assert_names(lambda folder: logs.Logger(folder, {}, {}, [0, 1], rows=4), tmp_path, "metrics.csv")
        assert path.read_bytes() == text


def test_provenance_needs_no_git_and_no_utf8(monkeypatch):
    answers = [subprocess.CompletedProcess([], 0, b"abc\n"), subprocess.CompletedProcess([], 0, b"+ caf\xe9\n")]
    monkeypatch.setattr(logs.subprocess, "run", lambda *args, **kwargs: answers.pop(0))
    stored = logs.provenance({})
    assert stored["commit"] == "abc" and stored["diff"] == "+ caf\N{REPLACEMENT CHARACTER}"

    def no_git(*args, **kwargs):
        raise FileNotFoundError(2, "No such file or directory", "git")

    monkeypatch.setattr(logs.subprocess, "run", no_git)
    assert logs.provenance({})["commit"] is None


# ---- untrusted folders

def test_a_name_imports_nothing(tmp_path, monkeypatch):
    (tmp_path / "evil_package.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("gymnasium/evil_package:Name-v0", "gymnasium/evil_package:CartPole-v1"):
        with pytest.raises(UserError, match="would import a module"):
            make_env(name, 1)
    with pytest.raises(UserError, match="would import a module"):
        make_env("gymnasium/GymV26Environment-v0", 1, env_id="evil_package:Name-v0")
    assert "evil_package" not in sys.modules


@pytest.mark.parametrize("name", ["num_envs", "name", "self"])
def test_no_setting_reaches_another_argument(name):
    for env in ("gymnax/CartPole-v1", "cartpole_balance", "gymnasium/CartPole-v1"):
        with pytest.raises(UserError):
            make_env(env, 1, **{name: 3})


@pytest.mark.parametrize("name", ["../core/ekf", "__init__", "core.ekf", "", "ppo.py", "/etc/passwd", "рро"])
def test_only_files_of_algorithms_are_methods(name):
    with pytest.raises(UserError, match="unknown algorithm"):
        cli.algorithm_of(ml_collections.ConfigDict(dict(algorithm=name)))
    with pytest.raises(UserError, match="unknown algorithm"):
        fork.fork(name, "x")
    with pytest.raises(UserError, match="unknown algorithm"):
        fork.fork(diff=name)


def test_a_message_is_one_plain_line(capsys):
    cli._fail('algorithm "\x1b[2J\n\a" is unknown')
    assert capsys.readouterr().err == 'error: algorithm " [2J  " is unknown\n'
