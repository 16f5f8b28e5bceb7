"""What a Hopper matrix-product kernel is: its kind, its tile, how its operands lie, and the arguments it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsv3c.errors import InputError

Kind = Literal["dense", "grouped_rows", "grouped_k"]
Element = Literal["e4m3", "bf16"]
Output = Literal["bf16", "f32", "accumulate_f32"]
Pair = Literal["", "a", "b"]
Order = Literal["kk", "kn", "mn"]
"""Along which axis A and B are contiguous."""

SHARED_LIMIT = 227 * 1024
SCALE_BLOCK = 128
"""Columns of K (rows of the batch, for `grouped_k`) that share one scale, and between FP32 promotions."""


@dataclass(frozen=True, slots=True)
class GemmSpec:
    """One kernel: C[M, N] = A[M, K] · B[N, K] transposed.

    `order`: both operands contiguous along K, or in bf16 as `kn` B[K, N], as `mn` A[K, M] and B[K, N] instead.
    `dense`: one product. `grouped_rows`: rows offsets[e]:offsets[e+1] of A meet B[e] of B[experts, N, K]; offsets are
    multiples of 128, and rows outside all groups are left as they are. `grouped_k`: C[e] = A[:, offsets[e]:
    offsets[e+1]] · B[:, same] transposed, or with `accumulate_f32` C[e] +=; offsets are multiples of 128, an empty
    group gives zeros. With several groups, `f32` needs M to be a multiple of 64: stores are that high.
    `e4m3` operands carry float32 scales: A one per 1×128, stored [K/128, a_scale_stride]; B one per 128×128, stored
    [N/128, K/128], but for `grouped_k` as A's, [K/128, b_scale_stride].
    `bm`, `bn`: the tile of one block. `stages`: depth of the ring. `raster`: how many tile rows are swept together,
    for reuse in L2. `pair`: two neighbouring blocks form a cluster and share their tile of this operand, each
    fetching half of it for both. `epilogue`: lines of Gluon that rebind `tile`, the float32 [64, chunk] accumulator
    at (`tile_row`, `tile_column`), before it is stored; `ROWS` and `COLUMNS` are the layouts of its axes.
    """

    kind: Kind
    dtype: Element
    bm: int
    bn: int
    stages: int
    output: Output = "bf16"
    raster: int = 8
    pair: Pair = ""
    order: Order = "kk"
    epilogue: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.bm not in (128, 192, 256) or self.bn not in (64, 128, 256) or self.bm * self.bn > 256 * 128:
            raise InputError(f"no kernel has tiles of {self.bm}×{self.bn}; use 128, 192 or 256 rows, 32768 elements")
        if self.bm == 192 and self.by_column:
            raise InputError("column scales need tiles of 128 or 256 rows")
        if self.bn == 256 and self.by_column:
            raise InputError("column scales need tiles of at most 128 columns")
        if self.bm == 192 and self.pair == "a":
            raise InputError("a tile of 192 rows cannot be halved; pair on b")
        if self.order != "kk" and (self.scaled or self.bn > 128 or self.bm == 192):
            raise InputError("operands that are not contiguous along K need bf16 and tiles of at most 128 columns")
        if self.pair and self._pieces(self.pair) != 1:
            raise InputError(f"what a pair shares must come in one copy; pair on {'b' if self.pair == 'a' else 'a'}")
        if self.shared_bytes > SHARED_LIMIT:
            raise InputError(
                f"{self.stages} stages need {self.shared_bytes} bytes of shared memory, over {SHARED_LIMIT}"
            )

    @property
    def block_k(self) -> int:
        """Elements along K per stage: 128 bytes, one swizzle row."""
        return 128 if self.dtype == "e4m3" else 64

    @property
    def chunk(self) -> int:
        """Columns of one warpgroup instruction."""
        return min(self.bn, 128)

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return 3 if self.bm == 192 else 2

    @property
    def a_rows(self) -> int:
        """Rows of one copy of A; a block's dimensions are powers of two."""
        return 64 if self.bm == 192 else self.bm // (1 + (self.pair == "a"))

    @property
    def staged_columns(self) -> int:
        """Columns of one store buffer."""
        return self.chunk if self.output == "bf16" else 32

    @property
    def stage_bytes(self) -> int:
        return (self.bm + self.bn) * 128 + (4 * (self.bm + self.bn) if self.by_column else 0)

    @property
    def shared_bytes(self) -> int:
        """Ring, store buffers and barriers."""
        staging = self.consumers * 64 * self.staged_columns * (2 if self.output == "bf16" else 4)
        return self.stages * (self.stage_bytes + 16) + staging + 64

    @property
    def name(self) -> str:
        order = "" if self.order == "kk" else f"_{self.order}"
        return f"gemm_{self.kind}_{self.dtype}{order}_{self.bm}x{self.bn}x{self.stages}{self.pair}"

    def along_k(self, operand: str) -> bool:
        """Whether operand a or b is contiguous along K."""
        return self.order[operand == "b"] == "k"

    def block(self, operand: str) -> tuple[int, int]:
        """Rows and columns of one copy of operand a or b as it lies in memory."""
        half = 1 + (self.pair == operand)
        rows = self.a_rows if operand == "a" else self.bn // half
        return (rows, self.block_k) if self.along_k(operand) else (self.block_k, rows)

    @property
    def copies(self) -> int:
        """Copies that fill one stage, scales apart; one brings at most 128 bytes of each row."""
        return (3 if self.bm == 192 else self._pieces("a")) + self._pieces("b")

    def _pieces(self, operand: str) -> int:
        return -(-self.block(operand)[1] // self.block_k)

    @property
    def scaled(self) -> bool:
        return self.dtype == "e4m3"

    @property
    def by_column(self) -> bool:
        """Whether every column of B has its own scale."""
        return self.scaled and self.kind == "grouped_k"

    @property
    def grouped(self) -> bool:
        return self.kind != "dense"


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A TMA descriptor argument: block shape, element type (Triton's name), whether shared memory is swizzled."""

    block: tuple[int, ...]
    element: str
    swizzle: bool = True


def arguments(spec: GemmSpec) -> tuple[tuple[str, str | Descriptor], ...]:
    """Kernel arguments in order: name and Triton type, or the descriptor's block."""
    element = "fp8e4nv" if spec.scaled else "bf16"
    found: list[tuple[str, str | Descriptor]] = [
        ("a_desc", Descriptor(spec.block("a"), element)),
        ("b_desc", Descriptor(spec.block("b"), element)),
    ]
    found.append(("c_desc", Descriptor((64, spec.staged_columns), "bf16" if spec.output == "bf16" else "fp32")))
    if spec.scaled:
        for name, length in (("a_scale", spec.bm), ("b_scale", spec.bn)):
            found.append((name, Descriptor((length,), "fp32", swizzle=False) if spec.by_column else "*fp32"))
    if spec.grouped:
        found += [("offsets", "*i32"), ("experts", "i32")]
    found += [("M", "i32"), ("N", "i32"), ("K", "i32")]
    if spec.scaled:
        found.append(("a_scale_stride", "i32"))
        if spec.by_column:
            found.append(("b_scale_stride", "i32"))
    return tuple(found)
