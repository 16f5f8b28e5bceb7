"""Tokens to the ranks that hold their experts and back; on one rank both only flatten and restore the token axes.

With `ranks=n` the three ops are what one of n ranks does, rank r holding experts r·E/n ... (r+1)·E/n − 1. A token goes
once to each rank that holds some of its experts. `handle[..., r]` is the place of a token among the rows that this
rank sends to rank r, −1 if it is not sent there. The rows that a rank receives are as many as there are: D is a
symbol of its own, called `rows`. They come sorted by source: by its place within its node, then by its node, so that
going through one rank of each node gives the same order as going straight. `combine` adds up first within each node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dsv3c.build import Builder
from dsv3c.dims import Dim, ceil_div, multiply, same, symbol
from dsv3c.ir import DType, Node, Type, Value
from dsv3c.lazy import lazy
from dsv3c.op import Cost, Effect, OpDef, Sample, Split, bytes_of, expect, expect_float, expect_integer
from dsv3c.ops.router import distinct_experts, expect_choices, wide_of

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def _sent(*rows: Type, ranks: int) -> Dim:
    """Bytes that one rank sends to others when all receive equally many `rows`: what it receives, but for its own."""
    return ceil_div(multiply(bytes_of(*rows), ranks - 1), ranks)


def _cost(inputs: tuple[Type, ...], outputs: tuple[Type, ...], *, ranks: int = 1, **_: object) -> Cost:
    """The rows are read and written; on one rank nothing is sent."""
    return Cost(bytes=bytes_of(*inputs, *outputs), comm_bytes=_sent(*outputs[:3], ranks=ranks))


def _cost_again(inputs: tuple[Type, ...], outputs: tuple[Type, ...], *, ranks: int = 1, **_: object) -> Cost:
    return Cost() if ranks == 1 else _cost(inputs, outputs, ranks=ranks)


def _cost_combine(inputs: tuple[Type, ...], outputs: tuple[Type, ...], *, ranks: int = 1, **_: object) -> Cost:
    if ranks == 1:
        return Cost()
    sent = _sent(inputs[0], ranks=ranks)
    return Cost(vector_flops=inputs[0].elements, bytes=bytes_of(*inputs, *outputs), comm_bytes=sent)


def _expect_ranks(ranks: int) -> None:
    expect(isinstance(ranks, int) and ranks >= 1, f"the number of ranks must be at least 1, got {ranks}")


def _received(rows: str) -> Dim:
    """The symbol of how many rows a rank receives."""
    named = isinstance(rows, str) and rows.isidentifier()
    expect(named, f"rows from other ranks need a symbol for their number, as in rows='D', got {rows!r}")
    return symbol(rows)


def _infer_dispatch(x: Type, e: Type, p: Type, *, ranks: int = 1, experts: int = 0, rows: str = "") -> tuple[Type, ...]:
    expect_float(x, p)
    expect(x.rank >= 2, f"expected rows of tokens, got {x}")
    expect_choices(x, e)
    expect(p.shape == e.shape, f"the weights {p} do not fit the choices {e}")
    _expect_ranks(ranks)
    if ranks > 1:
        whole = isinstance(experts, int) and experts > 0 and experts % ranks == 0
        expect(whole, f"{experts} experts do not divide among {ranks} ranks")
    tokens = multiply(*x.shape[:-1]) if ranks == 1 else _received(rows)
    sent = tuple(Type(t.dtype, (tokens, t.shape[-1])) for t in (x, e, p))
    return (*sent, Type(DType.i32, x.shape[:-1] if ranks == 1 else (*x.shape[:-1], ranks)))


def _expect_alone(op: str, ranks: int) -> None:
    if ranks > 1:
        raise ValueError(f"{op} among {ranks} ranks needs all of them; run the graph with interp.run_ranks")


def _dispatch(x: torch.Tensor, e: torch.Tensor, p: torch.Tensor, *, ranks: int = 1, **_: object
              ) -> tuple[torch.Tensor, ...]:  # fmt: skip
    _expect_alone("dispatch", ranks)
    rows = tuple(t.flatten(0, -2) for t in (x, e, p))
    tokens = torch.arange(rows[0].shape[0], dtype=torch.int32, device=x.device)
    return (*rows, tokens.view(x.shape[:-1]))


def _vjp_dispatch(
    b: Builder, node: Node, dx: Value | None, de: Value | None, dp: Value | None, dhandle: Value | None
) -> tuple[Value | None, ...]:
    handle = node.outputs[3]
    dx, dp = (None if d is None else b.combine(d, handle, **_ranks_of(node)) for d in (dx, dp))
    return dx, None, dp


def _ranks_of(node: Node) -> dict[str, int]:
    """The attribute `ranks` of a node that has it."""
    return {name: value for name, value in node.attrs if name == "ranks" and isinstance(value, int)}


def _vjp_combine(b: Builder, node: Node, g: Value) -> tuple[Value | None, ...]:
    attrs = _ranks_of(node)
    rows = {"rows": str(node.inputs[0].type.shape[0])} if attrs else {}
    return b.dispatch_again(g, node.inputs[1], **attrs, **rows), None


def _dispatch_sample(dtype: DType) -> Sample:
    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        kind = torch.float64 if dtype is DType.f64 else torch.bfloat16
        x, p = (torch.randn(2, 3, n, generator=generator, dtype=torch.float64) for n in (4, 2))
        return x.to(kind), distinct_experts(generator, (2, 3), 2, 8), p if dtype is DType.f64 else p.float()

    wide = DType.f64 if dtype is DType.f64 else DType.f32
    return Sample((Type(dtype, (2, 3, 4)), Type(DType.i32, (2, 3, 2)), Type(wide, (2, 3, 2))), (), draw)


DISPATCH = OpDef(
    name="dispatch",
    doc="Send tokens x[..., d], choices e[..., k], weights p[..., k] to their experts' ranks as rows, with a handle.",
    infer=_infer_dispatch,
    reference=_dispatch,
    cost=_cost,
    vjp=_vjp_dispatch,
    shard=(),
    effect=Effect.COMM,
    rows=None,
    aliases=((0, 0), (1, 1), (2, 2)),
    view=False,
    samples=(_dispatch_sample(DType.f64), _dispatch_sample(DType.bf16)),
)


def _expect_handle(handle: Type) -> None:
    expect_integer(handle)
    expect(handle.rank >= 1, f"expected the handle of a dispatch, got {handle}")


def _tokens_of(handle: Type, ranks: int) -> tuple[Dim, ...]:
    """The token axes of a handle, whose last axis, if there are several, are the ranks."""
    _expect_handle(handle)
    _expect_ranks(ranks)
    if ranks == 1:
        return handle.shape
    fits = handle.rank >= 2 and same(handle.shape[-1], ranks)
    expect(fits, f"expected the handle of a dispatch to {ranks} ranks, got {handle}")
    return handle.shape[:-1]


def _infer_again(dy: Type, handle: Type, *, ranks: int = 1, rows: str = "") -> Type:
    expect_float(dy)
    tokens = _tokens_of(handle, ranks)
    fits = dy.rank == len(tokens) + 1 and all(map(same, dy.shape[:-1], tokens))
    expect(fits, f"the tokens of {dy} are not those of the handle {handle}")
    return Type(dy.dtype, (handle.elements if ranks == 1 else _received(rows), dy.shape[-1]))


def _again(dy: torch.Tensor, handle: torch.Tensor, *, ranks: int = 1, **_: object) -> torch.Tensor:
    _expect_alone("dispatch_again", ranks)
    return dy.flatten(0, -2)


def _handle_sample(*shape: int, dtype: DType = DType.f64) -> Sample:
    def draw(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        handle = torch.arange(6, dtype=torch.int32).view(2, 3)
        return x if dtype is DType.f64 else x.bfloat16(), handle

    return Sample((Type(dtype, shape), Type(DType.i32, (2, 3))), (), draw)


DISPATCH_AGAIN = OpDef(
    name="dispatch_again",
    doc="Send dy[..., d] along the routes of an earlier dispatch, as rows [D, d]: the gradient of `combine`.",
    infer=_infer_again,
    reference=_again,
    cost=_cost_again,
    vjp=lambda b, node, g: (b.combine(g, node.inputs[1], **_ranks_of(node)), None),
    shard=(Split((0, 0), (0,)), Split((-1, None), (-1,))),
    effect=Effect.COMM,
    rows=None,
    aliases=(),
    view=True,
    samples=(_handle_sample(2, 3, 4), _handle_sample(2, 3, 4, dtype=DType.bf16)),
)


def _infer_combine(y: Type, handle: Type, *, ranks: int = 1) -> Type:
    expect_float(y)
    tokens = _tokens_of(handle, ranks)
    fits = y.rank == 2 and (ranks > 1 or same(y.shape[0], handle.elements))
    expect(fits, f"the rows of {y} are not those of the handle {handle}")
    return Type(y.dtype, (*tokens, y.shape[1]))


def _combine(y: torch.Tensor, handle: torch.Tensor, *, ranks: int = 1) -> torch.Tensor:
    _expect_alone("combine", ranks)
    return y.view(*handle.shape, y.shape[-1])


COMBINE = OpDef(
    name="combine",
    doc="Bring rows y[D, n] of a dispatch back to their tokens [..., n], summed over the ranks that they went to.",
    infer=_infer_combine,
    reference=_combine,
    cost=_cost_combine,
    vjp=_vjp_combine,
    shard=(Split((0, 0), (0,)), Split((-1, None), (-1,))),
    effect=Effect.COMM,
    rows=None,
    aliases=(),
    view=True,
    samples=(_handle_sample(6, 4), _handle_sample(6, 4, dtype=DType.bf16)),
)


# ---- all ranks in lockstep ------------------------------------------------------------------------------------------


def source_order(ranks: int, ranks_per_node: int) -> tuple[int, ...]:
    """The order in which a rank lays down the rows of each source: by its place in its node, then by its node."""
    return tuple(sorted(range(ranks), key=lambda r: (r % ranks_per_node, r // ranks_per_node)))


def _first_rows(handles: Sequence[torch.Tensor], ranks_per_node: int) -> torch.Tensor:
    """[source, destination]: the first of the source's rows among those that the destination receives."""
    counts = torch.stack([(h.flatten(0, -2) >= 0).sum(0) for h in handles])
    first = torch.zeros_like(counts)
    order = list(source_order(len(handles), ranks_per_node))
    first[order] = counts[order].cumsum(0) - counts[order]
    return first


def _moved(tensors: Sequence[torch.Tensor], handles: Sequence[torch.Tensor],
           ranks_per_node: int) -> list[torch.Tensor]:  # fmt: skip
    """The rows of all sources' `tensors` [..., n] that each rank receives."""
    found: list[torch.Tensor] = []
    for r in range(len(handles)):
        kept = [(t.flatten(0, -2), h[..., r].flatten()) for t, h in zip(tensors, handles, strict=True)]
        parts = [t[(h >= 0).nonzero().flatten()] for t, h in kept]
        found.append(torch.cat([parts[s] for s in source_order(len(handles), ranks_per_node)]))
    return found


def dispatch_ranks(inputs: Sequence[tuple[torch.Tensor, ...]], *, ranks_per_node: int, ranks: int, experts: int,
                   **_: object) -> list[tuple[torch.Tensor, ...]]:  # fmt: skip
    """`dispatch` on all ranks at once: (x, e, p) of each rank to (rows, row_experts, row_p, handle) of each."""
    each = experts // ranks
    handles = []
    for _x, e, _p in inputs:
        to = torch.stack([(e.div(each, rounding_mode="floor") == r).any(-1) for r in range(ranks)], -1)
        place = to.flatten(0, -2).cumsum(0).view(to.shape) - 1
        handles.append(place.masked_fill(~to, -1).int())
    moved = [_moved_bytes([i[k] for i in inputs], handles, ranks_per_node) for k in range(3)]
    found: list[tuple[torch.Tensor, ...]] = []
    for r, (rows, row_e, row_p) in enumerate(zip(*moved, strict=True)):
        local = row_e - r * each
        found.append((rows, local.masked_fill((local < 0) | (local >= each), -1), row_p, handles[r]))
    return found


def _moved_bytes(tensors: Sequence[torch.Tensor], handles: Sequence[torch.Tensor],
                 ranks_per_node: int) -> list[torch.Tensor]:  # fmt: skip
    """`_moved` for any element type: torch does not index float8."""
    if tensors[0].dtype != torch.float8_e4m3fn:
        return _moved(tensors, handles, ranks_per_node)
    moved = _moved([t.view(torch.uint8) for t in tensors], handles, ranks_per_node)
    return [t.view(torch.float8_e4m3fn) for t in moved]


def dispatch_again_ranks(inputs: Sequence[tuple[torch.Tensor, ...]], *, ranks_per_node: int,
                         **_: object) -> list[tuple[torch.Tensor, ...]]:  # fmt: skip
    """`dispatch_again` on all ranks at once: (dy, handle) of each rank to (rows,) of each."""
    rows = _moved_bytes([i[0] for i in inputs], [i[1] for i in inputs], ranks_per_node)
    return [(t,) for t in rows]


def combine_ranks(inputs: Sequence[tuple[torch.Tensor, ...]], *, ranks_per_node: int, ranks: int,
                  **_: object) -> list[tuple[torch.Tensor, ...]]:  # fmt: skip
    """`combine` on all ranks at once: (y, handle) of each rank to (tokens,) of each.

    The rows of one node are added in ascending order of its ranks, in float32 at least, and rounded; so are then the
    sums of the nodes, in ascending order.
    """
    handles = [h for _, h in inputs]
    first = _first_rows(handles, ranks_per_node)
    found: list[tuple[torch.Tensor, ...]] = []
    for s, handle in enumerate(handles):
        total = None
        for node in range(0, ranks, ranks_per_node):
            partial = None
            for r in range(node, min(node + ranks_per_node, ranks)):
                y, place = inputs[r][0], handle[..., r].long()
                rows = wide_of(y)[(place + first[s, r]).clamp(0, max(len(y) - 1, 0))] if len(y) else None
                if rows is not None:
                    rows = rows.masked_fill((place < 0).unsqueeze(-1), 0)
                    partial = rows if partial is None else partial + rows
            if partial is not None:
                partial = wide_of(partial.to(inputs[s][0].dtype))
                total = partial if total is None else total + partial
        y = inputs[s][0]
        whole = y.new_zeros(*handle.shape[:-1], y.shape[-1])
        found.append((whole if total is None else total.to(y.dtype),))
    return found


IN_LOCKSTEP: Mapping[str, Callable[..., list[tuple[torch.Tensor, ...]]]] = {
    "dispatch": dispatch_ranks,
    "dispatch_again": dispatch_again_ranks,
    "combine": combine_ranks,
}
"""For each op that sends rows, its meaning on all ranks at once: (inputs of each rank, ranks_per_node, attributes) ->
outputs of each rank."""
