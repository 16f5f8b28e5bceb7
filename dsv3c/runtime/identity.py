"""What a training run depends on: recorded in each checkpoint, so that --resume continues that run or says why not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields

from dsv3c.job import Recipe
from dsv3c.plan import Plan
from dsv3c.runtime.checkpoint_files import Scalar

_SHOWN = 40
MESH = ("job.mesh", "job.ranks_per_node", "job.schedule")
"""How a run is divided among ranks. It may go on divided in another way, with the same numbers up to rounding; what
follows from the division may then differ too."""
_DIVIDED = (*MESH, "job.micro_batch", "job.expert_headroom", "job.kernels", "job.implementations",
            "job.allow_oversize", "program")  # fmt: skip


def run_facts(plan: Plan, recipe: Recipe, *, seed: int, steps: int, data: str, tokenizer: str) -> dict[str, Scalar]:
    """Everything that the metrics of a run depend on, by name.

    `recipe`: the plan's with `--lr` put in. `data`: the key of the token file. `tokenizer`: its identity.
    """
    facts: dict[str, Scalar] = {"model": plan.model, "steps": steps, "seed": seed}
    facts |= {f"model.{name}": _scalar(value) for name, value in sorted(plan.config.items())}
    job = plan.job
    facts |= {f"job.{f.name}": _scalar(getattr(job, f.name)) for f in fields(job) if f.name != "recipe"}
    facts |= {f"recipe.{f.name}": getattr(recipe, f.name) for f in fields(recipe)}
    facts |= {"tokenizer": tokenizer, "data": data, "program": _program(plan)}
    return facts


def differences(saved: Mapping[str, Scalar], now: Mapping[str, Scalar]) -> list[str]:
    """Why `now` is not the run that was saved, each difference in a few words; its consequences are not told again.

    On another mesh it is the same run if model, data, seed, steps, recipe, global batch and precision are the same.
    """
    changed = [name for name in {**now, **saved} if name in now and saved.get(name) != now[name]]
    if any(name in MESH for name in changed):
        changed = [name for name in changed if name not in _DIVIDED]
    roots = [name for name in changed if name not in ("model", "tokenizer", "data", "program")]
    told = [f"{name} is {_short(now[name])}, was {_short(saved.get(name))}" for name in roots]
    described = any(name.startswith(("model.", "job.")) for name in roots)
    if "tokenizer" in changed:
        told.append("the tokenizer is another")
    elif "data" in changed:
        told.append("the text of --data is another")
    if "model" in changed and not described:
        told.append(f"the model is called {now['model']}, was {saved.get('model')}")
    elif "program" in changed and not described:
        told.append("the plan was compiled to another program")
    return told


def moved(saved: Mapping[str, Scalar], now: Mapping[str, Scalar]) -> str | None:
    """A sentence for the user if the run goes on divided among ranks in another way, else None."""
    changed = [name for name in MESH if name in saved and saved[name] != now[name]]
    if not changed:
        return None
    told = ", ".join(
        f"{name.removeprefix('job.').replace('_', ' ')} {now[name]} (was {saved[name]})" for name in changed
    )
    return f"going on with {told}: the same numbers up to rounding"


def _scalar(value: object) -> Scalar:
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return json.dumps(value, sort_keys=True) if isinstance(value, dict | list) else str(value)


def _short(value: Scalar) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _program(plan: Plan) -> str:
    """A hash of what is executed: the program's text and the generated code."""
    digest = hashlib.sha256(plan.ir.encode())
    for kernel in sorted(plan.kernels, key=lambda k: k.id):
        digest.update(kernel.op.encode())
        for file in kernel.files:
            digest.update(file.data)
    return digest.hexdigest()
