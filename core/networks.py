"""Networks that three or more algorithms share."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn


def orthogonal(scale: float) -> Callable[..., jax.Array]:
    """Initialiser: `scale` times a matrix of orthonormal columns or rows, uniform among them.

    It is the polar factor X (XᵀX)^(−½) of a normal X, by Newton-Schulz iteration. The usual QR factor would do, but
    LAPACK calls batched over seeds wait for the threads they run on, and can wait for ever (jaxlib 0.10, few cores).
    """
    def init(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        x = jax.random.normal(key, (max(shape), min(shape)), dtype)
        x = x / jnp.linalg.norm(x)  # every singular value in (0, 1]; 1.5 times the smallest ones an iteration
        x = jax.lax.fori_loop(0, 60, lambda _, x: 1.5 * x - 0.5 * x @ (x.T @ x), x)
        return scale * (x if shape[0] >= shape[1] else x.T)

    return init


class MLP(nn.Module):
    """[..., I] -> [..., dims[-1]]; the last layer is linear unless `activate_final`."""

    dims: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    activate_final: bool = False
    scale: float = 2**0.5  # of the orthogonal initialisation, hidden layers
    final_scale: float = 1.0  # the same, of the last layer when it is linear

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i, dim in enumerate(self.dims):
            linear = i + 1 == len(self.dims) and not self.activate_final
            x = nn.Dense(dim, kernel_init=orthogonal(self.final_scale if linear else self.scale))(x)
            x = x if linear else self.activation(x)
        return x


def ensemblize(module: type[nn.Module], n: int, in_axes: Any = None) -> Callable[..., nn.Module]:
    """n independent copies of `module`, outputs stacked on axis 0. By default all get the same input; `in_axes` says of
    each argument which axis is that of the copies, as in `jax.vmap`."""
    return nn.vmap(module, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=in_axes, axis_size=n)


def flat(obs: Any) -> jax.Array:
    """[B, ...], or a dictionary of such -> [B, O]."""
    return jnp.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(obs)], axis=-1)


def patches(x: jax.Array, size: int = 3) -> jax.Array:
    """[B, H, W, C] -> [B, H − size + 1, W − size + 1, size² C]: a Dense layer of them is a convolution. A true one has
    a kernel of its own for every seed, which XLA on a CPU takes one by one."""
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    return jnp.concatenate([x[:, i:i + height, j:j + width] for i in range(size) for j in range(size)], axis=-1)


class TanhNormal(NamedTuple):
    """Actions in (−1, 1): a = tanh u, where u ~ N(mean, exp(log_std)²) in each dimension."""

    mean: jax.Array  # [..., A]
    log_std: jax.Array  # [..., A]

    def mode(self) -> jax.Array:
        return jnp.tanh(self.mean)

    def sample_and_log_prob(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Actions [..., A] and the logarithm of their density [...], from u itself: at |u| > 9 the action is ±1 in
        float32, and nothing of u can be found in it.

            log p(a) = Σ_A log N(u; mean, std²) − log(1 − tanh² u),   1 − tanh² u = 4 / (e^u + e^(−u))²
        """
        noise = jax.random.normal(key, self.mean.shape)
        u = self.mean + jnp.exp(self.log_std) * noise
        log_normal = -0.5 * (jnp.square(noise) + jnp.log(2 * jnp.pi)) - self.log_std
        log_slope = 2 * (jnp.log(2.0) - u - nn.softplus(-2 * u))
        return jnp.tanh(u), (log_normal - log_slope).sum(axis=-1)
