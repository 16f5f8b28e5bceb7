"""The plain model against transformers, and its own losses against hand-written sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from plain_model import losses, rms_norm, updated_bias

from dsv3c.runtime.reference import checkpoint_tensors, everything_in, in_dtype, run_model

transformers = pytest.importorskip("transformers")


@dataclass(frozen=True)
class Case:
    groups: int
    kept: int
    q_rank: int | None
    yarn: bool
    interleave: bool
    shared: int
    norm_topk: bool = True
    dense: int = 1


CASES = [
    Case(groups=4, kept=2, q_rank=24, yarn=True, interleave=True, shared=1),
    Case(groups=1, kept=1, q_rank=None, yarn=False, interleave=False, shared=2, dense=0),
    Case(groups=2, kept=1, q_rank=16, yarn=False, interleave=True, shared=0, norm_topk=False),
    Case(groups=2, kept=2, q_rank=None, yarn=True, interleave=False, shared=1, dense=2),
]


def config_of(case: Case) -> Any:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if case.yarn:
        rope |= {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.0}
        rope |= {"mscale_all_dim": 0.7, "beta_fast": 4.0, "beta_slow": 1.0}
    return transformers.DeepseekV3Config(
        vocab_size=61, hidden_size=40, intermediate_size=56, moe_intermediate_size=20, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_shared_experts=case.shared, n_routed_experts=8,
        routed_scaling_factor=2.5, kv_lora_rank=24, q_lora_rank=case.q_rank, qk_rope_head_dim=8, v_head_dim=12,
        qk_nope_head_dim=16, n_group=case.groups, topk_group=case.kept, num_experts_per_tok=3,
        first_k_dense_replace=case.dense, norm_topk_prob=case.norm_topk, max_position_embeddings=128,
        rope_parameters=rope, rope_interleave=case.interleave, num_nextn_predict_layers=0, pad_token_id=None,
        attn_implementation="eager", experts_implementation="eager",
    )  # fmt: skip


def model_of(case: Case, seed: int) -> Any:
    torch.manual_seed(seed)
    model = transformers.DeepseekV3ForCausalLM(config_of(case))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in name else 0.25 * torch.randn_like(p))
        for block in model.model.layers:
            if hasattr(block.mlp, "gate"):
                block.mlp.gate.e_score_correction_bias.uniform_(-1.5, 0.3)
    return in_dtype(model, "fp64")


@pytest.mark.parametrize("number", range(len(CASES)))
def test_equals_transformers_in_float64(number: int) -> None:
    model = model_of(CASES[number], seed=number)
    tokens = torch.randint(61, (2, 23), generator=torch.Generator().manual_seed(number))
    reference = run_model(model, tokens, "fp64")
    weights = checkpoint_tensors({k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()})
    weights = {k: v.detach().requires_grad_() for k, v in weights.items()}

    out = losses(weights, model.config, tokens)

    assert out.logits.dtype == reference.logits.dtype == torch.float64
    assert (out.logits - reference.logits).norm() / reference.logits.norm() < 1e-12
    assert out.main.item() == pytest.approx(reference.loss, rel=1e-12)
    assert sorted(out.experts) == sorted(reference.experts) == list(range(CASES[number].dense, 3))
    for layer, chosen in out.experts.items():
        assert torch.equal(chosen, reference.experts[layer])
    names = list(reference.gradients)
    assert set(names) == {n for n in weights if not n.endswith("e_score_correction_bias")}
    mine = torch.autograd.grad(out.main, [weights[n] for n in names], allow_unused=True)
    total = torch.stack([g.norm() for g in reference.gradients.values()]).norm()
    for name, g in zip(names, mine, strict=True):
        theirs = reference.gradients[name]
        difference = theirs.norm() if g is None else (g - theirs).norm()
        assert difference <= 1e-10 * max(theirs.norm(), 1e-5 * total), name


def mtp_weights(config: Any, modules: int, seed: int) -> dict[str, torch.Tensor]:
    """Random float64 weights of a model with MTP modules, in the checkpoint's names."""
    wide = config.to_dict() | {"num_hidden_layers": config.num_hidden_layers + modules}
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**wide))
    generator = torch.Generator().manual_seed(seed)

    def random(shape: torch.Size | tuple[int, ...], name: str) -> torch.Tensor:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return 1 + 0.2 * noise if "norm" in name else 0.25 * noise

    weights = {k: random(v.shape, k) for k, v in checkpoint_tensors(model.state_dict()).items()}
    d = config.hidden_size
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + modules):
        for name, shape in (("enorm", (d,)), ("hnorm", (d,)), ("shared_head.norm", (d,)), ("eh_proj", (d, 2 * d))):
            weights[f"model.layers.{layer}.{name}.weight"] = random(shape, name)
    return weights


def test_mtp_module_equals_transformers_drafting() -> None:
    """transformers uses MTP modules only to draft; on a whole prompt a module's logits must be ours."""
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers has no MtpModel")
    config = config_of(CASES[0])
    config.num_nextn_predict_layers = 2
    config.first_k_dense_replace = 0  # MtpModel numbers its layers from 0, so a dense first layer would be dense there
    weights = mtp_weights(config, modules=2, seed=5)
    tokens = torch.randint(61, (2, 19), generator=torch.Generator().manual_seed(6))
    out = losses(weights, config, tokens, mtp_input="post_norm", mtp_positions="with_target")

    main = in_dtype(transformers.DeepseekV3ForCausalLM(config), "fp64")
    drafter = layers.MtpModel(main, 2).double()
    main_names = {k: v for k, v in weights.items() if not k.startswith(("model.layers.3.", "model.layers.4."))}
    main.load_state_dict(fused(main_names))
    for k in range(2):
        at = f"model.layers.{3 + k}."
        own = {n.removeprefix(at): w for n, w in weights.items() if n.startswith(at)}
        renamed = {
            n if n.split(".")[0] in ("enorm", "hnorm", "eh_proj") else "mtp_block." + n: w
            for n, w in fused(own).items() if not n.startswith("shared_head")
        }  # fmt: skip
        drafter.layers[k].load_state_dict(renamed | {"post_norm.weight": own["shared_head.norm.weight"]})
        drafter.layers[k].mtp_block.mlp.gate.e_score_correction_bias = own["mlp.gate.e_score_correction_bias"]

    with torch.no_grad(), everything_in(torch.float64):
        state = main.model(input_ids=tokens, use_cache=False).last_hidden_state
        for k in range(2):
            ahead = tokens[:, k + 1 : -1]
            count = ahead.shape[1]
            positions, embedded = torch.arange(count)[None], main.model.embed_tokens(ahead)
            state = drafter.layers[k](
                embedded,
                state[:, :count],
                position_embeddings=main.model.rotary_emb(embedded, positions),
                attention_mask=torch.full((1, 1, count, count), -torch.inf, dtype=torch.float64).triu(1),
                position_ids=positions,
                past_key_values=None,
            )
            theirs = main.lm_head(state)
            assert (theirs - out.mtp_logits[k]).norm() / theirs.norm() < 1e-12


def fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of checkpoint_tensors."""
    out = {k: v for k, v in weights.items() if ".experts." not in "." + k}
    layers = sorted({k.split("experts.")[0] for k in weights if ".experts." in "." + k})
    for at in layers:

        def stack(which: str, at: str = at) -> torch.Tensor:
            return torch.stack([weights[f"{at}experts.{e}.{which}.weight"] for e in range(8)])

        out[at + "experts.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
        out[at + "experts.down_proj"] = stack("down_proj")
    return out


def test_mtp_loss_counts_positions_with_a_target() -> None:
    config = config_of(CASES[0])
    weights = mtp_weights(config, modules=2, seed=1)
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(2))
    for positions, extra in (("with_target", 0), ("with_input", 1)):
        out = losses(weights, config, tokens, mtp_modules=2, mtp_positions=positions)  # type: ignore[arg-type]
        for k, (loss, logits) in enumerate(zip(out.mtp, out.mtp_logits, strict=True), start=1):
            assert logits.shape[1] == 9 - 1 - k + extra
            by_hand = [
                -torch.log_softmax(logits[b, i], -1)[tokens[b, i + k + 1]] for b in range(2) for i in range(9 - 1 - k)
            ]
            assert loss.item() == pytest.approx(torch.stack(by_hand).mean().item(), rel=1e-12)
    assert out.total(0.3).item() == pytest.approx((out.main + 0.15 * (out.mtp[0] + out.mtp[1])).item())


def test_mtp_input_changes_what_the_module_sees() -> None:
    config = config_of(CASES[0])
    weights = mtp_weights(config, modules=1, seed=1)
    tokens = torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(2))
    pre = losses(weights, config, tokens, mtp_modules=1, mtp_input="pre_norm")
    post = losses(weights, config, tokens, mtp_modules=1, mtp_input="post_norm")
    assert torch.equal(pre.main, post.main)
    assert not torch.allclose(pre.mtp[0], post.mtp[0])
    # With a final norm of ones the norm of a norm is the norm, up to eps.
    weights["model.norm.weight"] = torch.ones(config.hidden_size, dtype=torch.float64)
    pre = losses(weights, config, tokens, mtp_modules=1, mtp_input="pre_norm")
    post = losses(weights, config, tokens, mtp_modules=1, mtp_input="post_norm")
    assert torch.allclose(pre.mtp[0], post.mtp[0], rtol=1e-5)


def test_balance_loss_by_hand() -> None:
    config = config_of(CASES[0])
    weights = mtp_weights(config, modules=1, seed=3)
    tokens = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(4))
    out = losses(weights, config, tokens, alpha=0.01, mtp_modules=1)
    assert sorted(out.balance_per_layer) == [1, 2, 3]
    assert out.balance.item() == pytest.approx(0.01 * (out.balance_per_layer[1] + out.balance_per_layer[2]).item())
    # When every expert gets its share of tokens and of probability, sum f*P is 1.
    for layer, load in out.load.items():
        assert load.sum() == out.experts[layer].numel()
        counts = torch.stack([torch.bincount(e.flatten(), minlength=8) for e in out.experts[layer]])
        assert torch.equal(counts.sum(0), load)
    uniform = weights | {"model.layers.1.mlp.gate.weight": torch.zeros(8, 40, dtype=torch.float64)}
    assert losses(uniform, config, tokens).balance_per_layer[1].item() == pytest.approx(1.0)


def test_bias_rises_for_underloaded_experts() -> None:
    bias = torch.tensor([0.5, -0.25, 0.0, 0.0])
    new = updated_bias(bias, torch.tensor([6, 2, 0, 0]), gamma=0.125)
    assert new.tolist() == [0.375, -0.25, 0.125, 0.125]


def test_rms_norm_has_unit_mean_square() -> None:
    y = rms_norm(torch.randn(3, 16, dtype=torch.float64), torch.ones(16, dtype=torch.float64), 0.0)
    assert torch.allclose((y * y).mean(-1), torch.ones(3, dtype=torch.float64))
