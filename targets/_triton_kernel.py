"""Kernel records of Triton-generated regions, and how one is bound to tensors once and launched often."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv3c.errors import WorkError
from dsv3c.ir import DTYPES, DType, Graph
from dsv3c.lazy import lazy
from dsv3c.ops import REGISTRY
from dsv3c.rows import Operand, Row
from dsv3c.target import Kernel, KernelFile
from dsv3c.targets._regions import RegionOperand, RegionProgram, compose
from dsv3c.targets._row_stages import children
from dsv3c.targets._triton_blocks import ELEMENTWISE
from dsv3c.targets._triton_build import ARCH, Entry, Prepared, compile_source, driver, triton_version
from dsv3c.targets._triton_interpreter import Launch, module_of
from dsv3c.targets._triton_math import POINTER
from dsv3c.targets._triton_rows import SUM_COLUMNS, Argument, Script, generate
from dsv3c.tensors import torch_dtype

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Call = Callable[[], object]
SUM_WARPS = 4


def region_kernel(region: Graph, sizes: Mapping[str, int], kernels: str) -> Kernel | None:
    """The kernel of a fused region: Triton source, and with `kernels` = binary its sm_90a code; None for `none`.

    Raises IRError if the region is not row-wise, WorkError if Triton cannot compile it.
    """
    if kernels == "none":
        return None
    program = compose(region, REGISTRY, sizes)
    entry = "".join(c if c.isalnum() else "_" for c in region.name)
    script = generate(program, entry)
    files = [KernelFile("py", script.text.encode())]
    facts: list[tuple[str, str | int]] = []
    if kernels == "binary":
        for e in _entries(script, tuple(r.dtype for r in program.results)):
            made = compile_source(script.text, e)
            prefix = "" if e.name == entry else f"{e.name.removeprefix(f'{entry}_')}."
            files += made.files(prefix)
            facts += [(f"{prefix}warps", made.warps), (f"{prefix}shared", made.shared)]
        facts.append(("triton", triton_version()))
    else:
        facts.append(("warps", script.warps))
    launch: tuple[tuple[str, str | int], ...] = (
        ("entry", entry),
        ("arch", ARCH),
        *facts,
        ("rows", script.rows),
        ("chunks", script.chunks),
        ("programs", script.programs),
        ("arguments", " ".join(f"{a.name}:{a.kind}:{a.dtype}:{a.divisible}" for a in script.arguments)),
        ("operands", " ".join(f"{o.kind}:{o.cols}:{o.dtype}" for o in program.operands)),
        ("results", " ".join(f"{r.kind}:{r.cols}:{r.dtype}" for r in program.results)),
        ("sums", " ".join(map(str, script.sums))),
        ("in_place", " ".join(f"{i}:{k}" for i, k in in_place(program, script.text))),
    )
    digest = hashlib.sha256(script.text.encode()).hexdigest()[:8]
    signature = tuple(str(v.type) for v in (*region.params, *region.results))
    return Kernel(f"{entry}_{digest}", region.name, "triton", signature, tuple(files), launch)


def in_place(program: RegionProgram, text: str) -> tuple[tuple[int, int], ...]:
    """(operand, result) pairs that may be one tensor: what is stored of the result in a place depends, column by
    column, on what was loaded of the operand from there, and nothing is loaded of the operand but that, once."""
    found: list[tuple[int, int]] = []
    for i, operand in enumerate(program.operands):
        place = rf"tl\.load\(x{i} \+ x{i}_at(.*?)(?:, mask=.*?)?\)(?:\.to\(.*\))?$"
        loads = list(re.finditer(place, text, re.MULTILINE))
        if operand.kind != "row" or len(loads) != 1 or len(re.findall(rf"\bx{i}\b", text)) != 2:
            continue
        for k, result in enumerate(program.results):
            if (result.kind, result.cols, result.dtype) != ("row", operand.cols, operand.dtype):
                continue
            stores = list(re.finditer(rf"tl\.store\(y{k} \+ y{k}_at(.*?), t?\d", text))
            once = len(stores) == 1 and len(re.findall(rf"\by{k}\b", text)) == 2
            there = once and loads[0].end() < stores[0].start() and loads[0][1] == stores[0][1]
            if there and _column_by_column(result.row, i):
                found.append((i, k))
    return tuple(found)


def _column_by_column(row: Row, index: int) -> bool:
    """Whether each column of `row` depends on that column of operand `index`."""
    stack, seen = [row], {row}
    while stack:
        at = stack.pop()
        if isinstance(at, Operand) and at.index == index:
            return True
        if isinstance(at, ELEMENTWISE):
            more = [c for c in children(at) if c.cols == row.cols and c not in seen]
            seen.update(more)
            stack += more
    return False


def _entries(script: Script, results: tuple[DType, ...]) -> tuple[Entry, ...]:
    main = Entry(
        script.entry,
        tuple((a.name, a.dtype) for a in script.arguments),
        tuple((a.name, a.divisible) for a in script.arguments),
        script.warps,
    )
    sums = (
        Entry(f"{script.entry}_sum{k}", (("part", "*fp32"), ("y", f"*{POINTER[results[k]]}"), ("count", "i32")),
              (("part", 16), ("y", 16)), SUM_WARPS)
        for k in script.sums
    )  # fmt: skip
    return (main, *sums)


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
        self.sums = tuple(map(int, str(facts["sums"]).split()))
        pairs = (p.split(":") for p in str(facts.get("in_place", "")).split())
        self.in_place = frozenset((int(i), int(k)) for i, k in pairs)
        self._partial: dict[tuple[int, str], torch.Tensor] = {}

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
        values: dict[str, int | tuple[int]] = {"rows": rows, "inner": inner}
        for i, (t, e) in enumerate(zip((*inputs, *outputs), expected, strict=True)):
            output = i >= len(inputs)
            name = f"y{i - len(inputs)}" if output else f"x{i}"
            if e.kind == "unused":
                continue
            if output and e.kind == "column":
                k = i - len(inputs)
                values[f"part{k}"] = (len(tensors),)
                tensors.append(self._scratch(k, e.cols, t.device))
            clobbered = not output and any(
                _overlap(t, o) and not ((i, k) in self.in_place and _same(t, o)) for k, o in enumerate(outputs)
            )
            view = None if clobbered else self._view(name, t, e, rows, inner)
            if view is None:
                copy = torch.empty(t.shape, dtype=t.dtype, device=t.device)
                (after if output else before).append(
                    functools.partial(t.copy_, copy) if output else functools.partial(copy.copy_, t)
                )
                view = self._view(name, copy, e, rows, inner)
                assert view is not None
            values[name] = (len(tensors),)
            values.update(zip((f"{name}_o", f"{name}_i"), _strides(view, e, rows, inner), strict=False))
            tensors.append(view)
        return Bound(tuple(tensors), tuple(before), self._launches(values, rows), tuple(after))

    def _launches(self, values: Mapping[str, int | tuple[int]], rows: int) -> tuple[Launch, ...]:
        blocks = -(-rows // self.rows)
        count = min(blocks, self.programs) if self.programs else blocks
        main = Launch(self.entry, (count, self.chunks), tuple(values[a.name] for a in self.arguments))
        sums = [
            Launch(
                f"{self.entry}_sum{k}",
                (-(-self.results[k].cols // SUM_COLUMNS), 1),
                (values[f"part{k}"], values[f"y{k}"], count),
            )
            for k in self.sums
        ]
        return (main, *sums)

    def _scratch(self, k: int, cols: int, device: torch.device) -> torch.Tensor:
        """Partial sums of result `k`; launches of one stream may share them."""
        key = (k, str(device))
        if key not in self._partial:
            self._partial[key] = torch.empty(self.programs * cols, dtype=torch.float32, device=device)
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
        full = {"row": rows, "scalar": rows, "prefix": shared, "column": 1, "single": 1}
        for t, e, count in zip(tensors, expected, counts, strict=True):
            width = max(e.cols, 1)
            if e.kind != "unused" and (count != full[e.kind] or t.numel() != count * width):
                raise WorkError(f"the kernel {self.name}: a {e.kind} of {width} columns does not fit {tuple(t.shape)}")
        if shared and rows % shared:
            raise WorkError(f"the kernel {self.name}: {rows} rows do not share {shared} evenly")
        return rows, inner

    def _view(self, name: str, t: torch.Tensor, e: RegionOperand, rows: int, inner: int) -> torch.Tensor | None:
        """`t` as the kernel walks it; None if strides or addresses are not what it was promised."""
        view = _reshaped(t, e, rows, inner)
        if view is None or (e.kind in ("row", "prefix", "column") and view.shape[-1] > 1 and view.stride(-1) != 1):
            return None
        if e.kind == "scalar" and view.stride(-1) < 0:
            return None
        promised = {a.name: a.divisible for a in self.arguments}
        strides = dict(zip((f"{name}_o", f"{name}_i"), _strides(view, e, rows, inner), strict=False))
        fits = all(s % promised.get(n, 1) == 0 for n, s in strides.items())
        return view if fits and view.data_ptr() % promised.get(name, 1) == 0 else None


def _reshaped(t: torch.Tensor, e: RegionOperand, rows: int, inner: int) -> torch.Tensor | None:
    t = t.detach()
    shape = {
        "row": (rows // inner, inner, e.cols), "scalar": (rows // inner, inner), "prefix": (rows // inner, e.cols),
        "column": (e.cols,), "single": (1,),
    }  # fmt: skip
    try:
        return t.view(shape[e.kind])
    except RuntimeError:
        return None


def _strides(view: torch.Tensor, e: RegionOperand, rows: int, inner: int) -> tuple[int, ...]:
    """Over outer and inner; 0 where there is one only, so that it divides by whatever was promised."""
    axes = {"row": 2, "scalar": 2, "prefix": 1}.get(e.kind, 0)
    return tuple(view.stride(a) if view.shape[a] > 1 else 0 for a in range(axes))


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


def load_kernel(kernel: Kernel) -> Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], Callable[[], None]]:
    """`prepare(inputs, outputs)` of a kernel on the current CUDA device: the binary where it was made for this GPU,
    else compiled from source. Raises WorkError if there is no GPU, or no way to make the code for it."""
    if not torch.cuda.is_available():
        raise WorkError(f"the kernel {kernel.op} needs an NVIDIA GPU, and none is usable here")
    launcher = RegionLauncher(kernel)
    major, minor = torch.cuda.get_device_capability()
    start = _from_binary(kernel) if kernel.has_binary and major * 10 + minor == ARCH else _from_source(kernel)

    def prepare(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Callable[[], None]:
        bound = launcher.bind(inputs, outputs)
        calls = [*bound.before, *(start(launch, launcher, bound) for launch in bound.launches), *bound.after]
        if len(calls) == 1:
            return calls[0]  # type: ignore[return-value]

        def run() -> None:
            for call in calls:
                call()

        return run

    return prepare


Start = Callable[[Launch, RegionLauncher, Bound], Call]


def _from_binary(kernel: Kernel) -> Start:
    facts = dict(kernel.launch)
    entry = str(facts["entry"])
    torch.empty(1, device="cuda")  # makes torch's context current
    loaded: dict[str, tuple[ctypes.c_void_p, int, int]] = {}
    for suffix in (f.suffix for f in kernel.files if f.suffix.endswith("cubin")):
        prefix = suffix.removesuffix("cubin")
        name = f"{entry}_{prefix.removesuffix('.')}" if prefix else entry
        shared = int(facts[f"{prefix}shared"])
        loaded[name] = driver().load(kernel.file(suffix), name, shared), int(facts[f"{prefix}warps"]), shared

    def start(launch: Launch, launcher: RegionLauncher, bound: Bound) -> Call:
        function, warps, shared = loaded[launch.entry]
        main = launch.entry == launcher.entry
        types = [a.dtype for a in launcher.arguments] if main else ["*", "*", "i32"]
        values = tuple(
            (t, a if isinstance(a, int) else bound.tensors[a[0]]) for t, a in zip(types, launch.arguments, strict=True)
        )
        return Prepared(function, launch.entry, launch.grid, warps, shared, values)

    return start


def _from_source(kernel: Kernel) -> Start:
    triton_version()
    module = module_of(kernel.file("py").decode())
    facts = dict(kernel.launch)

    def start(launch: Launch, launcher: RegionLauncher, bound: Bound) -> Call:
        function = getattr(module, launch.entry)[launch.grid]
        warps = int(facts["warps"]) if launch.entry == launcher.entry else SUM_WARPS
        arguments = tuple(a if isinstance(a, int) else _known(bound.tensors[a[0]]) for a in launch.arguments)
        return functools.partial(function, *arguments, num_warps=warps, num_stages=1)

    return start


def _known(t: torch.Tensor) -> torch.Tensor:
    """Triton has no pointer to bool that is one byte of a number."""
    return t.view(torch.uint8) if t.dtype == torch_dtype(DType.bool) else t
