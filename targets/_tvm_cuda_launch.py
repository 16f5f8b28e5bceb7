"""Records of CUDA source that TVM generated for regions, and running them: NVRTC makes the binary where the GPU is."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3c.errors import WorkError
from dsv3c.ir import Graph
from dsv3c.lazy import lazy
from dsv3c.ops import REGISTRY
from dsv3c.target import Kernel, KernelFile
from dsv3c.targets._regions import compose
from dsv3c.targets._triton_build import Prepared, driver
from dsv3c.targets._triton_launcher import Call, RegionLauncher
from dsv3c.targets._triton_rows import SUM_COLUMNS
from dsv3c.targets._tvm_cuda import BLOCKS, THREADS, WARP, generate

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def region_kernel(region: Graph, sizes: Mapping[str, int]) -> Kernel:
    """The kernel record of a region with its CUDA source and TIR; `load_kernel` runs it.

    Raises IRError if the region is not row-wise or `generate` cannot make it, WorkError if TVM is missing.
    """
    program = compose(region, REGISTRY, sizes)
    entry = "".join(c if c.isalnum() else "_" for c in region.name)
    script = generate(program, entry)
    launch: tuple[tuple[str, str | int], ...] = (
        ("entry", entry),
        ("rows", 1),
        ("chunks", 1),
        ("programs", BLOCKS if script.sums else 0),
        ("warps", THREADS // WARP),
        ("arguments", " ".join(f"{a}:{'stride' if '_' in a else 'size'}:{_kind(a)}:1" for a in script.arguments)),
        ("operands", " ".join(f"{o.kind}:{o.cols}:{o.dtype}" for o in program.operands)),
        ("results", " ".join(f"{r.kind}:{r.cols}:{r.dtype}" for r in program.results)),
        ("sums", " ".join(map(str, script.sums))),
    )
    files = KernelFile("tir.py", script.tir.encode()), KernelFile("cu", script.text.encode())
    digest = hashlib.sha256(script.text.encode()).hexdigest()[:8]
    signature = tuple(str(v.type) for v in (*region.params, *region.results))
    return Kernel(f"{entry}_{digest}", region.name, "tvm", signature, files, launch)


def _kind(argument: str) -> str:
    """How a parameter is passed: a pointer or a number of 64 bits."""
    return "*" if argument[0] in "xyp" and "_" not in argument else "i64"


def load_kernel(kernel: Kernel) -> Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], Callable[[], None]]:
    """`prepare(inputs, outputs)` of a record on the current CUDA device; WorkError where NVRTC or the driver fails."""
    launcher, facts = RegionLauncher(kernel), dict(kernel.launch)
    torch.empty(1, device="cuda")  # makes torch's context current
    cubin = compile_cuda(kernel.file("cu").decode())
    names = [launcher.entry, *(f"{launcher.entry}_sum{k}" for k in launcher.sums)]
    functions = {name: driver().load(cubin, name, 0) for name in names}

    def prepare(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Callable[[], None]:
        bound = launcher.bind(inputs, outputs)
        calls: list[Call] = [*bound.before]
        for launch in bound.launches:
            main = launch.entry == launcher.entry
            types = [a.dtype for a in launcher.arguments] if main else ["*", "*", "i32"]
            values = tuple(
                (t, a if isinstance(a, int) else bound.tensors[a[0]])
                for t, a in zip(types, launch.arguments, strict=True)
            )
            warps = int(facts["warps"]) if main else SUM_COLUMNS // WARP
            calls.append(Prepared(functions[launch.entry], launch.entry, launch.grid, warps, 0, values))
        calls += bound.after

        def run() -> None:
            for call in calls:
                call()

        return run

    return prepare


def compile_cuda(text: str) -> bytes:
    """The sm_90a binary of CUDA text, by NVRTC. Products and sums are rounded one by one, as the references do.

    Raises WorkError if NVRTC is missing or refuses the text.
    """
    library = _nvrtc()
    program = ctypes.c_void_p()
    source, name = text.encode(), b"region.cu"
    library.nvrtcCreateProgram(ctypes.byref(program), source, name, 0, None, None)
    flags = (b"--gpu-architecture=sm_90a", b"--fmad=false")
    status = library.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags))
    try:
        if status:
            size = ctypes.c_size_t()
            library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            library.nvrtcGetProgramLog(program, log)
            first = next((line for line in log.value.decode().splitlines() if "error" in line), str(status))
            raise WorkError(f"NVRTC refuses generated CUDA: {first}")
        size = ctypes.c_size_t()
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    torch.cuda.is_available()  # loads what torch carries
    folders = [Path(p) / "nvidia" for p in sys.path if (Path(p) / "nvidia").is_dir()]
    carried = [str(f) for folder in folders for f in sorted(folder.glob("**/libnvrtc.so.*"))]
    for name in ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so", *carried):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise WorkError("there is no NVRTC on this machine; it comes with CUDA builds of torch")
