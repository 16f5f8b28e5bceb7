"""Model configurations: what is read, refused and written, overrides, presets and exact parameter counts."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from dsv3c.errors import InputError
from dsv3c.models.checkpoint import hf_shapes, mtp_copies, weight_shapes
from dsv3c.models.config import ModelConfig, load_config, parameter_count
from dsv3c.models.presets import PRESETS, resolve_model
from dsv3c.models.yarn import Yarn

TINY = PRESETS["deepseek-v3-tiny"]
V3 = PRESETS["deepseek-v3"]


def tiny_json(**changes: object) -> dict[str, object]:
    return {**TINY.to_hf_dict(), **changes}


def test_counts_of_the_671b_model() -> None:
    counts = parameter_count(V3)
    assert counts.total == 671_026_419_200
    assert counts.active == 37_552_297_472
    assert counts.active_without_embedding == 36_625_618_432
    assert round(counts.mtp_own / 1e9, 3) == 11.610
    assert round(counts.mtp_with_shared / 1e9, 3) == 13.463
    assert round(counts.checkpoint / 1e9, 3) == 684.490


@pytest.mark.parametrize(
    ("name", "billions"),
    [("16b", 15.7065), ("mini", 3.1236), ("slice", 2.3489), ("tiny", 0.0075)],
)
def test_counts_of_the_presets(name: str, billions: float) -> None:
    assert round(parameter_count(PRESETS[f"deepseek-v3-{name}"]).total / 1e9, 4) == billions


@pytest.mark.parametrize("config", [*PRESETS.values(), TINY.override("q_lora_rank=null,n_shared_experts=0")])
def test_counts_are_the_sum_of_the_shapes(config: ModelConfig) -> None:
    counts = parameter_count(config)
    shapes = hf_shapes(config)
    assert sum(map(math.prod, shapes.values())) == counts.checkpoint
    assert sum(map(math.prod, weight_shapes(config).values())) == counts.total + counts.mtp_own
    assert sum(math.prod(shapes[name]) for name in mtp_copies(config)) == counts.mtp_with_shared - counts.mtp_own


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DeepseekV3Config()
    for f in dataclasses.fields(ModelConfig):
        if f.default is not dataclasses.MISSING and hasattr(theirs, f.name) and f.name != "rope_scaling":
            assert getattr(theirs, f.name) == f.default, f.name
    assert theirs.rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_round_trip_through_transformers(config: ModelConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf_dict("bfloat16")))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "DeepseekV3Config"
    assert str(theirs.dtype) == "torch.bfloat16"
    theirs.save_pretrained(tmp_path / "again")
    assert load_config(tmp_path / "again") == config
    full = json.loads(theirs.to_json_string(use_diff=False))
    assert ModelConfig.from_dict(full) == config


@pytest.mark.parametrize(
    "config",
    [*PRESETS.values(), TINY.override("eos_token_id=[1,2],rope_scaling.factor=8,rope_scaling.mscale_all_dim=1")],
)
def test_round_trip_through_our_reader(config: ModelConfig) -> None:
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_hf_dict())))
    assert again == config and hash(again) == hash(config)
    assert again.to_hf_dict() == config.to_hf_dict()


def test_informational_fields_are_written_back() -> None:
    config = ModelConfig.from_dict(tiny_json(aux_loss_alpha=0.001, seq_aux=True, pad_token_id=None, torch_dtype="bf16"))
    assert config == TINY
    written = config.to_hf_dict()
    assert (written["aux_loss_alpha"], written["seq_aux"], written["pad_token_id"]) == (0.001, True, None)
    assert "torch_dtype" not in written


def test_both_forms_of_rope_settings() -> None:
    yarn = {"factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    base = {k: v for k, v in tiny_json().items() if k not in ("rope_scaling", "rope_theta")}
    old = ModelConfig.from_dict({**base, "rope_scaling": {"type": "yarn", **yarn}, "rope_theta": 5000})
    new = ModelConfig.from_dict({**base, "rope_parameters": {"rope_type": "yarn", "rope_theta": 5000.0, **yarn}})
    assert old == new
    assert old.rope_theta == 5000.0
    assert old.rope_scaling == Yarn(
        factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    )  # fmt: skip
    assert old.rope_scaling.attention_factor == 1.0
    plain = ModelConfig.from_dict({**base, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}})
    assert plain.rope_scaling is None and plain.rope_theta == 5000.0
    by_length = ModelConfig.from_dict(
        {**base, "max_position_embeddings": 8192, "rope_scaling": {"type": "yarn", **yarn, "factor": None}}
    )
    assert by_length.rope_scaling is not None and by_length.rope_scaling.factor == 2.0


def test_softmax_scale_of_the_released_model() -> None:
    assert V3.softmax_scale == pytest.approx(0.135234, abs=1e-6)
    assert TINY.softmax_scale == pytest.approx(96**-0.5)


@pytest.mark.parametrize("settings", [{}, {"mscale": 0.7, "mscale_all_dim": 1.2}, {"mscale": 1.0}])
def test_yarn_factors_are_those_of_transformers(settings: dict[str, float]) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    scaling = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, **settings}
    config = ModelConfig.from_dict(tiny_json(rope_scaling=scaling, max_position_embeddings=163840))
    theirs = transformers.DeepseekV3Config(**config.to_hf_dict())
    assert config.rope_scaling is not None
    assert ROPE_INIT_FUNCTIONS["yarn"](theirs)[1] == pytest.approx(config.rope_scaling.attention_factor, rel=1e-15)
    scale = yarn_apply_mscale(theirs.rope_parameters, 96**-0.5)
    assert scale == pytest.approx(config.softmax_scale, rel=1e-15)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_sise": 3}, "unknown field hidden_sise, did you mean 'hidden_size'?"),
        ({"hidden_size": "256"}, 'hidden_size = "256", but it must be a positive integer'),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"hidden_size": 256.0}, "hidden_size = 256.0, but it must be a positive integer"),
        ({"hidden_size": True}, "hidden_size = true"),
        ({"norm_topk_prob": 1}, "norm_topk_prob = 1, but it must be true or false"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps"),
        ({"num_experts_per_tok": 9}, "more than the 8 experts left in topk_group = 2 of n_group = 4 groups"),
        ({"n_group": 3}, "n_routed_experts = 16 does not divide into n_group = 3"),
        ({"n_group": 16}, "a group is scored by its two best"),
        ({"topk_group": 5}, "topk_group = 5 is more than n_group = 4"),
        ({"qk_rope_head_dim": 31}, "qk_rope_head_dim = 31 is odd"),
        ({"first_k_dense_replace": 5}, "first_k_dense_replace = 5 is more than num_hidden_layers = 4"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2 is not supported, it must equal num_attention_heads"),
        ({"head_dim": 7}, "head_dim = 7"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1, but it must be 0.0: dropout is not supported"),
        ({"attention_bias": True}, "attention_bias = true"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = true"),
        ({"hidden_act": "gelu"}, 'hidden_act = "gelu", but it must be "silu"'),
        ({"scoring_func": "softmax"}, 'scoring_func = "softmax"'),
        ({"topk_method": "greedy"}, 'topk_method = "greedy"'),
        ({"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        ({"model_type": "llama"}, 'model_type = "llama" is not supported, only "deepseek_v3"'),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_mtp_layers": 3}, "num_mtp_layers and num_nextn_predict_layers are the same field and disagree"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_scaling.type = "linear" is not supported'),
        ({"rope_scaling": {"type": "yarn", "factr": 2.0}}, "unknown field rope_scaling.factr, did you mean 'factor'?"),
        ({"rope_scaling": {"type": "yarn"}}, "missing field rope_scaling.factor"),
        ({"rope_scaling": {"type": "yarn", "factor": "40"}}, 'rope_scaling.factor = "40"'),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 3.0}}, "attention_factor is not supported"),
        ({"rope_scaling": 40}, "rope_scaling = 40, but it must be an object or null"),
        (
            {"rope_parameters": {"rope_theta": 5.0}},
            "rope_theta = 10000.0 and rope_parameters.rope_theta = 5.0 disagree",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(InputError) as caught:
        ModelConfig.from_dict(tiny_json(**changes), "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")
    assert said in str(caught.value)


def test_all_missing_fields_are_listed() -> None:
    mapping = tiny_json()
    for name in ("hidden_size", "kv_lora_rank", "q_lora_rank"):
        del mapping[name]
    with pytest.raises(InputError, match="missing fields hidden_size, q_lora_rank, kv_lora_rank"):
        ModelConfig.from_dict(mapping)


def test_the_constructor_checks_too() -> None:
    with pytest.raises(InputError, match="qk_rope_head_dim = 5 is odd"):
        dataclasses.replace(TINY, qk_rope_head_dim=5)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[1]", "holds a list"),
        (b'{"rms_norm_eps": NaN}', "NaN is no JSON number"),
        (b"", "not JSON"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(InputError, match=said):
        load_config(file)


def test_models_by_name_path_and_override(tmp_path: Path) -> None:
    folder = tmp_path / "odd:name"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY.to_hf_dict()))
    assert resolve_model("deepseek-v3-tiny") == ("deepseek-v3-tiny", TINY)
    assert resolve_model(folder) == ("odd:name", TINY)
    assert resolve_model(str(folder / "config.json")) == ("odd:name", TINY)
    assert resolve_model(f"{folder}:num_hidden_layers=2")[1].num_hidden_layers == 2
    assert resolve_model(TINY) == ("deepseek-v3-tiny", TINY)
    _, config = resolve_model("deepseek-v3:num_hidden_layers=4, q_lora_rank=none,norm_topk_prob=False,rope_theta=5e4")
    assert (config.num_hidden_layers, config.q_lora_rank, config.norm_topk_prob) == (4, None, False)
    assert config.rope_theta == 50000.0
    assert resolve_model("deepseek-v3:num_attention_heads=64")[1].to_hf_dict()["num_key_value_heads"] == 64
    assert resolve_model("deepseek-v3:rope_scaling=null")[1].rope_scaling is None
    assert resolve_model("deepseek-v3:rope_scaling.factor=8")[1].rope_scaling == Yarn(
        factor=8.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    )


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("deepseek-v3-tinny", "did you mean 'deepseek-v3-tiny'?"),
        ("no/such/place", "unknown model 'no/such/place'"),
        ("no/such/place:hidden_size=4", "unknown model 'no/such/place'"),
        ("deepseek-v3:", "is not of the form field=value"),
        ("deepseek-v3:hidden_size", "is not of the form field=value"),
        ("deepseek-v3:num_layers=4", "unknown field num_layers, did you mean 'num_hidden_layers'?"),
        ("deepseek-v3:hidden_size=big", 'hidden_size = "big", but it must be a positive integer'),
        ("deepseek-v3:n_group=8,n_group=4", "n_group is given twice"),
        ("deepseek-v3:num_experts_per_tok=200", "more than the 128 experts left"),
    ],
)
def test_models_that_are_refused(model: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_model(model)
    assert said in str(caught.value)


def test_a_directory_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; give a config"):
        resolve_model(tmp_path)
