"""Several ranks on one machine for tests: processes forked from one that has everything imported."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

T = TypeVar("T")

SECONDS = 240.0
"""How long all ranks together may take before they count as hung."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _rank(function: Callable[..., object], rank: int, size: int, port: int, arguments: tuple[object, ...],
          answer: Connection) -> None:  # fmt: skip
    import torch

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    try:
        answer.send((True, function(*arguments)))
    except BaseException:
        answer.send((False, traceback.format_exc()))


def run(size: int, function: Callable[..., T], *arguments: object) -> list[T]:
    """What `function(*arguments)` returns on each of `size` ranks, with the environment that torchrun gives.

    `function` lies at the top of a module. Fails with the first rank's traceback if one raises.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dsv3c", "dsv3c.runtime.ranks"])
    port = free_port()
    ranks = []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(function, rank, size, port, arguments, there), daemon=True)
        process.start()
        there.close()
        ranks.append((process, here))
    found: list[T] = []
    failures = []
    for rank, (_, here) in enumerate(ranks):
        answer: tuple[bool, Any] = False, "no answer in time"
        try:
            if here.poll(SECONDS):
                answer = here.recv()
        except EOFError:
            answer = False, "the process ended without an answer"
        good, value = answer
        if good:
            found.append(value)
        else:
            failures.append(f"rank {rank}: {value}")
    for process, _ in ranks:
        process.join(10)
        process.kill()
    assert not failures, "\n".join(failures)
    return found
