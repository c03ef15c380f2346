"""Text to tokens: exact bytes, any tokenizer.json, order of files, and a held-out part that nothing else contains."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.errors import ConfigError
from megatron_ext.data import (
    ByteTokenizer,
    DataError,
    JsonTokenizer,
    TokenStream,
    standard_library_files,
    text_files,
    text_stream,
    write_indexed,
)


@given(st.binary(max_size=200))
def test_bytes_survive_exactly(content: bytes) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(content)
    assert len(ids) == len(content)
    with_specials = np.concatenate([[tokenizer.bos_id], ids, [tokenizer.eos_id]]).astype(np.int64)
    assert tokenizer.decode_bytes(with_specials) == content
    assert tokenizer.decode(with_specials) == content.decode("utf-8", errors="replace")


def test_specials_are_apart_from_bytes_and_inside_the_vocabulary() -> None:
    tokenizer = ByteTokenizer()
    assert 256 <= tokenizer.bos_id < tokenizer.eos_id < tokenizer.vocab_size == 260


def corpus(folder: Path, **files: bytes) -> Path:
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_each_file_is_a_document_that_ends_with_eos(tmp_path: Path) -> None:
    corpus(tmp_path, b_txt=b"hi", a_txt=b"\xff\x00")
    stream = text_stream(text_files(tmp_path), ByteTokenizer(), name="two files")
    assert stream.tokens.tolist() == [255, 0, 257, 104, 105, 257]
    assert stream.document_starts.tolist() == [0, 3, 6]
    assert stream.tokens.dtype == np.uint16
    assert stream.describe() == {"name": "two files", "documents": 2, "tokens": 6, "fingerprint": stream.fingerprint}


def test_fingerprint_follows_content_and_not_place(tmp_path: Path) -> None:
    def fingerprint(folder: str, **files: bytes) -> str:
        return text_stream(text_files(corpus(tmp_path / folder, **files)), ByteTokenizer()).fingerprint

    first = fingerprint("one", a_txt=b"x", b_txt=b"y")
    assert fingerprint("two", a_txt=b"x", b_txt=b"y") == first
    assert len({first, fingerprint("three", a_txt=b"x", b_txt=b"z"), fingerprint("four", a_txt=b"y", b_txt=b"x")}) == 3
    assert len(first) == 64


def test_sources_keep_their_order_and_folders_are_sorted(tmp_path: Path) -> None:
    corpus(
        tmp_path, sub__z_txt=b"1", sub__deep__a_txt=b"2", sub__a_py=b"3", top_txt=b"4", _hidden=b"5", sub___h__x=b"6"
    )

    def names(*sources: str, suffix: str = "") -> list[str]:
        return [file.name for file in text_files([tmp_path / source for source in sources], suffix)]

    assert names("sub") == ["a.py", "a.txt", "z.txt"]
    assert names("sub", suffix=".txt") == ["a.txt", "z.txt"]
    assert names("top.txt", "sub") == ["top.txt", "a.py", "a.txt", "z.txt"]
    assert names("**/*.txt") == ["a.txt", "z.txt", "top.txt"]
    assert names("sub/z.txt", "sub", "sub/deep/../z.txt") == ["z.txt", "a.py", "a.txt"]
    assert [file.name for file in text_files(str(tmp_path / "top.txt"))] == ["top.txt"]


def test_text_is_refused_by_name(tmp_path: Path) -> None:
    corpus(tmp_path, a_txt=b"a", b_txt=b"")
    with pytest.raises(DataError, match=r"none\.txt: names no file"):
        text_files(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"\*\.md: names no file"):
        text_files([tmp_path / "a.txt", tmp_path / "*.md"])
    with pytest.raises(DataError, match="no path"):
        text_files([])
    with pytest.raises(DataError, match=r"b\.txt: is an empty document"):
        text_stream(text_files(tmp_path), ByteTokenizer())
    assert text_stream(text_files(tmp_path), ByteTokenizer(), skip_empty=True).tokens.tolist() == [97, 257]
    with pytest.raises(DataError, match="cannot be read"):
        text_stream([tmp_path], ByteTokenizer())


def test_a_written_corpus_is_the_corpus_in_memory(tmp_path: Path) -> None:
    files = text_files(corpus(tmp_path / "text", a_txt=b"some", b_txt=b"words"))
    memory, disk = text_stream(files, ByteTokenizer()), write_indexed(tmp_path / "corpus", files, ByteTokenizer())
    assert disk.tokens.tolist() == memory.tokens.tolist()
    assert disk.document_starts.tolist() == memory.document_starts.tolist()


def test_token_stream_refuses_by_name() -> None:
    for tokens, starts, message in [
        ([[1]], None, r"t: an array of shape \[1, 1\]"),
        ([0.5], None, "float64"),
        (np.zeros(0, np.int32), [0], "t: holds no tokens"),
        ([1, 2], [0, 1], "do not cover"),
        ([1, 2], [0, 1, 1, 2], "document 1 is empty"),
        ([1, 2, 3], [0, 2, 1, 3], "document 1 ends before it starts"),
    ]:
        with pytest.raises(DataError, match=message):
            TokenStream(tokens, starts, name="t")
    with pytest.raises(DataError, match=r"t, document 1: token id 9; ids lie in 0\.\.8"):
        TokenStream.from_documents([[8], [1, 9]], vocab_size=9, name="t")
    with pytest.raises(DataError, match="holds no tokens"):
        TokenStream.from_documents([])


# --- tokenizer.json


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny byte-level BPE whose file asks for truncation, padding and a bos, and whose added token has a far id."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the theory of the thing " * 20], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 0)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_tokenizer_json_encodes_whole_documents_and_nothing_else(tokenizer_json: Path, tmp_path: Path) -> None:
    tokenizer = JsonTokenizer(tokenizer_json.parent)
    text = "the theory of everything: naïve, 'ü'"
    ids = tokenizer.encode(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(ids) > 8 and len(ids) < len(text.encode())  # neither truncated nor padded, and merges are used
    assert 0 not in ids and tokenizer.eos_id == 1
    stream = text_stream(text_files(corpus(tmp_path, a_txt=text.encode(), b_txt=b"the")), tokenizer)
    assert stream.document(0).tolist() == [*ids.tolist(), 1]
    stream.check_ids(tokenizer.vocab_size)
    with pytest.raises(DataError):
        stream.check_ids(int(stream.tokens.max()))


def test_text_cannot_forge_the_end_of_a_document(tokenizer_json: Path) -> None:
    tokenizer = JsonTokenizer(tokenizer_json)
    assert tokenizer.eos_id not in tokenizer.encode(b"before <|endoftext|> after")
    assert tokenizer.decode(tokenizer.encode(b"a <|endoftext|> b")) == "a <|endoftext|> b"
    assert tokenizer.decode(tokenizer.encode(b"caf\xe9")) == "caf\N{REPLACEMENT CHARACTER}"


def test_tokenizer_vocabulary_counts_gaps(tokenizer_json: Path, tmp_path: Path) -> None:
    import json

    content = json.loads(tokenizer_json.read_text())
    content["model"]["vocab"]["farAway"] = 5000
    (tmp_path / "far.json").write_text(json.dumps(content))
    assert JsonTokenizer(tmp_path / "far.json").vocab_size == 5001


def test_tokenizer_is_refused_by_name(tokenizer_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: is not there"):
        JsonTokenizer(tmp_path)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: cannot be read as a tokenizer"):
        JsonTokenizer(tmp_path / "bad.json")
    with pytest.raises(DataError, match="has no token </eod>; name its end-of-document token"):
        JsonTokenizer(tokenizer_json, eos_token="</eod>")
    assert JsonTokenizer(tokenizer_json, eos_token="<bos>").eos_id == 0
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match="pip install tokenizers"):
        JsonTokenizer(tokenizer_json)


# --- the standard library


def test_standard_library_is_split_once_and_for_all() -> None:
    train, held_out = standard_library_files("train"), standard_library_files("held_out")
    assert set(held_out) < set(standard_library_files("held_out", held_out=0.1))
    assert {file.read_bytes() for file in train}.isdisjoint(file.read_bytes() for file in held_out)
    assert not set(train) & set(held_out)
    assert 0.005 < len(held_out) / (len(train) + len(held_out)) < 0.05
    assert not any("site-packages" in file.parts for file in train + held_out)
    names = {file.name for file in train + held_out}
    assert {"argparse.py", "typing.py"} <= names
    stream = text_stream(held_out, ByteTokenizer(), name="held out")
    assert stream.num_documents == len(held_out)
    assert stream.num_tokens == sum(file.stat().st_size + 1 for file in held_out)


def test_standard_library_refuses_what_it_cannot_split() -> None:
    with pytest.raises(ConfigError, match="held_out"):
        standard_library_files("train", 1.0)
    with pytest.raises(ConfigError, match="split"):
        standard_library_files("test")
