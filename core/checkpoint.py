"""The whole run to disk and back, bit for bit.

A checkpoint is a folder `step_<n>`: the arrays (Orbax), `meta.json`, and `manifest.json` with the hash of every file.
It is written beside its place and renamed into it, so it is there whole or not at all.
"""
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from core.errors import UserError


def save(folder: pathlib.Path, step: int, run: Any, meta: dict, keep: int = 2) -> pathlib.Path:
    """Write `run` as `folder/step_<n>` and keep the newest `keep` and the best by `meta["score"]`."""
    folder = pathlib.Path(folder).absolute()
    final, partial = folder / f"step_{step:012d}", folder / f"partial_{step:012d}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _orbax().save(partial / "arrays", jax.tree.map(np.asarray, _to_arrays(run)))
    (partial / "meta.json").write_text(json.dumps(meta | {"step": step}))
    (partial / "manifest.json").write_text(json.dumps(_hashes(partial)))
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    _prune(folder, keep)
    return final


def steps(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(pathlib.Path(folder).glob("step_*"))


def best(folder: pathlib.Path) -> pathlib.Path:
    return max(steps(folder), key=lambda path: (_meta(path)["score"], path.name))


def restore(path: pathlib.Path, like: Any) -> tuple[Any, dict]:
    """(run, meta) from one checkpoint. `like` gives structure, shapes and shardings; raises UserError if damaged."""
    path = pathlib.Path(path).absolute()
    verify(path)
    target = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(_to_arrays, like))
    try:
        stored = _orbax().restore(path / "arrays", target)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} was written by another version of this algorithm: {error}".split("\n")[0]) from error
    leaves, treedef = jax.tree.flatten_with_path(like)
    values = [_place(stored[jax.tree_util.keystr(name)], leaf) for name, leaf in leaves]
    return jax.tree.unflatten(treedef, values), _meta(path)


def restore_newest(folder: pathlib.Path, like: Any) -> tuple[Any, dict]:
    """The newest checkpoint that is whole; says so in a line when a newer one is damaged."""
    for path in reversed(steps(folder)):
        try:
            return restore(path, like)
        except DamagedCheckpoint as damage:
            print(f"warning: {damage}; trying the one before it", flush=True)
    raise UserError(f"no usable checkpoint in {folder}")


class DamagedCheckpoint(UserError):
    pass


def verify(path: pathlib.Path) -> None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} has no readable manifest.json") from error
    found = _hashes(path)
    for name in sorted(manifest.keys() | found.keys()):
        if manifest.get(name) != found.get(name):
            state = "missing" if name not in found else "damaged"
            raise DamagedCheckpoint(f"checkpoint {path}: {name} is {state}")


def _to_arrays(run):
    """{path in the tree: array}; typed keys as their data."""
    def raw(x):
        return jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    return {jax.tree_util.keystr(name): raw(leaf) for name, leaf in jax.tree.flatten_with_path(run)[0]}


def _place(value, like):
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
    if value.dtype != like.dtype or value.shape != like.shape:
        raise UserError(f"the checkpoint holds {value.shape} {value.dtype} where {like.shape} {like.dtype} is due")
    sharding = getattr(like, "sharding", None)
    return jax.device_put(value, sharding) if sharding is not None else jax.numpy.asarray(value)


def _orbax():
    import orbax.checkpoint as ocp  # here, because importing it takes longer than many a command lasts
    from orbax.checkpoint.options import MultiprocessingOptions

    me = jax.process_index()
    alone = MultiprocessingOptions(primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}")
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _hashes(path):
    files = [p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json"]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def _meta(path):
    return json.loads((path / "meta.json").read_text())


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _prune(folder, keep):
    kept = {*steps(folder)[-keep:], best(folder)}
    for path in [*steps(folder), *folder.glob("partial_*")]:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)
