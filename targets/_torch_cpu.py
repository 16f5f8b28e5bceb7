"""How torch executes each op on the CPU, by op name."""

from __future__ import annotations

from collections.abc import Mapping

from dsv3c.target import Implementation

IMPLEMENTATIONS: Mapping[str, Implementation] = {}
"""Ops without an entry run by their references."""
