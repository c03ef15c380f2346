"""Training data: Megatron's indexed files, text files, samples, blends, and the order in which shards read them."""

from megatron_ext.data.dataset import IGNORED_LABEL, BlendedDataset, GPTDataset, apply_loss_mask
from megatron_ext.data.errors import DataError
from megatron_ext.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron_ext.data.loader import MicroBatchLoader
from megatron_ext.data.stream import TokenStream
from megatron_ext.data.text import (
    ByteTokenizer,
    JsonTokenizer,
    Tokenizer,
    standard_library_files,
    text_files,
    text_stream,
    write_indexed,
)

__all__ = [
    "IGNORED_LABEL",
    "BlendedDataset",
    "ByteTokenizer",
    "DataError",
    "GPTDataset",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "JsonTokenizer",
    "MicroBatchLoader",
    "TokenStream",
    "Tokenizer",
    "apply_loss_mask",
    "standard_library_files",
    "text_files",
    "text_stream",
    "write_indexed",
]
