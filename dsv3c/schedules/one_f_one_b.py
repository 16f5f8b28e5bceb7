"""1F1B: one forward, one backward by turns, the schedule that the others are compared with."""

from __future__ import annotations

from dsv3c.schedule import Kind, Rows, line
from dsv3c.schedules._units import one_forward_one_backward, row


def _refusal(ranks: int, micro_batches: int) -> str | None:
    return None


def _rows(ranks: int, micro_batches: int) -> Rows:
    rows = []
    for rank in range(ranks):
        kinds = one_forward_one_backward(ranks, rank, micro_batches)
        rows.append(row((((k.replace("I", "B"), 0),) for k in kinds), (rank,), (0,)))
    return tuple(rows)


ONE_F_ONE_B = Kind(
    "1f1b", "1F1B: one forward, one backward by turns (PipeDream-Flush, arXiv 2006.09503)", line, _refusal, _rows
)
