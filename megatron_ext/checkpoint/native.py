"""Our own checkpoints on disk: DeepSpeed's files, plus what makes them whole and checkable.

    <dir>/latest                                             tag of the last whole checkpoint
    <dir>/<tag>/mp_rank_{MM}_model_states.pt                 dense weights and buffers of mirrored pair MM
    <dir>/<tag>/layer_{L}_expert_{E}_mp_rank_{MM}_model_states.pt     one routed expert
    <dir>/<tag>/[bf16_]zero_pp_rank_{R}_mp_rank_{MM}_optim_states.pt  ZeRO shard of data-parallel rank R
    <dir>/<tag>/expp_rank_{N}_mp_rank_{MM}_optim_states.pt   optimizer without ZeRO, where there are experts
    <dir>/<tag>/megatron_ext_rank_{RRRRR}_states.pt          random generators, data position, optimizer layout
    <dir>/<tag>/config.json                                  of a model of ours, as Hugging Face has it
    <dir>/<tag>/megatron_ext.json                            the manifest: written last; every file with size and CRC-32

A checkpoint is written to `<tag>.unfinished` and takes its name when the manifest is on disk; `latest` follows. So a
save that dies leaves the checkpoint before it in force, even one of the same tag, and a folder without a manifest is
not a whole checkpoint of ours.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.config.errors import CheckpointError

MANIFEST = "megatron_ext.json"
UNFINISHED = ".unfinished"
FORMAT = 1
_REPLACED = ".replaced"
_PLACEMENT = ("stages", "replicas", "expert_parallel", "bounds")
_EXPERTS = re.compile(r"^(?P<prefix>.*\.experts)\.(?P<matrix>\w+)$")


def check_tag(tag: str) -> str:
    """The tag, if it names a folder directly inside the checkpoint folder.

    Raises:
        CheckpointError: it is empty or leads elsewhere.
    """
    if not tag or tag in (".", "..") or "/" in tag or "\\" in tag or "\0" in tag:
        raise CheckpointError(repr(tag), "is not a plain folder name", "a tag names a folder in the checkpoint folder")
    if tag.endswith((UNFINISHED, _REPLACED)):
        raise CheckpointError(repr(tag), "marks what a save that was cut off has left", "rename the folder to load it")
    return tag


def replace_file(path: Path, text: str) -> None:
    """Writes a small file so that readers see the old or the new one, whole, even after a power cut."""
    temporary = path.with_name(path.name + UNFINISHED)
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def publish(folder: Path, name: str) -> None:
    """Renames a whole checkpoint to the tag it was made for. One of that tag gives way only now.

    What else lay in the old folder (notes of the user) is kept, in the new one.
    """
    final = folder.with_name(name)
    old = folder.with_name(name + _REPLACED)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(folder, final)
    _sync_folder(final.parent)
    if old.exists():
        for path in old.iterdir():
            if not path.name.endswith("_states.pt") and not (final / path.name).exists():
                os.rename(path, final / path.name)
        shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Makes renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_latest(directory: Path) -> str:
    """The tag of the last whole checkpoint.

    Raises:
        CheckpointError: no folder, no `latest`, or one that leads nowhere.
    """
    if not directory.is_dir():
        raise CheckpointError(directory, "there is no such folder", "it must be one that save_checkpoint wrote to")
    latest = directory / "latest"
    if not latest.is_file():
        raise CheckpointError(directory, "there is no file 'latest'", "no checkpoint was finished here",
                              "pass tag= to choose one")
    tag = check_tag(latest.read_text().strip())
    if not (directory / tag).is_dir():
        raise CheckpointError(latest, f"names {tag!r}, which is not here", "the folder was moved or deleted")
    return tag


def sum_file(path: Path) -> tuple[int, int]:
    """Size and CRC-32, with the file flushed to disk."""
    crc = 0
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 24):
            crc = zlib.crc32(block, crc)
        return file.tell(), crc


def write_manifest(folder: Path, content: dict[str, Any], files: dict[str, tuple[int, int]]) -> None:
    """Declares the checkpoint whole."""
    sums = {name: {"bytes": size, "crc32": crc} for name, (size, crc) in sorted(files.items())}
    replace_file(folder / MANIFEST, json.dumps({"format": FORMAT, **content, "files": sums}, indent=1))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint of ours.

    Raises:
        CheckpointError: no folder, no manifest, or one that cannot be read.
    """
    if not folder.is_dir():
        beside = sorted(p.name for p in folder.parent.glob(f"{folder.name}.*") if p.suffix in (UNFINISHED, _REPLACED))
        raise CheckpointError(folder, "there is no such folder", "the tag must name a saved checkpoint",
                              f"a save that was cut off left {', '.join(beside)}" if beside else None)
    path = folder / MANIFEST
    if not path.is_file():
        foreign = sorted(p.name for p in folder.glob("*.pt"))[:3]
        raise CheckpointError(folder, f"has no {MANIFEST}" + (f" beside {', '.join(foreign)}" if foreign else ""),
                              "it was not written by megatron_ext, or its save was cut off")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(path, f"cannot be read ({error})", "the manifest is damaged") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(path, f"has format {found!r}", f"this version reads format {FORMAT}")
    wrong = _missing_content(manifest)
    if wrong is not None:
        raise CheckpointError(path, f"lacks {wrong}, or it is not what it should be", "the manifest is damaged")
    for name in manifest["files"]:
        check_tag(name)
    return manifest


def _missing_content(manifest: dict[str, Any]) -> str | None:
    """The first thing that a manifest must have and this one has not."""
    placement, files = manifest.get("placement"), manifest.get("files")
    if not isinstance(placement, dict) or any(key not in placement for key in _PLACEMENT):
        return "placement"
    for key, kind in (("zero_stage", int), ("bf16", bool), ("tensors", dict)):
        if not isinstance(manifest.get(key), kind):
            return key
    if not isinstance(files, dict) or not all(
            isinstance(f, dict) and isinstance(f.get("bytes"), int) and isinstance(f.get("crc32"), int)
            for f in files.values()):
        return "files"
    return None


def check_files(folder: Path, manifest: dict[str, Any], part: int = 0, parts: int = 1) -> None:
    """Compares files with the manifest: the sizes of all, the checksums of every `parts`-th from number `part` on.

    Raises:
        CheckpointError: a file is missing, has another size, or other content.
    """
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(path, "is missing", f"{MANIFEST} lists it")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(path, f"has {size} bytes", f"it had {entry['bytes']} when it was saved")
    for name, entry in list(manifest["files"].items())[part::parts]:
        if sum_file(folder / name)[1] != entry["crc32"]:
            raise CheckpointError(folder / name, "has other content than when it was saved",
                                  "its CRC-32 does not match")


def check_tensors(folder: Path, saved: dict[str, str], ours: dict[str, str]) -> None:
    """Compares names and shapes of the saved model with those of the one that is to load it.

    Raises:
        CheckpointError: for the first tensor that one of the two lacks, or that has another shape.
    """
    for name, shape in ours.items():
        if name not in saved:
            raise CheckpointError(folder, f"has no {name}", "this model has it, so another was saved")
        if saved[name] != shape:
            raise CheckpointError(folder, f"has {name} of shape {saved[name]}", f"this model's has {shape}")
    for name in saved.keys() - ours.keys():
        raise CheckpointError(folder, f"has {name}", "this model does not")


def expert_layer(name: str) -> int:
    """The layer number in a parameter's name, for the expert files: `model.layers.3.mlp...` -> 3."""
    found = re.search(r"\blayers\.(\d+)\.", name)
    return int(found.group(1)) if found else 0


def split_experts(name: str, stacked: Tensor, first: int) -> dict[int, tuple[str, Tensor]]:
    """Per global expert the name and a copy of its matrix: `...experts.up_proj` -> `...experts.5.up_proj.weight`."""
    found = _EXPERTS.match(name)
    assert found is not None, name
    return {first + i: (f"{found['prefix']}.{first + i}.{found['matrix']}.weight", matrix.detach().clone().cpu())
            for i, matrix in enumerate(stacked)}


def join_experts(name: str, experts: dict[str, Tensor], first: int, last: int, path: Path) -> Tensor:
    """The inverse of `split_experts`, for experts first .. last-1.

    Raises:
        CheckpointError: one of them is not among `experts`.
    """
    found = _EXPERTS.match(name)
    assert found is not None, name
    names = [f"{found['prefix']}.{e}.{found['matrix']}.weight" for e in range(first, last)]
    for wanted in names:
        if wanted not in experts:
            raise CheckpointError(path, f"has no tensor {wanted}", "the expert files do not hold this model's experts")
    return torch.stack([experts[n] for n in names])
