"""The whole run to disk and back, bit for bit.

A checkpoint is one file, `step_<n>.npz`: every array under its path in the tree, and `meta.json`, the text as bytes.
The zip format keeps a checksum of each of them. The file is written beside its place, flushed to disk and renamed into
its place, so it is there whole or not at all; `numpy.load` reads it.
"""
import concurrent.futures
import json
import os
import pathlib
import time
import zipfile
import zlib
from typing import Any

import jax
import numpy as np

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

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self.thread.shutdown()


def steps(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(pathlib.Path(folder).glob("step_*.npz"))


def best(folder: pathlib.Path) -> pathlib.Path:
    known = [(score, path) for path in steps(folder) if (score := read_meta(path)["score"]) is not None]
    if not known:
        raise UserError(f"{folder} has no best checkpoint: none has one score (a game between teams has several)")
    return max(known)[1]


def restore(path: pathlib.Path, like: Any, needed: Any = None) -> tuple[Any, dict]:
    """(tree, meta) of one checkpoint. `like` gives structure, shapes, types and places; names that it lacks are not
    read. `needed`, a tree of bools, says which arrays are read: the others are zeros that take no memory."""
    leaves, treedef = jax.tree.flatten_with_path(like)
    needed = [True] * len(leaves) if needed is None else jax.tree.leaves(needed)
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            meta = json.loads(stored[META].tobytes())
            if missing := [name for path_of, _ in leaves if (name := name_of(path_of)) not in stored.files]:
                raise UserError(f"{path} was written by another version of this algorithm: it has no {missing[0]}")
            values = [place(stored[name_of(path_of)] if read else None, leaf, f"{path}: {name_of(path_of)}")
                      for (path_of, leaf), read in zip(leaves, needed, strict=True)]
    except UserError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {' '.join(str(error).split())}") from error
    return jax.tree.unflatten(treedef, values), meta


def restore_newest(folder: pathlib.Path, like: Any, needed: Any = None) -> tuple[Any, dict]:
    """The newest checkpoint that is whole; says so in a line when a newer one is damaged."""
    for path in reversed(steps(folder)):
        try:
            return restore(path, like, needed)
        except DamagedCheckpoint as damage:
            print(f"warning: {damage}; trying the one before it", flush=True)
    raise UserError(f"no usable checkpoint in {folder}")


def read_meta(path: pathlib.Path) -> dict:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return json.loads(stored[META].tobytes())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedCheckpoint(f"checkpoint {path} is damaged: {' '.join(str(error).split())}") from error


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
    final, partial = folder / f"step_{step:012d}.npz", folder / f".step_{step:012d}.partial"
    try:
        with open(partial, "wb") as file:
            text = np.frombuffer(json.dumps(meta | {"step": step}).encode(), np.uint8)
            np.savez(file, **arrays, **{META: text})
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(folder)
    prune(folder, keep)
    return final


def prune(folder: pathlib.Path, keep: int) -> None:
    """A file goes at once or not at all, so a kill in between leaves whole checkpoints."""
    scores = {path: score for path in steps(folder) if (score := meta_or_nothing(path).get("score")) is not None}
    kept = {*steps(folder)[-keep:], *sorted(scores, key=lambda path: (scores[path], path.name))[-1:]}
    for path in [*steps(folder), *folder.glob(".step_*.partial")]:
        if path not in kept:
            path.unlink(missing_ok=True)


def meta_or_nothing(path: pathlib.Path) -> dict:
    try:
        return read_meta(path)
    except DamagedCheckpoint:
        return {}


def sync(folder: pathlib.Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
