"""Whether this machine can run code for Hopper, and if not, why: no GPU, another one, too old a driver, another Triton.

Every sentence says what is there and what to do.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
from typing import TYPE_CHECKING, Any

from dsv3c.errors import WorkError
from dsv3c.lazy import lazy

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

HOPPER = (9, 0)
LEAST_DRIVER = 12000
"""CUDA 12.0 brought clusters and tensor maps; as the driver counts: 1000·major + 10·minor."""
TRITON = ("3.6", "3.7")
"""Versions of Triton whose machine code was tried: generated kernels complete what these emit."""


def trouble() -> str:
    """Why no kernel for Hopper can run here, in words that end a sentence; "" if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install one that has it, where there is a Hopper GPU"
    version = _driver_number()
    if version is None:
        return "there is no NVIDIA driver on this machine; run it where there is a Hopper GPU"
    needed = max(LEAST_DRIVER, 1000 * int(torch.version.cuda.partition(".")[0]))
    if version < needed:
        return f"the NVIDIA driver is made for CUDA {_shown(version)} and CUDA {_shown(needed)} is needed; update it"
    if not torch.cuda.is_available() or not torch.cuda.device_count():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        return "torch sees no GPU" + (f"; CUDA_VISIBLE_DEVICES is '{hidden}'" if hidden is not None else "")
    found = torch.cuda.get_device_capability()
    if found != HOPPER:
        name = torch.cuda.get_device_name()
        return f"{name} is sm_{found[0]}{found[1]} and kernels are made for Hopper, sm_90a; use an H100, H200 or H800"
    return ""


def _library() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _driver_number() -> int | None:
    """The CUDA version that the driver is made for; None without a driver."""
    try:
        library = _library()
    except OSError:
        return None
    number = ctypes.c_int()
    return None if library.cuDriverGetVersion(ctypes.byref(number)) else number.value


def _shown(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def driver_version() -> str:
    """The CUDA version that the driver is made for, such as 13.0."""
    number = _driver_number()
    return "unknown" if number is None else _shown(number)


def driver_words(code: int) -> str:
    """What the driver says of a status."""
    text = ctypes.c_char_p()
    _library().cuGetErrorString(code, ctypes.byref(text))
    return (text.value or f"error {code}".encode()).decode()


def known_triton() -> None:
    """Raise WorkError unless a version of Triton is installed that the generated matrix products were tried with."""
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        raise WorkError("kernels for Hopper need Triton: pip install triton==3.7.1, or use --kernels none") from None
    if not found.startswith(tuple(f"{v}." for v in TRITON)):
        known = " or ".join(TRITON)
        raise WorkError(f"Triton {found} is installed and matrix products for Hopper need {known}; "
                        "pip install triton==3.7.1, or run a plan that has binaries")  # fmt: skip


def device_target() -> str:
    """The name of the target that describes the current GPU: h100, h200 or h800."""
    name = str(torch.cuda.get_device_name()).lower()
    return next((t for t in ("h200", "h800") if t in name), "h100")
