"""Write files so that a reader never sees half of one, and say clearly why a file cannot be read or written."""

from __future__ import annotations

import os
from pathlib import Path

from dsv3c.errors import InputError, WorkError


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` into the file at once: under a temporary name beside it, then renamed; folders are made.

    A device or a pipe is written to as it is. Raises WorkError saying why it cannot be written; then nothing is left
    behind and an old file is intact.
    """
    target = Path(path)
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists() and not target.is_file() and not target.is_dir():
            target.write_bytes(data)
            return
        try:
            with open(work, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(work, target)
        finally:
            work.unlink(missing_ok=True)
    except OSError as error:
        raise WorkError(f"{target}: cannot be written: {reason(error)}") from None


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Like `write_bytes`, UTF-8 with newlines as they are."""
    write_bytes(path, text.encode())


def read_bytes(path: str | os.PathLike[str], what: str) -> bytes:
    """The contents of a file the user named; InputError calling it `what` if it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; give the path of {what}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory; give the path of {what}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from None


def read_text(path: str | os.PathLike[str], what: str) -> str:
    """Like `read_bytes`, decoded; InputError if it is not UTF-8 text."""
    try:
        return read_bytes(path, what).decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not text; give the path of {what}") from None


def reason(error: OSError) -> str:
    """The system's words for an error, in lower case."""
    return (error.strerror or str(error)).lower()
