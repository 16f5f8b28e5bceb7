"""The small-batch forms of the routing ops against their references, and against what the general ones give."""

from __future__ import annotations

import pytest
import torch

from dsv3c.ops import REGISTRY
from dsv3c.targets._small_batch import FEW, for_few_tokens
from dsv3c.targets.cpu import CPU

Tensors = tuple[torch.Tensor, ...]


def executed(op: str, inputs: Tensors, **attrs: object) -> Tensors:
    """The outputs of the small-batch form, written over NaN or a large number; None of its inputs changes."""
    expected = REGISTRY[op].reference(*inputs, **attrs)
    expected = expected if isinstance(expected, tuple) else (expected,)
    small, takes = FEW[op]
    outputs = tuple(torch.full_like(t, float("nan") if t.is_floating_point() else 99) for t in expected)
    if op == "cache_write":
        outputs = (inputs[0],)
    assert takes(inputs, outputs), f"{op} should take this batch"
    run = small(inputs, outputs, **attrs)
    run()
    run()
    for found, wanted in zip(outputs, expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6), op
    return outputs


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("experts", "groups", "kept", "k"), [(16, 4, 2, 4), (8, 1, 1, 3), (256, 8, 4, 8)])
@pytest.mark.parametrize("align", [1, 32])
def test_the_way_of_a_few_tokens_through_the_experts(
    seed: int, experts: int, groups: int, kept: int, k: int, align: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    tokens = 1 + seed % 4
    x = torch.randn(1, tokens, 6, generator=g)
    scores = torch.rand(1, tokens, experts, generator=g)
    bias = torch.randn(experts, generator=g) - 1
    (chosen,) = executed("choose_experts", (scores, bias), k=k, groups=groups, kept=kept)
    (p,) = executed("pick", (scores, chosen))
    rows, row_e, row_p, handle = executed("dispatch", (x, chosen, p))
    if seed == 5:
        row_e[0, 0] = -1  # this choice lies on another rank
    offsets, slot, source = executed("sort_by_expert", (row_e,), experts=experts, align=align)
    (sorted_rows,) = executed("permute", (rows, source, slot))
    executed("permute_weights", (row_p, source, slot))
    executed("dispatch_again", (x, handle))
    executed("combine", (rows, handle))
    if len(sorted_rows) <= 16:
        w = torch.randn(experts, 5, 6, generator=g)
        (y,) = executed("grouped_linear", (sorted_rows, w, offsets))
        executed("unpermute", (y, slot, source))


@pytest.mark.parametrize("position", [0, 1, 63, 64, 200])
def test_attention_over_the_cache_at_any_position(position: int) -> None:
    g = torch.Generator().manual_seed(position)
    cache = torch.randn(1, 256, 12, generator=g)
    start = torch.tensor(position, dtype=torch.int32)
    executed("latent_attention", (torch.randn(1, 1, 3, 12, generator=g), cache, start), scale=0.3, rank=8)
    executed("cache_write", (cache, torch.randn(1, 1, 12, generator=g), start))
    attrs = {"dim": 8, "base": 1e4, "factor": 8.0, "original": 64, "beta_fast": 32.0, "beta_slow": 1.0}
    executed("positions_from", (torch.zeros(2, 2, dtype=torch.int64), start))
    executed("linear", (torch.randn(1, 1, 6, generator=g), torch.randn(9, 6, generator=g)))
    executed("embedding", (torch.tensor([[2, 0]]), torch.randn(5, 6, generator=g)), dtype="f32")
    kv_b = torch.randn(3 * (4 + 5), 8, generator=g)
    executed("absorb_query", (torch.randn(1, 1, 3, 4, generator=g), kv_b))
    executed("absorb_value", (torch.randn(1, 1, 3, 8, generator=g), kv_b), value=5)
    positions = torch.tensor([[position]], dtype=torch.int32)
    executed("rotary_table", (positions,), **attrs, magnitude=1.1, dtype="f32")


def test_large_batches_and_other_types_take_the_general_form() -> None:
    for op in FEW:
        assert CPU.implementations[op].op == op
    calls = []

    def general(inputs: Tensors, outputs: Tensors, **attrs: object) -> object:
        calls.append(len(inputs[0]))
        return lambda: None

    chosen = for_few_tokens(CPU.implementations["pick"].__class__("pick", general))  # type: ignore[arg-type]
    for tokens, dtype in ((64, torch.float32), (1, torch.bfloat16), (1, torch.float32)):
        scores = torch.rand(tokens, 8).to(dtype)
        chosen.prepare((scores, torch.zeros(tokens, 2, dtype=torch.int32)), (torch.zeros(tokens, 2, dtype=dtype),))
    assert calls == [64, 1]
