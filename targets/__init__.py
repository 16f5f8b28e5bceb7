"""Targets: each is a machine in numbers and the emitters that make its kernels."""

from __future__ import annotations

if __name__ != "dsv3c.targets":
    raise ImportError(f"this folder is the package dsv3c.targets: write 'import dsv3c.targets', not 'import {__name__}'")
