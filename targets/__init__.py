"""Targets: each is a machine in numbers and the emitters that make its kernels."""

from __future__ import annotations

if __name__ != "dsv3c.targets":
    raise ImportError("import this folder as dsv3c.targets")
