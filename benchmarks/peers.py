"""What dsv3c is measured against: transformers' DeepSeek-V3, eager and compiled, at the same configuration."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

# deepseek-v3-tiny without its MTP module: transformers does not train MTP.
TINY: dict[str, Any] = {
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
    "pad_token_id": None,
    "eos_token_id": None,
    "bos_token_id": None,
    "initializer_range": 0.006,
}


def tokens_like(batch: int, length: int, vocab_size: int = 2048, seed: int = 0) -> Tensor:
    """Reproducible random tokens [batch, length]."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def build(seed: int = 0, *, experts: str | None = None) -> Any:
    """transformers' model of TINY in float32; `experts` picks its expert implementation (eager, grouped_mm, ...)."""
    import transformers

    torch.manual_seed(seed)
    extra: dict[str, Any] = {} if experts is None else {"experts_implementation": experts}
    model: Any = transformers.DeepseekV3ForCausalLM
    return model(transformers.DeepseekV3Config(**TINY, **extra))


def train_step(
    *, compiled: bool, bf16: bool, batch: int = 8, length: int = 128, experts: str | None = None
) -> Callable[[], None]:
    """One optimizer step: forward, cross entropy, backward, clipping to 1.0, AdamW (0.9, 0.95, wd 0.1), MTP off.

    Parameters, gradients and moments are float32; bf16 means autocast.
    """
    model = build(experts=experts).train()
    tokens = tokens_like(batch, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def loss_of(tokens: Tensor) -> Tensor:
        logits = model(input_ids=tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    forward = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = forward(tokens)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def generate_seconds_per_token(prompt: int = 1024, new: int = 64, experts: str | None = None) -> Callable[[], float]:
    """transformers.generate, greedy, batch 1, float32; the prompt's own time is subtracted."""
    model = build(experts=experts).eval()
    tokens = tokens_like(1, prompt)

    def run(count: int) -> float:
        start = time.perf_counter()
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        if out.shape[1] != prompt + count:
            raise RuntimeError(f"generate gave {out.shape[1] - prompt} tokens instead of {count}")
        return time.perf_counter() - start

    return lambda: (run(1 + new) - run(1)) / new


def static_cache_seconds_per_token(
    prompt: int = 1024, new: int = 64, experts: str | None = None, compiled: bool = True
) -> Callable[[], float]:
    """A forward with a static cache under torch.compile, greedy, batch 1, float32; only decode steps are timed."""
    import transformers

    model = build(experts=experts).eval()
    tokens = tokens_like(1, prompt)
    cache: Any = transformers.StaticCache(config=model.config, max_cache_len=prompt + new)

    def decode(token: Tensor, position: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
        return logits[:, -1:].argmax(-1)

    step = torch.compile(decode, dynamic=False) if compiled else decode

    def run() -> float:
        with torch.inference_mode():
            cache.reset()
            logits = model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            start = time.perf_counter()
            for i in range(new):
                token = step(token, torch.tensor([[prompt + i]]))
            return (time.perf_counter() - start) / new

    return run
