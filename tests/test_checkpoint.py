"""Checkpoints in Hugging Face form: round trips through transformers, shards, FP8, every kind of bad file."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsv3c.errors import InputError, WorkError
from dsv3c.models.checkpoint import hf_shapes, hf_tensors, mtp_copies, part_shape, parts, weight_shapes
from dsv3c.models.config import ModelConfig
from dsv3c.models.presets import PRESETS

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from dsv3c.runtime import hf  # noqa: E402

SMALL = PRESETS["deepseek-v3-tiny"].override(
    "vocab_size=64,hidden_size=32,intermediate_size=48,moe_intermediate_size=16,num_hidden_layers=3,"
    "num_attention_heads=2,q_lora_rank=24,kv_lora_rank=16,qk_nope_head_dim=8,qk_rope_head_dim=4,v_head_dim=8,"
    "n_routed_experts=8,n_group=2,topk_group=1,num_experts_per_tok=2"
)
PLAIN = dataclasses.replace(SMALL, num_nextn_predict_layers=0)
Weights = dict[str, Any]


def random_weights(config: ModelConfig, dtype: Any = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(shape, generator=generator).to(torch.float32 if name.endswith("bias") else dtype)
        for name, shape in weight_shapes(config).items()
    }


def empty_weights(config: ModelConfig, dtype: Any = torch.float32) -> Weights:
    return {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in weight_shapes(config).items()}


def save(folder: Path, config: ModelConfig, weights: Weights, **options: Any) -> Path:
    return hf.save_hf(folder, config, hf_tensors(config, weights), **options)


def edit(folder: Path, change: Callable[[Weights], None]) -> None:
    tensors = load_file(folder / hf.SINGLE)
    change(tensors)
    save_file(tensors, folder / hf.SINGLE, metadata={"format": "pt"})


def their_model(folder: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()


def test_parts_cover_each_weight_once() -> None:
    for name, shape in weight_shapes(SMALL).items():
        seen = torch.zeros(shape, dtype=torch.int32)
        for part in parts(name, shape):
            assert tuple(seen[part.index].shape) == part_shape(shape, part.index) == hf_shapes(SMALL)[part.hf_name]
            seen[part.index] += 1
        assert bool((seen == 1).all()), name


@pytest.mark.parametrize("change", ["q_lora_rank=24", "q_lora_rank=null", "n_shared_experts=0", "n_shared_experts=2"])
def test_round_trip_through_transformers(change: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = SMALL.override(change)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of transformers' empty shared experts
        model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config.to_hf_dict())).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    tokens = torch.arange(20)[None] % config.vocab_size
    before = model(tokens).logits
    model.save_pretrained(tmp_path / "theirs")

    found = hf.checkpoint_config(tmp_path / "theirs")  # transformers writes no MTP module, but says that there is one
    assert found == dataclasses.replace(config, num_nextn_predict_layers=0)
    weights = empty_weights(found)
    loaded = hf.load_hf(tmp_path / "theirs", weights)
    assert loaded.tensors == len(hf_shapes(found))
    assert torch.equal(
        weights["model.layers.1.mlp.experts.gate_up_proj"], model.model.layers[1].mlp.experts.gate_up_proj
    )
    assert not any(bool(weight.isnan().any()) for weight in weights.values())

    save(tmp_path / "ours", found, weights)
    assert torch.equal(their_model(tmp_path / "ours")(tokens).logits, before)


def test_saved_bf16_loads_in_transformers_with_float32_bias(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    save(tmp_path / "out", SMALL, weights, dtype=torch.bfloat16)
    model = their_model(tmp_path / "out")
    assert model.lm_head.weight.dtype == torch.bfloat16
    gate = model.model.layers[1].mlp.gate
    assert torch.equal(gate.e_score_correction_bias, weights["model.layers.1.mlp.gate.e_score_correction_bias"])
    assert torch.equal(gate.weight, weights["model.layers.1.mlp.gate.weight"].bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == 1


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000, 1])
def test_round_trip_in_shards(max_shard_bytes: int, tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    save(tmp_path / "out", SMALL, weights, max_shard_bytes=max_shard_bytes)
    files = sorted(tmp_path.joinpath("out").glob("*.safetensors"))
    assert (len(files) == 1) == (max_shard_bytes == 10**9)
    again = empty_weights(SMALL)
    loaded = hf.load_hf(tmp_path / "out", again)
    assert sorted(loaded.ignored) == sorted(mtp_copies(SMALL))
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / hf.INDEX).read_text())
        assert set(index["weight_map"]) == set(hf_shapes(SMALL))
        assert index["metadata"]["total_size"] == sum(t.nbytes for _, t in hf_tensors(SMALL, weights))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_transformers_writes_shards_that_load(tmp_path: Path) -> None:
    weights = random_weights(PLAIN)
    save(tmp_path / "one", PLAIN, weights)
    their_model(tmp_path / "one").save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert (tmp_path / "many" / hf.INDEX).exists()
    again = empty_weights(PLAIN)
    hf.load_hf(tmp_path / "many", again)
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / name, SMALL, random_weights(SMALL), max_shard_bytes=50_000)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_our_safetensors_are_those_of_the_library(tmp_path: Path) -> None:
    save(tmp_path / "out", SMALL, random_weights(SMALL, torch.bfloat16))
    with safe_open(tmp_path / "out" / hf.SINGLE, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert opened.get_slice("lm_head.weight").get_dtype() == "BF16"


@pytest.mark.parametrize(("first", "second"), [(10**9, 50_000), (50_000, 10**9), (50_000, 50_000), (50_000, 20_000)])
def test_saving_over_a_checkpoint(first: int, second: int, tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    save(tmp_path, SMALL, weights, max_shard_bytes=first)
    (tmp_path / "tokenizer.json").write_text("{}")
    changed = {name: weight + 1 for name, weight in weights.items()}
    save(tmp_path, SMALL, changed, max_shard_bytes=second)
    again = empty_weights(SMALL)
    hf.load_hf(tmp_path, again)
    assert all(torch.equal(again[name], weight) for name, weight in changed.items())
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    used = {entry.file.name for entry in hf.read_entries(tmp_path).values()}
    assert {file.name for file in tmp_path.glob("*.safetensors")} == used


@pytest.mark.parametrize("second", [10**9, 50_000])
@pytest.mark.parametrize("first", [10**9, 50_000])
def test_an_interrupted_save_leaves_one_whole_checkpoint(
    first: int, second: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights(SMALL)
    changed = {name: weight + 1 for name, weight in weights.items()}
    replace, unlink = os.replace, Path.unlink
    outcomes = set()
    for stop in range(12):
        folder = tmp_path / str(stop)
        save(folder, SMALL, weights, max_shard_bytes=first)
        left = [stop]

        def count(left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", lambda *a, count=count: (count(), replace(*a)))
        monkeypatch.setattr(Path, "unlink", lambda *a, count=count, **k: (count(), unlink(*a, **k)))
        with contextlib.suppress(WorkError):
            save(folder, SMALL, changed, max_shard_bytes=second)
        monkeypatch.undo()
        again = empty_weights(SMALL)
        hf.load_hf(folder, again)
        old = all(torch.equal(again[name], weight) for name, weight in weights.items())
        new = all(torch.equal(again[name], weight) for name, weight in changed.items())
        assert old or new, f"a mixed checkpoint after {stop} steps"
        outcomes.add(new)
    assert outcomes == {False, True}


def block_quantize(weight: Any) -> tuple[Any, Any]:
    """E4M3 and scales in 128 x 128 blocks, as the released checkpoint has them."""
    rows, columns = (-(-size // 128) for size in weight.shape)
    quantized = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    scale = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            block = (slice(i * 128, i * 128 + 128), slice(j * 128, j * 128 + 128))
            scale[i, j] = weight[block].abs().max() / 448
            quantized[block] = (weight[block] / scale[i, j]).to(torch.float8_e4m3fn)
    return quantized, scale


WIDE = SMALL.override("hidden_size=160,kv_lora_rank=140,moe_intermediate_size=130")


def fp8_checkpoint(folder: Path) -> tuple[Weights, Weights]:
    """A checkpoint with e4m3 projections; returns its tensors and what they stand for, by Hugging Face name."""
    weights = random_weights(WIDE)
    save(folder, WIDE, weights)
    meant = dict(hf_tensors(WIDE, weights))

    def quantize(tensors: Weights) -> None:
        for name in [n for n in tensors if n.endswith("_proj.weight") or n.endswith("_mqa.weight")]:
            tensors[name], tensors[name + "_scale_inv"] = block_quantize(tensors[name])
            scale = tensors[name + "_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            rows, columns = tensors[name].shape
            meant[name] = tensors[name].float() * scale[:rows, :columns]

    edit(folder, quantize)
    return load_file(folder / hf.SINGLE), meant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fp8(dtype: Any, tmp_path: Path) -> None:
    _, meant = fp8_checkpoint(tmp_path)
    weights = empty_weights(WIDE, dtype)
    loaded = hf.load_hf(tmp_path, weights)
    assert "model.layers.0.self_attn.o_proj.weight_scale_inv" in loaded.ignored
    for name, tensor in hf_tensors(WIDE, weights):
        assert torch.equal(tensor, meant[name].to(dtype)), name


def test_fp8_scales_that_do_not_fit(tmp_path: Path) -> None:
    fp8_checkpoint(tmp_path)

    def spoil(tensors: Weights) -> None:
        del tensors["model.layers.0.self_attn.o_proj.weight_scale_inv"]
        tensors["model.layers.0.self_attn.q_a_proj.weight_scale_inv"] = torch.ones(1, 1)
        tensors["model.norm.weight_scale_inv"] = torch.ones(1)

    edit(tmp_path, spoil)
    with pytest.raises(InputError) as caught:
        hf.load_hf(tmp_path, empty_weights(WIDE))
    said = str(caught.value)
    assert "1 missing: model.layers.0.self_attn.o_proj.weight_scale_inv" in said
    assert "1 unexpected: model.norm.weight_scale_inv" in said
    assert "q_a_proj.weight_scale_inv is F32 [1, 1], it must be F32 [1, 2]" in said


def test_mtp_modules_that_the_model_has_not_are_passed_over(tmp_path: Path) -> None:
    save(tmp_path, SMALL, random_weights(SMALL))
    weights = empty_weights(PLAIN)
    loaded = hf.load_hf(tmp_path, weights)
    assert all(name.startswith("model.layers.3.") for name in loaded.ignored)
    assert hf.checkpoint_config(tmp_path) == SMALL


def test_layers_that_the_model_has_not_are_refused(tmp_path: Path) -> None:
    save(tmp_path, SMALL, random_weights(SMALL))
    with pytest.raises(InputError, match=r"unexpected: model.layers.2.input_layernorm.weight"):
        hf.load_hf(tmp_path, empty_weights(PLAIN.override("num_hidden_layers=2")))


def test_an_mtp_module_with_an_embedding_of_its_own_is_refused(tmp_path: Path) -> None:
    save(tmp_path, SMALL, random_weights(SMALL))
    edit(tmp_path, lambda tensors: tensors["model.layers.3.embed_tokens.weight"].add_(1))
    with pytest.raises(InputError, match=r"model.layers.3.embed_tokens.weight differs from model.embed_tokens.weight"):
        hf.load_hf(tmp_path, empty_weights(SMALL))


def test_an_mtp_module_without_copies_loads(tmp_path: Path) -> None:
    own = {name: t for name, t in hf_tensors(SMALL, random_weights(SMALL)) if name not in mtp_copies(SMALL)}
    save_file({name: t.contiguous() for name, t in own.items()}, tmp_path / hf.SINGLE)
    assert hf.load_hf(tmp_path, empty_weights(SMALL)).ignored == ()


def test_all_that_does_not_fit_is_listed_at_once_and_nothing_copied(tmp_path: Path) -> None:
    save(tmp_path, SMALL, random_weights(SMALL))

    def spoil(tensors: Weights) -> None:
        del tensors["model.layers.1.mlp.experts.5.up_proj.weight"], tensors["model.norm.weight"]
        tensors["model.extra.weight"] = torch.ones(2)
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.ones(7, 32)
        tensors["lm_head.weight"] = torch.ones(64, 32, dtype=torch.int32)

    edit(tmp_path, spoil)
    weights = empty_weights(SMALL)
    with pytest.raises(InputError) as caught:
        hf.load_hf(tmp_path, weights)
    said = str(caught.value)
    for phrase in (
        "2 missing: model.layers.1.mlp.experts.5.up_proj.weight, model.norm.weight",
        "1 unexpected: model.extra.weight",
        "2 misshapen: model.layers.0.mlp.gate_proj.weight is [7, 32], the model's is [48, 32]",
        "lm_head.weight has element type I32",
    ):
        assert phrase in said
    assert all(bool(weight.isnan().all()) for weight in weights.values())


def rewrite(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-100],
        lambda data: data[:4],
        lambda data: b"",
        lambda data: data + b"more",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"}" + data[9:],
        lambda data: data.replace(b'"F32"', b'"F31"', 1),
        lambda data: data.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
    ],
    ids="truncated header empty longer length json dtype offset".split(),  # noqa: SIM905
)
@pytest.mark.parametrize("max_shard_bytes", [10**9, 50_000])
def test_damaged_files(change: Callable[[bytes], bytes], max_shard_bytes: int, tmp_path: Path) -> None:
    save(tmp_path, SMALL, random_weights(SMALL), max_shard_bytes=max_shard_bytes)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    rewrite(file, change)
    weights = empty_weights(SMALL)
    with pytest.raises(InputError) as caught:
        hf.load_hf(tmp_path, weights)
    assert str(file) in str(caught.value)
    assert all(bool(weight.isnan().all()) for weight in weights.values())


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        hf.load_hf(tmp_path / "none", {})
    with pytest.raises(InputError, match=r"holds neither model.safetensors nor"):
        hf.load_hf(tmp_path, {})
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickled"):
        hf.load_hf(tmp_path, {})


@pytest.mark.parametrize(
    "text", ["{", "{}", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../b.safetensors"}}']
)
def test_bad_indices(text: str, tmp_path: Path) -> None:
    (tmp_path / hf.INDEX).write_text(text)
    with pytest.raises(InputError, match="not an index of safetensors"):
        hf.load_hf(tmp_path, {})


def test_a_shard_that_is_gone_and_one_that_lost_tensors(tmp_path: Path) -> None:
    save(tmp_path, SMALL, random_weights(SMALL), max_shard_bytes=50_000)
    index = json.loads((tmp_path / hf.INDEX).read_text())
    index["weight_map"]["model.more.weight"] = sorted(index["weight_map"].values())[0]
    (tmp_path / hf.INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"names tensors that their files do not hold: model.more.weight"):
        hf.load_hf(tmp_path, empty_weights(SMALL))
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="missing, though the checkpoint's index names it"):
        hf.load_hf(tmp_path, empty_weights(SMALL))


def test_output_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(SMALL)
    (tmp_path / "file").write_text("kept")
    with pytest.raises(WorkError, match="cannot be written"):
        save(tmp_path / "file" / "out", SMALL, weights)
    with pytest.raises(WorkError, match="cannot be written"):
        save(tmp_path / "file", SMALL, weights)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkError, match="out: the checkpoint cannot be written: No space left on device"):
        save(tmp_path / "out", SMALL, weights)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


def test_an_incomplete_model_is_not_saved(tmp_path: Path) -> None:
    tensors = list(hf_tensors(SMALL, random_weights(SMALL)))
    for wrong in (tensors[1:], [*tensors, tensors[0]], [("odd", tensors[0][1]), *tensors]):
        with pytest.raises(ValueError, match="save_hf"):
            hf.save_hf(tmp_path / "out", SMALL, wrong)
    assert list(tmp_path.iterdir()) == []
