"""What ends a training step on one rank: sums over its micro-batches, clipping, the optimizer, router biases."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dsv3c.ir import Sequence
from dsv3c.job import Recipe
from dsv3c.runtime.executor import Engine, prepare_graph
from dsv3c.runtime.runner import Runner
from dsv3c.runtime.weights import Trained
from dsv3c.tensors import torch_dtype


class Sums:
    """Losses and expert loads of a step, added up on the device and read by the host in one transfer."""

    def __init__(self, sequence: Sequence, runner: Runner) -> None:
        self._runner = runner
        self._losses = sequence.losses
        self._loads = tuple(n for n in sequence.results if n.startswith("load."))
        self._count = 0
        self._loss: torch.Tensor | None = None
        self._load: torch.Tensor | None = None

    def add(self) -> None:
        """Take in the micro-batch that the runner has just run."""
        values = self._runner.values
        loss = torch.stack([values[n] for n in self._losses]).double()
        self._loss = loss if self._loss is None else self._loss.add_(loss)
        if self._loads:
            load = torch.stack([values[n] for n in self._loads])
            self._load = load if self._load is None else self._load.add_(load)
        self._count += 1

    def load(self, name: str) -> torch.Tensor:
        """Tokens per expert of a layer, on the device."""
        assert self._load is not None
        return self._load[self._loads.index(name)]

    def read(self, squares: torch.Tensor) -> tuple[dict[str, float], float, dict[str, torch.Tensor]]:
        """The mean of each loss, the root of `squares`, and the loads by name; waits for the device."""
        assert self._loss is not None
        parts = [self._loss / self._count, squares.sqrt().double().view(1)]
        if self._load is not None:
            parts.append(self._load.double().flatten())
        host = torch.cat(parts).cpu()
        n = len(self._losses)
        losses = dict(zip(self._losses, host[:n].tolist(), strict=True))
        rows = host[n + 1 :].view(len(self._loads), -1).to(self._load.dtype) if self._load is not None else ()
        return losses, float(host[n]), dict(zip(self._loads, rows, strict=True))


class Epilogue:
    """The graphs `gradient_squares`, `clip`, `update...` and `update_bias`, bound once; what changes from step to step
    lies in tensors on the device."""

    def __init__(self, engine: Engine, weights: Trained, recipe: Recipe) -> None:
        self._engine, self._weights, self._recipe = engine, weights, recipe
        self._runners: dict[str, Runner] = {}
        self._scalars: dict[str, torch.Tensor] = {}

    def squares(self) -> torch.Tensor:
        """The sum of the squares of all gradients."""
        total = self._scalar("squares", 0.0)
        for name, group in self._weights.groups.items():
            assert group.gradient is not None
            runner = self._graph(f"squares.{name}", "gradient_squares", {"gradient": group.gradient})
            runner.run()
            total += runner.values["squares"]
        return total

    def update(self, lr: float, step: int, squares: torch.Tensor) -> None:
        """Clip all gradients together, of which `squares` is the sum of squares, and update every group."""
        self._weights.start_optimizer()
        clip = self._graph("clip", "clip", {"squares": squares})
        clip.run()
        rates = {"embedding": self._recipe.embedding_lr, "head": self._recipe.head_lr}
        count = self._scalar("step", float(step))
        for name, group in self._weights.groups.items():
            assert group.gradient is not None and group.m is not None and group.v is not None
            rate = self._scalar(f"lr.{name}", lr * rates.get(group.name, 1.0))
            state = {"w": group.master, "gradient": group.gradient, "m": group.m, "v": group.v}
            results = {"w_next": group.master, "m_next": group.m, "v_next": group.v}
            graph = "update" if group.name == "norm" else "update_decayed"
            inputs = state | {"scale": clip.values["scale"], "lr": rate, "step": count}
            self._graph(f"update.{name}", graph, inputs, results).run()

    def update_bias(self, bias: str, load: torch.Tensor) -> None:
        """Move a router's bias toward balance (section 2.1.2), given the tokens of each expert."""
        tensor = self._weights.tensors[bias]
        held = self._scalars.setdefault(f"load.{bias}", torch.zeros_like(tensor)).copy_(load)
        tensors = {"bias": tensor, "load": held, "speed": self._scalar("speed", self._recipe.bias_speed)}
        self._graph(f"bias.{bias}", "update_bias", tensors, {"bias_next": tensor}).run()

    def _scalar(self, name: str, value: float) -> torch.Tensor:
        if name not in self._scalars:
            dtype = torch_dtype(self._weights.wide)
            self._scalars[name] = torch.zeros((), dtype=dtype, device=self._weights.device)
        return self._scalars[name].fill_(value)

    def _graph(self, key: str, name: str, tensors: Mapping[str, torch.Tensor],
               results: Mapping[str, torch.Tensor] | None = None) -> Runner:  # fmt: skip
        if key not in self._runners:
            self._runners[key] = prepare_graph(self._engine, name, tensors, results)
        return self._runners[key]
