"""What torch does for each op on the CPU, into memory that is given, against the op's reference."""

from __future__ import annotations

import pytest
import torch

from dsv3c.ir import DType, IRError, Type
from dsv3c.op import OpDef, Sample
from dsv3c.ops import REGISTRY
from dsv3c.target import Implementation
from dsv3c.targets import find
from dsv3c.tensors import torch_dtype

IMPLEMENTATIONS = find("cpu").implementations
KINDS = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}
SAMPLES = [(op, i) for op in REGISTRY for i in range(len(op.samples))]


def draw(sample: Sample, seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    if sample.draw:
        return sample.draw(generator)
    return tuple(
        torch.randn(t.bound({}), generator=generator, dtype=torch.float64).to(torch_dtype(t.dtype))
        for t in sample.inputs
    )


def cast(op: OpDef, sample: Sample, tensors: tuple[torch.Tensor, ...], kind: DType) -> tuple[torch.Tensor, ...]:
    """Float tensors of a float64 sample in `kind`; those that the op wants wider in float32.

    Raises IRError if the op takes no such types.
    """
    wide = DType.f64 if kind is DType.f64 else DType.f32
    for choice in (kind, wide):
        names = []
        for t in sample.inputs:
            sums = t.rank < 2 or (op.name == "attention_grad" and t.rank == 3)
            sums = sums or (op.name == "cross_entropy_grad" and t.rank == 2)
            names.append((wide if sums else choice) if t.dtype is DType.f64 else t.dtype)
        try:
            op.infer_types(tuple(t.with_dtype(n) for t, n in zip(sample.inputs, names, strict=True)), sample.attrs)
        except IRError:
            continue
        return tuple(x.to(torch_dtype(n)) for x, n in zip(tensors, names, strict=True))
    raise IRError("no such types")


def outputs_of(op: OpDef, sample: Sample, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    made = op.reference(*tensors, **dict(sample.attrs))
    return made if isinstance(made, tuple) else (made,)


def same(mine: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...], kind: torch.dtype, note: str) -> None:
    for a, b in zip(mine, right, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), note
        if not a.dtype.is_floating_point:
            assert torch.equal(a, b), note
            continue
        tolerance = max(KINDS[kind], KINDS.get(a.dtype, 0.0))
        scale = max(1.0, b.double().abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance * scale,
                                   msg=lambda m: f"{note}: {m}")  # fmt: skip


@pytest.mark.parametrize(("op", "number"), SAMPLES, ids=[f"{op.name}-{i}" for op, i in SAMPLES])
def test_matches_reference(op: OpDef, number: int) -> None:
    sample = op.samples[number]
    implementation = IMPLEMENTATIONS[op.name]
    tried = 0
    for kind in (DType.f64, DType.f32, DType.bf16):
        try:
            first, second = (cast(op, sample, draw(sample, seed), kind) for seed in (1, 2))
        except IRError:
            continue
        tried += 1
        inputs = tuple(x.clone() for x in first)
        right = outputs_of(op, sample, first)
        outputs = tuple(torch.full_like(x, 3) for x in right)
        run = implementation.prepare(inputs, outputs, **dict(sample.attrs))
        run()
        same(outputs, right, torch_dtype(kind), f"{op.name} {kind}")
        for x, y in zip(inputs, second, strict=True):
            x.copy_(y)
        run()
        same(outputs, outputs_of(op, sample, second), torch_dtype(kind), f"{op.name} {kind}, other inputs")
        if op.aliases:
            check_in_place(op, implementation, sample, first, torch_dtype(kind))
        if implementation.accumulates:
            check_accumulates(op, implementation, sample, first, torch_dtype(kind))
    assert tried


def check_in_place(op: OpDef, implementation: Implementation, sample: Sample, tensors: tuple[torch.Tensor, ...],
                   kind: torch.dtype) -> None:  # fmt: skip
    """Outputs in the memory of the inputs that the op says they may take."""
    right = outputs_of(op, sample, tensors)
    inputs = tuple(x.clone() for x in tensors)
    shared = {o: i for i, o in op.aliases}
    outputs = tuple(
        inputs[shared[o]].view(x.shape) if o in shared and inputs[shared[o]].dtype == x.dtype else torch.empty_like(x)
        for o, x in enumerate(right)
    )
    implementation.prepare(inputs, outputs, **dict(sample.attrs))()
    same(outputs, right, kind, f"{op.name} in place")


def check_accumulates(op: OpDef, implementation: Implementation, sample: Sample, tensors: tuple[torch.Tensor, ...],
                      kind: torch.dtype) -> None:  # fmt: skip
    right = outputs_of(op, sample, tensors)
    outputs = tuple(torch.full_like(x, 3) for x in right)
    run = implementation.prepare(tensors, outputs, accumulate=True, **dict(sample.attrs))
    run()
    run()
    same(outputs, tuple(2 * x + 3 for x in right), kind, f"{op.name} accumulating")


@pytest.mark.parametrize(("key", "value"), [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_of_any_head_sizes(key: int, value: int, documents: bool) -> None:
    """Flash wants one head size; other sizes are padded, and strided heads are read as they are."""
    generator = torch.Generator().manual_seed(0)
    batch, length, heads = 2, 37, 3
    q, k = (torch.randn(batch, length, heads, key, generator=generator) for _ in range(2))
    v = torch.randn(batch, length, heads, key + value, generator=generator)[..., key:]
    do = torch.randn(batch, length, heads, value, generator=generator)
    ids = torch.randint(0, 2, (batch, length), generator=generator, dtype=torch.int32).cumsum(1, dtype=torch.int32)
    rest = (ids,) if documents else ()
    forward, backward = REGISTRY["attention"], REGISTRY["attention_grad"]
    right = forward.reference(q, k, v, *rest, scale=0.3)
    assert isinstance(right, tuple)
    made = tuple(torch.empty_like(x) for x in right)
    IMPLEMENTATIONS["attention"].prepare((q, k, v, *rest), made, scale=0.3)()
    same(made, right, torch.float32, "attention")
    inputs = (do, q, k, v, *right, *rest)
    gradients = backward.reference(*inputs, scale=0.3)
    assert isinstance(gradients, tuple)
    made = tuple(torch.empty(x.shape) for x in gradients)
    IMPLEMENTATIONS["attention_grad"].prepare(inputs, made, scale=0.3)()
    same(made, gradients, torch.float32, "attention_grad")


def test_latent_attention_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries go through in blocks when all scores at once would be too many."""
    from dsv3c.targets import _torch_attention

    generator = torch.Generator().manual_seed(0)
    q, cache = torch.randn(2, 11, 3, 9, generator=generator), torch.randn(2, 40, 9, generator=generator)
    start = torch.tensor(17, dtype=torch.int32)
    right = REGISTRY["latent_attention"].reference(q, cache, start, scale=0.5, rank=6)
    made = torch.empty(2, 11, 3, 6)
    monkeypatch.setattr(_torch_attention, "BLOCK_SCORES", 500)
    IMPLEMENTATIONS["latent_attention"].prepare((q, cache, start), (made,), scale=0.5, rank=6)()
    assert isinstance(right, torch.Tensor)
    same((made,), (right,), torch.float32, "latent_attention")


TIES = [(16, 4, 2, 4), (64, 8, 4, 8), (12, 1, 1, 12), (9, 9, 5, 5)]


@pytest.mark.parametrize(("experts", "groups", "kept", "k"), TIES)
def test_ties_go_to_the_lower_expert(experts: int, groups: int, kept: int, k: int) -> None:
    """Scores of few different values, with biases that make some negative."""
    generator = torch.Generator().manual_seed(0)
    s = torch.randint(0, 4, (300, experts), generator=generator) / 4.0
    bias = torch.randint(-4, 4, (experts,), generator=generator) / 4.0
    attrs = {"k": k, "groups": groups, "kept": kept}
    made = torch.empty(300, k, dtype=torch.int32)
    IMPLEMENTATIONS["choose_experts"].prepare((s, bias), (made,), **attrs)()
    right = REGISTRY["choose_experts"].reference(s, bias, **attrs)
    assert isinstance(right, torch.Tensor) and torch.equal(made, right)


def test_strided_rows() -> None:
    """Products read slices of wider tensors, and tensors that have no row view, without being told."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4, 6, 10, generator=generator)
    w = torch.randn(5, 7, generator=generator)
    for x in (wide[..., 2:9], wide[..., :7].transpose(0, 1)):
        y = torch.empty(*x.shape[:-1], 5)
        IMPLEMENTATIONS["linear"].prepare((x, w), (y,))()
        same((y,), (x @ w.t(),), torch.float32, "linear")
        dw = torch.empty(5, 7)
        IMPLEMENTATIONS["linear_wgrad"].prepare((y, x), (dw,))()
        same((dw,), (y.flatten(0, 1).t() @ x.flatten(0, 1),), torch.float32, "linear_wgrad")


@pytest.mark.parametrize("native", [False, True])
def test_bf16_products_with_and_without_the_instruction(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsv3c.targets import _torch_matrix

    monkeypatch.setattr(_torch_matrix, "multiplies_bf16", lambda: native)
    generator = torch.Generator().manual_seed(0)
    for rows in (3, 40):
        x, dy = (torch.randn(rows, n, generator=generator).bfloat16() for n in (24, 32))
        w = torch.randn(32, 24, generator=generator).bfloat16()
        y, dx = torch.empty(rows, 32, dtype=torch.bfloat16), torch.empty(rows, 24, dtype=torch.bfloat16)
        IMPLEMENTATIONS["linear"].prepare((x, w), (y,))()
        IMPLEMENTATIONS["linear_dgrad"].prepare((dy, w), (dx,))()
        same((y,), ((x.float() @ w.float().t()).bfloat16(),), torch.bfloat16, "linear")
        same((dx,), ((dy.float() @ w.float()).bfloat16(),), torch.bfloat16, "linear_dgrad")


def test_type_of_samples_is_honest() -> None:
    """The types drawn are those the samples state, so that `cast` starts from the truth."""
    for op, number in SAMPLES:
        sample = op.samples[number]
        for x, t in zip(draw(sample, 0), sample.inputs, strict=True):
            assert Type(t.dtype, tuple(x.shape)) == t and x.dtype == torch_dtype(t.dtype), op.name
