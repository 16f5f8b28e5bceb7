"""From Triton source to a Kernel record and to a launch: sm_90a binaries made with no GPU, kept by content, started
through the CUDA driver; from source where the GPU is another."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3c.errors import WorkError
from dsv3c.lazy import lazy
from dsv3c.target import KernelFile
from dsv3c.targets._triton_interpreter import module_of
from dsv3c.targets._tvm_build import cache_folder

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

ARCH = 90
"""Compute capability that binaries are made for; its wgmma and TMA instructions make it sm_90a."""
MOST_WARPS = 32
PLENTY_SHARED = 48 * 1024
"""Bytes of shared memory that a kernel gets without asking."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the compiler needs to know of one kernel in a source file. `signature`: (parameter, Triton's type) in
    order, constants as `constexpr`; `constants`: their values; `divisible`: (parameter, what its value divides by)."""

    name: str
    signature: tuple[tuple[str, str], ...]
    divisible: tuple[tuple[str, int], ...]
    warps: int
    stages: int = 1
    constants: tuple[tuple[str, int], ...] = ()

    def text(self) -> str:
        """Everything but the source that decides the binary."""
        return json.dumps([self.name, self.signature, self.divisible, self.warps, self.stages, self.constants])


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled kernel: its files, the warps it runs with, bytes of dynamic shared memory."""

    cubin: bytes
    ttir: bytes
    warps: int
    shared: int

    def files(self, prefix: str = "") -> tuple[KernelFile, ...]:
        """Files of a Kernel record."""
        return KernelFile(f"{prefix}ttir", self.ttir), KernelFile(f"{prefix}cubin", self.cubin)


def triton_version() -> str:
    """Triton's version; WorkError if it is missing."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError as error:
        raise WorkError("kernels for Hopper need Triton: pip install triton, or use --kernels none") from error


def compile_source(source: str, entry: Entry) -> Binary:
    """The sm_90a binary of a kernel, from the cache if it is there; needs no GPU.

    A kernel that would spill registers gets more warps. Equal arguments give equal bytes with one version of Triton.
    Raises WorkError if Triton is missing or refuses the source.
    """
    key = hashlib.sha256("\n".join((source, entry.text(), triton_version(), str(ARCH))).encode()).hexdigest()
    folder = cache_folder()
    try:
        facts = json.loads((folder / f"{key}.json").read_text())
        cubin, ttir = (folder / f"{key}.cubin").read_bytes(), (folder / f"{key}.ttir").read_bytes()
        if facts["cubin"] == hashlib.sha256(cubin).hexdigest():
            return Binary(cubin, ttir, int(facts["warps"]), int(facts["shared"]))
    except (OSError, ValueError, KeyError):
        pass
    made = _compile(source, entry)
    facts = {"warps": made.warps, "shared": made.shared, "cubin": hashlib.sha256(made.cubin).hexdigest()}
    for suffix, data in (("cubin", made.cubin), ("ttir", made.ttir), ("json", json.dumps(facts).encode())):
        _write(folder / f"{key}.{suffix}", data)
    return made


def _write(path: Path, data: bytes) -> None:
    """Atomically; a folder that cannot be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError:
        return


def _compile(source: str, entry: Entry) -> Binary:
    module = module_of(source)
    warps = entry.warps
    while True:
        made = _compile_once(getattr(module, entry.name), entry, warps)
        if warps >= MOST_WARPS or resources(made.cubin).stack == 0:
            return made
        warps *= 2


def _compile_once(function: Any, entry: Entry, warps: int) -> Binary:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(function.arg_names)
    attrs = {(names.index(n),): [["tt.divisibility", d]] for n, d in entry.divisible if d > 1}
    constants = {(names.index(n),): value for n, value in entry.constants}
    ast = ASTSource(fn=function, signature=dict(entry.signature), constexprs=constants, attrs=attrs)
    saved = triton.knobs.compilation.disable_line_info
    triton.knobs.compilation.disable_line_info = True
    try:
        built = triton.compile(
            ast, target=GPUTarget("cuda", ARCH, 32), options={"num_warps": warps, "num_stages": entry.stages}
        )
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WorkError(f"Triton could not compile the kernel {entry.name}: {first}") from error
    finally:
        triton.knobs.compilation.disable_line_info = saved
    ttir = _without_places(str(built.asm["ttir"])).encode()
    return Binary(bytes(built.asm["cubin"]), ttir, warps, int(built.metadata.shared))


def _without_places(text: str) -> str:
    """MLIR text that does not say which file it came from."""
    text = re.sub(r"^#loc\d* = .*\n", "", text, flags=re.MULTILINE)
    return re.sub(r" loc\((?:[^()\"]|\"[^\"]*\"|\((?:[^()\"]|\"[^\"]*\")*\))*\)", "", text)


@dataclass(frozen=True, slots=True)
class Resources:
    """Registers a thread, bytes of stack a thread (spilled registers live there), static shared memory."""

    registers: int
    stack: int
    shared: int


def resources(cubin: bytes) -> Resources:
    """What a binary takes, read by the tool that Triton's package carries; WorkError if the tool fails."""
    text = _inspect("cuobjdump", ("-res-usage",), cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if found is None:
        raise WorkError("cuobjdump says nothing about the registers of a kernel: its version does not fit")
    return Resources(*map(int, found.groups()))


def disassemble(cubin: bytes) -> str:
    """The machine instructions of a binary."""
    return _inspect("nvdisasm", ("-c",), cubin)


def _inspect(tool: str, flags: tuple[str, ...], cubin: bytes) -> str:
    import triton

    path = getattr(triton.knobs.nvidia, tool).path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            done = subprocess.run([path, *flags, file.name], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise WorkError(f"{tool} from Triton's package does not run here: {error}") from error
    return done.stdout + done.stderr


class Driver:
    """The CUDA driver, as far as loading and launching binaries goes."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise WorkError(
                "there is no NVIDIA driver on this machine, so kernels for Hopper cannot run here"
            ) from error
        self.check(self._library.cuInit(0), "starting the driver")

    def check(self, status: int, doing: str) -> None:
        """Raise WorkError with the driver's words unless `status` is success."""
        if status:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise WorkError(f"CUDA failed {doing}: {(text.value or str(status).encode()).decode()}")

    def load(self, cubin: bytes, name: str, shared: int) -> ctypes.c_void_p:
        """The function called `name`; the current context must be that of the device."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self._library.cuModuleLoadData(ctypes.byref(module), cubin), f"loading the kernel {name}")
        self.check(
            self._library.cuModuleGetFunction(ctypes.byref(function), module, name.encode()),
            f"finding the kernel {name}",
        )
        if shared > PLENTY_SHARED:
            attribute = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self.check(
                self._library.cuFuncSetAttribute(function, attribute, shared),
                f"giving {shared} bytes of shared memory to {name}",
            )
        return function

    def launch(self, function: ctypes.c_void_p, grid: tuple[int, int, int], threads: int, shared: int, stream: int,
               arguments: Any, name: str) -> None:  # fmt: skip
        """Start a kernel on `stream`; `arguments` is an array of pointers to the values."""
        status = self._library.cuLaunchKernel(
            function, *grid, threads, 1, 1, shared, ctypes.c_void_p(stream), arguments, None
        )
        if status:
            self.check(status, f"launching the kernel {name}")


@functools.cache
def driver() -> Driver:
    """The driver of this process."""
    return Driver()


C_TYPES: Mapping[str, Any] = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
"""How parameters that are no pointers are passed."""


class Prepared:
    """One launch with its arguments bound; called, it starts the kernel on torch's current stream."""

    def __init__(self, function: ctypes.c_void_p, name: str, grid: tuple[int, ...], warps: int, shared: int,
                 values: tuple[tuple[str, int | torch.Tensor], ...]) -> None:  # fmt: skip
        """`values`: (Triton's type, number or tensor) of each parameter. Two scratch pointers follow, unused."""
        self.name, self._function, self._threads, self._shared = name, function, warps * 32, shared
        x, y, z = (*grid, 1, 1)[:3]
        self._grid = x, y, z
        self._kept = values  # the tensors must outlive the launch
        numbers = [(t, v if isinstance(v, int) else v.data_ptr()) for t, v in values]
        self._values = [C_TYPES.get(t, ctypes.c_void_p)(v) for t, v in (*numbers, ("*", 0), ("*", 0))]
        pointers = [ctypes.cast(ctypes.byref(v), ctypes.c_void_p) for v in self._values]
        self._arguments = (ctypes.c_void_p * len(pointers))(*pointers)

    def __call__(self) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        driver().launch(self._function, self._grid, self._threads, self._shared, stream, self._arguments, self.name)
