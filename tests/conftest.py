import os
import pathlib

# LAPACK calls that wait for the threads they run on can wait for ever where cores are few: give them none to wait for.
# And a test compiles for seconds what it runs for milliseconds: programs need not be fast here.
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_cpu_multi_thread_eigen=false", "--xla_backend_optimization_level=0"])
# What was compiled is kept for the next time: by each worker of pytest-xdist for itself, for JAX writes it in place.
PROGRAMS = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "programs" / os.environ.get("PYTEST_XDIST_WORKER", "")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(PROGRAMS))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_num_cpu_devices", 2)  # so that what is spread over devices is tested in this process


@pytest.fixture(autouse=True)
def strict_ranks():
    """An implicit broadcast between ranks is an error, but where distrax itself makes one."""
    with jax.numpy_rank_promotion("raise"):
        yield
