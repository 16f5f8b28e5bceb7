"""The embedding: rows of a table by token, and the gradient of the table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.ir import DTYPES, DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import SUM, Cost, Effect, OpDef, Sample, Split, bytes_of, expect, expect_float, expect_integer
from dsv3c.ops.linear import gradient_dtype
from dsv3c.tensors import torch_dtype, wide

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def _infer_embedding(tokens: Type, w: Type, *, dtype: str) -> Type:
    expect_integer(tokens)
    expect_float(w)
    expect(w.rank == 2, f"the table must be a matrix [vocab, d], got {w}")
    expect(dtype in DTYPES and DTYPES[dtype].is_float, f"expected the name of a floating-point type, got {dtype!r}")
    return Type(DTYPES[dtype], (*tokens.shape, w.shape[1]))


def _vjp_embedding(b: Builder, node: Node, dy: Value) -> tuple[Value | None, ...]:
    tokens, w = node.inputs
    dw = b.embedding_wgrad(tokens, dy, vocab=w.type.shape[0])
    wanted = gradient_dtype(w.type.dtype)
    return None, dw if dw.type.dtype is wanted else b.cast(dw, dtype=str(wanted))


def _cost_embedding(inputs: tuple[Type, ...], outputs: tuple[Type, ...], **_: object) -> Cost:
    """Only the rows that are asked for are read."""
    tokens, w = inputs
    return Cost(bytes=bytes_of(tokens, outputs[0].with_dtype(w.dtype), *outputs))


def _draw_embedding(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    w = torch.randn((7, 4), generator=generator, dtype=torch.float64)
    return torch.randint(0, 7, (2, 5), generator=generator), w


EMBEDDING = OpDef(
    name="embedding",
    doc="y[..., d] = row tokens[...] of the table w[vocab, d], in the element type `dtype`.",
    infer=_infer_embedding,
    reference=lambda tokens, w, *, dtype: torch.nn.functional.embedding(tokens, w).to(torch_dtype(DTYPES[dtype])),
    cost=_cost_embedding,
    vjp=_vjp_embedding,
    shard=(Split((0, None), (0,)), Split((None, 1), (-1,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.i64, (2, 5)), Type(DType.f64, (7, 4))), (("dtype", "f64"),), _draw_embedding),),
)


def _infer_wgrad(tokens: Type, dy: Type, *, vocab: int) -> Type:
    expect_integer(tokens)
    expect_float(dy)
    expect(isinstance(vocab, int) and vocab > 0, f"vocab must be a positive integer, got {vocab!r}")
    expect(dy.rank >= 1 and dy.shape[:-1] == tokens.shape, f"the gradient {dy} does not fit {tokens}")
    return Type(gradient_dtype(dy.dtype), (vocab, dy.shape[-1]))


def _wgrad(tokens: torch.Tensor, dy: torch.Tensor, *, vocab: int) -> torch.Tensor:
    rows = wide(dy).reshape(-1, dy.shape[-1])
    return rows.new_zeros((vocab, dy.shape[-1])).index_add(0, tokens.flatten(), rows)


def _vjp_wgrad(b: Builder, node: Node, g: Value) -> tuple[Value | None, ...]:
    tokens, dy = node.inputs
    return None, b.embedding(tokens, g, dtype=str(dy.type.dtype))


def _draw_wgrad(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
    dy = torch.randn((2, 5, 4), generator=generator, dtype=torch.float64)
    return torch.randint(0, 7, (2, 5), generator=generator), dy


EMBEDDING_WGRAD = OpDef(
    name="embedding_wgrad",
    doc="dw[vocab, d]: the rows of dy[..., d] added up by token, in float32.",
    infer=_infer_wgrad,
    reference=_wgrad,
    cost=lambda inputs, outputs, *, vocab: Cost(vector_flops=inputs[1].elements, bytes=bytes_of(*inputs, *outputs)),
    vjp=_vjp_wgrad,
    shard=(Split((0, 0), (SUM,)), Split((None, -1), (1,))),
    effect=Effect.PURE,
    rows=None,
    aliases=(),
    view=False,
    samples=(Sample((Type(DType.i64, (2, 5)), Type(DType.f64, (2, 5, 4))), (("vocab", 7),), _draw_wgrad),),
)
