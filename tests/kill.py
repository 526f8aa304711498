"""Kill runs at any moment, resume them, and compare what they leave with runs that nobody killed.

    python -m tests.kill --kills 300 --seed 0 --methods ppo ekf_lqr pets
    unshare -rm sh -c 'mount -t tmpfs -o size=20m none /mnt && python -m tests.kill --kills 60 --folder /mnt'

Every kill is a SIGKILL. A run is killed again and again: before one of its next file operations, at a random moment
after it began to write a checkpoint, or at any moment. On a small disk it meets a full one, too: its error is then one
line. Once it ends, metrics.csv, the arrays of the last checkpoint and the list of files have to be those of the run
that nobody killed. Exit status 1: they were not.

Each start is a fork of this process, which has imported everything and started nothing.
"""
import argparse
import functools
import importlib
import itertools
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback

import numpy as np

from core import checkpoint
from core.errors import UserError
from launchers import cli
from launchers.train import train

TINY = dict(
    ppo=dict(env="cartpole_balance", env_steps=16 * 64, eval_every=256, num_steps=16, num_envs=4, hidden_dims=(8,),
             eval_episodes=2),
    ekf_lqr=dict(env_steps=24, log_every=4, eval_every=8, horizon=3, kept_elites=1,
                 planner=dict(num_samples=8, num_elites=2)),
    pets=dict(env_steps=20 + 10 * 12, eval_every=40, num_steps=10, num_updates=5, random_steps=20, horizon=3,
              hidden_dims=(8,), eval_episodes=1, planner=dict(num_samples=8, num_elites=4)))
KINDS = "operation", "operation", "while it saves", "while it saves", "any moment"


def config_of(method):
    config = importlib.import_module(f"algorithms.{method}").get_config()
    for name, value in TINY[method].items():
        if hasattr(value, "items"):
            config[name].update(value)
        else:
            config[name] = value
    return config


def trains(method, folder):
    train(config_of(method), num_seeds=2 if method == "ppo" else 1, workdir=str(folder),
          resume=(folder / "config.json").exists(), save_every=0.0, chunk=1)


def dies(path):
    os.kill(os.getpid(), signal.SIGKILL)


def start(go, folder, log, operation=0, meets=dies):
    """A fork that runs `go`. Before the given one of its file operations in `folder` it `meets` its end."""
    if child := os.fork():
        return child
    count = itertools.count(1)

    def before(name):
        if str(name).startswith(str(folder)) and next(count) == operation:
            meets(str(name))

    def hook(event, args):
        if event in ("os.rename", "os.remove", "os.mkdir") or event == "open" and args[2] & os.O_WRONLY:
            before(args[0])

    def fsync(descriptor, original=os.fsync):
        before(os.readlink(f"/proc/self/fd/{descriptor}"))
        original(descriptor)

    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if operation:
            sys.addaudithook(hook)
            os.fsync = fsync
        go()
        status = 0
    except (UserError, OSError) as error:  # as `cli.run` does
        print(f"error: {error if isinstance(error, UserError) else f'{error.filename}: {error.strerror}'}")
        status = 2
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    os._exit(status)


def wait(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended(child):
    """Exit status, or minus the signal, of a child that has ended; None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def kill(child, delay, saving=None):
    """The status of `child`, killed `delay` seconds from now, or from when it begins to write into `saving`."""
    while saving is not None and not any(saving.glob(".*.partial")):
        if (status := ended(child)) is not None:
            return status
        time.sleep(0.0005)
    until = time.perf_counter() + delay
    while time.perf_counter() < until:
        if (status := ended(child)) is not None:
            return status
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return wait(child)


def left(folder):
    """What a run leaves that is the same every time: files, metrics, arrays."""
    newest = checkpoint.steps(folder / "checkpoints")[-1]
    with np.load(newest) as stored:
        arrays = {name: stored[name].tobytes() for name in stored.files if name != checkpoint.META}
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")), (
        folder / "metrics.csv").read_bytes(), arrays


def whole(method, folder, log):
    """What the run leaves that nobody kills, and the seconds that it takes once its programs are compiled."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)
        began = time.perf_counter()
        status = wait(start(functools.partial(trains, method, folder), folder, log))
        if status:
            sys.exit(f"error: {method} does not even end by itself:\n{log.read_text()}")
    seconds, result = time.perf_counter() - began, left(folder)
    shutil.rmtree(folder)
    print(f"{method} takes {seconds:.1f} s", flush=True)
    return result, seconds


def full_disk(folder, ballast, room):
    """Fill the disk that `folder` is on but for `room` bytes."""
    free = shutil.disk_usage(folder).free - room
    with open(ballast, "wb", buffering=0) as file:
        while free > 0:
            free -= file.write(bytes(min(free, 1 << 16)))


def survive(method, folder, log, due, seconds, luck, counts, kills):
    """One run, killed until it ends by itself; whether it left what was due."""
    small = shutil.disk_usage(folder.parent).total < 100e6
    for attempt in itertools.count():
        kind = luck.choice(KINDS + ("full disk",) * 2 * small) if sum_of(counts) < kills else "none"
        ballast, operation = folder.parent / "ballast", 0
        if kind == "full disk":
            full_disk(folder.parent, ballast, luck.randrange(200_000))
        elif kind == "operation":
            operation = luck.randint(1, 60)
        child = start(functools.partial(trains, method, folder), folder, log, operation)
        if kind in ("while it saves", "any moment"):
            saving = folder / "checkpoints" if kind == "while it saves" else None
            status = kill(child, luck.uniform(0, seconds if saving is None else 0.1), saving)
        else:
            status = wait(child)
        ballast.unlink(missing_ok=True)
        said = log.read_text().strip().splitlines()
        if status == -signal.SIGKILL:
            counts[kind] += 1
        elif status == 0:
            break
        elif kind == "full disk" and status == 2 and said[-1].endswith("No space left on device"):
            counts[kind] += 1
        else:
            print(f"{method}: attempt {attempt}, {kind}, ended with {status}:\n" + "\n".join(said[-12:]), flush=True)
            return False
    got = left(folder)
    for what, mine, theirs in zip(("files", "metrics.csv", "arrays"), got, due, strict=True):
        if mine != theirs:
            print(f"{method}: {what} differ" + (f": {sorted({*mine} ^ {*theirs})}" if what == "files" else ""))
    return got == due


def sum_of(counts):
    return sum(count for kind, count in counts.items() if kind != "full disk")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--methods", nargs="+", default=list(TINY), choices=list(TINY))
    parser.add_argument("--folder", help="where the runs are; a small disk is filled now and then")
    args = parser.parse_args()
    luck, began, bad, runs = random.Random(args.seed), time.perf_counter(), 0, 0
    counts = dict.fromkeys([*KINDS, "full disk"], 0)
    with tempfile.TemporaryDirectory(dir=args.folder) as temp, tempfile.TemporaryDirectory() as other:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = other
        folder, log = pathlib.Path(temp, "run"), pathlib.Path(other, "log")
        importlib.import_module("matplotlib.pyplot")
        for method in args.methods:  # imported once, for all forks
            importlib.import_module(f"core.envs.{config_of(method).env}")
        due = {method: whole(method, folder, log) for method in dict.fromkeys(args.methods)}
        while sum_of(counts) < args.kills:
            method = args.methods[runs % len(args.methods)]
            before = sum(counts.values())
            sound = survive(method, folder, log, *due[method], luck, counts, args.kills)
            runs, bad = runs + 1, bad + (not sound)
            print(f"{'same' if sound else 'BAD':4}  {method}, after {sum(counts.values()) - before} kills", flush=True)
            shutil.rmtree(folder)
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(f"{sum_of(counts)} kills of {runs} runs ({told}): {bad} bad, {time.perf_counter() - began:.0f} s")
    sys.exit(bad > 0)


if __name__ == "__main__":
    cli.logging.set_verbosity(cli.logging.ERROR)
    main()
