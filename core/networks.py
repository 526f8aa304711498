"""Networks that three or more algorithms share."""
from collections.abc import Callable

import jax
from flax import linen as nn


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
            x = nn.Dense(dim, kernel_init=nn.initializers.orthogonal(self.final_scale if linear else self.scale))(x)
            x = x if linear else self.activation(x)
        return x


def ensemblize(module: type[nn.Module], n: int) -> Callable[..., nn.Module]:
    """n independent copies of `module` on the same input, outputs stacked on axis 0."""
    return nn.vmap(module, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=n)
