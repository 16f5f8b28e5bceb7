"""Four processes hold a model's weights on several meshes: what they train, save, load and export is one rank's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_process import gradient
from rank_scenarios import MESHES, READ, RECIPE, SEED
from safetensors.torch import load_file
from small import SMALL

import dsv3c
from dsv3c.job import Mesh, Recipe
from dsv3c.models import MODELS
from dsv3c.models.config import load_config
from dsv3c.ops import REGISTRY
from dsv3c.plan import Plan
from dsv3c.runtime.epilogue import Epilogue
from dsv3c.runtime.executor import Engine
from dsv3c.runtime.export import export, write_hf
from dsv3c.runtime.identity import differences, moved, run_facts
from dsv3c.runtime.state import SavedState, load_info, load_state, save_state
from dsv3c.runtime.tokenizer import load_tokenizer
from dsv3c.runtime.weights import Weights
from dsv3c.targets import find

HERE = Path(__file__).parent
STEP = Path("checkpoints") / "step-000002"


def environment() -> dict[str, str]:
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def plan() -> Plan:
    """Two layers and an MTP module in bfloat16, so that the prologue alone reads most masters; nothing is clipped."""
    passes = "differentiate,hoist,eliminate,cut"
    return dsv3c.compile(
        SMALL, seq=16, micro_batch=2, passes=passes, precision="bf16", recipe=replace(RECIPE, clip=1e9)
    )


@pytest.fixture(scope="module")
def out(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the four ranks left."""
    folder = tmp_path_factory.mktemp("ranks")
    plan.save(folder / "small.plan")
    save_state(folder / "one", 2, expected(plan, None).state(), {"seed": SEED})
    script = HERE / "rank_scenarios.py"
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), "4", folder], env=environment(), stderr=subprocess.PIPE)
        for rank in range(4)
    ]
    said = [rank.communicate(timeout=300)[1].decode() for rank in ranks]
    done = [path.read_text() for path in sorted(folder.glob("rank-?.txt"))]
    assert done == ["done"] * 4, "\n".join(said)
    return folder


@pytest.fixture(scope="module")
def told(out: Path) -> list[dict[str, Any]]:
    """What each rank told."""
    return [json.loads((out / f"told-{rank}.json").read_text()) for rank in range(4)]


def holders(name: str, mesh: Mesh, one_stage_each: bool) -> list[int]:
    """The ranks that add to a weight's gradient, ascending."""
    if not one_stage_each:
        return list(range(mesh.world))
    second = not name.startswith(("model.embed", "model.layers.0."))
    stages = (0, 1) if name.startswith("model.embed") else (int(second),)
    return [stage * mesh.dp + dp for stage in stages for dp in range(mesh.dp)]


def expected(plan: Plan, name: str | None) -> Weights:
    """The weights of one rank after the step that the four made on a mesh; None: before any step."""
    weights = Weights(plan.program, "cpu")
    weights.initialize(SEED, MODELS[plan.program.name].parts)
    if name is None:
        return weights
    mesh = MESHES[name][0]
    for weight, target in weights.gradients().items():
        target.zero_()
        for rank in holders(weight, mesh, name == "1f1b"):
            given = gradient(weight, rank, tuple(target.shape))
            if ".experts." in weight:
                mine = len(target) // mesh.ep
                rows = slice(rank % mesh.ep * mine, (rank % mesh.ep + 1) * mine)
                target[rows] += given[rows]
            else:
                target += given
    epilogue = Epilogue(Engine.of(plan, find("cpu"), REGISTRY), weights, RECIPE)
    epilogue.update(RECIPE.lr, 1, epilogue.squares())
    for router in (n for n in weights.tensors if n.endswith("e_score_correction_bias")):
        epilogue.update_bias(router, torch.arange(8.0))
    return weights


def same(a: Weights, b: Weights) -> bool:
    return all(torch.equal(t, b.state()[n]) for n, t in a.state().items())


def loaded(plan: Plan, path: Path) -> Weights:
    weights = Weights(plan.program, "cpu")
    load_state(path, weights.state())
    return weights


# ---- one step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
def test_initial_weights_do_not_depend_on_the_mesh(mesh: str, plan: Plan, out: Path) -> None:
    assert same(loaded(plan, out / mesh / "checkpoints" / "step-000001"), expected(plan, None))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_step_is_that_of_one_rank_on_the_summed_gradients(mesh: str, plan: Plan, out: Path) -> None:
    before, after = expected(plan, None), expected(plan, mesh)
    assert not any(torch.equal(before.tensors[n], after.tensors[n]) for n in before.tensors)
    assert same(loaded(plan, out / mesh / STEP), after)


@pytest.mark.parametrize("mesh", MESHES)
def test_the_norm_is_that_of_all_gradients(mesh: str, plan: Plan, out: Path, told: list[dict[str, Any]]) -> None:
    total = sum(float(g.double().square().sum()) for g in expected(plan, mesh).gradients().values())
    assert [rank[f"{mesh} squares"] for rank in told] == [pytest.approx(total, rel=1e-5)] * 4
    assert len({rank[f"{mesh} squares"] for rank in told}) == 1


@pytest.mark.parametrize("mesh", MESHES)
def test_a_rank_holds_its_stages_and_experts_whole(mesh: str, plan: Plan, told: list[dict[str, Any]]) -> None:
    weights = expected(plan, None)
    for rank, words in enumerate(told):
        assert words[f"{mesh} equal"]
        held = words[f"{mesh} held"]
        names = {n for n in weights.gradients() if rank in holders(n, MESHES[mesh][0], mesh == "1f1b")}
        if MESHES[mesh][0].dp > 1:  # the other ranks of its pipeline rank hold the same weights
            assert set(held) == names
        ep = MESHES[mesh][0].ep
        for name, total in held.items():
            mine = weights.tensors[name].double()
            if ".experts." in name:
                mine = mine.chunk(ep)[rank % ep]
            assert total == pytest.approx(mine.sum().item(), abs=1e-9)
        bound = words[f"{mesh} bound"]
        assert all("norm" in n or "router" in n or "mlp.gate." in n for n in bound), "the prologue reads the others"
        assert any("norm" in n for n in bound)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_every_rank_writes_a_file_and_positions_are_those_of_whole_weights(out: Path) -> None:
    folder = out / "dualpipe" / STEP
    files = [f"state-0000{rank}-of-00004.safetensors" for rank in range(4)]
    assert sorted(p.name for p in folder.iterdir()) == ["info.json", *files]
    assert [p.name for p in folder.parent.iterdir() if p.name.startswith(".")] == []
    info = json.loads((folder / "info.json").read_text())
    assert info["mesh"] == "pp=2,dp=2,ep=2,tp=1" and info["info"] == {"seed": SEED, "step": 2} == load_info(folder)
    saved = SavedState(folder)
    for file in files:
        for name, tensor in load_file(folder / file).items():
            whole, _, span = name.partition("[")
            start, stop = map(int, span.rstrip("]").split(":")) if span else (0, tensor.numel())
            assert torch.equal(saved.tensor(whole).reshape(-1)[start:stop], tensor.reshape(-1))
    experts = info["tensors"]["master.model.layers.1.mlp.experts.gate_up_proj"]
    half = 4 * 64 * 32  # experts of one rank, gate and up rows, columns
    assert experts["shape"] == [8, 64, 32] and half in [start for start, *_ in experts["pieces"]]


@pytest.mark.parametrize(("mesh", "other"), [(mesh, other) for mesh, others in READ.items() for other in others])
def test_any_mesh_reads_the_checkpoint_of_another(mesh: str, other: str, plan: Plan, out: Path) -> None:
    assert same(loaded(plan, out / f"{other}-{mesh}" / STEP), loaded(plan, out / other / STEP))


def test_what_one_rank_cannot_write_all_ranks_tell(told: list[dict[str, Any]], plan: Plan, out: Path) -> None:
    (said,) = {rank["full"] for rank in told}
    assert said == (
        f"WorkError: rank 2: cannot write the checkpoint of step 3 to {out / 'dualpipe' / 'checkpoints'}: No space "
        "left on device; the one of step 2 is untouched. Make room or choose another --out, then continue with "
        "--resume."
    )
    assert sorted(p.name for p in (out / "dualpipe" / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_a_damaged_file_is_named_on_every_rank(told: list[dict[str, Any]], out: Path) -> None:
    (said,) = {rank["damaged"] for rank in told}
    folder = out / "damaged" / "checkpoints"
    assert said == (
        f"InputError: --resume: {folder}/step-000002/state-00001-of-00004.safetensors is damaged (its hash does not "
        f"match); {folder}/step-000001 is whole: delete {folder}/step-000002 to resume from it."
    )
    assert all(rank["kept"] for rank in told)


def test_another_model_and_a_missing_checkpoint_are_refused_on_every_rank(told: list[dict[str, Any]]) -> None:
    (other,) = {rank["other"] for rank in told}
    assert "was written by another model: 3 tensors differ" in other
    assert "master.model.layers.0.mlp.down_proj.weight: F32[32, 64] is not in this model" in other
    (none,) = {rank["no hf"] for rank in told}
    assert none.startswith("InputError:") and "nowhere: no such directory" in none


# ---- Hugging Face ---------------------------------------------------------------------------------------------------


def read_hf(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor, as the index says."""
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in sorted(set(index.values()))}
    assert sorted(n for tensors in files.values() for n in tensors) == sorted(index)
    return {name: files[file][name] for name, file in index.items()}


@pytest.mark.parametrize("mesh", MESHES)
def test_the_export_from_shards_is_that_of_one_rank(mesh: str, plan: Plan, out: Path, tmp_path: Path,
                                                    told: list[dict[str, Any]]) -> None:  # fmt: skip
    config = load_config(out / mesh / "hf")
    write_hf(tmp_path, config, loaded(plan, out / mesh / STEP).tensors, load_tokenizer("bytes"))
    theirs, ours = read_hf(out / mesh / "hf"), read_hf(tmp_path)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[n], t) for n, t in ours.items())
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (out / mesh / "hf" / name).read_bytes() == (tmp_path / name).read_bytes()
    written = [rank[f"{mesh} written"] for rank in told]
    assert sum(written) == len(ours) - 2 and min(written) > 0  # an MTP module repeats embedding and head
    assert len(list((out / mesh / "hf").glob("*.safetensors"))) == 4
    assert not list(out.glob(f"{mesh}/.*"))


def test_the_export_of_a_checkpoint_needs_no_mesh(plan: Plan, out: Path, tmp_path: Path) -> None:
    plan.save(out / "experts" / "train.plan")
    assert read_hf(export(out / "experts", out=tmp_path / "hf")).keys() == read_hf(out / "experts" / "hf").keys()
    for name, tensor in read_hf(out / "experts" / "hf").items():
        assert torch.equal(read_hf(tmp_path / "hf")[name], tensor)


@pytest.mark.parametrize("mesh", MESHES)
def test_ranks_start_from_a_hugging_face_checkpoint(mesh: str, plan: Plan, out: Path) -> None:
    started = loaded(plan, out / f"{mesh}-hf" / "checkpoints" / "step-000001")
    trained = loaded(plan, out / mesh / STEP)
    assert all(torch.equal(started.tensors[n], t) for n, t in trained.tensors.items())


# ---- the same run on another mesh -----------------------------------------------------------------------------------


def test_a_run_goes_on_on_another_mesh_but_not_as_another_run(plan: Plan) -> None:
    def facts(recipe: Recipe = RECIPE, **changes: Any) -> dict[str, Any]:
        other = replace(plan, job=replace(plan.job, **changes))
        return run_facts(other, recipe, seed=0, steps=4, data="d", tokenizer="t")

    ranks: dict[str, Any] = {"mesh": Mesh(2, 2, 2), "schedule": "dualpipe", "micro_batch": 1}
    assert differences(facts(), facts(**ranks)) == [] == differences(facts(**ranks), facts())
    assert moved(facts(), facts()) is None
    assert moved(facts(), facts(**ranks)) == (
        "going on with mesh pp=2,dp=2,ep=2,tp=1 (was pp=1,dp=1,ep=1,tp=1), schedule dualpipe (was auto): the same "
        "numbers up to rounding"
    )
    assert differences(facts(), facts(micro_batch=1)) == ["job.micro_batch is 1, was 2"]
    assert differences(facts(), facts(**ranks, seq=8)) == ["job.seq is 8, was 16"]
    assert differences(facts(), facts(**ranks, global_batch=8)) == ["job.global_batch is 8, was 2"]
    assert differences(facts(), facts(**ranks, precision="fp32")) == ["job.precision is fp32, was bf16"]
    assert differences(facts(), facts(Recipe(lr=1.0), **ranks)) == ["recipe.lr is 1.0, was 0.01"]
