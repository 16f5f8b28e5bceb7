"""Training checkpoints that are either whole or absent, whenever a process dies, and that any mesh reads.

`OUT/checkpoints/step-000123/` holds one tensor file per rank and `info.json`, which says where each number of each
weight lies: by weight and position in it, not by rank or group, so that other ranks can pick out what is theirs. All
is written and synced in a hidden folder, the record last, which is then renamed. A checkpoint of the same step that is
being replaced stands aside as `step-000123.old` and counts until the new one is in place; so there is no moment
without a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dsv3c.errors import InputError, WorkError
from dsv3c.runtime.checkpoint_files import (
    INFO,
    Contents,
    File,
    FileError,
    Piece,
    PieceReader,
    Record,
    Scalar,
    Stored,
    file_name,
    file_problem,
    read_record,
    record_of,
    write_pieces,
    write_record,
)
from dsv3c.runtime.peers import ALONE, Peers, together

if TYPE_CHECKING:
    import torch

FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{6,})(\.old)?")
_LISTED = 100

State = Contents | Mapping[str, "torch.Tensor"]
"""What is saved or loaded: whole tensors by name, or this rank's pieces of them."""


def save_state(
    out_dir: str | Path,
    step: int,
    tensors: State,
    info: Mapping[str, Scalar],
    *,
    keep: int = 2,
    peers: Peers = ALONE,
) -> Path:
    """Writes the checkpoint of `step` and returns its folder; deletes earlier ones beyond the newest `keep`.

    Tensors may lie on any device and are written one at a time, without a copy where they are contiguous on the CPU.
    With `peers` all ranks call this together; each writes its pieces, and rank 0 the record when all are done.
    Raises InputError if `out_dir` is not a folder, WorkError if it cannot be written, on every rank the same; earlier
    checkpoints then stay.
    """
    contents = tensors if isinstance(tensors, Contents) else Contents.of(tensors)
    folder = Path(out_dir) / FOLDER
    final = folder / f"step-{step:06d}"
    aside = folder / f"{final.name}.old"
    building = folder / f".tmp-{final.name}-{os.getpid()}"

    def begin() -> str:
        _make(folder, step, out_dir)
        with _saving(folder, step):
            _sweep(folder)
            building.mkdir()
        return building.name

    def write() -> str:
        with _saving(folder, step):
            if not building.is_dir():
                raise OSError(errno.ENOENT, f"{building.name}, which rank 0 made, is not there; all ranks must see it")
            file, places = write_pieces(building / file_name(peers.rank, peers.size), contents)
        return json.dumps([[file.name, file.size, file.digest], places])

    def finish() -> str:
        written = [(File(*file), [tuple(p) for p in places]) for file, places in map(json.loads, wrote)]
        record = record_of(contents, written, {**info, "step": step})
        with _saving(folder, step):
            write_record(building / INFO, record)
            _sync_folder(building)
            if final.exists():
                os.rename(final, aside)
            os.rename(building, final)
            _sync_folder(folder)
        return ""

    try:
        building = folder / together(peers, _on_first(peers, begin))[0]
        wrote = together(peers, write)
        together(peers, _on_first(peers, finish))
    except BaseException:
        if peers.rank == 0:
            _undo(building, aside, final)
        raise
    if peers.rank == 0:
        _prune(folder, step, keep)
    return final


def _on_first(peers: Peers, act: Callable[[], str]) -> Callable[[], str]:
    """`act` on rank 0, nothing elsewhere."""
    return act if peers.rank == 0 else lambda: ""


@contextlib.contextmanager
def _saving(folder: Path, step: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _failed(folder, step, error) from error


def _make(folder: Path, step: int, out_dir: str | Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--out: {out_dir} is not a folder; name a new or an existing folder.") from error
    except OSError as error:
        raise _failed(folder, step, error) from error


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
    """The `info` that was saved, and the `step`. Raises InputError if it is damaged or of another version."""
    return dict(_read_info(Path(path)).info)


def load_state(path: str | Path, tensors: State, *, peers: Peers = ALONE) -> dict[str, Scalar]:
    """Copies the checkpoint, whatever mesh wrote it, into `tensors` in place and returns `load_info`.

    Nothing is written to `tensors` unless the whole checkpoint is sound and has exactly their names, shapes and types.
    With `peers` all ranks call this together: they share the work of hashing the files, and each reads its pieces.
    Raises InputError naming the damaged file, or listing every tensor that differs, on every rank the same.
    """
    contents = tensors if isinstance(tensors, Contents) else Contents.of(tensors)
    path = Path(path)
    record = _sound_record(path, peers)
    _compare(path, record.stored, contents.stored)

    def read() -> str:
        with PieceReader(path, record) as reader, _reading(path):
            for piece in sorted((*contents.pieces, *contents.copies), key=reader.first_file):
                reader.read(piece)
        return ""

    together(peers, read)
    return dict(record.info)


class SavedState:
    """A checkpoint to read single tensors from, all hashes checked. Raises InputError naming what is damaged."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._record = _sound_record(self.path, ALONE)
        self.stored: Mapping[str, Stored] = self._record.stored

    def tensor(self, name: str) -> torch.Tensor:
        """A whole tensor by its name in the checkpoint, read now; KeyError if there is none of that name."""
        import torch

        stored = self.stored[name]
        tensor = torch.empty(stored.shape, dtype=stored.torch_dtype)
        with PieceReader(self.path, self._record) as reader, _reading(self.path):
            reader.read(Piece(name, 0, tensor))
        return tensor

    def require(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """Raises InputError listing those of these tensors (name: shape) that are missing or of another shape."""
        types = {n: self.stored[n].dtype if n in self.stored else "F32" for n in wanted}
        have = {n: s for n, s in self.stored.items() if n in wanted}
        _compare(self.path, have, {n: Stored(types[n], tuple(shape)) for n, shape in wanted.items()})


def _sound_record(path: Path, peers: Peers) -> Record:
    """The record, once every file of the checkpoint has the hash that it should; ranks divide the files."""
    records: list[Record] = []

    def read() -> str:
        records.append(_read_info(path))
        return ""

    together(peers, read)
    (record,) = records
    mine = range(peers.rank, len(record.files), peers.size)
    problems = [(i, problem) for i in mine if (problem := file_problem(path, record.files[i]))]
    found = [tuple(p) for text in peers.share(json.dumps(problems)) for p in json.loads(text)]
    if found:
        index, problem = min(found)

        def tell() -> str:
            raise _damaged(path, path / record.files[index].name, problem)

        together(peers, _on_first(peers, tell))
    return record


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileError as error:
        raise _damaged(path, error.path, error.why) from error


def _compare(path: Path, saved: Mapping[str, Stored], model: Mapping[str, Stored]) -> None:
    """Raises InputError listing every difference between the checkpoint's tensors and the model's."""
    wrong: list[str] = []
    for name in sorted({*saved, *model}):
        if name not in saved:
            wrong.append(f"{name}: {model[name]} is not in the checkpoint")
        elif name not in model:
            wrong.append(f"{name}: {saved[name]} is not in this model")
        elif saved[name] != model[name]:
            wrong.append(f"{name}: {saved[name]} in the checkpoint, {model[name]} in this model")
    if wrong:
        count = "1 tensor differs" if len(wrong) == 1 else f"{len(wrong):,} tensors differ"
        if len(wrong) > _LISTED:
            wrong[_LISTED:] = [f"... and {len(wrong) - _LISTED:,} more"]
        raise InputError(
            f"--resume: the checkpoint in {path} was written by another model: {count}; "
            "resume with the plan that wrote it, or choose another --out.\n  " + "\n  ".join(wrong)
        )


def _read_info(path: Path) -> Record:
    step_of(path)
    try:
        return read_record(path / INFO)
    except FileNotFoundError as error:
        raise InputError(f"there is no checkpoint in {path}.") from error
    except OSError as error:
        raise InputError(f"cannot read {path / INFO}: {error.strerror}.") from error
    except ValueError as error:
        unreadable = isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
        raise _damaged(path, path / INFO, "it is not JSON" if unreadable else str(error)) from error


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
        return all(file_problem(path, file) is None for file in read_record(path / INFO).files)
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


__all__ = [
    "FOLDER", "INFO", "SavedState", "Scalar", "State", "discard_states", "latest_state", "load_info", "load_state",
    "save_state", "states", "step_of",
]  # fmt: skip
