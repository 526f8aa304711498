"""Transitions to and from the datasets of Minari, where that package is installed: the extra "offline".

Minari stores T + 1 observations of an episode of T steps, Monograph the obs and next_obs of every step.
"""
import inspect
import warnings
from typing import Any

import jax
import numpy as np

from core.dataset import last_steps
from core.envs.interface import Discrete
from core.errors import UserError


def write(name: str, data: dict[str, Any], action_space: Any) -> None:
    """The episodes of `data`, leaves [N, ...] as in `Dataset`, as the local Minari dataset `name`."""
    minari, spaces = package(), package("gymnasium").spaces
    require_free(name)

    def space(tree):
        if isinstance(tree, dict):
            return spaces.Dict({name: space(leaf) for name, leaf in tree.items()})
        if tree.dtype.kind == "f":
            return spaces.Box(-np.inf, np.inf, tree.shape[1:], tree.dtype)
        return spaces.Box(np.iinfo(tree.dtype).min, np.iinfo(tree.dtype).max, tree.shape[1:], tree.dtype)

    data, begin, buffers = jax.tree.map(np.asarray, data), 0, []
    discrete = isinstance(action_space, Discrete)
    for end in np.unique(last_steps(data)) + 1:
        own = jax.tree.map(lambda leaf: leaf[begin:end], data)  # noqa: B023
        obs = jax.tree.map(lambda obs, after: np.append(obs, after[-1:], 0), own["obs"], own["next_obs"])
        buffers.append(minari.data_collector.EpisodeBuffer(
            id=len(buffers), observations=obs, actions=own["action"],
            rewards=own["reward"], terminations=own["terminated"], truncations=own["truncated"], infos={}))
        begin = end
    create = minari.create_dataset_from_buffers
    # By default images become JPEG files, which are not what was seen.
    exact = {"jpeg_encoding": False} if "jpeg_encoding" in inspect.signature(create).parameters else {}
    with warnings.catch_warnings(action="ignore"):  # about authors and e-mail addresses
        create(name, buffers, observation_space=space(data["obs"]),
               action_space=spaces.Discrete(action_space.n) if discrete else space(data["action"]), **exact)


def read(name: str) -> dict[str, Any]:
    """All episodes of the Minari dataset `name`: leaves [N, ...], numbers with a comma as float32."""
    if not exists(name):
        raise UserError(f'no Minari dataset "{name}" on this machine: minari download {name}')
    rows = [dict(obs=jax.tree.map(lambda x: x[:-1], e.observations),
                 next_obs=jax.tree.map(lambda x: x[1:], e.observations), action=e.actions, reward=e.rewards,
                 terminated=e.terminations, truncated=e.truncations) for e in package().load_dataset(name)]
    data = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
    return jax.tree.map(lambda x: x.astype(np.float32) if x.dtype == np.float64 else x, data)


def require_free(name: str) -> None:
    if exists(name):
        raise UserError(f'there is a Minari dataset "{name}" already: choose another name')


def exists(name: str) -> bool:
    minari = package()
    try:
        minari.dataset.minari_dataset.parse_dataset_id(name)
    except (ValueError, TypeError) as error:
        raise UserError(f'"{name}" is no name of a Minari dataset, as "cartpole/random-v0" is') from error
    return name in minari.list_local_datasets()


def package(name="minari"):
    try:
        return __import__(name)
    except ImportError as error:
        raise UserError(f'the package {name} is not installed: pip install -e ".[offline]"') from error
