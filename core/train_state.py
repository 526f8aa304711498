"""A network, its parameters and its optimiser, as one pytree."""
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import linen as nn
from flax import struct


class TrainState(struct.PyTreeNode):
    """`state(x)` stops gradients; `state(x, params=p)` lets them flow into `p`."""

    params: Any
    opt_state: Any
    apply_fn: Callable = struct.field(pytree_node=False)
    tx: optax.GradientTransformation | None = struct.field(pytree_node=False)

    @classmethod
    def create(cls, module: nn.Module, key: jax.Array, *inputs, tx: optax.GradientTransformation) -> "TrainState":
        params = module.init(key, *inputs)["params"]
        return cls(params, tx.init(params), module.apply, tx)

    def __call__(self, *args, params: Any = None, **kwargs) -> Any:
        params = jax.lax.stop_gradient(self.params) if params is None else params
        return self.apply_fn({"params": params}, *args, **kwargs)

    def minimize(self, loss_fn: Callable, *args) -> tuple["TrainState", Any]:
        """One optimiser step on `loss_fn(params, *args) -> (loss, info)`."""
        grads, info = jax.grad(loss_fn, has_aux=True)(self.params, *args)
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params)
        return self.replace(params=optax.apply_updates(self.params, updates), opt_state=opt_state), info

    def target(self) -> "TrainState":
        """A copy without an optimiser, to be moved by `track`."""
        return self.replace(opt_state=None, tx=None)

    def track(self, online: "TrainState", tau: float) -> "TrainState":
        """Polyak step: params <- tau · online + (1 − tau) · params."""
        return self.replace(params=optax.incremental_update(online.params, self.params, tau))
