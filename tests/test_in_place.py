"""Generated kernels whose results lie where their operands lie: which may, and that no copy is made for them."""

from __future__ import annotations

import pytest
import torch

from dsv3c.build import Builder
from dsv3c.ir import DType, Graph, Node, Type, Value
from dsv3c.ops import REGISTRY
from dsv3c.targets._regions import compose
from dsv3c.targets._triton_interpreter import Worker
from dsv3c.targets._triton_kernel import in_place, region_kernel
from dsv3c.targets._triton_launcher import RegionLauncher
from dsv3c.targets._triton_rows import generate

F32, BF16 = DType.f32, DType.bf16
ATTRS = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}


def adamw(cols: int = 256) -> Graph:
    b = Builder(REGISTRY, "adamw_region")
    n = 37
    w, g = (b.input(x, Type(F32, (n, cols))) for x in "wg")
    m, v = (b.input(x, Type(BF16, (n, cols))) for x in "mv")
    numbers = [b.input(x, Type(F32, ())) for x in ("scale", "rate", "root", "keep")]
    return b.graph(b.adamw(w, g, m, v, *numbers, out=("w2", "m2", "v2"), **ATTRS))


def single(op: str, *types: Type, **attrs: object) -> Graph:
    b = Builder(REGISTRY, f"{op}_region")
    made = getattr(b, op)(*(b.input(f"x{i}", t) for i, t in enumerate(types)), **attrs)
    return b.graph(made if isinstance(made, tuple) else [made])


def pairs(region: Graph) -> tuple[tuple[int, int], ...]:
    program = compose(region, REGISTRY)
    return in_place(program, generate(program, "k").text)


@pytest.mark.parametrize("cols", [256, 5120])
def test_the_optimizer_may_write_its_state_where_it_lies(cols: int) -> None:
    assert {(0, 0), (2, 1), (3, 2)} <= set(pairs(adamw(cols)))


def test_what_reads_other_columns_or_reads_twice_may_not() -> None:
    rows = Type(F32, (4, 64))
    turned, angles = Type(F32, (1, 4, 64)), Type(F32, (1, 4, 32))
    assert pairs(single("rotary", turned, angles, angles, interleave=True, inverse=False)) == ()
    assert pairs(single("rms_norm", Type(F32, (4, 40000)), Type(F32, (40000,)), eps=1e-6)) == ()
    assert pairs(single("rms_norm", rows, Type(F32, (64,)), eps=1e-6)) == ((0, 0),)
    assert pairs(single("cast", rows, dtype="bf16")) == ()


def test_no_copy_is_made_and_the_numbers_are_right() -> None:
    region = adamw()
    kernel = region_kernel(region, {}, "source")
    assert kernel is not None
    generator = torch.Generator().manual_seed(0)
    w, g, m, v = (torch.randn(37, 256, generator=generator) for _ in range(4))
    m, v = m.bfloat16(), v.square().bfloat16()
    numbers = [torch.tensor(x) for x in (0.5, 3e-2, 2.6, 0.999)]
    wanted = REGISTRY["adamw"].reference(w, g, m, v, *numbers, **ATTRS)
    bound = RegionLauncher(kernel).bind((w, g, m, v, *numbers), (w, m, v))
    assert not bound.before and not bound.after
    worker = Worker()
    try:
        worker.run(kernel.file("py").decode(), bound.launches, bound.tensors)
    finally:
        worker.close()
    assert isinstance(wanted, tuple)
    for made, right in zip((w, m, v), wanted, strict=True):
        torch.testing.assert_close(made, right, rtol=1e-2 if made.dtype is torch.bfloat16 else 1e-5, atol=1e-6)


def test_an_operand_under_another_part_of_a_result_is_copied_first() -> None:
    kernel = region_kernel(adamw(), {}, "source")
    assert kernel is not None
    room = torch.zeros(38, 256)
    g, m, v = torch.ones(37, 256), torch.zeros(37, 256).bfloat16(), torch.zeros(37, 256).bfloat16()
    numbers = [torch.tensor(1.0)] * 4
    bound = RegionLauncher(kernel).bind((room[:37], g, m, v, *numbers), (room[1:], m, v))
    assert len(bound.before) == 1


def test_an_operand_of_two_results_is_copied_for_the_one_that_is_not_its_own() -> None:
    x = Value("x", Type(F32, (4, 64)))
    out = tuple(Value(n, Type(F32, (4, 64))) for n in "yz")
    region = Graph("two", (x,), (), tuple(Node("sigmoid", (x,), (), (o,)) for o in out), out)
    kernel = region_kernel(region, {}, "source")
    assert kernel is not None
    a, b = torch.zeros(4, 64), torch.zeros(4, 64)
    assert not RegionLauncher(kernel).bind((a,), (a, b)).before
    flat = torch.zeros(6, 64)
    assert len(RegionLauncher(kernel).bind((flat[:4],), (flat[:4], flat[2:])).before) == 1
