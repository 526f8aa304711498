"""Transitions as nested dictionaries of arrays: a `Dataset` that stays as it is, a `ReplayBuffer` that forgets."""
import os
import zipfile
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from core import files
from core.errors import UserError


def permutation(key: jax.Array, n: int) -> jax.Array:
    """0 .. n − 1 in random order [n]: one sort of one array, eight times as fast as `jax.random.permutation` at 8192.

    Random high bits, the index in the low bits. Entries whose random bits agree keep their order: a fraction n² / 2^32
    of all neighbours, 1.6% at n = 8192.
    """
    bits = max(1, (n - 1).bit_length())
    index = jnp.arange(n, dtype=jnp.uint32)
    packed = jnp.sort((jax.random.bits(key, (n,), jnp.uint32) << bits) | index)
    return (packed & jnp.uint32((1 << bits) - 1)).astype(jnp.int32)


class Dataset(struct.PyTreeNode):
    """N transitions, one episode after another, each in the order of time: leaves [N, ...].

    Among them `terminated` and `truncated`. An episode stops at either, and where the data stop. An offline method gets
    it in the place of an environment: an argument of the compiled program, shared by all seeds.
    """

    data: dict[str, Any]
    starts: jax.Array  # [N] all steps, those with most steps left first: the possible starts of every window lead
    left: jax.Array  # [N] how many steps those have left in their episode, themselves included
    longest: int = struct.field(pytree_node=False)
    action_space: Any = struct.field(pytree_node=False, default=None)  # Discrete or Box of the environment it is from

    @classmethod
    def create(cls, data: dict[str, Any], action_space: Any = None) -> "Dataset":
        shapes = {name: np.shape(leaf) for name, leaf in flatten_dict(data, sep="/").items()}
        if scalars := [name for name, shape in shapes.items() if not shape]:
            raise UserError(f'"{scalars[0]}" of a dataset is one number, not one for each step')
        sizes = {name: shape[0] for name, shape in shapes.items()}
        if missing := {"terminated", "truncated"} - sizes.keys():
            raise UserError(f'a dataset says where its episodes end: "{min(missing)}" is missing')
        for name in ("terminated", "truncated"):
            if len(shapes[name]) != 1:
                raise UserError(f'"{name}" of a dataset is {shapes[name]}: one number for each step is due')
        n = sizes["truncated"]
        if wrong := [f'"{name}" has {size}' for name, size in sizes.items() if size != n]:
            raise UserError(f'lengths in a dataset differ: "truncated" has {n} entries, {wrong[0]}')
        if n == 0:
            raise UserError("a dataset without entries")
        data = {**data, **{name: np.asarray(data[name]) != 0 for name in ("terminated", "truncated")}}
        last = last_steps(data)
        left = last[np.searchsorted(last, np.arange(n))] - np.arange(n) + 1
        starts = np.argsort(-left, kind="stable")
        return cls(jax.tree.map(jnp.asarray, data), jnp.int32(starts), jnp.int32(left[starts]), int(left.max()),
                   action_space)

    @property
    def size(self) -> int:
        return self.left.shape[0]

    def sample(self, key: jax.Array, batch_size: int) -> dict[str, Any]:
        """Transitions drawn with replacement, leaves [batch_size, ...]."""
        index = jax.random.randint(key, (batch_size,), 0, self.size)
        return jax.tree.map(lambda x: x[index], self.data)

    def sample_trajectories(self, key: jax.Array, batch_size: int, length: int) -> dict[str, Any]:
        """Windows of consecutive steps of one episode, leaves [length, batch_size, ...], uniform over all there are."""
        if length > self.longest:
            raise UserError(f"windows of {length} steps asked for, but the longest episode has {self.longest}")
        count = (self.left >= length).sum()
        start = self.starts[jax.random.randint(key, (batch_size,), 0, count)]
        index = start[None] + jnp.arange(length)[:, None]
        return jax.tree.map(lambda x: x[index], self.data)

    def save(self, path: str | os.PathLike) -> None:
        write_arrays(path, self.data)

    @classmethod
    def load(cls, path: str | os.PathLike, action_space: Any = None) -> "Dataset":
        return cls.create(read_arrays(path), action_space)


def last_steps(data: dict[str, Any]) -> np.ndarray:
    """Where the episodes stop; the place where the data do may be there twice."""
    done = np.asarray(data["terminated"], bool) | np.asarray(data["truncated"], bool)
    return np.append(np.flatnonzero(done), len(done) - 1)


def write_arrays(path: str | os.PathLike, tree: dict[str, Any]) -> None:
    """One .npz, whole or not at all; the names of a nested dictionary are joined by "/"."""
    with files.replacing(path) as partial, open(partial, "wb") as file:
        np.savez(file, **jax.tree.map(np.asarray, flatten_dict(tree, sep="/")))


def read_arrays(path: str | os.PathLike) -> dict[str, Any]:
    """What `write_arrays` wrote: numpy arrays of finite numbers, nested as they were."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:  # a pickle could run anything
            arrays = dict(arrays)
            for name, value in arrays.items():
                if value.dtype.kind not in "biuf":
                    raise UserError(f"{path}: {name} is of type {value.dtype}, which is no real number")
                if not np.isfinite(value).all():
                    raise UserError(f"{path}: {name} has numbers that are not finite")
            return unflatten_dict(arrays, sep="/")
    except UserError:
        raise
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} holds no arrays, or is damaged: {error}") from error


class ReplayBuffer(struct.PyTreeNode):
    """A ring of the last `capacity` transitions: leaves [capacity, ...]."""

    data: dict[str, Any]
    pos: jax.Array  # where the next transition goes
    size: jax.Array  # how many there are

    @classmethod
    def create(cls, example: dict[str, Any], capacity: int) -> "ReplayBuffer":
        """Empty, for transitions shaped like `example`: arrays without a leading axis, or their `jax.eval_shape`."""
        data = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), example)
        return cls(data, jnp.int32(0), jnp.int32(0))

    @classmethod
    def from_dataset(cls, dataset: Dataset, capacity: int) -> "ReplayBuffer":
        if dataset.size > capacity:
            raise UserError(f"a dataset of {dataset.size} transitions does not fit a buffer of {capacity}")
        return cls.create(jax.tree.map(lambda x: x[0], dataset.data), capacity).add(dataset.data)

    @property
    def capacity(self) -> int:
        return jax.tree.leaves(self.data)[0].shape[0]

    def add(self, batch: dict[str, Any]) -> "ReplayBuffer":
        """Append leaves [n, ...], oldest first; of more than fit only the last remain."""
        n = jax.tree.leaves(batch)[0].shape[0]
        kept = min(n, self.capacity)
        # One row more, which lands outside and is dropped. XLA takes the write of a single row for a cheap operation,
        # does it again inside whatever reads the buffer, and so has to copy the whole buffer before.
        index = jnp.append((self.pos + jnp.arange(n - kept, n)) % self.capacity, self.capacity)

        def write(old, new):
            rows = jnp.concatenate([new[n - kept:], new[-1:]])
            return old.at[index].set(rows, unique_indices=True)

        data = jax.tree.map(write, self.data, batch)
        return ReplayBuffer(data, (self.pos + n) % self.capacity, jnp.minimum(self.size + n, self.capacity))

    def sample(self, key: jax.Array, batch_size: int) -> dict[str, Any]:
        """Transitions drawn with replacement, leaves [batch_size, ...]. There must be one."""
        index = jax.random.randint(key, (batch_size,), 0, self.size)
        return jax.tree.map(lambda x: x[index], self.data)

    def sample_trajectories(
        self, key: jax.Array, batch_size: int, length: int, done: jax.Array | None = None, num_envs: int = 1,
    ) -> dict[str, Any]:
        """Windows of consecutive steps of one environment, oldest first, leaves [length, batch_size, ...].

        Uniform over all windows that do not run from the newest entry into the oldest and, given `done` [capacity],
        have it at their last step at most. There must be one. `num_envs` transitions make one step of time: additions
        are [num_envs, ...], or stacked rollouts, time first. Finding the windows passes over the whole buffer, about
        1 ms per 100k entries on a CPU, so where that counts, draw the windows of many updates at once.
        """
        oldest, span = self.pos - self.size, (length - 1) * num_envs
        if done is None:
            start = jax.random.randint(key, (batch_size,), 0, self.size - span)
        else:
            age = jnp.arange(self.capacity)
            going_on = ~done.astype(bool)[(oldest + age) % self.capacity]
            count = jnp.cumsum(all_of_next(going_on, length - 1, num_envs) & (age < self.size - span))
            start = jnp.searchsorted(count, jax.random.randint(key, (batch_size,), 0, count[-1]), side="right")
        index = (oldest + start[None] + num_envs * jnp.arange(length)[:, None]) % self.capacity
        return jax.tree.map(lambda x: x[index], self.data)


def all_of_next(flag: jax.Array, n: int, stride: int) -> jax.Array:
    """[N] whether flag[i], flag[i + stride], … (n of them, around the end) are all true, in log2 n steps."""
    if n == 0:
        return jnp.ones_like(flag)
    width = 1
    while 2 * width <= n:
        flag, width = flag & jnp.roll(flag, -width * stride), 2 * width
    return flag & jnp.roll(flag, -(n - width) * stride)
