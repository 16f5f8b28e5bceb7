"""What can go wrong, sorted by whose fault it is; every message says what, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Dsv3cError(Exception):
    """Base of every error that dsv3c raises on purpose; the command line prints it without a traceback."""

    exit_status = 1


class InputError(Dsv3cError):
    """What the user gave is wrong: a flag, a file, a configuration, a program text."""

    exit_status = 2


class WorkError(Dsv3cError):
    """The input was good but the work failed: full disk, lost data, a device that is not there."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest known one, or the whole list if none is near."""
    choices = sorted({*known})
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(choices)}"
