"""Generated row-wise kernels on Hopper whose results lie where large operands lie, a slice of rows at a time.

The launcher copies what a kernel would overwrite before it is read; the optimizer's weights and moments have no room
for that beside themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dsv3c.target import Kernel
from dsv3c.targets._triton_kernel import load_kernel

if TYPE_CHECKING:
    import torch

Call = Callable[[], None]
Tensors = tuple["torch.Tensor", ...]
Prepare = Callable[[Tensors, Tensors], Call]

SLICE_BYTES = 256 * 2**20
"""Of the largest operand of one slice; smaller tensors are not sliced."""


def load(kernel: Kernel) -> Prepare:
    """`prepare(inputs, outputs)` of a kernel on the current CUDA device; WorkError as `load_kernel`."""
    facts = dict(kernel.launch)
    operands, results = (tuple(t.partition(":")[0] for t in str(facts[k]).split()) for k in ("operands", "results"))
    return in_slices(load_kernel(kernel), operands, results)


def in_slices(prepare: Prepare, operands: tuple[str, ...], results: tuple[str, ...],
              limit: int = SLICE_BYTES) -> Prepare:  # fmt: skip
    """`prepare` that works through the rows in slices of at most `limit` bytes where a larger result lies on an
    operand. `operands` and `results` are what the kernel takes: row, single, prefix ..."""

    def sliced(inputs: Tensors, outputs: Tensors) -> Call:
        tensors, kinds = (*inputs, *outputs), (*operands, *results)
        rows = [t for t, kind in zip(tensors, kinds, strict=True) if kind == "row"]
        shared = {t.data_ptr() for t in inputs} & {t.data_ptr() for t in outputs}
        size = max((t.numel() * t.dtype.itemsize for t in rows), default=0)
        whole = all(t.dim() == 2 and t.shape[0] == rows[0].shape[0] for t in rows)
        if not shared or size <= limit or not whole or not set(kinds) <= {"row", "single", "unused"}:
            return prepare(inputs, outputs)
        count = rows[0].shape[0]
        step = max(1, count * limit // size)

        def run() -> None:
            for start in range(0, count, step):
                part = tuple(t[start : start + step] if kind == "row" else t
                             for t, kind in zip(tensors, kinds, strict=True))  # fmt: skip
                prepare(part[: len(inputs)], part[len(inputs) :])()

        return run

    return sliced
