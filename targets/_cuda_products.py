"""How matrix products of a running plan find their implementation: by the plan's choices, by the nearest number of rows
where a batch has others, and by the measured table for products that the plan does not know."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dsv3c.lazy import lazy
from dsv3c.target import Choice, Kernel, Product
from dsv3c.targets._gluon_kernel import LANGUAGE, gemm_binary, kernel_id, load_binary, load_gemm
from dsv3c.targets._gluon_launch import Loaded
from dsv3c.targets._gluon_spec import GemmSpec
from dsv3c.targets._measured import Table, shipped
from dsv3c.targets._products import candidates, generated, product_of, spec_of
from dsv3c.targets._select import choose
from dsv3c.tensors import ir_dtype

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

Call = Callable[[], None]
Tensors = tuple["torch.Tensor", ...]
Values = dict[str, "torch.Tensor | int"]
"""What a generated kernel takes, by the names of its arguments."""
Shape = tuple[str, str, int, int, int, bool]


def _shape(p: Product) -> Shape:
    """All but the rows."""
    return p.op, p.dtype, p.n, p.k, p.groups, p.adds


class Picked:
    """The implementation of one product, ready to be bound to tensors."""

    def __init__(self, product: Product, name: str, load: Callable[[GemmSpec], Loaded], lent: int = 0) -> None:
        self.product, self.name, self._load, self._lent = product, name, load, lent

    @property
    def generated(self) -> bool:
        """Whether it is a generated kernel."""
        return generated(self.name)

    def gemm(self, values: Values) -> Call:
        """A call of the generated kernel on all SMs of the current device but those lent to communication."""
        units = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count - self._lent
        spec = spec_of(self.product, self.name)
        run = self._load(spec).bind(units, **values)
        result = values["c_desc"]
        if spec.output != "accumulate_f32" or self.product.adds or not isinstance(result, torch.Tensor):
            return run

        def anew() -> None:
            result.zero_()
            run()

        return anew


class Products:
    """The choices and kernels of one plan; `forced` names one implementation for everything instead. `lent`: SMs that
    generated kernels leave to communication."""

    def __init__(self, choices: Sequence[Choice] = (), kernels: Sequence[Kernel] = (), forced: str = "",
                 table: Callable[[], Table] = shipped, lent: int = 0) -> None:  # fmt: skip
        self._forced, self._table, self._lent = forced, table, lent
        self._chosen: dict[Shape, list[Choice]] = {}
        for choice in choices:
            self._chosen.setdefault(_shape(choice.product), []).append(choice)
        self._kernels = {k.id: k for k in kernels if k.lang == LANGUAGE}
        self._loaded: dict[str, Loaded] = {}

    def pick(self, op: str, inputs: Tensors, adds: bool = False) -> Picked:
        """The implementation of `op` on these tensors."""
        types = [(str(ir_dtype(t.dtype)), tuple(t.shape)) for t in inputs]
        product = product_of(op, types, adds)
        assert product is not None, op
        return Picked(product, self._name(product), self._load, self._lent)

    def _name(self, p: Product) -> str:
        if self._forced:
            return self._forced
        known = self._chosen.get(_shape(p), ())
        mode = "auto"
        if known:
            name = min(known, key=lambda c: abs(math.log((c.product.rows or 1) / (p.rows or 1)))).implementation
            if name in candidates(p):
                return name
            mode = "generated" if generated(name) else "auto"
        return choose(p, mode, self._table()).implementation

    def _load(self, spec: GemmSpec) -> Loaded:
        """The plan's kernel; where the plan has none, the same made here."""
        name = kernel_id(spec)
        if name not in self._loaded:
            kernel = self._kernels.get(name)
            self._loaded[name] = load_gemm(kernel) if kernel else load_binary(spec, gemm_binary(spec))
        return self._loaded[name]
