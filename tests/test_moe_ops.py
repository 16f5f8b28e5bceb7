"""The ops of the mixture of experts and the optimizer against transformers, torch and direct formulas."""

from __future__ import annotations

import pytest
import torch

from dsv3c.build import Builder
from dsv3c.dims import symbol
from dsv3c.ir import DType, IRError, Type
from dsv3c.ops import REGISTRY
from dsv3c.ops.router import distinct_experts


def apply(op: str, *tensors: torch.Tensor, **attrs: object) -> torch.Tensor:
    result = REGISTRY[op].reference(*tensors, **attrs)
    assert isinstance(result, torch.Tensor)
    return result


def apply_all(op: str, *tensors: torch.Tensor, **attrs: object) -> tuple[torch.Tensor, ...]:
    result = REGISTRY[op].reference(*tensors, **attrs)
    assert isinstance(result, tuple)
    return result


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def choices(seed: int, tokens: int, k: int, experts: int) -> torch.Tensor:
    return distinct_experts(torch.Generator().manual_seed(seed), (tokens,), k, experts)


# --- router


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (2, 1), (4, 2), (4, 3)])
@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_choose_experts_and_weights_equal_transformers(groups: int, kept: int, shift: float) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    experts, hidden, k = 16, 12, 3
    config = DeepseekV3Config(
        hidden_size=hidden, n_routed_experts=experts, num_experts_per_tok=k, n_group=groups, topk_group=kept,
        routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    x, weight = random(1, 200, hidden, dtype=torch.float32), random(2, experts, hidden, dtype=torch.float32)
    bias = random(3, experts, dtype=torch.float32) * 0.3 + shift
    with torch.no_grad():
        router.weight.copy_(weight)
        router.e_score_correction_bias.copy_(bias)
        _logits, theirs_weights, theirs = router(x)
    s = torch.nn.functional.linear(x, weight).sigmoid()
    ours = apply("choose_experts", s, bias, k=k, groups=groups, kept=kept)
    assert ours.dtype == torch.int32
    assert torch.equal(ours.long().sort(-1).values, theirs.sort(-1).values)
    weights = apply("normalize", apply("pick", s, ours), scale=2.5, eps=1e-20)
    spread = torch.zeros(200, experts)
    assert torch.allclose(
        spread.scatter(1, ours.long(), weights), spread.scatter(1, theirs, theirs_weights), rtol=1e-6, atol=0
    )


def test_choose_experts_masks_groups_with_minus_infinity() -> None:
    """With 0 instead, the experts 2 and 3 of the group that was dropped would win over biased scores below 0."""
    s = torch.tensor([[0.9, 0.8, 0.5, 0.4]])
    bias = torch.full((4,), -5.0)
    assert apply("choose_experts", s, bias, k=2, groups=2, kept=1).tolist() == [[0, 1]]


def test_choose_experts_is_best_first_and_ties_go_to_the_lower_index() -> None:
    bias = torch.zeros(6)
    s = torch.tensor([[0.1, 0.7, 0.3, 0.7, 0.9, 0.7]])
    assert apply("choose_experts", s, bias, k=3, groups=1, kept=1).tolist() == [[4, 1, 3]]
    even = torch.full((1, 6), 0.5)
    assert apply("choose_experts", even, bias, k=2, groups=3, kept=2).tolist() == [[0, 1]]


def test_choose_experts_adds_the_bias_in_float32_to_bf16_scores_and_in_float64_to_float64_ones() -> None:
    s = torch.tensor([[0.5, 0.5]], dtype=torch.bfloat16)
    assert apply("choose_experts", s, torch.tensor([0.0, 1e-4]), k=1, groups=1, kept=1).tolist() == [[1]]
    bias = torch.tensor([0.0, 1e-12], dtype=torch.float64)
    assert apply("choose_experts", s.double(), bias, k=1, groups=1, kept=1).tolist() == [[1]]


def test_choose_experts_with_one_expert_per_group() -> None:
    s = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    assert apply("choose_experts", s, torch.zeros(4), k=2, groups=4, kept=2).tolist() == [[1, 3]]


@pytest.mark.parametrize(
    ("attrs", "reason"),
    [
        ({"k": 2, "groups": 3, "kept": 1}, "8 experts do not divide into 3 groups"),
        ({"k": 2, "groups": 4, "kept": 5}, "cannot keep 5 of 4 groups"),
        ({"k": 5, "groups": 4, "kept": 2}, "cannot choose 5 experts of the 4"),
    ],
)
def test_choose_experts_refuses_impossible_combinations(attrs: dict[str, int], reason: str) -> None:
    types = Type(DType.f32, (symbol("T"), 8)), Type(DType.f32, (8,))
    with pytest.raises(IRError, match=reason):
        REGISTRY["choose_experts"].infer_types(types, tuple(attrs.items()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normalize_grad_equals_autograd(dtype: torch.dtype) -> None:
    p = (random(1, 5, 3).abs() + 0.1).to(dtype).requires_grad_()
    dq = random(2, 5, 3, dtype=dtype)
    q = apply("normalize", p, scale=2.5, eps=1e-20)
    (expected,) = torch.autograd.grad(q, p, dq)
    found = apply("normalize_grad", dq, p.detach(), scale=2.5, eps=1e-20)
    assert torch.allclose(found, expected, rtol=1e-12 if dtype == torch.float64 else 1e-4, atol=1e-6)


def test_pick_grad_is_the_gradient_of_pick() -> None:
    s, e, dp = random(1, 6, 8).requires_grad_(), choices(2, 6, 3, 8), random(3, 6, 3)
    (expected,) = torch.autograd.grad(apply("pick", s, e), s, dp)
    assert torch.equal(apply("pick_grad", dp, e, experts=8), expected)


# --- balance


def direct_balance(s: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """Equations 17 to 20 as they are written, one sequence and one expert at a time."""
    batch, length, experts = s.shape
    k = e.shape[-1]
    losses = []
    for b in range(batch):
        loss = torch.zeros((), dtype=s.dtype)
        for i in range(experts):
            f = experts / (k * length) * sum(int((e[b, t] == i).any()) for t in range(length))
            loss = loss + f * sum(s[b, t, i] / s[b, t].sum() for t in range(length)) / length
        losses.append(loss)
    return torch.stack(losses).mean()


def test_balance_loss_equals_its_formula_and_its_gradient_autograd() -> None:
    s = random(1, 2, 5, 8).sigmoid().requires_grad_()
    e = choices(2, 10, 3, 8).view(2, 5, 3)
    expected = direct_balance(s, e)
    assert torch.allclose(apply("balance_loss", s, e), expected, rtol=1e-13)
    dloss = torch.tensor(0.7, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected, s, dloss)
    assert torch.allclose(apply("balance_loss_grad", dloss, s.detach(), e), gradient, rtol=1e-10, atol=1e-15)


def test_balance_loss_of_an_even_load_is_one() -> None:
    s = torch.full((1, 4, 4), 0.25, dtype=torch.float64)
    e = torch.arange(4, dtype=torch.int32).view(1, 4, 1)
    assert apply("balance_loss", s, e).item() == pytest.approx(1.0, abs=1e-15)


def test_balance_loss_of_vanished_scores_is_a_number() -> None:
    s, e = torch.zeros(1, 2, 4), torch.zeros(1, 2, 1, dtype=torch.int32)
    assert apply("balance_loss", s, e).item() == 0
    assert apply("balance_loss_grad", torch.tensor(0.0), s, e).isfinite().all()


def test_expert_load_counts_choices_but_not_negative_ones() -> None:
    e = torch.tensor([[0, 3], [3, -1], [1, 3]], dtype=torch.int32)
    load = apply("expert_load", e, experts=5)
    assert load.dtype == torch.float32 and load.tolist() == [1, 1, 0, 3, 0]


def test_update_bias_moves_against_the_load_and_leaves_the_mean() -> None:
    bias = torch.tensor([0.5, 0.0, -0.5, 1.0])
    moved = apply("update_bias", bias, torch.tensor([4.0, 2.0, 0.0, 2.0]), torch.tensor(0.25))
    assert moved.tolist() == [0.25, 0.0, -0.25, 1.0]


def test_update_bias_of_an_even_load_is_exactly_nothing() -> None:
    """The mean of equal loads times 1/3 is not always that load; comparing sums is exact."""
    bias = random(1, 3, dtype=torch.float32)
    for load in range(1, 300):
        assert torch.equal(apply("update_bias", bias, torch.full((3,), float(load)), torch.tensor(0.1)), bias)


def test_update_bias_refuses_a_bf16_bias() -> None:
    b16, f32 = Type(DType.bf16, (4,)), Type(DType.f32, (4,))
    with pytest.raises(IRError, match="must stay f32"):
        REGISTRY["update_bias"].infer_types((b16, f32, Type(DType.f32, ())), ())


# --- dispatch


def test_dispatch_and_combine_restore_the_tokens() -> None:
    x, e, p = random(1, 2, 3, 4), choices(2, 6, 2, 8).view(2, 3, 2), random(3, 2, 3, 2)
    rows, row_e, row_p, handle = apply_all("dispatch", x, e, p)
    assert rows.shape == (6, 4) and row_e.shape == row_p.shape == (6, 2)
    assert torch.equal(apply("combine", rows, handle), x)
    assert torch.equal(apply("dispatch_again", x, handle), rows)
    assert torch.equal(apply("combine", row_p, handle), p)


def test_dispatch_has_one_row_per_token_in_closed_form() -> None:
    b, s = symbol("B"), symbol("S")
    types = Type(DType.bf16, (b, s, 64)), Type(DType.i32, (b, s, 4)), Type(DType.f32, (b, s, 4))
    rows, row_e, row_p, handle = REGISTRY["dispatch"].infer_types(types, ())
    assert [str(t) for t in (rows, row_e, row_p, handle)] == [
        "bf16[B*S, 64]",
        "i32[B*S, 4]",
        "f32[B*S, 4]",
        "i32[B, S]",
    ]
    assert REGISTRY["combine"].infer_types((rows, handle), ()) == (types[0],)


def test_the_gradient_of_dispatch_omits_what_has_none() -> None:
    b = Builder(REGISTRY, "g")
    x, e = b.input("x", Type(DType.f64, (6, 4))), b.input("e", Type(DType.i32, (6, 2)))
    p, dp = b.input("p", Type(DType.f64, (6, 2))), b.input("dp", Type(DType.f64, (6, 2)))
    b.dispatch(x, e, p, out=("rows", "row_e", "row_p", "handle"))
    node = b.graph(()).nodes[-1]
    vjp = REGISTRY["dispatch"].vjp
    assert vjp is not None
    dx, de, gradient = vjp(b, node, None, None, dp, None)
    assert dx is None and de is None and gradient is not None
    assert [n.op for n in b.graph(()).nodes] == ["dispatch", "combine"]


# --- permute


def cases(experts: int) -> list[torch.Tensor]:
    """Random choices; experts without tokens; all tokens to one expert; some choices on other ranks; none here."""
    some = choices(1, 7, 3, experts)
    away = some.clone()
    away[2, 1] = away[4] = -1
    return [
        some,
        choices(2, 9, 2, 3) + experts - 3,
        torch.full((6, 1), 2, dtype=torch.int32),
        away,
        torch.full((4, 2), -1, dtype=torch.int32),
    ]


@pytest.mark.parametrize("align", [1, 32, 128])
@pytest.mark.parametrize("case", range(5))
def test_sort_by_expert_gives_aligned_stable_inverse_maps(case: int, align: int) -> None:
    experts = 8
    e = cases(experts)[case]
    offsets, slot, source = apply_all("sort_by_expert", e, experts=experts, align=align)
    inferred = REGISTRY["sort_by_expert"].infer_types(
        (Type(DType.i32, tuple(e.shape)),), (("experts", experts), ("align", align))
    )
    assert [t.shape for t in inferred] == [tuple(t.shape) for t in (offsets, slot, source)]
    assert offsets[0] == 0 and (offsets % align == 0).all() and (offsets.diff() >= 0).all()
    flat = e.flatten().tolist()
    for expert in range(experts):
        start, stop = int(offsets[expert]), int(offsets[expert + 1])
        mine = [i for i, chosen in enumerate(flat) if chosen == expert]
        assert stop - start == -(-len(mine) // align) * align
        assert source[start:stop].tolist() == mine + [-1] * (stop - start - len(mine))
    assert (source[int(offsets[-1]) :] == -1).all()
    for i, row in enumerate(slot.flatten().tolist()):
        assert row == -1 if flat[i] < 0 else source[row] == i


def test_sort_by_expert_has_rows_in_closed_form() -> None:
    e = Type(DType.i32, (symbol("T"), 8))
    for align, rows in ((1, "i32[8*T]"), (128, "i32[8*T + 8192]")):
        assert str(REGISTRY["sort_by_expert"].infer_types((e,), (("experts", 64), ("align", align)))[2]) == rows


@pytest.mark.parametrize("align", [1, 32])
@pytest.mark.parametrize("case", range(5))
def test_permute_and_unpermute(case: int, align: int) -> None:
    e = cases(8)[case]
    tokens, k = e.shape
    offsets, slot, source = apply_all("sort_by_expert", e, experts=8, align=align)
    x, p = random(1, tokens, 5), random(2, tokens, k)
    rows = apply("permute", x, source, slot)
    weights = apply("permute_weights", p, source, slot)
    for r, choice in enumerate(source.tolist()):
        assert torch.equal(rows[r], x[choice // k] if choice >= 0 else torch.zeros(5, dtype=torch.float64))
        assert weights[r] == (p.flatten()[choice] if choice >= 0 else 0)
    here = (e >= 0).sum(-1, keepdim=True)
    assert torch.allclose(apply("unpermute", rows, slot, source), x * here)
    assert torch.equal(apply("unpermute_weights", weights, slot, source), p * (e >= 0))
    assert offsets[-1] <= len(source)


@pytest.mark.parametrize("align", [1, 32])
def test_permutes_are_the_gradients_of_each_other(align: int) -> None:
    e = cases(8)[3]
    _offsets, slot, source = apply_all("sort_by_expert", e, experts=8, align=align)
    rows = len(source)
    pairs = (
        ("permute", "unpermute", random(1, 7, 5), random(2, rows, 5)),
        ("permute_weights", "unpermute_weights", random(1, 7, 3), random(2, rows)),
    )
    for there, back, x, y in pairs:
        forward, backward = apply(there, x, source, slot), apply(back, y, slot, source)
        assert torch.allclose((forward * y).sum(), (x * backward).sum(), rtol=1e-12)


def test_unpermute_sums_bf16_rows_in_float32() -> None:
    e = torch.tensor([[0, 1, 2]], dtype=torch.int32)
    _offsets, slot, source = apply_all("sort_by_expert", e, experts=3, align=1)
    y = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16)
    assert apply("unpermute", y, slot, source).item() == 258.0


# --- experts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ends", [[0, 3, 3, 8, 9], [0, 0, 10, 10, 10], [0, 0, 0, 0, 0]])
def test_grouped_linear_equals_a_loop_over_rows(ends: list[int], dtype: torch.dtype) -> None:
    offsets = torch.tensor(ends, dtype=torch.int32)
    x, w, dy = random(1, 10, 6, dtype=dtype), random(2, 4, 8, 6, dtype=dtype), random(3, 10, 8, dtype=dtype)
    y, dx, dw = torch.zeros(10, 8), torch.zeros(10, 6), torch.zeros(4, 8, 6)
    y, dx, dw = (t.double() for t in (y, dx, dw))
    for r in range(ends[-1]):
        expert = next(i for i in range(4) if ends[i] <= r < ends[i + 1])
        y[r] = w[expert].double() @ x[r].double()
        dx[r] = dy[r].double() @ w[expert].double()
        dw[expert] += torch.outer(dy[r].double(), x[r].double())
    close = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for found, expected in (
        (apply("grouped_linear", x, w, offsets), y),
        (apply("grouped_linear_dgrad", dy, w, offsets), dx),
        (apply("grouped_linear_wgrad", dy, x, offsets), dw),
    ):
        assert torch.allclose(found.double(), expected, rtol=close, atol=close)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert apply("grouped_linear_wgrad", dy, x, offsets).dtype == wide
    assert (apply("grouped_linear", x, w, offsets)[ends[-1] :] == 0).all()


def test_grouped_wgrad_of_bf16_is_summed_in_float32() -> None:
    offsets = torch.tensor([0, 3], dtype=torch.int32)
    dy, x = torch.tensor([[256.0], [1.0], [1.0]], dtype=torch.bfloat16), torch.ones(3, 1, dtype=torch.bfloat16)
    assert apply("grouped_linear_wgrad", dy, x, offsets).item() == 258.0


def test_grouped_linear_refuses_offsets_of_another_number_of_experts() -> None:
    x, w = Type(DType.f32, (symbol("R"), 6)), Type(DType.f32, (4, 8, 6))
    with pytest.raises(IRError, match="one entry more than there are experts"):
        REGISTRY["grouped_linear"].infer_types((x, w, Type(DType.i32, (4,))), ())
    with pytest.raises(IRError, match="must be an i32 vector"):
        REGISTRY["grouped_linear"].infer_types((x, w, Type(DType.i64, (5,))), ())


@pytest.mark.parametrize("align", [1, 32])
def test_a_layer_of_experts_equals_transformers(align: int) -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    config = DeepseekV3Config(hidden_size=12, moe_intermediate_size=10, n_routed_experts=8, num_experts_per_tok=3)
    config._experts_implementation = "eager"
    theirs = DeepseekV3Experts(config)
    up, down = random(1, 8, 20, 12, dtype=torch.float32), random(2, 8, 12, 10, dtype=torch.float32)
    x, e, p = random(3, 7, 12, dtype=torch.float32), choices(4, 7, 3, 8), random(5, 7, 3, dtype=torch.float32)
    with torch.no_grad():
        theirs.gate_up_proj.copy_(up)
        theirs.down_proj.copy_(down)
        expected = theirs(x, e.long(), p)
    offsets, slot, source = apply_all("sort_by_expert", e, experts=8, align=align)
    gate, right = apply("grouped_linear", apply("permute", x, source, slot), up, offsets).chunk(2, -1)
    inner = torch.nn.functional.silu(gate) * right * apply("permute_weights", p, source, slot).unsqueeze(-1)
    found = apply("unpermute", apply("grouped_linear", inner, down, offsets), slot, source)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


# --- optimizer

BETAS = {"beta1": 0.9, "beta2": 0.95}


def number(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_equals_torch(dtype: torch.dtype) -> None:
    theirs = random(1, 50, dtype=dtype).requires_grad_()
    optimizer = torch.optim.AdamW([theirs], betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    w, m, v = theirs.detach().clone(), torch.zeros(50, dtype=dtype), torch.zeros(50, dtype=dtype)
    for step in range(1, 12):
        lr = 0.01 * step
        g = random(step + 1, 50, dtype=dtype)
        theirs.grad = 0.5 * g
        optimizer.param_groups[0]["lr"] = float(number(lr, dtype))
        optimizer.step()
        factors = apply_all("adamw_factors", number(lr, dtype), number(float(step), dtype), **BETAS, decay=0.1)
        w, m, v = apply_all("adamw", w, g, m, v, number(0.5, dtype), *factors, **BETAS, eps=1e-8)
        state = optimizer.state[theirs]
        relative, absolute = (2e-6, 1e-7) if dtype == torch.float32 else (1e-12, 1e-14)
        for found, expected in ((w, theirs.detach()), (m, state["exp_avg"]), (v, state["exp_avg_sq"])):
            assert torch.allclose(found, expected, rtol=relative, atol=absolute)
        assert w.dtype == m.dtype == v.dtype == dtype


def test_adamw_rounds_bf16_moments_to_nearest_and_computes_in_float32() -> None:
    w, g = random(1, 400, dtype=torch.float32), random(2, 400, dtype=torch.float32)
    m, v = random(3, 400, dtype=torch.bfloat16), random(4, 400).square().to(torch.bfloat16)
    one = (number(1.0), number(0.02), number(2.0), number(0.99))
    found = apply_all("adamw", w, g, m, v, *one, **BETAS, eps=1e-8)
    wide = apply_all("adamw", w, g, m.float(), v.float(), *one, **BETAS, eps=1e-8)
    assert torch.equal(found[0], wide[0])
    for rounded, exact in zip(found[1:], wide[1:], strict=True):
        assert rounded.dtype == torch.bfloat16
        step = torch.ldexp(torch.ones(400), torch.frexp(exact).exponent - 8)
        assert ((rounded.float() - exact).abs() <= step / 2).all()
        assert torch.equal(rounded, exact.to(torch.bfloat16))


def test_adamw_refuses_what_does_not_fit() -> None:
    f32, b16, one = Type(DType.f32, (8,)), Type(DType.bf16, (8,)), Type(DType.f32, ())
    settings = (*BETAS.items(), ("eps", 1e-8))
    infer = REGISTRY["adamw"].infer_types
    assert infer((f32, f32, b16, b16, one, one, one, one), settings) == (f32, b16, b16)
    with pytest.raises(IRError, match="differ in shape"):
        infer((f32, Type(DType.f32, (9,)), b16, b16, one, one, one, one), settings)
    with pytest.raises(IRError, match="master weight must be f32"):
        infer((b16, f32, b16, b16, one, one, one, one), settings)
    with pytest.raises(IRError, match="rate must be one number"):
        infer((f32, f32, b16, b16, one, f32, one, one), settings)


@pytest.mark.parametrize("size", [0.01, 10.0])
def test_clipping_equals_torch(size: float) -> None:
    theirs = random(1, 20, dtype=torch.float32).mul(size).requires_grad_()
    theirs.grad = theirs.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_([theirs], 1.0)
    squares = apply("sum_squares", theirs.detach())
    assert torch.allclose(squares.sqrt(), norm)
    assert torch.allclose(theirs.detach() * apply("clip_scale", squares, limit=1.0), theirs.grad)


def test_sum_squares_of_bf16_is_float32_and_of_float64_float64() -> None:
    g = torch.tensor([16.0, 1.0, 1.0], dtype=torch.bfloat16)
    assert apply("sum_squares", g).item() == 258.0
    assert apply("sum_squares", g).dtype == torch.float32
    assert apply("sum_squares", g.double()).dtype == torch.float64
