"""Bytes that executing ops on Hopper holds beside their operands: scratch that calls share, tensors that libraries
return, and what libraries and loaded code take."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from dsv3c.ir import Node
from dsv3c.target import Product
from dsv3c.targets._measured import shipped
from dsv3c.targets._products import generated, product_of
from dsv3c.targets._select import choose
from dsv3c.targets._triton_blocks import PROGRAMS

LIBRARIES = 240 * 2**20
"""Loaded code, and the workspaces of cuBLAS on the stream that runs and on the one that records; as measured."""
SEGMENT = 2 * 2**20
"""Torch takes memory from the driver in multiples of this."""
LARGE = 2**20
"""Smaller tensors come from segments shared by many, which `LIBRARIES` covers."""

Sizes = Mapping[str, int]
Shapes = tuple[tuple[int, ...], ...]


def reserved_bytes(nodes: Iterable[tuple[Node, Sizes]], implementations: str) -> int:
    """Bytes held beside the operands of `nodes`, given in the order in which they are bound and run, with the values
    of their symbols, where products are chosen by `implementations`."""
    pool, rooms = _Pool(), _Rooms()
    sums: dict[str, int] = {}
    for node, sizes in nodes:
        shapes = tuple(v.type.bound(sizes) for v in node.inputs)
        bound = tuple(v.type.bound(sizes) for v in node.outputs)
        chosen = _is_generated(node, shapes, implementations)
        for slot, size in _scratch(node, shapes, chosen):
            rooms.take(slot, size)
        pool.use([n for n in _returned(node, bound, chosen) if n >= LARGE])
        if node.op == "call":
            sums[str(node.attr("graph"))] = 4 * PROGRAMS * sum(
                v.type.shape[0] for v in node.outputs if v.type.rank == 1 and isinstance(v.type.shape[0], int)
            )
    return LIBRARIES + pool.size + rooms.size + sum(sums.values())


def _is_generated(node: Node, shapes: Shapes, implementations: str) -> bool:
    types = [(str(v.type.dtype), shape) for v, shape in zip(node.inputs, shapes, strict=True)]
    product = product_of(node.op, types, False) if node.op.startswith(("linear", "grouped_linear")) else None
    return product is not None and _chosen_is_generated(product, implementations)


@functools.cache
def _chosen_is_generated(product: Product, implementations: str) -> bool:
    return generated(choose(product, implementations, shipped()).implementation)


def _scratch(node: Node, shapes: Shapes, made: bool) -> Iterator[tuple[int, int]]:
    """(slot, bytes) of scratch, as the implementations ask for it."""

    def scales(shape: tuple[int, ...]) -> int:
        rows, tiles = prod(shape[:-1]), shape[-1]
        return 4 * tiles * (-(-rows // 256) * 256 if made else rows)

    if node.op in ("linear_fp8", "linear_fp8_dgrad", "grouped_linear_fp8", "grouped_linear_fp8_dgrad"):
        yield 10, scales(shapes[1])
    elif node.op in ("linear_fp8_wgrad", "grouped_linear_fp8_wgrad"):
        yield 10, scales(shapes[1])
        yield 11, scales(shapes[3])
    elif node.op == "embedding_wgrad":
        yield from ((slot, 8 * prod(shapes[0])) for slot in (20, 21))


def _returned(node: Node, outputs: Shapes, made: bool) -> list[int]:
    """Bytes of the tensors that a library's call allocates at once."""
    sizes = [prod(s) * v.type.dtype.bits // 8 for s, v in zip(outputs, node.outputs, strict=True)]
    if node.op == "attention":
        return sizes
    if node.op == "attention_grad":
        return [*sizes, 4 * prod(outputs[0])]  # cuDNN adds up the gradient of queries in float32
    if node.op in ("grouped_linear", "grouped_linear_dgrad") and not made:
        return sizes
    return []


@dataclass
class _Rooms:
    """Scratch by slot: a room is made where none is large enough."""

    sizes: dict[int, list[int]] = field(default_factory=dict)

    def take(self, slot: int, size: int) -> None:
        rooms = self.sizes.setdefault(slot, [])
        if all(room < size for room in rooms):
            rooms.append(-(-size // SEGMENT) * SEGMENT)

    @property
    def size(self) -> int:
        return sum(map(sum, self.sizes.values()))


@dataclass
class _Pool:
    """Torch's allocator for what lives during one call: the smallest free block that fits, or a new segment."""

    segments: list[int] = field(default_factory=list)

    def use(self, wanted: list[int]) -> None:
        """Allocate all of these, then free them."""
        free = sorted(self.segments)
        for size in wanted:
            size = -(-size // 512) * 512
            fits = next((i for i, room in enumerate(free) if room >= size), None)
            if fits is None:
                self.segments.append(-(-size // SEGMENT) * SEGMENT)
                continue
            rest = free.pop(fits) - size
            if rest >= LARGE:
                free = sorted([*free, rest])

    @property
    def size(self) -> int:
        return sum(self.segments)
