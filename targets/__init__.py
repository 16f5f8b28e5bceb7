"""Targets: each is a machine in numbers and the emitters that make its kernels."""

from __future__ import annotations

from collections.abc import Mapping

if __name__ != "dsv3c.targets":
    raise ImportError(f"this folder is dsv3c.targets: write 'import dsv3c.targets', not 'import {__name__}'")

from dsv3c.discover import defined_in
from dsv3c.errors import InputError, did_you_mean
from dsv3c.target import Target

_targets: dict[str, Target] = {}
TARGETS: Mapping[str, Target] = _targets
"""Targets by name."""


def register(target: Target) -> Target:
    """Add a target; returns it. Raises InputError if another has its name."""
    if _targets.get(target.name, target) is not target:
        raise InputError(f"the target '{target.name}' is registered twice; choose another name")
    _targets[target.name] = target
    return target


def find(name: str) -> Target:
    """The target called `name`; InputError with the nearest name if there is none."""
    if name not in _targets:
        raise InputError(f"--target {name} is unknown; {did_you_mean(name, _targets)}")
    return _targets[name]


for _target in defined_in(__name__, Target):
    register(_target)
