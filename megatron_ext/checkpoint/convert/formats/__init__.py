"""Formats of checkpoints: one adapter each, between its tensors and the canonical ones, and none knows another.

To add a format, write a class with the face of `Format` and list it in `FORMATS`. All an adapter does is describe:

* `read` lists what lies in the files: for each tensor its file, byte offset, dtype and shape, and as `Part`s which
  numbers of which canonical tensors it holds. It reads headers, indexes and (allow-listed) pickles, never numbers. A
  container that is not safetensors is no different once the offset of a tensor's bytes is known: in a `.pt` file and in
  a `.distcp` file storages lie uncompressed. A tensor that is not dense and row-major is described by a `View`.
  Two stored tensors with the same part are compared when they are read. What the format has and the canonical model
  has not (`_extra_state`) the adapter leaves out by its exact name; whatever it does not know it maps to a canonical
  name of its own making, which is then refused with file and tensor.
* `lay_out` is given the canonical tensors to be written, with dtype and shape, and answers with files: for each tensor
  its offset, dtype, shape and `Part`s, and the bytes around them. What the format cannot hold goes into `carried`
  with the reason (written beside, read back by every adapter), and what it holds only once into `aliases`.

Inverse, streaming, plans, verification, checks and resuming follow from these descriptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from megatron_ext.checkpoint.convert.folder import Folder
from megatron_ext.checkpoint.convert.formats.dcp import Dcp
from megatron_ext.checkpoint.convert.formats.deepseek import DeepSeek
from megatron_ext.checkpoint.convert.formats.deepspeed import DeepSpeed
from megatron_ext.checkpoint.convert.formats.huggingface import HuggingFace
from megatron_ext.checkpoint.convert.formats.layout import Layout, Options
from megatron_ext.checkpoint.convert.formats.megatron import Megatron
from megatron_ext.checkpoint.convert.formats.megatron_legacy import MegatronLegacy
from megatron_ext.checkpoint.convert.model import Model
from megatron_ext.checkpoint.convert.source import Reading
from megatron_ext.checkpoint.convert.tensors import Entry
from megatron_ext.config.errors import CheckpointError


class Format(Protocol):
    """One format.

    Attributes:
        name: for `--to` and `--from`.
        title: for people.
        dtypes: what it holds; without F8_E4M3, FP8 weights are written in BF16 and their scales are carried.
        states: kinds of optimizer state (`names.STATES`) that it has places for.
        options: names of the `Options` that it heeds; others that differ from their defaults are refused.
    """

    name: str
    title: str
    dtypes: frozenset[str]
    states: frozenset[str]
    options: frozenset[str]

    def detect(self, folder: Folder) -> bool:
        """Whether a folder is of this format, by the names of its files."""

    def read(self, folder: Folder, config: Mapping[str, Any] | None) -> Reading:
        """Lists a checkpoint.

        Args:
            folder: all files must be opened through it.
            config: the content of a Hugging Face `config.json` given by the user; None to find one in the folder.

        Raises:
            CheckpointError: it is damaged, or the config is missing.
        """

    def lay_out(self, model: Model, entries: Mapping[str, Entry], options: Options) -> Layout:
        """Places canonical tensors in files.

        Args:
            model: what they are of.
            entries: name -> dtype and shape, in the order of the table, each weight with its scales behind it.
            options: sizes and parallel layout.

        Raises:
            CheckpointError: the model does not fit the options.
        """


FORMATS: tuple[Format, ...] = (HuggingFace(), DeepSeek(), DeepSpeed(), Dcp(), Megatron(), MegatronLegacy())


def named(name: str) -> Format:
    """A format by its name.

    Raises:
        CheckpointError: there is none.
    """
    for format in FORMATS:
        if format.name == name:
            return format
    raise CheckpointError("--to or --from", f"is {name!r}, which is no format",
                          f"formats are {', '.join(format.name for format in FORMATS)}")


def detect(folder: Folder) -> Format:
    """The format of a folder.

    Raises:
        CheckpointError: it is of none, or of several.
    """
    found = [format for format in FORMATS if format.detect(folder)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(format.name for format in found or FORMATS)
    raise CheckpointError(folder.path, f"could be {known}" if found else "is no checkpoint of a format known here",
                          "say which with --from" if found else f"known are {known}")
