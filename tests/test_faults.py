"""A step whose loss is no number names the value that was first, and a full GPU is explained."""

from __future__ import annotations

import pytest
import torch
from small import SMALL

import dsv3c
from dsv3c.errors import WorkError
from dsv3c.plan import Plan
from dsv3c.runtime import faults
from dsv3c.runtime.faults import memory_explained, unusable
from dsv3c.runtime.runner import Runner, Step
from dsv3c.runtime.session import Session


@pytest.fixture(scope="module")
def plan() -> Plan:
    return dsv3c.compile(SMALL, target="cpu", precision="fp32", seq=8, global_batch=2, kernels="none")


@pytest.fixture
def session(plan: Plan) -> Session:
    return dsv3c.load(plan, seed=1)


TOKENS = torch.arange(16).view(2, 8)


def _spoil(session: Session, op: str, layer: str, value: float) -> Runner:
    """Make the first forward call of `op` in `layer` write one wrong number, whenever it runs."""
    runner = session._runner("train", 1, 8)
    step = next(s for s in runner.first if s.node.op == op and s.layer == layer)

    def spoiled(call: object = step.call, step: Step = step) -> None:
        assert callable(call)
        call()
        step.outputs[0].view(-1)[3] = value

    step.call = spoiled
    return runner.finish()


@pytest.mark.parametrize("value, shown", [(float("nan"), "nan"), (float("inf"), "inf")])
def test_the_first_value_that_is_no_number_is_named(session: Session, value: float, shown: str) -> None:
    _spoil(session, "grouped_linear", "model.layers.1", value)
    before = {n: t.clone() for n, t in session.weights.state().items()}
    with pytest.raises(WorkError) as caught:
        session.step(TOKENS)
    text = str(caught.value)
    assert text.startswith("step 1: the loss is nan. The first value that is no number, in micro-batch 1 of 2: ")
    assert f"= grouped_linear(...) in model.layers.1, mlp.gate_up (forward), holds {shown}. Nothing of" in text
    assert session.steps == 0
    assert all(torch.equal(t, before[n]) for n, t in session.weights.state().items()), "nothing was applied"


def test_the_micro_batch_is_named(session: Session) -> None:
    runner = session._runner("train", 1, 8)
    step = next(s for s in runner.first if s.node.op == "embedding")
    inner = step.call

    def spoiled() -> None:
        inner()
        step.outputs[0][0, 0, 0] += float("nan") if int(runner.values["tokens"][0, 0]) == 8 else 0.0

    step.call = spoiled
    runner.finish()
    with pytest.raises(WorkError, match=r"in micro-batch 2 of 2: residual = embedding\(...\) in embedding, embedding"):
        session.step(TOKENS)


def test_a_gradient_that_is_no_number_is_found_in_the_backward_pass(session: Session) -> None:
    runner = session._runner("train", 1, 8)
    step = next(s for s in runner.first if s.node.op == "linear_wgrad")

    def spoiled(call: object = step.call) -> None:
        assert callable(call)
        call()
        step.outputs[0].view(-1)[0] = float("nan")

    step.call = spoiled
    for other in runner.again:
        if other.outputs and other.outputs[0] is step.outputs[0]:
            other.call = spoiled
    runner.finish()
    with pytest.raises(WorkError, match=r"the gradient norm is nan\..*linear_wgrad.*\(weight gradient\), holds nan"):
        session.step(TOKENS)


def test_a_weight_that_is_no_number_is_named(session: Session) -> None:
    session.weights.tensors["model.layers.0.self_attn.o_proj.weight"][0, 0] = float("nan")
    with pytest.raises(WorkError, match=r"The weight model\.layers\.0\.self_attn\.o_proj\.weight held nan before it"):
        session.step(TOKENS)


def test_a_step_goes_on_after_a_fault(plan: Plan) -> None:
    broken, whole = dsv3c.load(plan, seed=1), dsv3c.load(plan, seed=1)
    runner = broken._runner("train", 1, 8)
    step = next(s for s in runner.first if s.node.op == "embedding")
    inner = step.call
    step.call = lambda: step.outputs[0].fill_(float("nan"))  # type: ignore[assignment]
    runner.finish()
    with pytest.raises(WorkError):
        broken.step(TOKENS)
    step.call = inner
    runner.finish()
    assert broken.step(TOKENS).loss == whole.step(TOKENS).loss


def test_values_are_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "PIECE", 7)
    x = torch.zeros(5, 9)
    assert unusable(x) is None and unusable(x.bfloat16()) is None
    x[4, 8] = float("-inf")
    assert unusable(x) is None, "masks are made of -inf"
    x[4, 7] = float("inf")
    assert unusable(x) == "inf" and unusable(x.t()) == "inf"
    x[4, 6] = float("nan")
    assert unusable(x) == "nan"
    codes = torch.zeros(20).to(torch.float8_e4m3fn)
    assert unusable(codes) is None
    codes.view(torch.uint8)[19] = 0xFF
    assert unusable(codes) == "nan"
    assert unusable(torch.full((3,), -1)) is None


def test_a_gpu_that_is_full_is_explained(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 2 * 2**30)
    wanted = (
        r"memory: the plan needs 0.0 GiB, this process holds 2.0 GiB, and 3.0 GiB of 80.0 GiB are free; "
        "stop what else uses the GPU, or compile with a smaller --micro-batch or --seq"
    )
    with pytest.raises(WorkError, match="the GPU ran out of " + wanted), memory_explained(plan.memory):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
    large = dsv3c.compile(SMALL, target="cpu", precision="fp32", seq=8, kernels="none").memory
    faults.check_room(large, "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    faults.check_room(large, "cpu")
    with pytest.raises(WorkError, match=r"the GPU has too little memory: the plan needs 0.0 GiB, this process holds"):
        faults.check_room(large, "cuda")
