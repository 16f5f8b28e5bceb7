"""The plan of the report's run (section 3.2): 2048 H800, PP16 × DP128, EP64, 15360 sequences of 4096 tokens, FP8."""

from __future__ import annotations

import functools
from typing import Any

from dsv3c import driver
from dsv3c.plan import Plan

RUN: dict[str, Any] = {
    "target": "h800", "precision": "fp8", "mesh": "pp=16,dp=128,ep=64", "seq": 4096, "global_batch": 15360,
    "kernels": "none",
}  # fmt: skip


@functools.cache
def report_plan() -> Plan:
    """Compiled once for all tests of a process, by the default passes."""
    return driver.compile("deepseek-v3", **RUN)
