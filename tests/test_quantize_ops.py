"""FP8 and E5M6 bit for bit against the formulas in float64, edges included, and products of quantized operands."""

from __future__ import annotations

import math

import pytest
import torch

from dsv3c.ir import DType, IRError, Type
from dsv3c.ops import REGISTRY
from dsv3c.rows import Operand, Row, evaluate

Tensors = tuple[torch.Tensor, ...]
E4M3, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
LEAST, TILE = 2.0**-126, 128
NAN, INF = float("nan"), float("inf")

E4M3_VALUES = sorted(
    m * 2.0**e
    for e, ms in [(-9, range(8)), *((e - 3, range(8, 16)) for e in range(-6, 9))]
    for m in ms
    if m * 2.0**e <= 448
)
E5M6_VALUES = sorted(
    m * 2.0**e for e, ms in [(-20, range(64)), *((e - 6, range(64, 128)) for e in range(-14, 16))] for m in ms
)


def call(name: str, *tensors: torch.Tensor, **attrs: object) -> Tensors:
    made = REGISTRY[name].reference(*tensors, **attrs)
    return made if isinstance(made, tuple) else (made,)


def f32(x: float) -> float:
    """x rounded to float32."""
    return torch.tensor(x, dtype=torch.float64).float().item()


def nearest(x: float, values: list[float]) -> float:
    """The value nearest to |x|, ties to the one whose mantissa is even, with the sign of x; saturates."""
    size = min(abs(x), values[-1])
    above = next(i for i, v in enumerate(values) if v >= size)
    choices = [above] if values[above] == size or above == 0 else [above - 1, above]
    best = min(choices, key=lambda i: (abs(values[i] - size), i % 2))
    return math.copysign(values[best], x)


def power_of_two_above(x: float) -> float:
    return 2.0 ** next(k for k in range(-149, 129) if 2.0**k >= x)


def scale_of(tile: list[float], top: float, power_of_two: bool) -> float:
    """The scale by the formula, one tile at a time."""
    if any(not math.isfinite(v) for v in tile):
        return NAN
    amax = max(map(abs, tile))
    if amax == 0:
        return 1.0
    s = f32(max(f32(amax / top), LEAST))
    return power_of_two_above(s) if power_of_two else s


def expected_tile(tile: list[float], top: float, values: list[float], power_of_two: bool) -> tuple[list[float], float]:
    s = scale_of(tile, top, power_of_two)
    if math.isnan(s):
        return [NAN] * len(tile), s
    inverse = f32(1.0 / s)
    return [nearest(f32(v * inverse), values) for v in tile], s


def numbers(n: int, seed: int) -> torch.Tensor:
    """Numbers of all sizes, every sign, with exact ties among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=g) * torch.exp2(torch.randint(-20, 20, (n,), generator=g).float())
    x[::7] = torch.randint(-30, 30, (len(x[::7]),), generator=g).float() / 16
    return x


EDGES = (
    torch.zeros(TILE),
    torch.full((TILE,), -0.0),
    torch.cat((torch.zeros(TILE - 1), torch.tensor([1e-45]))),
    torch.tensor([2.0**-133, -(2.0**-127)] * 64),
    torch.tensor([448.0, -448.0, 449.0, 1e-3] * 32),
    torch.tensor([448.0, 447.0, 17.0, 18.0, 0.0009765625, 0.0029296875, -0.0048828125, 1.0625] * 16),
    torch.tensor([3.4028234663852886e38, -1e38] * 64),
    torch.tensor([448.0 * 2.0**-30, 2.0**-30] * 64),
    torch.tensor([1.0, NAN] * 64),
    torch.tensor([INF, 1.0] * 64),
    torch.tensor([1.0, -INF] * 64),
)


def same(mine: torch.Tensor, right: list[float]) -> bool:
    """Equal numbers, zeros of one sign, NaN in the same places."""
    return all(
        (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
        for a, b in zip(mine.double().tolist(), right, strict=True)
    )


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tiles_bit_for_bit(power_of_two: bool, dtype: torch.dtype) -> None:
    x = torch.stack([*EDGES, *(numbers(TILE, i) for i in range(6))]).to(dtype)
    q, s = call("quantize_tile", x, power_of_two=power_of_two)
    assert (q.dtype, s.dtype, s.shape) == (E4M3, F32, (len(x), 1))
    for row, mine, scale in zip(x.double().tolist(), q.float(), s[:, 0].tolist(), strict=True):
        codes, right = expected_tile(row, 448.0, E4M3_VALUES, power_of_two)
        assert scale == right or (math.isnan(scale) and math.isnan(right))
        assert same(mine, codes)
        if power_of_two and not math.isnan(scale):
            assert math.frexp(scale)[0] == 0.5
    assert float(s.nan_to_num(1.0).min()) >= LEAST, "scales and their reciprocals are normal numbers"


@pytest.mark.parametrize("n", [1, 77, 128, 133, 576])
def test_the_last_tile_may_be_smaller(n: int) -> None:
    x = numbers(3 * n, 0).view(3, n)
    q, s = call("quantize_tile", x, power_of_two=False)
    assert s.shape == (3, -(-n // TILE))
    for i in range(3):
        for t in range(s.shape[1]):
            tile = slice(t * TILE, (t + 1) * TILE)
            codes, right = expected_tile(x[i, tile].double().tolist(), 448.0, E4M3_VALUES, False)
            assert s[i, t] == right and same(q[i, tile].float(), codes)


def test_one_bad_number_spoils_its_tile_alone() -> None:
    for bad in (NAN, INF, -INF):
        x = torch.ones(2, 3 * TILE)
        x[1, TILE + 5] = bad
        q, s = call("quantize_tile", x, power_of_two=True)
        assert s.isnan().tolist() == [[False] * 3, [False, True, False]]
        assert q.float().isnan().sum() == TILE
        (back,) = call("dequantize_tile", q, s, dtype="f32")
        assert back.isnan().sum() == TILE
        columns, scales = call("quantize_rows", x, power_of_two=False)
        assert scales.isnan().nonzero().tolist() == [[TILE + 5, 0]]
        assert columns.float().isnan().any(1).nonzero().tolist() == [[TILE + 5]]
        _, blocks = call("quantize_block", x, power_of_two=False)
        assert blocks.isnan().tolist() == [[False, True, False]]


def test_rows_are_tiles_of_the_transposed() -> None:
    x = numbers(300 * 5, 3).view(2, 150, 5).bfloat16()
    q, s = call("quantize_rows", x, power_of_two=True)
    assert (q.shape, s.shape) == ((5, 300), (5, 3))
    right = call("quantize_tile", x.view(300, 5).t().contiguous(), power_of_two=True)
    assert torch.equal(q.view(torch.uint8), right[0].view(torch.uint8)) and torch.equal(s, right[1])


def test_blocks_bit_for_bit() -> None:
    w = numbers(2 * 150 * 200, 4).view(2, 150, 200)
    w[0, 128:, :128] = 0
    q, s = call("quantize_block", w, power_of_two=False)
    assert s.shape == (2, 2, 2) and s[0, 1, 0] == 1
    for e in range(2):
        for i in range(2):
            for j in range(2):
                at = (e, slice(i * TILE, (i + 1) * TILE), slice(j * TILE, (j + 1) * TILE))
                codes, right = expected_tile(w[at].flatten().double().tolist(), 448.0, E4M3_VALUES, False)
                assert s[e, i, j] == right and same(q[at].flatten().float(), codes)
    turned = call("transpose_blocks", q, s)
    right_turned = call("quantize_block", w.transpose(1, 2).contiguous(), power_of_two=False)
    assert torch.equal(turned[0].view(torch.uint8), right_turned[0].view(torch.uint8))
    assert torch.equal(turned[1], right_turned[1]) and all(t.is_contiguous() for t in turned)


def test_dequantizing_multiplies_once() -> None:
    g = torch.Generator().manual_seed(0)
    q, s = call("quantize_tile", torch.randn(4, 200, generator=g), power_of_two=False)
    wide = torch.cat((s[:, :1].expand(4, 128), s[:, 1:].expand(4, 72)), 1)
    assert torch.equal(call("dequantize_tile", q, s, dtype="f32")[0], q.float() * wide)
    assert torch.equal(call("dequantize_tile", q, s, dtype="bf16")[0], (q.float() * wide).bfloat16())
    w, ws = call("quantize_block", torch.randn(130, 140, generator=g), power_of_two=True)
    (back,) = call("dequantize_block", w, ws, dtype="f32")
    assert torch.equal(back[128:, :128], w[128:, :128].float() * ws[1, 0])
    again = call("quantize_block", back, power_of_two=True)
    assert torch.equal(again[0].view(torch.uint8), w.view(torch.uint8)) and torch.equal(again[1], ws), "idempotent"


def test_power_of_two_scales_lose_nothing_when_quantized_again() -> None:
    """Why the report rounds the scales of tiles that are turned: dequantizing in bf16 is exact."""
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(2))
    q, s = call("quantize_tile", x, power_of_two=True)
    (back,) = call("dequantize_tile", q, s, dtype="bf16")
    assert torch.equal(back.float(), q.float() * s), "bf16 holds E4M3 times a power of two"


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_e5m6_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.stack([*EDGES, *(numbers(TILE, i) for i in range(6))]).to(dtype)
    q, s = call("quantize_e5m6", x)
    assert (q.dtype, q.shape, s.shape) == (torch.uint8, (len(x), 192), (len(x), 1))
    (back,) = call("dequantize_e5m6", q, s, dtype="f32")
    for row, mine, scale in zip(x.double().tolist(), back, s[:, 0].tolist(), strict=True):
        codes, right = expected_tile(row, 65024.0, E5M6_VALUES, True)
        if math.isnan(right):
            assert math.isnan(scale) and bool(mine.isnan().all())
        else:
            assert scale == right
            assert mine.tolist() == [f32(c * scale) for c in codes]
    assert float(s.nan_to_num(1.0).min()) >= LEAST


def test_e5m6_takes_every_code() -> None:
    """All 2 x 1984 numbers survive, packed as documented: upper bytes, then nibbles of columns j and j + n/2."""
    values = torch.tensor([*E5M6_VALUES, *(-v for v in E5M6_VALUES[1:]), 0.0], dtype=torch.float32)
    rows = [torch.cat((part, torch.tensor([65024.0]))) for part in values.split(127)]
    for row in rows:
        row = torch.cat((row, row.new_zeros(TILE - len(row))))
        q, s = call("quantize_e5m6", row)
        assert s.tolist() == [1.0]
        assert torch.equal(call("dequantize_e5m6", q, s, dtype="f32")[0], row)
        codes = row.half().view(torch.int16).int() >> 4 & 0xFFF
        codes = torch.where(row == 0, 0, codes)
        assert torch.equal(q[:128].int(), codes >> 4)
        assert torch.equal(q[128:].int(), (codes[:64] & 15) + ((codes[64:] & 15) << 4))


@pytest.mark.parametrize("name", ["quantize_tile", "quantize_e5m6"])
def test_row_programs_bit_for_bit(name: str) -> None:
    """In float32 the row program gives the bits of the reference, edges included."""
    for x in (torch.stack([*EDGES, *(numbers(TILE, i) for i in range(6))]), numbers(4 * 322, 9).view(4, 322)):
        for power_of_two in (False, True)[: 2 if name == "quantize_tile" else 1]:
            attrs = {"power_of_two": power_of_two} if name == "quantize_tile" else {}
            rows = REGISTRY[name].rows
            assert rows is not None
            body = rows.body(Operand(x.shape[-1], 0), **attrs)
            assert isinstance(body, tuple)
            known: dict[Row, torch.Tensor] = {}
            for row, right in zip(body, call(name, x, **attrs), strict=True):
                value = evaluate(row, (x,), known)
                assert torch.equal(value.nan_to_num(-7.0), right.float().nan_to_num(-7.0))


def quantized(name: str, *shape: int, seed: int) -> Tensors:
    return call(name, torch.randn(shape, generator=torch.Generator().manual_seed(seed)), power_of_two=False)


def dequantized(q: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """In float64, tiles along the last axis."""
    return q.double() * s.double().repeat_interleave(TILE, -1)[..., : q.shape[-1]]


@pytest.mark.parametrize(("m", "n", "k"), [(3, 133, 576), (5, 2, 128), (1, 128, 70)])
def test_linear_against_float64(m: int, n: int, k: int) -> None:
    q, s = quantized("quantize_tile", 2, m, k, seed=0)
    w, ws = quantized("quantize_block", n, k, seed=1)
    right = dequantized(q, s) @ dequantized(w, ws.repeat_interleave(TILE, 0)[:n]).t()
    for name in ("linear_fp8", "linear_fp8_dgrad"):
        (y,) = call(name, q, s, w, ws)
        assert (y.shape, y.dtype) == ((2, m, n), BF16)
        torch.testing.assert_close(y.double(), right, rtol=2**-8, atol=1e-5 * right.abs().max().item())


def test_weight_gradient_against_float64() -> None:
    dy, dys = quantized("quantize_rows", 300, 7, seed=0)
    x, xs = quantized("quantize_rows", 300, 5, seed=1)
    (dw,) = call("linear_fp8_wgrad", dy, dys, x, xs)
    assert (dw.shape, dw.dtype) == ((7, 5), F32)
    torch.testing.assert_close(dw.double(), dequantized(dy, dys) @ dequantized(x, xs).t(), rtol=1e-5, atol=1e-4)


def test_sums_are_float32_in_steps_of_128() -> None:
    """Exact within 128 products, rounded between: 2^24 + 1 + 1 - 2^24 shows which."""
    x, w = torch.zeros(1, 512), torch.zeros(1, 512)
    x[0, [0, 128, 256, 384]] = 1.0
    w[0, [0, 128, 256, 384]] = torch.tensor([448.0, 1.0, 1.0, -448.0])
    s = torch.ones(1, 4)
    ws = torch.tensor([[2.0**24 / 448, 1.0, 1.0, 2.0**24 / 448]])
    (y,) = call("linear_fp8", x.to(E4M3), s, w.to(E4M3), ws)
    assert y.item() == 0.0, "float32 loses the ones between blocks"
    w2 = torch.zeros(1, 512)
    x2 = torch.zeros(1, 512)
    x2[0, :4] = torch.tensor([448.0, 1.0, 1.0, -448.0])
    w2[0, :4] = torch.tensor([448.0, 2.0**-9, 2.0**-9, 448.0])
    (y,) = call("linear_fp8", x2.to(E4M3), s, w2.to(E4M3), torch.ones(1, 4))
    assert y.item() == 2.0**-8, "within a block nothing is lost"


def test_the_order_of_a_block_does_not_matter() -> None:
    q, s = quantized("quantize_tile", 4, 256, seed=0)
    w, ws = quantized("quantize_block", 128, 256, seed=1)
    order = torch.cat((torch.randperm(128), 128 + torch.randperm(128)))
    (a,), (b,) = call("linear_fp8", q, s, w, ws), call("linear_fp8", q[:, order], s, w[:, order], ws)
    assert torch.equal(a, b)


def test_groups_are_products_of_their_own() -> None:
    offsets = torch.tensor([0, 128, 128, 384, 400], dtype=torch.int32)
    q, s = quantized("quantize_tile", 500, 200, seed=0)
    w, ws = quantized("quantize_block", 4, 150, 200, seed=1)
    dy, dys = quantized("quantize_rows", 500, 6, seed=2)
    x, xs = quantized("quantize_rows", 500, 5, seed=3)
    for name in ("grouped_linear_fp8", "grouped_linear_fp8_dgrad"):
        (y,) = call(name, q, s, w, ws, offsets)
        assert not y[400:].any()
        for e in range(4):
            rows = slice(int(offsets[e]), int(offsets[e + 1]))
            assert torch.equal(y[rows], call("linear_fp8", q[rows], s[rows], w[e], ws[e])[0])
    (dw,) = call("grouped_linear_fp8_wgrad", dy, dys, x, xs, offsets)
    assert not dw[1].any()
    for e in range(4):
        rows = slice(int(offsets[e]), int(offsets[e + 1]))
        right = dequantized(dy, dys)[:, rows] @ dequantized(x, xs)[:, rows].t()
        torch.testing.assert_close(dw[e].double(), right, rtol=1e-5, atol=1e-4)


def test_a_spoiled_scale_reaches_the_result() -> None:
    q, s = quantized("quantize_tile", 3, 256, seed=0)
    w, ws = quantized("quantize_block", 4, 256, seed=1)
    q = q.float()
    q[1, 130:] = 0
    s[1, 1] = NAN
    (y,) = call("linear_fp8", q.to(E4M3), s, w, ws)
    assert y.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("name", "types", "attrs", "reason"),
    [
        ("quantize_tile", [Type(DType.e4m3, (4, 128))], {"power_of_two": True}, "expected bf16 or wider"),
        ("quantize_tile", [Type(DType.i32, (4, 128))], {"power_of_two": True}, "floating-point"),
        ("quantize_tile", [Type(DType.bf16, (4, 128))], {"power_of_two": 1}, "must be True or False"),
        ("quantize_rows", [Type(DType.bf16, (128,))], {"power_of_two": True}, "with rows"),
        ("quantize_block", [Type(DType.f32, (128,))], {"power_of_two": True}, r"\[\.\.\., N, K\]"),
        ("quantize_e5m6", [Type(DType.bf16, (4, 7))], {}, "even number"),
        ("dequantize_tile", [Type(DType.e4m3, (4, 129)), Type(DType.f32, (4, 1))], {"dtype": "bf16"}, "does not fit"),
        ("dequantize_tile", [Type(DType.e4m3, (4, 8)), Type(DType.f32, (4, 1))], {"dtype": "e4m3"}, "16 bits or more"),
        ("dequantize_e5m6", [Type(DType.u8, (4, 8)), Type(DType.f32, (4, 1))], {"dtype": "bf16"}, "multiple of 3"),
        ("linear_fp8", [Type(DType.e4m3, (4, 128)), Type(DType.f32, (4, 1)), Type(DType.e4m3, (8, 256)),
                        Type(DType.f32, (1, 2))], {}, "does not fit the weight"),
        ("linear_fp8", [Type(DType.bf16, (4, 128)), Type(DType.f32, (4, 1)), Type(DType.e4m3, (8, 128)),
                        Type(DType.f32, (1, 1))], {}, "must be e4m3"),
        ("linear_fp8_wgrad", [Type(DType.e4m3, (4, 128)), Type(DType.f32, (4, 1)), Type(DType.e4m3, (8, 256)),
                              Type(DType.f32, (8, 2))], {}, "rows of"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name: str, types: list[Type], attrs: dict[str, bool], reason: str) -> None:
    with pytest.raises(IRError, match=reason):
        REGISTRY[name].infer_types(tuple(types), tuple(attrs.items()))


def test_costs_count_products_and_bytes() -> None:
    types = tuple(
        Type(d, s)
        for d, s in [(DType.e4m3, (64, 256)), (DType.f32, (64, 2)), (DType.e4m3, (512, 256)), (DType.f32, (4, 2))]
    )
    op = REGISTRY["linear_fp8"]
    cost = op.cost(types, op.infer_types(types, ()))
    assert cost.flops == 2 * 64 * 512 * 256
    assert cost.bytes == 64 * 256 + 64 * 2 * 4 + 512 * 256 + 4 * 2 * 4 + 64 * 512 * 2
