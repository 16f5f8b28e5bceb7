"""Rows sent among ranks: what each rank receives and in which order, what comes back, and how much room it needs."""

from __future__ import annotations

import pytest
import torch

from dsv3c import interp
from dsv3c.capacity import capacity
from dsv3c.ir import Graph, IRError, Program
from dsv3c.ops import REGISTRY
from dsv3c.ops.dispatch import source_order
from dsv3c.ops.router import distinct_experts
from dsv3c.text import parse_graph

RANKS, EXPERTS, K = 4, 8, 3
TEXT = """
def g(x: f64[B, S, 6], e: i32[B, S, 3], p: f64[B, S, 3]):
    rows, row_e, row_p, handle = dispatch(x, e, p, ranks=4, experts=8, rows='D')
    offsets, slot, source = sort_by_expert(row_e, experts=2, align=4, rows='R')
    sorted = permute(rows, source, slot)
    there = unpermute(sorted, slot, source)
    back = combine(there, handle, ranks=4)
    weights = combine(row_p, handle, ranks=4)
    again = dispatch_again(x, handle, ranks=4, rows='D')
    return back, weights, again
"""
Tensors = dict[str, torch.Tensor]


def graph() -> Graph:
    return parse_graph(TEXT, REGISTRY)


def inputs(seed: int, e: torch.Tensor | None = None) -> list[Tensors]:
    g = torch.Generator().manual_seed(seed)
    return [{
        "x": torch.randn(2, 5, 6, generator=g, dtype=torch.float64),
        "e": distinct_experts(g, (2, 5), K, EXPERTS) if e is None else e,
        "p": torch.randn(2, 5, K, generator=g, dtype=torch.float64),
    } for _ in range(RANKS)]  # fmt: skip


def test_every_choice_is_served_once_and_a_token_goes_once_to_a_rank() -> None:
    given = inputs(0)
    made = interp.run_ranks(graph(), given, REGISTRY, ranks_per_node=2)
    for tensors, values in zip(given, made, strict=True):
        sent = (values["handle"] >= 0).sum(-1, keepdim=True)
        assert torch.equal(sent.squeeze(-1), torch.tensor(
            [[len({int(c) // 2 for c in token}) for token in row] for row in tensors["e"]]))  # fmt: skip
        assert torch.allclose(values["back"], K * tensors["x"])
        assert torch.allclose(values["weights"], tensors["p"] * sent)
        assert torch.equal(values["again"], values["rows"])
    assert sum((v["row_e"] >= 0).sum() for v in made) == RANKS * 10 * K


@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_rows_arrive_by_place_in_the_node_then_by_node_then_by_token(ranks_per_node: int) -> None:
    given = inputs(1)
    made = interp.run_ranks(graph(), given, REGISTRY, ranks_per_node=ranks_per_node)
    for r in range(RANKS):
        expected = [
            x for s in source_order(RANKS, ranks_per_node)
            for x, e in zip(given[s]["x"].flatten(0, 1), given[s]["e"].flatten(0, 1), strict=True)
            if any(c // 2 == r for c in e.tolist())
        ]  # fmt: skip
        assert torch.equal(made[r]["rows"], torch.stack(expected))
        assert [int(c) for c in made[r]["row_e"].flatten() if c >= 0] == [
            c % 2 for s in source_order(RANKS, ranks_per_node)
            for c in given[s]["e"].flatten().tolist() if c // 2 == r
        ]  # fmt: skip


def test_sources_in_order() -> None:
    assert source_order(4, 4) == source_order(4, 1) == (0, 1, 2, 3)
    assert source_order(4, 2) == (0, 2, 1, 3)
    assert source_order(6, 2) == (0, 2, 4, 1, 3, 5)


def test_all_tokens_to_one_rank_and_none_to_the_others() -> None:
    e = torch.tensor([6, 7, -1], dtype=torch.int32).expand(2, 5, K)
    made = interp.run_ranks(graph(), inputs(2, e), REGISTRY)
    assert [len(v["rows"]) for v in made] == [0, 0, 0, 40]
    for tensors, values in zip(inputs(2, e), made, strict=True):
        assert torch.allclose(values["back"], 2 * tensors["x"])


def test_sums_are_rounded_within_a_node_first() -> None:
    """bf16 keeps 8 bits: 256 + 1 is 256, so 1 + 1 must be added before they meet 256."""
    text = "def g(y: bf16[D, 1], handle: i32[S, 4]):\n    x = combine(y, handle, ranks=4)\n    return x\n"
    handle = torch.full((1, 4), 0, dtype=torch.int32)
    pad = torch.full((1, 4), -1, dtype=torch.int32)
    for order, flat, nodes in (((256.0, 1.0, 1.0, 1.0), 260.0, 258.0), ((1.0, 1.0, 256.0, 0.0), 258.0, 258.0)):
        given = [{"y": torch.tensor([[v]]).bfloat16(), "handle": handle if r == 0 else pad}
                 for r, v in enumerate(order)]  # fmt: skip
        for ranks_per_node, expected in ((4, flat), (2, nodes)):
            made = interp.run_ranks(parse_graph(text, REGISTRY), given, REGISTRY, ranks_per_node=ranks_per_node)
            assert made[0]["x"].item() == expected


def test_two_groups_of_ranks_exchange_apart() -> None:
    first, second = inputs(3), inputs(4)
    both = interp.run_ranks(graph(), first + second, REGISTRY)
    apart = interp.run_ranks(graph(), first, REGISTRY) + interp.run_ranks(graph(), second, REGISTRY)
    assert all(torch.equal(a["again"], b["again"]) for a, b in zip(both, apart, strict=True))
    with pytest.raises(IRError, match="6 ranks do not divide into groups of 4"):
        interp.run_ranks(graph(), (first + second)[:6], REGISTRY)


def test_one_rank_alone_says_what_is_missing() -> None:
    with pytest.raises(IRError, match=r"dispatch among 4 ranks needs all of them; .* interp\.run_ranks"):
        interp.run(graph(), inputs(0)[0], REGISTRY)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a, b, c, d = dispatch(x, e, p, ranks=3, experts=8, rows='D')", "8 experts do not divide among 3 ranks"),
        ("a, b, c, d = dispatch(x, e, p, ranks=4, experts=8)", "need a symbol for their number"),
        ("a, b, c, d = dispatch(x, e, p, ranks=0, experts=8, rows='D')", "must be at least 1, got 0"),
        ("a = dispatch_again(x, h, ranks=4, rows='D')", "expected the handle of a dispatch to 4 ranks"),
        ("a = combine(x, h, ranks=2)", "the rows of f64"),
        ("a, b, c = sort_by_expert(f, experts=2, align=4, rows='1')", "is not the name of a symbol"),
    ],
)
def test_what_does_not_fit_is_refused(line: str, reason: str) -> None:
    text = f"def g(x: f64[B, S, 6], e: i32[B, S, 3], p: f64[B, S, 3], h: i32[B, S, 2], f: i32[D, 3]):\n    {line}\n"
    with pytest.raises(IRError, match=reason):
        parse_graph(text + "    return x\n", REGISTRY)


def test_what_a_rank_sends_is_what_it_receives_without_its_own() -> None:
    nodes = {n.outputs[0].name: n for n in graph().nodes}
    sent = {}
    for name in ("rows", "back", "again"):
        node = nodes[name]
        types = tuple(tuple(v.type for v in vs) for vs in (node.inputs, node.outputs))
        sent[name] = str(REGISTRY[node.op].cost(*types, **dict(node.attrs)).comm_bytes)
    assert sent == {"rows": "63*D", "back": "36*D", "again": "36*D"}  # 3/4 of 48 + 12 + 24 and of 48 bytes


def room(tokens: int, headroom: float, chosen: str = "") -> tuple[int, int]:
    text = TEXT.replace("    rows,", f"{chosen}    rows,") if chosen else TEXT
    if chosen:
        text = text.replace("p: f64[B, S, 3]", "p: f64[B, S, 3], s: f64[B, S, 8], bias: f64[8]")
    found = capacity(Program("g", (parse_graph(text, REGISTRY),)), {"B": 1, "S": tokens}, headroom)
    return found["D"], found["R"]


def test_room_for_balanced_load_for_headroom_and_for_the_worst() -> None:
    assert room(1024, 1.0) == (3072, 3072 + 128)  # each token to 3 ranks, 3 choices on average; 6 rows of padding
    assert room(1024, 1.25) == (3840, 3840 + 128)
    assert room(1024, 9.0) == (4096, 8192 + 128)  # every token of 4 ranks, at most two choices each
    kept = "    c = choose_experts(s, bias, k=3, groups=4, kept=2)\n"
    assert room(1024, 1.0, kept) == (2048, 3072 + 128)  # two groups of experts lie on two ranks
