"""The files of a checkpoint: pieces of tensors in safetensors, and the record that says where each number lies."""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, NamedTuple

from dsv3c.errors import InputError

if TYPE_CHECKING:
    import torch

Scalar = str | int | float | bool | None

INFO = "info.json"
_FORMAT = 2
_BLOCK = 1 << 24

# safetensors' names of element types
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
}  # fmt: skip
_NAMES = {code: name for name, code in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """A whole tensor of a checkpoint: safetensors' element type, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Stored:
        return cls(code_of(tensor.dtype), tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return getattr(torch, _NAMES[self.dtype])  # type: ignore[no-any-return]

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


def code_of(dtype: torch.dtype) -> str:
    """safetensors' name of an element type."""
    return _DTYPES[str(dtype).removeprefix("torch.")]


class Piece(NamedTuple):
    """The numbers of the tensor `name` from `start` on, counted over the whole flattened tensor, held in `tensor`."""

    name: str
    start: int
    tensor: torch.Tensor

    @property
    def stop(self) -> int:
        return self.start + self.tensor.numel()


@dataclass(frozen=True, slots=True)
class Contents:
    """What a checkpoint holds: `stored`, every tensor of the model on all ranks; `pieces`, those of this rank.

    The pieces of all ranks cover every tensor exactly once. `copies` are pieces that another rank saves, but that are
    read here too. `mesh` is written down for the reader.
    """

    stored: Mapping[str, Stored]
    pieces: tuple[Piece, ...]
    copies: tuple[Piece, ...] = ()
    mesh: str = ""

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Contents:
        """Whole tensors on one rank."""
        return cls({n: Stored.of(t) for n, t in tensors.items()}, tuple(Piece(n, 0, t) for n, t in tensors.items()))


class Place(NamedTuple):
    """Numbers `start` to `stop` of a tensor lie in file `file` of the record, from byte `at` on."""

    start: int
    stop: int
    file: int
    at: int


@dataclass(frozen=True, slots=True)
class File:
    """A tensor file as it was written: its name, bytes and SHA-256."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Record:
    """Contents of info.json: the files, every tensor with its places in ascending order, and the user's facts."""

    files: tuple[File, ...]
    stored: Mapping[str, Stored]
    places: Mapping[str, tuple[Place, ...]]
    mesh: str
    info: Mapping[str, Scalar]


def file_name(rank: int, size: int) -> str:
    """The tensor file of one rank of `size`."""
    return "state.safetensors" if size == 1 else f"state-{rank:05d}-of-{size:05d}.safetensors"


# ---- writing --------------------------------------------------------------------------------------------------------


def write_pieces(path: Path, contents: Contents) -> tuple[File, list[tuple[str, int, int, int]]]:
    """Writes and syncs a safetensors file of this rank's pieces, one in memory at a time.

    A piece that is a whole tensor keeps its name and shape, any other is called `NAME[start:stop]`. Returns the file
    and (name, start, stop, first byte) of every piece. Wide elements come first, so that all are aligned.
    """
    pieces = sorted(contents.pieces, key=lambda p: (-p.tensor.element_size(), p.name, p.start))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: list[int] = []
    end = 0
    for piece in pieces:
        stored = contents.stored[piece.name]
        whole = tuple(piece.tensor.shape) == stored.shape
        name = piece.name if whole else f"{piece.name}[{piece.start}:{piece.stop}]"
        shape = list(stored.shape) if whole else [piece.tensor.numel()]
        offsets.append(end)
        end += piece.tensor.numel() * piece.tensor.element_size()
        header[name] = {"dtype": code_of(piece.tensor.dtype), "shape": shape, "data_offsets": [offsets[-1], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hasher = hashlib.sha256()
    size = 0
    with _create(path) as file:
        for block in _blocks(text, pieces):
            hasher.update(block)
            file.write(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    base = 8 + len(text)
    places = [(p.name, p.start, p.stop, base + offset) for p, offset in zip(pieces, offsets, strict=True)]
    return File(path.name, size, hasher.hexdigest()), places


def _blocks(header: bytes, pieces: Iterable[Piece]) -> Iterator[bytes | memoryview]:
    yield len(header).to_bytes(8, "little") + header
    for piece in pieces:
        view = _bytes(piece.tensor.detach().cpu().contiguous())
        for start in range(0, len(view), _BLOCK):
            yield view[start : start + _BLOCK]


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _create(path: Path) -> IO[bytes]:
    return path.open("xb")


def record_of(contents: Contents, written: Iterable[tuple[File, Iterable[tuple[str, int, int, int]]]],
              info: Mapping[str, Scalar]) -> Record:  # fmt: skip
    """The record of a checkpoint of which each rank wrote a file, in order of ranks.

    Raises ValueError unless the pieces cover every tensor exactly once.
    """
    places: dict[str, list[Place]] = {name: [] for name in sorted(contents.stored)}
    files: list[File] = []
    for file, pieces in written:
        for name, start, stop, at in pieces:
            places[name].append(Place(start, stop, len(files), at))
        files.append(file)
    for name, found in places.items():
        found.sort()
        ends = [0, *(p.stop for p in found)]
        if not found or [p.start for p in found] != ends[:-1] or ends[-1] != _numbers(contents.stored[name].shape):
            spans = ", ".join(f"[{p.start}:{p.stop}] by rank {p.file}" for p in found[:20])
            raise ValueError(f"the ranks do not cover {name} {contents.stored[name]} exactly once: {spans or 'none'}")
    return Record(tuple(files), contents.stored, {n: tuple(p) for n, p in places.items()}, contents.mesh, info)


def _numbers(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def write_record(path: Path, record: Record) -> None:
    """Writes and syncs info.json, sealed with a hash of itself."""
    body: dict[str, object] = {
        "format": _FORMAT,
        "mesh": record.mesh,
        "files": {f.name: {"bytes": f.size, "sha256": f.digest} for f in record.files},
        "tensors": {
            name: {
                "dtype": record.stored[name].dtype,
                "shape": list(record.stored[name].shape),
                "pieces": [list(p) for p in places],
            }
            for name, places in record.places.items()
        },
        "info": dict(record.info),
    }
    body["sha256"] = _seal(body)
    with _create(path) as file:
        file.write(_show(body).encode())
        file.flush()
        os.fsync(file.fileno())


def _show(body: Mapping[str, object]) -> str:
    """JSON with one file, tensor or fact a line."""

    def text(value: object) -> str:
        return json.dumps(value, ensure_ascii=False)

    lines = []
    for key, value in body.items():
        shown = text(value)
        if isinstance(value, dict) and value:
            shown = "{\n" + ",\n".join(f"    {text(k)}: {text(v)}" for k, v in value.items()) + "\n  }"
        lines.append(f"  {text(key)}: {shown}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _seal(body: Mapping[str, object]) -> str:
    """SHA-256 of info.json's other fields, so that an edited one is noticed."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# ---- reading --------------------------------------------------------------------------------------------------------


def read_record(path: Path) -> Record:
    """Reads the info.json at `path`; ValueError says what is wrong with it."""
    body = json.loads(path.read_bytes())
    if not isinstance(body, dict):
        raise ValueError("it is not a JSON object")
    version = body.get("format")
    if isinstance(version, int) and version != _FORMAT:
        raise InputError(
            f"{path} has checkpoint format {version}, this dsv3c reads {_FORMAT}; "
            "resume with the version that wrote it."
        )
    if body.pop("sha256", None) != _seal(body):
        raise ValueError("its hash does not match")
    files = tuple(File(name, f["bytes"], f["sha256"]) for name, f in body["files"].items())
    stored = {name: Stored(t["dtype"], tuple(t["shape"])) for name, t in body["tensors"].items()}
    places = {name: tuple(Place(*p) for p in t["pieces"]) for name, t in body["tensors"].items()}
    return Record(files, stored, places, body["mesh"], body["info"])


def file_problem(folder: Path, file: File) -> str | None:
    """Why the tensor file is not the one that was written, or None."""
    path = folder / file.name
    try:
        size = path.stat().st_size
        if size != file.size:
            return f"it has {size:,} bytes of {file.size:,}"
        hasher = hashlib.sha256()
        with path.open("rb") as opened:
            while block := opened.read(_BLOCK):
                hasher.update(block)
    except OSError as error:
        return error.strerror or str(error)
    return None if hasher.hexdigest() == file.digest else "its hash does not match"


class FileError(Exception):
    """A tensor file, named first, could not be read for the reason given second."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path}: {why}")
        self.path, self.why = path, why


@dataclass
class PieceReader(AbstractContextManager["PieceReader"]):
    """Reads any numbers of any tensor of a checkpoint whose hashes were checked, one file open at a time."""

    folder: Path
    record: Record
    _open: IO[bytes] | None = field(default=None, init=False)
    _at: int = field(default=-1, init=False)

    def first_file(self, piece: Piece) -> tuple[int, int]:
        """File and byte where the piece begins, to read in the order of the disk."""
        places = self.record.places[piece.name]
        if not places:
            return (0, 0)
        place = places[max(0, bisect_right(places, piece.start, key=lambda p: p.start) - 1)]
        return place.file, place.at

    def read(self, piece: Piece) -> None:
        """Fills the piece's tensor. Raises FileError if a file ends early or cannot be read."""
        import torch

        target = piece.tensor.detach()
        direct = target.device.type == "cpu" and target.is_contiguous()
        landing = target if direct else torch.empty(target.shape, dtype=target.dtype)
        view, width = _bytes(landing), target.element_size()
        for place in self.record.places[piece.name]:
            first, last = max(place.start, piece.start), min(place.stop, piece.stop)
            if first < last:
                into = view[(first - piece.start) * width : (last - piece.start) * width]
                self._fill(place.file, place.at + (first - place.start) * width, into)
        if not direct:
            target.copy_(landing)

    def _fill(self, file: int, at: int, into: memoryview) -> None:
        path = self.folder / self.record.files[file].name
        try:
            if file != self._at or self._open is None:
                self._close()
                self._open, self._at = path.open("rb"), file
            self._open.seek(at)
            if self._open.readinto(into) != len(into):  # type: ignore[attr-defined]
                raise FileError(path, "it ends early")
        except OSError as error:
            raise FileError(path, error.strerror or str(error)) from error

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close()
