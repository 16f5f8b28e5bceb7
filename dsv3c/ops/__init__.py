"""The ops, one file per family; every OpDef at module level in this folder is in `REGISTRY`."""

from __future__ import annotations

from dsv3c.discover import defined_in
from dsv3c.op import OpDef, Registry

REGISTRY = Registry(defined_in(__name__, OpDef))


def register(op: OpDef) -> OpDef:
    """Add an op defined outside the package; returns it."""
    return REGISTRY.register(op)
