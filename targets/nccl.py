"""The communication of a plan for NCCL (or gloo): groups, messages with their bytes in order, rows among experts,
reductions, room and SMs; proven to fit together before anything runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from dsv3c.capacity import capacity, exchange_room
from dsv3c.comm import (
    CommPlan,
    Crossing,
    GroupFormula,
    Named,
    Reduction,
    RowExchange,
    check,
    transfers_of,
)
from dsv3c.costs import Times, Traffic, local_ranks
from dsv3c.interleave import Overlap
from dsv3c.ir import Graph, Node, Program
from dsv3c.job import LANE, Job, Mesh
from dsv3c.layout import flat_groups, shard_count
from dsv3c.op import Registry
from dsv3c.schedule import Schedule
from dsv3c.segments import segments
from dsv3c.stages import borders, value_types
from dsv3c.target import Machine


def plan_communication(program: Program, registry: Registry, schedule: Schedule, job: Job, machine: Machine,
                       overlap: Overlap | None = None) -> CommPlan:  # fmt: skip
    """Everything that the ranks of a partitioned training program say to each other.

    Rows go in two hops where the ranks that share experts lie on several nodes, several on each. Raises InputError if
    the messages do not fit together (see `dsv3c.comm.check`).
    """
    mesh = job.mesh
    local = local_ranks(mesh.ep, job.ranks_per_node)
    two_hop = 1 < local < mesh.ep
    given = dict(job.sizes)
    rows = capacity(program, given, job.expert_headroom)
    times = Times.of(program, registry, given, replace(machine, node=job.ranks_per_node))
    times = replace(times, two_hop=two_hop)
    crossings = _crossings(program, {**given, **rows})
    nodes = tuple(_row_nodes(program, registry))
    plan = CommPlan(
        schedule.kind, two_hop, overlap.communication_units if overlap else 0, local, _groups(mesh, local),
        crossings, transfers_of(schedule, crossings), _reductions(program, schedule, job),
        tuple(_exchange(times, graph, segment, node) for graph, segment, node in nodes),
        tuple(sorted(rows.items())), exchange_room(program, {**given, **rows}, mesh.ep, job.ranks_per_node), overlap,
    )  # fmt: skip
    check(plan, schedule)
    return plan


def _crossings(program: Program, sizes: Mapping[str, int]) -> tuple[Crossing, ...]:
    """What crosses between each two neighbouring stages."""
    types = value_types(program)

    def named(names: tuple[str, ...]) -> Named:
        return tuple((n, types[n].bytes(sizes)) for n in names)

    each = borders(program)
    return tuple(Crossing(named(a.sent), named(b.cotangents_sent)) for a, b in itertools.pairwise(each))


def _groups(mesh: Mesh, local: int) -> tuple[GroupFormula, ...]:
    first, ep = f"pp*{mesh.dp} + dp - dp%{mesh.ep}", mesh.ep
    found = [
        GroupFormula("experts", ep, mesh.world // ep, f"{first} + i, i < {ep}"),
        GroupFormula("within", local, mesh.world // local, f"pp*{mesh.dp} + dp - dp%{local} + i, i < {local}"),
        GroupFormula("across", ep // local, mesh.world // (ep // local),
                     f"{first} + dp%{local} + i*{local}, i < {ep // local}"),
        GroupFormula("channel", 2, (mesh.pp - 1) * mesh.dp, f"p*{mesh.dp} + dp, p in pp, pp+1"),
    ]  # fmt: skip
    return tuple(g for g in found if g.size > 1 and g.count)


def _reductions(program: Program, schedule: Schedule, job: Job) -> tuple[Reduction, ...]:
    wide = 8 if job.precision == "fp64" else 4
    return tuple(
        Reduction(g.name, g.holders, g.expert, shard_count(g.holders, g.expert, job.mesh), g.rows * LANE * wide)
        for g in flat_groups(program, schedule.holders, job.mesh)
    )


def _row_nodes(program: Program, registry: Registry) -> Iterator[tuple[Graph, str, Node]]:
    """Every node that sends rows, with its graph and the name of its segment."""
    used = dict.fromkeys(y.graph for s in program.sequences for y in s.layers)
    for graph in map(program.graph, used):
        for segment in segments(graph, registry):
            if segment.comm:
                yield from ((graph, segment.name, graph.nodes[i]) for i in segment.nodes)


def _exchange(times: Times, graph: Graph, segment: str, node: Node) -> RowExchange:
    tokens, row = times.carried(node)
    sent: Traffic = times.traffic_of(node)
    assert tokens > 0
    return RowExchange(graph.name, segment, node.op, math.ceil(row), math.ceil(sent.slow), math.ceil(sent.fast))
