"""Transitions from the HDF5 files of D4RL, where h5py is installed: the extra "offline".

Such a file has `observations`, `actions`, `rewards`, `terminals` and `timeouts`, one row a step, one episode after
another. Most have `next_observations`. Where they are missing, the successor of a step is the observation of the next
row, and
- the last step of an episode that was cut by a time limit is dropped, because its successor is in no row. The step
  before it becomes the truncated one;
- a step that ends in a terminal state stays, with its own observation as next_obs: nothing bootstraps from there.
"""
import os
from typing import Any

import numpy as np

from core.errors import UserError
from core.minari import package

NAMES = dict(obs="observations", action="actions", reward="rewards", terminated="terminals", truncated="timeouts")


def read(path: str | os.PathLike) -> dict[str, Any]:
    """All steps of the file: leaves [N, ...], numbers with a comma as float32."""
    stored = arrays_of(path)
    data = {name: stored[theirs] for name, theirs in NAMES.items()}
    terminated, timeout = data["terminated"] != 0, data["truncated"] != 0
    data |= dict(terminated=terminated, truncated=timeout & ~terminated)
    if "next_observations" in stored:
        data["next_obs"] = stored["next_observations"]
    else:
        data = with_successors(data)
        if not len(data["reward"]):
            raise UserError(f"{path}: no step has a successor")
    return {name: x.astype(np.float32) if x.dtype.kind == "f" else x for name, x in data.items()}


def with_successors(data: dict[str, Any]) -> dict[str, Any]:
    """The steps whose successors are known, and next_obs."""
    obs, terminated, last = data["obs"], data["terminated"], data["truncated"].copy()
    last[-1] |= not terminated[-1]  # the file ends in the middle of an episode
    cut = np.append(last[1:], False) & ~terminated & ~last  # the next row is dropped, so the episode stops here
    next_obs = np.where(terminated.reshape(-1, *(1,) * (obs.ndim - 1)), obs, np.append(obs[1:], obs[-1:], axis=0))
    return {name: x[~last] for name, x in (data | dict(truncated=cut, next_obs=next_obs)).items()}


def arrays_of(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """What `read` needs of the file, equally long, of finite real numbers."""
    h5py, due, arrays = package("h5py"), (*NAMES.values(), "next_observations"), {}
    try:
        with h5py.File(path, "r") as file:
            for name in (name for name in due if name in file):
                if not isinstance(file[name], h5py.Dataset) or file[name].dtype.kind not in "biuf":
                    raise UserError(f"{path}: {name} is of type {getattr(file[name], 'dtype', 'group')}, which is no "
                                    "real number")
                arrays[name] = file[name][()]
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no HDF5 file, or is damaged: {error}") from error
    if missing := [name for name in NAMES.values() if name not in arrays]:
        raise UserError(f'{path} has no "{missing[0]}"')
    sizes = {name: len(np.atleast_1d(x)) for name, x in arrays.items()}
    if wrong := [name for name, size in sizes.items() if size != sizes["rewards"]]:
        raise UserError(f"{path}: rewards has {sizes['rewards']} rows, {wrong[0]} has {sizes[wrong[0]]}")
    if wrong := [name for name in ("rewards", "terminals", "timeouts") if arrays[name].ndim != 1]:
        raise UserError(f"{path}: {wrong[0]} is {arrays[wrong[0]].shape}: one number for each step is due")
    if not len(arrays["rewards"]):
        raise UserError(f"{path} holds no steps")
    if wrong := [name for name, x in arrays.items() if not np.isfinite(x).all()]:
        raise UserError(f"{path}: {wrong[0]} has numbers that are not finite")
    return arrays
