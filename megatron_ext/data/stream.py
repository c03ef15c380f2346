"""A flat stream of token ids with document boundaries: what a corpus is once it is tokenised.

`TokenStream` holds it in memory; `indexed.IndexedDataset` is the same face over Megatron's files.

Letters: N tokens, D documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_ext.config.errors import ConfigError
from megatron_ext.data.errors import DataError

SCAN_TOKENS = 1 << 22
"""Tokens read at a time by scans of the whole corpus, which may be a memory map larger than memory."""


class TokenStream:
    """Token ids of packed documents, in memory.

    Args:
        tokens: [N] of any integer dtype; not copied where NumPy can avoid it.
        document_starts: [D + 1] offsets of the documents in `tokens`, 0 first and N last; one document if left out.
        name: what errors call it.

    Raises:
        DataError: no tokens, tokens that are not integers, boundaries that do not fit, an empty document (by number).
    """

    def __init__(self, tokens: ArrayLike, document_starts: ArrayLike | None = None, name: str = "tokens"):
        self.name = name
        self.tokens: NDArray[Any] = np.asarray(tokens)
        if self.tokens.ndim != 1 or self.tokens.dtype.kind not in "iu":
            found = f"an array of shape {list(self.tokens.shape)} and dtype {self.tokens.dtype}"
            raise DataError(name, found, "tokens are one row of integers")
        starts = np.asarray([0, len(self.tokens)] if document_starts is None else document_starts, dtype=np.int64)
        if starts.ndim != 1 or len(starts) < 1 or starts[0] != 0 or starts[-1] != len(self.tokens):
            raise DataError(name, "document boundaries do not cover the tokens", f"0 first, {len(self.tokens)} last")
        check_documents(name, starts, 0)
        if len(self.tokens) == 0:
            raise DataError(name, "holds no tokens", "training data needs at least one document")
        self._document_starts = starts

    @property
    def document_starts(self) -> NDArray[np.int64]:
        """[D + 1] int64 offsets of the documents in `tokens`; the last one is N."""
        return self._document_starts

    @property
    def num_documents(self) -> int:
        return len(self.document_starts) - 1

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def document(self, number: int) -> NDArray[Any]:
        """[tokens of the document] ids, a view in the stored dtype. Raises IndexError outside 0..D-1."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"{self.name}: document {number} of {self.num_documents}")
        return self.tokens[self.document_starts[number] : self.document_starts[number + 1]]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the ids and boundaries: goes into a run's record, and a resume compares it."""
        digest = hashlib.sha256(f"{self.tokens.dtype.str} {len(self.tokens)}".encode())
        for first in range(0, len(self.tokens), SCAN_TOKENS):
            digest.update(np.ascontiguousarray(self.tokens[first : first + SCAN_TOKENS]).data)
        digest.update(np.ascontiguousarray(self.document_starts).data)
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """A run's record of its data: name, documents, tokens, fingerprint."""
        counts = {"documents": self.num_documents, "tokens": self.num_tokens}
        return {"name": self.name, **counts, "fingerprint": self.fingerprint}

    def check_ids(self, vocab_size: int, shard: int = 0, num_shards: int = 1) -> None:
        """Reads every id once and refuses the first one outside 0..vocab_size-1.

        Args:
            vocab_size: size of the model's embedding.
            shard, num_shards: read only this part of the stream, so that the ranks of a job share the scan of a large
                corpus; each then knows of its own part only.

        Raises:
            DataError: names the document, the place in it and the id.
        """
        if vocab_size < 1:
            raise ConfigError("vocab_size", vocab_size, "a vocabulary holds at least one token")
        if not 0 <= shard < num_shards:
            raise ConfigError("shard", shard, f"must lie in 0..{num_shards - 1}")
        first, last = (self.num_tokens * part // num_shards for part in (shard, shard + 1))
        for start in range(first, last, SCAN_TOKENS):
            chunk = self.tokens[start : min(start + SCAN_TOKENS, last)]
            if chunk.max() >= vocab_size or chunk.min() < 0:
                self._refuse_id(chunk, start, vocab_size)

    def _refuse_id(self, window: NDArray[Any], start: int, vocab_size: int) -> None:
        place = start + int(np.flatnonzero((window >= vocab_size) | (window < 0))[0])
        document = int(np.searchsorted(self.document_starts, place, side="right")) - 1
        offset = place - int(self.document_starts[document])
        found = f"document {document} holds token id {int(self.tokens[place])} at its position {offset}"
        raise DataError(self.name, found, f"ids lie in 0..{vocab_size - 1} for a vocabulary of {vocab_size}")

    def window(self, start: int, length: int, vocab_size: int | None = None) -> NDArray[np.int64]:
        """A fresh [length] int64 copy of the tokens from `start` on, checked against `vocab_size` if it is given."""
        ids = self.tokens[start : start + length].astype(np.int64)
        if vocab_size is not None and (ids.max() >= vocab_size or ids.min() < 0):
            self._refuse_id(ids, start, vocab_size)
        return ids

    @classmethod
    def from_documents(
        cls, documents: Iterable[ArrayLike], vocab_size: int | None = None, name: str = "tokens"
    ) -> TokenStream:
        """Packs documents end to end in Megatron's dtype for `vocab_size` (int32 if unknown).

        Takes little more memory than the tokens. Raises DataError for an id outside the vocabulary, by document.
        """
        dtype = token_dtype(vocab_size) if vocab_size is not None else np.dtype("<i4")
        packed, starts = bytearray(), [0]
        for number, document in enumerate(documents):
            ids = stored_ids(document, dtype, vocab_size, f"{name}, document {number}")
            packed += ids.tobytes()
            starts.append(starts[-1] + len(ids))
        return cls(np.frombuffer(packed, dtype), starts, name)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Megatron's choice of storage: uint16 for a vocabulary under 65,500, else int32."""
    return np.dtype("<u2") if vocab_size < 65500 else np.dtype("<i4")


def stored_ids(ids: ArrayLike, dtype: np.dtype[Any], vocab_size: int | None, subject: object) -> NDArray[Any]:
    """`ids` [n] in the dtype of storage; DataError for an id that the vocabulary or (if not given) the dtype lacks.

    NumPy alone would store 70000 as 4464 in a uint16 and say nothing.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        found = f"an array of shape {list(array.shape)} and dtype {array.dtype}"
        raise DataError(subject, found, "a document is one row of integer token ids")
    largest = np.iinfo(dtype).max if vocab_size is None else vocab_size - 1
    if array.size and (array.min() < 0 or array.max() > largest):
        wrong = array[(array < 0) | (array > largest)][0]
        raise DataError(subject, f"token id {int(wrong)}", f"ids lie in 0..{largest}")
    return array.astype(dtype, copy=False)


def check_documents(name: str, starts: NDArray[np.int64], first_document: int) -> None:
    """Refuses, by number, an empty document among those that `starts` bounds; the first is number `first_document`."""
    sizes = np.diff(starts)
    if len(sizes) and sizes.min() <= 0:
        number = int(np.flatnonzero(sizes <= 0)[0])
        if sizes[number] == 0:
            raise DataError(name, f"document {first_document + number} is empty", "every document holds a token")
        raise DataError(name, f"document {first_document + number} ends before it starts", "boundaries only grow")
