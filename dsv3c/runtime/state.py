"""Training checkpoints that are either whole or absent, whenever the process dies.

`OUT/checkpoints/step-000123/` holds `state.safetensors` and `info.json`. Both are written and synced in a hidden
folder, which is then renamed. A checkpoint of the same step that is being replaced stands aside as `step-000123.old`
and counts until the new one is in place; so there is no moment without a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dsv3c.errors import InputError, WorkError

if TYPE_CHECKING:
    import torch

Scalar = str | int | float | bool | None

FOLDER = "checkpoints"
TENSORS = "state.safetensors"
INFO = "info.json"
_FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})(\.old)?")
_BLOCK = 1 << 24
_LISTED = 100

# safetensors' names of element types
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
}  # fmt: skip


def save_state(
    out_dir: str | Path,
    step: int,
    tensors: Mapping[str, torch.Tensor],
    info: Mapping[str, Scalar],
    *,
    keep: int = 2,
) -> Path:
    """Writes the checkpoint of `step` and returns its folder; deletes earlier ones beyond the newest `keep`.

    Tensors may lie on any device and are written one at a time, without a copy where they are contiguous on the CPU.
    Raises InputError if `out_dir` is not a folder, WorkError if it cannot be written; earlier checkpoints then stay.
    """
    folder = Path(out_dir) / FOLDER
    final = folder / f"step-{step:06d}"
    aside = folder / f"{final.name}.old"
    building = folder / f".tmp-{final.name}-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--out: {out_dir} is not a folder; name a new or an existing folder.") from error
    except OSError as error:
        raise _failed(folder, step, error) from error
    try:
        _sweep(folder)
        building.mkdir()
        size, digest = _write_tensors(building / TENSORS, tensors)
        _write_info(building / INFO, step, size, digest, info)
        _sync_folder(building)
        if final.exists():
            os.rename(final, aside)
        os.rename(building, final)
        _sync_folder(folder)
    except OSError as error:
        _undo(building, aside, final)
        raise _failed(folder, step, error) from error
    except BaseException:
        _undo(building, aside, final)
        raise
    _prune(folder, step, keep)
    return final


def states(out_dir: str | Path) -> list[Path]:
    """The checkpoints under `out_dir`, oldest first; what an interrupted save or deletion left is not among them."""
    found: dict[int, Path] = {}
    try:
        entries = sorted((Path(out_dir) / FOLDER).iterdir())  # step-N before step-N.old
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise InputError(f"cannot read {Path(out_dir) / FOLDER}: {error.strerror}.") from error
    for path in entries:
        match = _NAME.fullmatch(path.name)
        if match is not None and (path / INFO).is_file():
            found.setdefault(int(match[1]), path)
    return [found[step] for step in sorted(found)]


def latest_state(out_dir: str | Path) -> Path | None:
    """The newest checkpoint under `out_dir`, or None; its hashes are checked by `load_state`."""
    found = states(out_dir)
    return found[-1] if found else None


def discard_states(out_dir: str | Path) -> None:
    """Deletes every checkpoint under `out_dir`, newest first, for a run that starts afresh there.

    Raises WorkError if one cannot be deleted: a later --resume would otherwise continue the wrong run.
    """
    try:
        for path in reversed(states(out_dir)):
            _retire(path)
    except OSError as error:
        raise WorkError(f"cannot delete {path}: {error.strerror or error}; choose another --out.") from error


def step_of(path: Path) -> int:
    """The step of a checkpoint folder, from its name. Raises InputError if it is none."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise InputError(f"{path} is not a checkpoint; its folder would be called step-000123.")
    return int(match[1])


def load_info(path: str | Path) -> dict[str, Scalar]:
    """The `info` that was saved, and the `step`. Raises InputError if it is damaged or of a newer version."""
    return dict(_read_info(Path(path)).info)


def load_state(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Scalar]:
    """Copies the checkpoint into `tensors` in place and returns `load_info`.

    Nothing is written to `tensors` unless the whole checkpoint is sound and has exactly their names, shapes and types.
    Raises InputError naming the damaged file, or listing every tensor that differs.
    """
    import torch

    path = Path(path)
    record = _read_info(path)
    file_path = path / TENSORS
    if problem := _problem(file_path, record):
        raise _damaged(path, file_path, problem)
    try:
        with file_path.open("rb") as file:
            entries = _read_header(file)
            _compare(path, entries, tensors)
            base = file.tell()
            for name in sorted(entries, key=lambda name: entries[name].offset):
                target = tensors[name].detach()
                direct = target.device.type == "cpu" and target.is_contiguous()
                landing = target if direct else torch.empty(target.shape, dtype=target.dtype)
                file.seek(base + entries[name].offset)
                view = _bytes(landing)
                if file.readinto(view) != len(view):
                    raise _damaged(path, file_path, "it ends early")
                if not direct:
                    target.copy_(landing)
    except OSError as error:
        raise _damaged(path, file_path, error.strerror or str(error)) from error
    return dict(record.info)


@dataclass(frozen=True, slots=True)
class _Record:
    """Contents of info.json; `size` (bytes) and `digest` (SHA-256) are those of the tensor file."""

    size: int
    digest: str
    info: Mapping[str, Scalar]


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor in the file: safetensors' element type, shape, and where its bytes start after the header."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def _layout(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, _Entry, int]]:
    """(name, entry, bytes) in file order: wide elements first, so that every tensor is aligned, then by name."""
    offset = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        yield name, _entry(tensor, offset), size
        offset += size


def _entry(tensor: torch.Tensor, offset: int = 0) -> _Entry:
    return _Entry(_DTYPES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape), offset)


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _create(path: Path) -> IO[bytes]:
    return path.open("xb")


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """Writes and syncs a safetensors file; returns its size and SHA-256."""
    layout = list(_layout(tensors))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, entry, size in layout:
        span = [entry.offset, entry.offset + size]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hasher = hashlib.sha256()
    written = 0
    with _create(path) as file:
        for block in _blocks(text, layout, tensors):
            hasher.update(block)
            file.write(block)
            written += len(block)
        file.flush()
        os.fsync(file.fileno())
    return written, hasher.hexdigest()


def _blocks(
    header: bytes, layout: list[tuple[str, _Entry, int]], tensors: Mapping[str, torch.Tensor]
) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for name, _, _ in layout:
        view = _bytes(tensors[name].detach().cpu().contiguous())
        for start in range(0, len(view), _BLOCK):
            yield view[start : start + _BLOCK]


def _read_header(file: IO[bytes]) -> dict[str, _Entry]:
    """Entries of a file whose hash was checked; leaves it at the first byte after the header."""
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {
        name: _Entry(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _compare(path: Path, entries: Mapping[str, _Entry], tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises InputError listing every difference between the checkpoint's tensors and the model's."""
    wrong: list[str] = []
    for name in sorted({*entries, *tensors}):
        if name not in entries:
            wrong.append(f"{name}: {_entry(tensors[name])} is not in the checkpoint")
        elif name not in tensors:
            wrong.append(f"{name}: {entries[name]} is not in this model")
        elif str(entries[name]) != str(_entry(tensors[name])):
            wrong.append(f"{name}: {entries[name]} in the checkpoint, {_entry(tensors[name])} in this model")
    if wrong:
        count = "1 tensor differs" if len(wrong) == 1 else f"{len(wrong):,} tensors differ"
        if len(wrong) > _LISTED:
            wrong[_LISTED:] = [f"... and {len(wrong) - _LISTED:,} more"]
        raise InputError(
            f"--resume: the checkpoint in {path} was written by another model: {count}; "
            "resume with the plan that wrote it, or choose another --out.\n  " + "\n  ".join(wrong)
        )


def _write_info(path: Path, step: int, size: int, digest: str, info: Mapping[str, Scalar]) -> None:
    body: dict[str, object] = {
        "format": _FORMAT,
        "tensors": {"file": TENSORS, "bytes": size, "sha256": digest},
        "info": {**info, "step": step},
    }
    body["sha256"] = _seal(body)
    with _create(path) as file:
        file.write((json.dumps(body, indent=2, ensure_ascii=False) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def _seal(body: Mapping[str, object]) -> str:
    """SHA-256 of info.json's other fields, so that an edited one is noticed."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _record(path: Path) -> _Record:
    """Reads info.json; ValueError says what is wrong with it."""
    body = json.loads((path / INFO).read_bytes())
    if not isinstance(body, dict):
        raise ValueError("it is not a JSON object")
    version = body.get("format")
    if isinstance(version, int) and version > _FORMAT:
        raise InputError(
            f"{path / INFO} has checkpoint format {version}, this dsv3c reads {_FORMAT}; "
            "resume with the version that wrote it."
        )
    if body.pop("sha256", None) != _seal(body):
        raise ValueError("its hash does not match")
    return _Record(body["tensors"]["bytes"], body["tensors"]["sha256"], body["info"])


def _read_info(path: Path) -> _Record:
    step_of(path)
    try:
        return _record(path)
    except FileNotFoundError as error:
        raise InputError(f"there is no checkpoint in {path}.") from error
    except OSError as error:
        raise InputError(f"cannot read {path / INFO}: {error.strerror}.") from error
    except ValueError as error:
        unreadable = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
        raise _damaged(path, path / INFO, "it is not JSON" if unreadable else str(error)) from error


def _problem(file_path: Path, record: _Record) -> str | None:
    """Why the tensor file is not the one that was written, or None."""
    try:
        size = file_path.stat().st_size
        if size != record.size:
            return f"it has {size:,} bytes of {record.size:,}"
        hasher = hashlib.sha256()
        with file_path.open("rb") as file:
            while block := file.read(_BLOCK):
                hasher.update(block)
    except OSError as error:
        return error.strerror or str(error)
    return None if hasher.hexdigest() == record.digest else "its hash does not match"


def _damaged(path: Path, file_path: Path, why: str) -> InputError:
    """The error for a damaged file, with the newest older checkpoint that is whole, if any."""
    for older in reversed(states(path.parent.parent)):
        if step_of(older) < step_of(path) and _whole(older):
            advice = f"{older} is whole: delete {path} to resume from it"
            break
    else:
        advice = "there is no older one that is whole: train again without --resume"
    return InputError(f"--resume: {file_path} is damaged ({why}); {advice}.")


def _whole(path: Path) -> bool:
    try:
        return _problem(path / TENSORS, _record(path)) is None
    except (OSError, ValueError, InputError):
        return False


def _sync_folder(folder: Path) -> None:
    """Makes renames in `folder` durable, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def _failed(folder: Path, step: int, error: OSError) -> WorkError:
    last: Path | None = None
    with contextlib.suppress(InputError):
        last = latest_state(folder.parent)
    rest = f"the one of step {step_of(last)} is untouched" if last is not None else "there is no earlier one"
    return WorkError(
        f"cannot write the checkpoint of step {step} to {folder}: {error.strerror or error}; {rest}. "
        "Make room or choose another --out, then continue with --resume."
    )


def _undo(building: Path, aside: Path, final: Path) -> None:
    """After a failed save: no leftovers, and the checkpoint that was being replaced back in its place."""
    shutil.rmtree(building, ignore_errors=True)
    with contextlib.suppress(OSError):
        if aside.exists() and not final.exists():
            os.rename(aside, final)


def _retire(path: Path) -> None:
    """Deletes a checkpoint so that it is never seen half-deleted."""
    if path.exists():
        grave = path.with_name(f".trash-{path.name}-{os.getpid()}")
        os.rename(path, grave)
        shutil.rmtree(grave, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Deletes what interrupted saves and deletions left, and puts back what an interrupted replacement set aside."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith((".tmp-", ".trash-")):
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix == ".old" and _NAME.fullmatch(path.name):
            if path.with_suffix("").exists():
                _retire(path)
            else:
                os.rename(path, path.with_suffix(""))


def _prune(folder: Path, step: int, keep: int) -> None:
    """Deletes what was replaced and all but the newest `keep` up to `step`; a failure here loses nothing."""
    with contextlib.suppress(OSError, InputError):
        _sweep(folder)
        current = [path for path in states(folder.parent) if step_of(path) <= step]
        for path in current[: -max(keep, 1)]:
            _retire(path)
