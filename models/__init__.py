"""The model families, one file each; every Model at module level in this folder is in `MODELS`."""

if __name__ != "dsv3c.models":
    raise ImportError("import this package as dsv3c.models; the bare name 'models' is not dsv3c's to take")

from dsv3c.discover import defined_in
from dsv3c.errors import InputError
from dsv3c.models._model import Model
from dsv3c.models.config import ModelConfig

MODELS: dict[str, Model] = {m.name: m for m in defined_in(__name__, Model)}

__all__ = ["MODELS", "Model", "ModelConfig", "family", "register"]


def register(model: Model) -> Model:
    """Add a model family defined outside the package; returns it."""
    if MODELS.get(model.name, model) is not model:
        raise InputError(f"the model family '{model.name}' is registered twice; choose another name")
    MODELS[model.name] = model
    return model


def family(preset: str) -> Model:
    """The family that has the preset called `preset`; the first family for a configuration file."""
    for model in MODELS.values():
        if preset in model.presets:
            return model
    return next(iter(MODELS.values()))
