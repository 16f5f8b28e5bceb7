"""What a model family is: how its configuration is read, its program built, its weights stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from dsv3c.ir import Program
from dsv3c.job import Job
from dsv3c.models.checkpoint import Part
from dsv3c.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Model:
    """A family of models. `presets`: name -> configuration. `model_type` is that of its config.json.

    `build(config, job, alignment)` gives the program of every sequence the job needs; each expert's rows are padded
    to `alignment`. `parts(weight name, shape)` says which checkpoint tensors a stored weight is made of.
    """

    name: str
    doc: str
    model_type: str
    presets: Mapping[str, ModelConfig]
    build: Callable[[ModelConfig, Job, int], Program]
    parts: Callable[[str, tuple[int, ...]], tuple[Part, ...]]
