import os

# LAPACK calls that wait for the threads they run on can wait for ever where cores are few: give them none to wait for.
# And a test compiles for seconds what it runs for milliseconds: programs need not be fast here.
os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_cpu_multi_thread_eigen=false", "--xla_backend_optimization_level=0"])

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(autouse=True)
def strict_ranks():
    """An implicit broadcast between ranks is an error, but where distrax itself makes one."""
    with jax.numpy_rank_promotion("raise"):
        yield
