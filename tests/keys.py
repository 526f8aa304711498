"""Every random key that a program draws from: each should serve once.

A key that copies share, or that serves two purposes, is a valid program with a plausible result; `jax_debug_key_reuse`
sees neither copies under vmap nor two halves of a split that were mistaken for each other. So a program is traced, and
its equations are traced again in a way that also returns the keys that its random primitives take.
"""
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


class Used(NamedTuple):
    """Lists of keys [n, words]; of those that are split, the number of parts follows."""

    drawn: list
    split: list
    folded: list

    def add(self, other):
        for own, others in zip(self, other, strict=True):
            own.extend(others)


def reuse_checked(name):
    """JAX's own check, on but for a method that searches trees: it misfires on branches under vmap."""
    text = (pathlib.Path(__file__).parents[1] / "algorithms" / f"{name}.py").read_text()
    return jax.debug_key_reuse("import mctx" not in text)


def with_keys(function):
    """`function`, that returns (what it returned, Used). A branch that is not taken counts, too; of a `while` loop the
    first two rounds do."""
    def harvested(*args):
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
        outs, used = evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outs), used

    return harvested


def assert_once(used, lifted=False):
    """Each key has one use: one draw, or one split, or the names that Flax folds into it.

    A key may be split twice into equally many parts: the parts are the same keys, and these are checked here. Modules
    that are `lifted`, as by nn.vmap, split the keys that names are folded into, so there these are not checked.
    """
    drawn, split = np.concatenate(used.drawn), np.unique(np.concatenate(used.split), axis=0)
    folded = [] if lifted or not used.folded else [np.unique(np.concatenate(used.folded), axis=0)]
    keys = np.concatenate([drawn, split[:, :-1], *folded])
    assert len(np.unique(keys, axis=0)) == len(keys) > 1


def evaluate(jaxpr, consts, args):
    """(outputs, Used) of the equations."""
    values, used = {}, Used([], [], [])
    values.update(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(x):
        return x.val if isinstance(x, Literal) else values[x]

    def call(inner, args):
        inner, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
        outs, found = evaluate(inner, consts, args)
        used.add(found)
        return outs

    for eqn in jaxpr.eqns:
        args, params, name = [read(x) for x in eqn.invars], eqn.params, eqn.primitive.name
        inner = [value for value in params.values() if isinstance(value, (Jaxpr, ClosedJaxpr))]
        if name in ("random_bits", "random_split", "random_fold_in"):
            keys = as_rows(jax.random.key_data(args[0]))
        if name == "random_bits":
            used.drawn.append(keys)
        if name == "random_fold_in":
            used.folded.append(keys)
        if name == "random_split":
            number = jnp.full((len(keys), 1), math.prod(params["shape"]), keys.dtype)
            used.split.append(jnp.concatenate([keys, number], axis=1))
        if name == "scan":
            outs, found = scan(params, args)
            used.add(found)
        elif name == "while":
            args = args[params["cond_nconsts"]:]
            consts, outs = args[:params["body_nconsts"]], args[params["body_nconsts"]:]
            for _ in range(2):
                outs = call(params["body_jaxpr"], [*consts, *outs])
        elif name == "cond":
            index, *args = args
            outs = [lax.select_n(index, *cases) for cases in zip(
                *(call(branch, args) for branch in params["branches"]), strict=True)]
        elif inner and not name.startswith("scatter"):  # jit, custom derivatives, custom_vmap, remat
            outs = call(inner[0], args)
        else:
            outs = eqn.primitive.bind(*args, **params)
            outs = outs if eqn.primitive.multiple_results else [outs]
        values.update(zip(eqn.outvars, outs, strict=True))
    return [read(x) for x in jaxpr.outvars], used


def scan(params, args):
    places = np.split(np.arange(len(args)), np.cumsum([params["num_consts"], params["num_carry"]]))
    consts, state, xs = ([args[i] for i in part] for part in places)

    def body(state, x):
        outs, found = evaluate(params["jaxpr"].jaxpr, params["jaxpr"].consts, [*consts, *state, *x])
        return outs[:len(state)], (outs[len(state):], found)

    state, (ys, found) = lax.scan(body, state, xs, params["length"], params["reverse"])
    return [*state, *ys], jax.tree.map(as_rows, found)


def as_rows(keys):
    return keys.reshape(-1, keys.shape[-1])
