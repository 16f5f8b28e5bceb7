"""From TIR text to a loaded function: compile to LLVM text once, keep it by content, load it with no C compiler.

Rows run on the threads of torch's own OpenMP team: a second pool would fight it for the cores. A few lines of LLVM
text replace TVM's launcher; where the process has no OpenMP, TVM's pool is used.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3c.errors import WorkError
from dsv3c.lazy import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

CPU_KINDS = ("x86-64-v3", "x86-64-v4", "x86-64-v2")
"""Instruction sets that kernels may be compiled for; the first is the default."""

_OPENMP = """
@dsv3c.threads = internal global i32 0
define internal i32 @dsv3c_threads(i32 %count) {
  store i32 %count, ptr @dsv3c.threads
  ret i32 0
}
%dsv3c.team = type { ptr, ptr, i32 }
%dsv3c.place = type { ptr, i32 }
declare void @GOMP_parallel(ptr, ptr, i32, i32)
declare i32 @omp_get_thread_num()
declare i32 @omp_get_num_threads()
define internal void @dsv3c_member(ptr %team) {
  %place = alloca %dsv3c.place
  %body = load ptr, ptr %team
  %data.at = getelementptr %dsv3c.team, ptr %team, i32 0, i32 1
  %data = load ptr, ptr %data.at
  %count = call i32 @omp_get_num_threads()
  %index = call i32 @omp_get_thread_num()
  store ptr null, ptr %place
  %count.at = getelementptr %dsv3c.place, ptr %place, i32 0, i32 1
  store i32 %count, ptr %count.at
  %status = call i32 %body(i32 %index, ptr %place, ptr %data)
  %status.at = getelementptr %dsv3c.team, ptr %team, i32 0, i32 2
  %before = atomicrmw or ptr %status.at, i32 %status monotonic
  ret void
}
define internal i32 @dsv3c_launch(ptr %body, ptr %data, i32 %unused) {
  %team = alloca %dsv3c.team
  store ptr %body, ptr %team
  %data.at = getelementptr %dsv3c.team, ptr %team, i32 0, i32 1
  store ptr %data, ptr %data.at
  %status.at = getelementptr %dsv3c.team, ptr %team, i32 0, i32 2
  store i32 0, ptr %status.at
  %count = load i32, ptr @dsv3c.threads
  call void @GOMP_parallel(ptr @dsv3c_member, ptr %team, i32 %count, i32 0)
  %status = load i32, ptr %status.at
  ret i32 %status
}
"""

_TVM_POOL = """
define internal i32 @dsv3c_threads(i32 %count) {
  ret i32 0
}
define internal i32 @dsv3c_launch(ptr %body, ptr %data, i32 %count) {
  %launch = load ptr, ptr @__TVMBackendParallelLaunch
  %status = call i32 %launch(ptr %body, ptr %data, i32 %count)
  ret i32 %status
}
"""


def check_cpu(cpu: str) -> str:
    """`cpu` if kernels can be compiled for it; WorkError names those that can."""
    if cpu not in CPU_KINDS:
        raise WorkError(f"kernels cannot be compiled for the CPU '{cpu}'; known: {', '.join(CPU_KINDS)}")
    return cpu


def compile_text(script: str, entry: str, cpu: str = CPU_KINDS[0]) -> bytes:
    """The LLVM text of a TIR script's function `entry`, for the instruction set `cpu`; from the cache if it is there.

    The function does not check its arguments: whoever binds them does. Equal scripts give equal bytes with one
    version of TVM. Raises WorkError if TVM is missing or refuses the script.
    """
    check_cpu(cpu)
    key = hashlib.sha256("\n".join((script, entry, cpu, _version(), _OPENMP)).encode()).hexdigest()
    path = cache_folder() / f"{key}.ll"
    try:
        return path.read_bytes()
    except OSError:
        pass
    data = _compile(script, entry, cpu).encode()
    _write(path, data)
    return data


def cache_folder() -> Path:
    """Where compiled kernels are kept: $DSV3C_CACHE, else dsv3c/kernels in the user's cache folder."""
    given = os.environ.get("DSV3C_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsv3c" / "kernels"


def _write(path: Path, data: bytes) -> None:
    """Atomically, so that a reader never sees half a file; a folder that cannot be written only costs time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError:
        return


def _version() -> str:
    try:
        return importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError as error:
        raise WorkError("kernels for the CPU need TVM: pip install apache-tvm, or use --kernels none") from error


@functools.cache
def _lowering() -> str:
    """The name of the passes that our scripts need. TVM's default list takes seconds to analyse what LLVM does
    well, and moves vector temporaries from the stack to the heap."""
    import tvm
    from tvm import tirx

    def passes() -> tuple[object, ...]:
        module_passes = [
            tirx.transform.FlattenBuffer(),
            tirx.transform.VectorizeLoop(True),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
        ]
        host = [tirx.transform.LowerTVMBuiltin(), tirx.transform.LowerIntrin()]
        run = tvm.ir.transform.Sequential
        return run(module_passes), lambda: run(host), lambda: run([tirx.transform.LowerIntrin()])

    tirx.compilation_pipeline.register_tir_pipeline("dsv3c_rows", passes)
    return "dsv3c_rows"


def _compile(script: str, entry: str, cpu: str) -> str:
    _version()
    import tvm

    try:
        function = tvm.script.from_source(script)
        module = tvm.IRModule({entry: function})
        target = tvm.target.Target({"kind": "llvm", "mcpu": cpu})
        with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
            built = tvm.compile(module, target=target, tir_pipeline=_lowering())
    except (RuntimeError, ValueError, TypeError) as error:
        raise WorkError(f"TVM could not compile the kernel {entry}: {str(error).strip().splitlines()[0]}") from error
    return _finish(built.mod.inspect_source("ll"))


def _finish(text: str) -> str:
    """LLVM text without line information, with our launcher in the place of TVM's."""
    lines = [s for s in text.split("\n") if not s.lstrip().startswith("#dbg_") and not s.startswith("!llvm.dbg.cu")]
    text = re.sub(r",? !dbg !\d+", "", "\n".join(lines))
    text = re.sub(r"^declare [^\n]*@dsv3c_threads\([^\n]*\n", "", text, flags=re.MULTILINE)
    text = re.sub(r" call i32 %\d+\((ptr[^,]* @__tvm_parallel_lambda)", r" call i32 @dsv3c_launch(\1", text)
    for helper in ("__truncsfhf2", "__extendhfsf2"):
        if len(re.findall(rf"@{helper}\b", text)) == 1:
            text = re.sub(rf"^define [^\n]*@{helper}\(.*?^}}\n", "", text, flags=re.MULTILINE | re.DOTALL)
    return text + _OPENMP


def check_machine(cpu: str) -> None:
    """Raise WorkError unless this machine has the instruction set `cpu`; code for another one would kill it."""
    order = ("DEFAULT", "AVX2", "AVX512")
    needed = {"x86-64-v2": 0, "x86-64-v3": 1, "x86-64-v4": 2}[check_cpu(cpu)]
    have = torch.backends.cpu.get_cpu_capability()
    if platform.machine() not in ("x86_64", "AMD64") or have not in order or order.index(have) < needed:
        raise WorkError(
            f"the plan's kernels are for {cpu}, this machine is {platform.machine()} with {have}; "
            "compile with --kernels none to run without them"
        )


@functools.cache
def _has_openmp() -> bool:
    torch.get_num_threads()
    return hasattr(ctypes.CDLL(None), "GOMP_parallel")


@functools.cache
def _module_loader() -> Callable[[str], Any]:
    """TVM's loader of LLVM text; only its libraries are needed, not its Python package."""
    _version()
    torch.get_num_threads()
    import tvm_ffi

    found = importlib.util.find_spec("tvm")
    if found is None or not found.submodule_search_locations:
        raise WorkError("kernels for the CPU need TVM: pip install apache-tvm, or use --kernels none")
    folder = Path(found.submodule_search_locations[0]) / "lib"
    for name in ("libtvm_runtime.so", "libtvm_runtime_extra.so", "libtvm_compiler.so"):
        if (folder / name).exists():
            ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    return tvm_ffi.load_module


def load_text(data: bytes, entry: str) -> Callable[..., None]:
    """The function `entry` of LLVM text; takes tensors that speak DLPack.

    Raises WorkError if this machine cannot load it.
    """
    text = data.decode()
    if not _has_openmp():
        text = text.replace(_OPENMP, _TVM_POOL)
    loader = _module_loader()
    with tempfile.TemporaryDirectory(prefix="dsv3c-") as folder:
        path = Path(folder) / "kernel.ll"
        path.write_text(text)
        try:
            module = loader(str(path))
            return module[entry]  # type: ignore[no-any-return]
        except (RuntimeError, AttributeError, ValueError) as error:
            raise WorkError(f"the kernel {entry} does not load here: {str(error).strip().splitlines()[0]}") from error
