"""A row-wise op that nobody foresaw, registered here: after a matrix product and before quantizations it becomes part
of the generated kernel, whose text changes and whose results are those of `interp`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from triton_regions import BF16, TILES, check_region, close, codes_close

from dsv3c import interp, pipeline
from dsv3c.build import Builder
from dsv3c.ir import DType, Graph, Program, Type
from dsv3c.op import NO_GRADIENT, Effect, OpDef, Sample, expect_float, io_cost, split_rows
from dsv3c.ops import REGISTRY
from dsv3c.passes.fuse import Fuse
from dsv3c.rows import Row, Rowwise, binary, exp, select
from dsv3c.state import State
from dsv3c.target import Kernel
from dsv3c.targets import _tvm_kernel
from dsv3c.targets._triton_interpreter import Worker
from dsv3c.targets._triton_kernel import region_kernel
from dsv3c.targets._triton_launcher import RegionLauncher
from dsv3c.targets._tvm_cuda_launch import region_kernel as cuda_kernel


def _infer(x: Type, *, cap: float) -> Type:
    expect_float(x)
    return x


def _row(x: Row, *, cap: float) -> Row:
    """cap · (1 - e^-|x|/cap), with the sign of x."""
    size = binary("max", x, -x) * (1 / cap)
    level = (1.0 - exp(-size)) * cap
    return select(binary("less", x, 0.0), -level, level)


ROWS = Rowwise(("row",), ("row",), _row)
BENT = OpDef(
    name="bent",
    doc="x bent towards ±cap.",
    infer=_infer,
    reference=lambda x, *, cap: (x.sign() * cap * (1 - torch.exp(-x.float().abs() / cap))).to(x.dtype),
    cost=io_cost,
    vjp=NO_GRADIENT,
    shard=split_rows(ROWS),
    effect=Effect.PURE,
    rows=ROWS,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.f32, (3, 8)),), (("cap", 2.0),)),),
)


@pytest.fixture
def bent() -> Iterator[None]:
    REGISTRY.register(BENT)
    yield
    del REGISTRY._ops["bent"]


def program(with_op: bool) -> Program:
    """A product, then perhaps the op, then what the next products need of it: rows in tiles, and columns in tiles."""
    b = Builder(REGISTRY, "block")
    x, w = b.input("x", Type(BF16, (130, 96))), b.weight("w", Type(BF16, (256, 96)))
    y = b.linear(x, w)
    y = b.bent(y, cap=1.5) if with_op else y
    graph = b.graph([*b.quantize_tile(y, **TILES), *b.quantize_rows(y, **TILES)])
    return pipeline.run(State(Program("p", (graph,)), REGISTRY), (Fuse(),)).state.program


def region_of(made: Program) -> Graph:
    (name,) = {str(n.attr("graph")) for n in made.graph("block").nodes if n.op == "call"}
    return made.graph(name)


def interpreted(kernel: Kernel | None, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> None:
    assert kernel is not None
    bound = RegionLauncher(kernel).bind(inputs, outputs)
    worker = Worker()
    for call in bound.before:
        call()
    worker.run(kernel.file("py").decode(), bound.launches, bound.tensors)
    for call in bound.after:
        call()
    worker.close()


def test_it_becomes_part_of_the_kernel(bent: None) -> None:
    plain, changed = program(False), program(True)
    assert [n.op for n in changed.graph("block").nodes] == ["linear", "call"], "one kernel reads the product"
    assert [n.op for n in region_of(changed).nodes] == ["bent", "quantize_tile", "quantize_rows"]
    sources = [region_kernel(region_of(p), {}, "source") for p in (plain, changed)]
    texts = [k.file("py").decode() for k in sources if k is not None]
    assert texts[0] != texts[1] and "tl.exp(" in texts[1] and "tl.exp(" not in texts[0]
    check_region(interpreted, region_of(changed), "source", torch.device("cpu"))


def test_the_whole_block_is_what_interp_says(bent: None) -> None:
    made = program(True)
    graph, region = made.graph("block"), region_of(made)
    g = torch.Generator().manual_seed(0)
    given = {v.name: torch.randn(v.type.bound({}), generator=g).bfloat16() for v in graph.params}
    right = interp.run(graph, given, REGISTRY, {g.name: g for g in made.graphs})
    product = REGISTRY["linear"].reference(*given.values())
    assert isinstance(product, torch.Tensor)
    outputs = tuple(torch.zeros(v.type.bound({})).to(right[v.name].dtype) for v in graph.results)
    interpreted(region_kernel(region, {}, "source"), (product,), outputs)
    for v, mine in zip(graph.results, outputs, strict=True):
        if mine.dtype == torch.float32:
            close(mine, right[v.name], str(v), 0.02)
        else:  # a number is not rounded to bf16 between the op and the quantization, so more codes are neighbours
            values = (t.float() for t in (mine, right[v.name]))
            torch.testing.assert_close(*values, rtol=0.13, atol=1.0)


def test_the_other_generators_know_it_too(bent: None) -> None:
    b = Builder(REGISTRY, "alone")
    region = b.graph([*b.quantize_tile(b.bent(b.input("x", Type(BF16, (5, 256))), cap=1.5), **TILES)])
    made = _tvm_kernel.region_kernel(region, {}, "binary")
    assert made is not None
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, s = torch.zeros(5, 256).to(torch.float8_e4m3fn), torch.zeros(5, 2)
    _tvm_kernel.load_kernel(made)((x,), (q, s))()
    bent_x = BENT.reference(x.float(), cap=1.5)
    right = REGISTRY["quantize_tile"].reference(bent_x, power_of_two=False)
    codes_close(q, right[0], "codes")
    close(s, right[1], "scales")
    plain = Builder(REGISTRY, "alone")
    without = plain.graph([*plain.quantize_tile(plain.input("x", Type(BF16, (5, 256))), **TILES)])
    texts = [cuda_kernel(g, {}).file("cu") for g in (region, without)]
    assert texts[0] != texts[1] and len(texts[0]) > len(texts[1])
