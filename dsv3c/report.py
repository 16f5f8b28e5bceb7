"""One page about a plan, complete in itself: model, time, memory, schedule, overlap, and what every pass did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from dsv3c.console import size
from dsv3c.interleave import PairOrder, Placed, Work, placed, works
from dsv3c.ir import Phase
from dsv3c.picture import svg_picture
from dsv3c.plan import Plan
from dsv3c.simulate import Simulation, compared

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:72rem;padding:0 1rem;color:#222;background:#fff}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ddd}
table{border-collapse:collapse;margin:.6rem 0}td,th{padding:.15rem .9rem .15rem 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto;border:1px solid #ddd}.big{display:flex;flex-wrap:wrap;gap:1.6rem}
.big div{min-width:7rem}.big b{display:block;font-size:1.35rem}
.bar{background:#7fb2e6;height:.8rem}.over{background:#e06c60}small{color:#666}
details{margin:.3rem 0}summary{cursor:pointer}code{font-size:.9em}
"""

COLOURS = {Phase.F: "#f6b26b", Phase.B: "#8fc97a", Phase.W: "#7fb2e6"}
PART_COLOURS = ("#f6b26b", "#8fc97a", "#7fb2e6", "#4fae9b", "#dddddd", "#c9a0dc")
MOST_RANKS = 128
"""So many rows of the memory table are shown."""


def page(plan: Plan, s: Simulation) -> str:
    """The page as HTML; nothing in it is loaded from elsewhere."""
    title = f"{plan.model} on {plan.target}"
    sections = [_head(plan, s), _time(plan, s), _memory(plan), _schedule(plan, s), _overlap(plan, s),
                _layers(s), _notes(plan)]  # fmt: skip
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head><body>\n'
        f"<h1>{escape(title)}</h1>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table; columns in `numbers` are flush right. Cells are text, not HTML."""

    def row(cells: Sequence[str], tag: str) -> str:
        made = (f"<{tag}{' class=n' if i in numbers else ''}>{escape(c)}</{tag}>" for i, c in enumerate(cells))
        return f"<tr>{''.join(made)}</tr>"

    top = row(head, "th") if head else ""
    return f"<table>{top}{''.join(row(r, 'td') for r in rows)}</table>"


def _head(plan: Plan, s: Simulation) -> str:
    job, parameters = plan.job, plan.parameters
    facts = [
        ("parameters", f"{parameters.total:,}, of which a token uses {parameters.active:,}; MTP {parameters.mtp:,}"),
        ("job", f"{job.kind} in {job.precision}"),
        ("ranks", f"{job.mesh.world} ({job.mesh}), {job.ranks_per_node} to a node"),
        ("batch", f"{job.global_batch} sequences of {job.seq} tokens, {job.micro_batch} at a time"),
        ("schedule", f"{s.schedule.kind}, {s.schedule.stages} stages, {s.schedule.micro_batches} micro-batches"),
        ("compiled by", f"dsv3c {plan.version}"),
    ]
    big = [
        (f"{s.step_seconds:.4g} s", "a step"), (f"{s.tokens_per_second_per_gpu:,.5g}", "tokens/s and rank"),
        (f"{s.tflops_per_gpu_causal:.4g}", "TFLOP/s a rank (causal)"), (f"{s.mfu_bf16_causal:.1%}", "of the bf16 peak"),
        (f"{s.bubble_fraction:.1%}", "idle"), (f"{s.comm_hidden_fraction:.1%}", "of row exchange hidden"),
        (size(s.memory_peak_bytes), "on the largest rank"),
        (f"{s.gpu_hours_per_trillion_tokens:,.0f}", "GPU h / trillion tokens"),
    ]  # fmt: skip
    shown = "".join(f"<div><b>{escape(a)}</b><small>{escape(b)}</small></div>" for a, b in big)
    told = compared(plan, s)
    return f'{_table((), facts)}<div class="big">{shown}</div>' + (f"<p>{escape(told)}</p>" if told else "")


def _time(plan: Plan, s: Simulation) -> str:
    """Where the step goes, on the busiest rank."""
    whole = sum(t for _, t in s.breakdown) or 1.0
    x, parts = 0.0, []
    for (name, t), colour in zip(s.breakdown, PART_COLOURS, strict=True):
        wide = 1000 * t / whole
        label = f'<text x="{x + 6:.1f}" y="21" font-size="13">{escape(name)}</text>' if wide > 70 else ""
        parts.append(f'<rect x="{x:.1f}" width="{wide:.1f}" height="32" fill="{colour}">'
                     f"<title>{escape(name)}: {t:.4g} s</title></rect>{label}")  # fmt: skip
        x += wide
    rows = [(name, f"{t:.4g} s", f"{t / whole:.1%}") for name, t in s.breakdown]
    picture = (f'<svg role="img" aria-label="where the time goes" viewBox="0 0 1000 32" width="100%">'
               f"{''.join(parts)}</svg>")  # fmt: skip
    return f"<h2>Where the time goes</h2>{picture}{_table(('part', 'time', 'share'), rows, (1, 2))}"


def _memory(plan: Plan) -> str:
    memory = plan.memory
    kinds = _table(("kind", "bytes"), [(k, size(n)) for k, n in memory.by_kind], (1,))
    limit = memory.limit_bytes or max(memory.per_rank, default=1) or 1
    rows = []
    for rank, peak in enumerate(memory.per_rank[:MOST_RANKS]):
        over = " over" if peak > limit else ""
        wide = min(100.0, 100 * peak / limit)
        rows.append(f'<tr><td class=n>{rank}</td><td class=n>{size(peak)}</td><td style="width:20rem">'
                    f'<div class="bar{over}" style="width:{wide:.1f}%"></div></td></tr>')  # fmt: skip
    more = len(memory.per_rank) - MOST_RANKS
    told = f"The machine has {size(memory.limit_bytes)}." if memory.limit_bytes else ""
    told += f" {more} more ranks are not shown." if more > 0 else ""
    head = "<tr><th class=n>pipeline rank</th><th class=n>peak</th><th></th></tr>"
    return (f"<h2>Memory</h2><p>On the largest rank, {size(memory.peak_bytes)} in all. {told}</p>{kinds}"
            f"<table>{head}{''.join(rows)}</table>")  # fmt: skip


def _schedule(plan: Plan, s: Simulation) -> str:
    if s.schedule.ranks == 1:
        return ""
    drawn = svg_picture(s.schedule, s.timeline, f"{s.schedule.kind}, simulated")
    return f'<h2>Schedule</h2><div class="wide">{drawn}</div>'


def _overlap(plan: Plan, s: Simulation) -> str:
    """The commonest pair of layers that communicate, on its two streams."""
    overlap = s.cells.overlap
    if overlap is None or not overlap.pairs:
        return ""
    uses: dict[str, int] = {}
    for layer in (y for stage in s.cells.stages for y in stage.layers):
        uses[layer.graph] = uses.get(layer.graph, 0) + 1
    pair = max(overlap.pairs, key=lambda p: (p.communication_seconds, uses.get(f"{p.forward}_F", 0)))
    lent = s.cells.times.with_lent(overlap.communication_units)
    table = {w.step: w for w in works(lent, lent.graphs, pair.forward, pair.backward)}
    order = [table[step] for step in pair.steps]
    told = (
        f"A forward {pair.forward} beside a backward {pair.backward}: {pair.seconds * 1e3:.2f} ms a pair with "
        f"{overlap.communication_units} of {lent.machine.units} units for communication. Alone, computation takes "
        f"{pair.compute_seconds * 1e3:.2f} ms and communication {pair.communication_seconds * 1e3:.2f} ms; "
        f"{pair.hidden:.0%} of the latter is hidden."
    )
    return f"<h2>Overlap</h2><p>{escape(told)}</p>{_streams(order)}{_others(overlap.pairs, pair)}"


def _streams(order: Sequence[Work]) -> str:
    """A pair in the middle of a row of them as a drawing: computation above, communication below."""
    found = placed(order, 3)
    middle = found[len(order) : 2 * len(order)]
    start, end = min(p.start for p in middle), max(p.end for p in middle)
    scale = 940 / (end - start) if end > start else 1.0
    parts = ['<text x="0" y="24" font-size="12">compute</text><text x="0" y="62" font-size="12">network</text>']
    for p in (p for p in found if p.end > start and p.start < end):
        parts.append(_box(p, start, end, scale))
    return f'<svg role="img" aria-label="two streams" viewBox="0 0 1000 76" width="100%">{"".join(parts)}</svg>'


def _box(p: Placed, start: float, end: float, scale: float) -> str:
    left = 58 + (max(p.start, start) - start) * scale
    wide = (min(p.end, end) - max(p.start, start)) * scale
    y = 44 if p.work.comm else 6
    name = escape(str(p.work.step))
    text = f'<text x="{left + 4:.1f}" y="{y + 18}" font-size="11">{name}</text>' if wide > 6.5 * len(name) else ""
    return (f'<rect x="{left:.1f}" y="{y}" width="{wide:.1f}" height="28" fill="{COLOURS[p.work.step.phase]}" '
            f'stroke="#fff"><title>{name}: {p.work.seconds * 1e3:.3f} ms</title></rect>{text}')  # fmt: skip


def _others(pairs: Sequence[PairOrder], shown: PairOrder) -> str:
    rows = [
        (p.forward, p.backward, f"{p.seconds * 1e3:.2f}", f"{p.compute_seconds * 1e3:.2f}",
         f"{p.communication_seconds * 1e3:.2f}", f"{p.hidden:.0%}", ", ".join(map(str, p.steps)))
        for p in (shown, *(p for p in pairs if p is not shown))
    ]  # fmt: skip
    head = ("forward", "backward", "pair, ms", "computation", "communication", "hidden", "order")
    return f"<details><summary>All pairs of layers</summary>{_table(head, rows, (2, 3, 4, 5))}</details>"


def _layers(s: Simulation) -> str:
    """Milliseconds of each segment of each kind of layer, run alone."""
    rows, seen = [], set()
    for layer in (y for stage in s.cells.stages for y in stage.layers):
        if layer.graph not in seen:
            seen.add(layer.graph)
            for name, comm, seconds in s.cells.alone(layer):
                rows.append((layer.graph, name, "network" if comm else "compute", f"{seconds * 1e3:.3f}"))
    made = _table(("layer", "segment", "stream", "ms"), rows, (3,))
    return f"<h2>Segments</h2><details><summary>Each alone, by the cost model</summary>{made}</details>"


def _notes(plan: Plan) -> str:
    """Every pass, what it changed, and everything that it said."""
    parts, told = [], set()
    for r in plan.reports:
        mine = [] if r.name in told else [n for n in plan.notes if n.pass_name == r.name]
        told.add(r.name)
        line = f"<b>{escape(r.name)}</b> {r.nodes_before} → {r.nodes_after} nodes, {len(mine)} notes"
        rows = [(n.action, n.node, n.reason) for n in mine]
        parts.append(f"<details><summary>{line}</summary>{_table((), rows)}</details>" if mine else f"<p>{line}</p>")
    return f"<h2>Passes</h2><p><code>{escape(plan.pipeline)}</code></p>{''.join(parts)}"
