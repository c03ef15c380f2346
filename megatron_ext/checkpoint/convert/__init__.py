"""Checkpoints from one framework's format to another's: planned from headers, streamed, checked, resumable.

    names.py, model.py      the one table of canonical names, and which of them a config asks for
    tensors.py              how a format describes its tensors: equations between boxes
    formats/                one adapter per format
    opening.py, source.py   a checkpoint that is read, found whole or refused
    plan.py                 a conversion thought through; stream.py and work.py carry it out, verify.py proves it
    blocks.py, dtype.py     any box of any tensor in any dtype, in bounded memory
"""

from megatron_ext.checkpoint.convert.formats import FORMATS, Format, named
from megatron_ext.checkpoint.convert.formats.layout import Options
from megatron_ext.checkpoint.convert.opening import open_checkpoint
from megatron_ext.checkpoint.convert.plan import Plan, make_plan
from megatron_ext.checkpoint.convert.source import Source
from megatron_ext.checkpoint.convert.stream import run

__all__ = ["FORMATS", "Format", "Options", "Plan", "Source", "make_plan", "named", "open_checkpoint", "run"]
