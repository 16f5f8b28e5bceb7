"""A DeepSeek-V3 of a few thousand parameters, with every part of the large one, for tests that train and sample."""

from __future__ import annotations

from dsv3c.models.config import ModelConfig
from dsv3c.models.presets import PRESETS

SMALL: ModelConfig = PRESETS["deepseek-v3-tiny"].override(
    "num_hidden_layers=2,vocab_size=257,hidden_size=32,q_lora_rank=16,kv_lora_rank=16,n_routed_experts=8,"
    "num_attention_heads=2,qk_nope_head_dim=16,qk_rope_head_dim=8,v_head_dim=16,intermediate_size=64,"
    "moe_intermediate_size=32,max_position_embeddings=64"
)
"""Its vocabulary is that of the tokenizer `bytes`."""
