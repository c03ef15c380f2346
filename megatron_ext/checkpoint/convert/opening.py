"""Opening a checkpoint: its format found out, its tensors listed, what an earlier conversion left beside them read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.convert import formats, safetensors_io
from megatron_ext.checkpoint.convert.folder import Folder, check_name, parse_json
from megatron_ext.checkpoint.convert.source import CARRIED, FACTS, MANIFEST, Source, assemble
from megatron_ext.checkpoint.convert.tensors import Stored, many_objects, renamed
from megatron_ext.config.errors import CheckpointError, shown

_SUM = re.compile(r"[0-9a-f]{32}")


def open_checkpoint(path: Path | str, format: str | None = None, config: Path | str | None = None,
                    follow_links: bool = False) -> Source:
    """Reads the headers of a checkpoint of any format.

    Args:
        path: its folder.
        format: name of its format; found out if None.
        config: a Hugging Face `config.json` (or a folder with one), for checkpoints without.
        follow_links: read through symbolic links.

    Raises:
        CheckpointError: it is not exactly one whole checkpoint; the first file and tensor at fault.
    """
    folder = Folder(Path(path), follow_links)
    adapter = formats.detect(folder) if format is None else formats.named(format)
    with many_objects():
        reading = adapter.read(folder, None if config is None else _given(Path(config)))
        facts = _facts(folder)
        beside = _carried(folder, facts)
        digests = _digests(folder, {stored.file for stored in reading.stored + beside})
        return assemble(folder, adapter.name, reading, beside, facts, digests)


def _given(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from None


def _facts(folder: Folder) -> dict[str, Any]:
    """The content of carried.json, checked."""
    if not folder.has(CARRIED):
        return {}
    name = f"{CARRIED}/{FACTS}"
    facts = folder.read_json(name)
    if facts.get("format") != 1:
        raise CheckpointError(folder / name, f"has format {shown(facts.get('format'))}",
                              "this version reads format 1")
    for key in ("files", "aliases", "materialised", "fp32"):
        values = facts.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise CheckpointError(folder / name, f"has {key} that is no list of names")
    for file in facts.get("files", []):
        if check_name(file, folder / name).split("/")[0] != CARRIED:
            raise CheckpointError(folder / name, f"names {file}", f"what is carried lies in {CARRIED}")
    if not isinstance(facts.get("config", ""), str):
        raise CheckpointError(folder / name, "has a config that is no text")
    if "config" in facts:
        parse_json(facts["config"].encode(errors="replace"), folder / name)
    return facts


def _carried(folder: Folder, facts: dict[str, Any]) -> list[Stored]:
    stored: dict[str, Stored] = {}
    for file in facts.get("files", []):
        for name, (dtype, shape, offset) in safetensors_io.read_header(folder, file)[0].items():
            if name in stored:
                raise CheckpointError(folder / file, f"is also in {stored[name].file}", tensor=name)
            stored[name] = renamed(name, name, file, offset, dtype, shape)
    if folder.has(CARRIED) and (folder / CARRIED).is_dir():
        for name in sorted(os.listdir(folder / CARRIED)):
            if name.endswith(".safetensors") and f"{CARRIED}/{name}" not in facts.get("files", []):
                raise CheckpointError(folder / CARRIED / name, f"is not named by {FACTS}")
    return list(stored.values())


def _digests(folder: Folder, files: set[str]) -> dict[tuple[str, str], str]:
    """Checksums of tensors from our manifest, if there is one; sizes of files are compared at once."""
    if not folder.has(MANIFEST):
        return {}
    where, manifest = folder / MANIFEST, folder.read_json(MANIFEST)
    listed = manifest.get("files")
    if manifest.get("format") != 1 or not isinstance(listed, dict):
        raise CheckpointError(where, "is not a manifest of format 1")
    digests: dict[tuple[str, str], str] = {}
    hint = f"if the files were changed on purpose, remove {MANIFEST}"
    for file, entry in listed.items():
        sums = entry.get("tensors", {}) if isinstance(entry, dict) else None
        if not isinstance(sums, dict) or not all(isinstance(s, str) and _SUM.fullmatch(s) for s in sums.values()):
            raise CheckpointError(where, f"has an entry {file[:200]!r} that is none")
        if "tensors" not in entry:
            continue
        if not folder.has(file):
            raise CheckpointError(folder / file, "is missing", f"{MANIFEST} lists it", hint)
        if (size := folder.size(file)) != entry.get("bytes"):
            raise CheckpointError(folder / file, f"has {size} bytes", f"{MANIFEST} says {entry.get('bytes')}", hint)
        digests |= {(file, name): digest for name, digest in sums.items()}
    if strange := sorted(files - listed.keys()):
        raise CheckpointError(folder / strange[0], f"is not in {MANIFEST}", None, hint)
    return digests
