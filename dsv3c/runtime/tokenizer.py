"""Text to token numbers and back: raw bytes, a Hugging Face tokenizer.json, or byte-level BPE trained on the data."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dsv3c.errors import InputError, WorkError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Tokenizer

EOS = "<｜end▁of▁sentence｜>"
# Fill-in-the-middle marks (begin, hole, end) in prefix-suffix-middle order: DeepSeek's names first.
FIM_NAMES = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
)
_EOS_NAMES = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[EOS]")
BYTE_VOCABULARY = 257


class Tokenizer(Protocol):
    """What training and sampling need of a tokenizer; ids lie in 0 .. vocab_size − 1."""

    @property
    def name(self) -> str:
        """How messages call it: `bytes` or the file it came from."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eos(self) -> int:
        """The id that ends a document."""
        ...

    @property
    def fim(self) -> tuple[int, int, int] | None:
        """Ids of the fill-in-the-middle marks (begin, hole, end), if the tokenizer has all three."""
        ...

    @property
    def identity(self) -> str:
        """A hash of everything that determines `encode`, for cache keys."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; no mark is added, and the name of a special token in the text stays text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores where the tokenizer can."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens and ids past the vocabulary give nothing, broken UTF-8 gives U+FFFD."""
        ...

    def save(self, folder: Path) -> None:
        """Writes FOLDER/tokenizer.json and tokenizer_config.json, which `load_tokenizer` and transformers read."""
        ...


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """Token b is byte b of the UTF-8 text; token 256 ends a document."""

    name: str = "bytes"

    @property
    def vocab_size(self) -> int:
        return BYTE_VOCABULARY

    @property
    def eos(self) -> int:
        return 256

    @property
    def fim(self) -> tuple[int, int, int] | None:
        return None

    @property
    def identity(self) -> str:
        return "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")

    def save(self, folder: Path) -> None:
        """As byte-level BPE with no merges, whose ids are the bytes."""
        import tokenizers

        vocabulary = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
        body = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
        body.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        body.decoder = tokenizers.decoders.ByteLevel()
        body.add_special_tokens([tokenizers.AddedToken(EOS, special=True, normalized=False)])
        _save(folder, body, EOS)


class HuggingFaceTokenizer:
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, body: _Tokenizer, eos: str, name: str) -> None:
        """`eos` is the name of the token that ends a document; it must be in the vocabulary."""
        vocabulary = body.get_vocab(with_added_tokens=True)
        if eos not in vocabulary:
            raise InputError(f"{name}: the token '{eos}' that ends a document is not in the vocabulary.")
        body.encode_special_tokens = True
        body.no_truncation()
        body.no_padding()
        self._body = body
        self._name = name
        self._eos_name = eos
        self._eos = vocabulary[eos]
        self._vocab_size = max(vocabulary.values()) + 1
        self._fim: tuple[int, int, int] | None = None
        for begin, hole, end in FIM_NAMES:
            if begin in vocabulary and hole in vocabulary and end in vocabulary:
                self._fim = (vocabulary[begin], vocabulary[hole], vocabulary[end])
                break
        self._identity = hashlib.sha256(f"{self._eos}\n{body.to_str()}".encode()).hexdigest()

    @property
    def name(self) -> str:
        return self._name

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def eos(self) -> int:
        return self._eos

    @property
    def fim(self) -> tuple[int, int, int] | None:
        return self._fim

    @property
    def identity(self) -> str:
        return self._identity

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            found = self._body.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:  # lone surrogates, which a command line makes of bytes that are not UTF-8
            raise InputError("the text is not valid UTF-8; give it in UTF-8, or as --tokens.") from error
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._body.decode(list(ids), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        _save(folder, self._body, self._eos_name)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer called `bytes`, or that of a tokenizer.json or of a folder holding one.

    The end-of-document token is `eos_token` of the tokenizer_config.json beside it, else the first usual name found.
    Raises InputError if the file is missing, is not a tokenizer, or has no end-of-document token.
    """
    if str(source) == "bytes":
        return ByteTokenizer()
    import tokenizers

    path = Path(source)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"--tokenizer: there is no file {path}; give 'bytes' or a Hugging Face tokenizer.json.")
    try:
        body = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for a malformed file
        raise InputError(f"{path} is not a Hugging Face tokenizer.json: {error}.") from error
    known = body.get_vocab(with_added_tokens=True)
    eos = _configured_eos(path.with_name("tokenizer_config.json"))
    if eos is None:
        eos = next((name for name in _EOS_NAMES if name in known), None)
    if eos is None:
        raise InputError(
            f"{path} does not say which token ends a document; "
            f"name it as eos_token in {path.parent}/tokenizer_config.json."
        )
    return HuggingFaceTokenizer(body, eos, str(path))


def train_bpe(texts: Iterable[str], vocab_size: int, *, fim: bool = False) -> HuggingFaceTokenizer:
    """Byte-level BPE of at most `vocab_size` entries learnt from `texts`; equal texts give equal files.

    Token 0 ends a document; with `fim`, tokens 1 to 3 are the fill-in-the-middle marks.
    Raises InputError if the vocabulary cannot hold the 256 bytes and these marks.
    """
    import tokenizers

    special = [EOS, *(FIM_NAMES[0] if fim else ())]
    if vocab_size < 256 + len(special):
        raise InputError(
            f"the model's vocab_size is {vocab_size}, but byte-level BPE needs at least {256 + len(special)}; "
            "use a larger vocab_size."
        )
    body = tokenizers.Tokenizer(tokenizers.models.BPE())
    body.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    body.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    body.train_from_iterator(_groups(texts), trainer)
    return HuggingFaceTokenizer(body, EOS, "the trained tokenizer")


def _groups(texts: Iterable[str], characters: int = 1 << 22) -> Iterator[list[str]]:
    """Texts in lists of a few million characters: enough for all cores, little enough for memory."""
    group: list[str] = []
    held = 0
    for text in texts:
        group.append(text)
        held += len(text)
        if held >= characters:
            yield group
            group, held = [], 0
    if group:
        yield group


def _byte_symbols() -> list[str]:
    """The character by which byte-level BPE writes each byte: its Latin-1 one if printable, else the next from 256."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols: list[str] = []
    replaced = 0
    for byte in range(256):
        if byte in printable:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(256 + replaced))
            replaced += 1
    return symbols


def _configured_eos(path: Path) -> str | None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.") from error
    eos = config.get("eos_token") if isinstance(config, dict) else None
    if isinstance(eos, dict):
        eos = eos.get("content")
    return eos if isinstance(eos, str) else None


def _save(folder: Path, body: _Tokenizer, eos: str) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "clean_up_tokenization_spaces": False}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n"),
            ("tokenizer.json", body.to_str(pretty=True)),
        ):
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, folder / name)
    except OSError as error:
        raise WorkError(f"cannot write the tokenizer to {folder}: {error.strerror or error}.") from error
