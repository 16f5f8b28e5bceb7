"""recompute: the cheapest of all choices by brute force, the same gradients, the report's choice for DeepSeek-V3."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Collection

import pytest
import torch
from published import RUN, report_plan
from sequences import draw

from dsv3c import driver, interp, pipeline
from dsv3c.arena import graph_layout
from dsv3c.build import Builder
from dsv3c.dims import bind, symbol
from dsv3c.errors import InputError
from dsv3c.ir import DType, Graph, Node, Phase, Program, Type, Value
from dsv3c.models.presets import PRESETS
from dsv3c.ops import REGISTRY
from dsv3c.passes.cut import Cut
from dsv3c.passes.differentiate import joint_graph
from dsv3c.passes.recompute import Recompute
from dsv3c.pipeline import Outcome
from dsv3c.plan import Plan
from dsv3c.state import State
from dsv3c.target import Machine, Target
from dsv3c.targets import TARGETS

SIZES = {"B": 40}
SEEDS = range(12)
GIB = 2**30


def machine(seed: int) -> Machine:
    """A device whose arithmetic, memory and start-up are in any proportion."""
    rng = random.Random(seed)
    matrix, vector, memory = (10.0 ** rng.uniform(7, 11) for _ in range(3))
    return Machine("some", 1, ((DType.f32, matrix),), vector, memory, 1 << 30, 10.0 ** rng.uniform(-8, -5))


def state_of(graph: Graph, device: Machine | None) -> State:
    target = None
    if device is not None:
        target = Target("some", "", device, "fp32", None, lambda d: 1, lambda *a: None, {}, None)
    return State(Program(graph.name, (graph,)), REGISTRY, None, target, tuple(SIZES.items()))


def random_forward(seed: int) -> Graph:
    """A few differentiable ops, with views, two results of one node, and communication."""
    rng = random.Random(seed)
    b = Builder(REGISTRY, "g")
    row = Type(DType.f64, (symbol("B"), 8))
    rows = [b.input("x", row), b.input("z", row)]
    experts = b.input("e", Type(DType.i32, (symbol("B"), 1)))
    share = b.input("p", Type(DType.f64, (symbol("B"), 1)))
    norm, matrix = b.weight("norm", Type(DType.f64, (8,))), b.weight("m", Type(DType.f64, (16, 8)))

    def slices(x: Value, y: Value) -> Value:
        joined: Value = b.join_last(b.slice_last(x, start=4, stop=8), b.slice_last(y, start=0, stop=4))
        return joined

    def dispatch(x: Value, y: Value) -> Value:
        sent, _, _, handle = b.dispatch(x, experts, share)
        back: Value = b.combine(b.sigmoid(sent), handle)
        return back

    kinds: list[Callable[[Value, Value], Value]] = [
        lambda x, y: b.rms_norm(x, norm, eps=1e-6),
        lambda x, y: b.swiglu(b.linear(x, matrix)),
        lambda x, y: b.sigmoid(x),
        lambda x, y: b.multiply(x, y),
        lambda x, y: b.merge_heads(b.sigmoid(b.split_heads(x, heads=2))),
        slices,
        dispatch,
    ]
    for _ in range(rng.randint(3, 6)):
        rows.append(rng.choice(kinds)(rng.choice(rows[-3:]), rng.choice(rows[-3:])))
    return b.graph([b.sigmoid(rows[-1], out="out")])


def recompute(joint: Graph, device: Machine | None, price: float | None) -> tuple[Graph, Outcome]:
    outcome = pipeline.run(state_of(joint, device), (Recompute(price),))
    return outcome.state.program.graph(joint.name), outcome


def seconds(node: Node, graph: Graph, again: Collection[str], device: Machine) -> float:
    """The cost model, written down a second time: rows that a node run again hands over need no memory, and what
    follows the first of them needs no kernel of its own."""
    op = REGISTRY[node.op]
    if op.view:
        return 0.0
    inputs, outputs = (tuple(Type(v.type.dtype, v.type.bound(SIZES)) for v in vs) for vs in (node.inputs, node.outputs))
    cost = op.cost(inputs, outputs, **dict(node.attrs))
    handed: list[tuple[bool, int]] = []
    for v in dict.fromkeys(node.inputs):
        maker = graph.producers.get(v.name)
        if maker and maker.op in ROW_WISE and node.op in ROW_WISE and _same_rows(maker, node):
            handed.append((maker.outputs[0].name in again, v.type.bytes(SIZES)))
    arithmetic = bind(cost.flops, {}) / device.matrix_flops[0][1], bind(cost.vector_flops, {}) / device.vector_flops
    own = (bind(cost.bytes, {}) - sum(size for _, size in handed)) / device.memory_bandwidth
    alone = sum(size for fused, size in handed if not fused) / device.memory_bandwidth
    return max(own, *arithmetic) + alone + (0.0 if handed and handed[0][0] else device.latency)


ROW_WISE = ("rms_norm", "swiglu", "sigmoid", "multiply", "join_last")


def _same_rows(maker: Node, node: Node) -> bool:
    return maker.inputs[0].type.shape[:-1] == node.inputs[0].type.shape[:-1]


def measured(joint: Graph, before: Graph, device: Machine, price: float) -> float:
    """What a joint graph costs in seconds beyond `before`: nodes that it has more, and what `cut` saves from F."""
    (record,) = Cut().run(state_of(joint, device), lambda *a: None).cut or ()
    saved = dict.fromkeys((*record.f_to_b, *record.f_to_w))
    old = {n.outputs[0].name for n in before.nodes}
    added = {n.outputs[0].name for n in joint.nodes} - old
    again = sum(seconds(n, joint, added, device) for n in joint.nodes if n.outputs[0].name in added)
    return again + price * sum(joint.value(name).type.bytes(SIZES) for name in saved)


def imagined(joint: Graph, repeat: Collection[str], device: Machine, price: float) -> float:
    """What it would cost to run again those of the nodes in `repeat` that backward needs, and to keep all else."""

    def base(v: Value) -> Value:
        node = joint.producers.get(v.name)
        looks = node is not None and REGISTRY[node.op].view and node.op != "combine"
        return base(node.inputs[0]) if node is not None and looks else v

    later = {v.name for n in joint.nodes if n.phase is not Phase.F for v in n.outputs} | {"d_out"}
    todo = [base(v) for n in joint.nodes if n.phase is not Phase.F for v in n.inputs if v.name not in later]
    kept: dict[str, int] = {}
    ran: dict[str, Node] = {}
    while todo:
        v = todo.pop()
        node = joint.producers.get(v.name)
        if node is None or node.outputs[0].name not in repeat:
            kept[v.name] = 0 if v in joint.weights else v.type.bytes(SIZES)
        elif node.outputs[0].name not in ran:
            ran[node.outputs[0].name] = node
            todo += [base(w) for w in node.inputs]
    return sum(seconds(n, joint, ran, device) for n in ran.values()) + price * sum(kept.values())


def choices(joint: Graph) -> list[tuple[str, ...]]:
    """Every set of nodes that could run again, by their first results."""
    free = [n.outputs[0].name for n in joint.nodes
            if n.phase is Phase.F and not REGISTRY[n.op].view and n.op != "dispatch"]  # fmt: skip
    return [c for size in range(len(free) + 1) for c in itertools.combinations(free, size)]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_choice_is_cheaper(seed: int) -> None:
    joint = joint_graph(random_forward(seed), REGISTRY)
    device, rng = machine(seed), random.Random(seed)
    for _ in range(3):
        price = 10.0 ** rng.uniform(-11, -5)
        best = min(imagined(joint, set(c), device, price) for c in choices(joint))
        found, _ = recompute(joint, device, price * GIB * 1e3)
        assert measured(found, joint, device, price) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("price", [0.3, 30.0, 1e6])
def test_results_and_gradients_keep_their_bits(seed: int, price: float) -> None:
    joint = joint_graph(random_forward(seed), REGISTRY)
    after, _ = recompute(joint, machine(seed), price)
    generator = torch.Generator().manual_seed(seed)
    given = {v.name: draw(v.type, SIZES, generator) for v in joint.params}
    a, b = (interp.run(g, given, REGISTRY) for g in (joint, after))
    assert [v.name for v in after.results] == [v.name for v in joint.results]
    assert all(torch.equal(a[v.name], b[v.name]) for v in joint.results)


@pytest.mark.parametrize("seed", SEEDS)
def test_at_price_zero_or_none_everything_is_kept(seed: int) -> None:
    joint = joint_graph(random_forward(seed), REGISTRY)
    for price in (0.0, None):
        after, outcome = recompute(joint, machine(seed), price)
        assert after is joint
        assert [n.action for n in outcome.notes] == ["saved"]
    tiny, _ = recompute(joint, machine(seed), 1e-9)
    assert tiny is joint


@pytest.mark.parametrize("seed", SEEDS)
def test_at_a_high_price_the_fewest_bytes_are_kept_and_nothing_is_sent_twice(seed: int) -> None:
    joint = joint_graph(random_forward(seed), REGISTRY)
    after, _ = recompute(joint, machine(seed), 1e12)
    (record,) = Cut().run(state_of(after, None), lambda *a: None).cut or ()
    kept = sum(joint.value(name).type.bytes(SIZES) for name in dict.fromkeys((*record.f_to_b, *record.f_to_w)))
    fewest = min(imagined(joint, set(c), machine(seed), 1e6) for c in choices(joint))
    assert kept == int(fewest / 1e6)
    sending = ("dispatch", "dispatch_again", "combine")
    assert [n.op for n in after.nodes if n.op in sending] == [n.op for n in joint.nodes if n.op in sending]


@pytest.mark.parametrize("seed", SEEDS)
def test_notes_name_what_is_done_again_and_what_is_kept(seed: int) -> None:
    joint = joint_graph(random_forward(seed), REGISTRY)
    after, outcome = recompute(joint, machine(seed), 10.0)
    (record,) = Cut().run(state_of(after, None), lambda *a: None).cut or ()
    saved = {name for name in (*record.f_to_b, *record.f_to_w) if name in joint.producers}
    assert {n.reason.split(",")[0] for n in outcome.notes if n.action == "saved"} == saved
    old = {v.name for n in joint.nodes for v in n.outputs}
    again = sum(n.outputs[0].name not in old and not REGISTRY[n.op].view for n in after.nodes)
    assert sum(n.action == "recomputed" for n in outcome.notes) == again


def test_a_copy_stands_where_it_is_needed_so_that_memory_is_short_lived() -> None:
    b = Builder(REGISTRY, "g")
    x = b.input("x", Type(DType.f64, (symbol("B"), 8)))
    w = b.weight("w", Type(DType.f64, (16, 8)))
    for _ in range(6):
        x = b.swiglu(b.linear(b.sigmoid(x), w))
    joint = joint_graph(b.graph([x]), REGISTRY)
    after, _ = recompute(joint, machine(0), 1e12)
    copies = [n for n in after.nodes if n.outputs[0].name.endswith("_again")]
    first = next(i for i, n in enumerate(after.nodes) if n.phase is Phase.B)
    early = after.but(nodes=(*after.nodes[:first], *sorted(copies, key=joint_order(joint)),
                             *(n for n in after.nodes[first:] if n not in copies)))  # fmt: skip
    assert graph_layout(after, REGISTRY, SIZES).peak <= graph_layout(early, REGISTRY, SIZES).peak


def joint_order(joint: Graph) -> Callable[[Node], int]:
    places = {n.outputs[0].name: i for i, n in enumerate(joint.nodes)}
    return lambda node: places[node.outputs[0].name.removesuffix("_again")]


def test_a_hoisted_weight_is_there_anyway() -> None:
    """The rounding of a weight that the prologue makes costs no memory in backward, whoever reads it."""
    model = PRESETS["deepseek-v3-tiny"].override("num_hidden_layers=2,num_nextn_predict_layers=0")
    plan = driver.compile(model, target="h800", precision="bf16", seq=128, passes=_until_recompute(1e9), kernels="none")
    saved = [n.reason for n in plan.notes if n.pass_name == "recompute" and n.action == "saved"]
    assert saved and not [reason for reason in saved if reason.startswith("cast")]


@pytest.mark.parametrize("price", ["-1", "inf", "nan"])
def test_a_price_is_a_number_from_zero_up(price: str) -> None:
    with pytest.raises(InputError, match="the price of memory is"):
        pipeline.parse(f"recompute{{price={price}}}")


def test_without_a_machine_nothing_is_computed_again() -> None:
    joint = joint_graph(random_forward(0), REGISTRY)
    after, outcome = recompute(joint, None, 5.0)
    assert after is joint and "no machine is given" in outcome.notes[0].reason


# ---- DeepSeek-V3 on H800 --------------------------------------------------------------------------------------------


def _until_recompute(price: float, quantize: str = "") -> str:
    return f"differentiate,{quantize}eliminate,share,hoist,recompute{{price={price}}}"


@functools.cache
def planned(price: float, precision: str = "bf16") -> Plan:
    passes = _until_recompute(price, "quantize," if precision == "fp8" else "")
    return driver.compile("deepseek-v3", target="h800", precision=precision, seq=4096, passes=passes, kernels="none")


def again_in(plan: Plan, kind: str) -> set[tuple[str, str]]:
    """(path, op) of what is computed again in one kind of layer."""
    return {
        (n.node.removeprefix(f"{kind}."), n.reason.split()[0].removesuffix("_fp8"))
        for n in plan.notes
        if n.pass_name == "recompute" and n.action == "recomputed" and n.node.startswith(f"{kind}.")
    }


PUBLISHED = {
    ("attention.norm", "rms_norm"), ("attention.q_norm", "rms_norm"), ("attention.kv_norm", "rms_norm"),
    ("mlp.norm", "rms_norm"), ("attention.kv_up", "linear"), ("attention.q_up", "linear"),
}  # fmt: skip
"""Section 3.2.3 of the report: all RMSNorms and the up-projections of MLA."""
MOVES = ("join_last", "rotary", "cast", "permute", "scale_rows", "quantize_tile")
"""What follows from it and moves numbers only: queries and keys put together, rows sorted and quantized once more."""


def essence(choice: set[tuple[str, str]]) -> set[tuple[str, str]]:
    return {(path, op) for path, op in choice if op not in MOVES}


@pytest.mark.parametrize("price", [3.2, 3.6, 9.0])
def test_the_published_choice_comes_out(price: float) -> None:
    plan = planned(price)
    moe = PUBLISHED | {("mlp.swiglu", "swiglu"), ("mlp.shared.swiglu", "swiglu")}
    assert essence(again_in(plan, "moe_block")) == moe
    assert essence(again_in(plan, "dense_block")) == PUBLISHED | {("mlp.swiglu", "swiglu")}


@pytest.mark.parametrize("price", [3.4, 3.6, 6.5])
def test_the_published_choice_comes_out_in_fp8(price: float) -> None:
    """There `quantize` already has backward compute SwiGLU's output from its FP8 input (section 3.3.3)."""
    plan = planned(price, "fp8")
    assert essence(again_in(plan, "moe_block")) == essence(again_in(plan, "dense_block")) == PUBLISHED


def test_what_more_memory_and_what_less_memory_would_change() -> None:
    for precision in ("bf16", "fp8"):
        assert again_in(planned(1e-4, precision), "moe_block") == set()
    below, above = (essence(again_in(planned(p), "moe_block")) for p in (3.0, 10.0))
    published = essence(again_in(planned(3.6), "moe_block"))
    assert published - below == {("attention.q_up", "linear")}
    assert above - published == {("attention.core", "attention")}


def test_prices_only_ever_add() -> None:
    """A dearer byte never makes the pass keep what it computed again before."""
    found = [again_in(planned(p), "moe_block") for p in (1e-4, 3.0, 3.6, 10.0)]
    assert all(a < b for a, b in itertools.pairwise(found))


# ---- on the mesh of the report --------------------------------------------------------------------------------------


H800_MACHINE = TARGETS["h800"].machine


def settled(plan: Plan) -> float:
    """The price at which a plan was made."""
    (one,) = (p for p in pipeline.parse(plan.pipeline) if isinstance(p, Recompute))
    assert one.price is not None
    return one.price


def test_the_published_choice_is_what_makes_the_published_run_fit() -> None:
    plan = report_plan()
    assert essence(again_in(plan, "moe_block")) == essence(again_in(plan, "dense_block")) == PUBLISHED
    assert settled(plan) > 1.0 and plan.memory.fits
    assert any(n.action == "priced" and "the lowest price at which the plan fits the 77.0 GiB" in n.reason
               for n in plan.notes)  # fmt: skip


def on_another(monkeypatch: pytest.MonkeyPatch, device: Machine, passes: str | None = None) -> Plan:
    """The published run on a machine that differs, as far as the choice."""
    with monkeypatch.context() as patch:
        patch.setattr(driver, "find", lambda name: dataclasses.replace(TARGETS[name], machine=device))
        stop = "recompute"
        return driver.compile("deepseek-v3", **RUN, passes=passes, stop_after=stop)


def test_with_plenty_of_memory_nothing_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = on_another(monkeypatch, dataclasses.replace(H800_MACHINE, memory_bytes=250 * GIB))
    assert settled(plan) == 0.0 and again_in(plan, "moe_block") == set()


@pytest.mark.parametrize(
    ("rate", "bandwidth", "less", "more"),
    [
        (0.2, 1.0, {("attention.q_up", "linear")}, set()),
        (4.0, 1.0, set(), {("attention.q_down", "linear"), ("attention.kv_down", "linear"),
                           ("mlp.gate_up", "grouped_linear"), ("mlp.shared.gate_up", "linear")}),
        (1.0, 0.25, {(f"attention.{n}norm", "rms_norm") for n in ("", "q_", "kv_")}, set()),
    ],
    ids=["slower FP8", "faster FP8", "slower memory"],
)  # fmt: skip
def test_another_machine_makes_another_choice(rate: float, bandwidth: float, less: set[tuple[str, str]],
                                              more: set[tuple[str, str]],
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """At the same price of memory: what is slow there is kept, what is fast is done again."""
    flops = tuple((d, f * rate if d is DType.e4m3 else f) for d, f in H800_MACHINE.matrix_flops)
    device = dataclasses.replace(
        H800_MACHINE, matrix_flops=flops, memory_bandwidth=H800_MACHINE.memory_bandwidth * bandwidth
    )
    plan = on_another(monkeypatch, device, report_plan().pipeline)
    assert essence(again_in(plan, "moe_block")) == PUBLISHED - less | more
