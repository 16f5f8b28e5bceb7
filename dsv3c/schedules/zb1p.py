"""ZB1P: 1F1B whose weight gradients are put off to fill the bubble, in the memory of 1F1B."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3c.schedule import Kind, Rows, line
from dsv3c.schedules._units import OLDEST, Unit, one_forward_one_backward, row


def _refusal(ranks: int, micro_batches: int) -> str | None:
    return None


def _units(ranks: int, rank: int, micro_batches: int) -> Iterator[Unit]:
    """Rank r keeps r weight gradients in hand, so that with the P − r chunks in flight no rank holds more than P."""
    done = weight = 0
    for kind in one_forward_one_backward(ranks, rank, micro_batches):
        yield ((kind, 0),)
        done += kind == "I"
        if done - weight > rank:
            weight += 1
            yield OLDEST
    yield from [OLDEST] * (done - weight)


def _rows(ranks: int, micro_batches: int) -> Rows:
    return tuple(row(_units(ranks, rank, micro_batches), (rank,), (0,)) for rank in range(ranks))


ZB1P = Kind(
    "zb1p",
    "ZB1P: 1F1B with weight gradients put off into the bubble (ZB-H1 of Zero Bubble, arXiv 2401.10241)",
    line,
    _refusal,
    _rows,
)
