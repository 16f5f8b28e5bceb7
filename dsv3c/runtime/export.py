"""Write weights for other programs: a training checkpoint, or a checkpoint of another form, to Hugging Face's."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from dsv3c.errors import InputError, WorkError, did_you_mean
from dsv3c.files import reason
from dsv3c.models.checkpoint import ROUTER_BIAS, hf_tensors, mtp_copies, weight_shapes
from dsv3c.models.config import ModelConfig
from dsv3c.plan import load_plan
from dsv3c.runtime.hf import checkpoint_config, load_hf, read_entries, save_hf
from dsv3c.runtime.peers import Peers, together
from dsv3c.runtime.rank_weights import Parts, RankWeights
from dsv3c.runtime.state import FOLDER, SavedState, latest_state
from dsv3c.runtime.tokenizer import Tokenizer, load_tokenizer
from dsv3c.runtime.weights import BIAS, MASTER

FORMATS = ("hf",)
PLAN = "train.plan"
"""The plan of a training run, kept in its folder."""
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


def export(directory: str | Path, *, format: str = "hf", out: str | Path) -> Path:
    """Write what is in `directory` to the folder `out` and return it.

    `directory`: what `dsv3c train --out` wrote (its newest checkpoint counts) or a Hugging Face checkpoint, whose FP8
    weights become bfloat16. Raises InputError if it is neither, or for an unknown format; WorkError if `out` cannot be
    written.
    """
    if format not in FORMATS:
        raise InputError(f"--format {format} is unknown; {did_you_mean(format, FORMATS)}")
    source = Path(directory)
    if source.resolve() == Path(out).resolve():
        raise InputError(f"-o {out}: is the folder that is to be exported; name another")
    if (source / PLAN).is_file():
        return _export_run(source, Path(out))
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give what dsv3c train --out wrote, or a checkpoint")
    if (source / FOLDER).is_dir():
        raise InputError(f"{source}: {PLAN} is missing, which training wrote there; put it back to export the run")
    return _export_hf(source, Path(out))


def write_hf(
    out: str | Path, config: ModelConfig, weights: Mapping[str, torch.Tensor], tokenizer: Tokenizer | None
) -> Path:
    """Write weights (as held here, by name) and the tokenizer beside them; its end of document becomes the model's.

    Raises WorkError if that fails.
    """
    folder = save_hf(out, _ending(config, tokenizer), hf_tensors(config, weights))
    if tokenizer is not None:
        tokenizer.save(folder)
    return folder


def write_hf_together(
    out: str | Path, config: ModelConfig, weights: RankWeights, parts: Parts, tokenizer: Tokenizer | None, peers: Peers
) -> Path:
    """As `write_hf`, by all ranks that hold the weights: each writes what falls to it, none gathers the whole model.

    The whole buffers of `weights` are used: gradients are lost. Raises WorkError if it fails, on every rank the same.
    """
    weights.gather()
    copies: dict[str, list[str]] = {}
    for copy, source in mtp_copies(config).items():
        copies.setdefault(source, []).append(copy)
    mine = ((name, t) for hf_name, t in weights.hf_tensors(parts) for name in (hf_name, *copies.get(hf_name, ())))
    folder = save_hf(out, _ending(config, tokenizer), mine, peers=peers)

    def save() -> str:
        if tokenizer is not None and peers.rank == 0:
            tokenizer.save(folder)
        return ""

    together(peers, save)
    return folder


def _ending(config: ModelConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """The config with the end of document that the tokenizer has."""
    if tokenizer is None or tokenizer.eos in (config.eos_token_id, *_several(config.eos_token_id)):
        return config
    return dataclasses.replace(config, eos_token_id=tokenizer.eos, bos_token_id=None)


def _several(ids: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return ids if isinstance(ids, tuple) else ()


def _export_run(source: Path, out: Path) -> Path:
    checkpoint = latest_state(source)
    if checkpoint is None:
        raise InputError(f"{source}: has no checkpoint yet; train until the first is saved")
    plan = load_plan(source / PLAN)
    config = ModelConfig.from_dict(plan.config, where=f"the plan of {plan.model}")
    weights = _SavedWeights(checkpoint, config)
    tokenizer = load_tokenizer(source) if (source / "tokenizer.json").is_file() else None
    return write_hf(out, config, weights, tokenizer)


class _SavedWeights(Mapping[str, torch.Tensor]):
    """The weights in a checkpoint, of whatever mesh, by name; each is read when it is asked for."""

    def __init__(self, checkpoint: Path, config: ModelConfig) -> None:
        self._saved = SavedState(checkpoint)
        self._stored = {n: (BIAS if n.endswith(ROUTER_BIAS) else MASTER) + n for n in weight_shapes(config)}
        self._saved.require({self._stored[n]: shape for n, shape in weight_shapes(config).items()})

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._saved.tensor(self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _export_hf(source: Path, out: Path) -> Path:
    config = checkpoint_config(source)
    entries = read_entries(source)
    stored = entries["lm_head.weight"].code if "lm_head.weight" in entries else "F32"
    dtype = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}.get(stored, torch.bfloat16)
    weights = {
        name: torch.empty(shape, dtype=torch.float32 if name.endswith(ROUTER_BIAS) else dtype)
        for name, shape in weight_shapes(config).items()
    }
    load_hf(source, weights)
    folder = save_hf(out, config, hf_tensors(config, weights))
    try:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    except OSError as error:
        raise WorkError(f"{folder}: the tokenizer cannot be written: {reason(error)}") from None
    return folder
