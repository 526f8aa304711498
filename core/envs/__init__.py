"""Environments by name: `gymnax/CartPole-v1` comes from that package, a plain name is a file of this folder."""
import difflib
import importlib
import inspect
import pathlib

from core.config import check_settings
from core.envs.batch import Batch, repeat, restart
from core.envs.interface import Box, Discrete, TimeStep, Transition, ended, require
from core.errors import UserError

__all__ = ["Batch", "Box", "Discrete", "TimeStep", "Transition", "ended", "make_env", "repeat", "require", "restart"]

HERE = pathlib.Path(__file__).parent


def make_env(name: str, num_envs: int, /, **kwargs):
    """`num_envs` copies of the environment `name`; `kwargs` are its own settings."""
    source, rest = name.split("/", 1) if "/" in name else ("", name)
    if source == "gymnasium":  # simulated on the host, already a batch
        from core.envs.from_gymnasium import HostBatch
        return HostBatch(rest, num_envs, **kwargs)
    module = f"from_{source}" if source else name
    file = HERE / f"{module}.py"
    if module.startswith("from_") != bool(source) or not file.exists() or "\nclass Env" not in file.read_text():
        known = [p.stem for p in HERE.glob("*.py") if "\nclass Env" in p.read_text()]
        known = [k.removeprefix("from_") + "/…" if k.startswith("from_") else k for k in [*known, "from_gymnasium"]]
        close = difflib.get_close_matches(name, known, n=1) or [", ".join(sorted(known))]
        raise UserError(f'unknown environment "{name}"; did you mean {close[0]}?')
    make = importlib.import_module(f"core.envs.{module}").Env
    if source:  # which checks its own settings
        return Batch(make(rest, **kwargs), num_envs)
    check_settings(name, kwargs, {key: setting.default for key, setting in inspect.signature(make).parameters.items()})
    return Batch(make(**kwargs), num_envs)
