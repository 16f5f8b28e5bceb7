"""Times greedy decoding of deepseek-v3-tiny on this CPU, batch 1, float32: dsv3c against transformers."""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from typing import Any

import torch
from common import Contestant, ForeignLoad, compare_in_turns, report
from peers import generate_seconds_per_token, static_cache_seconds_per_token, tokens_like

MODEL = "deepseek-v3-tiny:num_nextn_predict_layers=0"


def ours(prompt: int, new: int) -> Contestant:
    dsv3c: Any = import_module("dsv3c")  # late, so that peers can be measured alone

    plan = dsv3c.compile(MODEL, job="decode", target="cpu", precision="fp32")
    session: Any = dsv3c.load(plan, seed=0)
    tokens = tokens_like(1, prompt)

    def run(count: int) -> float:
        start = time.perf_counter()
        session.generate(tokens, max_new_tokens=count, temperature=0.0)
        return time.perf_counter() - start

    return lambda: (run(1 + new) - run(1)) / new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers-only", action="store_true", help="measure transformers alone")
    parser.add_argument("--rounds", type=int, default=7, help="timed generations of each contestant (default 7)")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens in the context (default 1024)")
    parser.add_argument("--new", type=int, default=64, help="tokens decoded after the first (default 64)")
    parser.add_argument(
        "--experts", default=None, help="transformers' experts_implementation (default: its own choice)"
    )
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    contestants: dict[str, Contestant] = {
        "transformers generate fp32": generate_seconds_per_token(args.prompt, args.new, args.experts),
        "transformers torch.compile static cache fp32": static_cache_seconds_per_token(
            args.prompt, args.new, args.experts
        ),
    }
    mine = None
    if not args.peers_only:
        mine = "dsv3c fp32"
        contestants[mine] = ours(args.prompt, args.new)
    prefix = f"decode, tiny, batch 1, context {args.prompt}" + (f", experts {args.experts}" if args.experts else "")
    foreign = ForeignLoad()
    seconds = compare_in_turns(contestants, args.rounds)
    report(prefix, seconds, "ms/token", 1e3, load=foreign.share(), ours=mine)


if __name__ == "__main__":
    main()
