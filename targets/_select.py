"""Which implementation executes a matrix product, and why: the fastest by the measured table that the user allows."""

from __future__ import annotations

from dsv3c.target import Choice, Product
from dsv3c.targets._gluon_kernel import kernel_id
from dsv3c.targets._measured import Table
from dsv3c.targets._products import FALLBACK, KINDS, candidates, generated, generator_takes, spec_of


def choose(p: Product, mode: str, table: Table) -> Choice:
    """The choice for one product. `mode`: auto, generated or library; one that has no implementation is no limit."""
    known = candidates(p)
    allowed = [c for c in known if mode == "auto" or generated(c) == (mode == "generated")]
    row = table.nearest(p)
    rates = dict(row.tflops) if row else {}
    found = _best(allowed or known, rates)
    kernel = kernel_id(spec_of(p, found)) if generated(found) else ""
    return Choice(p, found, kernel, "; ".join(filter(None, _reasons(p, mode, found, known, bool(allowed), rates,
                                                                    row.product if row else None))))  # fmt: skip


def _best(names: list[str] | tuple[str, ...], rates: dict[str, float]) -> str:
    """The fastest measured one; the first where none is."""
    timed = [n for n in names if n in rates]
    return max(timed, key=lambda n: rates[n]) if timed else names[0]


def _reasons(p: Product, mode: str, found: str, known: tuple[str, ...], allowed: bool, rates: dict[str, float],
             where: Product | None) -> list[str]:  # fmt: skip
    if len(known) == 1:
        if found != FALLBACK:
            return [f"{found} is the only implementation{_why_alone(p)}"]
        return [f"{found}, by way of float32: no kernel takes {p.dtype} of these sizes"]
    others = [n for n in known if generated(n) != generated(found)] or [n for n in known if n != found]
    other = _best(others, rates)
    if found not in rates:
        words = f"{found}, since nothing like it is measured"
    elif other in rates:
        words = f"{found} {rates[found]:.0f} TFLOP/s, {other} {rates[other]:.0f}"
    else:
        words = f"{found} {rates[found]:.0f} TFLOP/s, {other} not measured"
    near = where is not None and where != p and found in rates
    return [
        words,
        f"as measured for {where.rows}×{where.n}×{where.k}" if near and where else "",
        f"as --implementations {mode} asks" if mode != "auto" and allowed else "",
        f"there is no {mode} implementation" if not allowed else "",
    ]


def _why_alone(p: Product) -> str:
    if p.op in KINDS and p.dtype in ("bf16", "e4m3") and not generator_takes(p):
        return " for these sizes"
    return f" for {p.dtype}"
