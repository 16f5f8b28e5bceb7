"""Continue a prompt and hand out the text as it becomes certain, however tokens cut its characters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dsv3c.errors import InputError
from dsv3c.runtime.session import Session
from dsv3c.runtime.tokenizer import Tokenizer, load_tokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT = 8
"""Tokens decoded again before each new one: more than one character or one word is made of."""


@dataclass(frozen=True, slots=True)
class Generated:
    """A continuation: the prompt's tokens, the new ones, their text (None without a tokenizer), and why it ended.

    `reason`: `length` (as many tokens as asked for), `end` (the model ended the document; that token is the last of
    `tokens`) or `stop` (the stop text came up; `text` ends before it).
    """

    prompt: list[int]
    tokens: list[int]
    text: str | None
    reason: str


def generate_text(session: Session, prompt: str | Sequence[int], *, max_new_tokens: int = 64, temperature: float = 0.0,
                  top_p: float = 1.0, stop: str | None = None, seed: int = 0,
                  tokenizer: str | Path | Tokenizer | None = None,
                  on_text: Callable[[str], None] | None = None) -> Generated:  # fmt: skip
    """Continue text or tokens; `on_text` gets every piece of the text as soon as it is certain.

    `tokenizer`: one, a tokenizer.json, a folder with one, or `bytes`. Text needs it; tokens do without, where it is
    absent or in a folder that has none: then `on_text` gets the numbers, separated by commas. An empty text starts a
    new document. Raises InputError for a missing tokenizer and for what `Session.stream` refuses.
    """
    words = _tokenizer(tokenizer, needed=isinstance(prompt, str) or stop is not None)
    if isinstance(prompt, str):
        assert words is not None
        given = words.encode(prompt) or [words.eos]
    else:
        given = list(prompt)
    _check_vocabulary(given, session.config.vocab_size, words if isinstance(prompt, str) else None)
    out = on_text or _ignore
    shown = Stream(words, given, stop or "") if words is not None else None
    tokens: list[int] = []
    reason = "length"
    columns = session.stream(torch.tensor([given], dtype=torch.long), max_new_tokens, temperature, top_p, seed=seed)
    for column in columns:
        token = int(column[0])
        tokens.append(token)
        if shown is None or words is None:
            out(f"{',' if len(tokens) > 1 else ''}{token}")
            continue
        if token == words.eos:
            reason = "end"
            break
        if piece := shown.push(token):
            out(piece)
        if shown.stopped:
            reason = "stop"
            break
    if shown is not None and (piece := shown.finish()):
        out(piece)
        reason = "stop" if shown.stopped else reason
    return Generated(given, tokens, None if shown is None else shown.text, reason)


def _check_vocabulary(tokens: Sequence[int], size: int, words: Tokenizer | None) -> None:
    """Refuse tokens that the model has not; `words` is where they come from, None if the user gave them."""
    outside = next((t for t in tokens if not 0 <= t < size), None)
    if outside is not None:
        advice = "" if words is None else f"; {words.name} is another model's tokenizer, choose by --tokenizer"
        raise InputError(f"token {outside} is outside the vocabulary of {size}{advice}")


def _ignore(piece: str) -> None:
    pass


def _tokenizer(source: str | Path | Tokenizer | None, needed: bool) -> Tokenizer | None:
    if isinstance(source, str | Path):
        absent = Path(source).is_dir() and not (Path(source) / "tokenizer.json").is_file()
        if absent and needed:
            raise InputError(f"{source}: holds no tokenizer.json; name one with --tokenizer, or give --tokens")
        return None if absent else load_tokenizer(source)
    if source is None and needed:
        raise InputError("a text needs a tokenizer: name one with --tokenizer (a tokenizer.json, or bytes)")
    return source


@dataclass
class Stream:
    """Turns tokens into text piece by piece; the pieces together are the text of all tokens, up to `stop`.

    Held back are a character whose bytes are not all there yet, and what may be the beginning of `stop`. `before`:
    the tokens of the prompt, since some tokenizers write a token differently at the beginning of a text.
    """

    tokenizer: Tokenizer
    before: Sequence[int]
    stop: str = ""
    text: str = ""
    stopped: bool = False
    _ids: list[int] = field(init=False)  # the window that is decoded
    _known: int = field(init=False, default=0)  # its characters that were handed on
    _held: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self._ids = list(self.before[-_CONTEXT:])
        self._known = len(self.tokenizer.decode(self._ids).rstrip(_REPLACEMENT))

    def push(self, token: int) -> str:
        """The text that has become certain with this token; nothing any more once `stopped`."""
        if self.stopped:
            return ""
        self._ids.append(token)
        whole = self.tokenizer.decode(self._ids)
        certain = whole.rstrip(_REPLACEMENT)
        piece = certain[self._known :]
        self._known = max(self._known, len(certain))
        if len(certain) == len(whole) and len(self._ids) >= 2 * _CONTEXT:
            # Nothing is open: the window moves on, so that the work per token stays bounded.
            self._ids = self._ids[-_CONTEXT:]
            self._known = len(self.tokenizer.decode(self._ids))
        return self._hand_out(piece, last=False)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        if self.stopped:
            return ""
        piece = self.tokenizer.decode(self._ids)[self._known :]
        self._known += len(piece)
        return self._hand_out(piece, last=True)

    def _hand_out(self, piece: str, last: bool) -> str:
        self._held += piece
        if self.stop and (at := self._held.find(self.stop)) >= 0:
            piece, self._held, self.stopped = self._held[:at], "", True
        else:
            keep = 0 if last or not self.stop else _overlap(self._held, self.stop)
            cut = len(self._held) - keep
            piece, self._held = self._held[:cut], self._held[cut:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
