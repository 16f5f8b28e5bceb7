"""Fair timing and a lasting record: contestants take turns in one process; every row names its peer and machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

Contestant = Callable[[], float | None]
RESULTS = Path(__file__).parent / "results.jsonl"
PACKAGES = ("torch", "triton", "apache-tvm", "transformers")


@dataclass(frozen=True, slots=True)
class Result:
    """One row of results.jsonl; `ratio` is how many times better than `peer`, measured in the same run."""

    name: str
    value: float
    unit: str
    ratio: float | None
    peer: str | None
    device: str
    versions: Mapping[str, str]
    commit: str
    date: str
    load: float  # share of the cores that other processes kept busy while measuring; above 0.1 the row is rough


def compare_in_turns(contestants: Mapping[str, Contestant], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each contestant.

    They run alternately in the same process, every round in another order, so that drift of the machine hits all of
    them. A contestant that returns a float has timed itself (seconds); otherwise the wall clock around the call counts.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(warmup):
        for name in names:
            contestants[name]()
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(_seconds(contestants[name]))
    return {name: statistics.median(times) for name, times in samples.items()}


def record(
    name: str,
    value: float,
    unit: str,
    *,
    ratio: float | None = None,
    peer: str | None = None,
    load: float,
    path: Path = RESULTS,
) -> Result:
    """Prints a row and appends it to results.jsonl."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    result = Result(name, value, unit, ratio, peer, device_name(), versions(), commit(), now, round(load, 3))
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)) + "\n")
    beside = "" if ratio is None else f"   {ratio:.2f}x {peer}"
    print(f"{name:<58}{value:>10.3f} {unit}{beside}", flush=True)
    return result


def report(
    prefix: str, seconds: Mapping[str, float], unit: str, scale: float, *, load: float, ours: str | None = None
) -> None:
    """Records every contestant in `unit` (seconds times scale); with `ours`, its ratio to each peer as well."""
    if load > 0.1:
        print(f"other processes used {load:.0%} of the cores: these figures are rough", flush=True)
    for name, value in seconds.items():
        if name != ours:
            record(f"{prefix}/{name}", value * scale, unit, load=load)
    if ours is not None and ours in seconds:
        for peer, value in seconds.items():
            if peer != ours:
                ratio = value / seconds[ours]
                record(f"{prefix}/{ours}", seconds[ours] * scale, unit, ratio=ratio, peer=peer, load=load)


class ForeignLoad:
    """Share of this machine's cores, 0 to 1, that other processes kept busy since this was made (Linux; else 0)."""

    def __init__(self) -> None:
        self.start = self._now()

    def share(self) -> float:
        busy, own, total = (b - a for a, b in zip(self.start, self._now(), strict=True))
        return min(max((busy - own) / total, 0.0), 1.0) if total > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        stat = Path("/proc/stat")
        if not stat.exists():
            return 0.0, own, 0.0
        ticks = [int(x) for x in stat.read_text().splitlines()[0].split()[1:9]]
        total = sum(ticks) / os.sysconf("SC_CLK_TCK")
        idle = (ticks[3] + ticks[4]) / os.sysconf("SC_CLK_TCK")
        return total - idle, own, total


def device_name() -> str:
    """The processor with its core count and matrix units, or the GPU."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    model, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields: dict[str, str] = {}
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            fields[key.strip()] = value.strip()
        model, flags = fields.get("model name", model), fields.get("flags", "")
    units = [unit for unit in ("avx512f", "avx512_bf16", "amx_bf16") if unit in flags.split()]
    return f"{model}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads" + (
        f", {' '.join(units)}" if units else ""
    )


def versions() -> dict[str, str]:
    """Installed versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit measured, with a plus if tracked files differ from it; 'unknown' outside a repository."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        # The record itself changes with every run and is not what is measured.
        status = ["git", "status", "--porcelain", "-uno", "--", ":/", ":(exclude)results.jsonl"]
        changed = subprocess.run(status, cwd=here, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed.strip() else "")


def _seconds(contestant: Contestant) -> float:
    start = time.perf_counter()
    own = contestant()
    return time.perf_counter() - start if own is None else own
