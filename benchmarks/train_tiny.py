"""Times a training step of deepseek-v3-tiny on this CPU: dsv3c against transformers, eager and compiled."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

import torch
from common import Contestant, ForeignLoad, compare_in_turns, report
from peers import TINY, tokens_like, train_step

MODEL = "deepseek-v3-tiny:num_nextn_predict_layers=0"


def ours(precision: str, batch: int, length: int) -> Contestant:
    dsv3c: Any = import_module("dsv3c")  # late, so that peers can be measured alone

    plan = dsv3c.compile(MODEL, job="train", target="cpu", seq=length, micro_batch=batch, precision=precision)
    session: Any = dsv3c.load(plan, seed=0)
    tokens = tokens_like(batch, length)

    def step() -> None:
        session.step(tokens)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers-only", action="store_true", help="measure transformers alone")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each contestant (default 15)")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step (default 8)")
    parser.add_argument("--seq", type=int, default=128, help="tokens a sequence (default 128)")
    parser.add_argument("--precision", choices=("fp32", "bf16", "both"), default="fp32", help="default fp32")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile'd peers out")
    parser.add_argument(
        "--experts", default=None, help="transformers' experts_implementation (default: its own choice)"
    )
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    shape = {"batch": args.batch, "length": args.seq, "experts": args.experts}
    # Eager float32 is the common yardstick and always runs.
    contestants: dict[str, Contestant] = {"transformers eager fp32": train_step(compiled=False, bf16=False, **shape)}
    for precision in ("fp32", "bf16") if args.precision == "both" else (args.precision,):
        bf16 = precision == "bf16"
        if bf16:
            contestants["transformers eager bf16 autocast"] = train_step(compiled=False, bf16=True, **shape)
        if not args.no_compile:
            name = f"transformers torch.compile {'bf16 autocast' if bf16 else 'fp32'}"
            # inductor breaks transformers' own choice of experts into pieces; its plain loop compiles and is faster
            contestants[name] = train_step(compiled=True, bf16=bf16, **{**shape, "experts": args.experts or "eager"})
        if not args.peers_only:
            contestants[f"dsv3c {precision}"] = ours(precision, args.batch, args.seq)
    foreign = ForeignLoad()
    seconds = compare_in_turns(contestants, args.rounds, warmup=3)
    load = foreign.share()
    mine = [name for name in seconds if name.startswith("dsv3c")]
    prefix = f"train step, tiny {TINY['num_hidden_layers']} layers, {args.batch}x{args.seq}"
    prefix += f", experts {args.experts}" if args.experts else ""
    peers = {name: value for name, value in seconds.items() if name not in mine}
    if not mine:
        report(prefix, peers, "ms", 1e3, load=load)
    for name in mine:
        report(prefix, peers | {name: seconds[name]}, "ms", 1e3, load=load, ours=name)


if __name__ == "__main__":
    main()
