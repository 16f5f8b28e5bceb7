"""The model families, one file each; every Model at module level in this folder is in `MODELS`."""

if __name__ != "dsv3c.models":
    raise ImportError("import this package as dsv3c.models; the bare name 'models' is not dsv3c's to take")

import os

from dsv3c.discover import defined_in
from dsv3c.errors import InputError
from dsv3c.models._model import Model
from dsv3c.models.config import ModelConfig
from dsv3c.models.presets import resolve_model

MODELS: dict[str, Model] = {m.name: m for m in defined_in(__name__, Model)}

__all__ = ["MODELS", "Model", "ModelConfig", "register", "resolve"]


def register(model: Model) -> Model:
    """Add a model family defined outside the package; returns it."""
    if MODELS.get(model.name, model) is not model:
        raise InputError(f"the model family '{model.name}' is registered twice; choose another name")
    MODELS[model.name] = model
    return model


def resolve(model: str | os.PathLike[str] | ModelConfig) -> tuple[str, Model, ModelConfig]:
    """Name, family and configuration of MODEL: a preset of any family, a config.json or a directory with one.

    Raises InputError for what is none of them.
    """
    owners = {name: family for family in MODELS.values() for name in family.presets}
    name, config = resolve_model(model, {preset: owners[preset].presets[preset] for preset in owners})
    return name, owners.get(name, next(iter(MODELS.values()))), config
