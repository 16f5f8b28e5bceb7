"""`dsv3c simulate` and `dsv3c report`: what a plan takes on its machine, in words, as JSON, as a trace, as a page."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from dsv3c.console import size, table, tell, write_json
from dsv3c.files import write_text

if TYPE_CHECKING:
    from dsv3c.plan import Plan
    from dsv3c.simulate import Simulation


def simulate(a: argparse.Namespace) -> int:
    """`dsv3c simulate`: the figures of one step on paper, and where its time goes."""
    from dsv3c.plan import load_plan
    from dsv3c.simulate import simulate as run
    from dsv3c.simulate import trace

    plan = load_plan(a.plan)
    result = run(plan, a.set)
    if a.trace is not None:
        write_text(a.trace, trace(result))
    if a.json:
        write_json(result.as_json())
    else:
        print(figures(plan, result))
    if a.trace is not None:
        tell(f"wrote {a.trace}; open it in a viewer of Chrome traces")
    return 0


def report(a: argparse.Namespace) -> int:
    """`dsv3c report`: one page about a plan, complete in itself."""
    from dsv3c.plan import load_plan
    from dsv3c.report import page
    from dsv3c.simulate import simulate as run

    plan = load_plan(a.plan)
    write_text(a.out, page(plan, run(plan, a.set)))
    if a.json:
        write_json({"file": a.out})
    else:
        print(f"wrote {a.out}")
    return 0


def figures(plan: Plan, s: Simulation) -> str:
    """The figures of a step as a table."""
    from dsv3c.simulate import compared

    rows = [(f"{s.step_seconds:.6g} s", "a step" if plan.job.kind == "train" else f"one {plan.job.kind}"),
            (f"{s.tokens_per_second_per_gpu:.5g}", "tokens a second and rank"),
            (f"{s.tflops_per_gpu_causal:.4g}", "TFLOP/s a rank, attention counted causal"),
            (f"{s.mfu_bf16_causal:.1%}", "of the bf16 peak"),
            (f"{s.bubble_fraction:.1%}", "of the schedule idle, mean of the pipeline ranks"),
            (f"{s.comm_hidden_fraction:.1%}", "of the rows' time to experts and back hidden by computation"),
            (size(s.memory_peak_bytes), "memory on the largest rank"),
            (f"{s.gpu_hours_per_trillion_tokens:,.0f}", "GPU hours per trillion tokens")]  # fmt: skip
    lines = [table(rows, right=(0,)), "", "where the time of the busiest rank goes"]
    whole = s.step_seconds or 1.0
    lines.append(table([(name, f"{t:.4g} s", f"{t / whole:.1%}") for name, t in s.breakdown], indent=2, right=(1, 2)))
    if told := compared(plan, s):
        lines += ["", told]
    return "\n".join(lines)
