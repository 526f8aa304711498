import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from core.networks import MLP, TanhNormal, ensemblize, flat, orthogonal

NETWORKS = "core/networks.py"
PLANTED_ERRORS = {
    "scale forgotten": (NETWORKS, "return scale * (x if", "return (x if"),
    "not converged": (NETWORKS, "fori_loop(0, 60,", "fori_loop(0, 5,"),
    "activation after the last layer": (NETWORKS, "x = x if linear else self.activation(x)", "x = self.activation(x)"),
    "slope of tanh forgotten": (NETWORKS, "(log_normal - log_slope)", "log_normal"),
    "slope of tanh added": (NETWORKS, "(log_normal - log_slope)", "(log_normal + log_slope)"),
    "slope found in the action": (NETWORKS, "2 * (jnp.log(2.0) - u - nn.softplus(-2 * u))",
                                  "jnp.log(1 - jnp.tanh(u) ** 2 + 1e-6)"),
    "deviation forgotten in the density": (NETWORKS, "(jnp.square(noise) + jnp.log(2 * jnp.pi)) - self.log_std",
                                           "(jnp.square(noise) + jnp.log(2 * jnp.pi))"),
    "logarithm for a deviation": (NETWORKS, "jnp.exp(self.log_std) * noise", "self.log_std * noise"),
    "a mode outside of the box": (NETWORKS, "return jnp.tanh(self.mean)", "return self.mean"),
    "density of each dimension": (NETWORKS, "(log_normal - log_slope).sum(axis=-1)",
                                  "(log_normal - log_slope).mean(axis=-1)"),
    "inputs of the copies ignored": (NETWORKS, "in_axes=in_axes, axis_size=n", "in_axes=None, axis_size=n"),
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


def test_copies_may_have_inputs_of_their_own():
    x = jnp.stack([jnp.ones((4, 3)), jnp.zeros((4, 3))])
    out, params = ensemblize(MLP, 2, in_axes=0)((8, 1)).init_with_output(jax.random.key(0), x)
    for i in range(2):
        alone = MLP((8, 1)).apply(jax.tree.map(lambda p, i=i: p[i], params), x[i])
        np.testing.assert_allclose(out[i], alone, rtol=1e-5)


def test_a_dictionary_of_observations_becomes_one_vector():
    obs = dict(state=jnp.ones((2, 3)), goal=jnp.zeros((2, 1)), image=jnp.full((2, 2, 2), 7, jnp.uint8))
    np.testing.assert_array_equal(flat(obs), [[0, 7, 7, 7, 7, 1, 1, 1]] * 2)
    np.testing.assert_array_equal(flat((obs["state"], obs["goal"])), [[1, 1, 1, 0]] * 2)
    assert flat(obs).dtype == jnp.float32


@pytest.mark.parametrize("mean", [0.0, -0.7, 3.0, 25.0, -40.0])
def test_the_density_of_a_squashed_normal_is_the_change_of_variables(mean):
    """In float64, log(1 − tanh² u) as log(4 e^(2u) / (e^(2u) + 1)²); at |u| > 20 the action is ±1 itself."""
    mean, log_std, key = jnp.full((500, 2), mean), jnp.tile(jnp.float32([-1.0, 0.3]), (500, 1)), jax.random.key(1)
    dist = TanhNormal(mean, log_std)
    action, log_prob = dist.sample_and_log_prob(jax.random.clone(key))
    noise = np.asarray(jax.random.normal(key, (500, 2)), np.float64)
    std = np.exp(np.asarray(log_std, np.float64))
    u = np.asarray(mean, np.float64) + std * noise
    normal = np.exp(-0.5 * ((u - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
    slope = 4 * np.exp(-2 * np.abs(u)) / (1 + np.exp(-2 * np.abs(u))) ** 2
    np.testing.assert_allclose(action, np.tanh(u), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(log_prob, (np.log(normal) - np.log(slope)).sum(axis=1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dist.mode(), np.tanh(mean), rtol=1e-6)
    gradient = jax.grad(lambda mean: TanhNormal(mean, log_std).sample_and_log_prob(jax.random.key(1))[1].sum())(mean)
    np.testing.assert_allclose(gradient, 2 * np.tanh(u), rtol=1e-3, atol=1e-5)  # −d log(slope) / du
