"""Hopper's kernels for tokens, interpreted on the CPU against the ops' references."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dsv3c.ops import REGISTRY
from dsv3c.targets import _cuda_text
from dsv3c.targets._cuda_launch import width
from dsv3c.targets._triton_interpreter import Launch, Worker


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    process = Worker()
    yield process
    process.close()


def run(worker: Worker, text: str, entry: str, grid: tuple[int, int], *values: torch.Tensor | int) -> None:
    tensors = tuple(v for v in values if isinstance(v, torch.Tensor))
    places = iter((i,) for i in range(len(tensors)))
    launch = Launch(entry, grid, tuple(v if isinstance(v, int) else next(places) for v in values))
    worker.run(text, (launch,), tensors)


@pytest.mark.parametrize("groups, kept, k", [(1, 1, 8), (8, 4, 8), (6, 2, 3), (24, 5, 5), (4, 4, 2)])
def test_experts_are_chosen_as_by_the_reference_ties_included(worker: Worker, groups: int, kept: int, k: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    s = torch.randn(37, 24, generator=generator).mul_(3).round_()
    bias = torch.randn(24, generator=generator).round_()
    wanted = REGISTRY["choose_experts"].reference(s, bias, k=k, groups=groups, kept=kept)
    assert isinstance(wanted, torch.Tensor)
    e = torch.full((37, k), -7, dtype=torch.int32)
    lanes = width(groups, 64), width(24 // groups, 64)
    most = kept if kept < groups else lanes[0]
    run(worker, _cuda_text.CHOOSE_EXPERTS, "choose_experts", (10, 1), s, bias, e, 37, groups, 24 // groups, *lanes,
        most, k, 4)  # fmt: skip
    assert torch.equal(e, wanted)


def test_a_token_whose_scores_are_no_numbers_still_chooses_experts(worker: Worker) -> None:
    s, e = torch.full((4, 6), float("nan")), torch.full((4, 3), -7, dtype=torch.int32)
    run(worker, _cuda_text.CHOOSE_EXPERTS, "choose_experts", (1, 1), s, torch.zeros(6), e, 4, 3, 2, 4, 2, 2, 3, 4)
    assert bool(((e >= 0) & (e < 6)).all())


def test_choices_are_sorted_by_expert(worker: Worker) -> None:
    e = torch.randint(-1, 5, (700, 1), generator=torch.Generator().manual_seed(0)).int()
    wanted = REGISTRY["sort_by_expert"].reference(e, experts=5, align=16)
    assert isinstance(wanted, tuple)
    counts, sums = (torch.full((44, 8), -7, dtype=torch.int32) for _ in range(2))
    offsets, slot, source = (torch.full_like(t, -1) for t in wanted)
    text = _cuda_text.SORT_BY_EXPERT
    run(worker, text, "count_choices", (44, 1), e, counts, 700, 8, 16)
    run(worker, text, "add_up_choices", (2, 1), counts, sums, 44, 8, 4, 16)
    assert torch.equal(sums, counts.cumsum(0, dtype=torch.int32))
    run(worker, text, "place_choices", (44, 1), e, sums, offsets, slot, source, 700, 5, 44, 16, 8, 16)
    assert torch.equal(offsets, wanted[0]) and torch.equal(slot, wanted[1]) and torch.equal(source, wanted[2])


@pytest.mark.parametrize("words, block", [(5, 8), (40, 16)])
def test_rows_are_permuted_and_padding_is_zero(worker: Worker, words: int, block: int) -> None:
    x = torch.arange(6 * words, dtype=torch.int32).view(6, words)
    source = torch.tensor([11, -1, 0, 3, 4, -1, 7], dtype=torch.int32)
    y = torch.full((7, words), -7, dtype=torch.int32)
    grid = 2, -(-words // block)
    run(worker, _cuda_text.PERMUTE, "permute", grid, x, source, y, 7, words, 2, 4, block)
    assert torch.equal(y, torch.where(source.unsqueeze(1) < 0, 0, x[source.clamp(min=0) // 2]))


def test_only_rows_behind_the_last_expert_are_zeroed(worker: Worker) -> None:
    y = torch.full((9, 5), -7, dtype=torch.int32)
    offsets = torch.tensor([0, 2, 4], dtype=torch.int32)
    run(worker, _cuda_text.ZERO_TAIL, "zero_tail", (2, 1), y, offsets, 2, 9, 5, 4)
    assert bool((y[:4] == -7).all()) and bool((y[4:] == 0).all())


@pytest.mark.parametrize("count", [3, 8, 8 * 7 + 5])
def test_squares_are_added_up(worker: Worker, count: int) -> None:
    x, part = torch.arange(count).float(), torch.full((3,), -7.0)
    run(worker, _cuda_text.SUM_SQUARES, "sum_squares", (3, 1), x, part, count // 8, count % 8, 8)
    assert float(part.sum()) == float(x.square().sum())
