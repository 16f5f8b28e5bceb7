"""Training by many ranks: rank 0 prepares and tells, all make the steps and the checkpoints, and watch each other."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsv3c.comm import division
from dsv3c.console import tell
from dsv3c.errors import Dsv3cError, InputError, WorkError
from dsv3c.files import reason
from dsv3c.runtime.collectives import LostPeerError
from dsv3c.runtime.data import Sampler, TokenFile
from dsv3c.runtime.export import write_hf_together
from dsv3c.runtime.lanes import write_trace
from dsv3c.runtime.loop import Books, Interrupts, Run, Silence, TrainResult
from dsv3c.runtime.peers import GroupPeers, Peers, together
from dsv3c.runtime.ranks import RankSession, cells, connect
from dsv3c.runtime.state import FOLDER, latest_state, load_state, step_of
from dsv3c.runtime.train import DATA, HF, Order, Prepared, open_run, prepared
from dsv3c.runtime.watch import BEAT, SILENCE_AFTER_FAILURE, Place, Watch, awaited, connect_watch
from dsv3c.runtime.world import World
from dsv3c.schedule import Schedule

TRACED_STEPS = 3
"""How many steps a trace shows."""

SAMPLES, SAMPLE_BYTES = 16, 4096
"""How much of each file of a checkpoint ranks compare: its header, and so many pieces of so many bytes."""


def train_together(order: Order) -> TrainResult:
    """`train` for a plan for many ranks, on one of them. When one is lost or fails, the others end their processes."""
    schedule, _ = division(order.plan)
    world = connect(order.plan)
    # Signals are heard until the end: torchrun sends SIGTERM when a rank is lost, and which one is still to be told.
    with Interrupts(quiet=True, patient=False) as interrupts:
        watch = _watching(order, world, schedule)
        try:
            result = _train(order, world, watch, interrupts)
            world.barrier()
            watch.close()
            world.close()
            return result
        except LostPeerError:
            watch.lost()
            raise
        except Dsv3cError as error:
            watch.fail(str(error), error.exit_status)
            raise
        except KeyboardInterrupt:
            watch.lost(SILENCE_AFTER_FAILURE + 2 * BEAT)
            watch.fail("interrupted", 130)
            raise
        except BaseException as error:
            watch.fail(f"rank {world.rank}: {error}", 1)
            raise


def _watching(order: Order, world: World, schedule: Schedule) -> Watch:
    """Watches over this rank and others, as soon as all of them are here."""
    dp = order.plan.job.mesh.dp

    def where(lost: int, places: Mapping[int, Place]) -> str:
        return awaited(schedule, dp, lost, places)

    def advice() -> str:
        try:
            last = latest_state(order.out)
        except Dsv3cError:
            last = None
        if last is None:
            return "There is no checkpoint yet: start again."
        return f"The last checkpoint is of step {step_of(last)}: the same command with --resume goes on from there."

    watch = Watch(world.rank, world.size, connect_watch(), cells(schedule, world.pp_index), where, advice)
    world.barrier()
    watch.begin()
    return watch


def _train(order: Order, world: World, watch: Watch, interrupts: Interrupts) -> TrainResult:
    peers = GroupPeers()
    watch.at(0, -1, "reading the data")
    ready = _prepare_together(order, world)
    init = None if ready.checkpoint is not None else order.init
    if init is not None:
        _compare_weights(init, peers)
    watch.at(0, -1, "making the session")
    session = RankSession(
        order.plan, world, init, order.seed, order.trace is not None, lambda i: watch.at(session.steps + 1, i)
    )
    if ready.checkpoint is not None:
        watch.at(0, -1, "loading the checkpoint")
        load_state(ready.checkpoint, session.weights.state(), peers=peers)
        session.steps = step_of(ready.checkpoint)
    first = world.rank == 0
    if first:
        open_run(order, ready)
    interrupts.patient = True
    session.stop = lambda: interrupts.requested
    run = _RankRun(
        session, ready.sampler, order.recipe, order.steps, order.out, ready.facts, order.spacing, peers, interrupts,
        watch, order.trace is not None,
    )  # fmt: skip
    result = run.go(Books(order.out, session.steps, order.steps, order.tensorboard) if first else Silence())
    if order.trace is not None:
        write_trace(trace_name(order.trace, world.rank), session.lanes.finish(), world.rank)
    if result.interrupted:
        return result
    watch.at(session.steps, -1, "writing the model")
    write_hf_together(order.out / HF, session.config, session.weights, session.family.parts, ready.words, peers)
    return dataclasses.replace(result, hf=str(order.out / HF))


def trace_name(path: Path, rank: int) -> Path:
    """`trace.json` of rank 3 is `trace.rank3.json`."""
    return path.with_name(f"{path.stem}.rank{rank}{path.suffix or '.json'}")


def _prepare_together(order: Order, world: World) -> Prepared:
    """Rank 0 prepares the run, however long that takes; the others then read the token file that it made."""
    store = world.store
    assert store is not None
    if world.rank == 0:
        ready = prepared(order)
        checkpoint = None if ready.checkpoint is None else ready.checkpoint.name
        store.set("prepared", json.dumps([ready.tokens.path.name, checkpoint, dict(ready.facts)]))
        return ready
    while not store.check(["prepared"]):  # if rank 0 fails or is lost, watching ends this process
        time.sleep(0.05)
    tokens_name, checkpoint, facts = json.loads(store.get("prepared"))
    try:
        tokens = TokenFile.open(order.out / DATA / tokens_name)
    except InputError as error:
        raise InputError(f"rank {world.rank}: {error} Rank 0 made it: all ranks must see --out {order.out}.") from None
    sampler = Sampler(tokens, order.plan.job.seq, order.plan.job.global_batch, order.seed)
    folder = None if checkpoint is None else order.out / FOLDER / checkpoint
    return Prepared(folder, None, tokens, sampler, facts)


def _compare_weights(directory: Path, peers: Peers) -> None:
    """Raises InputError, on every rank, if some rank sees another checkpoint in `directory` than rank 0 does."""
    digests = together(peers, lambda: weights_digest(directory))
    for rank, digest in enumerate(digests):
        if digest != digests[0]:
            raise InputError(
                f"--init: rank {rank} has other weights in {directory} than rank 0; give every rank the same checkpoint"
            )


def weights_digest(directory: Path) -> str:
    """A hash of names, sizes and headers of a checkpoint's tensor files and of samples of what is in them."""
    digest = hashlib.sha256()
    try:
        for path in sorted(directory.glob("*.safetensors")):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                digest.update(file.read(min(header, size)))
                for i in range(SAMPLES):
                    file.seek(8 + header + max(0, size - 8 - header - SAMPLE_BYTES) * i // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise WorkError(f"{directory}: cannot be read: {reason(error)}") from None
    return digest.hexdigest()


@dataclass
class _RankRun(Run):
    """The loop on one of many ranks: they stop together, and each says where it is."""

    watch: Watch | None = None
    trace: bool = False

    def stopping(self, interrupts: Interrupts) -> bool:
        session = self._session
        if self.trace:
            session.lanes.keep(TRACED_STEPS - 1)
        if session.stopping and self.peers.rank == 0:
            tell("stopping after this step")
        return session.stopping

    def save(self) -> int:
        assert self.watch is not None
        self.watch.at(self.session.steps, -1, "saving the checkpoint")
        return super().save()

    @property
    def _session(self) -> RankSession:
        assert isinstance(self.session, RankSession)
        return self.session


__all__ = ["train_together", "weights_digest"]
