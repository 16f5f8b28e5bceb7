"""Text files to a memory-mapped token file, and from it the same sequences for the same step on every machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsv3c.errors import InputError, WorkError
from dsv3c.runtime.corpus import PIECE_CHARACTERS, Corpus, Document, Note, Progress, read_pieces, scan
from dsv3c.runtime.tokenizer import Tokenizer, load_tokenizer, train_bpe

if TYPE_CHECKING:
    import torch

__all__ = ["Corpus", "Sampler", "TokenFile", "choose_tokenizer", "documents", "prepare", "scan"]

_BATCH_CHARACTERS = 1 << 22
_HEADER = struct.Struct("<8sIIQQQQ16x")  # magic, version, bytes per token, tokens, documents, vocab_size, eos
_MAGIC, _VERSION = b"dsv3ctok", 1


def choose_tokenizer(
    choice: str | None,
    vocab_size: int,
    corpus: Corpus,
    out_dir: Path | None,
    *,
    resume: bool = False,
    fim: bool = False,
) -> Tokenizer:
    """The tokenizer of a run: `bytes`, a tokenizer.json, or (None) byte-level BPE of `vocab_size` trained on `corpus`.

    It is saved as OUT/tokenizer.json (with out_dir None it is not), where `resume` finds it instead of training it.
    Raises InputError if it has more entries than the model.
    """
    if choice is not None:
        tokenizer = load_tokenizer(choice)
    elif resume and out_dir is not None and (out_dir / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(out_dir)
    else:
        tokenizer = train_bpe(corpus.texts(), vocab_size, fim=fim)
    if tokenizer.vocab_size > vocab_size:
        raise InputError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries but the model's vocab_size is "
            f"{vocab_size}; use a smaller tokenizer or override the model with :vocab_size={tokenizer.vocab_size}."
        )
    if out_dir is not None:
        tokenizer.save(out_dir)
    return tokenizer


@dataclass(frozen=True, slots=True, eq=False)
class TokenFile:
    """A memory-mapped stream of tokens [tokens]; every document is followed by `eos`."""

    path: Path
    ids: npt.NDArray[np.unsignedinteger[npt.NBitBase]]
    documents: int
    vocab_size: int
    eos: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def key(self) -> str:
        """A hash of the contents, the tokenizer and the options that the file was made from."""
        return self.path.stem

    @staticmethod
    def open(path: Path) -> TokenFile:
        """Raises InputError if `path` is not a whole token file of this version."""
        problem = InputError(f"{path} is not a complete token file; delete it and it will be made again.")
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"cannot read the token file {path}: {error.strerror}.") from error
        if len(header) != _HEADER.size:
            raise problem
        magic, version, width, tokens, documents, vocab_size, eos = _HEADER.unpack(header)
        if magic != _MAGIC or version != _VERSION or width not in (2, 4) or size != _HEADER.size + width * tokens:
            raise problem
        ids = np.memmap(path, dtype=f"<u{width}", mode="r", offset=_HEADER.size, shape=(tokens,))
        return TokenFile(path, ids, documents, vocab_size, eos)


def prepare(
    paths: Sequence[str | Path] | Corpus,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    fim_rate: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
    note: Note | None = None,
) -> TokenFile:
    """The token file of `paths`, made in `cache_dir` unless there is one for the same contents, tokenizer and options.

    A share `fim_rate` of the documents, chosen and cut by `seed`, is rearranged to prefix, suffix, middle with the
    tokenizer's marks (DeepSeek-V3 report, section 4.1); documents above PIECE_CHARACTERS are left as they are.
    Memory stays bounded whatever the size of the input. Raises InputError as `scan` does and for a fill-in-the-middle
    rate that is no rate or meets a tokenizer without marks; WorkError if the file cannot be written.
    """
    if not 0.0 <= fim_rate <= 1.0:
        raise InputError(f"the fill-in-the-middle rate is {fim_rate}; it must lie between 0 and 1.")
    if fim_rate and tokenizer.fim is None:
        raise InputError(f"the tokenizer {tokenizer.name} has no fill-in-the-middle tokens; set the rate to 0.")
    corpus = paths if isinstance(paths, Corpus) else scan(paths, note)
    key = [_VERSION, corpus.digest, tokenizer.identity, fim_rate, seed if fim_rate else 0]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
    folder = Path(cache_dir)
    path = folder / f"{name}.tokens"
    if path.is_file():
        try:
            return TokenFile.open(path)
        except InputError:  # damaged: made again below
            pass
    temporary = folder / f".{name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            _write(file, corpus, tokenizer, fim_rate, seed, progress)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _discard(temporary)
        raise WorkError(f"cannot write the token file to {folder}: {error.strerror or error}.") from error
    except BaseException:
        _discard(temporary)
        raise
    return TokenFile.open(path)


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):  # where it could not be created either
        path.unlink(missing_ok=True)


def _write(
    file: IO[bytes], corpus: Corpus, tokenizer: Tokenizer, fim_rate: float, seed: int, progress: Progress | None
) -> None:
    width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
    file.write(bytes(_HEADER.size))
    tokens = 0
    held: list[str | int] = []
    characters = done = 0

    def flush() -> None:
        nonlocal tokens, characters
        encoded = iter(tokenizer.encode_batch([piece for piece in held if isinstance(piece, str)]))
        for piece in held:
            ids = np.asarray(next(encoded) if isinstance(piece, str) else [piece], dtype=f"<u{width}")
            file.write(ids.data)
            tokens += len(ids)
        held.clear()
        characters = 0
        if progress is not None:
            progress(min(done, corpus.size), corpus.size)

    for index, document in enumerate(corpus.documents):
        for piece in _arranged(document, index, tokenizer, fim_rate, seed):
            held.append(piece)
            if isinstance(piece, str):
                characters += len(piece)
                if characters >= _BATCH_CHARACTERS:
                    flush()
        held.append(tokenizer.eos)
        done += document.size
    flush()
    file.seek(0)
    file.write(
        _HEADER.pack(_MAGIC, _VERSION, width, tokens, len(corpus.documents), tokenizer.vocab_size, tokenizer.eos)
    )


def _arranged(document: Document, index: int, tokenizer: Tokenizer, fim_rate: float, seed: int) -> Iterable[str | int]:
    """The document's texts and marks in the order in which they are trained on, without the final eos."""
    draw = random.Random(f"fim {seed} {index}")
    if tokenizer.fim is None or draw.random() >= fim_rate or document.size > PIECE_CHARACTERS:
        return read_pieces(document)
    text = "".join(read_pieces(document))
    first, second = sorted(int(draw.random() * (len(text) + 1)) for _ in range(2))
    begin, hole, end = tokenizer.fim
    return [begin, text[:first], hole, text[second:], end, text[first:second]]


@dataclass(frozen=True, slots=True)
class Sampler:
    """Batches that depend on (seed, step) alone: no state to save, and the same on every mesh.

    The stream is packed without gaps into sequences of `seq` tokens; every epoch visits each once, in its own order.
    """

    file: TokenFile
    seq: int
    global_batch: int
    seed: int

    def __post_init__(self) -> None:
        if self.seq < 1 or self.global_batch < 1:
            raise InputError(f"sequence length {self.seq} and global batch {self.global_batch} must be at least 1.")
        if len(self.file) < self.seq:
            raise InputError(
                f"the data has {len(self.file):,} tokens, but one sequence needs {self.seq:,}; "
                "give more --data or compile with a shorter --seq."
            )

    @property
    def sequences(self) -> int:
        """Sequences in one epoch; the last few tokens that fill none are left out."""
        return len(self.file) // self.seq

    def indices(self, step: int) -> list[int]:
        """Which sequences of the file step `step` (from 1) reads, in order."""
        if step < 1:
            raise ValueError(f"steps count from 1, got {step}")
        first = (step - 1) * self.global_batch
        n = self.sequences
        return [_permuted(p % n, n, self.seed, p // n) for p in range(first, first + self.global_batch)]

    def batch(self, step: int) -> torch.Tensor:
        """int64 [global_batch, seq] for step `step`, counted from 1."""
        import torch

        rows = np.empty((self.global_batch, self.seq), dtype=np.int64)
        for row, index in zip(rows, self.indices(step), strict=True):
            row[:] = self.file.ids[index * self.seq : (index + 1) * self.seq]
        return torch.from_numpy(rows)


_ROUNDS = 6
_MASK = (1 << 64) - 1


def _mixed(x: int) -> int:
    """A 64-bit integer hash (the finalizer of SplitMix64)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _permuted(index: int, n: int, seed: int, epoch: int) -> int:
    """Where a permutation of 0 .. n−1, chosen by (seed, epoch), sends `index`.

    A Feistel network on the next even power of two, walked until it falls inside: nothing to store, whatever n.
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    key = _mixed(_mixed(seed & _MASK) ^ epoch)
    keys = [_mixed((key + turn) & _MASK) for turn in range(_ROUNDS)]
    while True:
        left, right = index >> bits, index & mask
        for round_key in keys:
            left, right = right, left ^ (_mixed(right ^ round_key) & mask)
        index = left << bits | right
        if index < n:
            return index


def documents(tokens: torch.Tensor, eos: int) -> torch.Tensor:
    """int32 [B, S]: the number within its row of each token's document, from 0; an eos belongs to the one it ends."""
    import torch

    ends = (tokens == eos).to(torch.int32)
    return ends.cumsum(dim=-1, dtype=torch.int32) - ends
