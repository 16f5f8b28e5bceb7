"""Real processes exchange rows, shards and messages, and get what the ops mean, to the bit."""

from __future__ import annotations

import json
import multiprocessing
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rank_cases import CASES, work

from dsv3c.errors import InputError
from dsv3c.job import Mesh, parse_mesh
from dsv3c.runtime.world import World, code_digest, ranks_of_node

Results = list[dict[str, str]]


def started(size: int, device: str, folder: Path) -> Results:
    """What every case gave on each of `size` processes, one expert group of which two are a node."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    arguments = [(rank, size, port, device, f"ep={size}", folder) for rank in range(size)]
    processes = [context.Process(target=work, args=a, daemon=True) for a in arguments]
    for p in processes:
        p.start()
    for p in processes:
        p.join(150)
    for p in processes:
        p.kill()
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[Path, Results]]:
    folder = tmp_path_factory.mktemp("ranks")
    found = started(4, "cpu", folder)
    return lambda: (folder, found)


@pytest.mark.parametrize("name", CASES)
def test_four_processes(name: str, on_cpu: Callable[[], tuple[Path, Results]]) -> None:
    _, found = on_cpu()
    assert len(found) == 4
    assert [result[name] for result in found] == [""] * 4


def test_a_lost_rank_is_noticed(on_cpu: Callable[[], tuple[Path, Results]]) -> None:
    folder, _ = on_cpu()
    assert sorted(f.name for f in folder.glob("*.lost")) == ["0.lost", "1.lost", "2.lost"]


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_gpus(size: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    found = started(size, "cuda", tmp_path)
    assert len(found) == size
    assert [text for result in found for text in result.values() if text] == []


STARTED = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("mesh", "environment", "sentence"),
    [
        ("pp=2,dp=2,ep=2", {}, "for 4 ranks .* RANK is not set; start it with torchrun --nproc-per-node 4"),
        ("pp=2,dp=2,ep=2", STARTED, "for 4 ranks .* and 2 were started; start 4, or compile"),
        ("dp=2", STARTED | {"RANK": "first"}, "RANK, WORLD_SIZE or LOCAL_RANK is not a number"),
        ("tp=2", STARTED, "tp=2 ranks, which training does not"),
    ],
)
def test_a_start_that_cannot_work_is_refused(mesh: str, environment: dict[str, str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        World.connect(parse_mesh(mesh), 8, "cpu", "plan", environment=environment)


def test_coordinates() -> None:
    mesh, device = Mesh(pp=2, dp=8, ep=4), torch.device("cpu")
    world = World(13, mesh, 2, device)
    assert (world.pp_index, world.dp_index, world.ep_index, world.node, world.local_ranks) == (1, 5, 1, 6, 2)
    assert world.rank_at(1, 5) == 13
    assert World.local().group((0,)).handle is None
    assert [ranks_of_node(*n) for n in ((4, 8), (64, 8), (8, 8), (4, 6), (6, 4))] == [4, 8, 8, 2, 2]


def test_alone_everything_is_a_copy() -> None:
    with World.local() as world:
        assert world.share("text") == ["text"] and world.failure() is None
        world.barrier()
        assert world.experts.ranks == (0,) and not world.channel("f0").pairs


def test_the_digest_of_the_sources_is_stable() -> None:
    assert code_digest() == code_digest() and len(code_digest()) == 64
