"""What the commands print: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence


def tell(text: str) -> None:
    """One line for the person at the keyboard; it is no part of the result."""
    print(text, file=sys.stderr, flush=True)


def write_json(value: object) -> None:
    """The result as one JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(rows: Sequence[Sequence[str]], indent: int = 0, right: Sequence[int] = ()) -> str:
    """Aligned columns; those numbered in `right` are flush right."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def size(count: int) -> str:
    """Bytes in words, for example `12.34 GiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


def number(count: int) -> str:
    """A whole number with separators, and its magnitude when that helps: `671,026,419,200 (671.03 B)`."""
    for scale, unit in ((10**9, "B"), (10**6, "M")):
        if count >= scale:
            return f"{count:,} ({count / scale:.2f} {unit})"
    return f"{count:,}"
