"""The passes eliminate, share and hoist: what they do, what they leave and say so, and that no value changes."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sequences import Tensors, draw, draw_weights, execute, gradients

from dsv3c.ir import DType, Graph, Phase, Program, Sequence, Type
from dsv3c.job import Job
from dsv3c.models.deepseek_v3 import build
from dsv3c.models.presets import DEEPSEEK_V3, DEEPSEEK_V3_TINY
from dsv3c.ops import REGISTRY
from dsv3c.pipeline import Outcome, parse, run, text_state
from dsv3c.state import State
from dsv3c.text import parse_program, show_program


def apply(text: str, pipeline: str) -> Outcome:
    return run(text_state(text, REGISTRY), parse(pipeline))


def told(outcome: Outcome, action: str) -> list[tuple[str, str]]:
    """Node and reason of the notes with this action."""
    return [(n.node, n.reason) for n in outcome.notes if n.action == action]


def ops(graph: Graph) -> list[str]:
    return [n.op for n in graph.nodes]


def graph_of(outcome: Outcome, name: str) -> Graph:
    return outcome.state.program.graph(name)


def assert_unchanged(program: Program, pipeline: str) -> None:
    state = State(program, REGISTRY)
    assert run(state, parse(pipeline)).state is state


# ---- eliminate ----------------------------------------------------------------------------------------------------


def test_eliminate_dead_identity_and_cast() -> None:
    outcome = apply("""
def g(x: f32[B, 4], unread: f32[B, 4], *, w: f32[4, 4], spare: f32[4]):
    a = identity(x)
    c = cast(a, dtype='f32')
    dead = sigmoid(c)
    deader = scale(dead, by=2.0)
    y = linear(c, w)
    z = identity(y)
    narrow = cast(z, dtype='bf16')
    return z, narrow
""", "eliminate")
    g = graph_of(outcome, "g")
    assert ops(g) == ["linear", "cast"] and [v.name for v in g.results] == ["z", "narrow"]
    assert [v.name for v in g.params] == ["x", "unread", "w", "spare"]
    assert told(outcome, "removed") == [
        ("a", "g: a is x"), ("c", "g: c is x"), ("z", "g: z is y"),
        ("dead", "g: nothing needs dead"), ("deader", "g: nothing needs deader"),
    ]  # fmt: skip
    assert_unchanged(outcome.state.program, "eliminate")


def test_eliminate_keeps_the_names_of_results() -> None:
    outcome = apply("""
def g(x: f32[B, 4], d_y: f32[B, 4]):
    y = sigmoid(x)
    other = identity(y)
    e = sigmoid_grad(d_y, y)     # f32[B, 4] @B
    d_x = identity(e)            # f32[B, 4] @B
    d_too = identity(e)          # f32[B, 4] @B
    d_w = identity(e)            # f32[B, 4] @W
    d_p = identity(d_y)          # f32[B, 4] @B
    return y, other, d_x, d_too, d_w, d_p
""", "eliminate")
    g = graph_of(outcome, "g")
    assert [v.name for v in g.results] == ["y", "other", "d_x", "d_too", "d_w", "d_p"]
    assert [n.output.name for n in g.nodes] == ["y", "other", "d_x", "d_too", "d_w", "d_p"]
    assert g.producers["d_x"].op == "sigmoid_grad"
    assert [node for node, _ in told(outcome, "kept")] == ["other", "d_too", "d_w", "d_p"]


def test_eliminate_does_not_move_a_result_to_another_phase() -> None:
    outcome = apply("""
def g(x: f32[B, 4]):
    y = sigmoid(x)
    z = scale(y, by=2.0)
    d_x = identity(y)            # f32[B, 4] @B
    return z, d_x
""", "eliminate")
    assert graph_of(outcome, "g").producers["d_x"].phase is Phase.B
    assert told(outcome, "kept") == [("d_x", "g: d_x is a result of B, and y of another phase")]


def test_eliminate_keeps_what_communicates() -> None:
    outcome = apply("""
def g(x: f32[B, 4], e: i32[B, 2], p: f32[B, 2]):
    q = scale(p, by=2.0)
    rows, chosen, weights, handle = dispatch(x, e, q)
    y = sigmoid(x)
    return y
""", "eliminate")
    assert ops(graph_of(outcome, "g")) == ["scale", "dispatch", "sigmoid"]
    reason = "g: nothing needs rows, chosen, weights, handle, but dispatch acts on others"
    assert told(outcome, "kept") == [("rows", reason)]


REACH = """
def region(x: f32[B, 4]):
    y = sigmoid(x)
    return y

def idle(x: f32[B, 4]):
    y = scale(x, by=2.0)
    return y

def layer(x: f32[B, 4]):
    y = call(x, graph='region')
    z = call(x, graph='idle')
    return y

def gone(x: f32[B, 4]):
    y = sigmoid(x)
    return y

def gone_joint(x: f32[B, 4], d_y: f32[B, 4]):
    y = sigmoid(x)
    d_x = sigmoid_grad(d_y, y)   # f32[B, 4] @B
    return y, d_x

def entry(x: f32[B, 4]):
    y = sigmoid(x)
    return y

weights = []
sequences = [('s', ('x',), ('y',), (), (), [('F', 'l', 'layer', ('x',), (), ('y',))])]
"""


def test_eliminate_unreached_graphs() -> None:
    outcome = apply(REACH, "eliminate")
    assert [g.name for g in outcome.state.program.graphs] == ["region", "layer", "entry"]
    removed = [node for node, reason in told(outcome, "removed") if reason == "no layer reaches this graph"]
    assert removed == ["idle", "gone", "gone_joint"]


def test_eliminate_keeps_every_graph_without_sequences() -> None:
    text = REACH[: REACH.index("weights =")]
    assert len(apply(text, "eliminate").state.program.graphs) == 6


# ---- share --------------------------------------------------------------------------------------------------------


def test_share_in_one_phase_and_through_chains() -> None:
    outcome = apply("""
def g(x: f32[B, 4], y: f32[B, 4]):
    a = sigmoid(x)
    b = scale(a, by=2.0)
    a2 = sigmoid(x)
    b2 = scale(a2, by=2.0)
    other = scale(a2, by=2)
    swapped = add(y, a)
    c = add(b, b2)
    d = add(c, other)
    e = add(a2, y)
    f = add(d, e)
    h = add(f, swapped)
    return h
""", "share")
    g = graph_of(outcome, "g")
    assert [n.outputs[0].name for n in g.nodes] == ["a", "b", "other", "swapped", "c", "d", "e", "f", "h"]
    assert told(outcome, "shared") == [("a2", "g: a2 repeats a"), ("b2", "g: b2 repeats b")]
    assert_unchanged(outcome.state.program, "share")


JOINT = """
def g(x: f32[B, 4], d_y: f32[B, 4]):
    s = sigmoid(x)                       # f32[B, 4] @F
    t = scale(x, by=3.0)                 # f32[B, 4] @F
    h = split_heads(x, heads=2)          # f32[B, 2, 2] @F
    y = add(s, t)                        # f32[B, 4] @F
    z = merge_heads(h)                   # f32[B, 4] @F
    s2 = sigmoid(x)                      # f32[B, 4] @B
    t2 = scale(x, by=3.0)                # f32[B, 4] @B
    t3 = scale(x, by=3.0)                # f32[B, 4] @W
    h2 = split_heads(x, heads=2)         # f32[B, 2, 2] @B
    m = merge_heads(h2)                  # f32[B, 4] @B
    g1 = sigmoid_grad(d_y, s)            # f32[B, 4] @B
    g2 = multiply(g1, s2)                # f32[B, 4] @B
    g3 = multiply(g2, t2)                # f32[B, 4] @B
    d_x = multiply(g3, m)                # f32[B, 4] @B
    d_w = multiply(d_y, t3)              # f32[B, 4] @W
    return y, z, d_x, d_w
"""


def test_share_across_phases_saves_nothing_more() -> None:
    outcome = apply(JOINT, "share")
    g = graph_of(outcome, "g")
    assert [v.name for v in g.producers["g2"].inputs] == ["g1", "s"]
    assert [v.name for v in g.producers["g3"].inputs] == ["g2", "t2"]
    assert [v.name for v in g.producers["d_w"].inputs] == ["d_y", "t2"]
    assert "h2" not in g.producers and "m" not in g.producers
    assert told(outcome, "kept") == [
        ("t2", "g: t2 repeats t, which F would have to save for it"),
        ("t3", "g: t3 repeats t, which F would have to save for it"),
    ]


def test_share_takes_the_earlier_phase() -> None:
    outcome = apply("""
def g(x: f32[B, 4], d_y: f32[B, 4]):
    y = sigmoid(x)                       # f32[B, 4] @F
    u = multiply(d_y, x)                 # f32[B, 4] @W
    v = multiply(d_y, x)                 # f32[B, 4] @B
    d_w = scale(u, by=2.0)               # f32[B, 4] @W
    d_x = scale(v, by=3.0)               # f32[B, 4] @B
    return y, d_x, d_w
""", "share")
    g = graph_of(outcome, "g")
    assert "v" not in g.producers and g.producers["u"].phase is Phase.B


def test_share_keeps_the_names_of_results() -> None:
    outcome = apply("""
def g(x: f32[B, 4]):
    y = sigmoid(x)
    z = sigmoid(x)
    h = split_heads(x, heads=2)
    k = split_heads(x, heads=2)
    t = add(z, y)
    return y, z, h, k, t
""", "share")
    g = graph_of(outcome, "g")
    assert [v.name for v in g.results] == ["y", "z", "h", "k", "t"]
    assert ops(g) == ["sigmoid", "identity", "split_heads", "split_heads", "add"]
    assert_unchanged(outcome.state.program, "share")


def test_share_leaves_what_communicates() -> None:
    outcome = apply("""
def g(y: f32[B*S, 4], handle: i32[B, S]):
    a = combine(y, handle)
    b = combine(y, handle)
    c = add(a, b)
    return c
""", "share")
    assert ops(graph_of(outcome, "g")) == ["combine", "combine", "add"]
    assert told(outcome, "kept") == [("b", "g: b repeats a, but combine acts on others")]


# ---- hoist --------------------------------------------------------------------------------------------------------

TRAIN = """
    n = rms_norm(x, v, eps=1e-06)        # bf16[B, 4] @F:norm
    c = cast(w, dtype='bf16')            # bf16[4, 4] @F:projection
    y = linear(n, c)                     # bf16[B, 4] @F:projection
"""
SERVE = """
    k = cast(w, dtype='bf16')
    y = linear(x, k)
"""


def two_uses(train: str = TRAIN, results: str = "y", serve: str = SERVE, losses: str = "", first: str = "a") -> str:
    """A program of two sequences that round the same weight; `results` of the first, `first` weight of the second."""
    returned = "".join(f"{name!r}, " for name in results.split(", "))
    return f"""
def train(x: bf16[B, 4], *, w: f32[4, 4], v: f32[4]):{train}    return {results}

def serve(x: bf16[B, 4], *, w: f32[4, 4]):{serve}    return y

name = 'two'
weights = [
    ('a', 'f32[4, 4]', 'normal', 0.02, 'matrix'),
    ('b', 'f32[4, 4]', 'normal', 0.02, 'matrix'),
    ('n', 'f32[4]', 'ones', 0.0, 'norm'),
]
sequences = [
    ('one', ('x',), ({returned}), ({losses}), (), [('F', 'l', 'train', ('x',), ('a', 'n'), ({returned}))]),
    ('two', ('x',), ('z',), (), (), [
        ('F', 'l', 'serve', ('x',), ('{first}',), ('y',)),
        ('F', 'm', 'serve', ('y',), ('b',), ('z',)),
    ]),
]
"""


def prologue_of(outcome: Outcome) -> Sequence:
    return outcome.state.program.sequence("prologue")


def test_hoist_does_equal_work_once() -> None:
    outcome = apply(two_uses(), "hoist")
    program, prologue = outcome.state.program, prologue_of(outcome)
    assert program.sequences[0] is prologue and prologue.inputs == ()
    assert [(y.name, y.inputs, y.weights, y.outputs) for y in prologue.layers] == [
        ("a", (), ("a",), ("cast(a)",)), ("b", (), ("b",), ("cast(b)",)),
    ]  # fmt: skip
    assert len({y.graph for y in prologue.layers}) == 1 and prologue.results == ("cast(a)", "cast(b)")
    two = program.sequence("two")
    assert two.inputs == ("x", "cast(a)", "cast(b)")
    assert [(y.inputs, y.weights) for y in two.layers] == [(("x", "cast(a)"), ()), (("y", "cast(b)"), ())]
    assert ops(program.graph("serve")) == ["linear"] and program.graph("serve").weights == ()
    assert [v.name for v in program.graph("train").weights] == ["v"]
    assert_unchanged(program, "hoist")
    assert parse_program(show_program(program), REGISTRY) == program


def test_hoist_joins_what_shares_a_weight() -> None:
    more = "    m = merge_heads(c)\n    q = scale(m, by=2.0)\n    z = add(q, q)\n    r = rms_norm(x, v, eps=1e-06)\n"
    outcome = apply(two_uses(TRAIN + more, "y, z, r"), "hoist")
    graph = graph_of(outcome, "train")
    assert ops(graph) == ["rms_norm", "linear", "add", "rms_norm"]
    assert [v.name for v in graph.inputs] == ["x", "c", "q"]
    first = prologue_of(outcome).layers[0]
    assert first.weights == ("a",) and first.outputs == ("cast(a)", "scale(merge_heads(cast(a)))")
    assert ops(graph_of(outcome, first.graph)) == ["cast", "merge_heads", "scale"]
    assert ("z", "train: z is a result of the layer") in told(outcome, "kept")


def test_hoist_leaves_views() -> None:
    more = "    t = merge_heads(w)                   # f32[16] @F:other\n    z = sigmoid(x)\n    s = row_dot(t, t)\n"
    outcome = apply(two_uses(TRAIN + more, "y, s"), "hoist")
    assert ops(graph_of(outcome, "train")) == ["rms_norm", "linear", "merge_heads", "sigmoid", "row_dot"]
    assert [v.name for v in graph_of(outcome, "train").weights] == ["w", "v"]
    assert ("other", "train: t is a view, which costs nothing") in told(outcome, "kept")
    assert ("s", "train: s is a result of the layer") in told(outcome, "kept")


def test_hoist_tells_different_work_apart() -> None:
    def scaled(text: str, name: str, by: float) -> str:
        rounded = f"{name} = cast(w, dtype='bf16')"
        return text.replace(rounded, f"g = cast(w, dtype='bf16')\n    {name} = scale(g, by={by})")

    prologue = prologue_of(apply(two_uses(scaled(TRAIN, "c", 2.0), serve=scaled(SERVE, "k", 1.0)), "hoist"))
    full = "scale(cast(a: f32[4, 4], dtype='bf16')[0], by=1.0)[0]"
    assert prologue.results == ("scale(cast(a))", full, "scale(cast(b))")
    first = prologue.layers[0]
    assert len(first.outputs) == 2 and first.weights == ("a",)


def test_hoist_waits_for_differentiation() -> None:
    more = TRAIN + "    s = sum_all(x)\n"
    outcome = apply(two_uses(more, "y, s", losses="'s',"), "hoist")
    assert "cast" in ops(graph_of(outcome, "train"))
    assert told(outcome, "kept") == [("train", "not differentiated yet, and its gradients must reach the weights")]


def test_hoist_leaves_graphs_that_others_call() -> None:
    calling = "    k = call(x, w, graph='serve')\n    y = sigmoid(k)\n"
    text = two_uses(first="b").replace("def train", "def unused") + ""
    start, end = text.index("def unused"), text.index("def serve")
    head, tail = text[start:end], text[end:]
    text = tail.replace("name = 'two'", head.replace("unused", "train").replace(TRAIN[1:], calling) + "\nname = 'two'")
    outcome = apply(text, "hoist")
    assert not outcome.state.program.has_sequence("prologue")
    assert told(outcome, "kept") == [("serve", "other graphs call it, so its parameters stay")]


def test_hoist_again_after_new_work() -> None:
    program = apply(two_uses(), "hoist").state.program
    late = parse_program(two_uses(), REGISTRY).graph("serve").but(name="late")
    two = program.sequence("two")
    layer = dataclasses.replace(two.layers[1], name="n", graph="late", inputs=("z",), weights=("a",), outputs=("end",))
    longer = dataclasses.replace(two, layers=(*two.layers, layer))
    program = program.but(graphs=(*program.graphs, late), sequences=(*program.sequences[:2], longer))
    again = run(State(program, REGISTRY), parse("hoist")).state.program
    assert again.sequence("prologue") == program.sequence("prologue")
    assert again.sequence("two").layers[-1].inputs == ("z", "cast(a)") and again.sequence("two").inputs == two.inputs


# ---- the model ----------------------------------------------------------------------------------------------------

SMALL = dataclasses.replace(
    DEEPSEEK_V3_TINY, vocab_size=32, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
    num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
    n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
)  # fmt: skip


@functools.cache
def small() -> tuple[Program, Tensors]:
    program = build(SMALL, Job("train", "cpu", "bf16", 6, 2, 2), 1)
    generator = torch.Generator().manual_seed(1)
    given = draw_weights(program, generator)
    given["tokens"] = draw(Type(DType.i64, (2, 6)), {}, generator, SMALL.vocab_size)
    given["start"] = torch.tensor(0, dtype=torch.int32)
    for index in range(SMALL.num_hidden_layers):
        given[f"cache.{index}"] = torch.zeros(2, 8, SMALL.kv_lora_rank + SMALL.qk_rope_head_dim, dtype=torch.bfloat16)
    return program, given


@pytest.mark.parametrize("pipeline", ["share,eliminate", "hoist", "share,hoist,eliminate"])
@pytest.mark.parametrize("name", ["forward", "prefill", "decode"])
def test_model_serves_the_same_numbers(name: str, pipeline: str) -> None:
    program, given = small()
    after = run(State(program, REGISTRY), parse(pipeline)).state.program
    assert after is not program or "hoist" not in pipeline
    actual, expected = execute(after, name, given), execute(program, name, given)
    for result in program.sequence(name).results:
        assert torch.equal(actual[result], expected[result]), result


def trained(pipeline: str) -> tuple[Program, Tensors]:
    program, given = small()
    after = run(State(program, REGISTRY), parse(pipeline)).state.program
    return after, gradients(after, "train", given, dict.fromkeys(program.sequence("train").losses, 0.5))


def test_model_trains_on_the_same_numbers() -> None:
    _, expected = trained("differentiate,cut")
    for pipeline in ("differentiate,eliminate,share,hoist,eliminate,cut", "differentiate,cut,hoist,share,eliminate"):
        after, actual = trained(pipeline)
        assert sorted(actual) == sorted(expected)
        assert all(torch.equal(actual[n], e) for n, e in expected.items())
        train = after.sequence("train")
        weights = {w.name for w in after.weights}
        for y in train.layers:
            producers = after.graph(y.graph).producers
            casts = [n for n in producers.values() if n.op == "cast"]
            assert not any(v in after.graph(y.graph).weights for n in casts for v in n.inputs), y.graph
        assert {n for y in after.sequence("prologue").layers for n in y.weights} <= weights


def test_forward_and_joint_take_the_same_inputs() -> None:
    program, _ = small()
    after = run(State(program, REGISTRY), parse("differentiate,eliminate,share,hoist")).state.program
    for graph in after.graphs:
        if after.has_graph(f"{graph.name}_joint"):
            joint = after.graph(f"{graph.name}_joint")
            head = len(graph.inputs)
            assert joint.inputs[:head] == graph.inputs and joint.weights == graph.weights
            assert all(v.name.startswith("d_") for v in joint.inputs[head:])
            assert {v.name[2:] for v in joint.results if v.name.startswith("d_")} <= {v.name for v in graph.params}


def test_what_is_hoisted_is_not_saved() -> None:
    program, _ = small()
    joint = run(State(program, REGISTRY), parse("differentiate")).state.program.graph("moe_block_joint")
    rounded = {n.output.name for n in joint.nodes if n.op == "cast" and n.inputs[0] in joint.weights}
    saved: dict[str, tuple[str, ...]] = {}
    for pipeline in ("differentiate,cut", "differentiate,hoist,cut", "differentiate,cut,hoist"):
        after = run(State(program, REGISTRY), parse(pipeline)).state
        (moe,) = [c for c in after.cut or () if c.graph == "moe_block"]
        saved[pipeline] = moe.f_to_b
        handed = {v.name for v in after.program.graph("moe_block_F").results}
        assert (pipeline == "differentiate,cut") == bool(rounded & handed) == bool(rounded & {*moe.f_to_b})
    plain, *others = ([v for v in names if v not in rounded] for names in saved.values())
    assert others == [plain, plain] and "q" in plain


def test_prologue_of_the_whole_model_is_small() -> None:
    """671B: each weight once, one graph per shape."""
    program = build(DEEPSEEK_V3, Job("train", "h800", "bf16", 4096, 1, 1), 128)
    after = run(State(program, REGISTRY), parse("differentiate,eliminate,share,hoist")).state.program
    prologue = after.sequence("prologue")
    weights = [n for y in prologue.layers for n in y.weights]
    assert len(weights) == len(set(weights)) == len(prologue.results)
    shapes = {after.weight(n).type.shape for n in weights}
    assert len({y.graph for y in prologue.layers}) == len(shapes)


def test_same_text_whatever_the_hash_seed(tmp_path: Path) -> None:
    (tmp_path / "in.ir").write_text(show_program(small()[0]))
    code = (
        "import sys; from dsv3c.ops import REGISTRY; from dsv3c.pipeline import parse, run, text_state;"
        "from dsv3c.text import show_program;"
        "outcome = run(text_state(open(sys.argv[1]).read(), REGISTRY), parse(sys.argv[2]));"
        "print(show_program(outcome.state.program), *outcome.notes, sep='\\n')"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "in.ir"), "differentiate,eliminate,share,hoist,eliminate,cut"]
    texts = []
    for seed in "12":
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
        texts.append(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)
    assert texts[0] == texts[1] and "def prologue_cast" in texts[0]
