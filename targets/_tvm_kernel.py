"""Kernel records of TVM-generated regions, and how a loaded one is bound to tensors once and called often."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dsv3c.errors import WorkError
from dsv3c.ir import DTYPES, DType, Graph, IRError
from dsv3c.lazy import lazy
from dsv3c.ops import REGISTRY
from dsv3c.rows import Down, walk
from dsv3c.target import Kernel, KernelFile
from dsv3c.targets._regions import RegionOperand, RegionProgram, compose
from dsv3c.targets._tvm_build import CPU_KINDS, check_machine, compile_text, load_text
from dsv3c.targets._tvm_rows import generate
from dsv3c.tensors import torch_dtype

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Call = Callable[[], object]
Tensors = "tuple[torch.Tensor, ...]"


def region_kernel(region: Graph, sizes: Mapping[str, int], kernels: str, cpu: str = CPU_KINDS[0]) -> Kernel | None:
    """The kernel of a fused region: TIR text, and with `kernels` = binary its LLVM text.

    None for `none`, and for a region that is not row-wise as a whole or needs tiles of rows, which then runs op by
    op. Raises WorkError if TVM cannot compile it.
    """
    if kernels == "none":
        return None
    try:
        program = compose(region, REGISTRY, sizes)
    except IRError:
        return None
    if any(isinstance(r, Down) for r in walk(tuple(r.row for r in program.results))):
        return None
    signature = tuple(str(v.type) for v in (*region.params, *region.results))
    return program_kernel(program, signature, kernels == "binary", cpu)


def program_kernel(program: RegionProgram, signature: tuple[str, ...] = (), binary: bool = True,
                   cpu: str = CPU_KINDS[0]) -> Kernel:  # fmt: skip
    """The kernel of a row program."""
    entry = "".join(c if c.isalnum() else "_" for c in program.name)
    script = generate(program, entry)
    files = [KernelFile("tir.py", script.text.encode())]
    if binary:
        files.append(KernelFile("ll", compile_text(script.text, entry, cpu)))
    digest = hashlib.sha256(f"{cpu}\n{script.text}".encode()).hexdigest()[:8]
    launch: tuple[tuple[str, str | int], ...] = (
        ("entry", entry),
        ("cpu", cpu),
        ("operands", " ".join(f"{o.kind}:{o.cols}:{o.dtype}" for o in program.operands)),
        ("results", " ".join(f"{r.kind}:{r.cols}:{r.dtype}" for r in program.results)),
        ("in_place", " ".join(f"{i}:{k}" for i, k in script.in_place)),
    )
    return Kernel(f"{entry}_{digest}", program.name, "tvm", signature, tuple(files), launch)


def load_kernel(kernel: Kernel) -> Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], Callable[[], None]]:
    """`prepare(inputs, outputs)` of a kernel. Its code is loaded when first used, and compiled first if only its
    source was kept."""
    launch = dict(kernel.launch)
    operands = tuple(map(_parse, str(launch["operands"]).split()))
    results = tuple(map(_parse, str(launch["results"]).split()))
    in_place = frozenset((int(i), int(k)) for i, k in (p.split(":") for p in str(launch["in_place"]).split()))
    function = functools.cache(functools.partial(_function, kernel))
    return _Loaded(kernel.op, function, operands, results, in_place).prepare


def _function(kernel: Kernel) -> Callable[..., object]:
    launch = dict(kernel.launch)
    entry, cpu = str(launch["entry"]), str(launch["cpu"])
    check_machine(cpu)
    if kernel.has_binary:
        return load_text(kernel.file("ll"), entry)
    return load_text(compile_text(kernel.file("tir.py").decode(), entry, cpu), entry)


def _parse(text: str) -> RegionOperand:
    kind, cols, dtype = text.split(":")
    return RegionOperand(kind, int(cols), DTYPES[dtype])


class _Loaded:
    """A loaded kernel and what its arguments look like."""

    def __init__(self, name: str, function: Callable[[], Callable[..., object]], operands: tuple[RegionOperand, ...],
                 results: tuple[RegionOperand, ...], in_place: frozenset[tuple[int, int]]) -> None:  # fmt: skip
        self.name, self.function = name, function
        self.operands, self.results, self.in_place = operands, results, in_place

    def prepare(self, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Callable[[], None]:
        """A call without arguments that computes `outputs` from whatever `inputs` then hold.

        Tensors whose layout the kernel cannot walk, or that overlap in a way it does not allow, go through a copy.
        Raises WorkError if shapes or element types do not fit.
        """
        tensors = (*inputs, *outputs)
        expected = (*self.operands, *self.results)
        if len(tensors) != len(expected):
            raise WorkError(f"the kernel {self.name} takes {len(expected)} tensors, got {len(tensors)}")
        for t, e in zip(tensors, expected, strict=True):
            if t.dtype != torch_dtype(e.dtype) or t.device.type != "cpu":
                raise WorkError(f"the kernel {self.name} expects {e.dtype} on the CPU, got {t.dtype} on {t.device}")
        rows, inner = self._rows(tensors, expected)
        if rows == 0:
            sums = [t for t, r in zip(outputs, self.results, strict=True) if r.kind == "column"]
            return functools.partial(_clear, sums)
        before: list[Call] = []
        after: list[Call] = []
        arguments: list[torch.Tensor] = []
        for i, (t, o) in enumerate(zip(inputs, self.operands, strict=True)):
            view = None if self._clobbered(i, t, outputs) else self._view(t, o, rows, inner)
            if view is None:
                copy = torch.empty(t.shape, dtype=t.dtype)
                before.append(functools.partial(copy.copy_, t))
                view = self._view(copy, o, rows, inner)
                assert view is not None
            arguments.append(view)
        for t, r in zip(outputs, self.results, strict=True):
            view = self._view(t, r, rows, inner)
            if view is None:
                copy = torch.empty(t.shape, dtype=t.dtype)
                after.append(functools.partial(t.copy_, copy))
                view = self._view(copy, r, rows, inner)
                assert view is not None
            arguments.append(view)
        return self._call(arguments, before, after)

    def _call(self, arguments: list[torch.Tensor], before: list[Call], after: list[Call]) -> Callable[[], None]:
        import tvm_ffi

        run = functools.partial(self.function(), *(tvm_ffi.from_dlpack(_as_bits(t)) for t in arguments))
        if not before and not after:
            return run  # type: ignore[return-value]

        def copy_and_run() -> None:
            for copy in before:
                copy()
            run()
            for copy in after:
                copy()

        return copy_and_run

    def _rows(self, tensors: tuple[torch.Tensor, ...], expected: tuple[RegionOperand, ...]) -> tuple[int, int]:
        """All rows, and how many neighbours share a row of the `prefix` operands (or 1, or what strides ask for)."""
        counts = [_count(t, e) for t, e in zip(tensors, expected, strict=True)]
        rows = max((c for c, e in zip(counts, expected, strict=True) if e.kind in ("row", "scalar")), default=0)
        shared = max((c for c, e in zip(counts, expected, strict=True) if e.kind == "prefix"), default=rows)
        inner = rows // shared if shared else 1
        if inner == 1:
            for t, e in zip(tensors, expected, strict=True):
                if e.kind == "row" and t.dim() > 2 and self._view(t, e, rows, 1) is None and rows % t.shape[-2] == 0:
                    inner = t.shape[-2]
                    break
        full = {"row": rows, "scalar": rows, "prefix": shared, "column": 1, "single": 1}
        for t, e, count in zip(tensors, expected, counts, strict=True):
            width = max(e.cols, 1)
            if e.kind != "unused" and (count != full[e.kind] or t.numel() != count * width):
                raise WorkError(f"the kernel {self.name}: a {e.kind} of {width} columns does not fit {tuple(t.shape)}")
        if shared * (rows // shared if shared else 0) != rows:
            raise WorkError(f"the kernel {self.name}: {rows} rows do not share {shared} evenly")
        return rows, inner

    def _view(self, t: torch.Tensor, e: RegionOperand, rows: int, inner: int) -> torch.Tensor | None:
        """`t` as the kernel walks it, sharing memory; None if strides do not allow that."""
        t = t.detach()
        shape = {
            "row": (rows // inner, inner, e.cols), "scalar": (rows // inner, inner), "prefix": (rows // inner, e.cols),
            "column": (e.cols,), "single": (1,),
        }  # fmt: skip
        try:
            view = t.view(shape[e.kind]) if e.kind != "unused" else t.as_strided((1,), (1,))
        except RuntimeError:
            return None
        walkable = view.shape[-1] == 1 or view.stride(-1) == 1
        return view if walkable or e.kind == "scalar" else None

    def _clobbered(self, index: int, t: torch.Tensor, outputs: tuple[torch.Tensor, ...]) -> bool:
        """Whether an output overwrites the input `t` before the kernel is done with it."""
        for k, out in enumerate(outputs):
            same = (t.data_ptr(), t.shape, t.stride()) == (out.data_ptr(), out.shape, out.stride())
            if not (same and (index, k) in self.in_place) and _overlap(t, out):
                return True
        return False


def _clear(sums: list[torch.Tensor]) -> None:
    for t in sums:
        t.zero_()


def _count(t: torch.Tensor, e: RegionOperand) -> int:
    return t.numel() // max(e.cols, 1)


def _extent(t: torch.Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    if not a.numel() or not b.numel():
        return False
    (a0, a1), (b0, b1) = _extent(a), _extent(b)
    return a0 < b1 and b0 < a1


def _as_bits(t: torch.Tensor) -> torch.Tensor:
    """Types that DLPack or TVM do not know go as integers of their size."""
    bits = {torch_dtype(DType.bf16): "uint16", torch_dtype(DType.e4m3): "uint8", torch_dtype(DType.bool): "uint8"}
    return t.view(getattr(torch, bits[t.dtype])) if t.dtype in bits else t
