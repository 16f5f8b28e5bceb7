"""F, B and W of a differentiated and cut program give the losses and gradients of torch's autograd."""

from __future__ import annotations

import dataclasses
import functools
import random

import pytest
import torch
from sequences import Tensors, autograd, draw, draw_weights, execute, gradients

from dsv3c.build import Builder
from dsv3c.dims import symbol
from dsv3c.ir import DType, Graph, IRError, Layer, Phase, Program, Sequence, Type, Value, Weight
from dsv3c.job import Job
from dsv3c.models.deepseek_v3 import build
from dsv3c.models.presets import DEEPSEEK_V3_TINY
from dsv3c.models.yarn import Yarn
from dsv3c.ops import REGISTRY
from dsv3c.pipeline import parse, run, text_state
from dsv3c.state import State

SMALL = dataclasses.replace(
    DEEPSEEK_V3_TINY, vocab_size=40, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=3,
    num_attention_heads=2, q_lora_rank=6, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
    n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2, num_nextn_predict_layers=1,
)  # fmt: skip

CONFIGS = {
    "plain": SMALL,
    "no query rank, no shared expert": dataclasses.replace(SMALL, q_lora_rank=None, n_shared_experts=0),
    "two MTP modules": dataclasses.replace(SMALL, num_nextn_predict_layers=2),
    "no MTP, all experts, yarn": dataclasses.replace(
        SMALL, num_nextn_predict_layers=0, first_k_dense_replace=0, norm_topk_prob=False, rope_interleave=False,
        rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=64),
    ),
}  # fmt: skip

PIPELINES = (
    "differentiate,cut",
    "differentiate,eliminate,share,cut",
    "differentiate,eliminate,share,hoist,eliminate,cut",
    "differentiate,share,eliminate,cut,hoist,share,eliminate",
)


def apply(program: Program, pipeline: str) -> Program:
    """The program after the passes; every one of them is verified."""
    return run(State(program, REGISTRY), parse(pipeline)).state.program


@functools.cache
def model(config: str, precision: str, alignment: int = 1) -> Program:
    return build(CONFIGS[config], Job("train", "cpu", precision, 7, 2, 2), alignment)


@functools.cache
def model_inputs(config: str, precision: str) -> Tensors:
    generator = torch.Generator().manual_seed(len(config))
    tokens = draw(Type(DType.i64, (2, 7)), {}, generator, CONFIGS[config].vocab_size)
    return {"tokens": tokens, **draw_weights(model(config, precision), generator)}


def model_scales(program: Program) -> dict[str, float]:
    losses = program.sequence("train").losses
    return {n: 1.0 if n == "loss.main" else 0.3 + i / 10 for i, n in enumerate(losses)}


def assert_close(actual: Tensors, expected: Tensors, relative: float) -> None:
    """Same names, and each tensor within `relative` of the other's norm."""
    assert sorted(actual) == sorted(expected)
    for name, e in expected.items():
        error = float((actual[name].double() - e.double()).norm())
        assert error <= relative * max(float(e.double().norm()), 1e-30), f"{name}: off by {error}"


# ---- the model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("config", CONFIGS)
def test_model_gradients_equal_autograd(config: str, pipeline: str) -> None:
    program = model(config, "fp64", 4 if config == "plain" else 1)
    given, scales = model_inputs(config, "fp64"), model_scales(program)
    expected = autograd(program, "train", given, scales)
    assert_close(gradients(apply(program, pipeline), "train", given, scales), expected, 1e-10)
    trained = {w.name for w in program.weights if w.group != "state"}
    assert trained <= set(expected)


def test_each_loss_alone() -> None:
    program = model("plain", "fp64")
    given, cut = model_inputs("plain", "fp64"), apply(program, PIPELINES[2])
    for loss in program.sequence("train").losses:
        scales = {n: float(n == loss) for n in program.sequence("train").losses}
        expected = autograd(program, "train", given, scales)
        actual = gradients(cut, "train", given, scales)
        assert all(not actual[n].any() for n in actual.keys() - expected.keys())
        assert_close({n: actual[n] for n in expected}, expected, 1e-10)


def test_input_gradients_do_not_wait_for_weights() -> None:
    """B computes no weight gradient of a matrix, and W takes nothing from another layer's W."""
    cut = apply(model("plain", "fp64"), PIPELINES[1])
    by_phase = {p: {y.graph for y in cut.sequence("train").layers if y.phase is p} for p in Phase}
    assert by_phase[Phase.B] and by_phase[Phase.W]
    for name in by_phase[Phase.B]:
        assert not any("wgrad" in n.op for n in cut.graph(name).nodes)
    made_by_w = {v for y in cut.sequence("train").layers if y.phase is Phase.W for v in y.outputs}
    assert not any(v in made_by_w for y in cut.sequence("train").layers for v in y.inputs)


# ---- random programs ----------------------------------------------------------------------------------------------

B, D = symbol("B"), 6
ROW = Type(DType.f64, (B, D))


OPS = ("linear", "linear", "add", "multiply", "rms_norm", "sigmoid", "scale", "heads", "swiglu", "identity")


def random_graph(rng: random.Random, name: str, inputs: int, last: bool) -> Graph:
    """A few ops on rows, some on the weights alone, some of them twice."""
    b = Builder(REGISTRY, name)
    pool = [b.input(f"x{i}", ROW) for i in range(inputs)]
    matrix = b.weight("matrix", Type(DType.f64, (D, D)))
    other = b.weight("other", Type(DType.f64, (D, D)))
    norm = b.weight("norm", Type(DType.f64, (D,)))

    def weight() -> Value:
        kind = rng.randrange(6)
        if kind == 0:
            return matrix
        if kind == 1:
            return other
        half = b.emit("scale", (matrix,), {"by": 0.5})[0]
        if kind == 2:
            return half
        return b.emit(*(("multiply", (half, other)), ("add", (half, matrix)), ("identity", (other,)))[kind - 3])[0]

    for _ in range(rng.randint(3, 8)):
        x, y = rng.choice(pool), rng.choice(pool)
        op = rng.choice(OPS)
        if op == "linear":
            made = b.linear(x, weight())
        elif op in ("add", "multiply"):
            made = b.emit(op, (x, y))[0]
        elif op == "rms_norm":
            made = b.rms_norm(x, norm, eps=1e-6)
        elif op == "heads":
            made = b.merge_heads(b.split_heads(x, heads=2))
        elif op == "swiglu":
            made = b.swiglu(b.join_last(x, y))
        else:
            made = b.emit(op, (x,), {"by": -1.5} if op == "scale" else {})[0]
        pool.append(made)
    # every input counts, so that none is left without a gradient
    total = functools.reduce(lambda p, q: b.add(p, q), [*pool[:inputs], *pool[-2:]])
    if last:
        return b.graph([b.sum_all(b.multiply(total, total), out="loss")])
    return b.graph([b.rms_norm(total, norm, eps=1e-6, out="y"), b.linear(pool[-1], weight(), out="z")])


def random_program(seed: int) -> Program:
    """Layers that share graphs and weights, values read several times, two losses, and a sequence without any."""
    rng = random.Random(seed)
    first, middle = random_graph(rng, "first", 1, False), random_graph(rng, "middle", 2, False)
    graphs = (first, middle, random_graph(rng, "head", 3, True))
    weights: list[Weight] = []
    for i in range(3):
        for part in ("matrix", "other"):
            weights.append(Weight(f"w{i}.{part}", Type(DType.f64, (D, D)), "normal", 1.0, "matrix"))
        weights.append(Weight(f"w{i}.norm", Type(DType.f64, (D,)), "ones", 0.0, "norm"))

    def of(i: int, tied: bool = False) -> tuple[str, ...]:
        return (f"w{i}.matrix", f"w{i}.matrix" if tied else f"w{i}.other", f"w{i}.norm")

    layers = (
        Layer("a", "first", ("x",), of(0), ("a.y", "a.z")),
        Layer("b", "middle", ("a.y", "a.z"), of(1), ("b.y", "b.z")),
        Layer("c", "middle", ("b.y", "b.y"), of(1), ("c.y", "c.z")),
        Layer("h", "head", ("c.y", "c.z", "b.z"), of(2, tied=True), ("loss.one",)),
        Layer("i", "head", ("a.y", "b.z", "c.y"), of(2), ("loss.two",)),
    )
    losses = ("loss.one", "loss.two")
    forward = Sequence("forward", ("x",), layers, ("loss.one",))
    return Program("random", graphs, (Sequence("train", ("x",), layers, losses, losses), forward), tuple(weights))


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("seed", range(12))
def test_random_gradients_equal_autograd(seed: int, pipeline: str) -> None:
    program = random_program(seed)
    generator = torch.Generator().manual_seed(seed)
    given = {"x": draw(ROW, {"B": 3}, generator), **draw_weights(program, generator)}
    scales = {"loss.one": 0.7, "loss.two": -1.3}
    cut = apply(program, pipeline)
    assert_close(gradients(cut, "train", given, scales), autograd(program, "train", given, scales), 1e-10)
    expected = execute(program, "forward", given)["loss.one"]
    assert torch.equal(execute(cut, "forward", given)["loss.one"], expected)


def test_weight_bound_twice_and_loss_read_again() -> None:
    text = """
def f(x: f64[B, 4], *, u: f64[4, 4], v: f64[4, 4]):
    a = linear(x, u)
    b = linear(a, v)
    s = sum_all(b)
    return b, s

def g(b: f64[B, 4], s: f64[()]):
    r = sum_all(b)
    t = multiply(r, s)
    return t

weights = [('w', 'f64[4, 4]', 'normal', 1.0, 'matrix')]
sequences = [('train', ('x',), ('s', 't'), ('s', 't'), (), [
    ('F', 'first', 'f', ('x',), ('w', 'w'), ('b', 's')),
    ('F', 'second', 'g', ('b', 's'), (), ('t',)),
])]
"""
    program = text_state(text, REGISTRY).program
    generator = torch.Generator().manual_seed(0)
    given = {"x": draw(Type(DType.f64, (3, 4)), {}, generator), **draw_weights(program, generator)}
    scales = {"s": 0.5, "t": -2.0}
    cut = apply(program, PIPELINES[2])
    assert len(cut.sequence("train").gradients) == 2
    assert_close(gradients(cut, "train", given, scales), autograd(program, "train", given, scales), 1e-10)


# ---- what it refuses and says ---------------------------------------------------------------------------------------


def test_result_that_is_a_parameter() -> None:
    text = "def g(x: f64[B, 4], y: f64[B, 4]):\n    z = add(x, y)\n    return z, x\n"
    with pytest.raises(IRError, match=r"the result 'x' is a parameter; return identity\(x\)"):
        run(text_state(text, REGISTRY), parse("differentiate"))


def test_cotangent_that_nobody_gives() -> None:
    program = random_program(0)
    (train, forward) = program.sequences
    short = dataclasses.replace(train, layers=train.layers[:2] + train.layers[4:], losses=("loss.two",))
    layers = (*short.layers[:2], dataclasses.replace(short.layers[2], inputs=("a.y", "b.z", "b.z")))
    bad = dataclasses.replace(short, layers=layers, results=("loss.two",))
    with pytest.raises(IRError, match=r"layer 'b': no later layer reads 'b.y' and it is not a loss"):
        run(State(program.but(sequences=(bad, forward)), REGISTRY), parse("differentiate,cut"))


def test_weight_without_gradient_is_told() -> None:
    text = "def g(x: f64[B, 4], *, w: f64[4], unused: f64[4]):\n    y = rms_norm(x, w, eps=1e-6)\n    return y\n"
    notes = run(text_state(text, REGISTRY), parse("differentiate")).notes
    assert [(n.action, n.node) for n in notes] == [("differentiated", "g"), ("kept", "g.unused")]
