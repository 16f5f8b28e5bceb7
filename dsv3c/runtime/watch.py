"""Ranks that watch each other: when one dies or hangs, all others stop soon and one of them says which and where.

A transfer with a lost rank may block for good, so watching has a thread and a connection of its own. Every rank writes
down where it is every BEAT seconds. Rank 0 reads what all wrote, the others what rank 0 wrote.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from torch.distributed.distributed_c10d import PrefixStore

from dsv3c.runtime.collectives import Pending
from dsv3c.schedule import Action, Schedule, show_cell

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT = 1.0
"""Seconds between two signs of life."""

SILENCE = 20.0
"""Seconds without one after which a rank is lost."""

SILENCE_AFTER_FAILURE = 6.0
"""The same, once a transfer failed somewhere."""

PATIENCE, TIMES_LONGEST = 45.0, 5.0
"""Seconds for which a rank may stand still while others wait for it, or so many times the longest time that any place
took in a whole step before, if that is more. In the first step, and outside of steps, it may do so for ever."""

CONNECT = 20.0
"""Seconds that the connection may take."""

STATUS = 1


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is: `step`, from 1; `cell` of its row of the schedule, or behind that what ends a step, or -1
    outside of steps; the cell in words in `text`.

    `still`: seconds for which it has been there; `limit`: how many it may, 0 for any number. `waits`: it waits for
    another rank. `broken`: a transfer of it failed.
    """

    step: int = 0
    cell: int = -1
    text: str = "the start"
    still: float = 0.0
    limit: float = 0.0
    waits: bool = False
    broken: bool = False


def sentence(lost: int, place: Place, places: Mapping[int, Place], where: str, silent: bool) -> str:
    """What to tell of a rank that is lost; `where`: the action that the others wait for, or ''."""
    step = max([place.step, *(p.step for p in places.values())])
    at = where or place.text
    how = "stands still" if not silent else "stopped" if any(p.broken for p in places.values()) else "does not answer"
    return f"rank {lost} {how} at step {step} in {at}, so all ranks stop"


def awaited(schedule: Schedule, dp: int, lost: int, places: Mapping[int, Place]) -> str:
    """What rank `lost` was to do that others wait for, or '' if none is known: the cell of its row whose values a
    neighbour in the pipeline waits for, else where the ranks of its own position in the pipeline are."""
    step = max((p.step for p in places.values()), default=0)
    inside = {r: p for r, p in sorted(places.items()) if p.step == step and r != lost}
    row = schedule.rows[lost // dp]
    found = -1
    for rank, place in inside.items():
        theirs = schedule.rows[rank // dp]
        if rank % dp != lost % dp or not 0 <= place.cell < len(theirs):
            continue
        for before, micro_batch, kinds in filter(None, (_before(schedule, a) for a in theirs[place.cell])):
            for index, cell in enumerate(row):
                if any(a.stage == before and a.micro_batch == micro_batch and a.kind in kinds for a in cell):
                    found = max(found, index)
    if found >= 0:
        return show_cell(row[found])
    return next((p.text for r, p in inside.items() if r // dp == lost // dp), "")


def _before(schedule: Schedule, action: Action) -> tuple[int, int, str] | None:
    """The stage, micro-batch and possible kinds of the action whose values `action` receives."""
    if action.kind == "F" and action.stage > 0:
        return action.stage - 1, action.micro_batch, "F"
    if action.kind in "IB" and action.stage + 1 < schedule.stages:
        return action.stage + 1, action.micro_batch, "IB"
    return None


class Watch:
    """This rank's watching. Make it when all ranks are connected; `begin` when all have made theirs.

    `cells`: the words for each cell of this rank. `where(lost, places)`: the action that others wait for.
    `advice()`: what to do then, for the end of the sentence. `leave`: how the process ends.
    """

    def __init__(self, rank: int, size: int, store: Store, cells: Sequence[str],
                 where: Callable[[int, Mapping[int, Place]], str], advice: Callable[[], str],
                 leave: Callable[[int], None] = os._exit) -> None:  # fmt: skip
        self.rank, self.size = rank, size
        self._store, self._cells, self._where, self._advice, self._leave = store, cells, where, advice, leave
        self._main = threading.main_thread().ident
        self._place = Place()
        self._since = time.monotonic()
        self._longest, self._steps = 0.0, 0
        self._broken = False
        self._ended = threading.Event()
        self._heard: dict[int, tuple[int, float]] = {}
        self._known: dict[int, Place] = {}
        self._beats = 0
        self._beat()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    # ---- the rank that is watched ----------------------------------------------------------------------------------

    def at(self, step: int, cell: int, text: str = "") -> None:
        """This rank begins `cell` of `step`; with cell -1 what `text` says, which may take any time."""
        now = time.monotonic()
        if self._place.cell >= 0 or cell >= 0:
            self._longest = max(self._longest, now - self._since)
        if step != self._place.step:
            self._steps += 1
        # In the first step of a process kernels are built and memory is touched for the first time.
        limit = max(PATIENCE, TIMES_LONGEST * self._longest) if self._steps > 1 and cell >= 0 else 0.0
        self._place, self._since = Place(step, cell, text or self._cells[cell], limit=limit), now

    def begin(self) -> None:
        """Watch from now on."""
        self._thread.start()

    def close(self) -> None:
        """All ranks are done: nobody is missed any more."""
        self._ended.set()

    def fail(self, message: str, status: int) -> None:
        """This rank stops because of an error that it tells itself: the others stop quietly."""
        self.close()
        with contextlib.suppress(RuntimeError):
            self._store.compare_set("verdict", "", json.dumps([message, status, True]))
            self._store.add("known", 1)
            if self.rank == 0:  # it may hold the store
                deadline = time.monotonic() + 2 * BEAT + 1
                while self._store.add("known", 0) < self.size and time.monotonic() < deadline:
                    time.sleep(0.05)

    def lost(self, seconds: float = SILENCE + 5 * BEAT) -> None:
        """A transfer of this rank failed: wait until it is known which rank is gone, which ends this process.

        Returns if that does not become known in time.
        """
        self._broken = True
        self._ended.wait(seconds)
        self.close()

    # ---- the thread ------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                self._beat()
                if self._store.check(["verdict"]):
                    self._obey(json.loads(self._store.get("verdict")))
                    return
                self._look()
            except RuntimeError:
                if not self._ended.wait(BEAT):
                    self._without_store()
                return

    def _beat(self) -> None:
        self._beats += 1
        self._known[self.rank] = self._now()
        self._store.set(f"beat/{self.rank}", json.dumps([self._beats, asdict(self._known[self.rank])]))

    def _now(self) -> Place:
        place, still = self._place, time.monotonic() - self._since
        return Place(place.step, place.cell, place.text, still, place.limit, self._waits(), self._broken)

    def _waits(self) -> bool:
        """Whether the main thread is inside a transfer."""
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None:
            if frame.f_code is Pending.wait.__code__ or frame.f_globals.get("__name__", "").startswith("torch.distrib"):
                return True
            frame = frame.f_back
        return False

    def _read(self, ranks: Sequence[int]) -> None:
        now = time.monotonic()
        for rank, text in zip(ranks, self._store.multi_get([f"beat/{r}" for r in ranks]), strict=True):
            count, place = json.loads(text)
            self._known[rank] = Place(**place)
            if rank not in self._heard or self._heard[rank][0] != count:
                self._heard[rank] = count, now

    def _look(self) -> None:
        others = [r for r in range(self.size) if r != self.rank] if self.rank == 0 else [0]
        self._read(others)
        now = time.monotonic()
        broken = any(p.broken for p in self._known.values())
        silence = SILENCE_AFTER_FAILURE if broken else SILENCE
        silent = [r for r in others if now - self._heard[r][1] > silence]
        if silent:
            self._read([r for r in range(self.size) if r != self.rank])
            self._judge(silent[0], True)
        elif self.rank == 0:
            still = standing_still(self._known)
            if still is not None:
                self._judge(still, False)

    def _judge(self, lost: int, silent: bool) -> None:
        places = {r: p for r, p in self._known.items() if r != lost}
        text = sentence(lost, self._known[lost], places, self._where(lost, places), silent)
        self._store.compare_set("verdict", "", json.dumps([text, STATUS, False]))

    def _without_store(self) -> None:
        """The connection is gone, so rank 0 is, or the machine that it runs on; rank 1 tells."""
        place = self._known.get(0, Place())
        places = {r: p for r, p in self._known.items() if r != 0}
        if self.rank == 1:
            self._tell(sentence(0, place, places, self._where(0, places), True))
        self._end(STATUS)

    def _obey(self, verdict: tuple[str, int, bool]) -> None:
        text, status, told = verdict
        with contextlib.suppress(RuntimeError):
            if not told and self._store.add("told", 1) == 1:
                self._tell(text)
            self._store.add("known", 1)
        self._end(status)

    def _tell(self, text: str) -> None:
        print(f"dsv3c: {text}. {self._advice()}", file=sys.stderr, flush=True)

    def _end(self, status: int) -> None:
        if self.rank == 0:  # it may hold the store: the others read the verdict first
            with contextlib.suppress(RuntimeError):
                deadline = time.monotonic() + 2 * BEAT + 1
                while self._store.add("known", 0) < self.size - 1 and time.monotonic() < deadline:
                    time.sleep(0.05)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        self._leave(status)


def standing_still(places: Mapping[int, Place]) -> int | None:
    """The rank for which all others wait too long, if there is one: it is in no transfer itself, or no rank goes on."""
    busy = [r for r, p in sorted(places.items()) if not p.waits]
    candidates = busy or sorted(places)
    if len(busy) == len(places) or any(not p.limit or p.still <= p.limit for p in places.values()):
        return None
    return min(candidates, key=lambda r: (places[r].step, -places[r].still))


def connect_watch(environment: Mapping[str, str] = os.environ, seconds: float = CONNECT) -> Store:
    """A connection of its own to the store of the ranks. Raises RuntimeError if there is none."""
    from torch._C._distributed_c10d import TCPStore

    store = TCPStore(
        environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=False, wait_for_workers=False,
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    return PrefixStore("dsv3c.watch", store)


def first_to_say(message: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether no other rank said the same before; True also if that cannot be found out, and on a single rank."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or environment.get("WORLD_SIZE", "1") == "1":
        return True
    try:
        with socket.create_connection((environment["MASTER_ADDR"], int(environment["MASTER_PORT"])), 1.0):
            pass
        said = connect_watch(environment, 2.0).add(f"said/{hashlib.sha256(message.encode()).hexdigest()}", 1)
    except (RuntimeError, KeyError, ValueError, OSError):
        return True
    return said == 1


__all__ = ["Place", "Watch", "awaited", "connect_watch", "first_to_say"]
