"""Write a checkpoint that transformers, vLLM and SGLang load, from one rank or from the shards of many."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypedDict

import torch

from dsv3c.errors import WorkError
from dsv3c.models.checkpoint import ROUTER_BIAS, hf_shapes
from dsv3c.models.config import ModelConfig
from dsv3c.runtime.checkpoint_files import code_of
from dsv3c.runtime.peers import ALONE, Peers, together

Directory: TypeAlias = str | os.PathLike[str]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_OURS = re.compile(r"model(\.\d+)?(-\d{5}-of-\d{5})?\.safetensors")


def save_hf(
    directory: Directory,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
    peers: Peers = ALONE,
) -> Path:
    """Write a checkpoint that transformers, vLLM and SGLang load; returns its directory.

    `tensors` are all of the checkpoint's, by Hugging Face name; `dtype` casts them, but router biases are float32
    always. With `peers` all ranks call this together, each with some of the tensors, which it writes to files of its
    own. A new directory appears whole or not at all. In an existing one other files stay, and one last rename
    switches from the old weights to the new. Raises WorkError when it cannot be written: what was there is kept.
    """
    target = Path(directory).absolute()
    work = target.parent / f".{target.name}.{os.getpid()}.tmp"
    made = False

    def begin() -> str:
        nonlocal made
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            work.mkdir()
        made = True
        return work.name

    def write() -> str:
        with _writing(target):
            return json.dumps(_write_shards(work, config, tensors, max_shard_bytes, dtype, peers.rank))

    def finish() -> str:
        shards = _joined(work, config, [json.loads(text) for text in wrote])
        stored = str(dtype).removeprefix("torch.") if dtype is not None else shards.dtype
        with _writing(target):
            _write_json(work / "config.json", config.to_hf_dict(stored))
            eos = list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id
            ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos}
            _write_json(work / "generation_config.json", {"_from_model_config": True, **ids})
            _install(work, target, shards)
        return ""

    def on_first(act: Callable[[], str]) -> list[str]:
        return together(peers, act if peers.rank == 0 else str)

    try:
        work = target.parent / on_first(begin)[0]
        wrote = together(peers, write)
        on_first(finish)
    finally:
        if made:
            shutil.rmtree(work, ignore_errors=True)
    return target


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkError(f"{target}: the checkpoint cannot be written: {error.strerror or error}") from None


class _Written(TypedDict):
    """What one rank wrote: files in order with the names of their tensors, and the element type of the head if it is
    among them."""

    files: list[tuple[str, list[str]]]
    bytes: int
    dtype: str | None


@dataclass(slots=True)
class _Shards:
    """Written shards in order, each with its tensors' names, and the element type that most of the model has."""

    files: list[tuple[Path, list[str]]]
    bytes: int
    dtype: str


def _write_shards(
    work: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int,
    dtype: torch.dtype | None,
    rank: int,
) -> _Written:
    wanted = hf_shapes(config)
    written: _Written = {"files": [], "bytes": 0, "dtype": None}
    waiting: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"shard-{rank:05d}-{len(written['files']):05d}"
        _write_safetensors(work / file, waiting)
        written["files"].append((file, list(waiting)))
        waiting.clear()

    size = 0
    for name, tensor in tensors:
        if wanted.pop(name, None) != tuple(tensor.shape):
            raise ValueError(f"save_hf: {name} {list(tensor.shape)} is unknown, misshapen or given twice")
        kept = torch.float32 if name.endswith(ROUTER_BIAS) else dtype if dtype is not None else tensor.dtype
        if name == "lm_head.weight":
            written["dtype"] = str(tensor.dtype).removeprefix("torch.")
        bytes_ = tensor.numel() * kept.itemsize
        if waiting and size + bytes_ > max_shard_bytes:
            flush()
            size = 0
        waiting[name] = tensor.detach().to(kept)
        size += bytes_
        written["bytes"] += bytes_
    if waiting:
        flush()
    return written


def _joined(work: Path, config: ModelConfig, written: Iterable[_Written]) -> _Shards:
    """The shards of all ranks. Raises ValueError unless they hold every tensor once."""
    shards = _Shards([], 0, "float32")
    missing = hf_shapes(config)
    for part in written:
        for file, names in part["files"]:
            shards.files.append((work / file, names))
            for name in names:
                if missing.pop(name, None) is None:
                    raise ValueError(f"save_hf: {name} is given twice")
        shards.bytes += part["bytes"]
        shards.dtype = part["dtype"] or shards.dtype
    if missing:
        names = list(missing)
        raise ValueError(f"save_hf: not given: {', '.join(names[:200])}")
    return shards


def _write_safetensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": code_of(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            out.write(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        out.flush()
        os.fsync(out.fileno())


def _write_json(file: Path, value: object) -> None:
    with open(file, "w", encoding="utf-8") as out:
        out.write(json.dumps(value, indent=2) + "\n")
        out.flush()
        os.fsync(out.fileno())


def _install(work: Path, target: Path, shards: _Shards) -> None:
    """Name the shards, and move all files into place; the weights change over at one rename or removal."""
    old = {f.name for f in target.glob("*.safetensors")} if target.is_dir() else set()
    count = len(shards.files)
    if count == 1:
        names = [SINGLE]
    else:
        attempt, stem = 0, "model"
        while any(f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" in old for i in range(count)):
            attempt += 1  # shards that the old index names stay until the new index stands
            stem = f"model.{attempt}"
        names = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        owner = {key: name for name, (_, keys) in zip(names, shards.files, strict=True) for key in keys}
        _write_json(work / INDEX, {"metadata": {"total_size": shards.bytes}, "weight_map": dict(sorted(owner.items()))})
    for name, (file, _) in zip(names, shards.files, strict=True):
        file.rename(work / name)
    if not target.exists():
        work.rename(target)
        return
    order = ["generation_config.json", "config.json", *names, *([INDEX] if count > 1 else [])]
    for name in order:
        os.replace(work / name, target / name)
    stale = sorted(name for name in old if _OURS.fullmatch(name) and name not in names)
    for name in stale if count > 1 else [INDEX, *stale]:
        (target / name).unlink(missing_ok=True)
