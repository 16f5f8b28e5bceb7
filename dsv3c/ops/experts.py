"""Matrix products with one weight per expert: rows are grouped by expert, and offsets say where each group lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import add, multiply, same
from dsv3c.ir import DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import SUM, Cost, Effect, OpDef, Sample, Split, expect, expect_float
from dsv3c.ops.linear import gradient_dtype, matrix_cost

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def expect_offsets(offsets: Type, experts: object) -> None:
    """Raise IRError unless `offsets` is i32[experts+1]."""
    expect(offsets.dtype is DType.i32 and offsets.rank == 1, f"the offsets must be an i32 vector, got {offsets}")
    fits = experts is None or (isinstance(experts, int) and same(offsets.shape[0], experts + 1))
    expect(fits, f"the offsets {offsets} must have one entry more than there are experts ({experts})")


def _expect_grouped(x: Type, w: Type, offsets: Type, columns: int) -> None:
    expect_float(x, w)
    expect(w.rank == 3, f"the weight must be [experts, N, K], got {w}")
    expect(x.rank == 2 and same(x.shape[1], w.shape[columns]), f"{x} does not fit the weight {w}")
    expect(x.dtype == w.dtype, f"{x} and the weight {w} differ in element type; cast one")
    expect_offsets(offsets, w.shape[0])


def _groups(offsets: torch.Tensor) -> list[tuple[int, int, int]]:
    """(expert, first row, last row + 1) of every expert that has rows."""
    ends = offsets.tolist()
    return [(e, ends[e], ends[e + 1]) for e in range(len(ends) - 1) if ends[e + 1] > ends[e]]


def _infer_linear(x: Type, w: Type, offsets: Type) -> Type:
    _expect_grouped(x, w, offsets, 2)
    return Type(x.dtype, (x.shape[0], w.shape[1]))


def _linear(x: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    y = x.new_zeros(x.shape[0], w.shape[1])
    for e, start, stop in _groups(offsets):
        y[start:stop] = torch.nn.functional.linear(x[start:stop], w[e])
    return y


def _vjp_linear(b: Builder, node: Node, dy: Value) -> tuple[Value | None, ...]:
    x, w, offsets = node.inputs
    return b.grouped_linear_dgrad(dy, w, offsets), b.grouped_linear_wgrad(dy, x, offsets), None


def _cost(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    """Every row meets one weight matrix: 2 · rows · N · K."""
    x, w, _offsets = inputs
    return matrix_cost(inputs, outputs, multiply(2, x.shape[0], w.shape[1], w.shape[2]))


def _cost_wgrad(inputs: tuple[Type, ...], outputs: tuple[Type, ...]) -> Cost:
    dy, x, _offsets = inputs
    return matrix_cost(inputs, outputs, multiply(2, dy.elements, x.shape[1]))


EXPERTS, ROWS = 4, 10


def _types(*shapes: tuple[int, ...], dtype: DType = DType.f64) -> tuple[Type, ...]:
    return (*(Type(dtype, s) for s in shapes), Type(DType.i32, (EXPERTS + 1,)))


def _sample(*shapes: tuple[int, ...], dtype: DType = DType.f64) -> Sample:
    """Four experts of 3, 0, 5 and 1 rows; the last of ten rows belongs to none."""

    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        kind = torch.float64 if dtype is DType.f64 else torch.bfloat16
        matrices = [torch.randn(s, generator=generator, dtype=torch.float64).to(kind) for s in shapes]
        return (*matrices, torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32))

    return Sample(_types(*shapes, dtype=dtype), (), draw)


GROUPED_LINEAR = OpDef(
    name="grouped_linear",
    doc="y[R, N]: rows offsets[e]:offsets[e+1] of x[R, K] times w[e] of w[E, N, K] transposed; other rows are 0.",
    infer=_infer_linear,
    reference=_linear,
    cost=_cost,
    vjp=_vjp_linear,
    shard=(Split((None, 1, None), (-1,)), Split((-1, -1, None), (SUM,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        _sample((ROWS, 6), (EXPERTS, 8, 6)),
        _sample((ROWS, 6), (EXPERTS, 8, 6), dtype=DType.bf16),
    ),
)


def _infer_dgrad(dy: Type, w: Type, offsets: Type) -> Type:
    _expect_grouped(dy, w, offsets, 1)
    return Type(dy.dtype, (dy.shape[0], w.shape[2]))


def _dgrad(dy: torch.Tensor, w: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    dx = dy.new_zeros(dy.shape[0], w.shape[2])
    for e, start, stop in _groups(offsets):
        dx[start:stop] = dy[start:stop] @ w[e]
    return dx


def _vjp_dgrad(b: Builder, node: Node, g: Value) -> tuple[Value | None, ...]:
    dy, w, offsets = node.inputs
    return b.grouped_linear(g, w, offsets), b.grouped_linear_wgrad(dy, g, offsets), None


GROUPED_LINEAR_DGRAD = OpDef(
    name="grouped_linear_dgrad",
    doc="dx[R, K]: rows offsets[e]:offsets[e+1] of dy[R, N] times w[e] of w[E, N, K]; other rows are 0 (Dgrad).",
    infer=_infer_dgrad,
    reference=_dgrad,
    cost=_cost,
    vjp=_vjp_dgrad,
    shard=(Split((None, 2, None), (-1,)), Split((-1, 1, None), (SUM,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        _sample((ROWS, 8), (EXPERTS, 8, 6)),
        _sample((ROWS, 8), (EXPERTS, 8, 6), dtype=DType.bf16),
    ),
)


def _infer_wgrad(dy: Type, x: Type, offsets: Type) -> Type:
    expect_float(dy, x)
    expect(dy.rank == 2 and x.rank == 2, f"expected two matrices, got {dy} and {x}")
    expect(same(dy.shape[0], x.shape[0]), f"the rows of {dy} and {x} differ")
    expect(dy.dtype == x.dtype, f"{dy} and {x} differ in element type; cast one")
    expect_offsets(offsets, None)
    return Type(gradient_dtype(dy.dtype), (add(offsets.shape[0], -1), dy.shape[1], x.shape[1]))


def _wgrad(dy: torch.Tensor, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    dw = dy.new_zeros(len(offsets) - 1, dy.shape[1], x.shape[1], dtype=wide)
    for e, start, stop in _groups(offsets):
        dw[e] = dy[start:stop].t().to(wide) @ x[start:stop].to(wide)
    return dw


def _vjp_wgrad(b: Builder, node: Node, g: Value) -> tuple[Value | None, ...]:
    dy, x, offsets = node.inputs
    w = b.cast(g, dtype=str(dy.type.dtype))
    return b.grouped_linear(x, w, offsets), b.grouped_linear_dgrad(dy, w, offsets), None


GROUPED_LINEAR_WGRAD = OpDef(
    name="grouped_linear_wgrad",
    doc="dw[E, N, K]: dy[R, N] transposed · x[R, K] over each expert's rows offsets[e]:offsets[e+1], in f32 (Wgrad).",
    infer=_infer_wgrad,
    reference=_wgrad,
    cost=_cost_wgrad,
    vjp=_vjp_wgrad,
    shard=(Split((-1, None, None), (1,)), Split((None, -1, None), (2,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(
        _sample((ROWS, 8), (ROWS, 6)),
        _sample((ROWS, 8), (ROWS, 6), dtype=DType.bf16),
    ),
)
