"""The executor against the interpreter: on poisoned memory, twice, with gradients written in place or added up."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest
import torch
from sequences import Tensors, draw, execute, gradients

from dsv3c import arena, pipeline
from dsv3c.arena import Slot
from dsv3c.ir import Program
from dsv3c.ops import REGISTRY
from dsv3c.runtime.executor import Engine, prepare_graph, prepare_sequence
from dsv3c.runtime.runner import Memory, Prepare, Runner
from dsv3c.state import State
from dsv3c.target import Implementation, Target
from dsv3c.targets import find
from dsv3c.text import parse_program

PLAIN = Target("plain", "", find("cpu").machine, "fp64", "cpu", lambda d: 1, lambda *a: None, {}, None)
"""A processor that runs every op by its reference."""


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Every block of memory that is handed out, filled with ones: NaN as a float, -1 as an integer."""
    found: list[torch.Tensor] = []

    def allocate(cls: type[Memory], size: int, device: str) -> Memory:
        found.append(torch.full((max(size, 1),), 255, dtype=torch.uint8, device=device))
        return Memory(found[-1])

    monkeypatch.setattr(Memory, "allocate", classmethod(allocate))
    return found


def engine(program: Program, target: Target = PLAIN,
           kernels: Mapping[str, Prepare] | None = None) -> Engine:  # fmt: skip
    return Engine(program, REGISTRY, target, kernels or {})


def drawn(program: Program, name: str, sizes: Mapping[str, int], seed: int = 0) -> Tensors:
    """The inputs of a sequence and all weights."""
    generator = torch.Generator().manual_seed(seed)
    given = {w.name: draw(w.type, sizes, generator) for w in program.weights}
    for layer in program.sequence(name).layers:
        for v, value in zip(program.graph(layer.graph).inputs, layer.inputs, strict=True):
            if value in program.sequence(name).inputs and value not in given:
                given[value] = draw(v.type, sizes, generator)
    return given


def optimized(text: str, passes: str) -> Program:
    return pipeline.run(pipeline.text_state(text, REGISTRY), pipeline.parse(passes)).state.program


# ---- any program ----------------------------------------------------------------------------------------------------


def random_program(seed: int) -> Program:
    """Layers of three random graphs with views, several results, and values that live for many layers."""
    rng = random.Random(seed)
    graphs = []
    for kind in range(3):
        lines, values = [], ["x", "y"]
        for i in range(rng.randint(3, 9)):
            a, b = rng.choice(values[-4:]), rng.choice(values[-4:])
            form = rng.choice(["add", "scale", "sigmoid", "linear", "norm", "identity", "halves", "heads", "sums"])
            lines += {
                "add": [f"v{i} = add({a}, {b})"],
                "scale": [f"v{i} = scale({a}, by=0.5)"],
                "sigmoid": [f"v{i} = sigmoid({a})"],
                "linear": [f"v{i} = linear({a}, w)"],
                "norm": [f"v{i} = rms_norm({a}, n, eps=1e-06)"],
                "identity": [f"v{i} = identity({a})"],
                "halves": [f"l{i} = slice_last({a}, start=4, stop=8)", f"r{i} = slice_last({b}, start=0, stop=4)",
                           f"v{i} = join_last(l{i}, r{i})"],
                "heads": [f"h{i} = split_heads({a}, heads=2)", f"t{i} = sigmoid(h{i})", f"v{i} = merge_heads(t{i})"],
                "sums": [f"p{i} = row_dot({a}, {b})", f"v{i} = scale_rows({a}, p{i})"],
            }[form]  # fmt: skip
            values.append(f"v{i}")
        results = [values[-1], rng.choice(values[2:]), rng.choice(values)]
        body = "".join(f"    {line}\n" for line in lines)
        head = f"def g{kind}(x: f64[B, 8], y: f64[B, 8], *, w: f64[8, 8], n: f64[8]):\n"
        graphs.append(f"{head}{body}    return {', '.join(results)}\n")
    known, layers = ["in0", "in1"], []
    for i in range(8):
        a, b = rng.choice(known[-5:]), rng.choice(known)
        made = tuple(f"e{i}_{k}" for k in range(3))
        layers.append(("F", f"layer{i}", f"g{rng.randrange(3)}", (a, b), (f"w{i % 2}", "n"), made))
        known += made
    sequence = ("forward", ("in0", "in1"), (known[-1], known[-4], rng.choice(known[2:])), (), (), layers)
    weights = [(w, "f64[8, 8]", "normal", 0.1, "matrix") for w in ("w0", "w1")] + [("n", "f64[8]", "ones", 0.0, "norm")]
    return parse_program(
        "name = 'p'\n\n" + "\n".join(graphs) + f"\nweights = {weights!r}\nsequences = [{sequence!r}]\n", REGISTRY
    )


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("passes", ["", "fuse", "eliminate,share,fuse"])
def test_results_are_those_of_the_interpreter_whatever_memory_held(
    seed: int, passes: str, blocks: list[torch.Tensor]
) -> None:
    program, sizes = random_program(seed), {"B": 3}
    given = drawn(program, "forward", sizes, seed)
    expected = execute(program, "forward", given)
    after = pipeline.run(State(program, REGISTRY), pipeline.parse(passes)).state.program
    kept = {name: t.clone() for name, t in given.items()}
    runner = prepare_sequence(engine(after), after.sequence("forward"), sizes, given)
    results = program.sequence("forward").results
    for _ in range(2):
        for block in blocks:
            block.fill_(255)
        runner.run()
        for name in results:
            assert torch.equal(runner.values[name], expected[name]), name
        assert all(torch.equal(kept[name], given[name]) for name in given), "inputs and weights are not written to"


def test_a_layout_that_puts_live_values_on_top_of_each_other_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def heap(wanted: list[tuple[str, int, int, int]]) -> tuple[tuple[Slot, ...], int]:
        return tuple(Slot(n, 0, size, a, b) for n, size, a, b in wanted), max((w[1] for w in wanted), default=0)

    monkeypatch.setattr(arena, "place", heap)
    caught = 0
    for seed in range(10):
        program, sizes = random_program(seed), {"B": 3}
        given = drawn(program, "forward", sizes, seed)
        expected = execute(program, "forward", given)
        runner = prepare_sequence(engine(program), program.sequence("forward"), sizes, given)
        runner.run()
        caught += not all(torch.equal(runner.values[n], expected[n]) for n in program.sequence("forward").results)
    assert caught >= 8, "some of these programs hardly hold two values at once"


def test_new_inputs_are_read_at_every_run() -> None:
    program, sizes = random_program(3), {"B": 3}
    given = drawn(program, "forward", sizes)
    runner = prepare_sequence(engine(program), program.sequence("forward"), sizes, given)
    other = drawn(program, "forward", sizes, seed=9)
    for name, tensor in other.items():
        (runner.values[name] if name in runner.values else given[name]).copy_(tensor)
    runner.run()
    expected = execute(program, "forward", other)
    for name in program.sequence("forward").results:
        assert torch.equal(runner.values[name], expected[name])


def test_taps_copy_values_inside_graphs(blocks: list[torch.Tensor]) -> None:
    text = (
        "name = 'p'\n\ndef g(x: f64[B, 8]):\n    a = sigmoid(x)\n    b = scale(a, by=2.0)\n"
        "    h = slice_last(b, start=0, stop=4)\n    c = sigmoid(b)\n    return c\n\n"
        "sequences = [('forward', ('x',), ('z',), (), (), [('F', 'one', 'g', ('x',), (), ('y',)),"
        " ('F', 'two', 'g', ('y',), (), ('z',))])]\n"
    )
    program = parse_program(text, REGISTRY)
    given = drawn(program, "forward", {"B": 3})
    runner = prepare_sequence(engine(program), program.sequence("forward"), {"B": 3}, given, taps=("a", "h"))
    runner.run()
    assert sorted(runner.taps) == ["one:a", "one:h", "two:a", "two:h"]
    y = (2 * given["x"].sigmoid()).sigmoid()
    for layer, x in (("one", given["x"]), ("two", y)):
        assert torch.equal(runner.taps[f"{layer}:a"], x.sigmoid())
        assert torch.equal(runner.taps[f"{layer}:h"], (2 * x.sigmoid())[:, :4])
    assert torch.equal(runner.values["z"], (2 * y.sigmoid()).sigmoid())


def test_a_profile_names_ops_and_parts_of_the_model() -> None:
    text = (
        "name = 'p'\n\ndef g(x: f64[B, 8]):\n    a = sigmoid(x)  # @F:mlp\n    b = scale(a, by=2.0)  # @F:norm\n"
        "    return b\n\nsequences = [('forward', ('x',), ('y',), (), (), [('F', 'one', 'g', ('x',), (), ('y',))])]\n"
    )
    program = parse_program(text, REGISTRY)
    given = drawn(program, "forward", {"B": 3})
    runner = prepare_sequence(engine(program), program.sequence("forward"), {"B": 3}, given)
    assert list(runner.profile()) == [("sigmoid", "F:mlp"), ("scale", "F:norm")]
    assert torch.equal(runner.values["y"], 2 * given["x"].sigmoid())


# ---- gradients ------------------------------------------------------------------------------------------------------

TRAIN = """\
name = 'p'

def block(x: f64[B, 8], *, norm: f64[8], w: f64[16, 8]):
    y = rms_norm(x, norm, eps=1e-06)
    gu = linear(y, w)
    a = swiglu(gu)
    out = add(x, a)
    return out

def head(x: f64[B, 8], *, w: f64[8, 8], n: f64[8]):
    y = rms_norm(x, n, eps=1e-06)
    z = linear(y, w)
    q = multiply(z, z)
    s = sum_all(q)
    return s

weights = [
    ('first', 'f64[8]', 'ones', 0.0, 'norm'),
    ('second', 'f64[8]', 'ones', 0.0, 'norm'),
    ('shared', 'f64[16, 8]', 'normal', 0.1, 'matrix'),
    ('head', 'f64[8, 8]', 'normal', 0.1, 'matrix'),
]
sequences = [('train', ('x',), ('s',), ('s',), (), [
    ('F', 'one', 'block', ('x',), ('first', 'shared'), ('h1',)),
    ('F', 'two', 'block', ('h1',), ('second', 'shared'), ('h2',)),
    ('F', 'head', 'head', ('h2',), ('head', 'second'), ('s',)),
])]
"""
"""One matrix is used by two layers of a kind, one norm by layers of two kinds."""

PIPELINES = ["differentiate,cut", "differentiate,fuse,cut", "differentiate,recompute{price=1000.0},fuse,cut"]
WEIGHTS = ("first", "second", "shared", "head")


def trained(passes: str, target: Target = PLAIN) -> tuple[Runner, Tensors, Tensors, Program, Tensors]:
    """A prepared train sequence, its gradient buffers full of NaN, the gradients expected, and how it was made."""
    state = pipeline.text_state(TRAIN, REGISTRY, target=find("cpu"), precision="fp64", sizes={"B": 5})
    program = pipeline.run(state, pipeline.parse(passes)).state.program
    given = drawn(program, "train", {"B": 5})
    expected = gradients(program, "train", given, {"s": 0.5})
    given["d:s"] = torch.tensor(0.5, dtype=torch.float64)
    buffers = {name: torch.full_like(given[name], torch.nan) for name in WEIGHTS}
    runner = prepare_sequence(engine(program, target), program.sequence("train"), {"B": 5}, given, buffers)
    return runner, buffers, expected, program, given


@pytest.mark.parametrize("passes", PIPELINES)
def test_gradients_overwrite_and_then_add(passes: str, blocks: list[torch.Tensor]) -> None:
    runner, buffers, expected, _, _ = trained(passes)
    for times in (1, 2, 3):
        for block in blocks:
            block.fill_(255)
        runner.run(accumulate=times > 1)
        assert torch.equal(runner.values["s"], expected["s"])
        for name in WEIGHTS:
            torch.testing.assert_close(buffers[name], times * expected[name], rtol=1e-13, atol=0)
    runner.run()
    for name in WEIGHTS:
        assert torch.equal(buffers[name], expected[name]), f"the gradient of {name} is overwritten"


@pytest.mark.parametrize("passes", PIPELINES)
def test_running_twice_gives_the_same_bits(passes: str) -> None:
    runner, buffers, _, _, _ = trained(passes)
    runner.run()
    first = {name: g.clone() for name, g in buffers.items()}
    runner.run()
    assert all(torch.equal(first[name], g) for name, g in buffers.items())


def test_matrix_gradients_go_straight_to_their_buffer_and_regions_results_do_not() -> None:
    for passes, straight in ((PIPELINES[0], {"first", "second", "shared", "head"}), (PIPELINES[1], {"shared", "head"})):
        runner, buffers, _, program, _ = trained(passes)
        sequence = program.sequence("train")
        own = {w for value, w in sequence.gradients if runner.values[value].data_ptr() == buffers[w].data_ptr()}
        assert own == straight
        assert runner.layout is not None
        held = {s.name for s in runner.layout.slots}
        assert held.isdisjoint(value for value, w in sequence.gradients if w in straight)


def test_an_implementation_that_accumulates_is_asked_to() -> None:
    asked: list[bool] = []

    def prepare(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...],
                accumulate: bool = False) -> Callable[[], None]:  # fmt: skip
        def run() -> None:
            asked.append(accumulate)
            product = inputs[0].flatten(0, -2).T @ inputs[1].flatten(0, -2)
            outputs[0].copy_(outputs[0] + product if accumulate else product)

        return run

    target = Target("own", "", PLAIN.machine, "fp64", "cpu", lambda d: 1, lambda *a: None,
                    {"linear_wgrad": Implementation("linear_wgrad", prepare, accumulates=True)}, None)  # fmt: skip
    runner, buffers, expected, _, _ = trained(PIPELINES[0], target)
    runner.run()
    assert asked == [False, False, True], "the second part of the shared matrix is added to the first"
    runner.run(accumulate=True)
    assert asked[3:] == [True, True, True]
    for name in WEIGHTS:
        torch.testing.assert_close(buffers[name], 2 * expected[name], rtol=1e-12, atol=0)


def test_a_gradient_of_another_type_is_converted_into_its_buffer() -> None:
    state = pipeline.text_state(TRAIN, REGISTRY)
    program = pipeline.run(state, pipeline.parse(PIPELINES[0])).state.program
    given = drawn(program, "train", {"B": 5})
    expected = gradients(program, "train", given, {"s": 1.0})
    given["d:s"] = torch.ones((), dtype=torch.float64)
    buffers = {name: torch.full_like(given[name], torch.nan, dtype=torch.float32) for name in WEIGHTS}
    runner = prepare_sequence(engine(program), program.sequence("train"), {"B": 5}, given, buffers)
    runner.run()
    runner.run(accumulate=True)
    for name in WEIGHTS:
        torch.testing.assert_close(buffers[name], (2 * expected[name]).float(), rtol=1e-5, atol=1e-6)


# ---- regions, caches, single graphs ---------------------------------------------------------------------------------


def test_a_region_runs_by_its_kernel_if_it_has_one() -> None:
    text = "name = 'p'\n\ndef g(x: f64[B, 8]):\n    a = sigmoid(x)\n    b = scale(a, by=2.0)\n    return b\n\n" \
        "sequences = [('forward', ('x',), ('y',), (), (), [('F', 'one', 'g', ('x',), (), ('y',))])]\n"  # fmt: skip
    program = optimized(text, "fuse")
    (region,) = (g.name for g in program.graphs if g.name != "g")
    calls: list[int] = []

    def kernel(inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Callable[[], None]:
        calls.append(0)

        def run() -> None:
            calls[-1] += 1
            outputs[0].copy_(inputs[0] + 100)

        return run

    given = drawn(program, "forward", {"B": 3})
    runner = prepare_sequence(engine(program, kernels={region: kernel}), program.sequence("forward"), {"B": 3}, given)
    runner.run()
    runner.run()
    assert calls == [2] and torch.equal(runner.values["y"], given["x"] + 100)


CACHE = """\
name = 'p'

def write(cache: f64[B, C, 4], new: f64[B, S, 4], start: i32[()]):
    turned = sigmoid(new)
    cache_next = cache_write(cache, turned, start)
    return cache_next

sequences = [('decode', ('cache.0', 'cache.1', 'new', 'start'), ('next.0', 'next.1'), (), (), [
    ('F', 'one', 'write', ('cache.0', 'new', 'start'), (), ('next.0',)),
    ('F', 'two', 'write', ('cache.1', 'new', 'start'), (), ('next.1',)),
])]
"""


def test_a_cache_grows_in_the_callers_memory() -> None:
    program = parse_program(CACHE, REGISTRY)
    given: Tensors = {f"cache.{i}": torch.zeros(2, 5, 4, dtype=torch.float64) for i in range(2)}
    given |= {"new": torch.zeros(2, 1, 4, dtype=torch.float64), "start": torch.zeros((), dtype=torch.int32)}
    runner = prepare_sequence(engine(program), program.sequence("decode"), {"B": 2, "C": 5, "S": 1}, given)
    rows = torch.randn(5, 2, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for i, row in enumerate(rows):
        runner.values["new"].copy_(row)
        runner.values["start"].fill_(i)
        runner.run()
    expected = torch.cat([row.sigmoid() for row in rows], 1)
    for i in range(2):
        assert torch.equal(given[f"cache.{i}"], expected)
        assert runner.values[f"next.{i}"].data_ptr() == given[f"cache.{i}"].data_ptr()


def test_one_graph_alone_updates_weights_in_place(blocks: list[torch.Tensor]) -> None:
    text = (
        "name = 'p'\n\ndef update(bias: f32[E], load: f32[E], speed: f32[()]):\n    slow = scale(speed, by=0.5)\n"
        "    bias_next = update_bias(bias, load, slow)\n    return bias_next\n"
    )
    program = parse_program(text, REGISTRY)
    bias = torch.zeros(4)
    tensors = {"bias": bias, "load": torch.tensor([0.0, 1.0, 2.0, 5.0]), "speed": torch.tensor(0.5)}
    runner = prepare_graph(engine(program), "update", tensors, {"bias_next": bias})
    for times in (1, 2, 3):
        runner.run()
        assert bias.tolist() == [0.25 * times, 0.25 * times, 0.0, -0.25 * times]
    assert runner.values["bias_next"] is bias


def test_one_graph_alone_keeps_results_apart_from_its_workspace(blocks: list[torch.Tensor]) -> None:
    text = "name = 'p'\n\ndef g(x: f64[B, 8]):\n    a = sigmoid(x)\n    b = scale(a, by=2.0)\n    c = sigmoid(b)\n" \
        "    d = scale(c, by=3.0)\n    return b, d\n"  # fmt: skip
    program = parse_program(text, REGISTRY)
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    runner = prepare_graph(engine(program), "g", {"x": x})
    runner.run()
    for block in blocks:
        block.fill_(255)
    b = 2 * x.sigmoid()
    assert torch.equal(runner.values["b"], b) and torch.equal(runner.values["d"], 3 * b.sigmoid())
