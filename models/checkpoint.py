"""How this project's weights lie in a Hugging Face checkpoint: same names, but fused here what is separate there.

Fused are an MLP's gate and up projections (gate first), and the experts of a layer. An MTP module is the layer after
the last, as in the released weights; there it has copies of embedding and head, which here it shares with the main
model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv3c.models.config import ModelConfig

if TYPE_CHECKING:
    import torch

Index = tuple[int | slice, ...]
Shape = tuple[int, ...]

ROUTER_BIAS = "e_score_correction_bias"
"""Last part of the name of the router's bias, which stays float32 in every checkpoint."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the checkpoint, and where it lies in ours: `weight[index]` is a view of its shape."""

    hf_name: str
    index: Index


def parts(name: str, shape: Shape) -> tuple[Part, ...]:
    """The Hugging Face tensors that make up our weight `name`; together they cover it exactly once."""
    layer, fused, rest = name.partition(".experts.")
    if fused and rest == "gate_up_proj":
        half = shape[1] // 2
        return tuple(
            Part(f"{layer}.experts.{expert}.{half_name}.weight", (expert, rows))
            for expert in range(shape[0])
            for half_name, rows in (("gate_proj", slice(0, half)), ("up_proj", slice(half, 2 * half)))
        )
    if fused and rest == "down_proj":
        return tuple(Part(f"{layer}.experts.{expert}.down_proj.weight", (expert,)) for expert in range(shape[0]))
    if name.endswith(".gate_up_proj.weight"):
        half = shape[0] // 2
        prefix = name.removesuffix("gate_up_proj.weight")
        gate, up = Part(f"{prefix}gate_proj.weight", (slice(0, half),)), slice(half, 2 * half)
        return gate, Part(f"{prefix}up_proj.weight", (up,))
    return (Part(name, ()),)


def weight_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every weight of the model as held here, MTP modules included, in checkpoint order."""
    c, d = config, config.hidden_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (c.vocab_size, d)}
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        prefix = f"model.layers.{layer}"
        if layer in c.mtp_layers:
            shapes |= {f"{prefix}.enorm.weight": (d,), f"{prefix}.hnorm.weight": (d,)}
            shapes[f"{prefix}.eh_proj.weight"] = (d, 2 * d)
        shapes[f"{prefix}.input_layernorm.weight"] = (d,)
        attention, queries = f"{prefix}.self_attn", c.num_attention_heads * c.qk_head_dim
        if c.q_lora_rank is None:
            shapes[f"{attention}.q_proj.weight"] = (queries, d)
        else:
            shapes[f"{attention}.q_a_proj.weight"] = (c.q_lora_rank, d)
            shapes[f"{attention}.q_a_layernorm.weight"] = (c.q_lora_rank,)
            shapes[f"{attention}.q_b_proj.weight"] = (queries, c.q_lora_rank)
        shapes[f"{attention}.kv_a_proj_with_mqa.weight"] = (c.kv_lora_rank + c.qk_rope_head_dim, d)
        shapes[f"{attention}.kv_a_layernorm.weight"] = (c.kv_lora_rank,)
        per_head = c.qk_nope_head_dim + c.v_head_dim
        shapes[f"{attention}.kv_b_proj.weight"] = (c.num_attention_heads * per_head, c.kv_lora_rank)
        shapes[f"{attention}.o_proj.weight"] = (d, c.num_attention_heads * c.v_head_dim)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (d,)
        mlp = f"{prefix}.mlp"
        if layer < c.first_k_dense_replace:
            shapes |= _mlp(mlp, c.intermediate_size, d)
        else:
            experts, inner = c.n_routed_experts, c.moe_intermediate_size
            shapes |= {f"{mlp}.gate.weight": (experts, d), f"{mlp}.gate.{ROUTER_BIAS}": (experts,)}
            shapes[f"{mlp}.experts.gate_up_proj"] = (experts, 2 * inner, d)
            shapes[f"{mlp}.experts.down_proj"] = (experts, d, inner)
            if c.n_shared_experts:
                shapes |= _mlp(f"{mlp}.shared_experts", c.n_shared_experts * inner, d)
        if layer in c.mtp_layers:
            shapes[f"{prefix}.shared_head.norm.weight"] = (d,)
    shapes["model.norm.weight"] = (d,)
    shapes["lm_head.weight"] = (c.vocab_size, d)
    return shapes


def _mlp(prefix: str, inner: int, d: int) -> dict[str, Shape]:
    return {f"{prefix}.gate_up_proj.weight": (2 * inner, d), f"{prefix}.down_proj.weight": (d, inner)}


_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_SHARED = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}


def layer_of(name: str) -> int | None:
    """The layer that a weight of either form belongs to; None for those outside the layers."""
    match = _LAYER.match(name)
    return int(match[1]) if match else None


def shared_with(hf_name: str) -> str | None:
    """The main model's weight of which this tensor of an MTP module is a copy; None for any other tensor."""
    match = _LAYER.match(hf_name)
    return _SHARED.get(match[2]) if match else None


def mtp_copies(config: ModelConfig) -> dict[str, str]:
    """The tensors that a checkpoint repeats for each MTP module, with the weights that they repeat."""
    return {f"model.layers.{i}.{name}": source for i in config.mtp_layers for name, source in _SHARED.items()}


def hf_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of the model's checkpoint."""
    shapes: dict[str, Shape] = {}
    for name, shape in weight_shapes(config).items():
        shapes |= {part.hf_name: part_shape(shape, part.index) for part in parts(name, shape)}
    return shapes | {copy: shapes[source] for copy, source in mtp_copies(config).items()}


def part_shape(shape: Shape, index: Index) -> Shape:
    """The shape of `weight[index]` for a weight of this shape."""
    kept = [len(range(size)[i]) for size, i in zip(shape, index, strict=False) if isinstance(i, slice)]
    return (*kept, *shape[len(index) :])


def hf_tensors(config: ModelConfig, weights: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The checkpoint's tensors as views of our weights, by layer, each MTP module with its copies."""
    for name in weight_shapes(config):
        weight = weights[name]
        for part in parts(name, tuple(weight.shape)):
            yield part.hf_name, weight[part.index]
    for copy, source in mtp_copies(config).items():
        yield copy, weights[source]
