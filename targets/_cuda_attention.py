"""Attention on Hopper: cuDNN's fused kernels through torch for training, the reference over the latent cache.

With documents the mask is a bias, and then cuDNN's backward pass may differ in the last bits from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dsv3c.lazy import lazy
from dsv3c.ops import REGISTRY
from dsv3c.target import Implementation
from dsv3c.targets._cuda_launch import Call

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Tensors = tuple["torch.Tensor", ...]


def _bias(documents: Tensors, dtype: torch.dtype) -> torch.Tensor | None:
    """0 where a position may look, -inf elsewhere: [B, 1, S, S]; None if the causal mask says it all."""
    if not documents:
        return None
    same = documents[0].unsqueeze(2) == documents[0].unsqueeze(1)
    kept = same & torch.ones_like(same[0]).tril()
    return torch.zeros(kept.shape, dtype=dtype, device=kept.device).masked_fill_(~kept, float("-inf")).unsqueeze(1)


def _by_reference(name: str, inputs: Tensors, outputs: Tensors, scale: float) -> Call:
    reference: Callable[..., Tensors] = REGISTRY[name].reference  # type: ignore[assignment]

    def run() -> None:
        for out, made in zip(outputs, reference(*inputs, scale=scale), strict=True):
            out.copy_(made)

    return run


def _fused(q: torch.Tensor, v: torch.Tensor) -> bool:
    return q.dtype == torch.bfloat16 and q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0


def attention(inputs: Tensors, outputs: Tensors, *, scale: float) -> Call:
    (q, k, v, *documents), (o, lse) = inputs, outputs
    if not _fused(q, v):
        return _by_reference("attention", inputs, outputs, scale)

    def run() -> None:
        bias = _bias(tuple(documents), q.dtype)
        made = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *(t.transpose(1, 2) for t in (q, k, v)), bias, True, 0.0, bias is None, False, scale=scale
        )
        o.copy_(made[0].transpose(1, 2))
        lse.copy_(made[1].reshape(lse.shape))

    return run


def attention_grad(inputs: Tensors, outputs: Tensors, *, scale: float) -> Call:
    (do, q, k, v, o, lse, *documents) = inputs
    if not _fused(q, v):
        return _by_reference("attention_grad", inputs, outputs, scale)
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the state of a dropout that is 0
    length = q.shape[1]

    def run() -> None:
        bias = _bias(tuple(documents), q.dtype)
        made = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            *(t.transpose(1, 2) for t in (do, q, k, v, o)), lse.unsqueeze(-1), unused, unused, bias, None, None,
            length, length, 0.0, bias is None, scale=scale,
        )  # fmt: skip
        for out, gradient in zip(outputs, made, strict=True):
            out.copy_(gradient.transpose(1, 2))

    return run


def cache_write(inputs: Tensors, outputs: Tensors) -> Call:
    (cache, latent, start), (out,) = inputs, outputs
    in_place = cache.data_ptr() == out.data_ptr()
    places = torch.arange(latent.shape[1], device=latent.device)

    def run() -> None:
        if not in_place:
            out.copy_(cache)
        out.index_copy_(1, start + places, latent)

    return run


ATTENTION = (
    Implementation("attention", attention),
    Implementation("attention_grad", attention_grad),
    Implementation("cache_write", cache_write),
)
