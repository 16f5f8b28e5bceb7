"""The Hopper targets' selector: what can execute each matrix product, which is taken, and how that is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3c.target import Choice, Implementation, Kernel, Product, Selector
from dsv3c.targets._cuda_attention import ATTENTION
from dsv3c.targets._cuda_fp8 import fp8_implementations
from dsv3c.targets._cuda_matrix import matrix_implementations
from dsv3c.targets._cuda_products import Products
from dsv3c.targets._cuda_tokens import TOKENS
from dsv3c.targets._gluon_kernel import gemm_kernel
from dsv3c.targets._measured import table_of
from dsv3c.targets._products import generated, product_of, spec_of
from dsv3c.targets._select import choose


def all_implementations(products: Products) -> dict[str, Implementation]:
    """Every implementation by op."""
    made = (*matrix_implementations(products), *fp8_implementations(products), *ATTENTION, *TOKENS)
    return {i.op: i for i in made}


@dataclass(frozen=True, slots=True)
class HopperSelector(Selector):
    """Chooses for the target called `name`: by what was tuned for it here, else by the table shipped for H100."""

    name: str

    def product(self, op: str, types: Sequence[tuple[str, tuple[int, ...]]], adds: bool) -> Product | None:
        return product_of(op, types, adds)

    def choose(self, products: Sequence[Product], mode: str) -> tuple[Choice, ...]:
        table = table_of(self.name)
        return tuple(choose(p, mode, table) for p in products)

    def measured(self) -> str:
        table = table_of(self.name)
        return f"{table.name} sha256:{table.digest}"

    def kernels(self, choices: Sequence[Choice], kernels: str) -> tuple[Kernel, ...]:
        if kernels == "none":
            return ()
        specs = {c.kernel: spec_of(c.product, c.implementation) for c in choices if generated(c.implementation)}
        return tuple(gemm_kernel(specs[name], kernels) for name in sorted(specs))

    def implementations(self, choices: Sequence[Choice], kernels: Sequence[Kernel],
                        lent: int = 0) -> Mapping[str, Implementation]:  # fmt: skip
        return all_implementations(Products(choices, kernels, table=lambda: table_of(self.name), lent=lent))

    def tune(self, products: Sequence[Product], rounds: int, tell: Callable[[int, int, str], None]) -> Path:
        from dsv3c.targets._cuda_tune import tune

        return tune(self.name, products, rounds, tell)
