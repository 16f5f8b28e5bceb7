"""A plain DeepSeek-V3 in PyTorch, written straight from the report, as an oracle for losses that transformers lacks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LATENT_EPS = 1e-6  # the released code gives the two latent norms this constant, whatever rms_norm_eps says

MtpInput = Literal["pre_norm", "post_norm"]
MtpPositions = Literal["with_target", "with_input"]


@dataclass(frozen=True)
class Losses:
    """What one forward pass yields; layers are numbered as in the checkpoint (MTP module k is layer num_layers+k-1)."""

    main: Tensor  # next-token cross entropy, mean over B*(S-1)
    mtp: list[Tensor]  # module k predicts token i+k+1, mean over B*(S-1-k)
    balance: Tensor  # alpha * sum over the main model's MoE layers of the mean over sequences; MTP blocks not included
    balance_per_layer: dict[int, Tensor]  # without alpha, MTP blocks included
    logits: Tensor  # [B, S, V] of the main model
    mtp_logits: list[Tensor]  # [B, positions, V]
    experts: dict[int, Tensor]  # i64 [B, positions, k], ascending
    load: dict[int, Tensor]  # i64 [experts]: tokens sent to each expert

    def total(self, mtp_weight: float) -> Tensor:
        """main + balance + lambda/D * sum of the MTP losses (report, sections 2.1.2 and 2.2)."""
        total = self.main + self.balance
        for loss in self.mtp:
            total = total + mtp_weight / len(self.mtp) * loss
        return total


def losses(
    weights: Mapping[str, Tensor],
    config: Any,
    tokens: Tensor,
    *,
    alpha: float = 0.0,
    mtp_modules: int | None = None,
    mtp_input: MtpInput = "post_norm",
    mtp_positions: MtpPositions = "with_target",
) -> Losses:
    """Everything for tokens [B, S], in the precision of the weights; `weights` has the checkpoint's names.

    mtp_input says which hidden state goes from one depth to the next: the output of the last block as it is
    (pre_norm), or after that depth's final norm, model.norm or shared_head.norm (post_norm).
    mtp_positions says how many positions MTP module k runs on: those that have a target (S-1-k), or those that have
    a next embedding (S-k). The losses are the same; expert loads and the MTP blocks' balance terms are not.
    """
    model = _Model(weights, config)
    modules = config.num_nextn_predict_layers if mtp_modules is None else mtp_modules
    length = tokens.shape[1]
    embedding = weights["model.embed_tokens.weight"]
    head = weights.get("lm_head.weight", embedding)

    h = embedding[tokens]
    for layer in range(config.num_hidden_layers):
        h = model.block(h, layer)
    normed = rms_norm(h, weights["model.norm.weight"], config.rms_norm_eps)
    logits = normed @ head.T
    main = cross_entropy(logits[:, :-1], tokens[:, 1:])

    state = normed if mtp_input == "post_norm" else h
    mtp, mtp_logits = [], []
    for k in range(1, modules + 1):
        layer = config.num_hidden_layers + k - 1
        at = f"model.layers.{layer}."
        count = length - k - (1 if mtp_positions == "with_target" else 0)
        ahead = rms_norm(embedding[tokens[:, k : k + count]], weights[at + "enorm.weight"], config.rms_norm_eps)
        back = rms_norm(state[:, :count], weights[at + "hnorm.weight"], config.rms_norm_eps)
        h = torch.cat([ahead, back], dim=-1) @ weights[at + "eh_proj.weight"].T
        h = model.block(h, layer)
        normed = rms_norm(h, weights[at + "shared_head.norm.weight"], config.rms_norm_eps)
        state = normed if mtp_input == "post_norm" else h
        mtp_logits.append(normed @ head.T)
        targets = tokens[:, k + 1 :]
        mtp.append(cross_entropy(mtp_logits[-1][:, : targets.shape[1]], targets))

    balance = logits.new_zeros(())
    for layer, term in model.balance.items():
        if layer < config.num_hidden_layers:
            balance = balance + alpha * term
    load = {layer: torch.bincount(e.flatten(), minlength=config.n_routed_experts) for layer, e in model.experts.items()}
    return Losses(main, mtp, balance, model.balance, logits, mtp_logits, model.experts, load)


def updated_bias(bias: Tensor, load: Tensor, gamma: float) -> Tensor:
    """The bias after a step: raised by gamma for underloaded experts, lowered for overloaded ones (section 2.1.2)."""
    load = load.to(torch.float64)
    return bias + gamma * torch.sign(load.mean() - load).to(bias.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps))


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -torch.log_softmax(logits, dim=-1).gather(-1, targets[..., None]).mean()


class _Model:
    def __init__(self, weights: Mapping[str, Tensor], config: Any) -> None:
        self.weights, self.config = weights, config
        self.balance: dict[int, Tensor] = {}
        self.experts: dict[int, Tensor] = {}
        self.frequencies, self.rope_gain, self.softmax_scale = _rope(config)

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[name + ".weight"].T
        return y + self.weights[name + ".bias"] if name + ".bias" in self.weights else y

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        return rms_norm(x, self.weights[name + ".weight"], eps)

    def block(self, h: Tensor, layer: int) -> Tensor:
        at, eps = f"model.layers.{layer}.", self.config.rms_norm_eps
        h = h + self.attention(self.norm(h, at + "input_layernorm", eps), at + "self_attn.")
        x = self.norm(h, at + "post_attention_layernorm", eps)
        if layer < self.config.first_k_dense_replace:
            return h + self.swiglu(x, at + "mlp.")
        return h + self.mixture(x, at + "mlp.", layer)

    def swiglu(self, x: Tensor, at: str) -> Tensor:
        return self.linear(F.silu(self.linear(x, at + "gate_proj")) * self.linear(x, at + "up_proj"), at + "down_proj")

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions on the last dim of [B, S, ..., rope]."""
        angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * self.frequencies
        shape = [1, x.shape[1]] + [1] * (x.dim() - 3) + [-1]
        cos = (angles.cos() * self.rope_gain).to(x.dtype).view(shape)
        sin = (angles.sin() * self.rope_gain).to(x.dtype).view(shape)
        half = x.shape[-1] // 2
        a, b = (x[..., 0::2], x[..., 1::2]) if self.config.rope_interleave else (x[..., :half], x[..., half:])
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def attention(self, x: Tensor, at: str) -> Tensor:
        c = self.config
        batch, length, _ = x.shape
        heads, nope, rope, value = c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        if c.q_lora_rank is None:
            q = self.linear(x, at + "q_proj")
        else:
            latent = self.norm(self.linear(x, at + "q_a_proj"), at + "q_a_layernorm", LATENT_EPS)
            q = self.linear(latent, at + "q_b_proj")
        q = q.view(batch, length, heads, nope + rope)
        latent, k_rope = torch.split(self.linear(x, at + "kv_a_proj_with_mqa"), [c.kv_lora_rank, rope], dim=-1)
        kv = self.linear(self.norm(latent, at + "kv_a_layernorm", LATENT_EPS), at + "kv_b_proj")
        kv = kv.view(batch, length, heads, nope + value)
        k_rope, q_rope = self.rotate(k_rope), self.rotate(q[..., nope:])
        scores = torch.einsum("bqhd,bkhd->bhqk", q[..., :nope], kv[..., :nope])
        scores = (scores + torch.einsum("bqhd,bkd->bhqk", q_rope, k_rope)) * self.softmax_scale
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = torch.softmax(scores.masked_fill(future, -math.inf), dim=-1)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, kv[..., nope:])
        return self.linear(out.reshape(batch, length, heads * value), at + "o_proj")

    def mixture(self, x: Tensor, at: str, layer: int) -> Tensor:
        c = self.config
        out = self.swiglu(x, at + "shared_experts.") if c.n_shared_experts else torch.zeros_like(x)
        scores = torch.sigmoid(self.linear(x, at + "gate"))
        with torch.no_grad():
            chosen = self.choose(scores + self.weights[at + "gate.e_score_correction_bias"])
        mask = torch.zeros_like(scores).scatter(-1, chosen, 1.0)
        gates = scores * mask
        if c.norm_topk_prob:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        gates = gates * c.routed_scaling_factor
        for expert in range(c.n_routed_experts):
            if bool((mask[..., expert] > 0).any()):
                out = out + gates[..., expert, None] * self.swiglu(x, f"{at}experts.{expert}.")
        frequency = mask.mean(dim=1) * c.n_routed_experts / c.num_experts_per_tok
        probability = (scores / scores.sum(-1, keepdim=True)).mean(dim=1)
        self.balance[layer] = (frequency * probability).sum(-1).mean()
        self.experts[layer] = chosen.sort(dim=-1).values
        return out

    def choose(self, biased: Tensor) -> Tensor:
        """The top experts by biased score among the groups whose two best scores sum highest."""
        c = self.config
        grouped = biased.view(*biased.shape[:-1], c.n_group, -1)
        strength = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        kept = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, strength.topk(c.topk_group, -1).indices, True)
        allowed = grouped.masked_fill(~kept[..., None], -math.inf).flatten(-2)
        chosen: Tensor = allowed.topk(c.num_experts_per_tok, dim=-1).indices
        return chosen


def _rope(config: Any) -> tuple[Tensor, float, float]:
    """Angular frequencies [rope/2] in float64, the factor on cos and sin, and the softmax scale (YaRN included)."""
    settings = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    dim: int = config.qk_rope_head_dim
    base = float(settings.get("rope_theta", getattr(config, "rope_theta", None) or 10000.0))
    scale: float = (config.qk_nope_head_dim + dim) ** -0.5
    frequencies = torch.tensor([base ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float64)
    if settings.get("rope_type", settings.get("type", "default")) != "yarn":
        return frequencies, 1.0, scale
    factor, original = float(settings["factor"]), float(settings["original_max_position_embeddings"])

    def dim_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    def gain(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    low = max(math.floor(dim_of(settings.get("beta_fast") or 32)), 0)
    high = min(math.ceil(dim_of(settings.get("beta_slow") or 1)), dim - 1)
    span = high - low if high != low else 0.001
    slowed = torch.tensor([min(max((i - low) / span, 0.0), 1.0) for i in range(dim // 2)], dtype=torch.float64)
    frequencies = frequencies / factor * slowed + frequencies * (1 - slowed)
    mscale, mscale_all = settings.get("mscale"), settings.get("mscale_all_dim")
    rope_gain = gain(mscale) / gain(mscale_all) if mscale and mscale_all else gain(1.0)
    return frequencies, rope_gain, scale * gain(mscale_all) ** 2 if mscale_all else scale
