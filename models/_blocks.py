"""The layers of DeepSeek-V3 as IR: latent attention, dense and expert MLPs, cut into the report's segments."""

from __future__ import annotations

from dataclasses import dataclass

from dsv3c.build import Builder
from dsv3c.dims import Dim, symbol
from dsv3c.ir import DType, Type, Value
from dsv3c.models.config import ModelConfig
from dsv3c.models.yarn import Yarn

B, S, C = symbol("B"), symbol("S"), symbol("C")

SCORE_EPS = 1e-20
"""Added to the sum of the chosen scores before dividing by it."""

LATENT_EPS = 1e-6
"""Of the norms on the query and key-value latents; the model's own `rms_norm_eps` is for the hidden state."""


@dataclass(frozen=True, slots=True)
class Style:
    """How the same model is written for different uses.

    `dtype`: of activations and matrices. `alignment`: of each expert's rows. `cache`: `none`, `write` (prefill: keys
    and values are expanded, latents are also stored) or `read` (decode: absorbed, over the latents only).
    `train`: with balance loss and expert load as results. `document_end`: see `Job`.
    """

    dtype: DType
    alignment: int
    cache: str = "none"
    train: bool = False
    document_end: int | None = None

    @property
    def wide(self) -> DType:
        """The type of norms' weights, router and losses: never below float32."""
        return DType.f64 if self.dtype is DType.f64 else DType.f32

    def activation(self, *dims: Dim) -> Type:
        return Type(self.dtype, (B, S, *dims))

    def weight(self, b: Builder, name: str, *shape: Dim) -> Value:
        """A matrix as the arithmetic wants it: stored in `wide`, rounded to `dtype`, which `hoist` does once a step."""
        stored = b.weight(name, Type(self.wide, shape))
        if self.dtype is self.wide:
            return stored
        rounded: Value = b.cast(stored, dtype=str(self.dtype))
        return rounded

    def vector(self, cols: Dim) -> Type:
        return Type(self.wide, (cols,))


@dataclass(frozen=True, slots=True)
class Rope:
    """Cosines and sines of the positions in use, [B, S, rotary / 2] in float32 at least."""

    cos: Value
    sin: Value


def rope_table(b: Builder, positions: Value, config: ModelConfig, dtype: DType) -> tuple[Value, Value]:
    """The rotary table of `positions` (YaRN as in the report, section 4.3)."""
    yarn = config.rope_scaling or Yarn(factor=1.0, original_max_position_embeddings=config.max_position_embeddings)
    cos, sin = b.rotary_table(
        positions, out=("cos", "sin"), dim=config.qk_rope_head_dim, base=config.rope_theta, factor=yarn.factor,
        original=yarn.original_max_position_embeddings, beta_fast=yarn.beta_fast, beta_slow=yarn.beta_slow,
        magnitude=yarn.attention_factor if config.rope_scaling else 1.0, dtype=str(dtype),
    )  # fmt: skip
    return cos, sin


def attention(b: Builder, x: Value, rope: Rope, config: ModelConfig, style: Style, cache: Value | None = None,
              start: Value | None = None, documents: Value | None = None) -> tuple[Value, Value | None]:  # fmt: skip
    """Multi-head latent attention on normed `x` (section 2.1.1): the output, and the cache after writing to it."""
    heads, nope, rotary = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    rank, value = config.kv_lora_rank, config.v_head_dim
    with b.path("attention"):
        q_nope, q_rope = _queries(b, x, rope, config, style)
        with b.path("kv_down"):
            kv_a = style.weight(b, "kv_a", rank + rotary, config.hidden_size)
            latent = b.linear(x, kv_a, out="latent")
            compressed = b.slice_last(latent, start=0, stop=rank)
            k_rope = b.slice_last(latent, start=rank, stop=rank + rotary)
        with b.path("kv_norm"):
            weight = b.weight("kv_norm", style.vector(rank))
            compressed = b.rms_norm(compressed, weight, eps=LATENT_EPS, out="compressed")
        with b.path("rotary"):
            k_rope = b.rotary(
                k_rope, rope.cos, rope.sin, out="k_rope", interleave=config.rope_interleave, inverse=False
            )
        kv_b = style.weight(b, "kv_b", heads * (nope + value), rank)
        if cache is not None:
            with b.path("cache"):
                cache = b.cache_write(cache, b.join_last(compressed, k_rope), start, out="cache_next")
        if style.cache == "read":
            with b.path("core"):
                q = b.join_last(b.absorb_query(q_nope, kv_b), q_rope)
                o = b.latent_attention(q, cache, start, out="o", scale=config.softmax_scale, rank=rank)
                o = b.absorb_value(o, kv_b, value=value)
        else:
            with b.path("kv_up"):
                kv = b.split_heads(b.linear(compressed, kv_b, out="kv"), heads=heads)
                k_nope = b.slice_last(kv, start=0, stop=nope)
                v = b.slice_last(kv, start=nope, stop=nope + value, out="v")
            with b.path("rotary"):
                k = b.join_last(k_nope, b.expand_heads(k_rope, heads=heads), out="k")
                q = b.join_last(q_nope, q_rope, out="q")
            with b.path("core"):
                packed = () if documents is None else (documents,)
                o, _lse = b.attention(q, k, v, *packed, out=("o", "lse"), scale=config.softmax_scale)
        with b.path("output"):
            weight = style.weight(b, "o_proj", config.hidden_size, heads * value)
            return b.linear(b.merge_heads(o), weight, out="attention"), cache


def _queries(b: Builder, x: Value, rope: Rope, config: ModelConfig, style: Style) -> tuple[Value, Value]:
    """Queries without position [B, S, heads, nope] and rotated [B, S, heads, rotary]."""
    heads, nope, width = config.num_attention_heads, config.qk_nope_head_dim, config.qk_head_dim
    if config.q_lora_rank is None:
        with b.path("q_up"):
            q = b.linear(x, style.weight(b, "q", heads * width, config.hidden_size), out="q_flat")
    else:
        with b.path("q_down"):
            q_a = b.linear(x, style.weight(b, "q_a", config.q_lora_rank, config.hidden_size), out="q_latent")
        with b.path("q_norm"):
            q_a = b.rms_norm(q_a, b.weight("q_norm", style.vector(config.q_lora_rank)), eps=LATENT_EPS)
        with b.path("q_up"):
            q = b.linear(q_a, style.weight(b, "q_b", heads * width, config.q_lora_rank), out="q_flat")
    with b.path("rotary"):
        q = b.split_heads(q, heads=heads)
        q_rope = b.slice_last(q, start=nope, stop=width)
        q_rope = b.rotary(q_rope, rope.cos, rope.sin, out="q_rope", interleave=config.rope_interleave, inverse=False)
        return b.slice_last(q, start=0, stop=nope), q_rope


def dense_mlp(b: Builder, x: Value, width: int, style: Style, prefix: str = "") -> Value:
    """SwiGLU MLP of inner `width`; gate and up are one matrix, gate first."""
    hidden = x.type.shape[-1]
    with b.path("gate_up"):
        gate_up = b.linear(x, style.weight(b, f"{prefix}gate_up", 2 * width, hidden), out=f"{prefix}gate_up_out")
    with b.path("swiglu"):
        inner = b.swiglu(gate_up, out=f"{prefix}inner")
    with b.path("down"):
        down: Value = b.linear(inner, style.weight(b, f"{prefix}down", hidden, width), out=f"{prefix}down_out")
    return down


@dataclass(frozen=True, slots=True)
class Experts:
    """What the expert MLP gives: its output and, in training, the balance loss and the tokens per expert."""

    output: Value
    balance: Value | None
    load: Value | None


def moe_mlp(b: Builder, x: Value, bias: Value, config: ModelConfig, style: Style) -> Experts:
    """DeepSeekMoE with auxiliary-loss-free balancing (section 2.1.2) on normed `x`.

    The router weight is applied before the down projection, so no expert output is kept for backward.
    """
    experts, k, hidden = config.n_routed_experts, config.num_experts_per_tok, config.hidden_size
    inner = config.moe_intermediate_size
    balance = load = None
    with b.path("moe.router"):
        weight = b.weight("router", Type(style.wide, (experts, hidden)))
        wide = x if x.type.dtype is style.wide else b.cast(x, dtype=str(style.wide))
        scores = b.sigmoid(b.linear(wide, weight), out="scores")
        chosen = b.choose_experts(scores, bias, out="chosen", k=k, groups=config.n_group, kept=config.topk_group)
        p = b.pick(scores, chosen)
        if config.norm_topk_prob:
            p = b.normalize(p, out="p", scale=config.routed_scaling_factor, eps=SCORE_EPS)
        else:
            p = b.scale(p, out="p", by=config.routed_scaling_factor)
        if style.train:
            load = b.expert_load(chosen, out="load", experts=experts)
            balance = b.balance_loss(scores, chosen, out="balance")
    with b.path("moe.dispatch"):
        rows, row_experts, row_p, handle = b.dispatch(x, chosen, p, out=("rows", "row_experts", "row_p", "handle"))
    with b.path("mlp.permute"):
        offsets, slot, source = b.sort_by_expert(
            row_experts, out=("offsets", "slot", "source"), experts=experts, align=style.alignment
        )
        sorted_rows = b.permute(rows, source, slot, out="sorted_rows")
        sorted_p = b.permute_weights(row_p, source, slot, out="sorted_p")
        if sorted_p.type.dtype is not style.dtype:
            sorted_p = b.cast(sorted_p, dtype=str(style.dtype))
    with b.path("mlp.gate_up"):
        gate_up_w = style.weight(b, "experts_gate_up", experts, 2 * inner, hidden)
        gate_up = b.grouped_linear(sorted_rows, gate_up_w, offsets, out="experts_gate_up_out")
    with b.path("mlp.swiglu"):
        weighted = b.scale_rows(b.swiglu(gate_up), sorted_p, out="experts_inner")
    with b.path("mlp.down"):
        down_w = style.weight(b, "experts_down", experts, hidden, inner)
        down = b.grouped_linear(weighted, down_w, offsets, out="experts_out")
    with b.path("mlp.unpermute"):
        routed = b.unpermute(down, slot, source, out="routed_rows")
    with b.path("moe.combine"):
        output = b.combine(routed, handle, out="routed")
    if config.n_shared_experts:
        with b.path("mlp.shared"):
            output = b.add(output, dense_mlp(b, x, inner * config.n_shared_experts, style, "shared_"), out="mlp")
    return Experts(output, balance, load)
