"""The fields of a DeepSeek-V3 config.json: which are honoured, kept or refused, and which values fit together."""

from __future__ import annotations

from collections.abc import Mapping

from dsv3c.models.config_values import Check, count, flag, is_int, only, positive, rank, real, show, size, token, tokens
from dsv3c.models.yarn import Yarn


def _yarn(value: object) -> str | None:
    return None if value is None or isinstance(value, Yarn) else "YaRN settings or null"


_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers",
    "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "n_routed_experts",
    "num_experts_per_tok", "n_group", "topk_group", "max_position_embeddings",
)  # fmt: skip
READERS: dict[str, Check] = {  # None, or what the value must be
    **dict.fromkeys(_SIZES, size),
    **dict.fromkeys(("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"), count),
    **dict.fromkeys(("routed_scaling_factor", "rms_norm_eps", "rope_theta"), positive),
    **dict.fromkeys(("norm_topk_prob", "rope_interleave"), flag),
    "initializer_range": real,
    "q_lora_rank": rank,
    "bos_token_id": token,
    "eos_token_id": tokens,
    "rope_scaling": _yarn,
    "moe_layer_freq": only(1, "every layer after the dense ones holds experts"),
    "scoring_func": only("sigmoid", "other router scores are not supported"),
    "topk_method": only("noaux_tc", "other ways to choose experts are not supported"),
    "hidden_act": only("silu", "other activations are not supported"),
    "tie_word_embeddings": only(False, "a head tied to the embedding is not supported"),
    "attention_bias": only(False, "biases in the attention projections are not supported"),
    "attention_dropout": only(0.0, "dropout is not supported"),
}
ALIASES = {"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"}
DERIVED = {  # the sum of these fields, where the file repeats it
    "num_key_value_heads": ("num_attention_heads",),
    "head_dim": ("qk_rope_head_dim",),
    "qk_head_dim": ("qk_nope_head_dim", "qk_rope_head_dim"),
}
ROPE = ("rope_scaling", "rope_parameters", "rope_theta")
REQUIRED_VALUES: dict[str, tuple[object, ...]] = {
    "model_type": ("deepseek_v3",),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1, None),
    "per_layer_config": (None,),
}
# These change no computation here; they are written back as they came.
KEPT = (
    "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "use_cache", "pad_token_id", "sep_token_id",
    "decoder_start_token_id", "transformers_version", "output_router_logits", "tie_last_hidden_states",
    "router_aux_loss_coef",
)  # fmt: skip
# These describe the files beside the config, or how a library once ran it; what is written describes itself.
DROPPED = (
    "architectures", "auto_map", "dtype", "torch_dtype", "quantization_config", "_name_or_path",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "experts_implementation",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id",
    "num_labels", "problem_type",
)  # fmt: skip


def problems_of(values: Mapping[str, object]) -> list[str]:
    """What is wrong with the given fields, each in a phrase; absent fields are not judged."""
    problems: list[str] = []
    for name, read in READERS.items():
        if name in values and (wanted := read(values[name])):
            problems.append(f"{name} = {show(values[name])}, but it must be {wanted}")
    if problems:
        return problems

    def get(name: str) -> int | None:
        value = values.get(name)
        return value if is_int(value) else None

    rotary, layers, dense = get("qk_rope_head_dim"), get("num_hidden_layers"), get("first_k_dense_replace")
    experts, chosen, groups, kept = (
        get(name) for name in ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
    )
    if rotary is not None and rotary % 2:
        problems.append(f"qk_rope_head_dim = {rotary} is odd, but rotary dimensions come in pairs")
    if layers is not None and dense is not None and dense > layers:
        problems.append(f"first_k_dense_replace = {dense} is more than num_hidden_layers = {layers}")
    if groups is not None and kept is not None and kept > groups:
        problems.append(f"topk_group = {kept} is more than n_group = {groups}")
    elif experts is not None and groups is not None and kept is not None:
        if experts % groups:
            problems.append(f"n_routed_experts = {experts} does not divide into n_group = {groups} groups")
        elif experts // groups < 2:
            problems.append(
                f"n_routed_experts = {experts} in n_group = {groups} groups leaves {experts // groups} a group, "
                "but a group is scored by its two best"
            )
        elif chosen is not None and chosen > kept * (experts // groups):
            problems.append(
                f"num_experts_per_tok = {chosen} is more than the {kept * (experts // groups)} experts left in "
                f"topk_group = {kept} of n_group = {groups} groups"
            )
    return problems


def check_quantization(value: object) -> list[str]:
    if value is None:
        return []
    wanted = {"quant_method": ("fp8",), "fmt": ("e4m3", None), "weight_block_size": ([128, 128],)}
    if isinstance(value, Mapping) and all(value.get(key) in options for key, options in wanted.items()):
        return []
    return [f"quantization_config = {show(value)} is not supported, only fp8 e4m3 in blocks of [128, 128]"]
