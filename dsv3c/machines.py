"""A machine with some of its figures replaced: what would it be with a faster network, or fewer SMs?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from dsv3c.errors import InputError, did_you_mean
from dsv3c.ir import DTYPES
from dsv3c.target import Machine

TABLES = ("matrix_flops", "efficiency", "exchange")
"""Fields that are tables: by element type, by op, element type or `memory`, and by number of units."""

MAY_BE_ZERO = ("latency", "fast_latency", "slow_latency", "hops_together")


def override(machine: Machine, changes: Iterable[str]) -> Machine:
    """The machine with fields replaced as each `KEY=VALUE` says; KEY is a field, or `TABLE.ENTRY`.

    Raises InputError for a field that there is not, or what is no number.
    """
    for text in changes:
        key, equals, value = text.partition("=")
        name, dot, entry = key.strip().partition(".")
        known = [f.name for f in dataclasses.fields(machine) if f.name != "name"]
        if not equals:
            raise InputError(f"--set {text}: write KEY=VALUE, for example slow_link=80e9 or matrix_flops.e4m3=4e15")
        if name not in known:
            raise InputError(f"--set {text}: a machine has no '{name}'; {did_you_mean(name, known)}")
        if (name in TABLES) is not bool(dot):
            raise InputError(f"--set {text}: write {name}.ENTRY=VALUE" if name in TABLES else
                             f"--set {text}: '{name}' is one number; write {name}=VALUE")  # fmt: skip
        number = _number(value, text, isinstance(getattr(machine, name), int), name in MAY_BE_ZERO)
        changed = _with(machine, name, entry, number, text) if dot else number
        machine = dataclasses.replace(machine, **{name: changed})  # type: ignore[arg-type]
    return machine


def _number(value: str, text: str, whole: bool, zero: bool) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf") or (not number and not zero) or (whole and number != int(number)):
        least = "from 0" if zero else "above 0"
        raise InputError(f"--set {text}: '{value}' is not a {'whole ' if whole else ''}number {least}")
    return int(number) if whole else number


def _with(machine: Machine, name: str, entry: str, number: float, text: str) -> tuple[tuple[object, float], ...]:
    """The table `name` with one entry replaced or added."""
    table: tuple[tuple[object, float], ...] = getattr(machine, name)
    key: object = entry
    if name == "matrix_flops":
        if entry not in DTYPES:
            raise InputError(f"--set {text}: there is no element type '{entry}'; {did_you_mean(entry, DTYPES)}")
        key = DTYPES[entry]
    elif name == "exchange":
        if not entry.isdecimal() or not int(entry):
            raise InputError(f"--set {text}: '{entry}' is not a number of units")
        points = {int(str(k)): v for k, v in table} | {int(entry): number}
        return tuple(sorted(points.items()))
    return tuple({**dict(table), key: number}.items())
