"""Where tensors lie: never two live ones in one place, no more memory than a bound says, views and writing in place."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from dsv3c import pipeline
from dsv3c.arena import ALIGNMENT, BufferPlan, GraphLayout, RankMemory, Slot, donated_inputs, graph_layout, place
from dsv3c.arena import sequence_layout as lay_out
from dsv3c.errors import InputError
from dsv3c.ir import Graph, Program
from dsv3c.ops import REGISTRY
from dsv3c.passes.plan_buffers import PlanBuffers
from dsv3c.target import Target
from dsv3c.targets import find
from dsv3c.text import parse_graph, parse_program

Wanted = list[tuple[str, int, int, int]]


def random_tensors(seed: int, count: int, longest: int = 6) -> Wanted:
    rng = random.Random(seed)
    found = []
    for i in range(count):
        start = rng.randrange(12)
        found.append((f"t{i}", rng.choice([0, 1, 255, 256, 257, 1000, 5000]), start, start + rng.randrange(longest)))
    return found


def rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def most_live(wanted: Wanted) -> int:
    """The bytes that are live at once at the worst step: no placement needs less."""
    steps = range(max((end for *_, end in wanted), default=0) + 1)
    return max((sum(rounded(size) for _, size, start, end in wanted if start <= t <= end) for t in steps), default=0)


def collide(a: Slot, b: Slot) -> bool:
    in_time = a.start <= b.end and b.start <= a.end
    return in_time and a.offset < b.offset + b.size and b.offset < a.offset + a.size


@pytest.mark.parametrize("seed", range(60))
def test_live_tensors_never_overlap(seed: int) -> None:
    wanted = random_tensors(seed, 1 + seed)
    slots, peak = place(wanted)
    assert [(s.name, s.start, s.end) for s in slots] == [(n, a, b) for n, _, a, b in wanted]
    assert all(
        s.size == rounded(size) and s.offset % ALIGNMENT == 0 for s, (_, size, _, _) in zip(slots, wanted, strict=True)
    )
    assert not [(a, b) for i, a in enumerate(slots) for b in slots[:i] if collide(a, b)]
    assert peak == max(s.offset + s.size for s in slots)
    assert most_live(wanted) <= peak <= sum(rounded(size) for _, size, _, _ in wanted)


@pytest.mark.parametrize("seed", range(30))
def test_each_tensor_lies_as_low_as_those_before_it_allow(seed: int) -> None:
    """Brute force: try every multiple of the alignment from 0 up."""
    wanted = random_tensors(seed, 14)
    slots, _ = place(wanted)
    order = sorted(range(len(wanted)), key=lambda i: (-wanted[i][1], wanted[i][2], i))
    for at, i in enumerate(order):
        s = slots[i]
        for offset in range(0, s.offset, ALIGNMENT):
            lower = Slot(s.name, offset, s.size, s.start, s.end)
            blocked = any(collide(lower, slots[j]) for j in order[:at])
            assert blocked or not s.size, f"{s} would fit at {offset}"


def test_what_is_never_live_together_shares_memory() -> None:
    assert place([("a", 512, 0, 1), ("b", 512, 2, 3), ("c", 512, 4, 4)])[1] == 512
    assert place([("a", 512, 0, 1), ("b", 512, 1, 2)])[1] == 1024, "both ends of a lifetime count"
    assert place([]) == ((), 0)


def test_a_tensor_fits_exactly_into_a_gap() -> None:
    slots, peak = place([("long", 1024, 0, 9), ("early", 768, 0, 4), ("late", 512, 5, 9), ("later", 256, 6, 9)])
    assert [s.offset for s in slots] == [0, 1024, 1024, 1536] and peak == 1792


# ---- one graph ------------------------------------------------------------------------------------------------------


def graph(text: str) -> Graph:
    return parse_graph(text, REGISTRY)


def laid(text: str, donated: frozenset[str] = frozenset(), **sizes: int) -> GraphLayout:
    return graph_layout(graph(text), REGISTRY, {"B": 64, **sizes}, donated)


def test_a_view_lives_in_its_base_and_keeps_it_alive() -> None:
    found = laid(
        "def g(x: f32[B, 8], *, w: f32[8, 8]):\n    y = linear(x, w)\n    left = slice_last(y, start=0, stop=4)\n"
        "    v = split_heads(left, heads=2)\n    z = linear(x, w)\n    s = sum_all(v)\n    t = sum_all(z)\n"
        "    return s, t\n"
    )
    assert found.roots["left"] == found.roots["v"] == "y"
    slots = {s.name: s for s in found.slots}
    assert set(slots) == {"y", "z"} and (slots["y"].start, slots["y"].end) == (0, 4)
    assert slots["y"].offset != slots["z"].offset and found.peak == 2 * 64 * 8 * 4


def test_views_of_parameters_take_no_memory() -> None:
    found = laid("def g(x: f32[B, 8]):\n    v = slice_last(x, start=0, stop=4)\n    s = sum_all(v)\n    return s\n")
    assert found.roots["v"] == "x" and found.slots == () and found.peak == 0


def test_what_is_read_for_the_last_time_is_overwritten() -> None:
    text = (
        "def g(x: f32[B, 8]):\n    a = sigmoid(x)\n    b = scale(a, by=2.0)\n    c = scale(b, by=2.0)\n"
        "    s = sum_all(c)\n    return s\n"
    )
    found = laid(text)
    assert found.roots["b"] == found.roots["c"] == "a" and found.peak == 64 * 8 * 4
    (slot,) = found.slots
    assert (slot.start, slot.end) == (0, 3)


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("a = sigmoid(x); b = scale(a, by=2.0); c = add(a, b); s = sum_all(c)", "a is read again"),
        ("a = sigmoid(x); v = slice_last(a, start=0, stop=4); b = scale(a, by=2.0); c = join_last(v, v); "
         "d = add(b, c); s = sum_all(d)", "a view of a is read again"),
        ("b = scale(x, by=2.0); s = sum_all(b)", "x is a parameter"),
        ("a = sigmoid(x); b = add(a, a); s = sum_all(b)", "a is read twice by the same node"),
        ("a = sigmoid(x); h = split_heads(a, heads=2); b = scale(h, by=2.0); s = sum_all(b)", "h is a view of a"),
    ],
)  # fmt: skip
def test_what_is_needed_later_is_not_overwritten(lines: str, why: str) -> None:
    body = "".join(f"    {line.strip()}\n" for line in lines.split(";"))
    found = laid(f"def g(x: f32[B, 8]):\n{body}    return s\n")
    assert found.roots["b"] == "b", why


def test_a_result_is_not_written_over_what_stays_inside() -> None:
    found = laid("def g(x: f32[B, 8]):\n    a = sigmoid(x)\n    b = scale(a, by=2.0)\n    return b\n")
    assert found.roots["b"] == "b" and [s.name for s in found.slots] == ["a"]


def test_only_a_donated_input_is_overwritten_by_the_result_that_continues_it() -> None:
    text = (
        "def g(cache: f32[B, C, 4], new: f32[B, S, 4], start: i32[()]):\n"
        "    cache_next = cache_write(cache, new, start)\n    return cache_next\n"
    )
    assert laid(text, C=8, S=1).roots["cache_next"] == "cache_next"
    assert laid(text, frozenset({"cache"}), C=8, S=1).roots["cache_next"] == "cache"
    read_later = text.replace("    return", "    old = sum_all(cache)\n    return old,").replace("old,", "old, ")
    assert laid(read_later, frozenset({"cache"}), C=8, S=1).roots["cache_next"] == "cache_next"


def test_an_input_is_given_to_one_result_only() -> None:
    text = "def g(x: f32[B, 8]):\n    a = scale(x, by=2.0)\n    b = scale(x, by=3.0)\n    return a, b\n"
    found = laid(text, frozenset({"x"}))
    assert sorted((found.roots["a"], found.roots["b"])) == ["a", "x"]


@pytest.mark.parametrize("seed", range(40))
def test_no_value_is_lost_before_its_last_reader(seed: int) -> None:
    """Executes symbolically: memory holds names, and whoever reads finds what was written."""
    g = random_graph(seed)
    found = graph_layout(g, REGISTRY, {"B": 16})
    slots = {s.name: s for s in found.slots}
    holds: dict[str, str] = {}
    for node in g.nodes:
        for v in node.inputs:
            assert holds.get(found.roots[v.name], v.name) in (v.name, _base(g, v.name)), f"{v} was overwritten"
        if not REGISTRY[node.op].view:
            for v in node.outputs:
                root = found.roots[v.name]
                for other in [r for r in holds if r in slots and root in slots and r != root]:
                    a, b = slots[other], slots[root]
                    if a.offset < b.offset + b.size and b.offset < a.offset + a.size:
                        holds[other] = "overwritten"
                holds[root] = v.name


def _base(g: Graph, name: str) -> str:
    while name in g.producers and REGISTRY[g.producers[name].op].view:
        name = g.producers[name].inputs[0].name
    return name


def random_graph(seed: int) -> Graph:
    rng = random.Random(seed)
    lines, values = [], ["x", "y"]
    for i in range(14):
        a, b = rng.choice(values[-4:]), rng.choice(values[-4:])
        lines.append(f"    v{i} = " + rng.choice([
            f"add({a}, {b})", f"scale({a}, by=0.5)", f"sigmoid({a})", f"linear({a}, w)", f"identity({a})",
            f"join_last({a}l{i}, {b}r{i})",
        ]))  # fmt: skip
        if "join" in lines[-1]:
            cut = f"    {a}l{i} = slice_last({a}, start=4, stop=8)\n    {b}r{i} = slice_last({b}, start=0, stop=4)\n"
            lines[-1] = cut + lines[-1]
        values.append(f"v{i}")
    text = "\n".join(lines)
    return graph(f"def g(x: f64[B, 8], y: f64[B, 8], *, w: f64[8, 8]):\n{text}\n    return v13, v9\n")


# ---- sequences ------------------------------------------------------------------------------------------------------

TWO_LAYERS = """\
name = 'p'

def block(x: f32[B, 8], *, w: f32[8, 8]):
    a = linear(x, w)
    y = sigmoid(a)
    return y

def views(x: f32[B, 8]):
    half = slice_last(x, start=0, stop=4)
    same = identity(x)
    return half, same

weights = [('w1', 'f32[8, 8]', 'normal', 0.1, 'matrix'), ('w2', 'f32[8, 8]', 'normal', 0.1, 'matrix')]
sequences = [('forward', ('x',), ('out', 'half'), (), (), [
    ('F', 'one', 'block', ('x',), ('w1',), ('h1',)),
    ('F', 'two', 'block', ('h1',), ('w2',), ('h2',)),
    ('F', 'three', 'block', ('h2',), ('w1',), ('h3',)),
    ('F', 'look', 'views', ('h3',), (), ('half', 'out')),
])]
"""


def program(text: str) -> Program:
    return parse_program(text, REGISTRY)


def test_layers_hand_over_and_share_one_workspace() -> None:
    p = program(TWO_LAYERS)
    found = lay_out(p, p.sequence("forward"), REGISTRY, {"B": 64})
    size = 64 * 8 * 4
    assert {s.name: (s.start, s.end) for s in found.slots} == {"h1": (0, 1), "h2": (1, 2), "h3": (2, 4)}
    assert found.roots["half"] == found.roots["out"] == "h3" and found.roots["x"] == "x"
    assert (found.peak, found.workspace, found.bytes) == (2 * size, size, 3 * size)


def test_values_with_storage_of_their_own_are_left_out() -> None:
    p = program(TWO_LAYERS)
    found = lay_out(p, p.sequence("forward"), REGISTRY, {"B": 64}, outside={"h2"}.__contains__)
    assert [s.name for s in found.slots] == ["h1", "h3"]


CACHE = """\
name = 'p'

def write(cache: f32[B, C, 4], new: f32[B, S, 4], start: i32[()]):
    cache_next = cache_write(cache, new, start)
    return cache_next

sequences = [('decode', ('cache.0', 'cache.1', 'new', 'start'), ('next.0', 'next.1'), (), (), [
    ('F', 'one', 'write', ('cache.0', 'new', 'start'), (), ('next.0',)),
    ('F', 'two', 'write', ('cache.1', 'new', 'start'), (), ('next.1',)),
])]
"""


def test_caches_are_written_in_place_by_every_layer_or_by_none() -> None:
    p = program(CACHE)
    assert donated_inputs(p, p.sequence("decode")) == {"write": frozenset({"cache"})}
    sizes = {"B": 2, "C": 8, "S": 1}
    found = lay_out(p, p.sequence("decode"), REGISTRY, sizes)
    assert found.slots == () and found.roots["next.1"] == "cache.1"
    shared = program(CACHE.replace("('cache.1', 'new'", "('cache.0', 'new'"))
    assert donated_inputs(shared, shared.sequence("decode")) == {"write": frozenset()}
    assert len(lay_out(shared, shared.sequence("decode"), REGISTRY, sizes).slots) == 2
    once = "    ('F', 'two', 'write', ('cache.1', 'new', 'start'), (), ('next.1',)),\n"
    again = "    ('F', 'more', 'write', ('cache.0', 'new', 'start'), (), ('next.2',)),\n"
    mixed = program(CACHE.replace(once, again + once))
    assert donated_inputs(mixed, mixed.sequence("decode")) == {"write": frozenset()}


# ---- plan_buffers ---------------------------------------------------------------------------------------------------

TRAINED = "differentiate,cut,plan_buffers"
ONE_LAYER = """\
name = 'p'

def layer(x: f32[B, 512], *, w: f32[512, 512]):
    a = linear(x, w)
    y = sigmoid(a)
    s = sum_all(y)
    return s

weights = [('w', 'f32[512, 512]', 'normal', 0.1, 'matrix'), ('kept', 'f32[512]', 'zeros', 0.0, 'state')]
sequences = [('train', ('x',), ('s',), ('s',), (), [('F', 'one', 'layer', ('x',), ('w',), ('s',))])]
"""


def planned(target: Target, batch: int, pipeline_text: str = TRAINED) -> BufferPlan:
    state = pipeline.text_state(ONE_LAYER, REGISTRY, target=target, precision="fp32", sizes={"B": batch})
    buffers = pipeline.run(state, pipeline.parse(pipeline_text)).state.buffers
    assert buffers is not None
    return buffers


def small(memory: int) -> Target:
    target = find("h800")
    return replace(target, machine=replace(target.machine, memory_bytes=memory))


def test_memory_is_added_up_by_kind() -> None:
    (rank,) = planned(replace(find("h800"), reserve=None), 64).ranks
    weight, row = 512 * 512 * 4, 64 * 512 * 4
    assert (rank.weights, rank.gradients, rank.optimizer) == (weight + 2048, weight, weight)
    assert 2 * row <= rank.activations <= 5 * row, "y is saved for B; dy and da live one after the other"
    assert rank.peak == sum((rank.weights, rank.gradients, rank.optimizer, rank.activations, rank.communication))
    assert RankMemory(0, 1, 2, 3, 4, 5).peak == 15


def test_what_does_not_fit_is_refused_with_a_table_and_what_to_do() -> None:
    need = planned(find("h800"), 64).peak.peak
    assert planned(small(need), 64).peak.peak == need
    with pytest.raises(InputError) as error:
        planned(small(need - 1), 64)
    text = str(error.value)
    for word in (
        "this job needs",
        "weights:",
        "gradients:",
        "optimizer:",
        "activations:",
        "--mesh",
        "--allow-oversize",
    ):
        assert word in text
    assert planned(small(need - 1), 64, "differentiate,cut,plan_buffers{check=false}").peak.peak == need


def test_memory_grows_with_the_batch_and_only_activations_do() -> None:
    a, b = planned(find("h800"), 64).peak, planned(find("h800"), 128).peak
    assert (a.weights, a.gradients, a.optimizer) == (b.weights, b.gradients, b.optimizer)
    assert a.activations < b.activations <= 2 * a.activations


def test_without_a_job_there_is_nothing_to_lay_out() -> None:
    outcome = pipeline.run(pipeline.text_state(TWO_LAYERS, REGISTRY), (PlanBuffers(),))
    assert outcome.state.buffers is None and "without a job" in outcome.notes[0].reason
