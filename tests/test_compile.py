"""Compiling from the outside: every preset, the same bytes every time, no weights in memory, wrong flags refused."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import SMALL

from dsv3c import driver, pipeline
from dsv3c.errors import InputError
from dsv3c.job import Recipe
from dsv3c.models.presets import PRESETS
from dsv3c.passes.recompute import Recompute
from dsv3c.plan import Plan, load_plan
from dsv3c.settle import OVERSIZE_PRICE
from dsv3c.targets import TARGETS

ROOT = Path(__file__).parents[1]
BIG = [name for name in PRESETS if name != "deepseek-v3-tiny"]
MINI_BATCH = 12
"""Sequences of 4096 tokens at which `deepseek-v3-mini` fits an 80 GB card only with recomputation."""


@functools.cache
def compiled(model: str, target: str = "h800", job: str = "train") -> Plan:
    return driver.compile(model, target=target, job=job, kernels="none", allow_oversize=True)


# ---- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "job"), [*((m, "train") for m in BIG), ("deepseek-v3", "decode")])
def test_a_large_model_becomes_a_plan_that_can_be_saved(model: str, job: str, tmp_path: Path) -> None:
    plan = compiled(model, job=job)
    plan.save(tmp_path / "a.plan")
    again = load_plan(tmp_path / "a.plan")
    assert again == plan and again.program == plan.program
    assert plan.job.precision == "fp8" and plan.job.kind == job
    assert plan.program.has_sequence("train") == (job == "train")
    assert {"forward", "prefill", "decode"} <= {s.name for s in plan.program.sequences}
    weights = sum(torch.Size(w.shape).numel() for w in plan.weights)
    assert weights >= plan.parameters.total
    assert plan.memory.by_kind[0][0] == "weights" and plan.memory.by_kind[0][1] >= 4 * plan.parameters.total


def test_the_tiny_model_is_planned_and_executed() -> None:
    plan = driver.compile("deepseek-v3-tiny", seq=16, micro_batch=2, global_batch=4, kernels="none")
    assert plan.target == "cpu" and plan.job.precision == "fp32" and plan.memory.fits
    session = driver.load(plan, seed=1)
    tokens = torch.randint(0, 2048, (4, 16), generator=torch.Generator().manual_seed(0))
    first, second = session.step(tokens), session.step(tokens)
    assert first.tokens == 64 and 7 < first.loss < 8.5 and second.loss < first.loss
    assert session.forward(tokens[:1]).shape == (1, 16, 2048)


def test_regions_without_a_generator_are_listed_by_name() -> None:
    plan = compiled("deepseek-v3")
    called = {str(n.attr("graph")) for g in plan.program.graphs for n in g.nodes if n.op == "call"}
    assert set(plan.missing_kernels) | {k.op for k in plan.kernels} == called and plan.missing_kernels
    assert all(plan.program.has_graph(name) for name in plan.missing_kernels)


def test_layers_are_compiled_by_kind() -> None:
    """61 layers cost what 5 do: the graphs of a model with more layers are the same."""
    deep, shallow = compiled("deepseek-v3"), compiled("deepseek-v3:num_hidden_layers=5")
    assert [g.name for g in deep.program.graphs] == [g.name for g in shallow.program.graphs]
    assert len(deep.program.sequence("train").layers) > 5 * len(shallow.program.sequence("train").layers)


@pytest.mark.parametrize("target", ["h800", "h100", "h200"])
def test_the_limit_is_that_of_the_target(target: str) -> None:
    assert compiled("deepseek-v3-mini", target=target).memory.limit_bytes == TARGETS[target].machine.memory_bytes


def test_defaults_of_a_job() -> None:
    plan = driver.compile("deepseek-v3-mini", target="h800", mesh="ep=2", micro_batch=2, kernels="none")
    assert (plan.job.seq, plan.job.global_batch, plan.job.mesh.dp, plan.job.mesh.world) == (4096, 4, 2, 2)
    assert driver.compile(SMALL, kernels="none").job.seq == SMALL.max_position_embeddings
    own = driver.compile(SMALL, kernels="none", recipe=driver.override_recipe(Recipe(), lr=0.5))
    assert own.job.recipe.lr == 0.5


# ---- the price of memory ---------------------------------------------------------------------------------------------


def price(plan: Plan) -> float | None:
    (found,) = (p.price for p in pipeline.parse(plan.pipeline) if isinstance(p, Recompute))
    return found


def reason(plan: Plan) -> str:
    (found,) = (n.reason for n in plan.notes if n.action == "priced")
    return found


def test_where_all_fits_nothing_is_computed_again() -> None:
    plan = driver.compile(SMALL, kernels="none")
    assert price(plan) == 0.0 and "everything fits" in reason(plan)
    assert not [n for n in plan.notes if n.action == "recomputed"]


TIGHT = {"target": "h800", "precision": "bf16", "seq": 64, "micro_batch": 16, "kernels": "none"}


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Compiles a small model for an h800 that lacks `short` bytes of what it needs when everything is kept."""
    need = driver.compile(SMALL, **TIGHT).memory.peak_bytes  # type: ignore[arg-type]

    def run(short: int = 1_000_000, **flags: object) -> Plan:
        machine = replace(TARGETS["h800"].machine, memory_bytes=need - short)
        with monkeypatch.context() as patch:
            patch.setattr(driver, "find", lambda name: replace(TARGETS[name], machine=machine))
            return driver.compile(SMALL, **{**TIGHT, **flags})  # type: ignore[arg-type]

    return run


def test_the_lowest_price_that_fits_is_found(tight: Callable[..., Plan]) -> None:
    plan = tight()
    found = price(plan)
    assert found is not None and found > 0 and plan.memory.fits and f"{found:g} ms per GiB: the lowest" in reason(plan)
    assert [n for n in plan.notes if n.action == "recomputed"]
    with pytest.raises(InputError, match="this job needs"):
        tight(passes=plan.pipeline.replace(f"price={found}", f"price={found * 0.95}"))
    more = price(tight(short=2_000_000))
    assert more is not None and more > found


def test_a_plans_own_pipeline_makes_the_same_plan(tight: Callable[..., Plan]) -> None:
    plan = tight()
    again = tight(passes=plan.pipeline)
    assert again.ir == plan.ir and again.memory == plan.memory and again.pipeline == plan.pipeline


def test_stopping_early_does_not_change_the_price(tight: Callable[..., Plan]) -> None:
    assert price(tight(stop_after="recompute")) == price(tight())


def test_a_job_that_would_fit_but_for_its_activations_is_refused(tight: Callable[..., Plan]) -> None:
    with pytest.raises(InputError, match="this job needs"):
        tight(short=6_000_000)


def test_what_fits_at_no_price_is_refused_or_planned_with_the_published_choice() -> None:
    with pytest.raises(InputError, match=r"this job needs .* on a rank of h800, which has 77.0 GiB"):
        driver.compile("deepseek-v3", target="h800", kernels="none")
    plan = compiled("deepseek-v3")
    assert price(plan) == OVERSIZE_PRICE and not plan.memory.fits and "at no price" in reason(plan)
    again = {n.node for n in plan.notes if n.action == "recomputed" and n.node.startswith("moe_block.")}
    norms = ("attention.norm", "attention.q_norm", "attention.kv_norm", "mlp.norm")
    for part in (*norms, "attention.kv_up", "attention.q_up"):
        assert f"moe_block.{part}" in again
    assert "moe_block.attention.core" not in again


def test_a_price_that_is_given_stays() -> None:
    passes = "differentiate,recompute{price=7.5},cut,plan_buffers"
    plan = driver.compile(SMALL, kernels="none", passes=passes)
    assert plan.pipeline == passes and not [n for n in plan.notes if n.action == "priced"]


def test_without_plan_buffers_there_is_no_price() -> None:
    plan = driver.compile(SMALL, kernels="none", passes="differentiate,recompute,cut")
    assert price(plan) is None and plan.memory.peak_bytes == 0
    assert "memory has no price" in next(n.reason for n in plan.notes if n.pass_name == "recompute")


# ---- the same every time, and small ----------------------------------------------------------------------------------

MEASURE = """\
import hashlib, json, resource, sys
from dsv3c import driver
digests, peaks, heavy = [], [], []
for model, settings in {jobs!r}:
    plan = driver.compile(model, **settings)
    digests.append(hashlib.sha256(plan.to_bytes()).hexdigest())
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    heavy.append(sorted({{"torch", "transformers"}} & set(sys.modules)))
print(json.dumps([digests, peaks[0], heavy[0]]))
"""
JOBS = [
    ("deepseek-v3", {"target": "h800", "allow_oversize": True, "kernels": "none"}),
    ("deepseek-v3-mini", {"target": "h800", "micro_batch": MINI_BATCH, "kernels": "source"}),
    ("deepseek-v3-tiny", {"kernels": "none", "keep_ir": True}),
    ("deepseek-v3-tiny", {"kernels": "none", "mesh": "pp=2,dp=2,ep=2", "global_batch": 8, "seq": 64}),
]


@functools.cache
def measure(seed: str) -> tuple[list[str], int, list[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
    code = MEASURE.format(jobs=JOBS)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    digests, peak, heavy = json.loads(run.stdout)
    return digests, peak, heavy


def test_bytes_do_not_depend_on_the_hash_seed() -> None:
    assert measure("1")[0] == measure("2")[0]
    assert len({*measure("1")[0]}) == len(JOBS)


def test_671_billion_parameters_are_planned_without_holding_any() -> None:
    _, peak, heavy = measure("1")
    assert peak <= 1.5e9, f"{peak / 1e9:.2f} GB"
    assert heavy == [], "compiling needs no tensors"


# ---- flags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"job": "trian"}, "--job trian is unknown; did you mean 'train'?"),
        ({"kernels": "cubin"}, "--kernels cubin is unknown; known: binary, none, source"),
        ({"implementations": "fast"}, "--implementations fast is unknown; known: auto, generated, library"),
        ({"schedule": "dualpip"}, "--schedule dualpip is unknown; did you mean 'dualpipe'?"),
        ({"precision": "fp16"}, "--precision fp16 is unknown; did you mean"),
        ({"precision": "fp64", "target": "h800"}, "--precision fp64 runs on --target cpu only, not on h800"),
        ({"precision": "fp8"}, "--precision fp8 "),
        ({"target": "h80"}, "--target h80 is unknown; did you mean 'h800'?"),
        ({"mesh": "pp=0"}, "--mesh pp=0: 'pp=0' is not an axis"),
        ({"mesh": "dp=4,dp=4"}, "'dp=4' is not an axis"),
        ({"mesh": "dp=4,ep=3"}, "ep=3 does not divide dp=4"),
        ({"seq": 0}, "--seq 0 must be at least 1"),
        ({"seq": 1}, "--seq 1: the loss needs at least 2 tokens"),
        ({"seq": 65}, "--seq 65 exceeds the model's 64 positions"),
        ({"micro_batch": 0}, "--micro-batch 0 must be at least 1"),
        ({"micro_batch": -2}, "--micro-batch -2 must be at least 1"),
        ({"global_batch": 0}, "--global-batch 0 must be at least 1"),
        ({"micro_batch": 2, "global_batch": 5}, "--global-batch 5 is not a multiple of micro-batch × dp = 2"),
        ({"mesh": "dp=4", "global_batch": 6}, "--global-batch 6 is not a multiple of micro-batch × dp = 4"),
        ({"ranks_per_node": 0}, "--ranks-per-node 0 must be at least 1"),
        ({"document_end": 257}, "--document-end 257 is not a token of the model's 257"),
        ({"document_end": -1}, "--document-end -1 is not a token"),
        ({"expert_headroom": 0.9}, "--expert-headroom 0.9 must be at least 1, the balanced load"),
        ({"expert_headroom": float("nan")}, "--expert-headroom nan must be at least 1"),
        ({"passes": "fuse{singel=true}"}, "the pass 'fuse' has no option 'singel'; did you mean 'single'?"),
        ({"passes": "recompute{price=-1}"}, "the price of memory is -1.0 ms per GiB; it must be 0 or more"),
        ({"stop_after": "cutt"}, "--stop-after cutt: the pipeline has no such pass; did you mean 'cut'?"),
        ({"print_after": "fuze"}, "--print-after fuze: the pipeline has no such pass; did you mean 'fuse'?"),
    ],
    ids=lambda x: ",".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_a_flag_that_does_not_fit_is_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        driver.compile(SMALL, **{"kernels": "none", **flags})  # type: ignore[arg-type]
    assert message in str(error.value)


def test_a_serving_job_may_be_one_token_long() -> None:
    assert driver.compile(SMALL, job="decode", seq=1, kernels="none").job.seq == 1


def test_an_unknown_recipe_field_is_refused() -> None:
    with pytest.raises(InputError, match="unknown recipe field 'learning'"):
        driver.override_recipe(Recipe(), learning=1.0)
