"""Checkpoints in Hugging Face form: safetensors (FP8 too) into given weights, and out to what transformers loads."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from dsv3c.errors import InputError, WorkError
from dsv3c.models.checkpoint import ROUTER_BIAS, Part, hf_shapes, layer_of, shared_with
from dsv3c.models.checkpoint import parts as dsv3_parts
from dsv3c.models.config import ModelConfig, load_config

Directory: TypeAlias = str | os.PathLike[str]
Shape = tuple[int, ...]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SCALE = "_scale_inv"
BLOCK = 128
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
_OURS = re.compile(r"model(\.\d+)?(-\d{5}-of-\d{5})?\.safetensors")
_FP8 = _CODES[torch.float8_e4m3fn]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: its safetensors element type (`F32`, `BF16`, ...) and shape, data unread."""

    file: Path
    code: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was read: how many tensors and bytes, and the names in the checkpoint that the model has no use for."""

    tensors: int
    bytes: int
    ignored: tuple[str, ...]


def read_entries(directory: Directory) -> dict[str, Entry]:
    """Every tensor of a checkpoint, from the headers alone; as in transformers a single file wins over an index.

    Raises InputError, naming the file, for a directory with no safetensors, a truncated file or an altered header.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory; give one with {SINGLE} or {INDEX}")
    owner: dict[str, str] = {}
    if (folder / SINGLE).is_file():
        files = [SINGLE]
    elif (folder / INDEX).is_file():
        owner = _read_index(folder / INDEX)
        files = sorted(set(owner.values()))
    else:
        pickled = " (pickled .bin weights are not read: save them as safetensors first)"
        has_bin = any(folder.glob("pytorch_model*.bin"))
        raise InputError(f"{folder}: holds neither {SINGLE} nor {INDEX}{pickled if has_bin else ''}")
    entries: dict[str, Entry] = {}
    for name in files:
        file = folder / name
        with _open(file) as opened:
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                if owner.get(key, name) == name:
                    part = opened.get_slice(key)
                    entries[key] = Entry(file, part.get_dtype(), tuple(part.get_shape()))
    lost = sorted(owner.keys() - entries.keys())
    if lost:
        raise InputError(f"{folder / INDEX}: names tensors that their files do not hold: {_listed(lost)}")
    return dict(sorted(entries.items()))


def checkpoint_config(directory: Directory) -> ModelConfig:
    """The directory's config, with as many MTP modules as there are weights for.

    transformers writes `num_nextn_predict_layers` 1 by default, but never an MTP module's weights.
    """
    config = load_config(directory)
    names = read_entries(directory).keys()
    present = [f"model.layers.{layer}.eh_proj.weight" in names for layer in config.mtp_layers]
    return replace(config, num_nextn_predict_layers=0) if present and not any(present) else config


def load_hf(
    directory: Directory,
    weights: Mapping[str, torch.Tensor],
    parts: Callable[[str, Shape], tuple[Part, ...]] = dsv3_parts,
) -> Loaded:
    """Copy a checkpoint into `weights` (allocated, any float type), one tensor in memory at a time.

    FP8 tensors are multiplied by their `weight_scale_inv`, float32 [ceil(rows/128), ceil(columns/128)]. Passed over are
    an MTP module that `weights` has not, an MTP module's copies of embedding and head if they are equal to them, empty
    tensors and rotary tables. Raises InputError, before anything is copied, with all missing, unexpected and
    misshapen tensors.
    """
    entries = read_entries(directory)
    targets: dict[str, tuple[str, Part, Shape]] = {}
    for name, weight in weights.items():
        for part in parts(name, tuple(weight.shape)):
            targets[part.hf_name] = (name, part, tuple(weight[part.index].shape))
    ignored = _ignorable(entries, targets)
    _check(Path(directory), entries, {name: shape for name, (_, _, shape) in targets.items()}, ignored)
    with ExitStack() as stack, torch.no_grad():
        read = _Reader(entries, stack)
        for name in ignored:
            source = shared_with(name)
            if source in targets and not torch.equal(read(name), read(source)):
                raise InputError(
                    f"{entries[name].file}: {name} differs from {source}; an MTP module with an embedding or head of "
                    "its own is not supported"
                )
        for hf_name, (name, part, _) in sorted(targets.items(), key=lambda item: str(entries[item[0]].file)):
            weights[name][part.index].copy_(read(hf_name))
        return Loaded(len(targets), read.bytes, tuple(ignored))


def _ignorable(entries: Mapping[str, Entry], targets: Mapping[str, object]) -> list[str]:
    """The checkpoint's tensors that a model may do without, and the scales that belong to others."""
    wanted_layers = {layer_of(name) for name in targets}
    absent_mtp = {layer_of(name) for name in entries if name.endswith(".eh_proj.weight")} - wanted_layers
    mtp = {layer_of(name) for name in entries if name.endswith(".eh_proj.weight")}
    return [
        name
        for name, entry in entries.items()
        if name not in targets
        and (
            layer_of(name) in absent_mtp
            or (shared_with(name) and layer_of(name) in mtp)
            or name.endswith("rotary_emb.inv_freq")
            or 0 in entry.shape
            or (name.endswith(SCALE) and _is_fp8(entries, name.removesuffix(SCALE)))
        )
    ]


def _is_fp8(entries: Mapping[str, Entry], name: str) -> bool:
    return name in entries and entries[name].code == _FP8


def _check(folder: Path, entries: Mapping[str, Entry], wanted: Mapping[str, Shape], ignored: Iterable[str]) -> None:
    missing = [name for name in wanted if name not in entries]
    unexpected = sorted(entries.keys() - wanted.keys() - set(ignored))
    misshapen = []
    for name, shape in wanted.items():
        if (entry := entries.get(name)) is None:
            continue
        if entry.shape != shape:
            misshapen.append(f"{name} is {list(entry.shape)}, the model's is {list(shape)}")
        if entry.code not in _CODES.values():
            misshapen.append(f"{name} has element type {entry.code}, which is not a supported float")
        if entry.code == _FP8:
            blocks = tuple(-(-size // BLOCK) for size in entry.shape)
            scale = entries.get(name + SCALE)
            if scale is None:
                missing.append(name + SCALE)
            elif scale.shape != blocks or scale.code != "F32":
                misshapen.append(f"{name + SCALE} is {scale.code} {list(scale.shape)}, it must be F32 {list(blocks)}")
    said = [
        f"{len(names)} {what}: {_listed(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if said:
        raise InputError(f"{folder}: the tensors do not fit the model's configuration; {'; '.join(said)}")


def _listed(names: Iterable[str], most: int = 200) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _read_index(file: Path) -> dict[str, str]:
    try:
        owner = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) and Path(name).name == name for name in owner.values()):
            raise ValueError
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{file}: not an index of safetensors (a JSON object with a weight_map of file names)"
        ) from None
    return dict(owner)


@contextmanager
def _open(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise InputError(f"{file}: truncated or altered, not a whole safetensors file ({error})") from None
    except FileNotFoundError:
        raise InputError(f"{file}: missing, though the checkpoint's index names it") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from None


@dataclass(slots=True)
class _Reader:
    """Reads tensors by name, one file open at a time, FP8 dequantized to float32."""

    entries: Mapping[str, Entry]
    stack: ExitStack
    bytes: int = 0
    _file: Path | None = field(default=None, init=False)
    _opened: Any = field(default=None, init=False)

    def __call__(self, name: str) -> torch.Tensor:
        value = self._raw(name)
        if self.entries[name].code != _FP8:
            return value
        return dequantize(value, self._raw(name + SCALE))

    def _raw(self, name: str) -> torch.Tensor:
        file = self.entries[name].file
        if file != self._file:
            self.stack.close()
            self._opened = self.stack.enter_context(_open(file))
            self._file = file
        tensor: torch.Tensor = self._opened.get_tensor(name)
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor


def dequantize(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Float32 [r, c] from e4m3 [r, c] and the scales of its 128 x 128 blocks, float32 [ceil(r/128), ceil(c/128)]."""
    result = weight.to(torch.float32)
    for row, scales in enumerate(scale):
        columns = scales.repeat_interleave(BLOCK)[: weight.shape[1]]
        result[row * BLOCK : (row + 1) * BLOCK] *= columns
    return result


def save_hf(
    directory: Directory,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_bytes: int = 5_000_000_000,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a checkpoint that transformers, vLLM and SGLang load; returns its directory.

    `tensors` are all of the checkpoint's, by Hugging Face name; `dtype` casts them, but router biases are float32
    always. A new directory appears whole or not at all. In an existing one other files stay, and one last rename
    switches from the old weights to the new. Raises WorkError when it cannot be written: what was there is kept.
    """
    target = Path(directory).absolute()
    work: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.parent / f".{target.name}.{os.getpid()}.tmp"
        unfinished.mkdir()
        work = unfinished
        shards = _write_shards(work, config, tensors, max_shard_bytes, dtype)
        stored = dtype if dtype is not None else shards.dtype
        _write_json(work / "config.json", config.to_hf_dict(str(stored).removeprefix("torch.")))
        eos = list(config.eos_token_id) if isinstance(config.eos_token_id, tuple) else config.eos_token_id
        ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos}
        _write_json(work / "generation_config.json", {"_from_model_config": True, **ids})
        _install(work, target, shards)
    except OSError as error:
        raise WorkError(f"{target}: the checkpoint cannot be written: {error.strerror or error}") from None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)
    return target


@dataclass(slots=True)
class _Shards:
    """Written shards in order, each with its tensors' names, and the element type that most of the model has."""

    files: list[tuple[Path, list[str]]]
    bytes: int
    dtype: torch.dtype


def _write_shards(
    work: Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    max_shard_bytes: int,
    dtype: torch.dtype | None,
) -> _Shards:
    wanted = hf_shapes(config)
    shards = _Shards([], 0, torch.float32)
    waiting: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = work / f"shard-{len(shards.files):05d}"
        _write_safetensors(file, waiting)
        shards.files.append((file, list(waiting)))
        waiting.clear()

    size = 0
    for name, tensor in tensors:
        if wanted.pop(name, None) != tuple(tensor.shape):
            raise ValueError(f"save_hf: {name} {list(tensor.shape)} is unknown, misshapen or given twice")
        kept = torch.float32 if name.endswith(ROUTER_BIAS) else dtype if dtype is not None else tensor.dtype
        shards.dtype = tensor.dtype if name == "lm_head.weight" else shards.dtype
        bytes_ = tensor.numel() * kept.itemsize
        if waiting and size + bytes_ > max_shard_bytes:
            flush()
            size = 0
        waiting[name] = tensor.detach().to(kept)
        size += bytes_
        shards.bytes += bytes_
    if wanted:
        raise ValueError(f"save_hf: not given: {_listed(wanted)}")
    flush()
    return shards


def _write_safetensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
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
