"""The FP8 program of whole models: which products are quantized, what is kept, how far losses and gradients move."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

import dsv3c
from dsv3c import targets
from dsv3c.ir import DType
from dsv3c.plan import Plan
from dsv3c.runtime.session import Session
from dsv3c.targets.hopper import H800

PRODUCTS = {"linear", "linear_dgrad", "linear_wgrad", "grouped_linear", "grouped_linear_dgrad", "grouped_linear_wgrad"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return dsv3c.compile("deepseek-v3-slice", target="h800", precision="fp8", kernels="none")


@pytest.fixture
def hopper_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A target with Hopper's FP8 whose every op runs by its reference on the CPU."""
    stand_in = replace(
        H800, name="h800-by-reference", device="cpu", implementations={}, load=lambda kernel: None,  # type: ignore[arg-type, return-value]
        selector=None, trouble=lambda: "", reserve=None,
    )  # fmt: skip
    monkeypatch.setitem(targets._targets, stand_in.name, stand_in)
    yield stand_in.name


def test_every_product_is_fp8_but_head_and_router(plan: Plan) -> None:
    paths = {n.path for g in plan.program.graphs for n in g.nodes if n.op in PRODUCTS}
    assert paths == {"head", "moe.router"}
    kept = {n.node.split(".", 1)[1]: n.reason for n in plan.notes if n.pass_name == "quantize" and n.action == "kept"}
    assert set(kept) == {"head", "moe.router"}
    assert "FP32" in kept["moe.router"]


def test_backward_is_handed_fp8_and_e5m6(plan: Plan) -> None:
    """Of what a layer saves, only what attention, norms and the router need is wider than 8 bits a number."""
    graph = plan.program.graph("moe_block_F")
    saved = {v.name: v for v in graph.results[4:]}
    wide = {name for name, v in saved.items() if v.type.dtype is DType.bf16 and v.type.rank > 1}
    reads = {n.op for b in "BW" for n in plan.program.graph(f"moe_block_{b}").nodes}
    assert not any("gate_up_out" in name or name in ("o", "experts_inner") for name in wide), wide
    assert {v.type.dtype for v in saved.values()} >= {DType.e4m3, DType.u8}
    assert not PRODUCTS & (reads - {"linear_dgrad", "linear_wgrad"})


def test_weights_are_quantized_once_a_step(plan: Plan) -> None:
    prologue = plan.program.sequence("prologue")
    quantized = {layer.weights[0] for layer in prologue.layers if "quantize_block" in "".join(layer.outputs)}
    names = {w.name for w in plan.program.weights if w.group == "matrix" and "mlp.gate.weight" not in w.name}
    assert quantized == names
    blocks = [n for s in plan.program.sequences if s.name != "prologue" for layer in s.layers
              for n in plan.program.graph(layer.graph).nodes if n.op.startswith("quantize_block")]  # fmt: skip
    assert not blocks


def test_losses_and_gradients_stay_near_bf16(hopper_on_cpu: str) -> None:
    tokens = torch.randint(2048, (1, 48), generator=torch.Generator().manual_seed(0))

    def run(precision: str) -> Session:
        # Every expert is chosen, so that no near tie sends a token elsewhere.
        sizes = "num_hidden_layers=2,n_routed_experts=4,n_group=1,topk_group=1,num_nextn_predict_layers=0"
        model = f"deepseek-v3-tiny:{sizes}"
        plan = dsv3c.compile(model, target=hopper_on_cpu, seq=48, precision=precision, kernels="none")
        return dsv3c.load(plan, seed=1)

    fp8, bf16 = run("fp8"), run("bf16")
    assert fp8.losses(tokens)["loss.main"] == pytest.approx(bf16.losses(tokens)["loss.main"], rel=2e-3)
    ours, theirs = fp8.gradients(tokens), bf16.gradients(tokens)
    for name, gradient in theirs.items():
        if "layernorm" not in name and "mlp.gate.weight" not in name:
            error = (ours[name] - gradient).norm() / gradient.norm()
            assert error < 0.2, f"{name}: {error}"
    assert fp8.step(tokens).loss == pytest.approx(bf16.step(tokens).loss, rel=2e-3)
