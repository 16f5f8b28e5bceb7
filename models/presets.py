"""Models by name, and the one way from what a user calls a model to its configuration."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path

from dsv3c.errors import InputError, did_you_mean
from dsv3c.models.config import ModelConfig, load_config
from dsv3c.models.yarn import Yarn

DEEPSEEK_V3 = ModelConfig(  # technical report section 4.2, with the context extension of section 4.3
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    moe_intermediate_size=2048,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    num_attention_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    n_routed_experts=256,
    n_shared_experts=1,
    num_experts_per_tok=8,
    n_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    max_position_embeddings=163840,
    rope_scaling=Yarn(
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=32.0,
        beta_slow=1.0,
        mscale=1.0,
        mscale_all_dim=1.0,
    ),
    initializer_range=0.006,
    num_nextn_predict_layers=1,
)

# The report gives its small ablation model's total (section 4.5: 15.7B parameters) but no sizes. These are those of
# DeepSeek-V2-Lite (arXiv:2405.04434, appendix B), which has that total, with the router and the MTP module of V3.
DEEPSEEK_V3_16B = dataclasses.replace(
    DEEPSEEK_V3,
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=None,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    max_position_embeddings=4096,
    rope_scaling=None,
)

DEEPSEEK_V3_MINI = dataclasses.replace(  # trains on one 80 GB GPU
    DEEPSEEK_V3,
    vocab_size=32768,
    hidden_size=2048,
    intermediate_size=5632,
    moe_intermediate_size=1024,
    num_hidden_layers=8,
    first_k_dense_replace=1,
    num_attention_heads=16,
    q_lora_rank=768,
    n_routed_experts=64,
    max_position_embeddings=16384,
    rope_scaling=None,
    num_nextn_predict_layers=0,
)

DEEPSEEK_V3_SLICE = dataclasses.replace(  # what one rank of EP32 computes of the full model
    DEEPSEEK_V3,
    vocab_size=1024,
    num_hidden_layers=4,
    first_k_dense_replace=0,
    n_routed_experts=8,
    n_group=1,
    topk_group=1,
    max_position_embeddings=4096,
    rope_scaling=None,
    num_nextn_predict_layers=0,
)

DEEPSEEK_V3_TINY = dataclasses.replace(  # trains on a laptop's CPU in a minute
    DEEPSEEK_V3,
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=128,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=4,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    max_position_embeddings=4096,
    rope_scaling=None,
    initializer_range=0.02,
)

PRESETS: dict[str, ModelConfig] = {
    "deepseek-v3": DEEPSEEK_V3,
    "deepseek-v3-16b": DEEPSEEK_V3_16B,
    "deepseek-v3-mini": DEEPSEEK_V3_MINI,
    "deepseek-v3-slice": DEEPSEEK_V3_SLICE,
    "deepseek-v3-tiny": DEEPSEEK_V3_TINY,
}


def resolve_model(
    model: str | os.PathLike[str] | ModelConfig, presets: Mapping[str, ModelConfig] = PRESETS
) -> tuple[str, ModelConfig]:
    """Name and configuration of MODEL: a preset, a config.json or a directory with one, each with `:field=value,...`.

    A preset wins over a path of the same name; write ./NAME for the path. Raises InputError for what is neither.
    """
    if isinstance(model, ModelConfig):
        return next((name for name, preset in presets.items() if preset == model), "custom"), model
    text = os.fspath(model)
    base, overrides = text, None
    if text not in presets and not os.path.exists(text):
        if with_overrides := re.fullmatch(r"(.+?):(\s*[A-Za-z_.]+\s*=.*)", text):  # a colon may be part of a path too
            base, overrides = with_overrides.groups()
        elif text.partition(":")[0] in presets:
            base, _, overrides = text.partition(":")
    if base in presets:
        name, config = base, presets[base]
    elif os.path.exists(base):
        path = Path(base).resolve()
        name = path.name if path.is_dir() else path.parent.name if path.name == "config.json" else path.stem
        name, config = name or "model", load_config(base)
    else:
        hint = did_you_mean(base, presets)
        raise InputError(f"unknown model '{base}': neither a preset nor a config.json nor a directory with one; {hint}")
    return name, config if overrides is None else config.override(overrides)
