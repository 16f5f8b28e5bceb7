"""The contract of every op, checked from its samples: types, gradients, splits, cost, text, row program, memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from dsv3c.build import Builder
from dsv3c.dims import bind, symbol
from dsv3c.interp import run
from dsv3c.ir import Attrs, DType, Graph, IRError, Node, Type, Value
from dsv3c.op import SUM, OpDef, Sample, Split
from dsv3c.ops import REGISTRY
from dsv3c.rows import Operand, Row, evaluate, placed
from dsv3c.tensors import ir_dtype, torch_dtype
from dsv3c.text import parse_graph, show_graph
from dsv3c.verify import verify

Tensors = tuple[torch.Tensor, ...]

NUMBERED = [(op, s, f"{op.name}-{i}") for op in REGISTRY for i, s in enumerate(op.samples)]
CASES = [pytest.param(op, s, id=name) for op, s, name in NUMBERED]
GRADIENT_CASES = [pytest.param(op, s, id=name) for op, s, name in NUMBERED if op.vjp is not None]
ROW_CASES = [pytest.param(op, s, id=name) for op, s, name in NUMBERED if op.rows is not None and s.inputs[0].rank]
GRADIENT_OPS = [pytest.param(op, id=op.name) for op in REGISTRY if op.vjp is not None]
SPLITS = [pytest.param(op, s, id=f"{op.name}-{i}") for op in REGISTRY for i, s in enumerate(op.shard)]

NOT_READ = {"embedding": {1}, "positions": {0}, "positions_from": {0}, "cache_write": {0}}
"""Inputs of which an op reads only a part, or only the shape."""
NOT_WRITTEN = {"cache_write": {0}}
"""Outputs of which an op writes only a part."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float8_e4m3fn: 0.13}


def draw(sample: Sample, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    if sample.draw is not None:
        return sample.draw(generator)
    assert all(t.dtype.is_float for t in sample.inputs), "a sample with integers needs `draw`"
    return tuple(torch.randn(t.bound({}), generator=generator, dtype=torch.float64).to(torch_dtype(t.dtype))
                 for t in sample.inputs)  # fmt: skip


def reference(op: OpDef, tensors: Tensors, attrs: Attrs) -> Tensors:
    result = op.reference(*tensors, **dict(attrs))
    return result if isinstance(result, tuple) else (result,)


def type_of(tensor: torch.Tensor) -> Type:
    return Type(ir_dtype(tensor.dtype), tuple(tensor.shape))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float | None = None) -> None:
    """Equal for integers, else within `tolerance` (that of the element type if None) of the largest number."""
    assert actual.shape == expected.shape
    if not expected.is_floating_point():
        assert torch.equal(actual, expected)
        return
    bound = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    scale = expected.double().abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=bound, atol=bound * max(scale, 1e-3))


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_inferred_types_are_those_of_the_reference(op: OpDef, sample: Sample) -> None:
    tensors = draw(sample)
    assert tuple(map(type_of, tensors)) == sample.inputs, "the sample draws other types than it declares"
    inferred = op.infer_types(sample.inputs, sample.attrs)
    assert inferred == tuple(map(type_of, reference(op, tensors, sample.attrs)))
    floats = [t for t in sample.inputs if t.dtype.is_float]
    if floats and all(t.dtype is DType.f64 for t in floats) and "dtype" not in dict(sample.attrs):
        assert all(t.dtype is DType.f64 for t in inferred if t.dtype.is_float), "float64 mode must stay in float64"


def _spoiled(t: Type) -> list[Type]:
    """Types near `t` that most ops must refuse and none may stumble over."""
    n = symbol("N")
    shapes = [(), t.shape[1:], (*t.shape, 2), (n,) * t.rank, (*t.shape[:-1], n), (*t.shape[:-1], 3), (5, *t.shape[1:])]
    return [Type(t.dtype, s) for s in shapes] + [t.with_dtype(d) for d in (DType.i64, DType.bool, DType.f16)]


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_wrong_arguments_are_refused_with_a_reason(op: OpDef, sample: Sample) -> None:
    """Whatever the arguments, `infer` gives types or raises IRError; inputs too few or too many are an IRError."""
    known = dict(sample.attrs)
    cases = [((*sample.inputs[:i], t, *sample.inputs[i + 1 :]), known)
             for i, old in enumerate(sample.inputs) for t in _spoiled(old)]  # fmt: skip
    cases += [(sample.inputs, known | {name: value}) for name in known for value in (0, -1, 10**6, 0.5, "x", None)]
    for types, attrs in cases:
        try:
            inferred = op.infer_types(types, tuple(attrs.items()))
        except IRError as error:
            assert str(error)
        else:
            assert all(isinstance(t, Type) for t in inferred)
    for types, attrs in (((), known), (sample.inputs * 3, known), (sample.inputs, {**known, "other": 1})):
        with pytest.raises(IRError, match="wrong arguments"):
            op.infer_types(types, tuple(attrs.items()))
    for name in known:
        with pytest.raises(IRError, match="wrong arguments"):
            op.infer_types(sample.inputs, tuple((k, v) for k, v in known.items() if k != name))


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_reference_leaves_its_inputs_alone(op: OpDef, sample: Sample) -> None:
    tensors = draw(sample)
    before = tuple(t.clone() for t in tensors)
    outputs = reference(op, tensors, sample.attrs)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    if op.view:
        start = tensors[0].untyped_storage().data_ptr()
        assert all(t.untyped_storage().data_ptr() == start for t in outputs), "a view shares memory with input 0"


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_aliases_join_tensors_of_one_size(op: OpDef, sample: Sample) -> None:
    outputs = op.infer_types(sample.inputs, sample.attrs)
    for source, target in op.aliases:
        x, y = sample.inputs[source], outputs[target]
        assert (x.dtype, x.elements) == (y.dtype, y.elements)
    assert len({t for _, t in op.aliases}) == len(op.aliases) or len(outputs) == 1


def called(op: OpDef, sample: Sample) -> tuple[Builder, Node]:
    """A builder that has made one node of `op`, and the node."""
    b = Builder(REGISTRY, op.name)
    inputs = tuple(b.input(f"x{i}", t) for i, t in enumerate(sample.inputs))
    b.emit(op.name, inputs, dict(sample.attrs))
    return b, b.graph([]).nodes[-1]


def differentiated(op: OpDef, sample: Sample) -> tuple[Graph, tuple[Value | None, ...]]:
    """The graph of `op` and its vjp, with a parameter `d_OUTPUT` for each output that has a gradient."""
    assert op.vjp is not None
    usable = []
    for i, v in enumerate(called(op, sample)[1].outputs):
        b, node = called(op, sample)
        cotangents: list[Value | None] = [None] * len(node.outputs)
        cotangents[i] = b.input("d", v.type)
        try:
            op.vjp(b, node, *cotangents)
            usable += [i] if v.type.dtype.is_float else []
        except IRError as error:
            assert "gradient" in str(error), "an output without gradient must say so"
    assert usable, "no output has a gradient"
    b, node = called(op, sample)
    given = [b.input(f"d_{v.name}", v.type) if i in usable else None for i, v in enumerate(node.outputs)]
    gradients = op.vjp(b, node, *given)
    assert len(gradients) == len(node.inputs)
    values = tuple(g for g in gradients if isinstance(g, Value))
    return b.graph([*node.outputs, *values]), tuple(g if isinstance(g, Value) else None for g in gradients)


@pytest.mark.parametrize(("op", "sample"), GRADIENT_CASES)
def test_gradients_have_the_types_of_inputs(op: OpDef, sample: Sample) -> None:
    graph, gradients = differentiated(op, sample)
    verify(graph, REGISTRY)
    for x, g in zip(sample.inputs, gradients, strict=True):
        assert g is None or x.dtype.is_float
        if g is not None:
            assert g.type.shape == x.shape
            assert g.type.dtype in (x.dtype, DType.f32 if x.dtype is not DType.f64 else DType.f64)


@pytest.mark.parametrize("op", GRADIENT_OPS)
def test_gradients_are_those_of_finite_differences(op: OpDef) -> None:
    samples = [s for s in op.samples if next(t for t in s.inputs if t.dtype.is_float).dtype is DType.f64]
    samples = [s for s in samples if dict(s.attrs).get("dtype", "f64") == "f64"]
    assert samples, "an op with a gradient needs a float64 sample"
    for sample in samples:
        graph, gradients = differentiated(op, sample)
        tensors = draw(sample)
        generator = torch.Generator().manual_seed(1)
        cotangents = {v.name: torch.randn(v.type.bound({}), generator=generator, dtype=torch_dtype(v.type.dtype))
                      for v in graph.inputs[len(tensors) :]}  # fmt: skip
        given = {v.name: t for v, t in zip(graph.inputs, tensors, strict=False)}
        values = run(graph, {**given, **cotangents}, REGISTRY)
        outputs = [v.name for v in graph.nodes[0].outputs]
        assert any(g is not None for g in gradients)
        for i, g in enumerate(gradients):
            if g is not None:
                expected = _slopes(op, sample, tensors, i, [cotangents.get(f"d_{name}") for name in outputs])
                torch.testing.assert_close(values[g.name].double(), expected, rtol=1e-6, atol=1e-7)


def _slopes(op: OpDef, sample: Sample, tensors: Tensors, index: int,
            cotangents: list[torch.Tensor | None]) -> torch.Tensor:  # fmt: skip
    """Central differences of the outputs' product with `cotangents`, for each number of input `index`."""

    def objective(x: torch.Tensor) -> float:
        outputs = reference(op, (*tensors[:index], x, *tensors[index + 1 :]), sample.attrs)
        return sum(float((o * c).sum()) for o, c in zip(outputs, cotangents, strict=True) if c is not None)

    step, slopes = 1e-5, []
    for j in range(tensors[index].numel()):
        delta = torch.zeros_like(tensors[index])
        delta.view(-1)[j] = step
        slopes.append((objective(tensors[index] + delta) - objective(tensors[index] - delta)) / (2 * step))
    return torch.tensor(slopes, dtype=torch.float64).view(tensors[index].shape)


@pytest.mark.parametrize(("op", "split"), SPLITS)
def test_parts_give_the_whole(op: OpDef, split: Split) -> None:
    tried = 0
    for sample in op.samples:
        axes = split.inputs[: len(sample.inputs)]
        assert len(axes) == len(sample.inputs)
        if not all(a is None or _divides(t, a) for t, a in zip(sample.inputs, axes, strict=True)):
            continue
        tried += 1
        tensors = draw(sample)
        whole = reference(op, tensors, sample.attrs)
        halves = [[t] * 2 if a is None else list(t.chunk(2, a)) for t, a in zip(tensors, axes, strict=True)]
        parts = [reference(op, tuple(h[rank] for h in halves), sample.attrs) for rank in range(2)]
        for rank in range(2):
            inferred = op.infer_types(tuple(type_of(h[rank]) for h in halves), sample.attrs)
            assert inferred == tuple(map(type_of, parts[rank]))
        for i, (expected, axis) in enumerate(zip(whole, split.outputs, strict=True)):
            first, second = parts[0][i], parts[1][i]
            if isinstance(axis, int):
                close(torch.cat((first, second), axis), expected)
            elif axis == SUM:
                close(first + second, expected)
            else:
                close(first, expected)
                close(second, expected)
    assert tried, "no sample has the axes that this split cuts, of even size"


def _divides(t: Type, axis: int) -> bool:
    return -t.rank <= axis < t.rank and bind(t.shape[axis], {}) % 2 == 0


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_cost_covers_unavoidable_traffic(op: OpDef, sample: Sample) -> None:
    outputs = op.infer_types(sample.inputs, sample.attrs)
    cost = op.cost(sample.inputs, outputs, **dict(sample.attrs))
    assert min(bind(d, {}) for d in (cost.flops, cost.vector_flops, cost.bytes, cost.comm_bytes)) >= 0
    if op.view:
        assert cost.bytes == 0
        return
    read = sum(t.bytes() for i, t in enumerate(sample.inputs) if i not in NOT_READ.get(op.name, ()))
    written = sum(t.bytes() for i, t in enumerate(outputs) if i not in NOT_WRITTEN.get(op.name, ()))
    assert bind(cost.bytes, {}) >= read + written


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_text_round_trip(op: OpDef, sample: Sample) -> None:
    b, node = called(op, sample)
    graphs = [b.graph(node.outputs)]
    if op.vjp is not None:
        graphs.append(differentiated(op, sample)[0])
    for graph in graphs:
        text = show_graph(graph)
        assert parse_graph(text, REGISTRY) == graph
        assert show_graph(parse_graph(text, REGISTRY)) == text


def _operands(op: OpDef, tensors: Tensors) -> tuple[tuple[Row, ...], Tensors]:
    """The operands of the row program and their values [rows or 1, columns or 1], float64 if one is, else float32."""
    assert op.rows is not None
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    space = tensors[op.rows.operands.index("row")].shape[:-1]
    rows: list[Row] = []
    values: list[torch.Tensor] = []
    for i, (kind, t) in enumerate(zip(op.rows.operands, (t.to(wide) for t in tensors), strict=True)):
        cols = t.shape[-1] if kind in ("row", "prefix", "column") else 0
        if kind == "prefix":
            first = t.shape[:-1]
            assert first == space[: len(first)]
            t = t.view(*first, *[1] * (len(space) - len(first)), cols).expand(*space, cols)
        if kind in ("row", "scalar"):
            assert t.shape[: len(space)] == space
        rows.append(Operand(cols, i))
        values.append(t.reshape(-1, cols or 1))
    return tuple(rows), tuple(values)


@pytest.mark.parametrize(("op", "sample"), ROW_CASES)
def test_row_program_is_the_reference(op: OpDef, sample: Sample) -> None:
    assert op.rows is not None
    tensors = draw(sample)
    expected = reference(op, tensors, sample.attrs)
    rows, values = _operands(op, tensors)
    body = op.rows.body(*rows, **dict(sample.attrs))
    results = body if isinstance(body, tuple) else (body,)
    assert len(results) == len(op.rows.results) == len(expected)
    known: dict[Row, torch.Tensor] = {}
    for kind, row, wanted in zip(op.rows.results, results, expected, strict=True):
        value = evaluate(row, values, known)
        assert value.dtype == values[0].dtype
        assert row.cols == (0 if kind == "scalar" else wanted.shape[0 if kind.startswith("turned") else -1])
        height = max(v.shape[0] for v, k in zip(values, op.rows.operands, strict=True) if k in ("row", "scalar"))
        close(placed(value, kind, height, row.cols).reshape(wanted.shape).to(wanted.dtype), wanted)


def _narrow(op: OpDef, sample: Sample) -> list[tuple[Type, ...]]:
    """`sample`'s types without float64, as far as the op accepts them: all float32, and as many bf16 as it allows."""
    wide = [i for i, t in enumerate(sample.inputs) if t.dtype is DType.f64]

    def accepted(bf16: tuple[int, ...]) -> tuple[Type, ...] | None:
        types = tuple(t.with_dtype(DType.bf16 if i in bf16 else DType.f32) if i in wide else t
                      for i, t in enumerate(sample.inputs))  # fmt: skip
        try:
            op.infer_types(types, sample.attrs)
        except IRError:
            return None
        return types

    mixed = [c for n in range(len(wide), 0, -1) for c in itertools.combinations(wide, n)]
    most = next((types for c in mixed if (types := accepted(c))), None)
    return [types for types in (accepted(()), most) if types]


@pytest.mark.parametrize(("op", "sample"), CASES)
def test_narrow_types_follow_float64(op: OpDef, sample: Sample) -> None:
    candidates = _narrow(op, sample)
    if DType.f64 not in {t.dtype for t in sample.inputs}:
        candidates = [sample.inputs]
    assert candidates, "works in float64 only"
    for types in candidates:
        tensors = tuple(t.to(torch_dtype(n.dtype)) for t, n in zip(draw(sample), types, strict=True))
        outputs = reference(op, tensors, sample.attrs)
        assert tuple(map(type_of, outputs)) == op.infer_types(types, sample.attrs)
        widened = tuple(t.double() if s.dtype is DType.f64 else t for t, s in zip(tensors, sample.inputs, strict=True))
        precision = max((TOLERANCE[t.dtype] for t in outputs if t.is_floating_point()), default=0.0)
        for narrow, wide in zip(outputs, reference(op, widened, sample.attrs), strict=True):
            close(narrow, wide, precision)
