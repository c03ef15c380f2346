"""Megatron's `.bin/.idx` pair of files: a memory-mapped reader that trusts nothing, and an atomic writer.

    .bin   token ids, back to back
    .idx   little-endian: 9 bytes "MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 S, u64 D + 1,
           int32[S] tokens per sequence, int64[S] byte offsets into .bin, int64[D + 1] first sequence of each document
           (0 first, S last), and optionally int8[S] modes

Letters: S sequences, D documents (each a run of whole sequences), N tokens.
"""

from __future__ import annotations

import hashlib
import os
import struct
import uuid
from array import array
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_ext.data.errors import DataError
from megatron_ext.data.stream import TokenStream, check_documents, stored_ids, token_dtype

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
CHECKED_AT_ONCE = 1 << 20
"""Sequences or documents of an index validated at a time."""


class IndexedDataset(TokenStream):
    """A validated, memory-mapped `.bin/.idx` pair; `len` and `[i]` count sequences, as in Megatron.

    Args:
        path: the common prefix of the two files, or either file.

    Attributes:
        tokens: [N] memory map over `.bin` in the stored dtype; sequences are back to back, so it is also the stream.
        sequence_lengths: [S] int32.
        document_indices: [D + 1] int64, the first sequence of each document.
        modes: [S] int8 or None.

    Raises:
        DataError: a missing, foreign, truncated or inconsistent file, a dtype that holds no ids, or an empty document;
            names the file, what was found and the rule.
    """

    def __init__(self, path: str | os.PathLike[str]):
        text = os.fspath(path)
        self.prefix = text[:-4] if text.endswith((".idx", ".bin")) else text
        self.name = self.prefix
        self.idx_path, self.bin_path = self.prefix + ".idx", self.prefix + ".bin"
        dtype = self._open_index()
        self._check_sequences(dtype.itemsize)
        self._check_documents(dtype.itemsize)
        self.tokens = np.memmap(self.bin_path, dtype=dtype, mode="r")

    def _open_index(self) -> np.dtype[Any]:
        idx_size, bin_size = _file_size(self.idx_path), _file_size(self.bin_path)
        with open(self.idx_path, "rb") as file:
            head = file.read(HEADER.size)
        if head[: len(MAGIC)] != MAGIC[: len(head)] or not head:
            raise DataError(self.idx_path, f"begins with {head[:9]!r}", f"a Megatron index begins with {MAGIC!r}")
        if len(head) < HEADER.size:
            raise DataError(self.idx_path, f"is cut off after {idx_size} bytes", f"the header has {HEADER.size}")
        _, version, code, sequences, bounds = HEADER.unpack(head)
        if version != VERSION:
            raise DataError(self.idx_path, f"has version {version}", f"only version {VERSION} is known")
        if code not in DTYPES:
            raise DataError(self.idx_path, f"has dtype code {code}", f"codes are {min(DTYPES)}..{max(DTYPES)}")
        dtype = np.dtype(DTYPES[code])
        if dtype.kind == "f":
            # DeepSpeed's copy of this format gave codes 6, 7, 8 to uint16, uint32, uint64; nothing in a file tells.
            rule = "token ids are integers (if DeepSpeed's indexed_dataset wrote it, write it anew as int32)"
            raise DataError(self.idx_path, f"has dtype code {code} ({dtype.name})", rule)
        whole = HEADER.size + 12 * sequences + 8 * bounds
        if idx_size not in (whole, whole + sequences):
            found = f"has {idx_size} bytes" + (" (cut off?)" if idx_size < whole else "")
            rule = f"{sequences} sequences and {bounds} document bounds take {whole}, or {whole + sequences} with modes"
            raise DataError(self.idx_path, found, rule)
        if sequences == 0 or bin_size == 0:
            raise DataError(self.prefix, "holds no tokens", "training data needs at least one document")

        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        places = np.cumsum([HEADER.size, 4 * sequences, 8 * sequences, 8 * bounds]).tolist()
        self.sequence_lengths: NDArray[np.int32] = np.frombuffer(index, "<i4", sequences, places[0])
        self._offsets: NDArray[np.int64] = np.frombuffer(index, "<i8", sequences, places[1])
        self.document_indices: NDArray[np.int64] = np.frombuffer(index, "<i8", bounds, places[2])
        self.modes: NDArray[np.int8] | None = None
        if idx_size > whole:
            self.modes = np.frombuffer(index, "i1", sequences, places[3])
        self._bin_size = bin_size
        return dtype

    def _check_sequences(self, itemsize: int) -> None:
        """Sequences lie back to back from byte 0 to the very end of `.bin`."""
        end = 0
        for first in range(0, len(self), CHECKED_AT_ONCE):
            lengths = self.sequence_lengths[first : first + CHECKED_AT_ONCE].astype(np.int64)
            if lengths.min() < 0:
                number = int(np.flatnonzero(lengths < 0)[0])
                found = f"sequence {first + number} has length {lengths[number]}"
                raise DataError(self.idx_path, found, "lengths are not negative")
            ends = end + np.cumsum(lengths * itemsize)
            starts = ends - lengths * itemsize
            offsets = self._offsets[first : first + CHECKED_AT_ONCE]
            wrong = np.flatnonzero(offsets != starts)
            if len(wrong):
                number = int(wrong[0])
                found = f"sequence {first + number} starts at byte {offsets[number]}"
                raise DataError(self.idx_path, found, f"sequences are back to back, so at byte {starts[number]}")
            end = int(ends[-1])
        if end != self._bin_size:
            state = "is short: it" if self._bin_size < end else "belongs to another index: it"
            raise DataError(self.bin_path, f"{state} has {self._bin_size} bytes", f"{self.idx_path} describes {end}")

    def _check_documents(self, itemsize: int) -> None:
        bounds = self.document_indices
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(self):
            ends = "none" if not len(bounds) else f"{bounds[0]}..{bounds[-1]}"
            raise DataError(self.idx_path, f"document bounds are {ends}", f"0 comes first and {len(self)} last")
        if bounds.min() < 0 or bounds.max() > len(self):
            raise DataError(self.idx_path, "a document bound lies outside the sequences", f"0..{len(self)}")
        for first in range(0, len(bounds) - 1, CHECKED_AT_ONCE):
            check_documents(self.idx_path, self._starts(bounds[first : first + CHECKED_AT_ONCE + 1], itemsize), first)

    def _starts(self, bounds: NDArray[np.int64], itemsize: int) -> NDArray[np.int64]:
        """Token offsets of the sequences numbered `bounds`; S itself is the end of the stream."""
        starts = self._offsets[np.minimum(bounds, len(self) - 1)] // itemsize
        starts[bounds == len(self)] = self._bin_size // itemsize
        return starts

    @cached_property
    def document_starts(self) -> NDArray[np.int64]:
        """[D + 1] int64 offsets of the documents in `tokens`; computed when first asked for."""
        return self._starts(self.document_indices, self.tokens.dtype.itemsize)

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the sizes, first and last 64 KiB of both files: starting a job must not read a terabyte."""
        digest = hashlib.sha256()
        for path in (self.idx_path, self.bin_path):
            size = os.path.getsize(path)
            digest.update(size.to_bytes(8, "little"))
            with open(path, "rb") as file:
                digest.update(file.read(1 << 16))
                file.seek(max(0, size - (1 << 16)))
                digest.update(file.read())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, number: int) -> NDArray[Any]:
        """[length] ids of a sequence, a view in the stored dtype."""
        if not 0 <= number < len(self):
            raise IndexError(f"{self.prefix}: sequence {number} of {len(self)}")
        start = int(self._offsets[number]) // self.tokens.dtype.itemsize
        return self.tokens[start : start + int(self.sequence_lengths[number])]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.prefix,)  # a worker process maps the files anew; a pickled map would copy them


class IndexedDatasetWriter:
    """Writes a `.bin/.idx` pair document by document; the pair appears under its name only when it is whole.

    Use it as a context manager: an exception leaves no file, and an older pair untouched. One process writes.

    Args:
        path: prefix of the two files, or either file; the folder must exist.
        vocab_size: chooses the dtype as Megatron does, and ids outside it are refused.
        dtype: an integer dtype of the format, instead of `vocab_size`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        vocab_size: int | None = None,
        dtype: np.dtype[Any] | type | str | None = None,
    ):
        text = os.fspath(path)
        self.prefix = text[:-4] if text.endswith((".idx", ".bin")) else text
        if (vocab_size is None) == (dtype is None):
            raise DataError(self.prefix, "the dtype is not clear", "give either vocab_size or dtype")
        wanted = np.dtype(dtype) if vocab_size is None else token_dtype(vocab_size)
        codes = [code for code, name in DTYPES.items() if np.dtype(name) == wanted and wanted.kind != "f"]
        if not codes:
            raise DataError(self.prefix, f"dtype {wanted}", "the format stores ids as u8, i8, i16, i32, i64 or u16")
        self.dtype, self._code, self._vocab_size = np.dtype(DTYPES[codes[0]]), codes[0], vocab_size
        self._lengths, self._bounds = array("i"), array("q", [0])
        mark = f".{uuid.uuid4().hex[:12]}.tmp"
        self._temporary = {suffix: self.prefix + suffix + mark for suffix in (".bin", ".idx")}
        try:
            self._bin: BinaryIO = open(self._temporary[".bin"], "xb")  # noqa: SIM115 - closed by finish or discard
        except OSError as error:
            raise DataError(self.prefix, f"cannot be written ({error.strerror})", "its folder must exist") from error

    def add_document(self, tokens: ArrayLike, lengths: list[int] | None = None) -> None:
        """Appends one document.

        Args:
            tokens: [n] integers, n > 0.
            lengths: how many tokens each of its sequences has, summing to n; one sequence if left out.

        Raises:
            DataError: an empty document, lengths that do not add up, or an id that the vocabulary or dtype lacks.
        """
        number = len(self._bounds) - 1
        subject = f"{self.prefix}, document {number}"
        ids = stored_ids(tokens, self.dtype, self._vocab_size, subject)
        if len(ids) == 0:
            raise DataError(self.prefix, f"document {number} is empty", "every document holds a token")
        parts = [len(ids)] if lengths is None else lengths
        if sum(parts) != len(ids) or min(parts) < 0 or max(parts) >= 1 << 31:
            raise DataError(subject, f"sequence lengths {parts}", f"int32s that add up to {len(ids)} tokens")
        self._bin.write(ids.tobytes())
        self._lengths.extend(parts)
        self._bounds.append(len(self._lengths))

    def finish(self) -> None:
        """Writes the index and gives both files their names. Raises DataError if there is no document."""
        try:
            self._finish()
        except BaseException:
            self.discard()
            raise

    def _finish(self) -> None:
        if len(self._bounds) == 1:
            raise DataError(self.prefix, "holds no tokens", "training data needs at least one document")
        _close_durably(self._bin)
        lengths = np.asarray(self._lengths, "<i4")
        sizes = lengths.astype("<i8") * self.dtype.itemsize
        with open(self._temporary[".idx"], "xb") as file:
            file.write(HEADER.pack(MAGIC, VERSION, self._code, len(lengths), len(self._bounds)))
            file.write(lengths.tobytes())
            file.write((np.cumsum(sizes) - sizes).astype("<i8").tobytes())
            file.write(np.asarray(self._bounds, "<i8").tobytes())
            _close_durably(file)
        # No index, no dataset: while the pair changes, a reader finds no .idx rather than one of another .bin.
        Path(self.prefix + ".idx").unlink(missing_ok=True)
        os.replace(self._temporary[".bin"], self.prefix + ".bin")
        os.replace(self._temporary[".idx"], self.prefix + ".idx")

    def discard(self) -> None:
        """Removes whatever was written."""
        self._bin.close()
        for path in self._temporary.values():
            Path(path).unlink(missing_ok=True)

    def __enter__(self) -> IndexedDatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.discard()


def _file_size(path: str) -> int:
    if not os.path.isfile(path):
        raise DataError(path, "is not there", "a Megatron dataset is a .bin and an .idx with the same prefix")
    if not os.access(path, os.R_OK):
        raise DataError(path, "cannot be read", "its permissions must let this user read it")
    return os.path.getsize(path)


def _close_durably(file: BinaryIO) -> None:
    """On disk before the rename is: otherwise a power cut can leave the name with nothing behind it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
