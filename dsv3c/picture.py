"""Pictures of a schedule, rank by time: as text for the terminal, and as SVG like the figures of the papers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from xml.sax.saxutils import escape

from dsv3c.schedule import Action, Schedule, show_cell
from dsv3c.schedules import Timeline

NAMES = {"F": "forward", "I": "input gradient", "W": "weight gradient", "B": "both gradients"}
FILL = {"F": ("#f6b26b", "#fbdcb8"), "I": ("#8fc97a", "#cbe8c0"), "W": ("#7fb2e6", "#c5dcf5"),
        "B": ("#4fae9b", "#aedcd2")}  # fmt: skip
"""Colours of each kind: of the first direction, and of the second."""
ANSI = {"F": (215, 223), "I": (114, 157), "W": (111, 153), "B": (73, 116)}

IDLE = "."


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a rank's time given to one action; of an overlapped pair each has its share."""

    action: Action
    start: float
    end: float
    second: bool


def pieces(schedule: Schedule, timeline: Timeline, rank: int) -> Iterator[Piece]:
    """What a rank does in order of time; `second`: the other direction, or the way back of a V."""
    for timed in timeline.cells[rank]:
        weights = [2.0 if a.kind == "B" else 1.0 for a in timed.cell]
        start = timed.start
        for i, a in enumerate(timed.cell):
            end = timed.end if i + 1 == len(timed.cell) else start + (timed.end - start) * weights[i] / sum(weights[i:])
            yield Piece(a, start, end, _second(schedule, a))
            start = end


def _second(schedule: Schedule, a: Action) -> bool:
    return schedule.route_of(a.micro_batch) > 0 or a.stage >= schedule.ranks


def _shortest(timeline: Timeline) -> float:
    """The shortest time that anything takes, which the finest picture shows as one step."""
    lengths = [
        (t.end - t.start) / sum(2 if a.kind == "B" else 1 for a in t.cell)
        for row in timeline.cells
        for t in row
        if t.end > t.start
    ]
    return min(lengths, default=1.0)


# ---- text ---------------------------------------------------------------------------------------------------------

MOST_BLOCKS = 4
"""A picture too wide for one line per rank is cut into at most so many blocks; a longer one is drawn coarser."""


def text_picture(schedule: Schedule, timeline: Timeline, width: int = 100, colour: bool = False) -> str:
    """One line per rank, time to the right, at most `width` columns; `.` is idle time.

    Where there is room an action shows its micro-batch, `F7`, and otherwise only its letter; of an overlapped pair
    the forward stands first. What is too long for a line goes on in a further block.
    """
    label = len(f"rank {schedule.ranks - 1}")
    room = max(10, width - label - 2)
    steps = timeline.makespan / _shortest(timeline)
    name = len(f"F{schedule.micro_batches - 1}")
    a_step = next((c for c in (name + 1, name) if c * steps <= room), 1)
    columns = max(1, min(round(a_step * steps), room * MOST_BLOCKS))
    rows = []
    for rank in range(schedule.ranks):
        shown = [IDLE] * columns
        for piece in pieces(schedule, timeline, rank):
            first, last = (_column(x, timeline.makespan, columns) for x in (piece.start, piece.end))
            shown[first:last] = _painted(piece, last - first, a_step > 1, colour)
        rows.append(shown)
    blocks = [
        "\n".join(f"rank {r}".ljust(label) + "  " + "".join(shown[at : at + room]) for r, shown in enumerate(rows))
        for at in range(0, columns, room)
    ]
    return "\n\n".join(blocks)


def _column(time: float, makespan: float, columns: int) -> int:
    """The first column whose middle is not before `time`."""
    return round(time / makespan * columns) if makespan else 0


def _painted(piece: Piece, width: int, named: bool, colour: bool) -> list[str]:
    """The columns of one piece, each a character; with `colour` each in the codes that colour it."""
    name = f"{piece.action.kind}{piece.action.micro_batch}"
    text = name.ljust(width) if named and width >= len(name) else piece.action.kind * width
    code = ANSI[piece.action.kind][piece.second]
    return [f"\x1b[30;48;5;{code}m{c}\x1b[0m" for c in text] if colour else [*text]


# ---- SVG ----------------------------------------------------------------------------------------------------------

ROW, GAP, LEFT, TOP, BOTTOM = 22, 4, 64, 56, 64
STEP = 22.0
MOST_WIDTH = 16000.0
SMALLEST_TEXT = 10.0


def svg_picture(schedule: Schedule, timeline: Timeline, title: str) -> str:
    """A drawing: one row per rank, time to the right, kinds by colour, overlapped pairs in one frame, a legend.

    `title` and a summary are there as text for those who cannot see it; every cell tells what it is when pointed at.
    """
    span = timeline.makespan or 1.0
    scale = min(STEP / _shortest(timeline), MOST_WIDTH / span)
    width, height = max(LEFT + span * scale + 16, 720), TOP + schedule.ranks * (ROW + GAP) + BOTTOM
    idle = f"{timeline.bubble_fraction:.1%} of the time is idle"
    about = (
        f"{schedule.ranks} pipeline ranks from top to bottom, time from left to right, {schedule.micro_batches} "
        f"micro-batches in {schedule.stages} stages; it takes {timeline.makespan:g}, and {idle}."
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-labelledby="title about" width="{_n(width)}" '
        f'height="{_n(height)}" viewBox="0 0 {_n(width)} {_n(height)}">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="about">{escape(about)}</desc>',
        "<style>text{font:12px sans-serif;fill:#222}.t{font-size:16px;font-weight:600}"
        ".m{font-size:10px;text-anchor:middle;pointer-events:none}.r{text-anchor:end}"
        "rect{stroke:#fff;stroke-width:.5}.p{fill:none;stroke:#111;stroke-width:1.4;pointer-events:none}"
        ".i{fill:#f0f0f0}.x{stroke:none;fill:#fff}</style>",
        f'<rect class="x" width="{_n(width)}" height="{_n(height)}"/>',
        f'<text class="t" x="{LEFT}" y="22">{escape(title)}</text>',
        f'<text x="{LEFT}" y="42">{escape(about[0].upper() + about[1:])}</text>',
    ]
    for rank in range(schedule.ranks):
        lines += _row(schedule, timeline, rank, scale)
    lines += _legend(schedule, TOP + schedule.ranks * (ROW + GAP) + 14)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _row(schedule: Schedule, timeline: Timeline, rank: int, scale: float) -> Iterator[str]:
    y = TOP + rank * (ROW + GAP)
    yield f'<text class="r" x="{LEFT - 8}" y="{y + 15}">rank {rank}</text>'
    yield f'<rect class="i" x="{LEFT}" y="{y}" width="{_n(timeline.makespan * scale)}" height="{ROW}"/>'
    for p in pieces(schedule, timeline, rank):
        x, wide, a = LEFT + p.start * scale, (p.end - p.start) * scale, p.action
        told = f"{a}: {NAMES[a.kind]}, stage {a.stage}, micro-batch {a.micro_batch}, {p.start:g} to {p.end:g}"
        yield (
            f'<rect x="{_n(x)}" y="{y}" width="{_n(wide)}" height="{ROW}" fill="{FILL[a.kind][p.second]}">'
            f"<title>{told}</title></rect>"
        )
        if wide >= SMALLEST_TEXT and wide >= 6.5 * len(str(a.micro_batch)):
            yield f'<text class="m" x="{_n(x + wide / 2)}" y="{y + 15}">{a.micro_batch}</text>'
    for timed in timeline.cells[rank]:
        if len(timed.cell) > 1:
            x, wide = LEFT + timed.start * scale, (timed.end - timed.start) * scale
            yield (
                f'<rect class="p" x="{_n(x)}" y="{y}" width="{_n(wide)}" height="{ROW}">'
                f"<title>{show_cell(timed.cell)}</title></rect>"
            )


def _legend(schedule: Schedule, y: float) -> Iterator[str]:
    cells = [cell for row in schedule.rows for cell in row]
    used = {a.kind for cell in cells for a in cell}
    x = float(LEFT)
    entries = [(f'fill="{FILL[k][0]}"', f"{k}: {NAMES[k]}") for k in NAMES if k in used]
    if any(len(cell) > 1 for cell in cells):
        entries.append(('class="p"', "overlapped pair"))
    if any(_second(schedule, a) for cell in cells for a in cell):
        entries.append((f'fill="{FILL["F"][1]}"', "lighter: second direction"))
    entries.append(('class="i"', "idle"))
    for style, text in entries:
        yield f'<rect {style} x="{_n(x)}" y="{_n(y)}" width="16" height="14"/>'
        yield f'<text x="{_n(x + 21)}" y="{_n(y + 12)}">{escape(text)}</text>'
        x += 21 + 6.6 * len(text) + 14
    yield f'<text x="{LEFT}" y="{_n(y + 34)}">Numbers are micro-batches; point at a cell for its stage and time.</text>'


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
