import jax
import pytest

jax.config.update("jax_debug_key_reuse", True)
jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(autouse=True)
def strict_ranks():
    """An implicit broadcast between ranks is an error, but where distrax itself makes one."""
    with jax.numpy_rank_promotion("raise"):
        yield
