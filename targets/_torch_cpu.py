"""How torch executes each op on the CPU, by op name: matrix products, attention and what moves tokens by hand-chosen
calls that write into given memory, everything else by its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from dsv3c.op import OpDef
from dsv3c.ops import REGISTRY
from dsv3c.target import Implementation
from dsv3c.targets._small_batch import for_few_tokens
from dsv3c.targets._torch_attention import ATTENTION
from dsv3c.targets._torch_matrix import MATRIX
from dsv3c.targets._torch_tokens import TOKENS

if TYPE_CHECKING:
    import torch

ADDS_UP = ("rms_norm_dw",)
"""Further ops whose result is a sum that several micro-batches add to."""


def by_reference(op: OpDef) -> Implementation:
    """Run the op's reference and copy the result; right for every op, with fresh memory for what is in between."""

    def prepare(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...], accumulate: bool = False,
                **attrs: object) -> Callable[[], None]:  # fmt: skip
        def run() -> None:
            made = op.reference(*inputs, **attrs)
            for out, value in zip(outputs, made if isinstance(made, tuple) else (made,), strict=True):
                if accumulate:
                    out.add_(value)
                else:
                    out.copy_(value)

        return run

    return Implementation(op.name, prepare, accumulates=op.name in ADDS_UP)


def _all() -> dict[str, Implementation]:
    chosen = {i.op: i for i in (*MATRIX, *ATTENTION, *TOKENS)}
    return {op.name: for_few_tokens(chosen.get(op.name) or by_reference(op)) for op in REGISTRY}


IMPLEMENTATIONS: Mapping[str, Implementation] = _all()
"""An implementation for every op of the registry."""
