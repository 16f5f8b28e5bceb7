"""The ranks of a run: who this process is, its process groups and pipeline channels, and what all ranks must share.

Rank numbers: rank = pp_index·dp + dp_index, ep_index = dp_index mod ep, node = rank div ranks_per_node. The ranks of
one expert group lie side by side. Its nodes are blocks of `gcd(ep, ranks_per_node)` ranks: those that surely share a
machine.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from dsv3c.errors import InputError, WorkError
from dsv3c.job import Mesh
from dsv3c.runtime.collectives import CHANNELS, Channel, Group, LostPeerError, swap

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

START_SECONDS = 120.0
"""How long the ranks wait for each other at the start."""

SILENCE_SECONDS = 600.0
"""How long one transfer may take before its peer counts as lost."""

CHANNEL_CTAS = 2
"""SMs that a message between stages takes on NCCL, also while its receiver only waits for it. It has a whole cell to
arrive in, and computation should keep the others."""

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def ranks_of_node(ep: int, ranks_per_node: int) -> int:
    """How many ranks of one expert group lie on one node; the canonical order of rows depends on it."""
    return math.gcd(ep, ranks_per_node)


def started() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def code_digest() -> str:
    """A hash of the compiler's own sources: ranks that run different ones would disagree about a plan."""
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1]
    for folder, inner, files in os.walk(package, followlinks=True):
        inner.sort()
        for name in sorted(n for n in files if n.endswith(".py")):
            path = Path(folder, name)
            digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@dataclass
class World:
    """This rank among the ranks of `mesh`. Make one with `connect` (torchrun) or `local` (one process).

    Process groups are made when first asked for, in the same order on all ranks. `ctas` limits the SMs of NCCL's
    exchanges among experts, which run beside computation.
    """

    rank: int
    mesh: Mesh
    ranks_per_node: int
    device: torch.device
    store: Store | None = None
    timeout: float = SILENCE_SECONDS
    ctas: int | None = None
    _groups: dict[tuple[str, tuple[int, ...]], Group] = field(default_factory=dict)

    # ---- coordinates -----------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return self.mesh.world

    @property
    def pp_index(self) -> int:
        return self.rank // self.mesh.dp

    @property
    def dp_index(self) -> int:
        return self.rank % self.mesh.dp

    @property
    def ep_index(self) -> int:
        return self.dp_index % self.mesh.ep

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node

    @property
    def local_ranks(self) -> int:
        """How many ranks of this rank's expert group lie on its node."""
        return ranks_of_node(self.mesh.ep, self.ranks_per_node)

    @property
    def backend(self) -> str:
        return "nccl" if self.device.type == "cuda" else "gloo"

    def rank_at(self, pp_index: int, dp_index: int) -> int:
        return pp_index * self.mesh.dp + dp_index

    # ---- groups ----------------------------------------------------------------------------------------------------

    @property
    def experts(self) -> Group:
        """The ranks that share the experts of a layer, in order of ep_index."""
        first = self.rank - self.ep_index
        return self.group(tuple(range(first, first + self.mesh.ep)), "experts", self.ctas)

    @property
    def within_node(self) -> Group:
        """The ranks of the expert group on this rank's node: the second hop."""
        first = self.rank - self.ep_index % self.local_ranks
        return self.group(tuple(range(first, first + self.local_ranks)), "within", self.ctas)

    @property
    def across_nodes(self) -> Group:
        """The ranks of the expert group at this rank's place on each node: the first hop."""
        first = self.rank - self.ep_index + self.ep_index % self.local_ranks
        last = self.rank - self.ep_index + self.mesh.ep
        return self.group(tuple(range(first, last, self.local_ranks)), "across", self.ctas)

    def channel(self, name: str) -> Channel:
        """The pipeline channel `name` (one of CHANNELS) of this rank: to the stages before and after its own."""
        pairs = {}
        for low in range(self.mesh.pp - 1):
            ranks = (self.rank_at(low, self.dp_index), self.rank_at(low + 1, self.dp_index))
            group = self.group(ranks, f"channel.{name}", CHANNEL_CTAS)
            if self.rank in ranks:
                pairs[2 * low + 1 - self.pp_index] = group
        return Channel(name, pairs)

    def group(self, ranks: tuple[int, ...], kind: str = "reduce", ctas: int | None = None) -> Group:
        """The process group of `ranks` (ascending); one for each `kind`.

        All ranks ask for as many groups as large, in the same order, also for those that they are not in: torch names
        a group after its ranks and how many there are on each of them. On NCCL all connections are made at once, so
        that no later transfer waits for that.
        """
        key = (kind, ranks)
        if key not in self._groups:
            self._groups[key] = self._make(ranks, ctas)
        return self._groups[key]

    def _make(self, ranks: tuple[int, ...], ctas: int | None) -> Group:
        if len(ranks) == 1:
            return Group(ranks, 0, None)
        if self.rank not in ranks:
            dist.new_group([self.rank], backend="gloo", use_local_synchronization=True)
            return Group(ranks, -1, None)
        index = ranks.index(self.rank)
        silence = datetime.timedelta(seconds=self.timeout)
        if self.backend == "gloo":
            made = dist.new_group(ranks, timeout=silence, backend="gloo", use_local_synchronization=True)
            return Group(ranks, index, made)
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        if ctas is not None:
            options.config.max_ctas = ctas
        made = dist.new_group(
            ranks, timeout=silence, backend="nccl", pg_options=options, use_local_synchronization=True
        )
        group = Group(ranks, index, made, ordered=True)
        dist.all_reduce(torch.zeros(1, device=self.device), group=made)
        # The first message of a pair blocks the host until both sides have begun it: here they do.
        sent, got = (torch.zeros(len(ranks), 1, device=self.device) for _ in range(2))
        swap(group, [[t] for t in sent], [[t] for t in got]).wait()
        torch.cuda.synchronize(self.device)
        return group

    def barrier(self) -> None:
        """Wait until every rank is here. Raises WorkError if one is lost."""
        if self.size == 1:
            return
        try:
            dist.barrier()
        except RuntimeError as error:
            raise self._lost(error) from error

    def share(self, text: str) -> list[str]:
        """What every rank gave, in order of ranks; all call it. Raises WorkError if one is lost."""
        if self.size == 1:
            return [text]
        own = text.encode()
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(own)]))
            room = max(int(n) for n in sizes)
            texts = [torch.zeros(room, dtype=torch.uint8) for _ in range(self.size)]
            dist.all_gather(texts, torch.tensor(list(own.ljust(room, b"\0")), dtype=torch.uint8))
        except RuntimeError as error:
            raise self._lost(error) from error
        return [bytes(t[: int(n)].tolist()).decode() for t, n in zip(texts, sizes, strict=True)]

    def _lost(self, error: RuntimeError) -> LostPeerError:
        return LostPeerError(f"a rank stopped while rank {self.rank} waited for all: {_first_line(error)}")

    # ---- begin and end ---------------------------------------------------------------------------------------------

    @classmethod
    def local(cls, device: str | torch.device = "cpu") -> World:
        """One process that is the whole mesh."""
        return cls(0, Mesh(), 1, torch.device(device))

    @classmethod
    def connect(cls, mesh: Mesh, ranks_per_node: int, device: str, plan: str, *, timeout: float = SILENCE_SECONDS,
                ctas: int | None = None, code: str | None = None,
                environment: Mapping[str, str] = os.environ) -> World:  # fmt: skip
        """Join the other ranks that torchrun started.

        `device`: cpu (gloo) or cuda (NCCL; the GPU is the one of LOCAL_RANK). `plan`: a hash of the plan; `code`: a
        hash of the sources, by default of those that run: both must be the same on every rank. Makes the groups that
        every run needs. Raises InputError, on every rank, if the ranks do not fit the mesh or each other; WorkError if
        a rank does not come.
        """
        rank, size, local = _place(mesh, environment)
        _check_mesh(mesh, size)
        where = torch.device("cpu")
        if device.startswith("cuda"):
            if local >= torch.cuda.device_count():
                raise InputError(
                    f"rank {rank} is process {local} of its machine, which has {torch.cuda.device_count()} GPUs; "
                    "start as many processes as there are GPUs"
                )
            where = torch.device("cuda", local)
            torch.cuda.set_device(where)
        start = datetime.timedelta(seconds=START_SECONDS)
        try:
            store: Store = next(iter(rendezvous("env://", rank, size, timeout=start)))[0]
        except (RuntimeError, ValueError) as error:
            master = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
            raise WorkError(f"rank {rank} cannot reach {master}: {_first_line(error)}") from error
        store = PrefixStore("dsv3c", store)
        _agree(store, rank, size, plan, code or code_digest())
        silence = datetime.timedelta(seconds=timeout)
        try:
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=silence)
        except RuntimeError as error:
            raise WorkError(f"rank {rank} cannot connect to the other ranks: {_first_line(error)}") from error
        world = cls(rank, mesh, ranks_per_node, where, store, timeout, ctas)
        _ = world.experts
        if 1 < world.local_ranks < mesh.ep:
            _ = world.within_node, world.across_nodes
        for name in CHANNELS:
            world.channel(name)
        return world

    def close(self, clean: bool = True) -> None:
        """Leave; with `clean` when all ranks have come here. Does nothing a second time."""
        self._groups.clear()
        if self.store is None:
            return
        self.store = None
        if clean:
            try:
                dist.barrier()
            finally:
                dist.destroy_process_group()
        elif self.backend == "nccl":  # transfers that never end would keep destroy waiting
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self.close(clean=kind is None)

    def fail(self, message: str) -> None:
        """Tell all ranks why this one stops; the first message stays."""
        if self.store is not None:
            self.store.compare_set("failure", "", message)

    def failure(self) -> str | None:
        """What `fail` said first on any rank, if anything; does not wait."""
        if self.store is None or not self.store.check(["failure"]):
            return None
        return bytes(self.store.get("failure")).decode()


def _place(mesh: Mesh, environment: Mapping[str, str]) -> tuple[int, int, int]:
    """Rank, number of ranks, and number on this machine."""
    missing = [name for name in _VARIABLES if name not in environment]
    if missing:
        raise InputError(
            f"this plan is for {mesh.world} ranks ({mesh}), which train together, and {missing[0]} is not set; "
            f"start it with torchrun --nproc-per-node {mesh.world} -m dsv3c train ..., or so your own script"
        )
    try:
        rank, size, local = (int(environment[name]) for name in _VARIABLES[:3])
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE or LOCAL_RANK is not a number: {error}; start with torchrun") from error
    return rank, size, local


def _check_mesh(mesh: Mesh, size: int) -> None:
    if mesh.tp > 1:
        raise InputError(f"the mesh {mesh} divides tensors over tp={mesh.tp} ranks, which training does not; use tp=1")
    if size != mesh.world:
        raise InputError(
            f"the plan is for {mesh.world} ranks ({mesh}) and {size} were started; start {mesh.world}, "
            "or compile with a --mesh that fits"
        )


def _agree(store: Store, rank: int, size: int, plan: str, code: str) -> None:
    """Rank 0 compares what every rank is to run; all ranks get its verdict."""
    store.set(f"identity/{rank}", f"{plan} {code}")
    if rank == 0:
        store.set("verdict", _verdict(store, size, plan, code))
    verdict = _await(store, "verdict", 2 * START_SECONDS)
    if verdict is None:
        raise WorkError(f"rank {rank} waited {2 * START_SECONDS:.0f} s for rank 0, which gave no word; is it running?")
    store.add("read", 1)
    if verdict.decode() != "agreed":
        if rank == 0:  # this process may hold the store: it stays until the others have read
            _count(store, "read", size)
        raise (WorkError if "did not start" in verdict.decode() else InputError)(verdict.decode())


def _verdict(store: Store, size: int, plan: str, code: str) -> str:
    for other in range(1, size):
        said = _await(store, f"identity/{other}", START_SECONDS)
        if said is None:
            return f"rank {other} did not start within {START_SECONDS:.0f} s"
        its_plan, its_code = said.decode().split(" ")
        if its_code != code:
            return f"rank {other} runs another version of dsv3c than rank 0; install the same one everywhere"
        if its_plan != plan:
            return f"rank {other} has another plan than rank 0; give every rank the same file"
    return "agreed"


def _await(store: Store, key: str, seconds: float) -> bytes | None:
    """The value of `key`, or None if it does not come in time."""
    try:
        store.wait([key], datetime.timedelta(seconds=seconds))
    except RuntimeError:
        return None
    return bytes(store.get(key))


def _count(store: Store, key: str, size: int) -> None:
    """Wait until `size` ranks have added to `key`, a few seconds at most."""
    deadline = time.monotonic() + 5
    while store.add(key, 0) < size and time.monotonic() < deadline:
        time.sleep(0.02)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
