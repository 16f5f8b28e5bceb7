"""DualPipe: two mirrored replicas fed from both ends, forward and backward chunks overlapped."""

from __future__ import annotations

from dsv3c.schedule import Kind, Rows, mirrored
from dsv3c.schedules._units import bidirectional, row


def _refusal(ranks: int, micro_batches: int) -> str | None:
    if ranks < 2 or ranks % 2:
        return "it needs an even number of ranks, at least 2"
    if micro_batches < 2 * ranks or micro_batches % 2:
        return f"it needs an even number of micro-batches, at least 2 per rank ({2 * ranks})"
    return None


def _rows(ranks: int, micro_batches: int) -> Rows:
    half, each = ranks // 2, micro_batches // 2
    rows = []
    for rank in range(ranks):
        near, place = (0, rank) if rank < half else (1, ranks - 1 - rank)
        stages, first = (rank, ranks - 1 - rank), (0, each)
        order = (near, 1 - near)
        rows.append(row(bidirectional(half, place, each), *(tuple(x[i] for i in order) for x in (stages, first))))
    return tuple(rows)


DUALPIPE = Kind(
    "dualpipe",
    "DualPipe: two mirrored replicas fed from both ends, pairs overlapped (DeepSeek-V3 report, section 3.2.1)",
    mirrored,
    _refusal,
    _rows,
)
