"""Generation: pieces of text add up to the text of all tokens, stops are exact, and the tokens are the session's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import SMALL

import dsv3c
from dsv3c import cli
from dsv3c.errors import InputError
from dsv3c.runtime.export import write_hf
from dsv3c.runtime.generate import Generated, Stream, generate_text
from dsv3c.runtime.session import Session
from dsv3c.runtime.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe

BYTES = ByteTokenizer()


def pieces(tokenizer: Tokenizer, before: list[int], tokens: list[int], stop: str = "") -> tuple[list[str], Stream]:
    """What a stream hands out for each token, and at last."""
    stream = Stream(tokenizer, before, stop)
    return [*(stream.push(t) for t in tokens), stream.finish()], stream


# ---- pieces of text -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 255), max_size=60), st.text(max_size=4))
def test_pieces_of_any_bytes_add_up(tokens: list[int], before: str) -> None:
    prompt = BYTES.encode(before.rstrip("\ufffd"))
    found, stream = pieces(BYTES, prompt, tokens)
    assert "".join(found) == stream.text == BYTES.decode(prompt + tokens)[len(BYTES.decode(prompt)) :]


@given(st.text(max_size=30))
def test_no_piece_holds_half_a_character(text: str) -> None:
    text = text.replace("\ufffd", "")
    found, _ = pieces(BYTES, [], list(text.encode()))
    assert "".join(found) == text and not any("\ufffd" in piece for piece in found)
    at = 0
    for character in text:  # each comes with its own last byte, not later
        at += len(character.encode())
        assert found[at - 1] == character


@given(st.text(max_size=40))
def test_pieces_of_trained_tokens_add_up(text: str) -> None:
    tokenizer = train_bpe(["héllo wörld — naïve café " * 4], 300)
    tokens = tokenizer.encode(text)
    found, stream = pieces(tokenizer, tokenizer.encode("a b"), tokens)
    assert "".join(found) == stream.text == tokenizer.decode(tokens)


def test_words_keep_their_space_where_a_tokenizer_drops_the_first() -> None:
    class Words:
        """Writes a space before each word but the first, as SentencePiece tokenizers do."""

        def decode(self, ids: list[int]) -> str:
            return " ".join(f"w{i}" for i in ids)

    found, _ = pieces(Words(), [1, 2], [*range(3, 40)])  # type: ignore[arg-type]
    assert found == [*(f" w{i}" for i in range(3, 40)), ""]


def test_a_prompt_that_ends_inside_a_character_is_completed() -> None:
    euro = list("€".encode())
    assert pieces(BYTES, euro[:2], [euro[2], 33])[0] == ["€", "!", ""]


@given(st.text("ab", max_size=20), st.text("ab", min_size=1, max_size=4))
def test_text_ends_before_the_stop(text: str, stop: str) -> None:
    found, stream = pieces(BYTES, [], list(text.encode()), stop)
    assert "".join(found) == stream.text == text.split(stop)[0]
    assert stream.stopped == (stop in text)
    if stream.stopped:  # known with the last character of the stop, and nothing after it
        end = text.index(stop) + len(stop)
        assert not any(found[end:])


def test_what_may_begin_the_stop_is_held_back_and_no_more() -> None:
    assert pieces(BYTES, [], list(b"xab-abc"), "abc")[0] == ["x", "", "", "ab-", "", "", "", ""]


# ---- generation -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session() -> Session:
    plan = dsv3c.compile(SMALL, job="train", seq=16, kernels="none")
    return dsv3c.load(plan, seed=3)


def test_tokens_are_the_sessions(session: Session) -> None:
    expected = session.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=12)
    assert generate_text(session, [5, 6, 7], max_new_tokens=12).tokens == expected[0].tolist()
    warm = session.generate(torch.tensor([[5, 6, 7]]), 12, temperature=1.5, top_p=0.8, seed=4)
    found = generate_text(session, [5, 6, 7], max_new_tokens=12, temperature=1.5, top_p=0.8, seed=4)
    assert found.tokens == warm[0].tolist() != expected[0].tolist()
    assert found.prompt == [5, 6, 7] and found.reason == "length" and found.text is None


def test_text_is_streamed(session: Session) -> None:
    told: list[str] = []
    found = generate_text(session, "né", max_new_tokens=30, temperature=1.0, tokenizer="bytes", on_text=told.append)
    assert found.prompt == list("né".encode())
    assert "".join(told) == found.text == BYTES.decode(found.prompt + found.tokens)[2:]
    assert len(told) > 1


def test_numbers_are_streamed_without_a_tokenizer(session: Session, tmp_path: Path) -> None:
    told: list[str] = []
    found = generate_text(session, [1, 2], max_new_tokens=4, tokenizer=tmp_path, on_text=told.append)
    assert "".join(told) == ",".join(map(str, found.tokens)) and found.text is None


def test_it_stops_at_the_text_and_at_the_end_of_the_document(session: Session) -> None:
    whole = generate_text(session, "a", max_new_tokens=40, temperature=1.0, tokenizer="bytes", seed=1)
    assert whole.text is not None
    stop = whole.text[10:12]
    found = generate_text(session, "a", max_new_tokens=40, temperature=1.0, tokenizer="bytes", seed=1, stop=stop)
    assert found.reason == "stop" and found.text == whole.text[: whole.text.index(stop)]
    assert found.tokens == whole.tokens[: len(found.tokens)] and len(found.tokens) < 40

    class EndsEarly(ByteTokenizer):
        @property
        def eos(self) -> int:
            return whole.tokens[3]

    assert whole.tokens[3] not in whole.tokens[:3]
    ended = generate_text(session, "a", max_new_tokens=40, temperature=1.0, tokenizer=EndsEarly(), seed=1)
    assert ended.reason == "end" and ended.tokens == whole.tokens[:4]
    assert ended.text == BYTES.decode(whole.tokens[:3])


def test_an_empty_prompt_starts_a_document(session: Session) -> None:
    assert generate_text(session, "", max_new_tokens=1, tokenizer="bytes").prompt == [BYTES.eos]


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        ("a", {}, "a text needs a tokenizer: name one with --tokenizer"),
        ([1], {"stop": "x"}, "a text needs a tokenizer"),
        ("a", {"tokenizer": "none.json"}, "there is no file none.json"),
        ("a", {"tokenizer": "."}, "holds no tokenizer.json; name one with --tokenizer, or give --tokens"),
        ([999], {"max_new_tokens": 2}, "token 999 is outside the vocabulary of 257"),
        ([], {}, "tokens must be a LongTensor"),
        ([1] * 60, {"max_new_tokens": 5}, "60 tokens and 5 new ones exceed the model's 64 positions"),
        ([1], {"temperature": -1.0, "max_new_tokens": 2}, "--temperature -1.0 must be 0 (greedy) or more"),
    ],
)
def test_bad_input(session: Session, prompt: str | list[int], given: dict[str, object], message: str,
                   tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        generate_text(session, prompt, **given)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_the_command_continues_a_checkpoint(session: Session, tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    folder = write_hf(tmp_path / "hf", session.config, session.weights.tensors, load_tokenizer("bytes"))
    expected = generate_text(session, "ab", max_new_tokens=8, tokenizer="bytes")
    assert cli.main(["generate", str(folder), "--prompt", "ab", "--max-new-tokens", "8", "--json"]) == 0
    assert Generated(**json.loads(capsys.readouterr().out)) == expected
    assert cli.main(["generate", str(folder), "--prompt", "ab", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == f"{expected.text}\n"
    (folder / "tokenizer.json").unlink()
    assert cli.main(["generate", str(folder), "--prompt", "ab"]) == 2
    assert "holds no tokenizer.json" in capsys.readouterr().err
