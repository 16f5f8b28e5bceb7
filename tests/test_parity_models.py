"""A compiled model against transformers (logits, gradients, experts) and against the plain model (MTP, balance)."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plain_model import losses, updated_bias
from test_plain_model import CASES, Case, config_of

import dsv3c
from dsv3c.job import Recipe
from dsv3c.models.checkpoint import hf_tensors
from dsv3c.models.config import ModelConfig
from dsv3c.models.presets import PRESETS
from dsv3c.runtime.parity import compare, reference_run
from dsv3c.runtime.session import Session

transformers = pytest.importorskip("transformers")

ALL = [
    *CASES,
    Case(groups=4, kept=3, q_rank=None, yarn=True, interleave=True, shared=0, dense=0),
    Case(groups=1, kept=1, q_rank=24, yarn=False, interleave=True, shared=1),
    Case(groups=4, kept=2, q_rank=16, yarn=False, interleave=False, shared=2),
]


def checkpoint(case: Case, directory: Path, seed: int) -> Path:
    """A transformers checkpoint with random weights, norms off 1 and negative router biases."""
    torch.manual_seed(seed)
    model = transformers.DeepseekV3ForCausalLM(config_of(case))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in name else 0.25 * torch.randn_like(p))
        for block in model.model.layers:
            if hasattr(block.mlp, "gate"):
                block.mlp.gate.e_score_correction_bias.uniform_(-1.5, 0.3)
    model.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("number", range(len(ALL)))
def test_equals_transformers(number: int, precision: str, tmp_path: Path) -> None:
    directory = checkpoint(ALL[number], tmp_path / "hf", seed=number)
    tokens = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(number))
    plan = dsv3c.compile(str(directory), job="train", target="cpu", seq=23, micro_batch=2, precision=precision)
    session = dsv3c.load(plan, weights=str(directory))

    certificate = compare(session, reference_run(directory, tokens, precision))

    assert certificate.passed, certificate.render()


def random_session(groups: int, modules: int, **compiled: object) -> Session:
    """A small float64 model with `modules` MTP modules and every weight random."""
    config = replace(
        PRESETS["deepseek-v3-tiny"], vocab_size=61, hidden_size=40, intermediate_size=56, moe_intermediate_size=20,
        num_hidden_layers=2, num_attention_heads=2, q_lora_rank=24, kv_lora_rank=24, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=12, n_routed_experts=8, n_group=groups, topk_group=max(1, groups // 2),
        num_experts_per_tok=2, num_nextn_predict_layers=modules,
    )  # fmt: skip
    session = dsv3c.load(dsv3c.compile(config, precision="fp64", **compiled), seed=0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(groups)
    for tensor in session.weights.tensors.values():
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        tensor.copy_(1 + 0.2 * noise if tensor.dim() == 1 else 0.2 * noise)
    return session


def plain_arguments(session: Session) -> tuple[dict[str, torch.Tensor], types.SimpleNamespace]:
    """The session's weights by checkpoint name, with gradients on, and its configuration."""
    config = ModelConfig.from_dict(session.plan.config)
    weights = {n: t.detach().clone() for n, t in hf_tensors(config, session.weights.tensors)}
    for name, tensor in weights.items():
        tensor.requires_grad_("e_score_correction_bias" not in name)
    return weights, types.SimpleNamespace(**config.to_hf_dict())


@pytest.mark.parametrize(("groups", "modules"), [(1, 1), (2, 2), (4, 1)])
def test_mtp_and_balance_losses_and_gradients(groups: int, modules: int) -> None:
    session = random_session(groups, modules, seq=19, micro_batch=2)
    tokens = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(7))
    weights, config = plain_arguments(session)

    ours = session.losses(tokens)
    out = losses(weights, config, tokens, alpha=1.0)

    assert ours["loss.main"] == pytest.approx(out.main.item(), rel=1e-12)
    for k, loss in enumerate(out.mtp, 1):
        assert ours[f"loss.mtp.{k}"] == pytest.approx(loss.item(), rel=1e-12)
    for layer in range(1, 2):
        assert ours[f"balance.{layer}"] == pytest.approx(out.balance_per_layer[layer].item(), rel=1e-12)

    gradients = session.gradients(tokens, losses=("main", "mtp"))
    (out.main + session.recipe.mtp / modules * sum(out.mtp)).backward()
    shared = {n for n in weights if any(n.endswith(s) for s in ("embed_tokens.weight", "shared_head.head.weight"))}
    for name, gradient in gradients.items():
        expected = weights[name].grad
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            suffix = "embed_tokens.weight" if "embed" in name else "head.weight"
            parts = [weights[n].grad for n in shared | {name} if n.endswith(suffix) and weights[n].grad is not None]
            expected = torch.stack([p for p in parts if p is not None]).sum(0)
        if expected is None:
            assert gradient.norm() == 0, name
        else:
            assert (gradient - expected).norm() <= 1e-10 * max(expected.norm().item(), 1e-8), name


def test_balance_gradient_of_the_main_model() -> None:
    session = random_session(2, 0, seq=19, micro_batch=2)
    tokens = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(8))
    weights, config = plain_arguments(session)
    losses(weights, config, tokens, alpha=session.recipe.balance).balance.backward()
    gradients = session.gradients(tokens, losses=("balance",))
    largest = max(float(w.grad.norm()) for w in weights.values() if w.grad is not None)
    for name, gradient in gradients.items():
        expected = weights[name].grad
        difference = gradient if expected is None else gradient - expected
        assert difference.norm() <= 1e-10 * largest, name


def test_bias_moves_by_the_published_rule() -> None:
    session = random_session(2, 0, seq=19, micro_batch=1, global_batch=2)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before = session.weights.tensors[name].clone()
    tokens = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(9))
    result = session.step(tokens)
    load = result.expert_load["model.layers.1"]
    assert load.sum() == 2 * 19 * 2
    moved = session.weights.tensors[name]
    assert torch.allclose(moved, updated_bias(before, load, session.recipe.bias_speed), rtol=0, atol=1e-12)
    assert torch.allclose((moved - before).abs(), torch.tensor(session.recipe.bias_speed).double(), rtol=1e-7, atol=0)


def test_micro_batches_add_up_to_the_whole_batch() -> None:
    tokens = torch.randint(61, (4, 19), generator=torch.Generator().manual_seed(10))
    whole = random_session(2, 1, seq=19, micro_batch=4)
    parts = random_session(2, 1, seq=19, micro_batch=1, global_batch=4)
    a, b = whole.step(tokens), parts.step(tokens)
    assert a.loss == pytest.approx(b.loss, rel=1e-12)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-9)
    for name, tensor in whole.weights.tensors.items():
        assert torch.allclose(tensor, parts.weights.tensors[name], rtol=1e-9, atol=1e-12), name


def test_step_is_adamw_on_clipped_gradients() -> None:
    recipe = Recipe(clip=0.5, decay=0.1, lr=1e-2)
    session = random_session(1, 0, seq=19, micro_batch=2, recipe=recipe)
    tokens = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(11))
    before = {n: t.clone() for n, t in session.weights.tensors.items()}
    session.gradients(tokens, losses=("main", "mtp", "balance"))
    gradients = {n: g.clone() for n, g in session.weights.gradients().items()}
    session.step(tokens)

    parameters = {n: before[n].clone().requires_grad_() for n in gradients}
    for name, p in parameters.items():
        p.grad = gradients[name]
    torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
    groups = [
        {"params": [p for p in parameters.values() if (p.dim() > 1) == decayed], "weight_decay": 0.1 * decayed}
        for decayed in (True, False)
    ]
    torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps).step()
    for name, p in parameters.items():
        assert torch.allclose(session.weights.tensors[name], p, rtol=1e-9, atol=1e-12), name


def test_documents_are_kept_apart_only_if_asked() -> None:
    tokens = torch.randint(2, 61, (1, 19), generator=torch.Generator().manual_seed(12))
    tokens[0, 8] = 1
    changed = tokens.clone()
    changed[0, 3] = (tokens[0, 3] + 1) % 59 + 2

    def second_document_moves(document_end: int | None) -> bool:
        session = random_session(1, 0, seq=19, document_end=document_end)
        runner = session._runner("train", 1, 19, taps=("logits",))
        found = []
        for t in (tokens, changed):
            runner.values["tokens"].copy_(t)
            runner.run()
            found.append(next(iter(runner.taps.values())).clone())
        return not torch.equal(found[0][:, 9:], found[1][:, 9:])

    assert second_document_moves(None)
    assert not second_document_moves(1)


def test_a_decode_plan_saves_the_model_it_holds(tmp_path: Path) -> None:
    plan = dsv3c.compile("deepseek-v3-tiny:num_hidden_layers=2", job="decode", seq=8)
    session = dsv3c.load(plan, seed=3)
    session.save_hf(tmp_path / "hf")
    tokens = torch.randint(2048, (1, 8), generator=torch.Generator().manual_seed(1))
    again = dsv3c.load(plan, weights=tmp_path / "hf")
    assert torch.equal(session.forward(tokens), again.forward(tokens))


def test_the_cache_holds_latents_and_nothing_else() -> None:
    """Rank + rotary numbers per token and layer, and decoding from it equals running everything again."""
    session = random_session(2, 0, seq=8)
    tokens = torch.randint(61, (2, 8), generator=torch.Generator().manual_seed(2))
    new = session.generate(tokens, max_new_tokens=6)
    cache = session.cache(2, 8 + 6)
    config = session.config
    width = config.kv_lora_rank + config.qk_rope_head_dim
    numbers = sum(t.numel() for t in cache.values())
    assert numbers == 2 * (8 + 6) * width * config.num_hidden_layers
    assert sum(t.untyped_storage().nbytes() for t in cache.values()) == numbers * 8
    decoding = {n for s in session.program.sequences if s.name == "decode" for n in s.inputs}
    assert decoding - set(cache) == {"tokens", "start"}
    so_far = tokens
    for i in range(6):
        so_far = torch.cat((so_far, session.forward(so_far)[:, -1:].argmax(-1)), 1)
        assert torch.equal(so_far[:, 8:], new[:, : i + 1])
