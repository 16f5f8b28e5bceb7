"""Compile generated Gluon kernels to sm_90a, with or without a GPU, and launch the binaries through the CUDA driver.

The same launcher serves binaries from a plan and binaries compiled on the spot; it needs the driver library only.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3c.errors import WorkError
from dsv3c.targets._cuda_device import driver_version, driver_words, known_triton
from dsv3c.targets._gluon_gemm import source
from dsv3c.targets._gluon_ptx import adding, assemble, paired
from dsv3c.targets._gluon_spec import Descriptor, GemmSpec, arguments

if TYPE_CHECKING:
    import torch

WARPS_AT_ENTRY = 4
MULTIPLES_OF_16 = ("K", "N")
"""Integer arguments that callers promise to be multiples of 16."""


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled kernel: cubin bytes, dynamic shared memory in bytes, threads per block, blocks per cluster."""

    cubin: bytes
    entry: str
    shared: int
    threads: int
    cluster: int = 1


def _layout_text(d: Descriptor) -> str:
    from triton.experimental.gluon import language as gl

    element = {"fp8e4nv": gl.float8e4nv, "bf16": gl.bfloat16, "fp32": gl.float32}[d.element]
    if d.swizzle:
        layout = gl.NVMMASharedLayout.get_default_for(list(d.block), element)
    else:
        layout = gl.NVMMASharedLayout(0, element.primitive_bitwidth, rank=len(d.block))
    return f"tensordesc<{d.element}{list(d.block)},{layout!r}>"


def _module(text: str, name: str, folder: Path) -> Any:
    """Import `text` from a real file, which Triton needs to read the source of a kernel."""
    path = folder / f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:16]}.py"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(draft, path)
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def build(spec: GemmSpec, folder: Path, text: str | None = None) -> Binary:
    """Compile the kernel of `spec` for sm_90a (1 to 4 s, no GPU needed); its source is left in `folder`.

    Raises WorkError if Triton is missing, of a version that it was not tried with, or refuses the source.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    known_triton()
    module = _module(source(spec) if text is None else text, spec.name, folder)
    given = arguments(spec)
    signature = {n: _layout_text(t) if isinstance(t, Descriptor) else t for n, t in given}
    aligned = {(i,): [["tt.divisibility", 16]] for i, (n, t) in enumerate(given)
               if n in MULTIPLES_OF_16 or (isinstance(t, str) and t.startswith("*"))}  # fmt: skip
    kernel_source = GluonASTSource(fn=module.kernel, signature=signature, constexprs={}, attrs=aligned)
    options = {"num_warps": WARPS_AT_ENTRY}
    with_lines = triton.knobs.compilation.disable_line_info
    triton.knobs.compilation.disable_line_info = True  # they would bring the path of the source into the binary
    try:
        compiled = triton.compile(kernel_source, target=GPUTarget("cuda", 90, 32), options=options)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WorkError(f"Triton could not compile the kernel {spec.name}: {first}") from error
    finally:
        triton.knobs.compilation.disable_line_info = with_lines
    meta = compiled.metadata
    ptx = compiled.asm["ptx"]
    if spec.output == "accumulate_f32":
        ptx = adding(ptx)
    if spec.pair:
        ptx = paired(ptx, spec.copies, arrivals=2 * spec.consumers)
    cubin = compiled.asm["cubin"] if ptx is compiled.asm["ptx"] else assemble(ptx)
    return Binary(cubin, meta.name, meta.shared, 32 * meta.num_warps, 2 if spec.pair else 1)


_SWIZZLE_BYTES = {32: 1, 64: 2, 128: 3}
_TMA_ELEMENT = {"fp8e4nv": 0, "bf16": 9, "fp32": 7}
_BYTES = {"fp8e4nv": 1, "bf16": 2, "fp32": 4}


@functools.cache
def _driver() -> Any:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise WorkError("there is no NVIDIA driver on this machine (libcuda.so.1); the plan needs a Hopper GPU") from e
    _check(library.cuInit(0), "cuInit")
    return library


class Refused(WorkError):
    """The driver does not take a binary: it is too old for it, or the GPU is another."""


def _check(code: int, call: str) -> None:
    if code:
        raise WorkError(f"the CUDA driver refused {call}: {driver_words(code)}")


def _tensor_map(tensor: torch.Tensor, d: Descriptor) -> ctypes.Array[ctypes.c_uint64]:
    """The 128 bytes of a TMA descriptor for a contiguous vector or matrix, at an address that is a multiple of 64."""
    room = (ctypes.c_uint64 * 24)()
    offset = -ctypes.addressof(room) % 64
    size = _BYTES[d.element]
    inner = min(d.block[-1] * size, 128) if d.swizzle else d.block[-1] * size
    box = (ctypes.c_uint32 * 2)(inner // size, d.block[0])
    rows, columns = (1, tensor.numel()) if tensor.dim() == 1 else tensor.shape
    shape = (ctypes.c_uint64 * 2)(columns, rows)
    stride = (ctypes.c_uint64 * 1)(tensor.stride(0) * size if tensor.dim() == 2 else 0)
    ones, rank = (ctypes.c_uint32 * 2)(1, 1), ctypes.c_uint32(tensor.dim())
    if tensor.data_ptr() % 16 or stride[0] % 16:
        raise WorkError("A matrix does not start or step at a multiple of 16 bytes, which TMA needs.")
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(ctypes.addressof(room) + offset), ctypes.c_int(_TMA_ELEMENT[d.element]), rank,
        ctypes.c_void_p(tensor.data_ptr()), shape, stride, box, ones, ctypes.c_int(0),
        ctypes.c_int(_SWIZZLE_BYTES[inner] if d.swizzle else 0), ctypes.c_int(2), ctypes.c_int(0),
    )  # fmt: skip
    _check(code, "cuTensorMapEncodeTiled")
    aligned = (ctypes.c_uint64 * 16).from_buffer(room, offset)
    return aligned


_CLUSTER_DIMENSION = 4


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute holding a cluster shape; its union is 64 bytes."""

    _fields_ = (
        ("id", ctypes.c_uint),
        ("pad", ctypes.c_uint),
        ("shape", ctypes.c_uint * 3),
        ("rest", ctypes.c_uint * 13),
    )


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)), ("count", ctypes.c_uint),
    )  # fmt: skip


class Loaded:
    """A kernel on the device: call `bind` with its arguments to get a function that launches it."""

    def __init__(self, name: str, binary: Binary, given: tuple[tuple[str, str | Descriptor], ...]) -> None:
        self.binary, self.given = binary, given
        driver = _driver()
        module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        code = driver.cuModuleLoadData(ctypes.byref(module), binary.cubin)
        if code:
            raise Refused(f"the driver, made for CUDA {driver_version()}, does not load the kernel {name}: "
                          f"{driver_words(code)}")  # fmt: skip
        entry = binary.entry.encode()
        _check(driver.cuModuleGetFunction(ctypes.byref(self.function), module, entry), "cuModuleGetFunction")
        # Attribute 8: the most dynamic shared memory a block may ask for.
        _check(driver.cuFuncSetAttribute(self.function, 8, ctypes.c_int(binary.shared)), "cuFuncSetAttribute")

    def bind(self, units: int, **values: torch.Tensor | int) -> Callable[[], None]:
        """A launch on `units` SMs in torch's current stream. Tensors are kept alive by the function returned."""
        import torch

        words: list[Any] = []
        for name, kind in self.given:
            value = values[name]
            if isinstance(kind, Descriptor):
                assert isinstance(value, torch.Tensor)
                matrix = value.flatten() if len(kind.block) == 1 else value.flatten(0, -2)
                words.append(_tensor_map(matrix, kind))
                words += [ctypes.c_int32(n) for n in matrix.shape] + [ctypes.c_int64(n) for n in matrix.stride()]
            elif isinstance(value, torch.Tensor):
                words.append(ctypes.c_void_p(value.data_ptr()))
            else:
                words.append(ctypes.c_int32(value))
        words += [ctypes.c_void_p(0), ctypes.c_void_p(0)]  # Triton's global and profiling scratch, unused here
        packed = (ctypes.c_void_p * len(words))(*(ctypes.addressof(w) for w in words))
        launch, function = _driver().cuLaunchKernelEx, self.function
        binary = self.binary
        cluster = _Attribute(_CLUSTER_DIMENSION, 0, (binary.cluster, 1, 1))
        blocks = units // binary.cluster * binary.cluster
        config = _Config(blocks, 1, 1, binary.threads, 1, 1, binary.shared, None, ctypes.pointer(cluster), 1)

        def run() -> None:
            config.stream = torch.cuda.current_stream().cuda_stream
            _check(launch(ctypes.byref(config), function, packed, None), "cuLaunchKernelEx")

        run.keep = (words, values)  # type: ignore[attr-defined]
        return run


def load(spec: GemmSpec, binary: Binary) -> Loaded:
    """Load a compiled kernel of `spec` on the current device. WorkError: no driver, or other hardware."""
    import torch

    torch.cuda.current_stream()  # makes torch's context the current one
    return Loaded(spec.name, binary, arguments(spec))
