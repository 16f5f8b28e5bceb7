"""Kernel records of Triton-generated regions, and how one is bound to tensors once and launched often."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dsv3c.errors import WorkError
from dsv3c.ir import DType, Graph, IRError
from dsv3c.lazy import lazy
from dsv3c.ops import REGISTRY
from dsv3c.rows import Operand, Row, children
from dsv3c.target import Kernel, KernelFile
from dsv3c.targets._regions import RegionProgram, compose
from dsv3c.targets._row_pieces import ELEMENTWISE
from dsv3c.targets._triton_build import ARCH, Entry, Prepared, compile_source, driver, triton_version
from dsv3c.targets._triton_interpreter import Launch, module_of
from dsv3c.targets._triton_launcher import Bound, Call, RegionLauncher
from dsv3c.targets._triton_math import POINTER
from dsv3c.targets._triton_rows import TURNED, Script, generate
from dsv3c.tensors import torch_dtype

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

SUM_WARPS = 4


def region_kernel(region: Graph, sizes: Mapping[str, int], kernels: str) -> Kernel | None:
    """The kernel of a fused region: Triton source, and with `kernels` = binary its sm_90a code; None for `none`, and
    where tiles of rows do not meet tiles of columns, as with SwiGLU of halves that are no multiple of 128.

    Raises IRError if the region is not row-wise, WorkError if Triton cannot compile it.
    """
    if kernels == "none":
        return None
    program = compose(region, REGISTRY, sizes)
    entry = "".join(c if c.isalnum() else "_" for c in region.name)
    try:
        script = generate(program, entry)
    except IRError:
        if any(r.kind in TURNED for r in program.results):
            return None
        raise
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
        ("folds", " ".join(map(str, script.folds))),
        ("across", int(script.across)),
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
    folds = (
        Entry(f"{script.entry}_fold{k}", _fold_types(f"*{POINTER[results[k]]}"), (("part", 16),), SUM_WARPS)
        for k in script.folds
    )
    return (main, *sums, *folds)


def _fold_types(result: str) -> tuple[tuple[str, str], ...]:
    """Parameters of ENTRY_foldK."""
    strides = (("y_o", "i64"), ("y_i", "i64"))
    return ("part", "*fp32"), ("y", result), *strides, ("rows", "i32"), ("inner", "i32")


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
        short = ["*", "*", "i32"] if len(launch.arguments) == 3 else [t for _, t in _fold_types("*")]
        types = [a.dtype for a in launcher.arguments] if main else short
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
