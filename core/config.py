"""What a key of a config may hold, said in `get_config` beside its default:

    lr=positive(3e-4),  hidden_dims=count((64, 64)),  discount=fraction(0.99),  explore=choice("none", "joint")

The config gives the plain value: config.lr == 3e-4. `check` compares a config with what was said. Where nothing was
said a value has to be of the default's kind, and a number finite.
"""
from typing import Any

import ml_collections
import numpy as np

from core.errors import UserError


class Checked(ml_collections.FieldReference):
    """A value, what it has to be in words, and whether each of its entries is that, or all together are."""

    def __init__(self, value, words, holds, together=False):
        super().__init__(value)
        self.words, self.holds = words, holds if together else lambda value: all(map(holds, entries(value)))


def count(value):
    return Checked(value, "an integer from 1 on", lambda x: type(x) is int and x >= 1)


def whole(value):
    return Checked(value, "an integer from 0 on", lambda x: type(x) is int and x >= 0)


def number(value):
    return Checked(value, "a number", lambda x: True)


def positive(value):
    return Checked(value, "a number above 0", lambda x: x > 0)


def nonnegative(value):
    return Checked(value, "a number from 0 on", lambda x: x >= 0)


def fraction(value):
    return Checked(value, "a number from 0 to 1", lambda x: 0 <= x <= 1)


def rising(value):
    return Checked(value, "two numbers, the smaller one first", lambda x: len(x) == 2 and x[0] < x[1], together=True)


def choice(default, *others):
    known = default, *others
    return Checked(default, f"one of {', '.join(map(str, known))}", lambda x: x in known)


def check(config: Any, declared: ml_collections.ConfigDict) -> None:
    """Raises UserError at a key of `config` that is not what `declared`, an algorithm's get_config(), says.

    A config may have other keys, too, and a section may lack some. The section `smoke` holds keys of the config.
    """
    if missing := [name for name in declared if name not in config]:
        raise UserError(f'the config has no "{missing[0]}", which {declared.algorithm} needs')
    rules = dict(leaves(declared))
    for name, value in leaves(config.to_dict()):
        if numbers := [x for x in entries(value) if isinstance(x, float) and not np.isfinite(x)]:
            raise UserError(f"{name} = {numbers[0]}: not a finite number")
        if numbers := [x for x in entries(value) if type(x) is int and abs(x) >= 2**31]:
            raise UserError(f"{name} = {numbers[0]}: JAX counts to 2^31")
        rule = rules.get(name.removeprefix("smoke."))
        if rule is None:
            continue
        default = rule.get() if isinstance(rule, Checked) else rule
        if not alike(value, default):
            raise UserError(f"{name} = {value!r}: {kind(default)} is due, like {default!r}")
        if isinstance(rule, Checked) and not rule.holds(value):
            raise UserError(f"{name} = {value!r}: has to be {rule.words}")
    for name, value in config.items():
        if hasattr(declared.get(name), "items") and not hasattr(value, "items"):
            raise UserError(f"{name} = {value!r}: a section of keys is due")
        if hasattr(value, "items") and name in declared and not hasattr(declared.get(name), "items"):
            raise UserError(f"{name} = {value.to_dict()}: a section of keys where one value is due")


def check_settings(env: str, settings: Any, defaults: dict) -> None:
    """Raises UserError at a setting that an environment lacks, or that cannot be: not of its default's kind, negative
    where the default is not, 0 where the default is above 0."""
    for name, value in settings.items():
        if name not in defaults:
            raise UserError(f'environment "{env}" has no setting "{name}"; it has {", ".join(sorted(defaults))}')
        default, here = defaults[name], f'{name} = {value!r} of environment "{env}"'
        if default is None or kind(default) not in KINDS.values():  # of a package: it has to check that itself
            continue
        if form(value) != form(default) and default != () or kind(value) != kind(default):
            raise UserError(f"{here}: {kind(default)} is due, like {default!r}")
        if any(isinstance(x, float) and not np.isfinite(x) for x in entries(value)):
            raise UserError(f"{here}: not a finite number")
        if type(default) is int and type(value) is float:
            raise UserError(f"{here}: an integer is due, like {default!r}")
        if type(default) in (int, float) and (value < 0 <= default or value <= 0 < default):
            raise UserError(f"{here}: has to be {'above 0' if default > 0 else '0 or above'}")


def leaves(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """[(path, value)]; of `get_config` the values as they were declared."""
    known = dict(preserve_field_references=True) if type(config) is ml_collections.ConfigDict else {}
    found = []
    for name, value in config.items(**known):
        found += leaves(value, f"{prefix}{name}.") if hasattr(value, "items") else [(prefix + name, value)]
    return found


def entries(value: Any) -> list:
    """The numbers and strings of a value, out of all tuples."""
    return [x for part in value for x in entries(part)] if isinstance(value, (tuple, list)) else [value]


KINDS = {bool: "True or False", int: "a number", float: "a number", str: "a string", tuple: "a tuple", list: "a tuple"}


def kind(value: Any) -> str:
    return KINDS.get(type(value), type(value).__name__)


def form(value: Any) -> Any:
    """The kind of a value, or of each entry of a tuple, in as many tuples."""
    return [form(x) for x in value] if isinstance(value, (tuple, list)) else kind(value)


def alike(value: Any, default: Any) -> bool:
    if kind(value) != kind(default):
        return False
    return kind(value) != "a tuple" or len({kind(x) for x in entries([value, default])}) <= 1
