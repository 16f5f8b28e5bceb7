"""Matrix products on Hopper and what can execute them: libraries through torch, generated kernels by their tiles."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from dsv3c.errors import InputError
from dsv3c.target import Product
from dsv3c.targets._gluon_spec import Element, GemmSpec, Kind, Order, Output, Pair

Tile = tuple[int, int, int, Pair]
"""Rows, columns, stages, which operand a pair of blocks shares."""

GENERATED = "gluon "
"""How the names of generated implementations begin; the tile follows: `gluon 128x256x4b`."""

FALLBACK = "torch"
"""Through float32, for shapes that nothing else takes."""

SAME = {"linear_fp8_dgrad": "linear_fp8", "grouped_linear_fp8_dgrad": "grouped_linear_fp8"}
"""Ops that compute what another one does: their operands come transposed already."""

KINDS: dict[str, Kind] = {
    "linear": "dense",
    "linear_dgrad": "dense",
    "linear_wgrad": "grouped_k",
    "grouped_linear": "grouped_rows",
    "grouped_linear_dgrad": "grouped_rows",
    "grouped_linear_wgrad": "grouped_k",
    "linear_fp8": "dense",
    "linear_fp8_wgrad": "grouped_k",
    "grouped_linear_fp8": "grouped_rows",
    "grouped_linear_fp8_wgrad": "grouped_k",
}
"""The kind of generated kernel for each op."""

LIBRARIES = {
    "linear": "cublas",
    "linear_dgrad": "cublas",
    "linear_wgrad": "cublas",
    "grouped_linear": "cutlass",
    "grouped_linear_dgrad": "cutlass",
    "linear_fp8": "cublaslt",
    "linear_fp8_wgrad": "cublaslt",
}
"""What torch calls for each op: `mm`, `_grouped_mm`, `_scaled_mm` with block scales."""

ORDERS: dict[str, Order] = {
    "linear_dgrad": "kn",
    "linear_wgrad": "mn",
    "grouped_linear_dgrad": "kn",
    "grouped_linear_wgrad": "mn",
}
"""How operands of each op lie, where not both along the axis that is summed over."""

TILES: dict[tuple[Kind, str, Order], tuple[Tile, ...]] = {
    ("dense", "e4m3", "kk"): (
        (128, 256, 4, "b"), (128, 256, 4, "a"), (256, 128, 4, "b"), (256, 128, 4, "a"), (192, 128, 4, "b"),
        (192, 128, 4, ""), (128, 128, 5, "b"), (128, 64, 8, ""),
    ),
    ("grouped_rows", "e4m3", "kk"): ((128, 256, 4, "a"), (256, 128, 4, "a"), (128, 128, 5, "a"), (128, 64, 5, "")),
    ("grouped_k", "e4m3", "kk"): ((256, 128, 4, "a"), (256, 128, 4, "b"), (256, 128, 4, ""), (128, 128, 5, "b")),
    ("dense", "bf16", "kk"): ((256, 128, 4, "a"), (128, 256, 4, "b"), (192, 128, 4, "b"), (128, 128, 5, "b")),
    ("dense", "bf16", "kn"): ((256, 128, 4, "a"), (256, 128, 4, ""), (128, 128, 5, "a")),
    ("grouped_rows", "bf16", "kk"): ((256, 128, 4, "a"), (128, 256, 4, "a")),
    ("grouped_rows", "bf16", "kn"): ((256, 128, 4, "a"), (128, 128, 5, "a")),
    ("grouped_k", "bf16", "mn"): ((256, 128, 4, "b"), (256, 128, 4, ""), (128, 128, 5, "a")),
}  # fmt: skip
"""Generated kernels that compete; of what is not measured the first serves."""

SCALED_BLOCK = 128
STORED_ROWS = 64
STAGE = 64
"""Numbers along the summed axis in one stage of a bf16 kernel."""


def product_of(op: str, types: Sequence[tuple[str, tuple[int, ...]]], adds: bool = False) -> Product | None:
    """The product that `op` computes from operands of these element types and shapes; None if it is no product."""
    (dtype, x), *others = types or (("", ()),)
    shapes = [s for _, s in others]
    op = SAME.get(op, op)
    if op in ("linear", "linear_dgrad"):
        n, k = shapes[0] if op == "linear" else shapes[0][::-1]
        return Product(op, dtype, prod(x[:-1]), n, k)
    if op == "linear_wgrad":
        return Product(op, dtype, prod(x[:-1]), x[-1], shapes[0][-1], 1, adds)
    if op in ("grouped_linear", "grouped_linear_dgrad"):
        n, k = shapes[0][1:] if op == "grouped_linear" else shapes[0][:0:-1]
        return Product(op, dtype, x[0], n, k, shapes[0][0])
    if op == "grouped_linear_wgrad":
        return Product(op, dtype, x[0], x[1], shapes[0][1], shapes[1][0] - 1, adds)
    if op == "linear_fp8":
        n, k = shapes[1]
        return Product(op, dtype, prod(x[:-1]), n, k)
    if op == "grouped_linear_fp8":
        groups, n, k = shapes[1]
        return Product(op, dtype, x[0], n, k, groups)
    if op in ("linear_fp8_wgrad", "grouped_linear_fp8_wgrad"):
        groups = 1 if op == "linear_fp8_wgrad" else shapes[3][0] - 1
        return Product(op, dtype, x[1], x[0], shapes[1][0], groups, adds)
    return None


def generated(implementation: str) -> bool:
    """Whether this is the name of a generated kernel."""
    return implementation.startswith(GENERATED)


def tile_name(tile: Tile) -> str:
    """`gluon 128x256x4b`."""
    bm, bn, stages, pair = tile
    return f"{GENERATED}{bm}x{bn}x{stages}{pair}"


def candidates(p: Product) -> tuple[str, ...]:
    """Names of everything that can execute the product, the library first."""
    found = []
    if p.op in LIBRARIES and library_takes(p):
        found.append(LIBRARIES[p.op])
    if p.op in KINDS and generator_takes(p):
        found += [tile_name(t) for t in _tiles(p)]
    return tuple(found) or (FALLBACK,)


def _tiles(p: Product) -> tuple[Tile, ...]:
    return TILES.get((KINDS[p.op], p.dtype, ORDERS.get(p.op, "kk")), ())


def library_takes(p: Product) -> bool:
    """Whether torch's call takes these sizes. cuBLASLt reads four blocks of weight scales at a time, and adds to
    nothing."""
    if p.op == "linear_fp8":
        return p.rows >= SCALED_BLOCK and p.k % (4 * SCALED_BLOCK) == p.n % 16 == p.rows % 16 == 0
    if p.op == "linear_fp8_wgrad":
        return not p.adds and p.rows % SCALED_BLOCK == p.n % 16 == p.k % 16 == 0
    return p.op not in ("grouped_linear", "grouped_linear_dgrad") or p.dtype == "bf16"


def generator_takes(p: Product) -> bool:
    """Whether generated kernels take these sizes: rows of whole 16 numbers, for FP8 gradients whole blocks of rows, and
    where a stage would reach into the next expert's weight whole stages."""
    if p.n % 16 or p.k % 16 or (p.op == "grouped_linear_dgrad" and p.k % STAGE):
        return False
    return p.op != "linear_fp8_wgrad" or p.rows % SCALED_BLOCK == 0


def spec_of(p: Product, implementation: str) -> GemmSpec:
    """The generated kernel of this name for the product. Raises InputError if there is none."""
    tile = next((t for t in (_tiles(p) if p.op in KINDS else ()) if tile_name(t) == implementation), None)
    if tile is None:
        raise InputError(f"{p.op} of {p.dtype} has no implementation '{implementation}'; compile the plan again")
    kind, (bm, bn, stages, pair) = KINDS[p.op], tile
    dtype: Element = "e4m3" if p.dtype == "e4m3" else "bf16"
    # A store is 64 rows high: where that reaches into the next group, it may add zeros but not write them.
    sums: Output = "accumulate_f32" if p.adds or (p.groups > 1 and p.n % STORED_ROWS) else "f32"
    output: Output = sums if kind == "grouped_k" else "bf16"
    return GemmSpec(kind, dtype, bm, bn, stages, output, pair=pair, order=ORDERS.get(p.op, "kk"))
