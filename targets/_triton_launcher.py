"""How the kernel of a row-wise region is bound to tensors: views, strides, grids, and copies where a kernel cannot
walk what it is given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv3c.errors import WorkError
from dsv3c.ir import DTYPES
from dsv3c.lazy import lazy
from dsv3c.rows import TILE_ROWS
from dsv3c.target import Kernel
from dsv3c.targets._regions import RegionOperand
from dsv3c.targets._triton_interpreter import Launch
from dsv3c.targets._triton_rows import FOLD_ROWS, STEP, SUM_COLUMNS, Argument
from dsv3c.tensors import torch_dtype

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Call = Callable[[], object]

def _parse(text: str) -> RegionOperand:
    kind, cols, dtype = text.split(":")
    return RegionOperand(kind, int(cols), DTYPES[dtype])


def _argument(text: str) -> Argument:
    name, kind, dtype, divisible = text.split(":")
    return Argument(name, kind, dtype, int(divisible))


@dataclass(frozen=True, slots=True)
class Bound:
    """A kernel with its tensors: copies to make before, launches in order (their tensors by position), copies after."""

    tensors: tuple[torch.Tensor, ...]
    before: tuple[Call, ...]
    launches: tuple[Launch, ...]
    after: tuple[Call, ...]


class RegionLauncher:
    """What a region's kernel takes and how it is started, read from its record alone."""

    def __init__(self, kernel: Kernel) -> None:
        facts = dict(kernel.launch)
        self.name, self.entry = kernel.op, str(facts["entry"])
        self.rows, self.chunks, self.programs = (int(facts[k]) for k in ("rows", "chunks", "programs"))
        self.arguments = tuple(map(_argument, str(facts["arguments"]).split()))
        self.operands = tuple(map(_parse, str(facts["operands"]).split()))
        self.results = tuple(map(_parse, str(facts["results"]).split()))
        self.sums, self.folds = (tuple(map(int, str(facts.get(key, "")).split())) for key in ("sums", "folds"))
        self.across = bool(facts.get("across", 0))
        pairs = (p.split(":") for p in str(facts.get("in_place", "")).split())
        self.in_place = frozenset((int(i), int(k)) for i, k in pairs)
        self._partial: dict[tuple[int, int, str], torch.Tensor] = {}

    def bind(self, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Bound:
        """Views, strides and grids for these tensors. A tensor whose layout the kernel cannot walk, or an input that
        shares memory with an output, goes through a copy, unless the two are the same tensor and the kernel reads
        each number before it writes it. Raises WorkError if shapes or element types do not fit."""
        expected = (*self.operands, *self.results)
        self._check((*inputs, *outputs), expected)
        rows, inner = self._count((*inputs, *outputs), expected)
        if not rows:
            zero = [t.zero_ for t, r in zip(outputs, self.results, strict=True) if r.kind == "column"]
            return Bound((), tuple(zero), (), ())
        before: list[Call] = []
        after: list[Call] = []
        tensors: list[torch.Tensor] = []
        values: dict[str, int | tuple[int]] = {"rows": rows, "inner": inner, "outer": rows // inner}
        for i, (t, e) in enumerate(zip((*inputs, *outputs), expected, strict=True)):
            output = i >= len(inputs)
            name = f"y{i - len(inputs)}" if output else f"x{i}"
            if e.kind == "unused":
                continue
            if output and e.kind == "column":
                k = i - len(inputs)
                values[f"part{k}"] = (len(tensors),)
                tensors.append(self._scratch(k, self.programs * e.cols, t.device))
            if output and i - len(inputs) in self.folds:
                values[f"part{i - len(inputs)}"] = (len(tensors),)
                tensors.append(self._scratch(i - len(inputs), self.chunks * rows, t.device))
            clobbered = not output and any(
                _overlap(t, o) and not ((i, k) in self.in_place and _same(t, o)) for k, o in enumerate(outputs)
            )
            view = None if clobbered else self._view(name, t, e, rows, inner)
            if view is None:
                copy = _fresh(t, e)
                (after if output else before).append(
                    functools.partial(t.copy_, copy) if output else functools.partial(copy.copy_, t)
                )
                view = self._view(name, copy, e, rows, inner, own=True)
                assert view is not None
            values[name] = (len(tensors),)
            values.update(zip(_axes(name, e), _strides(view, e), strict=False))
            tensors.append(view)
        return Bound(tuple(tensors), tuple(before), self._launches(values, rows), tuple(after))

    def _launches(self, values: Mapping[str, int | tuple[int]], rows: int) -> tuple[Launch, ...]:
        blocks = -(-rows // self.rows)
        count = min(blocks, self.programs) if self.programs else blocks
        grid = (self.chunks, count) if self.across else (count, self.chunks)
        main = Launch(self.entry, grid, tuple(values[a.name] for a in self.arguments))
        sums = [
            Launch(
                f"{self.entry}_sum{k}",
                (-(-self.results[k].cols // SUM_COLUMNS), 1),
                (values[f"part{k}"], values[f"y{k}"], count),
            )
            for k in self.sums
        ]
        folds = [
            Launch(
                f"{self.entry}_fold{k}",
                (-(-rows // FOLD_ROWS), 1),
                tuple(values[n] for n in (f"part{k}", f"y{k}", f"y{k}_o", f"y{k}_i", "rows", "inner")),
            )
            for k in self.folds
        ]
        return (main, *sums, *folds)

    def _scratch(self, k: int, size: int, device: torch.device) -> torch.Tensor:
        """Partial sums of result `k`; launches of one stream may share them."""
        key = (k, size, str(device))
        if key not in self._partial:
            self._partial[key] = torch.empty(size, dtype=torch.float32, device=device)
        return self._partial[key]

    def _check(self, tensors: tuple[torch.Tensor, ...], expected: tuple[RegionOperand, ...]) -> None:
        if len(tensors) != len(expected):
            raise WorkError(f"the kernel {self.name} takes {len(expected)} tensors, got {len(tensors)}")
        for t, e in zip(tensors, expected, strict=True):
            if t.dtype != torch_dtype(e.dtype):
                raise WorkError(f"the kernel {self.name} expects {e.dtype}, got {t.dtype}")

    def _count(self, tensors: tuple[torch.Tensor, ...], expected: tuple[RegionOperand, ...]) -> tuple[int, int]:
        """All rows, and how many neighbours share a row of the `prefix` operands (or 1, or what strides ask for)."""
        counts = [t.numel() // max(e.cols, 1) for t, e in zip(tensors, expected, strict=True)]
        rows = max((c for c, e in zip(counts, expected, strict=True) if e.kind in ("row", "scalar")), default=0)
        shared = max((c for c, e in zip(counts, expected, strict=True) if e.kind == "prefix"), default=rows)
        inner = rows // shared if shared else 1
        if inner == 1:
            for t, e in zip(tensors, expected, strict=True):
                if e.kind == "row" and t.dim() > 2 and _reshaped(t, e, rows, 1) is None and rows % t.shape[-2] == 0:
                    inner = t.shape[-2]
                    break
        full = {"row": rows, "scalar": rows, "prefix": shared, "column": 1, "single": 1, "turned": rows,
                "turned_tile": -(-rows // TILE_ROWS)}  # fmt: skip
        for t, e, count in zip(tensors, expected, counts, strict=True):
            width = max(e.cols, 1)
            if e.kind != "unused" and (count != full[e.kind] or t.numel() != count * width):
                raise WorkError(f"the kernel {self.name}: a {e.kind} of {width} columns does not fit {tuple(t.shape)}")
        if shared and rows % shared:
            raise WorkError(f"the kernel {self.name}: {rows} rows do not share {shared} evenly")
        return rows, inner

    def _view(self, name: str, t: torch.Tensor, e: RegionOperand, rows: int, inner: int,
              own: bool = False) -> torch.Tensor | None:  # fmt: skip
        """`t` as the kernel walks it; None if strides or addresses are not what it was promised. `own`: made by
        `_fresh`, so that there is room behind each column."""
        view = _reshaped(t, e, rows, inner)
        dense = e.kind in ("row", "prefix", "column", "turned", "turned_tile")
        if view is None or (dense and view.shape[-1] > 1 and view.stride(-1) != 1):
            return None
        if e.kind == "scalar" and view.stride(-1) < 0:
            return None
        if e.kind == "turned" and rows % STEP and not own:
            return None
        promised = {a.name: a.divisible for a in self.arguments}
        strides = dict(zip(_axes(name, e), _strides(view, e), strict=False))
        fits = all(s % promised.get(n, 1) == 0 for n, s in strides.items())
        return view if fits and view.data_ptr() % promised.get(name, 1) == 0 else None


def _reshaped(t: torch.Tensor, e: RegionOperand, rows: int, inner: int) -> torch.Tensor | None:
    t = t.detach()
    shape = {
        "row": (rows // inner, inner, e.cols), "scalar": (rows // inner, inner), "prefix": (rows // inner, e.cols),
        "column": (e.cols,), "single": (1,), "turned": (e.cols, rows),
        "turned_tile": (e.cols, -(-rows // TILE_ROWS)),
    }  # fmt: skip
    try:
        return t.view(shape[e.kind])
    except RuntimeError:
        return None


def _axes(name: str, e: RegionOperand) -> tuple[str, ...]:
    """Names of the strides that the kernel takes of a tensor."""
    letters = {"row": "oi", "scalar": "oi", "prefix": "o", "turned": "c", "turned_tile": "c"}.get(e.kind, "")
    return tuple(f"{name}_{letter}" for letter in letters)


def _strides(view: torch.Tensor, e: RegionOperand) -> tuple[int, ...]:
    """Of `_axes`; 0 where there is one only, so that it divides by whatever was promised."""
    return tuple(view.stride(a) if view.shape[a] > 1 else 0 for a in range(len(_axes("", e))))


def _fresh(t: torch.Tensor, e: RegionOperand) -> torch.Tensor:
    """Memory of the shape of `t` that a kernel can walk: columns of whole vectors where it stores columns."""
    if e.kind != "turned":
        return torch.empty(t.shape, dtype=t.dtype, device=t.device)
    wide = (t.shape[0], -(-t.shape[1] // STEP) * STEP)
    return torch.empty(wide, dtype=t.dtype, device=t.device)[:, : t.shape[1]]


def _extent(t: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.numel() or not b.numel():
        return False
    (a0, a1), (b0, b1) = _extent(a), _extent(b)
    return a0 < b1 and b0 < a1
