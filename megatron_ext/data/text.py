"""Text files to tokens: bytes by default, any `tokenizer.json` otherwise; one file is one document and ends with eos.

`ByteTokenizer` needs no download and no training: ids 0..255 are the bytes of the file as they are, so text that is
not valid UTF-8 costs nothing and decodes back exactly. `standard_library_files` is a corpus that every Python has:
its own source.

    tokenizer = ByteTokenizer()
    train = text_stream(standard_library_files("train"), tokenizer, name="standard library")
    held_out = text_stream(standard_library_files("held_out"), tokenizer, name="standard library, held out")
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_ext.config.errors import ConfigError
from megatron_ext.data.errors import DataError
from megatron_ext.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_ext.data.stream import TokenStream

END_OF_TEXT = ("<｜end▁of▁sentence｜>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Names of the end-of-document token, DeepSeek's first, looked for in this order in a tokenizer.json."""


class Tokenizer(Protocol):
    """Bytes of a file to ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id there can be: the least size of an embedding."""
        ...

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        ...

    def encode(self, content: bytes) -> NDArray[Any]:
        """[n] ids of a document, without eos."""
        ...

    def decode(self, ids: ArrayLike) -> str:
        """Text of [n] ids; special tokens leave no trace."""
        ...


class ByteTokenizer:
    """Bytes as they are: ids 0..255, bos 256, eos 257; 258 and 259 are unused and make the size a multiple of 4."""

    bos_id = 256
    eos_id = 257
    vocab_size = 260

    def encode(self, content: bytes) -> NDArray[np.uint8]:
        """[len(content)] uint8."""
        return np.frombuffer(content, np.uint8)

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The bytes among `ids`; exactly what was encoded."""
        array = np.asarray(ids)
        return bytes(array[(array >= 0) & (array < 256)].astype(np.uint8))

    def decode(self, ids: ArrayLike) -> str:
        """Text; bytes that are not UTF-8 (or a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A Hugging Face `tokenizer.json`, read by the `tokenizers` package (imported only here).

    Bytes that are not UTF-8 become U+FFFD before they are encoded. The text cannot forge special tokens, and
    truncation and padding that the file asks for are switched off.

    Args:
        path: the file, or the folder it lies in.
        eos_token: name of the end-of-document token; by default the first of END_OF_TEXT that the vocabulary has.

    Raises:
        DataError: no such file, not a tokenizer, no `tokenizers` package, or no eos.
    """

    def __init__(self, path: str | os.PathLike[str], eos_token: str | None = None):
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise DataError(file, "is not there", "give a tokenizer.json or the folder it lies in")
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(file, "the package `tokenizers` is missing", "pip install tokenizers") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises bare Exception
            raise DataError(file, f"cannot be read as a tokenizer ({error})", "it must be a tokenizer.json") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        names = END_OF_TEXT if eos_token is None else (eos_token,)
        found = [vocabulary[name] for name in names if name in vocabulary]
        if not found:
            raise DataError(file, f"has no token {' or '.join(names)}", "name its end-of-document token with eos_token")
        self.eos_id: int = found[0]
        # Ids may have gaps (added tokens with numbers of their own), so the count of entries can be too small.
        self.vocab_size: int = max(vocabulary.values()) + 1

    def encode(self, content: bytes) -> NDArray[np.int32]:
        """[n] int32."""
        text = content.decode("utf-8", errors="replace")
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: ArrayLike) -> str:
        return str(self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True))


def text_files(sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], suffix: str = "") -> list[Path]:
    """The files that paths, folders and globs name, each once.

    A folder gives all its files, recursively, but hidden ones. Sources keep their order; what one source gives is
    sorted by its path below that source, so the order is the same on every machine.

    Args:
        sources: one or several paths, folders or globs (`**` crosses folders).
        suffix: of a folder only the files whose name ends so, e.g. ".txt".

    Raises:
        DataError: a source that names no file.
    """
    given = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not given:
        raise DataError("text files", "no path, folder or glob was given", "at least one is needed")
    files: dict[Path, Path] = {}
    for source in given:
        path = Path(source)
        if path.is_file():
            found = [path]
        elif path.is_dir():
            found = _files_below(path, suffix, skip=())
        else:
            matches = (Path(match) for match in glob.glob(os.fspath(source), recursive=True))
            found = sorted((match for match in matches if match.is_file()), key=lambda match: match.parts)
        if not found:
            raise DataError(source, "names no file", "give a file, a folder with files, or a glob that matches some")
        for file in found:
            files.setdefault(file.resolve(), file)
    return list(files.values())


def _files_below(root: Path, suffix: str, skip: Collection[str]) -> list[Path]:
    """Files whose name ends with `suffix`, sorted by path; not in hidden, linked or `skip`ped folders."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        paths = (Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith("."))
        found += [path for path in paths if path.is_file()]
    return sorted(found, key=lambda path: path.parts)


def encode_files(
    files: Iterable[str | os.PathLike[str]], tokenizer: Tokenizer, skip_empty: bool = False
) -> Iterator[NDArray[Any]]:
    """One document per file, in order and one at a time: its ids and eos, int32 (uint16 for a small vocabulary).

    Raises:
        DataError: a file that cannot be read, or (unless `skip_empty`) that holds no tokens; by its path.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    for file in files:
        try:
            content = Path(file).read_bytes()
        except OSError as error:
            raise DataError(file, f"cannot be read ({error.strerror})", "every text file must be readable") from error
        ids = tokenizer.encode(content)
        if len(ids) == 0:
            if skip_empty:
                continue
            raise DataError(file, "is an empty document", "remove it, or pass skip_empty=True")
        document = np.empty(len(ids) + 1, dtype)
        document[:-1], document[-1] = ids, tokenizer.eos_id
        yield document


def text_stream(
    files: Iterable[str | os.PathLike[str]], tokenizer: Tokenizer, *, name: str = "text", skip_empty: bool = False
) -> TokenStream:
    """The files as one stream in memory (2 or 4 bytes a token); `stream.describe()` goes into the run's record."""
    documents = encode_files(files, tokenizer, skip_empty)
    return TokenStream.from_documents(documents, tokenizer.vocab_size, name)


def write_indexed(
    path: str | os.PathLike[str],
    files: Iterable[str | os.PathLike[str]],
    tokenizer: Tokenizer,
    *,
    skip_empty: bool = False,
) -> IndexedDataset:
    """Writes the files as a `.bin/.idx` pair with the prefix `path`, for a corpus larger than memory, and opens it."""
    with IndexedDatasetWriter(path, vocab_size=tokenizer.vocab_size) as writer:
        for document in encode_files(files, tokenizer, skip_empty):
            writer.add_document(document)
    return IndexedDataset(path)


def standard_library_files(split: str = "train", held_out: float = 0.02) -> list[Path]:
    """The `.py` files of this Python's standard library: about 30 MB under the PSF licence, no `site-packages`.

    A file is held out if the SHA-256 of its content, read as a number in [0, 1), is below `held_out`: the same files
    on every machine with the same Python, and copies of one file are never on both sides. Empty files are left out.
    The source differs between Python versions, so a run records `stream.describe()`.

    Args:
        split: "train" or "held_out".
        held_out: the share of files to hold out.

    Raises:
        ConfigError: another split, or a share outside (0, 1).
        DataError: a Python without its source, or a split without files.
    """
    if split not in ("train", "held_out"):
        raise ConfigError("split", split, 'is "train" or "held_out"')
    if not 0 < held_out < 1:
        raise ConfigError("held_out", held_out, "a share between 0 and 1")
    root = Path(sysconfig.get_paths()["stdlib"])
    files: list[Path] = []
    for file in _files_below(root, ".py", skip=("site-packages", "dist-packages", "__pycache__")):
        content = file.read_bytes()
        chance = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2.0**64
        if content and (chance < held_out) == (split == "held_out"):
            files.append(file)
    if not files:
        raise DataError(root, f"has no source files for the split {split!r}", "use text files of your own")
    return files
