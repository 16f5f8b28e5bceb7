"""What executing on Hopper holds beside the program's tensors is part of the prediction."""

from __future__ import annotations

import dsv3c
from dsv3c.build import Builder
from dsv3c.ir import DType, Graph, Node, Type
from dsv3c.ops import REGISTRY
from dsv3c.targets import find
from dsv3c.targets._cuda_memory import LIBRARIES, SEGMENT, _Pool, _Rooms, reserved_bytes

BF16, MIB = DType.bf16, 2**20


def attention(heads: int) -> Graph:
    b = Builder(REGISTRY, "core")
    q, k = (b.input(n, Type(BF16, (1, 4096, heads, 192))) for n in "qk")
    v = b.input("v", Type(BF16, (1, 4096, heads, 128)))
    return b.graph(b.attention(q, k, v, scale=0.1))


def test_tensors_that_libraries_return_are_counted_once_for_all_calls() -> None:
    nodes: list[tuple[Node, dict[str, int]]] = [(n, {}) for n in attention(16).nodes]
    once = reserved_bytes(nodes, "auto")
    result = 4096 * 16 * 128 * 2
    assert 0 <= once - LIBRARIES - result <= SEGMENT
    assert reserved_bytes(nodes * 3, "auto") == once
    larger: list[tuple[Node, dict[str, int]]] = [(n, {}) for n in attention(32).nodes]
    assert reserved_bytes(larger + nodes, "auto") - LIBRARIES <= 2 * result + SEGMENT


def test_free_blocks_are_split_and_a_larger_one_takes_a_new_segment() -> None:
    pool = _Pool()
    pool.use([10 * MIB])
    pool.use([4 * MIB, 4 * MIB])
    assert pool.size == 10 * MIB
    pool.use([4 * MIB, 8 * MIB])
    assert pool.size == 18 * MIB
    pool.use([7 * MIB, 9 * MIB])
    assert pool.size == 18 * MIB


def test_scratch_of_a_slot_is_shared_where_it_is_large_enough() -> None:
    rooms = _Rooms()
    for slot, size in ((0, 4 * MIB), (0, 3 * MIB), (1, 2 * MIB), (0, 6 * MIB)):
        rooms.take(slot, size)
    assert rooms.size == 12 * MIB


def test_a_plan_for_a_gpu_counts_it_and_one_for_the_cpu_does_not() -> None:
    kinds = {}
    for target in ("h100", "cpu"):
        plan = dsv3c.compile("deepseek-v3-tiny", target=target, precision="bf16", seq=64, kernels="none")
        kinds[target] = dict(plan.memory.by_kind)["activations"]
    assert find("cpu").reserve is None
    assert kinds["h100"] - LIBRARIES > 0
    assert kinds["cpu"] < LIBRARIES
