"""Graph rewriting keeps what graphs compute: checked on random graphs with the reference interpreter."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from dsv3c.build import Builder
from dsv3c.interp import run
from dsv3c.ir import DType, Graph, IRError, Node, Phase, Type, Value
from dsv3c.op import NO_GRADIENT, Effect, OpDef, Registry, Sample, io_cost
from dsv3c.rewrite import (
    ancestors,
    descendants,
    fresh,
    inline,
    keep,
    live,
    outline,
    pure,
    rename,
    substitute,
    topological,
)
from dsv3c.text import parse_graph, show_graph
from dsv3c.verify import verify

VECTOR = Type(DType.f64, (3,))
SEEDS = range(40)


def toy(name: str, inputs: int, outputs: int, effect: Effect, reference: object) -> OpDef:
    """An op from `inputs` to `outputs` vectors."""

    def infer(*types: Type) -> Type | tuple[Type, ...]:
        if len(types) != inputs:
            raise IRError(f"expected {inputs} inputs")
        return types[0] if outputs == 1 else (types[0],) * outputs

    return OpDef(
        name=name, doc="A toy.", infer=infer, reference=reference, cost=io_cost, vjp=NO_GRADIENT,  # type: ignore[arg-type]
        shard=(), effect=effect, rows=None, aliases=(), view=False, samples=(Sample((VECTOR,) * inputs),),
    )  # fmt: skip


TOYS = Registry(
    [
        toy("minus", 2, 1, Effect.PURE, lambda x, y: x - 0.5 * y),
        toy("wave", 1, 1, Effect.PURE, lambda x: x.sin()),
        toy("halves", 1, 2, Effect.PURE, lambda x: (x.cos(), x * 0.75)),
        toy("send", 1, 1, Effect.COMM, lambda x: x + 0.0),
    ]
)
INPUTS = {"minus": 2, "wave": 1, "halves": 1, "send": 1}


def random_graph(seed: int, nodes: int = 14) -> Graph:
    rng = random.Random(seed)
    b = Builder(TOYS, f"random_{seed}")
    values = [b.input("x", VECTOR), b.input("y", VECTOR), b.weight("w", VECTOR)]
    for _ in range(nodes):
        op = rng.choice(list(INPUTS))
        with b.path(rng.choice(["moe.router", "moe.dispatch", "mlp"])):
            values += b.emit(op, tuple(rng.choices(values[-6:], k=INPUTS[op])))
    graph = b.graph(rng.sample(values[3:], 3))
    verify(graph, TOYS)
    return graph


def tensors(graph: Graph) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {v.name: torch.randn(3, generator=generator, dtype=torch.float64) for v in graph.params}


def results(graph: Graph, graphs: dict[str, Graph] | None = None) -> list[torch.Tensor]:
    verify(graph, TOYS, graphs)
    known = run(graph, tensors(graph), TOYS, graphs)
    return [known[v.name] for v in graph.results]


def assert_equal_results(before: Graph, after: Graph, graphs: dict[str, Graph] | None = None) -> None:
    for a, b in zip(results(before), results(after, graphs), strict=True):
        assert torch.equal(a, b)


def text(source: str) -> Graph:
    return parse_graph(source, TOYS)


CHAIN = """
def chain(x: f64[3], y: f64[3], *, w: f64[3]):
    a = wave(x)          # f64[3] @F:moe.router.gate
    b, c = halves(a)     # f64[3], f64[3] @F:moe.router
    d = send(b)          # f64[3] @F:moe.dispatch
    e = minus(c, w)      # f64[3] @F:moe.router.gate
    f = minus(d, e)      # f64[3] @F:moe.mlp
    unused = wave(y)     # f64[3] @F:moe
    return f
"""


# --- who needs what


@pytest.mark.parametrize("seed", SEEDS)
def test_ancestors_are_exactly_what_a_value_depends_on(seed: int) -> None:
    graph = random_graph(seed)
    given = tensors(graph)
    before = run(graph, given, TOYS)
    for value in graph.results:
        found = ancestors(graph, [value])
        for p in graph.params:
            changed = run(graph, {**given, p.name: given[p.name] + 1.0}, TOYS)
            assert (p.name in found) == (not torch.equal(changed[value.name], before[value.name]))
            assert (p.name in found) == (value.name in descendants(graph, [p]))


def test_ancestors_and_descendants_include_themselves_and_nothing_else() -> None:
    graph = text(CHAIN)
    assert ancestors(graph, [graph.value("e")]) == {"e", "c", "a", "x", "w"}
    assert descendants(graph, [graph.value("c")]) == {"c", "e", "f"}
    assert ancestors(graph, []) == descendants(graph, []) == set()


@pytest.mark.parametrize("seed", SEEDS)
def test_live_nodes_are_those_that_matter(seed: int) -> None:
    graph = random_graph(seed)
    needed = live(graph, TOYS)
    assert_equal_results(graph, keep(graph, needed))
    assert [n for n in keep(graph, needed).nodes if n.op == "send"] == [n for n in graph.nodes if n.op == "send"]
    for index in needed:
        if graph.nodes[index].op != "send":
            with pytest.raises(IRError, match="whose node is dropped"):
                keep(graph, needed - {index})
    again = keep(graph, needed)
    assert keep(again, live(again, TOYS)) is again


def test_live_keeps_communication_that_no_result_needs() -> None:
    graph = text(CHAIN).but(results=(Value("a", VECTOR),))
    assert live(graph, TOYS) == {0, 1, 2}


def test_a_call_is_pure_if_its_graph_is() -> None:
    graph = text(CHAIN)
    for nodes, expected in (({0, 1}, True), ({1, 2}, False)):
        region, outer = outline(graph, nodes, "region")
        call = next(n for n in outer.nodes if n.op == "call")
        assert pure(call, TOYS, {"region": region}) is expected
    unread = outer.but(results=(Value("a", VECTOR),))
    assert outer.nodes.index(call) in live(unread, TOYS, {"region": region})
    with pytest.raises(IRError, match="unknown graph 'region'"):
        live(unread, TOYS)


def test_keep_refuses_to_drop_what_is_returned() -> None:
    graph = text(CHAIN)
    with pytest.raises(IRError, match="chain: return reads 'f', whose node is dropped"):
        keep(graph, {0, 1, 2, 3})
    with pytest.raises(IRError, match="chain: minus reads 'c', whose node is dropped"):
        keep(graph, {0, 3, 4})


@pytest.mark.parametrize("seed", SEEDS)
def test_topological_sorts_any_order_and_leaves_sorted_graphs_alone(seed: int) -> None:
    graph = random_graph(seed)
    assert topological(graph) is graph
    nodes = list(graph.nodes)
    random.Random(seed).shuffle(nodes)
    ordered = topological(graph.but(nodes=tuple(nodes)))
    assert_equal_results(graph, ordered)
    assert sorted(map(id, ordered.nodes)) == sorted(map(id, graph.nodes))


def test_topological_moves_only_what_it_must() -> None:
    graph = text(CHAIN)
    a, bc, d, e, f, unused = graph.nodes
    assert topological(graph.but(nodes=(unused, a, d, bc, e, f))).nodes == (unused, a, bc, d, e, f)


def test_topological_refuses_a_circle() -> None:
    graph = text(CHAIN)
    circle = replace(graph.nodes[0], inputs=(graph.value("f"),))
    with pytest.raises(IRError, match="in a circle"):
        topological(graph.but(nodes=(circle, *graph.nodes[1:])))


# --- renaming and replacing


@pytest.mark.parametrize("seed", SEEDS)
def test_rename_keeps_meaning(seed: int) -> None:
    graph = random_graph(seed)
    params = {p.name: p.name for p in graph.params}
    renamed = rename(graph, params, prefix="layer_", suffix="_F")
    assert_equal_results(graph, renamed)
    assert renamed.params == graph.params
    assert all(v.name.startswith("layer_") and v.name.endswith("_F") for n in renamed.nodes for v in n.outputs)
    assert (
        rename(renamed, {v.name: v.name.removeprefix("layer_").removesuffix("_F") for v in renamed.values()}) == graph
    )


def test_rename_swaps_names_and_refuses_equal_ones() -> None:
    graph = text(CHAIN)
    swapped = rename(graph, {"b": "c", "c": "b"})
    assert_equal_results(graph, swapped)
    assert [v.name for v in swapped.nodes[1].outputs] == ["c", "b"]
    with pytest.raises(IRError, match="'a' and 'b' would both be called 'a'"):
        rename(graph, {"b": "a"})


def test_substitute_replaces_uses_and_results_but_not_definitions() -> None:
    graph = text(CHAIN)
    found = substitute(graph, {"b": graph.value("c"), "f": graph.value("e"), "e": graph.value("a")})
    assert found.nodes[1] is graph.nodes[1]
    assert found.nodes[2].inputs == (graph.value("c"),)
    assert found.nodes[4].inputs == (graph.value("d"), graph.value("a"))
    assert found.results == (graph.value("e"),), "replacements are not themselves replaced"


@pytest.mark.parametrize("seed", SEEDS)
def test_substituting_an_equal_value_keeps_meaning(seed: int) -> None:
    graph = random_graph(seed)
    index = random.Random(seed).randrange(len(graph.nodes))
    node = graph.nodes[index]
    twins = tuple(Value(f"{v.name}_twin", v.type) for v in node.outputs)
    doubled = graph.but(nodes=(*graph.nodes[:index], replace(node, outputs=twins), *graph.nodes[index:]))
    merged = substitute(doubled, {v.name: twin for v, twin in zip(node.outputs, twins, strict=True)})
    assert_equal_results(graph, merged)
    assert not any(v in node.outputs for n in merged.nodes for v in n.inputs)


def test_fresh_names() -> None:
    assert fresh({"a", "a_1"}, "b") == "b"
    assert fresh({"a", "a_1"}, "a") == "a_2"


# --- regions


def convex_region(graph: Graph, rng: random.Random) -> set[int]:
    """A few random nodes, connected or not, and every node that lies on a way from one of them to another."""
    chosen = set(rng.sample(range(len(graph.nodes)), rng.randint(1, 5)))
    outputs = [v for i in chosen for v in graph.nodes[i].outputs]
    between = ancestors(graph, outputs) & descendants(graph, outputs)
    return chosen | {i for i, n in enumerate(graph.nodes) if any(v.name in between for v in n.outputs)}


@pytest.mark.parametrize("seed", SEEDS)
def test_outline_keeps_meaning_and_inline_undoes_it(seed: int) -> None:
    graph = random_graph(seed)
    nodes = convex_region(graph, random.Random(seed))
    try:
        region, outer = outline(graph, nodes, "region")
    except IRError as error:
        assert "nothing outside reads" in str(error)
        read = {v.name for i, n in enumerate(graph.nodes) if i not in nodes for v in n.inputs}
        read |= {v.name for v in graph.results}
        assert not any(v.name in read for i in nodes for v in graph.nodes[i].outputs)
        return
    graphs = {"region": region}
    verify(region, TOYS)
    assert_equal_results(graph, outer, graphs)
    assert region.nodes == tuple(graph.nodes[i] for i in sorted(nodes))
    assert len(outer.nodes) == len(graph.nodes) - len(nodes) + 1
    first_use = [v.name for n in region.nodes for v in n.inputs]
    positions = [first_use.index(v.name) for v in region.inputs]
    assert positions == sorted(positions) and not region.weights
    (call,) = (n for n in outer.nodes if n.op == "call")
    flat = inline(outer, call, graphs)
    assert_equal_results(graph, flat)
    assert sorted(map(str, flat.nodes)) == sorted(map(str, graph.nodes))


def test_outline_makes_a_readable_region() -> None:
    region, outer = outline(text(CHAIN), {0, 1, 3}, "gate")
    assert show_graph(region) == (
        "def gate(x: f64[3], w: f64[3]):\n"
        "    a = wave(x)       # f64[3] @F:moe.router.gate\n"
        "    b, c = halves(a)  # f64[3], f64[3] @F:moe.router\n"
        "    e = minus(c, w)   # f64[3] @F:moe.router.gate\n"
        "    return b, e\n"
    )
    assert show_graph(outer) == (
        "def chain(x: f64[3], y: f64[3], *, w: f64[3]):\n"
        "    b, e = call(x, w, graph='gate')  # f64[3], f64[3] @F:moe.router\n"
        "    d = send(b)                      # f64[3] @F:moe.dispatch\n"
        "    f = minus(d, e)                  # f64[3] @F:moe.mlp\n"
        "    unused = wave(y)                 # f64[3] @F:moe\n"
        "    return f\n"
    )


def test_outline_puts_what_needs_the_region_after_it_and_nothing_else() -> None:
    graph = text(
        "def g(x: f64[3], y: f64[3]):\n"
        "    a = wave(x)\n"
        "    late = wave(a)\n"
        "    early = wave(y)\n"
        "    b = minus(a, early)\n"
        "    return late, b\n"
    )
    region, outer = outline(graph, {0, 3}, "r")
    assert [n.outputs[0].name for n in outer.nodes] == ["early", "a", "late"]
    assert [v.name for v in region.inputs] == ["x", "early"]
    assert_equal_results(graph, outer, {"r": region})


def test_outline_refuses_regions_that_cannot_be_one_node() -> None:
    graph = text(CHAIN)
    with pytest.raises(IRError, match="'r' is not convex: it reads 'd', which needs its results"):
        outline(graph, {1, 4}, "r")
    with pytest.raises(IRError, match="'r' is empty"):
        outline(graph, set(), "r")
    with pytest.raises(IRError, match="nothing outside reads what the region 'r' makes"):
        outline(graph, {5}, "r")
    mixed = graph.but(nodes=(*graph.nodes[:4], replace(graph.nodes[4], phase=Phase.B), graph.nodes[5]))
    with pytest.raises(IRError, match="'r' mixes the phases B, F"):
        outline(mixed, {3, 4}, "r")


@pytest.mark.parametrize("seed", SEEDS)
def test_inline_twice_makes_names_unique(seed: int) -> None:
    called = random_graph(seed, nodes=6).but(name="part")
    b = Builder(TOYS, "twice", {"part": called})
    x, y, w = b.input("x", VECTOR), b.input("y", VECTOR), b.weight("w", VECTOR)
    first = b.call(x, y, w, graph="part")
    second = b.call(*first, graph="part")
    graph, graphs = b.graph(list(second)), {"part": called}
    flat = graph
    for _ in range(2):
        flat = inline(flat, next(n for n in flat.nodes if n.op == "call"), graphs)
    for before, after in zip(results(graph, graphs), results(flat), strict=True):
        assert torch.equal(before, after)
    assert len(flat.nodes) == 12


def test_inline_of_a_graph_that_returns_its_input_and_one_value_twice() -> None:
    called = text("def part(p: f64[3]):\n    q = wave(p)\n    return p, q, q\n")
    b = Builder(TOYS, "outer", {"part": called})
    x = b.input("x", VECTOR)
    with b.path("mlp"):
        p, q, again = b.call(x, graph="part", out=("p", "q", "again"))
    graph = b.graph([b.minus(p, q), b.minus(again, p)])
    flat = inline(graph, graph.nodes[0], {"part": called})
    verify(flat, TOYS)
    for before, after in zip(results(graph, {"part": called}), results(flat), strict=True):
        assert torch.equal(before, after)
    assert [n.op for n in flat.nodes] == ["wave", "minus", "minus"]
    assert flat.nodes[0].path == "mlp"


def test_inline_refuses_what_is_no_call() -> None:
    graph = text(CHAIN)
    with pytest.raises(IRError, match="'wave' is not a call in this graph"):
        inline(graph, graph.nodes[0], {})
    stranger = Node("call", (), (("graph", "nowhere"),), ())
    with pytest.raises(IRError, match="'call' is not a call in this graph"):
        inline(graph, stranger, {})
    with pytest.raises(IRError, match="unknown graph 'nowhere'"):
        inline(graph.but(nodes=(stranger,)), stranger, {})
