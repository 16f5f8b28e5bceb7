"""Compose a region graph of row-wise ops into one row program, which every kernel generator reads.

Inside a region every value is float32 (float64 if any tensor of it is): a bf16 intermediate that only the region sees
is not rounded, unless the model asks for it with `cast`. Results are rounded once, when they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsv3c.dims import Dim, bind, multiply, same
from dsv3c.ir import DType, Graph, IRError, Node, Value
from dsv3c.op import Registry
from dsv3c.rows import Operand, Row, columns


@dataclass(frozen=True, slots=True)
class RegionOperand:
    """One input: `kind` as in `Rowwise.operands`; `cols` numbers per row, 0 for `scalar` and `single`."""

    kind: str
    cols: int
    dtype: DType


@dataclass(frozen=True, slots=True)
class RegionResult:
    """One output: `kind` as in `Rowwise.results`; `cols` is 0 for `scalar`."""

    kind: str
    cols: int
    dtype: DType
    row: Row


@dataclass(frozen=True, slots=True)
class RegionProgram:
    """What a region computes on one row. Operands are in the order of the graph's parameters.

    `space`: the dims whose product is the number of rows. `prefix`: how many of them index `prefix` operands; the
    remaining ones share a row of those. `wide`: the type arithmetic is done in.
    """

    name: str
    space: tuple[Dim, ...]
    prefix: int
    operands: tuple[RegionOperand, ...]
    results: tuple[RegionResult, ...]
    wide: DType


def compose(graph: Graph, registry: Registry, sizes: Mapping[str, int] | None = None) -> RegionProgram:
    """The row program of a region; `sizes` bind symbols that occur in numbers of columns.

    Every node is row-wise over one row space, or a view of a parameter that keeps whole rows (split_heads,
    expand_heads, slice_last), or a merge_heads of a result. Raises IRError naming the first node that is neither.
    """
    return _Composer(graph, registry, sizes or {}).program()


def single_node_region(node: Node) -> Graph:
    """The region of one node, so that an op that found no partner gets a generated kernel as well."""
    return Graph(node.op, tuple(dict.fromkeys(node.inputs)), (), (node,), node.outputs)


@dataclass(frozen=True, slots=True)
class _Parameter:
    """A parameter, perhaps seen through views. `shared`: it is repeated over the last dim of the row space."""

    index: int
    shape: tuple[Dim, ...]
    shared: bool = False
    slice: tuple[int, int] | None = None
    whole: int = 0


@dataclass(frozen=True, slots=True)
class _Computed:
    row: Row
    kind: str


class _Composer:
    def __init__(self, graph: Graph, registry: Registry, sizes: Mapping[str, int]) -> None:
        self.graph, self.registry, self.sizes = graph, registry, sizes
        self.space: tuple[Dim, ...] | None = None
        self.prefix: int | None = None
        self.operands: dict[int, RegionOperand] = {}
        self.rows: dict[int, Row] = {}
        self.known: dict[str, _Parameter | _Computed] = {
            v.name: _Parameter(i, v.type.shape) for i, v in enumerate(graph.params)
        }

    def program(self) -> RegionProgram:
        for node in self.graph.nodes:
            self._node(node)
        if self.space is None:
            raise IRError(f"{self.graph.name}: no node says what a row is")
        results = tuple(self._result(v) for v in self.graph.results)
        operands = tuple(
            self.operands.get(i) or RegionOperand("unused", 0, v.type.dtype) for i, v in enumerate(self.graph.params)
        )
        dtypes = [v.type.dtype for v in (*self.graph.params, *self.graph.results)]
        wide = DType.f64 if DType.f64 in dtypes else DType.f32
        prefix = len(self.space) if self.prefix is None else self.prefix
        return RegionProgram(self.graph.name, self.space, prefix, operands, results, wide)

    def _node(self, node: Node) -> None:
        op = self.registry[node.op]
        first = self.known[node.inputs[0].name]
        seen_through = op.view and (op.rows is None or node.output not in self.graph.results)
        if isinstance(first, _Parameter) and seen_through:
            self.known[node.output.name] = self._view(node, first)
            return
        if node.op == "merge_heads" and isinstance(first, _Computed):
            self.known[node.output.name] = first
            return
        if op.rows is None:
            raise IRError(f"{self.graph.name}: {node.op} is not row-wise and cannot be part of a region")
        for v, kind in zip(node.inputs, op.rows.operands, strict=True):
            if kind == "row":
                self._enter(node, v.type.shape[:-1])
        arguments = [self._argument(node, v, k) for v, k in zip(node.inputs, op.rows.operands, strict=True)]
        body = op.rows.body(*arguments, **dict(node.attrs))
        rows = body if isinstance(body, tuple) else (body,)
        for v, row, kind in zip(node.outputs, rows, op.rows.results, strict=True):
            self.known[v.name] = _Computed(row, kind)

    def _view(self, node: Node, x: _Parameter) -> _Parameter:
        shape = node.output.type.shape
        if node.op == "slice_last":
            start, stop = node.attr("start"), node.attr("stop")
            assert isinstance(start, int) and isinstance(stop, int)
            before, whole = (x.slice[0], x.whole) if x.slice else (0, self._columns(node.inputs[0]))
            return _Parameter(x.index, shape, x.shared, (before + start, before + stop), whole)
        if node.op == "expand_heads" and not x.shared:
            return _Parameter(x.index, shape, True, x.slice, x.whole)
        if node.op in ("split_heads", "merge_heads") and not x.shared and x.slice is None:
            return _Parameter(x.index, shape)
        raise IRError(f"{self.graph.name}: {node.op} of {node.inputs[0]} cannot be part of a region")

    def _enter(self, node: Node, space: tuple[Dim, ...]) -> None:
        if self.space is None:
            self.space = space
        elif not (len(space) == len(self.space) and all(map(same, space, self.space))):
            shown = ["[" + ", ".join(map(str, s)) + "]" for s in (space, self.space)]
            raise IRError(f"{self.graph.name}: {node.op} has the rows {shown[0]}, the region has {shown[1]}")

    def _argument(self, node: Node, v: Value, kind: str) -> Row:
        known = self.known[v.name]
        if isinstance(known, _Parameter):
            if known.shared:
                kind = "prefix" if kind == "row" else kind
            return self._operand(node, v, known, kind)
        if known.kind == "column" or known.kind.startswith("turned"):
            raise IRError(f"{self.graph.name}: {node.op} reads {v} as {kind}, which needs all rows first")
        expected = "row" if kind in ("row", "prefix") else kind
        if known.kind != expected or (kind == "prefix" and self._space_of(v) != self.space):
            reason = f"reads {v} as {kind}, but the region computes it as {known.kind}"
            raise IRError(f"{self.graph.name}: {node.op} {reason}")
        return known.row

    def _space_of(self, v: Value) -> tuple[Dim, ...]:
        return v.type.shape[:-1]

    def _operand(self, node: Node, v: Value, seen: _Parameter, kind: str) -> Row:
        cols = {"scalar": 0, "single": 0}.get(kind, -1)
        if cols < 0:
            cols = seen.whole if seen.slice else self._columns(v)
        if kind == "prefix":
            depth = v.type.rank - 1 - int(seen.shared)
            if self.prefix not in (None, depth):
                raise IRError(f"{self.graph.name}: {node.op} shares {v} over other dims than the rest of the region")
            self.prefix = depth
        operand = RegionOperand(kind, cols, self.graph.params[seen.index].type.dtype)
        if self.operands.setdefault(seen.index, operand) != operand:
            raise IRError(f"{self.graph.name}: {v} is read both as {kind} and as {self.operands[seen.index].kind}")
        row = self.rows.setdefault(seen.index, Operand(cols, seen.index))
        return columns(row, *seen.slice) if seen.slice else row

    def _columns(self, v: Value) -> int:
        return bind(v.type.shape[-1], self.sizes) if v.type.rank else 1

    def _result(self, v: Value) -> RegionResult:
        known = self.known[v.name]
        if isinstance(known, _Parameter):
            raise IRError(f"{self.graph.name}: the result {v} is an input; a region returns only what it computes")
        assert self.space is not None
        if known.kind == "scalar":
            return RegionResult("scalar", 0, v.type.dtype, known.row)
        turned = known.kind.startswith("turned")
        cols = known.row.cols or (bind(v.type.shape[0], self.sizes) if turned else self._columns(v))
        if known.kind == "row" and not same(v.type.elements, multiply(*self.space, cols)):
            raise IRError(f"{self.graph.name}: the result {v} does not have the region's rows")
        return RegionResult(known.kind, cols, v.type.dtype, known.row)
