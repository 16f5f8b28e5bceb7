"""ZBV: zero bubble on a V of two stages a rank, for comparison; `auto` leaves it out since it overlaps no pairs."""

from __future__ import annotations

from collections.abc import Iterator

from dsv3c.schedule import Kind, Rows, folded
from dsv3c.schedules._units import Unit, row


def _refusal(ranks: int, micro_batches: int) -> str | None:
    least = 2 * ranks - 1
    return f"it needs at least {least} micro-batches" if micro_batches < least else None


def _units(ranks: int, rank: int, micro_batches: int) -> Iterator[Unit]:
    behind = ranks - rank
    turns = micro_batches - ranks
    forwards = turns - (behind - 1)  # of the turns so many begin with a new micro-batch
    order = (
        *("F0",) * (2 * behind - 1),
        *("F1", "F0") * rank,
        *("F1", "I1", "W1") * behind,
        *("F0", "I0", "W0", "F1", "I1", "W1") * forwards,
        *("I0", "W0", "F1", "I1", "W1") * (turns - forwards),
        *("I0", "I1") * rank,
        *("I0", "W0") * behind,
        *("W1",) * rank,
        *("W0",) * rank,
    )
    return (((word[0], int(word[1])),) for word in order)


def _rows(ranks: int, micro_batches: int) -> Rows:
    return tuple(row(_units(ranks, rank, micro_batches), (rank, 2 * ranks - 1 - rank), (0, 0)) for rank in range(ranks))


ZBV = Kind(
    "zbv",
    "ZBV: zero bubble on a V of 2 stages a rank (Zero Bubble, arXiv 2401.10241, section 6)",
    folded,
    _refusal,
    _rows,
    auto=False,
)
