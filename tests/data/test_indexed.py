"""Megatron's `.bin/.idx`: bytes against the format written out with struct, round trips, and what is refused."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.errors import UserError
from megatron_ext.data import DataError, IndexedDataset, IndexedDatasetWriter

FORMATS = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}
DOCUMENTS = [[5, 6, 7], [1], [9, 8]]


def reference(documents: list[list[list[int]]], code: int = 8, modes: list[int] | None = None) -> tuple[bytes, bytes]:
    """The two files of documents, each a list of sequences, field by field."""
    sequences = [sequence for document in documents for sequence in document]
    tokens = b"".join(struct.pack(f"<{len(s)}{FORMATS[code]}", *s) for s in sequences)
    idx = b"MMIDIDX\x00\x00" + struct.pack("<Q", 1) + struct.pack("<B", code)
    idx += struct.pack("<Q", len(sequences)) + struct.pack("<Q", len(documents) + 1)
    for sequence in sequences:
        idx += struct.pack("<i", len(sequence))
    offset = 0
    for sequence in sequences:
        idx += struct.pack("<q", offset)
        offset += len(sequence) * struct.calcsize("<" + FORMATS[code])
    bound = 0
    idx += struct.pack("<q", 0)
    for document in documents:
        bound += len(document)
        idx += struct.pack("<q", bound)
    return tokens, idx + struct.pack(f"<{len(modes or [])}b", *(modes or []))


def put(folder: Path, tokens: bytes, idx: bytes) -> Path:
    (folder / "corpus.bin").write_bytes(tokens)
    (folder / "corpus.idx").write_bytes(idx)
    return folder / "corpus"


@pytest.mark.parametrize("code", FORMATS)
def test_writer_produces_the_format_byte_for_byte(tmp_path: Path, code: int) -> None:
    documents = [[[5, 6], [7]], [[1]], [[9], [], [8, 120]]]
    with IndexedDatasetWriter(tmp_path / "corpus", dtype="<" + np.dtype(FORMATS[code]).str[1:]) as writer:
        for document in documents:
            writer.add_document([t for s in document for t in s], lengths=[len(s) for s in document])
    tokens, idx = reference(documents, code)
    assert (tmp_path / "corpus.bin").read_bytes() == tokens
    assert (tmp_path / "corpus.idx").read_bytes() == idx
    assert sorted(os.listdir(tmp_path)) == ["corpus.bin", "corpus.idx"]


@pytest.mark.parametrize("code", FORMATS)
def test_reader_understands_files_written_by_others(tmp_path: Path, code: int) -> None:
    documents = [[[5, 6], [7]], [[1]], [[9], [], [8, 120]]]
    data = IndexedDataset(put(tmp_path, *reference(documents, code, modes=[0, 1, 0, 0, 0, 1])))
    assert [s.tolist() for s in data] == [s for document in documents for s in document]
    assert [data.document(i).tolist() for i in range(data.num_documents)] == [[5, 6, 7], [1], [9, 8, 120]]
    assert data.document_starts.tolist() == [0, 3, 4, 7]
    assert data.tokens.tolist() == [5, 6, 7, 1, 9, 8, 120]
    assert data.modes is not None and data.modes.tolist() == [0, 1, 0, 0, 0, 1]


@given(
    st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=9), min_size=1, max_size=9),
    st.sampled_from([1000, 65500]),
)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], vocab_size: int) -> None:
    prefix = tmp_path_factory.mktemp("round") / "corpus"
    with IndexedDatasetWriter(prefix, vocab_size=vocab_size) as writer:
        for document in documents:
            writer.add_document(np.asarray(document))
    data = IndexedDataset(str(prefix) + ".idx")
    assert data.tokens.dtype == (np.uint16 if vocab_size < 65500 else np.int32)
    assert [data.document(i).tolist() for i in range(data.num_documents)] == documents
    data.check_ids(1000)


def test_dtype_follows_the_vocabulary_as_in_megatron(tmp_path: Path) -> None:
    for vocab_size, code in [(260, 8), (65499, 8), (65500, 4), (129280, 4)]:
        with IndexedDatasetWriter(tmp_path / "corpus", vocab_size=vocab_size) as writer:
            writer.add_document([vocab_size - 1])
        assert (tmp_path / "corpus.idx").read_bytes()[17] == code
        assert IndexedDataset(tmp_path / "corpus")[0].tolist() == [vocab_size - 1]


def test_pickling_maps_the_file_again(tmp_path: Path) -> None:
    data = IndexedDataset(put(tmp_path, *reference([[list(range(30000))]])))
    assert len(pickle.dumps(data)) < 1000
    assert pickle.loads(pickle.dumps(data)).document(0).tolist() == list(range(30000))


def broken(tokens: bytes, idx: bytes) -> dict[str, tuple[bytes | None, bytes | None, str]]:
    """Name -> (.bin, .idx, what the message must say), out of DOCUMENTS as u16, one sequence each."""

    def patched(place: int, form: str, value: int) -> bytes:
        return idx[:place] + struct.pack(form, value) + idx[place + struct.calcsize(form) :]

    lengths, offsets, bounds = 34, 34 + 12, 34 + 36
    return {
        "no idx": (tokens, None, r"corpus\.idx: is not there"),
        "no bin": (None, idx, r"corpus\.bin: is not there"),
        "foreign": (tokens, b"TNTIDX\x00\x00" + idx[8:], r"corpus\.idx: begins with b'TNTIDX.*MMIDIDX"),
        "empty idx": (tokens, b"", r"corpus\.idx: begins with b''"),
        "cut in the header": (tokens, idx[:20], r"corpus\.idx: is cut off after 20 bytes; the header has 34"),
        "cut in the tables": (
            tokens,
            idx[:-5],
            rf"corpus\.idx: has {len(idx) - 5} bytes \(cut off\?\).*take {len(idx)}",
        ),
        "bytes too many": (tokens, idx + b"\x00", rf"corpus\.idx: has {len(idx) + 1} bytes;.*take {len(idx)}"),
        "counts beyond all sense": (tokens, patched(18, "<Q", 1 << 62), r"corpus\.idx: has .* bytes \(cut off\?\)"),
        "version": (tokens, patched(9, "<Q", 2), r"corpus\.idx: has version 2; only version 1"),
        "code 9": (tokens, patched(17, "<B", 9), r"corpus\.idx: has dtype code 9; codes are 1\.\.8"),
        "floats": (tokens, patched(17, "<B", 7), r"corpus\.idx: has dtype code 7 \(float32\); token ids are integers"),
        "bin short": (
            tokens[:-1],
            idx,
            rf"corpus\.bin: is short: it has 11 bytes; .*corpus\.idx describes {len(tokens)}",
        ),
        "bin empty": (b"", idx, "holds no tokens"),
        "bin of another": (tokens * 2, idx, r"corpus\.bin: belongs to another index: it has 24 bytes; .* describes 12"),
        "wrong width": (tokens, patched(17, "<B", 4), r"corpus\.idx: sequence 1 starts at byte 6; .* so at byte 12"),
        "negative length": (tokens, patched(lengths + 4, "<i", -1), r"corpus\.idx: sequence 1 has length -1"),
        "negative offset": (tokens, patched(offsets, "<q", -2), r"corpus\.idx: sequence 0 starts at byte -2"),
        "gap": (tokens, patched(offsets + 16, "<q", 10), r"corpus\.idx: sequence 2 starts at byte 10; .*at byte 8"),
        "first bound": (
            tokens,
            patched(bounds, "<q", 1),
            r"corpus\.idx: document bounds are 1\.\.3; 0 comes first and 3 last",
        ),
        "last bound": (tokens, patched(bounds + 24, "<q", 2), r"corpus\.idx: document bounds are 0\.\.2"),
        "bound outside": (tokens, patched(bounds + 8, "<q", 7), r"corpus\.idx: a document bound lies outside.*0\.\.3"),
        "bounds backwards": (tokens, patched(bounds + 8, "<q", 3), r"corpus\.idx: document 1 ends before it starts"),
        "empty document": (tokens, patched(bounds + 16, "<q", 1), r"corpus\.idx: document 1 is empty"),
        "nothing in it": (b"", idx[:18] + struct.pack("<QQq", 0, 1, 0), "corpus: holds no tokens"),
    }


@pytest.mark.parametrize("case", broken(*reference([[d] for d in DOCUMENTS])))
def test_reader_refuses_by_name(tmp_path: Path, case: str) -> None:
    tokens, idx, message = broken(*reference([[d] for d in DOCUMENTS]))[case]
    for suffix, content in ((".bin", tokens), (".idx", idx)):
        if content is not None:
            (tmp_path / f"corpus{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        IndexedDataset(tmp_path / "corpus")
    assert isinstance(error.value, UserError) and str(tmp_path) in str(error.value)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_document_of_empty_sequences_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="document 1 is empty"):
        IndexedDataset(put(tmp_path, *reference([[[1]], [[], []], [[2]]])))


def test_checks_hold_across_their_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("indexed.CHECKED_AT_ONCE", 2), ("stream.SCAN_TOKENS", 2)):
        monkeypatch.setattr(f"megatron_ext.data.{name}", size)
    documents = [[[i, i + 1]] for i in range(7)]
    data = IndexedDataset(put(tmp_path, *reference(documents)))
    data.check_ids(8)
    with pytest.raises(DataError, match="document 6 holds token id 7 at its position 1"):
        data.check_ids(7)
    tokens, idx = reference(documents)
    hole = 34 + 12 * 7 + 8 * 5  # the bound between documents 4 and 5, moved onto the next one
    with pytest.raises(DataError, match="document 5 is empty"):
        IndexedDataset(put(tmp_path, tokens, idx[:hole] + struct.pack("<q", 6) + idx[hole + 8 :]))
    gap = 34 + 4 * 7 + 8 * 5
    with pytest.raises(DataError, match="sequence 5 starts at byte 2;"):
        IndexedDataset(put(tmp_path, tokens, idx[:gap] + struct.pack("<q", 2) + idx[gap + 8 :]))


def test_ids_outside_the_vocabulary_are_named(tmp_path: Path) -> None:
    data = IndexedDataset(put(tmp_path, *reference([[[1, 2], [3]], [[4], [5, 300, 301]], [[6]]], code=4)))
    data.check_ids(302)
    with pytest.raises(
        DataError, match=r"corpus: document 1 holds token id 300 at its position 2; ids lie in 0\.\.299"
    ):
        data.check_ids(300)
    data.check_ids(300, shard=0, num_shards=2)  # tokens 0..3
    with pytest.raises(DataError, match="token id 300"):
        data.check_ids(300, shard=1, num_shards=2)
    negative = IndexedDataset(put(tmp_path, *reference([[[1, 2]], [[-1]]], code=4)))
    with pytest.raises(DataError, match="document 1 holds token id -1 at its position 0"):
        negative.check_ids(300)


def test_fingerprint_tells_corpora_apart(tmp_path: Path) -> None:
    prints = set()
    for documents in ([[[1, 2]]], [[[1, 3]]], [[[1], [2]]], [[[1]], [[2]]]):
        prints.add(IndexedDataset(put(tmp_path, *reference(documents))).fingerprint)
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        ([], None, "document 1 is empty"),
        ([1, 70000], None, r"document 1: token id 70000; ids lie in 0\.\.99"),
        ([100], None, r"document 1: token id 100; ids lie in 0\.\.99"),
        ([-1], None, "document 1: token id -1"),
        ([0.5], None, "float64"),
        ([[1]], None, "one row"),
        ([1, 2], [1], "add up to 2 tokens"),
    ],
)
def test_writer_refuses_and_leaves_the_old_pair(
    tmp_path: Path, tokens: list, lengths: list | None, message: str
) -> None:
    old = put(tmp_path, *reference([[[4, 2]]]))
    with pytest.raises(DataError, match=message), IndexedDatasetWriter(old, vocab_size=100) as writer:
        writer.add_document([1])
        writer.add_document(tokens, lengths)
    assert IndexedDataset(old)[0].tolist() == [4, 2]
    assert sorted(os.listdir(tmp_path)) == ["corpus.bin", "corpus.idx"]


def test_writer_refuses_what_it_cannot_begin(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokens"), IndexedDatasetWriter(tmp_path / "corpus", vocab_size=9):
        pass
    assert os.listdir(tmp_path) == []
    with pytest.raises(DataError, match="its folder must exist"):
        IndexedDatasetWriter(tmp_path / "nowhere" / "corpus", vocab_size=9)
    with pytest.raises(DataError, match="float32"):
        IndexedDatasetWriter(tmp_path / "corpus", dtype=np.float32)
    with pytest.raises(DataError, match="either vocab_size or dtype"):
        IndexedDatasetWriter(tmp_path / "corpus")
