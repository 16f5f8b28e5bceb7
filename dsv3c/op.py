"""One record per operation: everything that the compiler ever needs to know about it, and the registry of them."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsv3c.dims import Dim, add, ceil_div, multiply
from dsv3c.errors import did_you_mean
from dsv3c.ir import Attrs, DType, IRError, Type
from dsv3c.rows import Rowwise

if TYPE_CHECKING:
    import torch


class Effect(enum.Enum):
    """`PURE` ops may be removed, shared, moved and recomputed; `COMM` and `RANDOM` ones may not."""

    PURE = "pure"
    COMM = "comm"
    RANDOM = "random"


@dataclass(frozen=True, slots=True)
class Cost:
    """Work of one node as closed forms: `flops` on the matrix unit, `vector_flops` elsewhere, `bytes` through
    device memory, `comm_bytes` sent to other ranks."""

    flops: Dim = 0
    vector_flops: Dim = 0
    bytes: Dim = 0
    comm_bytes: Dim = 0


def bytes_of(*types: Type) -> Dim:
    """Bytes of all `types` together, as a closed form."""
    return add(*map(_bytes, types))


def _bytes(t: Type) -> Dim:
    bits = t.dtype.bits
    return ceil_div(multiply(t.elements, bits), 8) if bits % 8 else multiply(t.elements, bits // 8)


def io_cost(inputs: tuple[Type, ...], outputs: tuple[Type, ...], **_: object) -> Cost:
    """The cost of an op that reads each input once, writes each output once and does one operation per number."""
    return Cost(vector_flops=add(*(t.elements for t in outputs)), bytes=bytes_of(*inputs, *outputs))


SUM = "sum"
"""In a `Split`: every rank holds a partial sum of the whole tensor."""


@dataclass(frozen=True, slots=True)
class Split:
    """One way to divide an op among ranks: for each input and output the axis that is cut, None if every rank
    holds all of it, and for outputs also `SUM`. Negative axes count from the end."""

    inputs: tuple[int | None, ...]
    outputs: tuple[int | str | None, ...]


def split_rows(rows: Rowwise) -> tuple[Split, ...]:
    """How a row-wise op divides: by rows; what is the same for all rows is held by everybody."""
    cut = {"row": 0, "scalar": 0, "prefix": 0, "column": None, "single": None}
    return (Split(tuple(cut[k] for k in rows.operands), tuple(SUM if k == "column" else 0 for k in rows.results)),)


@dataclass(frozen=True, slots=True)
class Sample:
    """Arguments to test an op with: input types, attributes, and how to draw inputs if normal numbers won't do.

    `draw(generator)` gives the input tensors; None draws standard normal floats for every input.
    """

    inputs: tuple[Type, ...]
    attrs: Attrs = ()
    draw: Callable[[torch.Generator], tuple[torch.Tensor, ...]] | None = None


NO_GRADIENT = None
"""Written as an op's `vjp`: nothing flows backward through it."""


@dataclass(frozen=True, slots=True)
class OpDef:
    """Everything about one op; no field has a default, so a missing one fails at import.

    doc        one sentence, with shapes and the section of the report if it has one
    infer      infer(*input types, **attrs) -> output type(s); raises IRError with a short reason
    reference  reference(*tensors, **attrs) -> tensor(s), plain torch: the meaning of the op
    cost       cost(input types, output types, **attrs) -> Cost
    vjp        vjp(builder, node, *output gradients (Value or None)) -> one gradient (or None) per input, as IR;
               or NO_GRADIENT
    shard      the ways it divides among ranks
    effect     PURE, COMM or RANDOM
    rows       its row program if it is row-wise, else None
    aliases    (input, output) pairs that may share memory when nothing else reads the input afterwards
    view       True if every output is a strided view of input 0 and no data moves
    samples    arguments for the contract test
    """

    name: str
    doc: str
    infer: Callable[..., Type | tuple[Type, ...]]
    reference: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
    cost: Callable[..., Cost]
    vjp: Callable[..., tuple[object, ...]] | None
    shard: tuple[Split, ...]
    effect: Effect
    rows: Rowwise | None
    aliases: tuple[tuple[int, int], ...]
    view: bool
    samples: tuple[Sample, ...]

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise IRError(f"the op name {self.name!r} must be a Python identifier")
        if not self.doc or not self.samples:
            raise IRError(f"the op '{self.name}' needs a doc sentence and at least one sample")

    def infer_types(self, types: tuple[Type, ...], attrs: Attrs) -> tuple[Type, ...]:
        """Output types for input types and attributes.

        Raises IRError with the reason when they do not fit.
        """
        try:
            result = self.infer(*types, **dict(attrs))
        except TypeError as error:
            raise IRError(f"wrong arguments: {_arity(error)}") from error
        return result if isinstance(result, tuple) else (result,)


def _arity(error: TypeError) -> str:
    text = str(error)
    return text.split("() ", 1)[-1].replace("positional argument", "input").replace("keyword argument", "attribute")


def expect(condition: bool, reason: str) -> None:
    """Raise IRError(reason) unless `condition`; for use in `infer`."""
    if not condition:
        raise IRError(reason)


def expect_float(*types: Type) -> None:
    """Raise IRError unless all `types` are floating point."""
    for t in types:
        if not t.dtype.is_float:
            raise IRError(f"expected a floating-point tensor, got {t}")


def expect_integer(*types: Type) -> None:
    """Raise IRError unless all `types` are i32 or i64."""
    for t in types:
        if t.dtype not in (DType.i32, DType.i64):
            raise IRError(f"expected an integer tensor, got {t}")


class Registry:
    """The ops a program may use, by name."""

    def __init__(self, ops: Iterable[OpDef] = ()) -> None:
        self._ops: dict[str, OpDef] = {}
        for op in ops:
            self.register(op)

    def register(self, op: OpDef) -> OpDef:
        """Add an op; its name must be new."""
        if op.name in self._ops and self._ops[op.name] is not op:
            raise IRError(f"the op '{op.name}' is registered twice; choose another name")
        self._ops[op.name] = op
        return op

    def __getitem__(self, name: str) -> OpDef:
        """The op called `name`; IRError with the nearest name if there is none."""
        try:
            return self._ops[name]
        except KeyError:
            raise IRError(f"unknown op '{name}'; {did_you_mean(name, self._ops)}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._ops

    def __iter__(self) -> Iterator[OpDef]:
        return iter(sorted(self._ops.values(), key=lambda op: op.name))
