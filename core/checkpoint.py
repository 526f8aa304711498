"""The whole run to disk and back, bit for bit.

A checkpoint is one file, `step_<n>.npz`: every array under its path in the tree, and `meta.json`, the text as bytes.
The zip format keeps a checksum of each of them. The file is there whole or not at all; `numpy.load` reads it.
"""
import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
import time
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from core import files
from core.errors import UserError

META = "meta.json"


class DamagedCheckpoint(UserError):
    pass


def save(folder: pathlib.Path, step: int, tree: Any, meta: dict, keep: int = 2) -> pathlib.Path:
    """Write `tree` as `folder/step_<n>.npz`; the newest `keep` stay, and the best by `meta["score"]` if it is known."""
    return _write(pathlib.Path(folder), step, to_host(tree), meta, keep)


class Writer:
    """Writes checkpoints in a thread, so that training waits for a copy in memory alone."""

    def __init__(self, folder: pathlib.Path, every: float = 0.0, keep: int = 2):
        """`every`: seconds between two checkpoints at least. Where a copy takes long they are rarer: it takes at most
        one part in 20 of the time. 0: whenever there is something new."""
        self.folder, self.every, self.keep = pathlib.Path(folder), every, keep
        self.thread, self.pending = concurrent.futures.ThreadPoolExecutor(1), None
        self.saved_at, self.paused = time.perf_counter(), 0.0

    @property
    def due(self) -> bool:
        return self.free and time.perf_counter() - self.saved_at >= self.every

    @property
    def free(self) -> bool:
        """Whether another copy would keep the pauses below one part in 20."""
        return self.every == 0 or time.perf_counter() - self.saved_at >= 19 * self.paused

    def save(self, step: int, tree: Any, meta: dict) -> None:
        began = time.perf_counter()
        self.wait()
        self.pending = self.thread.submit(_write, self.folder, step, to_host(tree), meta, self.keep)
        self.saved_at = time.perf_counter()
        self.paused = self.saved_at - began

    def wait(self) -> None:
        """Until the last checkpoint is on disk; raises what went wrong there."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raises what went wrong, unless the last checkpoint is still being written."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self.thread.shutdown()


def steps(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(pathlib.Path(folder).glob(f"step_{12 * '[0-9]'}.npz"))


def best(folder: pathlib.Path) -> pathlib.Path:
    known = [(score, path) for path in steps(folder) if (score := score_of(path, warn=True)) is not None]
    if not known:
        raise UserError(f"{folder} has no best checkpoint: none has one score (a game between teams has several)")
    return max(known)[1]


def restore(path: pathlib.Path, like: Any, needed: Any = None) -> tuple[Any, dict]:
    """(tree, meta) of one checkpoint. `like` gives structure, shapes, types and places; names that it lacks are not
    read. `needed`, a tree of bools, says which arrays are read: the others are zeros that take no memory."""
    leaves, treedef = jax.tree.flatten_with_path(like)
    needed = [True] * len(leaves) if needed is None else jax.tree.leaves(needed)
    with opened(path) as (stored, meta):
        if missing := [name for path_of, _ in leaves if (name := name_of(path_of)) not in stored.files]:
            raise UserError(f"{path} was written by another version of this algorithm: it has no {missing[0]}")
        values = [place(stored[name_of(path_of)] if read else None, leaf, f"{path}: {name_of(path_of)}")
                  for (path_of, leaf), read in zip(leaves, needed, strict=True)]
    return jax.tree.unflatten(treedef, values), meta


def restore_newest(folder: pathlib.Path, like: Any, needed: Any = None) -> tuple[Any, dict]:
    """The newest checkpoint that is whole; says so in a line when a newer one is damaged."""
    for path in reversed(steps(folder)):
        try:
            return restore(path, like, needed)
        except DamagedCheckpoint as damage:
            print(f"warning: {damage}; trying the one before it", flush=True)
    raise UserError(f"no usable checkpoint in {folder}")


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[tuple[Any, dict]]:
    """(arrays, meta) of a checkpoint, which need not be one."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            meta = json.loads(stored[META].tobytes(), parse_int=files.whole_number)
            if type(meta["step"]) is not int or type(meta["score"]) not in (int, float, type(None)):
                raise ValueError(f"step or score in {META}")
            yield stored, meta
    except (UserError, jax.errors.JaxRuntimeError):
        raise
    except MemoryError as error:
        raise UserError(f"{path}: too little memory to read it") from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, zipfile.BadZipFile,
            zlib.error) as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {' '.join(str(error).split())}") from error


def score_of(path: pathlib.Path, warn: bool = False) -> float | None:
    try:
        with opened(path) as (_, meta):
            return None if meta["score"] is None or math.isnan(meta["score"]) else meta["score"]
    except DamagedCheckpoint as damage:
        if warn:
            print(f"warning: {damage}", flush=True)
        return None


def to_host(tree: Any) -> dict[str, np.ndarray]:
    """{name: copy}; typed keys as their data. Copies, because the next chunk of training reuses the memory."""
    named = jax.tree.flatten_with_path(tree)[0]
    return {name_of(path): np.array(jax.random.key_data(leaf) if is_key(leaf) else leaf) for path, leaf in named}


def name_of(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def place(value: np.ndarray | None, like: Any, name: str) -> Any:
    shape, dtype = like.shape, like.dtype
    if is_key(like):
        data = jax.eval_shape(jax.random.key_data, like)
        shape, dtype = data.shape, data.dtype
    if value is None:
        value = np.broadcast_to(np.zeros((), dtype), shape)
        return value if not is_key(like) else jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
    if value.dtype.kind == "V":  # numpy has no bfloat16 and stores its bytes
        value = value.view(dtype)
    if value.shape != shape or value.dtype != dtype:
        raise UserError(f"{name} is {value.shape} {value.dtype} where {shape} {dtype} is due")
    if is_key(like):
        value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
    sharding = getattr(like, "sharding", None)
    return jax.device_put(value, sharding) if sharding is not None else jax.numpy.asarray(value)


def _write(folder, step, arrays, meta, keep):
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{step:012d}.npz"
    with files.replacing(final) as partial, open(partial, "wb") as file:
        text = np.frombuffer(json.dumps(meta | {"step": step}).encode(), np.uint8)
        np.savez(file, **arrays, **{META: text})
    sync(folder)
    prune(folder, step, keep)
    return final


def prune(folder: pathlib.Path, step: int, keep: int = 2) -> None:
    """Of the checkpoints up to `step`, which is whole, the newest `keep` and the best stay. Later ones are damaged: the
    run went on from `step`. A file goes at once or not at all, so a kill in between leaves whole checkpoints."""
    past = [path for path in steps(folder) if path.name <= f"step_{step:012d}.npz"]
    scores = {path: score for path in past if (score := score_of(path)) is not None}
    kept = {*past[-keep:], *sorted(scores, key=lambda path: (scores[path], path.name))[-1:]}
    for path in steps(folder):
        if path not in kept:
            path.unlink(missing_ok=True)


def sync(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
