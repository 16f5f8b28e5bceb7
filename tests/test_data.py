"""Data: which files are read, what tokens they become, and which of them each step sees."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3c.errors import InputError, WorkError
from dsv3c.runtime import data
from dsv3c.runtime.corpus import read_pieces
from dsv3c.runtime.data import Sampler, TokenFile, choose_tokenizer, documents, prepare, scan
from dsv3c.runtime.tokenizer import EOS, FIM_NAMES, ByteTokenizer, load_tokenizer, train_bpe

BYTES = ByteTokenizer()
TEXT = "The quick brown fox\n\n  jumps over\tthe lazy dög — twice.\n" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two good files in sorted order b/one, two, and one of every kind to leave out."""
    root = tmp_path / "texts"
    (root / "b").mkdir(parents=True)
    (root / "two.txt").write_bytes("zwei ü".encode())
    (root / "b" / "one.txt").write_bytes(b"one")
    (root / "empty.txt").write_bytes(b"")
    (root / "zero.bin").write_bytes(b"ab\0cd")
    (root / "latin.txt").write_bytes(b"caf\xe9 au lait")
    (root / "cut.txt").write_bytes("ü".encode()[:1])
    (root / ".hidden").write_bytes(b"hidden")
    (root / "b" / "gone.txt").symlink_to("nowhere")
    return root


def sampler(tmp_path: Path, tokens: int, seq: int, global_batch: int, seed: int = 0) -> Sampler:
    """Over a file of `tokens` bytes (eos included) 0, 1, 2, ... 199, 0, ..."""
    path = tmp_path / f"{tokens}.txt"
    path.write_bytes(bytes(1 + i % 120 for i in range(tokens - 1)))
    return Sampler(prepare([path], BYTES, tmp_path / "cache"), seq, global_batch, seed)


def test_folders_are_read_sorted_and_what_is_not_text_is_noted(folder: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    corpus = scan([folder], notes.append)
    assert [d.path.name for d in corpus.documents] == ["two.txt", "one.txt"]
    assert sorted(notes) == [
        f"{folder}: left out 1 file that is binary (zero.bin)",
        f"{folder}: left out 1 file that is empty (empty.txt)",
        f"{folder}: left out 2 files, each of which is not UTF-8 text (cut.txt, ...)",
    ]
    tokens = prepare(corpus, BYTES, tmp_path / "cache")
    assert tokens.ids.dtype == np.uint16
    assert tokens.ids.tolist() == [*"zwei ü".encode(), 256, *b"one", 256]
    assert (tokens.documents, tokens.eos, tokens.vocab_size, len(tokens)) == (2, 256, 257, 12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("zero.bin", r"zero.bin is binary \(byte 2 is 0\)"),
        ("latin.txt", r"latin.txt is not UTF-8 text \(byte 3\)"),
        ("cut.txt", r"cut.txt is not UTF-8 text \(cut off"),
        ("empty.txt", "empty.txt is empty"),
        ("missing.txt", "missing.txt does not exist"),
    ],
)
def test_a_named_file_that_is_not_text_is_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        scan([folder / name])


def test_a_bad_byte_is_counted_across_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3c.runtime.corpus._READ_BYTES", 4)
    (tmp_path / "x").write_bytes(b"abc" + "ü".encode() + b"de\xff")
    with pytest.raises(InputError, match=r"byte 7\)"):
        scan([tmp_path / "x"])


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\0")
    with pytest.raises(InputError, match="no UTF-8 text file"):
        scan([tmp_path])
    with pytest.raises(InputError, match="no file or folder"):
        scan([])
    with pytest.raises(InputError, match="not a regular file"):
        scan(["/dev/null"])


def test_a_file_named_twice_counts_once(folder: Path) -> None:
    corpus = scan([folder / "b" / "one.txt", folder, folder / "b"])
    assert [d.path.name for d in corpus.documents] == ["one.txt", "two.txt"]


def test_a_file_that_changes_between_scan_and_reading_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("before")
    corpus = scan([path])
    path.write_text("after!")
    with pytest.raises(WorkError, match=r"x.txt changed"):
        prepare(corpus, BYTES, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_pieces_join_to_the_text_and_give_the_same_tokens(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.encode() + b"nonewline " * 50 + b"y" * 400)
    document = scan([path]).documents[0]
    pieces = list(read_pieces(document, characters=100))
    whole = "".join(pieces)
    assert whole == path.read_bytes().decode("utf-8-sig")
    assert len(pieces) > 20
    assert max(map(len, pieces)) <= 100
    bpe = train_bpe([TEXT], 400)
    words = TEXT + "nonewline " * 50
    path.write_text(words)
    pieces = list(read_pieces(scan([path]).documents[0], characters=100))
    assert list(itertools.chain(*bpe.encode_batch(pieces))) == bpe.encode(words)


def test_the_token_file_is_cached_under_its_contents(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("some text")
    calls: list[tuple[int, int]] = []
    first = prepare([path], BYTES, tmp_path / "c", progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (9, 9)
    before = first.path.stat().st_mtime_ns
    assert prepare([path], BYTES, tmp_path / "c").path.stat().st_mtime_ns == before
    path.rename(tmp_path / "y.txt")
    assert prepare([tmp_path / "y.txt"], BYTES, tmp_path / "c").key == first.key
    (tmp_path / "y.txt").write_text("other text")
    assert prepare([tmp_path / "y.txt"], BYTES, tmp_path / "c").key != first.key
    bpe = train_bpe(["other text"], 300)
    assert prepare([tmp_path / "y.txt"], bpe, tmp_path / "c").ids[-1] == bpe.eos
    assert len(list((tmp_path / "c").iterdir())) == 3


def test_a_damaged_token_file_is_refused_and_made_again(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("some text")
    tokens = prepare([path], BYTES, tmp_path / "c")
    whole = tokens.path.read_bytes()
    for damaged in (whole[:-1], whole[:10], b"x" + whole[1:], b""):
        tokens.path.write_bytes(damaged)
        with pytest.raises(InputError, match="not a complete token file"):
            TokenFile.open(tokens.path)
        assert prepare([path], BYTES, tmp_path / "c").path.read_bytes() == whole
    with pytest.raises(InputError, match="cannot read"):
        TokenFile.open(tmp_path / "none.tokens")


def test_batches_of_tokenizing_do_not_change_the_tokens(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare([folder], BYTES, tmp_path / "a").ids.tolist()
    monkeypatch.setattr(data, "_BATCH_CHARACTERS", 1)
    assert prepare([folder], BYTES, tmp_path / "b").ids.tolist() == whole


def test_output_that_cannot_be_written_is_a_work_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WorkError, match="cannot write the token file"):
        prepare([folder], BYTES, tmp_path / "file" / "cache")
    with pytest.raises(WorkError, match="cannot write the tokenizer"):
        BYTES.save(tmp_path / "file" / "out")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(WorkError, match="No space left on device"):
        prepare([folder], BYTES, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_bytes_round_trip_and_are_saved_as_a_tokenizer_json(tmp_path: Path) -> None:
    text = "Grüße\0\x7f\xad\r\n 漢字 🙂 " + EOS + " " * 7
    assert BYTES.decode(BYTES.encode(text)) == text
    assert BYTES.decode([72, 256, 300, 105, 0xFF]) == "Hi\ufffd"
    BYTES.save(tmp_path)
    saved = load_tokenizer(tmp_path)
    assert saved.encode(text) == BYTES.encode(text)
    assert (saved.eos, saved.vocab_size, saved.decode(BYTES.encode(text))) == (256, 257, text)
    assert load_tokenizer("bytes") == BYTES


def test_trained_bpe_is_deterministic_reloads_equal_and_treats_special_names_as_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(TEXT)
    program = (
        "import sys, pathlib; from dsv3c.runtime.data import choose_tokenizer, scan\n"
        "choose_tokenizer(None, 290, scan([sys.argv[1]]), pathlib.Path(sys.argv[2]))"
    )
    for out in ("a", "b"):
        subprocess.run([sys.executable, "-c", program, tmp_path / "x.txt", tmp_path / out], check=True)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    trained = choose_tokenizer(None, 290, scan([tmp_path / "x.txt"]), tmp_path / "c")
    again = choose_tokenizer(None, 290, scan([tmp_path / "x.txt"]), tmp_path / "a", resume=True)
    assert again.identity == trained.identity
    assert again.name != trained.name
    assert trained.vocab_size == 290
    text = "the lazy " + EOS + " 漢字"
    assert trained.decode(trained.encode(text)) == text
    assert trained.eos not in trained.encode(text)
    assert len(trained.encode(TEXT)) < len(TEXT) / 2
    assert trained.decode([trained.eos, 99999]) == ""
    with pytest.raises(InputError, match="not valid UTF-8"):
        trained.encode("a\udc80")


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(TEXT)
    corpus = scan([tmp_path / "x.txt"])
    with pytest.raises(InputError, match="257 entries but the model's vocab_size is 256"):
        choose_tokenizer("bytes", 256, corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="at least 257"):
        choose_tokenizer(None, 256, corpus, tmp_path / "out")
    with pytest.raises(InputError, match="at least 260"):
        train_bpe([TEXT], 259, fim=True)
    assert choose_tokenizer("bytes", 257, corpus, None).vocab_size == 257


def test_tokenizer_files_that_are_not_tokenizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a Hugging Face tokenizer\.json"):
        load_tokenizer(tmp_path)
    BYTES.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load_tokenizer(tmp_path)
    config.write_text('{"eos_token": {"content": "a"}}')
    assert load_tokenizer(tmp_path).eos == ord("a")
    config.write_text('{"eos_token": "none such"}')
    with pytest.raises(InputError, match="'none such'"):
        load_tokenizer(tmp_path)
    body = json.loads((tmp_path / "tokenizer.json").read_text())
    body["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    config.unlink()
    with pytest.raises(InputError, match="does not say which token ends a document"):
        load_tokenizer(tmp_path)


def test_wide_vocabularies_take_four_bytes_a_token(tmp_path: Path) -> None:
    class Wide(ByteTokenizer):
        @property
        def vocab_size(self) -> int:
            return 70000

        @property
        def eos(self) -> int:
            return 69999

    (tmp_path / "x").write_text("ab")
    tokens = prepare([tmp_path / "x"], Wide(), tmp_path / "c")
    assert tokens.ids.dtype == np.uint32
    assert tokens.ids.tolist() == [97, 98, 69999]


def test_fill_in_the_middle_rearranges_a_share_of_the_documents(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i} of many")
    bpe = train_bpe(["document of many"], 300, fim=True)
    assert bpe.fim == tuple(bpe._body.token_to_id(name) for name in FIM_NAMES[0])
    assert bpe.fim is not None
    begin, hole, end = bpe.fim

    def split(tokens: TokenFile) -> list[list[int]]:
        ids = tokens.ids.tolist()
        ends = [i for i, t in enumerate(ids) if t == bpe.eos]
        return [ids[a + 1 : b] for a, b in itertools.pairwise([-1, *ends])]

    plain = split(prepare(scan([tmp_path]), bpe, tmp_path / ".c"))
    mixed = split(prepare(scan([tmp_path]), bpe, tmp_path / ".c", fim_rate=0.5, seed=3))
    changed = [i for i in range(60) if mixed[i] != plain[i]]
    assert 15 < len(changed) < 45
    for i in changed:
        at_hole, at_end = mixed[i].index(hole), mixed[i].index(end)
        assert mixed[i][0] == begin
        prefix, suffix, middle = mixed[i][1:at_hole], mixed[i][at_hole + 1 : at_end], mixed[i][at_end + 1 :]
        assert bpe.decode(prefix) + bpe.decode(middle) + bpe.decode(suffix) == f"document {i} of many"
    assert split(prepare(scan([tmp_path]), bpe, tmp_path / ".d", fim_rate=0.5, seed=3)) == mixed
    assert split(prepare(scan([tmp_path]), bpe, tmp_path / ".c", fim_rate=0.5, seed=4)) != mixed
    with pytest.raises(InputError, match="bytes has no fill-in-the-middle"):
        prepare([tmp_path], BYTES, tmp_path / ".c", fim_rate=0.5)
    with pytest.raises(InputError, match="between 0 and 1"):
        prepare([tmp_path], bpe, tmp_path / ".c", fim_rate=1.5)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
def test_an_epoch_visits_every_sequence_once_in_its_own_order(tmp_path: Path, n: int) -> None:
    s = sampler(tmp_path, tokens=4 * n + 3, seq=4, global_batch=1)
    assert s.sequences == n
    epochs = [[s.indices(e * n + i + 1)[0] for i in range(n)] for e in range(2)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n >= 64:
        moved = sum(a != i for i, a in enumerate(epochs[0]))
        assert moved > 0.9 * n
        assert epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    s = sampler(tmp_path, tokens=4001, seq=8, global_batch=6)
    batches = [s.batch(step) for step in range(1, 200)]
    fresh = sampler(tmp_path, tokens=4001, seq=8, global_batch=6)
    assert torch.equal(fresh.batch(150), batches[149])
    assert batches[0].dtype == torch.int64
    assert batches[0].shape == (6, 8)
    row = s.indices(1)[2]
    assert batches[0][2].tolist() == s.file.ids[8 * row : 8 * row + 8].tolist()
    assert s.indices(1) + s.indices(2) == Sampler(s.file, 8, 12, 0).indices(1)
    assert s.indices(1) != Sampler(s.file, 8, 6, 1).indices(1)
    with pytest.raises(ValueError, match="from 1"):
        s.batch(0)


def test_the_order_is_a_fixed_function_of_the_seed(tmp_path: Path) -> None:
    """The very numbers, since a change of them would make a resumed run see other data."""
    assert sampler(tmp_path, tokens=400, seq=4, global_batch=8, seed=7).indices(3) == [7, 54, 80, 13, 55, 4, 70, 32]


def test_little_data_wraps_over_epochs_and_too_little_is_refused(tmp_path: Path) -> None:
    s = sampler(tmp_path, tokens=30, seq=8, global_batch=7)
    assert s.sequences == 3
    assert sorted(s.indices(1)[:3]) == sorted(s.indices(1)[3:6]) == [0, 1, 2]
    with pytest.raises(InputError, match="has 30 tokens, but one sequence needs 31"):
        Sampler(s.file, 31, 1, 0)
    assert Sampler(s.file, 30, 1, 0).batch(5).tolist() == [s.file.ids.tolist()]
    with pytest.raises(InputError, match="at least 1"):
        Sampler(s.file, 8, 0, 0)


def test_document_numbers_change_after_an_eos() -> None:
    tokens = torch.tensor([[1, 9, 2, 3, 9, 9, 4], [9, 1, 1, 1, 1, 1, 9]])
    found = documents(tokens, 9)
    assert found.dtype == torch.int32
    assert found.tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
