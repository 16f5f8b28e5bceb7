"""The examples of the README: an op, a pass and a model family from outside the package, used like built-in ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dsv3c
from dsv3c import pipeline
from dsv3c.errors import InputError
from dsv3c.interp import run
from dsv3c.models import MODELS
from dsv3c.ops import REGISTRY
from dsv3c.plugins import load_plugin
from dsv3c.text import parse_graph, show_graph

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture(scope="module", autouse=True)
def examples() -> Iterator[None]:
    """Import the example files once, as a user's program would."""
    for name in ("merge_scales", "relu_model"):
        load_plugin(EXAMPLES / f"{name}.py")
    yield
    MODELS.pop("relu-moe", None)


def test_the_op_keeps_its_contract() -> None:
    graph = parse_graph("def f(x: f64[3, 8]):\n    y = relu_glu(x)  # f64[3, 4]\n    return y\n", REGISTRY)
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(run(graph, {"x": x}, REGISTRY)["y"], x[:, :4].relu() * x[:, 4:])


def test_the_pass_runs_in_a_pipeline_and_explains_itself() -> None:
    text = """def f(x: f32[4]):
    a = scale(x, by=2.0)   # f32[4]
    b = scale(a, by=3.0)   # f32[4]
    c = scale(b, by=0.5)   # f32[4]
    return b, c
"""
    outcome = pipeline.run(pipeline.text_state(text, REGISTRY), pipeline.parse("merge_scales"))
    after = outcome.state.program.graphs[0]
    assert [n.attr("by") for n in after.nodes] == [6.0, 0.5]
    assert [n.action for n in outcome.notes] == ["merged", "kept"]
    assert show_graph(after).count("scale(") == 2


def test_the_model_trains_with_fused_kernels_and_right_gradients() -> None:
    plan = dsv3c.compile("relu-moe-tiny", seq=16, micro_batch=2, precision="fp64")
    calls = [n for g in plan.program.graphs for n in g.nodes]
    assert any("relu_glu" in str(n.attrs) for n in calls if n.op == "call"), "the outside op was not fused"
    session = dsv3c.load(plan, seed=0)
    tokens = torch.randint(2048, (2, 16), generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.up_proj.weight"
    gradient = session.gradients(tokens)[name]
    weight = session.weights.tensors["model.layers.0.mlp.gate_up_proj.weight"]
    row = weight.shape[0] // 2
    i, j = divmod(int(gradient.abs().argmax()), gradient.shape[1])
    values = []
    for step in (1e-5, -2e-5):
        weight[row + i, j] += step
        values.append(session.losses(tokens)["loss.main"])
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(gradient[i, j].item(), rel=1e-5)
    first = session.step(tokens, lr=1e-3).loss
    assert session.step(tokens, lr=1e-3).loss < first


def test_a_plugin_that_fails_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(InputError, match=r"bad.py: failed with ZeroDivisionError"):
        load_plugin(tmp_path / "bad.py")
    with pytest.raises(InputError, match="is not a Python file"):
        load_plugin(tmp_path / "none.py")
