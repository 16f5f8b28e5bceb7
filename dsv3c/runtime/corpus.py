"""Which text files a run reads, in which order, and their text in pieces that fit in memory."""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3c.errors import InputError, WorkError

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while a long work runs."""
Note = Callable[[str], None]
"""Called with one line that the user should see."""

PIECE_CHARACTERS = 1 << 20
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """One UTF-8 text file: `size` in bytes, `sha256` of its content in hex."""

    path: Path
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents of a run in their fixed order."""

    documents: tuple[Document, ...]

    @property
    def size(self) -> int:
        """Bytes of text in all."""
        return sum(document.size for document in self.documents)

    @property
    def digest(self) -> str:
        """A hash of the contents and their order, whatever the files are called."""
        return hashlib.sha256("\n".join(d.sha256 for d in self.documents).encode()).hexdigest()

    def texts(self) -> Iterator[str]:
        """The text of every document in order, long ones in pieces; see `read_pieces`."""
        for document in self.documents:
            yield from read_pieces(document)


def scan(paths: Sequence[str | Path], note: Note | None = None, progress: Progress | None = None) -> Corpus:
    """The text files among `paths`, each file named or, sorted, in and below each folder named.

    In folders, hidden, binary, empty and unreadable files are left out, which `note` is told; a file named twice counts
    once. Raises InputError for a named file that is missing, empty or not UTF-8 text, and for a folder with no text.
    """
    if not paths:
        raise InputError("--data: no file or folder given.")
    listed: list[tuple[Path | None, Path]] = []
    for given in map(Path, paths):
        if given.is_dir():
            listed += [(given, path) for path in _walk(given)]
        elif given.is_file():
            listed.append((None, given))
        else:
            what = "is not a regular file" if given.exists() else "does not exist"
            raise InputError(f"--data: {given} {what}; give text files or folders of them.")
    total = sum(path.stat().st_size for _, path in listed if path.exists())
    seen: set[Path] = set()
    found: list[Document] = []
    used: dict[Path, int] = {Path(given): 0 for given in paths}
    skipped: dict[tuple[Path, str], list[Path]] = {}
    done = 0
    for folder, path in listed:
        real = path.resolve()
        if real in seen:
            if folder is not None:
                used[folder] += 1
            continue
        seen.add(real)
        document = _examine(path)
        if isinstance(document, Document):
            found.append(document)
            done += document.size
            if folder is not None:
                used[folder] += 1
        elif folder is None:
            raise InputError(f"--data: {path} {document}; give UTF-8 text.")
        else:
            kind = document.split(" (")[0]
            skipped.setdefault((folder, kind), []).append(path)
        if progress is not None:
            progress(done, total)
    for (folder, kind), files in skipped.items():
        if note is not None:
            count = "1 file that" if len(files) == 1 else f"{len(files):,} files, each of which"
            note(f"{folder}: left out {count} {kind} ({files[0].name}{', ...' if len(files) > 1 else ''})")
    for given in map(Path, paths):
        if given.is_dir() and not used[given]:
            raise InputError(f"--data: there is no UTF-8 text file in {given}.")
    return Corpus(tuple(found))


def _walk(folder: Path) -> Iterator[Path]:
    """Regular files in and below `folder`, sorted by path; hidden ones and linked folders left out."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(place, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _examine(path: Path) -> Document | str:
    """The document at `path`, or what is wrong with it, as the end of a sentence."""
    hasher = hashlib.sha256()
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                pending = len(decoder.getstate()[0])
                hasher.update(block)
                if 0 in block:
                    return f"is binary (byte {size + block.index(0)} is 0)"
                try:
                    decoder.decode(block)
                except UnicodeDecodeError as error:
                    return f"is not UTF-8 text (byte {size - pending + error.start})"
                size += len(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return f"is not UTF-8 text (cut off at its end, byte {size})"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return Document(path, size, hasher.hexdigest()) if size else "is empty"


def read_pieces(document: Document, characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """The text in pieces of about `characters`, cut where byte-level BPE cuts anyway: before the text after a newline.

    A byte order mark is dropped. Raises WorkError if the file is no longer what `scan` saw.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    hasher = hashlib.sha256()
    text = ""
    try:
        with document.path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                hasher.update(block)
                text += decoder.decode(block)
                while len(text) > characters:
                    cut = _cut(text, characters)
                    yield text[:cut]
                    text = text[cut:]
    except (OSError, UnicodeDecodeError) as error:
        raise WorkError(f"{document.path} can no longer be read as text: {error}.") from error
    if hasher.hexdigest() != document.sha256:
        raise WorkError(f"{document.path} changed while it was being read; start again when it is complete.")
    if text:
        yield text


def _cut(text: str, limit: int) -> int:
    """The last place in text[:limit] between a newline and a visible character, else before a word, else `limit`."""
    at = text.rfind("\n", 0, limit)
    while at >= 0:
        if not text[at + 1].isspace():
            return at + 1
        at = text.rfind("\n", 0, at)
    at = text.rfind(" ", 1, limit)
    while at > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
        at = text.rfind(" ", 1, at)
    return limit
