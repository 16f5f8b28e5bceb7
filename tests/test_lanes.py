"""Two streams of a GPU never race, whatever the order of a cell: seen through streams that only record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from dsv3c.ir import Phase
from dsv3c.runtime.lanes import Lanes
from dsv3c.runtime.rounds import Further
from dsv3c.runtime.stages import Part

Seen = frozenset[str]


@dataclass
class Stream:
    """A stream as a set: all work that is done before what is put on it next."""

    priority: int = 0
    done: set[str] = field(default_factory=set)

    def wait_stream(self, other: Stream) -> None:
        self.done |= other.done

    def wait_event(self, event: Event) -> None:
        self.done |= event.done


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        self.done: set[str] = set()

    def record(self, stream: Stream | None = None) -> None:
        self.done = set((stream or Device.current).done)


class Device:
    """The work that was put on streams, in the order of the host, each with what was surely done before it."""

    current = Stream()

    def __init__(self) -> None:
        self.before: dict[str, Seen] = {}
        Device.current = Stream()

    def put(self, name: str) -> None:
        self.before[name] = frozenset(Device.current.done)
        Device.current.done.add(name)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        outside, Device.current = Device.current, stream
        yield
        Device.current = outside


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    for name, value in (("Stream", Stream), ("Event", Event), ("stream", made.on),
                        ("current_stream", lambda: Device.current)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return made


class Told:
    """A call that waits for what ranks tell each other, as a `dispatch` does."""

    def __init__(self, device: Device, name: str) -> None:
        self._device, self._name = device, name

    def start(self) -> None:
        self._device.put(f"start {self._name}")

    def __call__(self) -> None:
        self._device.put(self._name)


def part(
    device: Device, layer: str, phase: Phase, name: str, comm: bool = False, further: Further | None = None
) -> Part:
    title = f"{layer} {phase.value} {name}"
    call: Callable[[], None] = Told(device, title) if name == "dispatch" and phase is Phase.F else put(device, title)
    return Part(layer, "moe", phase, name, comm, (call,), further)


def put(device: Device, name: str) -> Callable[[], None]:
    return lambda: device.put(name)


def forward(device: Device, layer: str, further: Further | None = None) -> list[Part]:
    names = (("attention", False), ("dispatch", True), ("mlp", False), ("combine", True), ("tail", False))
    return [part(device, layer, Phase.F, n, c, further if n == "combine" else None) for n, c in names]


def backward(device: Device, layer: str) -> list[Part]:
    names = (("combine", True), ("mlp", False), ("dispatch", True), ("attention", False))
    return [part(device, layer, Phase.B, n, c) for n, c in names]


def weights(device: Device, layer: str) -> list[Part]:
    return [part(device, layer, Phase.W, n) for n in ("mlp", "attention")]


def mixed(f: list[Part], b: list[Part], w: list[Part]) -> list[tuple[int, Part]]:
    """As the report has it: one computes while the other communicates."""
    return [(1, b[0]), (0, f[0]), (0, f[1]), (1, b[1]), (1, b[2]), (1, w[0]), (0, f[2]), (0, f[3]), (1, b[3]),
            (1, w[1]), (0, f[4])]  # fmt: skip


@pytest.mark.parametrize("serial", [False, True])
def test_each_part_comes_after_what_it_reads(device: Device, serial: bool) -> None:
    lanes = Lanes("cuda", serial=serial)
    cells = []
    for cell in range(2):
        order = []
        for layer in range(2):
            x, y = f"{cell}f{layer}", f"{cell}b{layer}"
            order += mixed(forward(device, x), backward(device, y), weights(device, y))
        lanes.run(str(cell), order)
        cells.append(order)
    titles = [[f"{p.layer} {p.phase.value} {p.name}" for _, p in order] for order in cells]
    for order, names in zip(cells, titles, strict=True):
        last: dict[int, str] = {}
        computed: dict[str, str] = {}
        for (side, p), name in zip(order, names, strict=True):
            before = device.before[name]
            if p.phase is Phase.W:
                assert computed[p.name] in before  # what its B computed there
                continue
            assert last.get(side, name) in {*before, name}
            last[side] = name
            if p.phase is Phase.B and not p.comm:
                computed[p.name] = name
    for name in titles[1]:
        assert set(titles[0]) <= device.before[name], "a cell begins when all of the one before is done"


def test_an_exchange_is_beside_what_the_other_chain_computes(device: Device) -> None:
    order = mixed(forward(device, "x"), backward(device, "y"), weights(device, "y"))
    Lanes("cuda").run("cell", order)
    queued = list(device.before)
    assert queued.index("start x F dispatch") < queued.index("y B mlp") < queued.index("x F dispatch")
    assert "y B mlp" not in device.before["x F dispatch"]
    assert "y B dispatch" not in device.before["y W mlp"] and "y B dispatch" not in device.before["x F mlp"]


def test_further_rounds_run_alone(device: Device) -> None:
    rounds = Further(lambda: True, put(device, "rounds"))
    parts = mixed(forward(device, "x", rounds), backward(device, "y"), weights(device, "y"))
    Lanes("cuda").run("cell", parts)
    queued = list(device.before)
    at = queued.index("rounds")
    assert set(queued[:at]) <= device.before["rounds"]
    assert all("rounds" in device.before[name] for name in queued[at + 1 :])


def test_rounds_that_are_not_needed_stop_nothing(device: Device) -> None:
    parts = mixed(forward(device, "x", Further(lambda: False, put(device, "rounds"))), backward(device, "y"),
                  weights(device, "y"))  # fmt: skip
    Lanes("cuda").run("cell", parts)
    assert "rounds" not in device.before and "y B attention" not in device.before["x F combine"]
