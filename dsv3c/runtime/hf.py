"""Read checkpoints in Hugging Face form: safetensors (FP8 too) into given weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dsv3c.errors import InputError
from dsv3c.models.checkpoint import Part, layer_of, shared_with
from dsv3c.models.checkpoint import parts as dsv3_parts
from dsv3c.models.config import ModelConfig, load_config
from dsv3c.runtime.hf_write import INDEX, SINGLE, Directory, save_hf

Shape = tuple[int, ...]

SCALE = "_scale_inv"
BLOCK = 128
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
}
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
    targets = {
        part.hf_name: weight[part.index]
        for name, weight in weights.items()
        for part in parts(name, tuple(weight.shape))
    }
    return load_parts(directory, targets, {name: tuple(target.shape) for name, target in targets.items()})


def load_parts(directory: Directory, targets: Mapping[str, torch.Tensor], wanted: Mapping[str, Shape]) -> Loaded:
    """Copy tensors of a checkpoint into `targets`, by Hugging Face name; `wanted`, of which they are some, are the
    names and shapes of all that the model needs. Else as `load_hf`."""
    entries = read_entries(directory)
    ignored = _ignorable(entries, wanted)
    _check(Path(directory), entries, wanted, ignored)
    with ExitStack() as stack, torch.no_grad():
        read = _Reader(entries, stack)
        for name in ignored:
            source = shared_with(name)
            if source is not None and source in targets and not torch.equal(read(name), read(source)):
                raise InputError(
                    f"{entries[name].file}: {name} differs from {source}; an MTP module with an embedding or head of "
                    "its own is not supported"
                )
        for name, target in sorted(targets.items(), key=lambda item: str(entries[item[0]].file)):
            target.copy_(read(name))
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


__all__ = [
    "INDEX", "SCALE", "SINGLE", "Entry", "Loaded", "checkpoint_config", "dequantize", "load_hf", "load_parts",
    "read_entries", "save_hf",
]  # fmt: skip
