"""The certificate: it passes for the reference itself and fails for every kind of wrong answer."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dsv3c.errors import InputError
from dsv3c.runtime.parity import ReferenceResult, Tolerances, compare, reference_run
from dsv3c.runtime.reference import _dequantized, sample_tokens


@dataclass(frozen=True)
class Fake:
    """A session that answers what it was told to."""

    logits: Tensor
    grads: Mapping[str, Tensor]
    experts: Mapping[int, Tensor]

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits

    def gradients(self, tokens: Tensor) -> Mapping[str, Tensor]:
        return self.grads

    def expert_choices(self, tokens: Tensor) -> Mapping[int, Tensor]:
        return self.experts


def reference() -> ReferenceResult:
    generator = torch.Generator().manual_seed(0)
    tokens = sample_tokens(11, 2, 5)
    return ReferenceResult(
        tokens=tokens,
        dtype="fp32",
        logits=torch.randn(2, 5, 11, generator=generator),
        loss=2.5,
        gradients={"a.weight": torch.randn(4, 3, generator=generator), "b.weight": torch.full((2,), 1e-9)},
        experts={1: torch.rand(2, 5, 8, generator=generator).argsort(-1)[..., :3].sort(-1).values},
        margins={1: torch.full((2, 5), 0.125)},
        source="a reference",
    )


def same(r: ReferenceResult) -> Fake:
    return Fake(r.logits, r.gradients, r.experts)


def test_equal_answers_pass() -> None:
    r = reference()
    certificate = compare(replace(same(r), experts={1: r.experts[1].flip(-1)}), r)  # the order within a token is free
    assert certificate.passed and certificate.logits_error == 0 and certificate.choices == 10
    assert certificate.render().startswith("PASSED")
    assert json.loads(certificate.to_json())["passed"] is True


def test_wrong_logits_fail() -> None:
    r = reference()
    certificate = compare(replace(same(r), logits=r.logits * (1 + 1e-4)), r)
    assert not certificate.passed and certificate.logits_error == pytest.approx(1e-4, rel=1e-2)
    assert compare(replace(same(r), logits=r.logits * (1 + 1e-4)), r, Tolerances(1e-3, 1e-3)).passed
    assert "FAILED" in certificate.render() and "logits differ" in certificate.render()
    assert not compare(replace(same(r), logits=torch.full_like(r.logits, math.nan)), r).passed
    assert not compare(replace(same(r), logits=r.logits[:, :4]), r).passed


def test_not_a_number_is_readable_json() -> None:
    r = reference()
    certificate = compare(replace(same(r), logits=torch.full_like(r.logits, math.nan)), r)
    assert json.loads(certificate.to_json())["logits_error"] is None


def test_wrong_experts_fail_with_their_margin() -> None:
    r = reference()
    wrong = r.experts[1].clone()
    wrong[1, 3, 0] = next(e for e in range(8) if e not in wrong[1, 3].tolist())
    certificate = compare(replace(same(r), experts={1: wrong}), r)
    assert not certificate.passed
    [mismatch] = certificate.mismatches
    assert (mismatch.layer, mismatch.sequence, mismatch.position, mismatch.margin) == (1, 1, 3, 0.125)
    assert mismatch.reference == tuple(r.experts[1][1, 3].tolist()) != mismatch.ours
    assert "layer 1, sequence 1, position 3" in certificate.render()
    for experts in ({}, {1: r.experts[1], 2: r.experts[1]}, {1: r.experts[1][..., :2]}):
        assert not compare(replace(same(r), experts=experts), r).passed


def test_wrong_gradients_fail_and_the_worst_is_named() -> None:
    r = reference()
    grads = r.gradients | {"a.weight": r.gradients["a.weight"] * 1.01}
    certificate = compare(replace(same(r), grads=grads), r)
    assert not certificate.passed and certificate.gradients[0].name == "a.weight"
    assert certificate.gradients_error == pytest.approx(0.01, rel=1e-3)
    assert not compare(replace(same(r), grads={"a.weight": r.gradients["a.weight"]}), r).passed
    nan = r.gradients | {"a.weight": torch.full((4, 3), math.nan)}
    assert not compare(replace(same(r), grads=nan), r).passed
    assert not compare(replace(same(r), grads=r.gradients | {"a.weight": torch.zeros(3, 4)}), r).passed


def test_tiny_gradients_are_measured_against_the_global_norm() -> None:
    r = reference()
    assert compare(replace(same(r), grads=r.gradients | {"b.weight": torch.full((2,), 1.5e-9)}), r).passed
    assert not compare(replace(same(r), grads=r.gradients | {"b.weight": torch.full((2,), 1e-7)}), r).passed


def test_untrained_weights_may_have_zero_gradients_only() -> None:
    r = reference()
    assert compare(replace(same(r), grads=r.gradients | {"mtp": torch.zeros(3)}), r).passed
    assert not compare(replace(same(r), grads=r.gradients | {"mtp": torch.ones(3)}), r).passed


def test_unknown_precision_is_refused() -> None:
    r = replace(reference(), dtype="bf16")
    with pytest.raises(InputError, match="bf16"):
        compare(same(r), r)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=1, n_routed_experts=8, kv_lora_rank=16,
        q_lora_rank=16, qk_rope_head_dim=8, v_head_dim=8, qk_nope_head_dim=8, n_group=4, topk_group=2,
        num_experts_per_tok=3, first_k_dense_replace=1, max_position_embeddings=64, num_nextn_predict_layers=0,
        pad_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    out = tmp_path_factory.mktemp("hf")
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(out)
    return out


def test_reference_run_gives_the_checkpoints_names(folder: Path) -> None:
    from safetensors.torch import load_file

    tokens = sample_tokens(50, 2, 9)
    r32, r64 = reference_run(folder, tokens, "fp32"), reference_run(folder, tokens, "fp64")
    stored = load_file(str(folder / "model.safetensors"))
    assert set(r32.gradients) == {n for n in stored if not n.endswith("e_score_correction_bias")}
    assert all(g.shape == stored[n].shape for n, g in r32.gradients.items())
    assert r32.logits.shape == (2, 9, 50) and r64.logits.dtype == torch.float64
    assert list(r32.experts) == [1] and r32.experts[1].shape == (2, 9, 3) and (r32.margins[1] > 0).all()
    # Two precisions of one implementation agree to float32 and not to float64.
    as_float32 = replace(r64, dtype="fp32")
    assert compare(Fake(r32.logits, r32.gradients, r32.experts), as_float32).passed
    assert not compare(Fake(r32.logits, r32.gradients, r32.experts), r64).passed


def test_bad_checkpoints_are_refused_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    tokens = sample_tokens(50, 1, 4)
    config = (folder / "config.json").read_text()
    weights = (folder / "model.safetensors").read_bytes()

    def refused(match: str, config: str | None, weights: bytes | None) -> None:
        for name, content in (
            ("config.json", None if config is None else config.encode()),
            ("model.safetensors", weights),
        ):
            (tmp_path / name).unlink(missing_ok=True)
            if content is not None:
                (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=match) as caught:
            reference_run(tmp_path, tokens)
        assert "\n" not in str(caught.value)

    refused("config.json", None, weights)
    refused("not JSON", "{", weights)
    refused("model type 'llama'", json.dumps(json.loads(config) | {"model_type": "llama"}), weights)
    refused("refuses", json.dumps(json.loads(config) | {"hidden_size": "wide"}), weights)
    refused("damaged", config, weights[:-100])
    refused("cannot load", config, None)
    refused("lacks", json.dumps(json.loads(config) | {"num_hidden_layers": 3}), weights)
    with pytest.raises(InputError, match="below 50"):
        reference_run(folder, torch.tensor([[1, 50]]))
    with pytest.raises(InputError, match="bf16"):
        reference_run(folder, tokens, "bf16")


def test_missing_transformers_is_an_input_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install transformers"):
        reference_run(folder, sample_tokens(50, 1, 4))


def test_fp8_checkpoint_is_dequantized_by_blocks(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = {}
    for name, w in load_file(str(folder / "model.safetensors")).items():
        if w.dim() == 2 and "proj" in name:
            scale = w.abs().max() / 448
            tensors[name] = (w / scale).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale.reshape(1, 1).float()
        else:
            tensors[name] = w
    save_file(tensors, str(tmp_path / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    tokens = sample_tokens(50, 1, 6)
    exact, rounded = reference_run(folder, tokens), reference_run(tmp_path, tokens)
    error = (exact.logits - rounded.logits).norm() / exact.logits.norm()
    assert 1e-4 < error < 0.5

    big = torch.randn(200, 130)
    scale = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    save_file({"w": big.to(torch.float8_e4m3fn), "w_scale_inv": scale}, str(tmp_path / "model.safetensors"))
    w = _dequantized(tmp_path)["w"]
    assert torch.equal(w[150, 129], big[150, 129].to(torch.float8_e4m3fn).float() * 8)
    assert torch.equal(w[150, 5], big[150, 5].to(torch.float8_e4m3fn).float() * 4)
