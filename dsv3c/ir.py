"""The graph IR: typed SSA graphs with symbolic dimensions, and programs that say which layer runs which graph."""

from __future__ import annotations

import builtins
import enum
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from dsv3c.dims import Dim, bind, multiply, show, symbols
from dsv3c.errors import InputError


class IRError(InputError):
    """A graph or a program breaks a rule of the IR; the message shows where."""


class DType(enum.Enum):
    """Element types. `e5m6` is the 12-bit storage form of the attention output (report, section 3.3.3)."""

    f64 = ("f64", 64, True)
    f32 = ("f32", 32, True)
    bf16 = ("bf16", 16, True)
    f16 = ("f16", 16, True)
    e4m3 = ("e4m3", 8, True)
    e5m6 = ("e5m6", 12, True)
    i64 = ("i64", 64, False)
    i32 = ("i32", 32, False)
    u8 = ("u8", 8, False)
    bool = ("bool", 8, False)

    def __init__(self, text: str, bits: int, is_float: builtins.bool) -> None:
        self.text = text
        self.bits = bits
        self.is_float = is_float

    def __str__(self) -> str:
        return self.text

    __hash__ = object.__hash__


DTYPES: Mapping[str, DType] = {d.text: d for d in DType}

Attr: TypeAlias = "bool | int | float | str | tuple[Attr, ...] | None"
"""A compile-time constant of a node: a Python literal."""

Attrs: TypeAlias = "tuple[tuple[str, Attr], ...]"


@dataclass(frozen=True, slots=True)
class Type:
    """Element type and shape of a tensor; a scalar has shape `()`."""

    dtype: DType
    shape: tuple[Dim, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(show, self.shape)) or '()'}]"

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def elements(self) -> Dim:
        """How many elements, as a closed form."""
        return multiply(*self.shape)

    def bytes(self, sizes: Mapping[str, int] | None = None) -> int:
        """Bytes that the tensor occupies once symbols have `sizes`."""
        return -(-bind(self.elements, sizes or {}) * self.dtype.bits // 8)

    def bound(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape once symbols have `sizes`."""
        return tuple(bind(d, sizes) for d in self.shape)

    def with_dtype(self, dtype: DType) -> Type:
        return Type(dtype, self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One SSA value: a name that is unique in its graph, and a type."""

    name: str
    type: Type

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Value) and self.name == other.name and self.type == other.type)

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name


class Phase(enum.Enum):
    """What part of a training step a node belongs to: forward, input gradient, weight gradient."""

    F = "F"
    B = "B"
    W = "W"

    __hash__ = object.__hash__


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. `path` says in plain words which part of the model it is (`moe.router`).

    `line` is the model's source line for error messages; it is neither printed nor compared.
    """

    op: str
    inputs: tuple[Value, ...]
    attrs: Attrs
    outputs: tuple[Value, ...]
    path: str = ""
    phase: Phase = Phase.F
    line: str = field(default="", compare=False)

    def attr(self, name: str) -> Attr:
        """The value of attribute `name`; KeyError if the node has none."""
        for key, value in self.attrs:
            if key == name:
                return value
        raise KeyError(name)

    @property
    def output(self) -> Value:
        """The only output of a node that has one."""
        (only,) = self.outputs
        return only


@dataclass(frozen=True)
class Graph:
    """A straight-line SSA function: `inputs` are activations and state, `weights` what is trained."""

    name: str
    inputs: tuple[Value, ...]
    weights: tuple[Value, ...]
    nodes: tuple[Node, ...]
    results: tuple[Value, ...]

    @property
    def params(self) -> tuple[Value, ...]:
        return self.inputs + self.weights

    @functools.cached_property
    def producers(self) -> Mapping[str, Node]:
        """Value name -> the node that makes it; parameters are absent."""
        return {o.name: n for n in self.nodes for o in n.outputs}

    @functools.cached_property
    def users(self) -> Mapping[str, tuple[Node, ...]]:
        """Value name -> the nodes that read it, in order, each once; a value only returned has none."""
        table: dict[str, list[Node]] = {v.name: [] for v in self.values()}
        for n in self.nodes:
            for v in dict.fromkeys(n.inputs):
                table[v.name].append(n)
        return {k: tuple(v) for k, v in table.items()}

    def values(self) -> Iterator[Value]:
        """Every value once, in order of definition."""
        yield from self.params
        for n in self.nodes:
            yield from n.outputs

    def value(self, name: str) -> Value:
        """The value called `name`; KeyError if there is none."""
        return self._values[name]

    @functools.cached_property
    def _values(self) -> Mapping[str, Value]:
        return {v.name: v for v in self.values()}

    @functools.cached_property
    def symbols(self) -> tuple[str, ...]:
        """Sorted names of all dimension symbols."""
        return symbols(d for v in self.values() for d in v.type.shape)

    def but(self, **changes: object) -> Graph:
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Weight:
    """A stored tensor of the model. `init`: `normal` (with `std`), `ones` or `zeros`.

    `group` chooses optimizer settings: `embedding`, `head`, `norm`, `matrix`, or `state` for what is kept and
    updated but never trained by gradient (the router bias). `parts`: among how many ranks its leading axis is divided
    (experts); `type` is then that of one rank.
    """

    name: str
    type: Type
    init: str
    std: float
    group: str
    parts: int = 1

    @property
    def shape(self) -> tuple[Dim, ...]:
        """The shape with the parts of all ranks."""
        if self.parts == 1:
            return self.type.shape
        return (multiply(self.parts, self.type.shape[0]), *self.type.shape[1:])


@dataclass(frozen=True, slots=True)
class Layer:
    """One use of a graph: which named values it reads and writes, and which weights it binds.

    `inputs`, `weights` and `outputs` are positional to the graph's `inputs`, `weights` and `results`. Names of
    values are SSA within one sequence of layers. An input may also name a weight: state that is not trained.
    """

    name: str
    graph: str
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    phase: Phase = Phase.F


@dataclass(frozen=True)
class Sequence:
    """Layers executed in order, for example `prologue`, `train`, `epilogue`, `forward`, `prefill`, `decode`.

    `inputs` come from outside; `results` are handed back. `losses` are the scalar results that training
    differentiates, each with its weight decided when it runs: once cut, the input `d:NAME` is the weight of the loss
    NAME. `gradients`: pairs (value, weight) that say which value is part of which weight's gradient; parts add up.
    A result that continues an input (a cache, optimizer state) may overwrite it.
    """

    name: str
    inputs: tuple[str, ...]
    layers: tuple[Layer, ...]
    results: tuple[str, ...]
    losses: tuple[str, ...] = ()
    gradients: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Program:
    """Everything a job executes: one graph per kind of layer, the sequences that use them, the weights."""

    name: str
    graphs: tuple[Graph, ...]
    sequences: tuple[Sequence, ...] = ()
    weights: tuple[Weight, ...] = ()

    @functools.cached_property
    def _graphs(self) -> Mapping[str, Graph]:
        return {g.name: g for g in self.graphs}

    @functools.cached_property
    def _weights(self) -> Mapping[str, Weight]:
        return {w.name: w for w in self.weights}

    def graph(self, name: str) -> Graph:
        """The graph called `name`; KeyError if there is none."""
        return self._graphs[name]

    def has_graph(self, name: str) -> bool:
        return name in self._graphs

    def weight(self, name: str) -> Weight:
        """The weight called `name`; KeyError if there is none."""
        return self._weights[name]

    def sequence(self, name: str) -> Sequence:
        """The sequence called `name`; KeyError if there is none."""
        for s in self.sequences:
            if s.name == name:
                return s
        raise KeyError(name)

    def has_sequence(self, name: str) -> bool:
        return any(s.name == name for s in self.sequences)

    def with_graphs(self, graphs: tuple[Graph, ...]) -> Program:
        """A copy with other graphs; the same object if every graph is the same object."""
        if len(graphs) == len(self.graphs) and all(a is b for a, b in zip(graphs, self.graphs, strict=True)):
            return self
        return replace(self, graphs=graphs)

    def but(self, **changes: object) -> Program:
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]
