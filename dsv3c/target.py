"""What a target is: a machine described in numbers, kernels as files, and the functions that make and load them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3c.ir import DType, Graph, Node

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Machine:
    """One device and its links. Rates are per second and per direction; memory is what a program can use.

    `matrix_flops`: (element type, FLOP/s) of the matrix unit. `units`: SMs or cores. `latency`: seconds from
    launching a kernel to its start. `node`: ranks that share the fast link.
    `efficiency`: what share of a peak programs reach, by op name, by element type of the matrix unit, or `memory`; all
    of it where nothing is said. `few_units`: how much faster than its share a part of the units is, where all together
    are limited by power. `exchange`: (units, share) points of how fast that many units move data between ranks.
    `hops_together`: what share of the shorter hop of an exchange in two hops runs during the longer one.
    """

    name: str
    units: int
    matrix_flops: tuple[tuple[DType, float], ...]
    vector_flops: float
    memory_bandwidth: float
    memory_bytes: int
    latency: float
    node: int = 8
    fast_link: float = 0.0
    fast_latency: float = 0.0
    slow_link: float = 0.0
    slow_latency: float = 0.0
    efficiency: tuple[tuple[str, float], ...] = ()
    few_units: float = 1.0
    exchange: tuple[tuple[int, float], ...] = ()
    hops_together: float = 0.0

    def matrix_rate(self, dtype: DType) -> float:
        """FLOP/s of the matrix unit for inputs of `dtype`, or of the nearest wider type it has."""
        table = dict(self.matrix_flops)
        return table.get(dtype) or table.get(DType.f32) or self.matrix_flops[-1][1]

    def reached(self, *kinds: str) -> float:
        """The share of a peak that work of these kinds reaches: of the first that `efficiency` knows, else all."""
        table = dict(self.efficiency)
        return next((table[k] for k in kinds if k in table), 1.0)

    def exchange_share(self, units: int) -> float:
        """The share of the links' bandwidth that so many units make use of: between two points a straight line."""
        low_units, low = 0, 0.0
        for high_units, high in self.exchange:
            if units <= high_units:
                return low + (high - low) * (units - low_units) / (high_units - low_units)
            low_units, low = high_units, high
        return 1.0


@dataclass(frozen=True, slots=True)
class KernelFile:
    """One file of a kernel: `suffix` such as `tir.py`, `ll`, `cubin`."""

    suffix: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Kernel:
    """Generated code for one region. `id` is the name of its files; `op` the graph it implements.

    `lang`: tvm, triton or gluon. `signature`: types of the arguments, inputs then outputs, as text.
    `launch`: what the loader needs (entry point, grid, warps ...), key by key.
    """

    id: str
    op: str
    lang: str
    signature: tuple[str, ...]
    files: tuple[KernelFile, ...]
    launch: tuple[tuple[str, str | int], ...] = ()

    @property
    def has_binary(self) -> bool:
        return any(f.suffix in ("ll", "cubin") for f in self.files)

    def file(self, suffix: str) -> bytes:
        """The contents of the file with this suffix; KeyError if there is none."""
        for f in self.files:
            if f.suffix == suffix:
                return f.data
        raise KeyError(suffix)


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to execute an op on a target.

    `prepare(inputs, outputs, **attrs)` looks at the tensors once and returns a function without arguments that
    does the work: it reads `inputs`, writes `outputs` completely, allocates nothing that lasts. Called again, it
    does the same on whatever the tensors then hold. If `accumulates`, `prepare` also takes `accumulate=True`: then
    the function adds to `outputs[0]` instead of overwriting it.
    """

    op: str
    prepare: Callable[..., Callable[[], None]]
    accumulates: bool = False


@dataclass(frozen=True, slots=True, order=True)
class Product:
    """One matrix product at concrete sizes, 2·rows·n·k FLOP.

    `rows` of k numbers times a k×n matrix, or one matrix for each of `groups`. A weight gradient gives n×k numbers and
    is summed over `rows`; if it `adds`, to what is there. `dtype`: element type of the operands.
    """

    op: str
    dtype: str
    rows: int
    n: int
    k: int
    groups: int = 1
    adds: bool = False

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.n * self.k

    def __str__(self) -> str:
        groups = f" in {self.groups} groups" if self.groups > 1 else ""
        return f"{self.op}{' adding' if self.adds else ''} {self.rows}×{self.n}×{self.k}{groups}"


@dataclass(frozen=True, slots=True)
class Choice:
    """Which implementation executes a product, which kernel of the plan it launches (its id, or ""), and why."""

    product: Product
    implementation: str
    kernel: str
    reason: str


class Selector(ABC):
    """What a target says of matrix products for which it has several implementations."""

    @abstractmethod
    def product(self, op: str, types: Sequence[tuple[str, tuple[int, ...]]], adds: bool) -> Product | None:
        """The product that `op` computes from operands of these element types and shapes; None if it computes none."""

    @abstractmethod
    def choose(self, products: Sequence[Product], mode: str) -> tuple[Choice, ...]:
        """The implementation of each: the fastest by the measured table (`auto`), among the `generated` ones or those
        of a `library` where there are such."""

    @abstractmethod
    def measured(self) -> str:
        """The measured table: its name and the hash of its contents."""

    @abstractmethod
    def kernels(self, choices: Sequence[Choice], kernels: str) -> tuple[Kernel, ...]:
        """The kernels that the choices name; none for `kernels` = none, without binaries for source."""

    @abstractmethod
    def implementations(self, choices: Sequence[Choice], kernels: Sequence[Kernel],
                        lent: int = 0) -> Mapping[str, Implementation]:  # fmt: skip
        """All implementations by op, those of products as chosen, by the kernels of the plan.

        `lent`: units of the device that generated products leave to communication beside them.
        """

    @abstractmethod
    def tune(self, products: Sequence[Product], rounds: int, tell: Callable[[int, int, str], None]) -> Path:
        """Measure the products here and put the result where `choose` finds it next time; gives that file.

        `tell(done, total, line)` after each. Raises InputError if this machine has not the target's device.
        """


def _no_trouble() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Target:
    """A machine and how to run on it.

    `generate(region, sizes, kernels)` gives the kernel of a fused region with symbols bound to `sizes` left open
    where the language can, or None if no generator covers it. `implementations` are by op name. `load(kernel)`
    gives `prepare(inputs, outputs)` as in `Implementation`. A target with `device` None can be compiled for but
    not run. `expert_alignment` is to how many rows each expert's share is padded for an element type. `selector`
    knows what else can execute matrix products. `trouble()` says in a few words why this machine cannot run the
    target's code, "" if it can. `reserve(nodes, implementations)` gives the bytes that executing these nodes, in order
    and with the values of their symbols, holds beside their operands (scratch, libraries); None if nothing to speak of.
    """

    name: str
    doc: str
    machine: Machine
    precision: str
    device: str | None
    expert_alignment: Callable[[DType], int]
    generate: Callable[[Graph, Mapping[str, int], str], Kernel | None]
    implementations: Mapping[str, Implementation]
    load: Callable[[Kernel], Callable[[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]], Callable[[], None]]] | None
    selector: Selector | None = None
    trouble: Callable[[], str] = _no_trouble
    reserve: Callable[[Iterable[tuple[Node, Mapping[str, int]]], str], int] | None = None
