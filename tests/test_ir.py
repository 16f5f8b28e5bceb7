"""The IR: dimensions, the builder, the verifier's messages, text and back, and what the parser refuses."""

from __future__ import annotations

import ast
import inspect
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3c.build import Builder
from dsv3c.dims import Dim, add, bind, ceil_div, multiply, parse, round_up, same, show, substitute, symbol, symbols
from dsv3c.interp import run
from dsv3c.ir import Attr, DType, Graph, IRError, Layer, Node, Phase, Program, Sequence, Type, Value, Weight
from dsv3c.ops import REGISTRY
from dsv3c.text import parse_graph, parse_program, show_graph, show_program
from dsv3c.verify import verify, verify_program

B, S = symbol("B"), symbol("S")
ROWS = Type(DType.f32, (B, S, 8))


def read(dim: str) -> Dim:
    return parse(ast.parse(dim, mode="eval").body)


# ---- dimensions ---------------------------------------------------------------------------------------------------


def dims() -> st.SearchStrategy[Dim]:
    leaves: st.SearchStrategy[Dim] = st.one_of(st.integers(1, 9), st.sampled_from([B, S]))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda ab: add(*ab)),
            st.tuples(inner, inner).map(lambda ab: multiply(*ab)),
            st.tuples(inner, st.integers(2, 5)).map(lambda an: ceil_div(*an)),
        ),
        max_leaves=5,
    )


@given(dims())
def test_a_dimension_reads_back_as_the_same_object(dim: Dim) -> None:
    assert same(read(show(dim)), dim)
    assert show(read(show(dim))) == show(dim)


@given(dims(), dims(), dims(), st.integers(1, 50), st.integers(1, 50))
def test_arithmetic_of_dimensions_is_that_of_integers(x: Dim, y: Dim, z: Dim, b: int, s: int) -> None:
    sizes = {"B": b, "S": s}
    u, v, w = (bind(d, sizes) for d in (x, y, z))
    assert bind(multiply(x, add(y, z)), sizes) == u * (v + w)
    assert bind(ceil_div(x, 3), sizes) == -(-u // 3)
    assert same(multiply(x, add(y, z)), add(multiply(x, y), multiply(x, z)))


def test_concrete_dimensions_stay_integers() -> None:
    for dim in (
        multiply(2, 3),
        add(B, multiply(-1, B)),
        ceil_div(7, 2),
        round_up(5, 4),
        substitute(B, "B", 4),
        read("2*3"),
    ):
        assert type(dim) is int
    assert (multiply(), add(), ceil_div(7, 2), round_up(5, 4)) == (1, 0, 4, 8)


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        (multiply(B, S, 8), "8*B*S"),
        (add(multiply(B, 8), 3), "8*B + 3"),
        (multiply(B, B), "B**2"),
        (multiply(B, add(S, 1)), "B*S + B"),
        (ceil_div(add(B, 1), 2), "ceiling(B/2 + 1/2)"),
        (round_up(multiply(B, S), 128), "128*ceiling(B*S/128)"),
        (ceil_div(ceil_div(B, 2), 3), "ceiling(ceiling(B/2)/3)"),
    ],
)
def test_dimensions_print_in_one_form(dim: Dim, text: str) -> None:
    assert show(dim) == text
    assert same(read(text), dim)


@pytest.mark.parametrize(
    "text", ["B/2", "1.5", "True", "B % 2", "f(B)", "B**S", "B**-1", "ceiling(B/S)", "ceiling(B/0)", "'B'"]
)
def test_what_is_no_dimension_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a dimension|divisor"):
        read(text)


def test_a_symbol_without_size_is_named() -> None:
    assert symbols((B, 3, multiply(S, B))) == ("B", "S")
    with pytest.raises(KeyError, match="S"):
        bind(multiply(B, S), {"B": 2})
    assert bind(substitute(multiply(B, add(S, 1)), "S", 3), {"B": 5}) == 20


def test_types_measure_themselves() -> None:
    t = Type(DType.bf16, (B, 4))
    assert (t.rank, t.elements, t.bytes({"B": 3}), t.bound({"B": 3})) == (2, multiply(B, 4), 24, (3, 4))
    assert Type(DType.e5m6, (3,)).bytes() == 5
    assert (str(t), str(Type(DType.f32, ()))) == ("bf16[B, 4]", "f32[()]")


# ---- the builder --------------------------------------------------------------------------------------------------


def block(nodes: int = 3) -> Graph:
    """A small graph with paths, phases, attributes of several kinds and an op with two results."""
    b = Builder(REGISTRY, "block")
    x = b.input("x", ROWS)
    labels = b.input("labels", Type(DType.i64, (B, S)))
    w = b.weight("w", Type(DType.f32, (8, 8)))
    with b.path("mlp"), b.path("up"):
        for _ in range(nodes):
            x = b.add(x, b.linear(x, w, out="h"))
    with b.at("head", Phase.B):
        loss, lse = b.cross_entropy(b.scale(x, by=1e-6), labels, out=("loss", "lse"))
    return b.graph([loss, lse])


def test_builder_names_paths_and_lines() -> None:
    graph = block(2)
    assert [v.name for v in graph.values()] == [
        "x", "labels", "w", "h", "add", "h_1", "add_1", "scale", "loss", "lse",
    ]  # fmt: skip
    assert [n.path for n in graph.nodes] == ["mlp.up"] * 4 + ["head"] * 2
    assert [n.phase for n in graph.nodes] == [Phase.F] * 4 + [Phase.B] * 2
    first = inspect.getsourcelines(block)[1]
    file, _, line = graph.nodes[0].line.rpartition(":")
    assert file == __file__
    assert first < int(line) < first + 15
    assert graph.producers["h_1"] is graph.nodes[2]
    assert graph.users["h"] == (graph.nodes[1],)
    assert graph.symbols == ("B", "S")
    verify(graph, REGISTRY)


def test_builder_goes_on_after_a_graph() -> None:
    graph = block(1)
    b = Builder.extend(REGISTRY, graph)
    y = b.scale(graph.value("h"), by=2.0, out="h")
    assert y.name == "h_1"
    assert b.graph([y]).nodes[:-1] == graph.nodes


def test_builder_refuses_with_the_callers_line_and_the_node() -> None:
    b = Builder(REGISTRY, "g")
    x = b.input("x", ROWS)
    w = b.weight("w", Type(DType.f32, (4, 4)))
    with pytest.raises(IRError) as raised, b.path("attention"):
        b.linear(x, w)
    message = str(raised.value)
    assert message.startswith("g: attention: linear: f32[B, S, 8] does not fit the weight f32[4, 4]")
    assert " = linear(x, w)" in message
    assert f"written at {__file__}:" in message
    with pytest.raises(IRError, match="missing 1 required input: 'w'"):
        b.linear(x)
    with pytest.raises(IRError, match="unexpected attribute 'to'"):
        b.scale(x, by=1.0, to=2)
    with pytest.raises(IRError, match="add has 1 results, 2 are named"):
        b.add(x, x, out=("p", "q"))
    with pytest.raises(AttributeError, match="no op is called 'liner'; did you mean 'linear'"):
        b.liner(x, w)


def test_registry_suggests_the_nearest_op() -> None:
    with pytest.raises(IRError, match="unknown op 'embeding'; did you mean 'embedding'"):
        REGISTRY["embeding"]
    with pytest.raises(IRError, match="registered twice"):
        REGISTRY.register(replace(REGISTRY["add"], doc="another"))
    assert REGISTRY.register(REGISTRY["add"]) is REGISTRY["add"]
    with pytest.raises(IRError, match="Python identifier"):
        replace(REGISTRY["add"], name="no-name")
    with pytest.raises(IRError, match="needs a doc sentence"):
        replace(REGISTRY["add"], samples=())


def test_types_of_thousands_of_nodes() -> None:
    graph = block(2500)
    assert len(graph.nodes) == 5002
    verify(graph, REGISTRY)
    assert parse_graph(show_graph(graph), REGISTRY) == graph


# ---- the verifier -------------------------------------------------------------------------------------------------


def chain(*ops: str) -> Graph:
    b = Builder(REGISTRY, "g")
    x = b.input("x", ROWS)
    for op in ops:
        x = b.emit(op, (x,))[0]
    return b.graph([x])


def test_verifier_shows_the_node_among_its_neighbours() -> None:
    graph = chain(*["sigmoid", "copy"] * 6)
    bad = replace(graph.nodes[6], outputs=(Value("sigmoid_3", ROWS.with_dtype(DType.bf16)),), path="moe.router",
                  line="model.py:7")  # fmt: skip
    nodes = (*graph.nodes[:6], bad, *graph.nodes[7:])
    with pytest.raises(IRError) as raised:
        verify(graph.but(nodes=nodes), REGISTRY)
    assert str(raised.value).splitlines() == [
        "g: moe.router: sigmoid: 'sigmoid_3' is declared as bf16[B, S, 8] but sigmoid gives f32[B, S, 8]",
        "    sigmoid_1 = sigmoid(copy)",
        "    copy_1 = copy(sigmoid_1)",
        "    sigmoid_2 = sigmoid(copy_1)",
        "    copy_2 = copy(sigmoid_2)",
        "  > sigmoid_3 = sigmoid(copy_2)",
        "    copy_3 = copy(sigmoid_3)",
        "    sigmoid_4 = sigmoid(copy_3)",
        "    copy_4 = copy(sigmoid_4)",
        "    sigmoid_5 = sigmoid(copy_4)",
        "  written at model.py:7",
    ]


def test_verifier_refuses_what_is_no_ssa() -> None:
    graph = chain("sigmoid", "copy")
    x, first, second = graph.inputs[0], graph.nodes[0], graph.nodes[1]
    wide = Value("x", ROWS.with_dtype(DType.f64))
    for wrong, reason in (
        (graph.but(nodes=(second, first)), "'sigmoid' is not defined before this node"),
        (graph.but(nodes=(first, replace(second, outputs=first.outputs)), results=()), "'sigmoid' is defined twice"),
        (graph.but(nodes=(replace(first, inputs=(wide,)),)), r"'x' is used as f64\[B, S, 8\] but defined as f32"),
        (graph.but(nodes=(replace(first, outputs=()),)), "sigmoid has 1 results, 0 are named"),
        (graph.but(nodes=(replace(first, op="sigmoyd"),)), "unknown op 'sigmoyd'; did you mean 'sigmoid'"),
        (graph.but(inputs=(x, x)), "'x' is declared twice"),
        (graph.but(results=(Value("y", ROWS),)), "the result 'y' is not defined"),
        (graph.but(results=(wide,)), "the result 'x' is f32"),
        (graph.but(inputs=(Value("d:x", ROWS),)), "'d:x' cannot be a name"),
        (graph.but(inputs=(Value("lambda", ROWS),)), "'lambda' cannot be a name"),
    ):
        with pytest.raises(IRError, match=reason):
            verify(wrong, REGISTRY)


def small_program() -> Program:
    inner = chain("sigmoid").but(name="inner")
    b = Builder(REGISTRY, "outer", {"inner": inner})
    x, w = b.input("x", ROWS), b.weight("w", Type(DType.f32, (8,)))
    y = b.call(x, graph="inner", out="y")
    loss = b.sum_all(b.rms_norm(y, w, eps=1e-6), out="loss")
    outer = b.graph([y, loss])
    weight = Weight("norm.weight", Type(DType.f32, (8,)), "ones", 0.0, "norm")
    layers = (
        Layer("first", "outer", ("a",), ("norm.weight",), ("b", "loss")),
        Layer("second", "inner", ("b",), (), ("d:c",), Phase.B),
    )
    sequence = Sequence("train", ("a",), layers, ("d:c",), ("loss",), (("d:c", "norm.weight"),))
    return Program("small", (inner, outer), (sequence,), (weight,))


def test_program_reads_back_and_runs() -> None:
    program = small_program()
    verify_program(program, REGISTRY)
    text = show_program(program)
    again = parse_program(text, REGISTRY)
    assert again == program
    assert show_program(again) == text
    x, w = torch.randn(2, 3, 8), torch.rand(8)
    values = run(program.graph("outer"), {"x": x, "w": w}, REGISTRY, {g.name: g for g in program.graphs})
    assert torch.equal(values["y"], x.sigmoid())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"graph": "innr"}, "layer 'second' of 'train' uses the unknown graph 'innr'"),
        ({"inputs": ("b", "b")}, r"binds \(2, 0, 1\) inputs, weights and results, 'inner' has \(1, 0, 1\)"),
        ({"inputs": ("z",)}, "reads 'z', which no earlier layer writes"),
        ({"inputs": ("loss",)}, r"reads 'loss', which is f32\[\(\)\], as x: f32\[B, S, 8\]"),
        ({"outputs": ("b",)}, "writes 'b' a second time"),
        ({"outputs": ("q",)}, "returns 'd:c', which no layer writes"),
    ],
)
def test_verifier_checks_the_layers_of_a_sequence(change: dict[str, object], reason: str) -> None:
    program = small_program()
    sequence = program.sequence("train")
    second = replace(sequence.layers[1], **change)  # type: ignore[arg-type]
    wrong = program.but(sequences=(replace(sequence, layers=(sequence.layers[0], second)),))
    with pytest.raises(IRError, match=reason):
        verify_program(wrong, REGISTRY)


def test_verifier_checks_the_weights_of_a_program() -> None:
    program = small_program()
    (weight,) = program.weights
    for wrong, reason in (
        (program.but(weights=()), "binds the unknown weight 'norm.weight'"),
        (program.but(weights=(replace(weight, type=Type(DType.f32, (4,))),)), r"of shape f32\[4\] to w: f32\[8\]"),
        (program.but(weights=(weight, weight)), "two weights have the same name"),
        (program.but(graphs=program.graphs * 2), "two graphs have the same name"),
        (program.but(graphs=program.graphs[1:]), "call of the unknown graph 'inner'"),
    ):
        with pytest.raises(IRError, match=reason):
            verify_program(wrong, REGISTRY)


def test_graphs_that_did_not_change_are_not_verified_again() -> None:
    broken = chain("sigmoid").but(results=(Value("nothing", ROWS),))
    program = Program("p", (broken,))
    with pytest.raises(IRError, match="not defined"):
        verify_program(program, REGISTRY)
    verify_program(program, REGISTRY, before=program)


# ---- text ---------------------------------------------------------------------------------------------------------


def test_text_of_a_graph() -> None:
    assert show_graph(block(1)) == (
        "def block(x: f32[B, S, 8], labels: i64[B, S], *, w: f32[8, 8]):\n"
        "    h = linear(x, w)                          # f32[B, S, 8] @F:mlp.up\n"
        "    add = add(x, h)                           # f32[B, S, 8] @F:mlp.up\n"
        "    scale = scale(add, by=1e-06)              # f32[B, S, 8] @B:head\n"
        "    loss, lse = cross_entropy(scale, labels)  # f32[()], f32[B, S] @B:head\n"
        "    return loss, lse\n"
    )
    assert parse_graph(show_graph(block(1)), REGISTRY) == block(1)


@given(st.randoms(use_true_random=False))
def test_random_graphs_read_back(random: random.Random) -> None:
    b = Builder(REGISTRY, "g")
    values = [b.input("x", Type(random.choice([DType.f32, DType.bf16]), (B, ceil_div(add(S, 1), 2), 4)))]
    for _ in range(random.randint(0, 8)):
        x = random.choice(values)
        with b.at(random.choice(["", "moe.router", "mlp"]), random.choice(list(Phase))):
            if random.random() < 0.4:
                values.append(b.add(x, x, out=random.choice(["add", "x", "residual"])))
            else:
                values.append(b.scale(x, by=random.choice([0.1, 3, -1e-30, float("inf"), -float("inf"), 1e22])))
    graph = b.graph(random.sample(values, random.randint(0, len(values))))
    text = show_graph(graph)
    assert parse_graph(text, REGISTRY) == graph
    assert show_graph(parse_graph(text, REGISTRY)) == text


def test_attributes_of_every_kind_read_back() -> None:
    attrs: tuple[tuple[str, Attr], ...] = (
        ("a", True), ("b", None), ("c", "it's # not a comment"), ("d", (1, (2.5,), ())), ("e", -3), ("f", float("inf")),
    )  # fmt: skip
    op = replace(REGISTRY["copy"], name="any_attributes", infer=lambda x, **_: x)
    registry = type(REGISTRY)([*REGISTRY, op])
    x = Value("x", ROWS)
    graph = Graph("g", (x,), (), (Node(op.name, (x,), attrs, (Value("y", ROWS),)),), (x,))
    again = parse_graph(show_graph(graph), registry)
    assert again == graph
    assert [type(v) for _, v in again.nodes[0].attrs] == [type(v) for _, v in attrs]


def test_types_and_tags_may_be_left_out() -> None:
    text = '''
def g(x: f32[B, S, 8]):
    """Told in words."""
    y = sigmoid(x)
    z = add(
        x,
        y,
    )  # @W:mlp
    return (y, z)
'''
    graph = parse_graph(text, REGISTRY, "g.ir")
    assert [str(v.type) for v in graph.results] == ["f32[B, S, 8]"] * 2
    assert [(n.phase, n.path, n.line) for n in graph.nodes] == [(Phase.F, "", "g.ir:4"), (Phase.W, "mlp", "g.ir:5")]


def test_a_program_keeps_its_name() -> None:
    program = Program("given", (chain("sigmoid"),))
    assert parse_program(show_program(program), REGISTRY) == program
    assert not show_program(program.but(name="g")).startswith("name")


LINE = "def g(x: f32[4], *, w: f32[4]):\n    {}\n    return x\n"


@pytest.mark.parametrize(
    ("text", "at", "reason"),
    [
        (LINE.format("y = sigmoyd(x)"), "2:9 sigmoyd(x)", "unknown op 'sigmoyd'; did you mean 'sigmoid'"),
        (LINE.format("y = add(x, z)"), "2:16 z)", "'z' is not defined"),
        (LINE.format("y = add(x, w, w)"), "2:9 add", "takes 2 inputs but 3 were given"),
        (LINE.format("y = add(x, 3)"), "2:16 3)", "expected the name of a value"),
        (LINE.format("y = scale(x, by=w)"), "2:21 w)", "expected a literal"),
        (LINE.format("y, z = add(x, w)"), "2:5 y, z", "add has 1 results, 2 are named"),
        (LINE.format("x = add(x, w)"), "2:5 x =", "'x' is defined twice"),
        (LINE.format("y[0] = add(x, w)"), "2:5 y[0]", "expected a name"),
        (LINE.format("y = add(x, w)  # f32[5]"), "2:20 # f32[5]", "declared f32[5] but add gives f32[4]"),
        (LINE.format("y = add(x, w)  # some words"), "2:20 # some", "expected types after '#'"),
        (LINE.format("y = add(x, w)  # f33[4]"), "2:20 # f33", "unknown element type 'f33'"),
        (LINE.format("y = add(x, w)  # f32[4] @X:moe"), "2:20 # f32", "expected types and '@F:path' after '#'"),
        (LINE.format("é = add(x, z)"), "2:16 z)", "'z' is not defined"),
        (LINE.format("print(x)"), "2:5 print", "expected 'a, b = op(x, y, k=v)'"),
        (LINE.format("y = x"), "2:5 y = x", "expected 'a, b = op(x, y, k=v)'"),
        (LINE.format("y = call(x, graph='f')"), "2:9 call", "call of the unknown graph 'f'"),
        (LINE.format("return w"), "3:5 return x", "nothing may follow 'return'"),
        (LINE.format("y = add(x,, w)"), "2:15 , w", "invalid syntax"),
        ("def g(x: f32[4]):\n    y = copy(x)\n", "1:1 def g", "has no 'return'"),
        ("def g(x):\n    return x\n", "1:7 x)", "needs a type"),
        ("def g(x: f32[4] = 3):\n    return x\n", "1:1 def g", "no defaults"),
        ("def g(x: f32[4], *xs):\n    return x\n", "1:1 def g", "typed parameters only"),
        ("def g(x: f32):\n    return x\n", "1:10 f32", "expected a type such as"),
        ("def g(x: f32[B/2]):\n    return x\n", "1:10 f32[B/2]", "expected a dimension"),
        ("def g(x: f32[-1]):\n    return x\n", "1:10 f32[-1]", "the dimension -1 is negative"),
        ("def g(x: f32[4], x: f32[4]):\n    return x\n", "1:18 x: f32[4])", "'x' is defined twice"),
        ("def g(x: f32[4]):\n    return x\ndef g():\n    return\n", "3:1 def g():", "defined twice"),
        ("import os\n", "1:1 import os", "expected 'def graph(...):'"),
        ("", "1:1 ", "no graph here"),
        ("x = '\n", "1:5 '", "unterminated string"),
        ("weights = [('w', 'f32[', 'ones', 0.0, 'norm')]", "1:12 ('w'", "expected a type such as"),
        ("weights = [('w', 'f32[4]', 'ones')]", "1:12 ('w'", "expected (name, type, init, std, group)"),
        ("sequences = [('s', (), (), ())]", "1:14 ('s'", "expected (name, inputs, results, losses, gradients,"),
        ("sequences = [('s', (1,), (), (), (), [])]", "1:14 ('s'", "expected a name, got 1"),
        ("sequences = [('s', (), (), (), ('w',), [])]", "1:14 ('s'", "expected 2 names, got 'w'"),
        ("sequences = [('s', (), (), (), (), [('F', 'g')])]", "1:14 ('s'", "expected a layer"),
    ],
)  # fmt: skip
def test_wrong_text_is_refused_with_a_caret(text: str, at: str, reason: str) -> None:
    """`at` is the line and column that the message names, and what stands there."""
    with pytest.raises(IRError) as raised:
        parse_program(text, REGISTRY, "bad.ir")
    where, _, pointed = at.partition(" ")
    first, source, caret = str(raised.value).split("\n")
    assert first.startswith(f"bad.ir:{where}: ")
    assert reason in first
    assert source[caret.index("^") :].startswith(pointed)


def test_parse_graph_wants_one_graph() -> None:
    with pytest.raises(IRError, match="expected one graph, found 2"):
        parse_graph(show_program(small_program()), REGISTRY)


def test_a_null_byte_is_an_error_not_a_traceback() -> None:
    with pytest.raises(IRError, match=r"bad\.ir:1:"):
        parse_program("def g(x: f32[4]):\0", REGISTRY, "bad.ir")


# ---- the interpreter ----------------------------------------------------------------------------------------------


def test_interpreter_names_the_node_that_fails() -> None:
    b = Builder(REGISTRY, "g")
    tokens, w = b.input("tokens", Type(DType.i64, (B,))), b.weight("w", Type(DType.f32, (4, 8)))
    with b.path("embedding"):
        y = b.embedding(tokens, w, dtype="f32")
    with pytest.raises(
        IRError, match=r"g: embedding: embedding failed: index out of range.* written at .*test_ir\.py:"
    ):
        run(b.graph([y]), {"tokens": torch.tensor([7]), "w": torch.zeros(4, 8)}, REGISTRY)
