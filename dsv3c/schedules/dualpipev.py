"""DualPipeV: one of DualPipe's two replicas, folded into a V, so that no weight is held twice.

On one rank, forward of one half of the layers overlaps with backward of the other.
"""

from __future__ import annotations

from dsv3c.schedule import Kind, Rows, folded
from dsv3c.schedules._units import bidirectional, row


def _refusal(ranks: int, micro_batches: int) -> str | None:
    if micro_batches < 2 * ranks:
        return f"it needs at least 2 micro-batches per rank ({2 * ranks})"
    return None


def _rows(ranks: int, micro_batches: int) -> Rows:
    return tuple(
        row(bidirectional(ranks, rank, micro_batches), (rank, 2 * ranks - 1 - rank), (0, 0)) for rank in range(ranks)
    )


DUALPIPEV = Kind(
    "dualpipev",
    "DualPipeV: DualPipe folded into a V of 2 stages a rank, no weight held twice (DeepSeek, DualPipe)",
    folded,
    _refusal,
    _rows,
)
