import importlib.util
import mmap
import os
import pathlib

# A test compiles for seconds what it runs for milliseconds, so it is the compiler that is to be fast. Eigen's threads
# go, too: a LAPACK call waits for them, and on few cores it can wait for ever.
FLAGS = dict(xla_cpu_multi_thread_eigen="false", xla_backend_optimization_level="0",
             xla_cpu_use_fusion_emitters="false")  # without it a program compiles in half the time


def xla_knows(flag):
    """XLA ends the process where it meets a flag that it does not know. Those that it knows stand in its library as
    strings of their own. Of a flag that is gone the name may still be there, within another string."""
    folder = pathlib.Path(importlib.util.find_spec("jaxlib").submodule_search_locations[0])
    for library in sorted(folder.glob("*.so"), key=lambda path: -path.stat().st_size):
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            if text.find(b"\0" + flag.encode() + b"\0") >= 0:
                return True
    return False


WORKER = os.environ.get("PYTEST_XDIST_WORKER")
PROGRAMS = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs"
if not WORKER:  # a worker of pytest-xdist inherits them
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *(
        f"--{flag}={value}" for flag, value in FLAGS.items() if xla_knows(flag))])
# Compiled programs are kept for the next time. JAX writes them in place, so each worker has a folder of its own.
OURS = "JAX_COMPILATION_CACHE_DIR" not in os.environ or WORKER
if OURS:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(PROGRAMS / (WORKER or "alone"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_num_cpu_devices", 2)  # what is spread over devices is tested in this process


def pytest_sessionfinish():
    """What one worker compiled, all of them find the next time, whatever tests they are given then."""
    if WORKER or not OURS:
        return
    folders = [PROGRAMS / name for name in ("alone", *(f"gw{i}" for i in range(os.cpu_count())))]
    programs = {path.name: path for folder in folders for path in folder.glob("*-cache")}
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for name in programs.keys() - {path.name for path in folder.iterdir()}:
            os.link(programs[name], folder / name)


@pytest.fixture(autouse=True)
def strict_ranks():
    """An implicit broadcast between ranks is an error, but where distrax itself makes one."""
    with jax.numpy_rank_promotion("raise"):
        yield
