"""What a training run depends on: recorded in each checkpoint, so that --resume continues that run or says why not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields

from dsv3c.job import Recipe
from dsv3c.plan import Plan
from dsv3c.runtime.state import Scalar

_SHOWN = 40


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
    """How two runs differ, each difference in a few words; consequences of a difference are not told again."""
    changed = [name for name in {**now, **saved} if name in now and saved.get(name) != now[name]]
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
