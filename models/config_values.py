"""Checks of single JSON values: each says None for a good value, else what the value must be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Check = Callable[[object], str | None]


def is_int(value: object) -> TypeIs[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> TypeIs[float | int]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def show(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def size(value: object) -> str | None:
    return None if is_int(value) and value > 0 else "a positive integer"


def count(value: object) -> str | None:
    return None if is_int(value) and value >= 0 else "an integer from 0 up"


def rank(value: object) -> str | None:
    return None if value is None or size(value) is None else "a positive integer or null"


def positive(value: object) -> str | None:
    return None if is_real(value) and value > 0 else "a number above 0"


def real(value: object) -> str | None:
    return None if is_real(value) and value >= 0 else "a number from 0 up"


def flag(value: object) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def token(value: object) -> str | None:
    return None if value is None or is_int(value) else "an integer or null"


def tokens(value: object) -> str | None:
    several = isinstance(value, list | tuple) and len(value) > 0 and all(is_int(item) for item in value)
    return None if several or token(value) is None else "an integer, a list of integers or null"


def only(supported: object, why: str) -> Check:
    def check(value: object) -> str | None:
        good = type(value) in (type(supported), int) and value == supported
        return None if good else f"{show(supported)}: {why}"

    return check
