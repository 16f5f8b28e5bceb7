"""What ops mean, against independent implementations: torch's own functions, autograd and transformers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_interleave,
)

from dsv3c.ir import DType, IRError, Type
from dsv3c.ops import REGISTRY

F64 = torch.float64


def op(name: str, *tensors: torch.Tensor, **attrs: object) -> torch.Tensor:
    result = REGISTRY[name].reference(*tensors, **attrs)
    assert isinstance(result, torch.Tensor)
    return result


def ops(name: str, *tensors: torch.Tensor, **attrs: object) -> tuple[torch.Tensor, ...]:
    result = REGISTRY[name].reference(*tensors, **attrs)
    assert isinstance(result, tuple)
    return result


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def table(positions: torch.Tensor, dim: int, yarn: dict[str, float] | None, magnitude: float,
          dtype: str = "f32") -> tuple[torch.Tensor, ...]:  # fmt: skip
    y = yarn or {"factor": 1.0, "original_max_position_embeddings": 1, "beta_fast": 1, "beta_slow": 1}
    return ops("rotary_table", positions, dim=dim, base=10000.0, factor=y["factor"], magnitude=magnitude,
               original=y["original_max_position_embeddings"], beta_fast=y["beta_fast"],
               beta_slow=y["beta_slow"], dtype=dtype)  # fmt: skip


def peer_table(positions: torch.Tensor, dim: int, yarn: dict[str, float] | None) -> tuple[torch.Tensor, ...]:
    rope = {"rope_type": "default"} if yarn is None else {"rope_type": "yarn", **yarn}
    config = DeepseekV3Config(hidden_size=64, num_attention_heads=2, qk_rope_head_dim=dim, max_position_embeddings=4096,
                              rope_parameters={"rope_theta": 10000.0, **rope})  # fmt: skip
    rotary = DeepseekV3RotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), positions.long())
    return cos, sin


YARN = {"factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0}  # fmt: skip


@pytest.mark.parametrize("dim", [8, 64])
@pytest.mark.parametrize(
    ("yarn", "magnitude"),
    [(None, 1.0), (YARN, 1.0), ({**YARN, "factor": 8, "beta_fast": 16, "mscale": 0.0}, 1.2079441541679836)],
)
def test_rotary_table_is_bit_equal_to_transformers(dim: int, yarn: dict[str, float] | None, magnitude: float) -> None:
    positions = torch.arange(4096, dtype=torch.int32).view(2, 2048)
    for mine, theirs in zip(table(positions, dim, yarn, magnitude), peer_table(positions, dim, yarn), strict=True):
        assert torch.equal(mine, theirs[..., : dim // 2])


@pytest.mark.parametrize("yarn", [None, YARN])
def test_rotary_table_in_float64_is_the_exact_one(yarn: dict[str, float] | None) -> None:
    positions = torch.arange(64, dtype=torch.int32).view(1, 64)
    for narrow, wide in zip(table(positions, 8, yarn, 1.0), table(positions, 8, yarn, 1.0, "f64"), strict=True):
        assert wide.dtype == F64
        torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=1e-5)
    if yarn is None:
        exact = torch.arange(64, dtype=F64).unsqueeze(-1) * 10000.0 ** (-torch.arange(0, 8, 2, dtype=F64) / 8)
        torch.testing.assert_close(wide[0], exact.sin(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("interleave", [True, False])
def test_rotary_keeps_the_scores_of_transformers(interleave: bool) -> None:
    q, k = normal(2, 5, 3, 8), normal(2, 5, 3, 8, seed=1)
    positions = torch.arange(5, dtype=torch.int32).expand(2, 5)
    cos, sin = table(positions, 8, None, 1.0)
    mine = [op("rotary", x, cos, sin, interleave=interleave, inverse=False) for x in (q, k)]
    peer = apply_rotary_pos_emb_interleave if interleave else apply_rotary_pos_emb
    wide = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    theirs = peer(q.transpose(1, 2), k.transpose(1, 2), *wide)
    scores = torch.einsum("bihd,bjhd->bhij", *mine)
    torch.testing.assert_close(scores, torch.matmul(theirs[0], theirs[1].transpose(2, 3)), rtol=1e-12, atol=1e-12)
    if not interleave:
        torch.testing.assert_close(mine[0].transpose(1, 2), theirs[0], rtol=0, atol=1e-15)


def test_rotary_inverse_undoes_it_and_heads_share_the_table() -> None:
    x = normal(2, 5, 3, 8)
    cos, sin = table(torch.arange(5, dtype=torch.int32).expand(2, 5), 8, None, 1.0)
    turned = op("rotary", x, cos, sin, interleave=True, inverse=False)
    assert not torch.allclose(turned, x)
    # The float32 table is a rotation to float32 precision only.
    back = op("rotary", turned, cos, sin, interleave=True, inverse=True)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)
    assert torch.equal(op("rotary", x[:, :, 1], cos, sin, interleave=True, inverse=False), turned[:, :, 1])


@pytest.mark.parametrize("packed", [False, True])
def test_attention_is_scaled_dot_product_attention(packed: bool) -> None:
    q, k, v = (normal(2, 7, 3, d, seed=i).requires_grad_() for i, d in enumerate((4, 4, 5)))
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 3]], dtype=torch.int32)
    mask = torch.ones(7, 7, dtype=torch.bool).tril().expand(2, 1, 7, 7)
    if packed:
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    qh, kh, vh = (t.transpose(1, 2) for t in (q, k, v))
    expected = functional.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask, scale=0.3).transpose(1, 2)
    rest = (documents,) if packed else ()
    o, lse = ops("attention", q, k, v, *rest, scale=0.3)
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    do = normal(2, 7, 3, 5, seed=9)
    gradients = ops("attention_grad", do, q, k, v, o, lse, *rest, scale=0.3)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected, (q, k, v), do), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_latent_attention_continues_causal_attention() -> None:
    """Prefill of 4 and decode of 3 over the cache give what causal attention over all 7 gives; the rest is unseen."""
    latent, q = normal(2, 7, 6), normal(2, 7, 3, 6, seed=1)
    keys = latent.unsqueeze(2).expand(2, 7, 3, 6)
    expected, _ = ops("attention", q, keys, keys[..., :4], scale=0.3)
    cache = torch.full((2, 9, 6), 1e30, dtype=F64)
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        at = torch.tensor(start, dtype=torch.int32)
        cache = op("cache_write", cache, latent[:, start:stop], at)
        o = op("latent_attention", q[:, start:stop], cache, at, scale=0.3, rank=4)
        torch.testing.assert_close(o, expected[:, start:stop], rtol=1e-12, atol=1e-12)


def test_absorbed_projections_are_those_of_the_expanded_cache() -> None:
    q, o, kv_b, latent = normal(2, 3, 2, 4), normal(2, 3, 2, 5), normal(2 * (4 + 3), 5), normal(2, 3, 5, seed=3)
    expanded = (latent @ kv_b.t()).unflatten(-1, (2, 7))
    scores = (q * expanded[..., :4]).sum(-1)
    absorbed = op("absorb_query", q, kv_b)
    torch.testing.assert_close((absorbed * latent.unsqueeze(2)).sum(-1), scores, rtol=1e-12, atol=1e-12)
    same = latent.unsqueeze(2).expand_as(o)
    torch.testing.assert_close(op("absorb_value", same, kv_b, value=3), expanded[..., 4:], rtol=1e-12, atol=1e-12)


def test_cross_entropy_is_torchs() -> None:
    logits = normal(2, 5, 7).requires_grad_()
    labels = torch.tensor([[3, 0, -100, 6, -1], [1, 1, 5, -100, 2]])
    peer = functional.cross_entropy(logits.flatten(0, 1), labels.clamp(min=-1).flatten(), ignore_index=-1)
    for ignored in (labels, labels.clamp(min=-1)):
        loss, lse = ops("cross_entropy", logits, ignored)
        torch.testing.assert_close(loss, peer, rtol=1e-14, atol=0)
        (expected,) = torch.autograd.grad(peer, logits, torch.tensor(0.7, dtype=F64), retain_graph=True)
        mine = op("cross_entropy_grad", torch.tensor(0.7, dtype=F64), logits, ignored, lse)
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-15)


def test_cross_entropy_of_nothing_is_zero() -> None:
    logits, labels = normal(1, 2, 3), torch.full((1, 2), -100)
    loss, lse = ops("cross_entropy", logits, labels)
    assert loss == 0
    assert torch.equal(op("cross_entropy_grad", torch.ones((), dtype=F64), logits, labels, lse), torch.zeros(1, 2, 3))


def test_cross_entropy_of_bf16_logits_is_float32() -> None:
    logits = normal(1, 2, 3).bfloat16() * 40
    loss, lse = ops("cross_entropy", logits, torch.tensor([[0, 1]]))
    assert loss.dtype == lse.dtype == torch.float32
    torch.testing.assert_close(lse, logits.float().logsumexp(-1))


def test_embedding_gradient_adds_up_repeated_tokens() -> None:
    tokens, w = torch.tensor([[1, 3, 1], [1, 0, 3]]), normal(5, 4).requires_grad_()
    y = op("embedding", tokens, w, dtype="f64")
    dy = normal(2, 3, 4, seed=1)
    (expected,) = torch.autograd.grad(y, w, dy)
    torch.testing.assert_close(op("embedding_wgrad", tokens, dy, vocab=5), expected, rtol=1e-14, atol=0)


def test_swiglu_is_transformers_mlp() -> None:
    gu = normal(3, 8)
    assert torch.equal(op("swiglu", gu), functional.silu(gu[:, :4]) * gu[:, 4:])


def test_shift_fills_past_the_end() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert op("shift", tokens, by=1, fill=-100).tolist() == [[2, 3, -100], [5, 6, -100]]
    assert op("shift", tokens, by=0, fill=-100).tolist() == tokens.tolist()
    assert op("shift", tokens, by=9, fill=7).tolist() == [[7] * 3] * 2


def test_positions() -> None:
    tokens, start = torch.zeros(2, 3, dtype=torch.int64), torch.tensor(5, dtype=torch.int32)
    assert op("positions", tokens).tolist() == [[0, 1, 2]] * 2
    assert op("positions_from", tokens, start).tolist() == [[5, 6, 7]] * 2


def test_cast_saturates_to_float8_and_keeps_nan() -> None:
    x = torch.tensor([1e6, -1e6, 0.3, float("nan")])
    y = op("cast", x, dtype="e4m3")
    assert y.dtype == torch.float8_e4m3fn
    assert y.float()[:3].tolist() == [448.0, -448.0, 0.3125]
    assert y.float()[3].isnan()


def test_rms_norm_is_torchs() -> None:
    x, w = normal(3, 8), normal(8, seed=1)
    torch.testing.assert_close(op("rms_norm", x, w, eps=1e-3), functional.rms_norm(x, (8,), w, 1e-3))


X, I32, F32 = Type(DType.f32, (2, 3, 8)), Type(DType.i32, (2, 3, 8)), DType.f32


@pytest.mark.parametrize(
    ("name", "types", "attrs", "message"),
    [
        ("add", (X, Type(F32, (2, 3, 4))), {}, r"the shapes of f32\[2, 3, 8\] and f32\[2, 3, 4\] differ"),
        ("add", (X, X.with_dtype(DType.bf16)), {}, "differ in element type; cast one"),
        ("multiply", (I32, I32), {}, "expected a floating-point tensor"),
        ("scale", (X,), {"by": "2"}, "must be a number"),
        ("scale", (X,), {}, "missing 1 required"),
        ("cast", (X,), {"dtype": "f33"}, "name of a floating-point type"),
        ("cast", (X,), {"dtype": "i32"}, "name of a floating-point type"),
        ("cast", (I32,), {"dtype": "f32"}, "expected a floating-point tensor"),
        ("split_heads", (X,), {"heads": 3}, "does not divide into 3 heads"),
        ("split_heads", (X,), {"heads": 0}, "heads must be an integer of at least 1"),
        ("merge_heads", (Type(F32, (4,)),), {}, r"expected \[..., H, D\]"),
        ("slice_last", (X,), {"start": 4, "stop": 9}, "columns 4:9 do not exist"),
        ("slice_last", (X,), {"start": 4, "stop": 4}, "stop must be an integer of at least 5"),
        ("pad_last", (X,), {"before": -1, "after": 0}, "before must be"),
        ("join_last", (X, Type(F32, (2, 4, 8))), {}, "the rows of"),
        ("shift", (X,), {"by": 1, "fill": 0}, "expected an integer tensor"),
        ("positions_from", (Type(DType.i64, (2, 3)), Type(DType.i64, ())), {}, r"the start must be i32\[\(\)\]"),
        ("swiglu", (Type(F32, (2, 3)),), {}, "must be an even number"),
        ("rotary", (X, X, X), {"interleave": True, "inverse": False}, "half the columns"),
        ("embedding", (Type(DType.i64, (2,)), X), {"dtype": "f32"}, "must be a matrix"),
        ("embedding_wgrad", (Type(DType.i64, (2,)), X), {"vocab": 4}, "does not fit"),
        ("cross_entropy", (X, Type(DType.i64, (2, 4))), {}, "do not fit"),
        ("scale_rows", (X, X), {}, "one number for each row"),
        ("row_dot", (X, Type(F32, (2, 3, 4))), {}, "differ"),
        ("spread", (X, Type(F32, (2, 4, 8))), {}, "first axes"),
    ],
)
def test_wrong_arguments_are_refused(name: str, types: tuple[Type, ...], attrs: dict[str, int | str],
                                     message: str) -> None:  # fmt: skip
    with pytest.raises(IRError, match=message):
        REGISTRY[name].infer_types(types, tuple(attrs.items()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: Type(F32, (2, 6, 2, 5))}, "causal attention needs the same positions"),
        ({2: Type(F32, (2, 6, 3, 2))}, "do not fit the keys"),
        ({3: Type(DType.i64, (2, 6))}, r"the documents must be i32\[2, 6\]"),
        ({0: Type(F32, (2, 6, 8))}, "expected queries"),
    ],
)
def test_attention_refuses_what_does_not_fit(change: dict[int, Type], message: str) -> None:
    types = {0: Type(F32, (2, 6, 2, 4)), 1: Type(F32, (2, 6, 2, 4)), 2: Type(F32, (2, 6, 2, 2))} | change
    with pytest.raises(IRError, match=message):
        REGISTRY["attention"].infer_types(tuple(types.values()), (("scale", 1.0),))


def test_rotary_table_refuses_odd_sizes() -> None:
    attrs: dict[str, int | float | str] = {"dim": 7, "base": 1e4, "factor": 1.0, "original": 1, "beta_fast": 1.0,
                                           "beta_slow": 1.0, "magnitude": 1.0, "dtype": "f32"}  # fmt: skip
    with pytest.raises(IRError, match="must be even"):
        REGISTRY["rotary_table"].infer_types((Type(DType.i32, (2, 3)),), tuple(attrs.items()))
