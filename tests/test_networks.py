import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from core.networks import MLP, ensemblize, orthogonal

NETWORKS = "core/networks.py"
PLANTED_ERRORS = {
    "scale forgotten": (NETWORKS, "return scale * (x if", "return (x if"),
    "not converged": (NETWORKS, "fori_loop(0, 60,", "fori_loop(0, 5,"),
    "activation after the last layer": (NETWORKS, "x = x if linear else self.activation(x)", "x = self.activation(x)"),
    "members share their parameters": (NETWORKS, 'split_rngs={"params": True}', 'split_rngs={"params": False}'),
}


@pytest.mark.parametrize("shape", [(64, 64), (4, 64), (64, 1), (300, 7)])
def test_orthogonal_matrices_are_orthogonal(shape):
    x = jax.vmap(lambda key: orthogonal(2.0)(key, shape))(jax.random.split(jax.random.key(0), 3))
    small = x if shape[0] >= shape[1] else x.mT
    gram = jnp.einsum("kij,kil->kjl", small, small)
    np.testing.assert_allclose(gram, 4 * np.broadcast_to(np.eye(min(shape)), gram.shape), atol=1e-4)
    assert not np.allclose(x[0], x[1], atol=0.1 * np.abs(x).mean())


def test_the_last_layer_is_linear_unless_told_otherwise():
    x = jax.random.normal(jax.random.key(0), (64, 3))
    for final, lowest in ((False, False), (True, True)):
        out, _ = MLP((8, 5), nn.relu, activate_final=final).init_with_output(jax.random.key(1), x)
        assert bool((out >= 0).all()) == lowest and out.shape == (64, 5)


def test_members_of_an_ensemble_differ_and_see_the_same_input():
    x = jnp.ones((4, 3))
    out, params = ensemblize(MLP, 2)((8, 1)).init_with_output(jax.random.key(0), x)
    assert out.shape == (2, 4, 1) and not np.allclose(out[0], out[1])
    single = jax.tree.map(lambda p: p[1], params)
    np.testing.assert_allclose(MLP((8, 1)).apply(single, x), out[1], rtol=1e-5)
