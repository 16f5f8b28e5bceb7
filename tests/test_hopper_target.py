"""The Hopper target: what can be said of it without a GPU, and on one (`-m gpu`) each implementation and a model
against references, on poisoned memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import dsv3c
from dsv3c.errors import InputError
from dsv3c.ops import REGISTRY
from dsv3c.runtime.runner import Memory, Runner
from dsv3c.targets import TARGETS, _cuda_text, find
from dsv3c.targets._cuda_launch import width, words
from dsv3c.targets._triton_build import Entry, compile_source, resources

GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
BF16, F32 = torch.bfloat16, torch.float32
HOPPER = find("h100").implementations


def test_importing_targets_imports_no_compiler() -> None:
    code = "import sys, dsv3c.targets; print([m for m in ('tvm', 'triton') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["h100", "h200", "h800"])
def test_targets_run_on_a_gpu_by_known_ops(name: str) -> None:
    target = TARGETS[name]
    assert target.device == "cuda" and target.load is not None
    assert {op: REGISTRY[op].name for op in target.implementations} == {op: op for op in target.implementations}


def test_weight_gradients_are_added_where_they_lie() -> None:
    gradients = {op.name for op in REGISTRY if op.name.endswith("_wgrad")}
    assert gradients and all(HOPPER[name].accumulates for name in gradients)


@pytest.mark.skipif(GPU, reason="this machine can run it")
def test_without_a_hopper_gpu_a_plan_compiles_and_says_that_it_cannot_run() -> None:
    plan = dsv3c.compile("deepseek-v3-tiny", target="h100", precision="bf16", seq=64, kernels="none")
    with pytest.raises(InputError, match=r"a plan for h100 cannot run here: .* Or compile for --target cpu"):
        dsv3c.load(plan)


def test_words_are_bytes_where_rows_are_not_whole_words() -> None:
    assert words(torch.zeros(3, 6, dtype=BF16)).shape == (3, 3)
    assert words(torch.zeros(3, 6, dtype=F32)).shape == (3, 6)
    assert words(torch.zeros(3, 8, dtype=torch.float8_e4m3fn)).dtype == torch.int32
    assert words(torch.zeros(3, 6, dtype=torch.float8_e4m3fn)).shape == (3, 6)


def test_width_covers_all_columns_up_to_a_limit() -> None:
    assert [width(n, 1024) for n in (1, 2, 3, 576, 1024, 7168)] == [1, 2, 4, 1024, 1024, 1024]


MATRIX, FLOAT, BYTES, WORD, LONG, NUMBER = "*bf16", "*fp32", "*fp8e4nv", "*i32", "*i64", "i32"
KERNELS: dict[str, tuple[str, dict[str, str], dict[str, int], int]] = {
    "quantize_rows": (
        _cuda_text.QUANTIZE_ROWS,
        {"x": MATRIX, "q": BYTES, "s": FLOAT, "rows": NUMBER, "cols": NUMBER, "step": NUMBER, "tiles": NUMBER},
        {"BLOCK": 64, "POWER": 0},
        4,
    ),
    "quantize_block": (
        _cuda_text.QUANTIZE_BLOCK, {"w": FLOAT, "q": BYTES, "s": FLOAT, "rows": NUMBER, "cols": NUMBER},
        {"POWER": 1}, 8,
    ),
    "quantize_block_both": (
        _cuda_text.QUANTIZE_BLOCK_BOTH,
        {"w": FLOAT, "q": BYTES, "s": FLOAT, "qt": BYTES, "st": FLOAT, "rows": NUMBER, "cols": NUMBER},
        {"POWER": 0}, 8,
    ),
    "transpose": (
        _cuda_text.TRANSPOSE,
        {"x": "*u8", "y": "*u8", "rows": NUMBER, "cols": NUMBER, "step": NUMBER, "stride": NUMBER},
        {"TILE": 128},
        4,
    ),
    "permute": (
        _cuda_text.PERMUTE,
        {"x": WORD, "source": WORD, "y": WORD, "rows": NUMBER, "words": NUMBER, "choices": NUMBER},
        {"ROWS": 2, "BLOCK": 2048}, 8,
    ),
    "unpermute": (_cuda_text.UNPERMUTE, {"y": MATRIX, "slot": WORD, "x": MATRIX, "cols": NUMBER},
                  {"K": 8, "BLOCK": 1024}, 4),
    "zero_tail": (
        _cuda_text.ZERO_TAIL, {"y": WORD, "offsets": WORD, "experts": NUMBER, "rows": NUMBER, "words": NUMBER},
        {"BLOCK": 1024},
        4,
    ),
    "cross_entropy": (
        _cuda_text.CROSS_ENTROPY, {"logits": MATRIX, "labels": LONG, "lse": FLOAT, "part": FLOAT, "vocab": NUMBER},
        {"BLOCK": 2048}, 4,
    ),
    "cross_entropy_grad": (
        _cuda_text.CROSS_ENTROPY_GRAD,
        {"logits": MATRIX, "labels": LONG, "lse": FLOAT, "factor": FLOAT, "out": MATRIX, "vocab": NUMBER},
        {"BLOCK": 2048},
        4,
    ),
    "sum_squares": (
        _cuda_text.SUM_SQUARES, {"x": FLOAT, "part": FLOAT, "blocks": NUMBER, "rest": NUMBER}, {"BLOCK": 4096}, 8,
    ),
    "count_choices": (
        _cuda_text.SORT_BY_EXPERT, {"e": WORD, "counts": WORD, "count": NUMBER}, {"EXPERTS": 256, "CHUNK": 128}, 4,
    ),
    "add_up_choices": (
        _cuda_text.SORT_BY_EXPERT, {"counts": WORD, "sums": WORD, "chunks": NUMBER},
        {"EXPERTS": 256, "WIDTH": 8, "CHUNKS": 256}, 4,
    ),
    "choose_experts": (
        _cuda_text.CHOOSE_EXPERTS,
        {"s": FLOAT, "bias": FLOAT, "e": WORD, "rows": NUMBER, "groups": NUMBER, "size": NUMBER},
        {"GROUPS": 8, "SIZE": 32, "KEPT": 4, "K": 8, "ROWS": 4}, 4,
    ),
    "place_choices": (
        _cuda_text.SORT_BY_EXPERT,
        {"e": WORD, "sums": WORD, "offsets": WORD, "slot": WORD, "source": WORD, "count": NUMBER, "experts": NUMBER,
         "chunks": NUMBER, "align": NUMBER},
        {"EXPERTS": 16, "CHUNK": 128}, 4,
    ),
    "embedding_wgrad": (
        _cuda_text.EMBEDDING_WGRAD,
        {"tokens": LONG, "order": LONG, "dy": MATRIX, "dw": FLOAT, "count": NUMBER, "cols": NUMBER},
        {"BLOCK": 1024, "ADD": 1},
        4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_without_a_gpu_and_spill_nothing(name: str) -> None:
    text, given, constants, warps = KERNELS[name]
    signature = (*given.items(), *((n, "constexpr") for n in constants))
    entry = Entry(name, signature, tuple((n, 16) for n in given), warps, constants=tuple(constants.items()))
    made = compile_source(text, entry)
    assert made.warps == warps and resources(made.cubin).stack == 0


# ---- on a GPU ------------------------------------------------------------------------------------------------------

gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no Hopper GPU")]


def _random(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype).cuda()


def _poison(t: torch.Tensor) -> torch.Tensor:
    size = t.numel() * t.dtype.itemsize
    return torch.full((size,), 255, dtype=torch.uint8, device="cuda").view(t.dtype).view(t.shape)


def _reference(op: str, *inputs: torch.Tensor, **attrs: object) -> tuple[torch.Tensor, ...]:
    """On the CPU: torch divides by constants less exactly on a GPU."""
    made = REGISTRY[op].reference(*(t.cpu() for t in inputs), **attrs)
    return tuple(t.cuda() for t in (made if isinstance(made, tuple) else (made,)))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = (t.double() if t.dtype.itemsize > 1 else t.float().double() for t in (a, b))
    same = a.isnan() & b.isnan()
    a, b = a.masked_fill(same, 0), b.masked_fill(same, 0)
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _bits(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1).view(torch.uint8)


def _agree(op: str, inputs: tuple[torch.Tensor, ...], tolerance: float, repeats: bool = True, **attrs: object) -> None:
    """The implementation gives what the reference gives, if it `repeats` twice the same, and adds it if it can."""
    wanted = _reference(op, *inputs, **attrs)
    outputs = tuple(map(_poison, wanted))
    run = HOPPER[op].prepare(inputs, outputs, **attrs)
    run()
    first = [t.clone() for t in outputs]
    for made, want in zip(outputs, wanted, strict=True):
        assert _distance(made, want) <= tolerance
    run()
    for made, before in zip(outputs, first, strict=True):
        assert not repeats or torch.equal(_bits(made), _bits(before))
    if HOPPER[op].accumulates:
        total = torch.ones_like(wanted[0])
        HOPPER[op].prepare(inputs, (total,), accumulate=True, **attrs)()
        assert _distance(total, wanted[0] + 1) <= tolerance


def _quantized(op: str, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return _reference(op, x, power_of_two=False)


@pytest.fixture(params=["even", "empty and foreign", "one takes all"])
def routes(request: pytest.FixtureRequest) -> tuple[torch.Tensor, ...]:
    """Choices of 300 tokens among 16 experts, and offsets, slot, source."""
    e = torch.rand(300, 16, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :4].int()
    if request.param == "empty and foreign":
        e[e == 3] = -1
    if request.param == "one takes all":
        e = torch.full((300, 1), 5, dtype=torch.int32)
    e = e.cuda()
    return e, *_reference("sort_by_expert", e, experts=16, align=128)


class TestOnGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("m, n, k", [(256, 512, 256), (200, 576, 7168), (1, 512, 256)])
    def test_products(self, m: int, n: int, k: int) -> None:
        x, w, dy = _random(1, m, k), _random(n, k), _random(1, m, n)
        _agree("linear", (x, w), 1e-2)
        _agree("linear_dgrad", (dy, w), 1e-2)
        _agree("linear_wgrad", (dy, x), 1e-4)

    @pytest.mark.parametrize(
        "m, n, k",
        [(256, 512, 512), (256, 576, 7168), (256, 7168, 576), (200, 2112, 256), (1, 512, 256), (133, 70, 50)],
    )
    def test_products_of_quantized_operands(self, m: int, n: int, k: int) -> None:
        w = _quantized("quantize_block", _random(n, k, dtype=F32))
        _agree("linear_fp8", (*_quantized("quantize_tile", _random(1, m, k)), *w), 1e-2)

    @pytest.mark.parametrize("rows, n, k", [(256, 512, 256), (4096, 576, 1536), (200, 512, 256)])
    def test_weight_gradients_of_quantized_operands(self, rows: int, n: int, k: int) -> None:
        dy, x = (_quantized("quantize_rows", _random(rows, c, seed=c)) for c in (n, k))
        _agree("linear_fp8_wgrad", (*dy, *x), 5e-4)

    def test_rows_in_the_order_of_experts(self, routes: tuple[torch.Tensor, ...]) -> None:
        e, _offsets, slot, source = routes
        _agree("sort_by_expert", (e,), 0, experts=16, align=128)
        scores, bias = _random(300, 48, dtype=F32).mul_(4).round_(), _random(48, dtype=F32).round_()
        for groups, kept, k in ((1, 1, 8), (8, 4, 8), (6, 2, 3), (48, 5, 5)):
            _agree("choose_experts", (scores, bias), 0, k=k, groups=groups, kept=kept)
        x = _random(300, 256)
        for rows in (x, x.float(), _quantized("quantize_tile", x)[0]):
            _agree("permute", (rows, source, slot), 0)
        _agree("unpermute", (_random(source.shape[0], 256), slot, source), 1e-3)
        _agree("permute_weights", (_random(*slot.shape, dtype=F32), source, slot), 0)
        _agree("unpermute_weights", (_random(source.shape[0], dtype=F32), slot, source), 0)

    def test_products_by_expert(self, routes: tuple[torch.Tensor, ...]) -> None:
        _e, offsets, slot, source = routes
        x, dy = (_reference("permute", _random(300, n), source, slot)[0] for n in (256, 512))
        w = _random(16, 512, 256)
        _agree("grouped_linear", (x, w, offsets), 1e-2)
        _agree("grouped_linear_dgrad", (dy, w, offsets), 1e-2)
        _agree("grouped_linear_wgrad", (dy, x, offsets), 1e-4)
        blocks = _quantized("quantize_block", w.float())
        _agree("grouped_linear_fp8", (*_quantized("quantize_tile", x), *blocks, offsets), 1e-2)
        turned = _reference("transpose_blocks", *blocks)
        _agree("grouped_linear_fp8_dgrad", (*_quantized("quantize_tile", dy), *turned, offsets), 1e-2)
        rows = (*_quantized("quantize_rows", dy), *_quantized("quantize_rows", x))
        _agree("grouped_linear_fp8_wgrad", (*rows, offsets), 5e-4)

    @pytest.mark.parametrize("power", [False, True])
    @pytest.mark.parametrize("shape", [(1, 256, 512), (300, 576), (133, 77)])
    def test_quantizing_gives_the_same_bits(self, shape: tuple[int, ...], power: bool) -> None:
        for dtype in (BF16, F32):
            x = _random(*shape, dtype=dtype)
            flat = x.view(-1, shape[-1])
            flat[:128, 3], flat[5, 7], flat[130, 9], flat[:, 11] = 0, float("nan"), float("inf"), 1e-38
            _agree("quantize_rows", (x,), 0, power_of_two=power)
            _agree("quantize_block", (x,), 0, power_of_two=power)
            _agree("quantize_block_both", (x,), 0, power_of_two=power)

    @pytest.mark.parametrize("shape", [(256, 512), (2, 133, 201)])
    def test_turning_blocks(self, shape: tuple[int, ...]) -> None:
        _agree("transpose_blocks", _quantized("quantize_block", _random(*shape, dtype=F32)), 0)

    @pytest.mark.parametrize("vocab", [1024, 5000])
    def test_losses_and_tables(self, vocab: int) -> None:
        labels = torch.randint(0, vocab, (2, 100), generator=torch.Generator().manual_seed(0)).cuda()
        _agree("embedding", (labels, _random(vocab, 256)), 0, dtype="bf16")
        _agree("embedding_wgrad", (labels % 50, _random(2, 100, 256)), 1e-5, vocab=vocab)
        labels[0, -3:] = -100
        logits = _random(2, 100, vocab)
        _agree("cross_entropy", (logits, labels), 1e-5)
        lse = _reference("cross_entropy", logits, labels)[1]
        _agree("cross_entropy_grad", (torch.tensor(0.7).cuda(), logits, labels, lse), 1e-2)
        for shape in ((3,), (4096,), (5000, 1000)):
            _agree("sum_squares", (_random(*shape, dtype=F32),), 1e-5)

    def test_rotary_tables_and_sums_over_heads(self) -> None:
        positions = torch.arange(300, dtype=torch.int32).view(2, 150).cuda()
        _agree("rotary_table", (positions,), 1e-6, dim=64, base=1e4, factor=40.0, original=4096, beta_fast=32.0,
               beta_slow=1.0, magnitude=1.2, dtype="f32")  # fmt: skip
        _agree("sum_heads", (_random(2, 50, 128, 192)[..., 128:],), 1e-2)

    @pytest.mark.parametrize("heads, key, value, length", [(4, 96, 64, 130), (8, 192, 128, 512)])
    def test_attention(self, heads: int, key: int, value: int, length: int) -> None:
        q, k = (_random(2, length, heads, key, seed=s) for s in (1, 2))
        v = _random(2, length, heads, key + value)[..., key:]
        _agree("attention", (q, k, v), 1e-2, scale=0.1)
        made = _reference("attention", q, k, v, scale=0.1)
        _agree("attention_grad", (_random(*v.shape), q, k, v, *made), 2e-2, scale=0.1)
        documents = (torch.arange(length) > 40).int().expand(2, length).contiguous().cuda()
        _agree("attention", (q, k, v, documents), 1e-2, scale=0.1)
        made = _reference("attention", q, k, v, documents, scale=0.1)
        _agree("attention_grad", (_random(*v.shape), q, k, v, *made, documents), 2e-2, repeats=False, scale=0.1)

    @pytest.mark.parametrize("precision, tolerance", [("bf16", 0.08), ("fp8", 0.4)])
    def test_a_model_follows_float32(self, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
        real: Callable[[int, str], Memory] = Memory.allocate

        def poisoned(size: int, device: str) -> Memory:
            memory = real(size, device)
            memory.block.fill_(255)
            return memory

        monkeypatch.setattr(Memory, "allocate", staticmethod(poisoned))
        tokens = torch.randint(0, 2048, (1, 128), generator=torch.Generator().manual_seed(0))
        plan = dsv3c.compile("deepseek-v3-tiny", target="cpu", precision="fp32", seq=128, kernels="none")
        exact = dsv3c.load(plan, seed=1).gradients(tokens, ("main", "mtp", "balance"))
        session = dsv3c.load(dsv3c.compile("deepseek-v3-tiny", target="h100", precision=precision, seq=128), seed=1)
        made = session.gradients(tokens, ("main", "mtp", "balance"))
        total = sum(float(t.double().square().sum()) for t in exact.values())
        gap = sum(float((made[n].cpu() - t).double().square().sum()) for n, t in exact.items())
        assert (gap / total) ** 0.5 < tolerance
        again = session.gradients(tokens, ("main", "mtp", "balance"))
        assert all(torch.equal(made[n], again[n]) for n in made)

    def test_recorded_steps_and_tokens_are_those_of_launched_ones(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plan = dsv3c.compile("deepseek-v3-tiny", target="h100", precision="fp8", seq=128, global_batch=2)
        tokens = torch.randint(0, 2048, (2, 128), generator=torch.Generator().manual_seed(0))
        recorded, launched = (dsv3c.load(plan, seed=1) for _ in range(2))
        fast = [recorded.step(tokens) for _ in range(3)]
        drawn = recorded.generate(tokens[:, :16], max_new_tokens=6)
        monkeypatch.setattr(Runner, "capture", lambda self, accumulates=True: None)
        slow = [launched.step(tokens) for _ in range(3)]
        assert [(s.loss, s.grad_norm) for s in fast] == [(s.loss, s.grad_norm) for s in slow]
        assert torch.equal(drawn, launched.generate(tokens[:, :16], max_new_tokens=6))
