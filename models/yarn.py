"""Rotary settings: the YaRN record, and the two ways in which a config.json spells it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from dsv3c.errors import did_you_mean
from dsv3c.models.config_values import is_int, positive, show, size


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """YaRN context extension, by the names of `rope_scaling`; an mscale of 0 means that the file gives none."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0

    @property
    def attention_factor(self) -> float:
        """What multiplies the cosines and sines."""
        if self.mscale and self.mscale_all_dim:
            return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
        return self._mscale(1.0)

    @property
    def softmax_mscale(self) -> float:
        """What multiplies the softmax scale, twice."""
        return self._mscale(self.mscale_all_dim) if self.mscale_all_dim else 1.0

    def _mscale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


def read_rope(mapping: Mapping[str, object], values: dict[str, object]) -> list[str]:
    """Put `rope_theta` and `rope_scaling` into values, from rope_scaling or transformers 5's rope_parameters."""
    forms = {name: mapping[name] for name in ("rope_scaling", "rope_parameters") if mapping.get(name)}
    values["rope_scaling"] = None
    for name, form in forms.items():
        if not isinstance(form, Mapping):
            return [f"{name} = {show(form)}, but it must be an object or null"]
    if len(forms) == 2 and forms["rope_scaling"] != forms["rope_parameters"]:
        return ["rope_scaling and rope_parameters are both given and disagree"]
    if not forms:
        return []
    name, form = next((name, dict(form)) for name, form in forms.items() if isinstance(form, Mapping))
    kinds = {form.pop(key) for key in ("type", "rope_type") if isinstance(form.get(key), str)} or {"default"}
    theta = form.pop("rope_theta", values.get("rope_theta", 10000.0))
    if values.get("rope_theta", theta) != theta:
        return [f"rope_theta = {show(values['rope_theta'])} and {name}.rope_theta = {show(theta)} disagree"]
    values["rope_theta"] = theta
    if form.pop("partial_rotary_factor", None) not in (None, 1):
        return [f"{name}.partial_rotary_factor is not supported other than 1"]
    if kinds not in ({"default"}, {"yarn"}):
        return [f'{name}.type = {show("/".join(sorted(kinds)))} is not supported, only "yarn" and "default"']
    problems: list[str] = []
    if form.pop("truncate", True) is not True:
        problems.append(f"{name}.truncate is not supported other than true")
    if form.pop("attention_factor", None) is not None:
        problems.append(f"{name}.attention_factor is not supported, it follows from factor and mscale")
    allowed = [] if kinds == {"default"} else [f.name for f in fields(Yarn)]
    for key in form:
        if key not in allowed:
            problems.append(f"unknown field {name}.{key}" + (f", {did_you_mean(str(key), allowed)}" if allowed else ""))
    if problems or not allowed:
        return problems
    if "factor" not in form:
        return [f"missing field {name}.factor"]
    positions = values.get("max_position_embeddings", 4096)
    if form.get("original_max_position_embeddings") is None:
        form["original_max_position_embeddings"] = positions
    if bad := size(form["original_max_position_embeddings"]):
        return [f"{name}.original_max_position_embeddings must be {bad}"]
    if form["factor"] is None and is_int(positions):
        form["factor"] = positions / form["original_max_position_embeddings"]
    reals = {key: value for key, value in form.items() if key != "original_max_position_embeddings"}
    for key, value in list(reals.items()):
        if not value and key != "factor":  # null and 0 mean the default, as transformers reads them
            del reals[key]
        elif bad := positive(value):
            problems.append(f"{name}.{key} = {show(value)}, but it must be {bad}")
    if not problems:
        values["rope_scaling"] = Yarn(
            original_max_position_embeddings=form["original_max_position_embeddings"],
            **{key: float(value) for key, value in reals.items()},
        )
    return problems
