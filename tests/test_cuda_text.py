"""Hand-written Triton text of the Hopper target, interpreted on the CPU against the references."""

from __future__ import annotations

import pytest
import torch

from dsv3c.ops import REGISTRY
from dsv3c.targets._cuda_text import QUANTIZE_BLOCK_BOTH, QUANTIZE_ROWS
from dsv3c.targets._triton_interpreter import Launch, Worker

Tensors = tuple[torch.Tensor, ...]


def interpreted(source: str, name: str, grid: tuple[int, ...], tensors: Tensors, numbers: tuple[int, ...]) -> None:
    worker = Worker()
    worker.run(source, (Launch(name, grid, (*((i,) for i in range(len(tensors))), *numbers)),), tensors)
    worker.close()


def same(mine: Tensors, right: Tensors) -> None:
    for a, b in zip(mine, right, strict=True):
        one, two = (t.contiguous().view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (a, b))
        assert torch.equal(one.nan_to_num(-1) if one.is_floating_point() else one,
                           two.nan_to_num(-1) if two.is_floating_point() else two)  # fmt: skip


def emptied(right: Tensors) -> Tensors:
    return tuple(torch.full(t.shape, 77.0).to(t.dtype) for t in right)


@pytest.mark.parametrize("shape", [(128, 128), (2, 133, 201)])
@pytest.mark.parametrize("power", [False, True])
def test_both_orientations_of_a_weight(shape: tuple[int, ...], power: bool) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    w[..., 0, 0] = 1e4
    right = REGISTRY["quantize_block_both"].reference(w, power_of_two=power)
    assert isinstance(right, tuple)
    mine = emptied(right)
    grid = (right[1].shape[-1], right[1].shape[-2], w[..., 0, 0].numel())
    interpreted(QUANTIZE_BLOCK_BOTH, "quantize_block_both", grid, (w, *mine), (*shape[-2:], int(power)))
    same(mine, right)


def test_rows_as_columns() -> None:
    x = torch.randn((133, 77), generator=torch.Generator().manual_seed(0)).bfloat16()
    right = REGISTRY["quantize_rows"].reference(x, power_of_two=False)
    assert isinstance(right, tuple)
    mine = emptied(right)
    interpreted(QUANTIZE_ROWS, "quantize_rows", (2, 2), (x, *mine), (133, 77, 77, 2, 64, 0))
    same(mine, right)
