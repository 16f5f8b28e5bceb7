"""Generated matrix products as kernels of a plan: source, sm_90a binary, and all that launching them needs."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from typing import TYPE_CHECKING

from dsv3c.errors import WorkError
from dsv3c.lazy import lazy
from dsv3c.target import Kernel, KernelFile
from dsv3c.targets import _gluon_launch, _gluon_ptx
from dsv3c.targets._gluon_gemm import source
from dsv3c.targets._gluon_launch import Binary, Loaded, Refused
from dsv3c.targets._gluon_spec import Descriptor, GemmSpec, arguments
from dsv3c.targets._triton_build import ARCH, _write, triton_version
from dsv3c.targets._tvm_build import cache_folder

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

LANGUAGE = "gluon"


@functools.cache
def kernel_id(spec: GemmSpec) -> str:
    """The name of the kernel's files: what it is, and the first digits of its source's hash."""
    digest = hashlib.sha256(source(spec).encode()).hexdigest()[:8]
    return f"{spec.name}_{spec.output}_{digest}"


@functools.cache
def _key(spec: GemmSpec) -> str:
    makers = "".join(inspect.getsource(m) for m in (_gluon_launch, _gluon_ptx))
    return hashlib.sha256(f"{spec}\n{source(spec)}\n{makers}\n{triton_version()}".encode()).hexdigest()


def gemm_binary(spec: GemmSpec) -> Binary:
    """The sm_90a binary of `spec`, from the cache if it is there; needs no GPU. Raises WorkError if Triton cannot make
    it."""
    key, folder = _key(spec), cache_folder()
    try:
        facts = json.loads((folder / f"{key}.json").read_text())
        cubin = (folder / f"{key}.cubin").read_bytes()
        if hashlib.sha256(cubin).hexdigest() == facts.pop("digest"):
            return Binary(cubin, **facts)
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none there, or damaged: built below
    made = _gluon_launch.build(spec, folder)
    facts = {"entry": made.entry, "shared": made.shared, "threads": made.threads, "cluster": made.cluster,
             "digest": hashlib.sha256(made.cubin).hexdigest()}  # fmt: skip
    _write(folder / f"{key}.cubin", made.cubin)
    _write(folder / f"{key}.json", json.dumps(facts).encode())
    return made


def gemm_kernel(spec: GemmSpec, kernels: str) -> Kernel:
    """The kernel of a plan for `spec`: its source, and with `kernels` = binary its sm_90a code."""
    files = [KernelFile("py", source(spec).encode())]
    facts: list[tuple[str, str | int]] = [
        ("arch", ARCH),
        ("kind", spec.kind),
        ("dtype", spec.dtype),
        ("bm", spec.bm),
        ("bn", spec.bn),
        ("stages", spec.stages),
        ("output", spec.output),
        ("raster", spec.raster),
        ("pair", spec.pair),
        ("order", spec.order),
    ]
    if kernels == "binary":
        made = gemm_binary(spec)
        files.append(KernelFile("cubin", made.cubin))
        facts += [("entry", made.entry), ("shared", made.shared), ("threads", made.threads), ("cluster", made.cluster),
                  ("triton", triton_version())]  # fmt: skip
    operation = f"{spec.kind}_{spec.dtype}" + ("_adding" if spec.output == "accumulate_f32" else "")
    return Kernel(kernel_id(spec), operation, LANGUAGE, signature(spec), tuple(files), tuple(sorted(facts)))


def signature(spec: GemmSpec) -> tuple[str, ...]:
    """The kernel's arguments in words."""
    return tuple(f"{name}: {_shown(kind)}" for name, kind in arguments(spec))


def _shown(kind: str | Descriptor) -> str:
    return kind if isinstance(kind, str) else f"tile {'×'.join(map(str, kind.block))} {kind.element}"


def spec_of_kernel(kernel: Kernel) -> GemmSpec:
    """The spec that a kernel of a plan was made for."""
    facts = dict(kernel.launch)
    numbers = {name: int(facts[name]) for name in ("bm", "bn", "stages", "raster")}
    words = {name: str(facts[name]) for name in ("kind", "dtype", "output", "pair", "order")}
    return GemmSpec(**words, **numbers)  # type: ignore[arg-type]


def load_gemm(kernel: Kernel) -> Loaded:
    """A kernel of a plan on the current GPU: its binary, or where the driver refuses that, or there is none, its source
    compiled here. Raises WorkError saying why neither can be."""
    spec, facts = spec_of_kernel(kernel), dict(kernel.launch)
    require_hopper(kernel.op)
    if kernel.signature != signature(spec):
        raise WorkError(f"the kernel {kernel.id} takes other arguments than this dsv3c gives; compile the plan again")
    if not kernel.has_binary:
        return _from_source(spec, kernel)
    shared, threads, cluster = (int(facts[name]) for name in ("shared", "threads", "cluster"))
    try:
        return load_binary(spec, Binary(kernel.file("cubin"), str(facts["entry"]), shared, threads, cluster))
    except Refused as refused:
        try:
            return _from_source(spec, kernel)
        except WorkError as error:
            raise WorkError(f"{refused}, and from source: {error}") from error


def _from_source(spec: GemmSpec, kernel: Kernel) -> Loaded:
    """The plan's own source, compiled on this machine."""
    text = kernel.file("py").decode()
    if text == source(spec):
        return load_binary(spec, gemm_binary(spec))
    return load_binary(spec, _gluon_launch.build(spec, cache_folder(), text))


def require_hopper(what: str) -> None:
    """Raise WorkError unless the current GPU runs code for sm_90a."""
    if not torch.cuda.is_available():
        raise WorkError(f"the kernel {what} needs an NVIDIA GPU, and none is usable here")
    major, minor = torch.cuda.get_device_capability()
    if major * 10 + minor != ARCH:
        raise WorkError(
            f"the kernel {what} is made of Hopper's own instructions (sm_90a) and this GPU is sm_{major}{minor}; "
            "run the plan on an H100, H200 or H800"
        )


@functools.lru_cache(maxsize=256)
def load_binary(spec: GemmSpec, binary: Binary) -> Loaded:
    """The kernel on the current GPU, once for each binary. Raises Refused if the driver does not take it."""
    return _gluon_launch.load(spec, binary)

