"""`megatron-ext inspect` and `megatron-ext diff`: what a checkpoint is, and where two differ, across formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from megatron_ext.checkpoint.convert import Source, open_checkpoint
from megatron_ext.checkpoint.convert.names import split_state
from megatron_ext.checkpoint.convert.verify import compared_bytes, differences
from megatron_ext.cli.convert import bar, describe, gigabytes
from megatron_ext.config.errors import shown

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads",
          "q_lora_rank", "kv_lora_rank", "num_experts_per_tok", "n_shared_experts", "tie_word_embeddings")


def report(path: Path, from_: str | None, config: Path | None, follow_links: bool) -> None:
    """Prints what the headers tell; a checkpoint that is not whole is refused with its first fault."""
    source = open_checkpoint(path, from_, config, follow_links)
    typer.echo(f"{path}: {describe(source)}")
    for note in source.notes:
        typer.echo(f"note: {note}")
    settings = source.model.config
    typer.echo("config: " + ", ".join(f"{name} = {getattr(settings, name)}" for name in _SIZES))
    if source.reading.step is not None:
        typer.echo(f"step: {source.reading.step}")
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for stored in source.stored:
        counts[stored.dtype] += 1
        sizes[stored.dtype] += stored.nbytes
    typer.echo(f"tensors: {len(source.stored)}, {gigabytes(sum(sizes.values()))}: " + ", ".join(
        f"{counts[dtype]} {dtype} ({gigabytes(sizes[dtype])})" for dtype in sorted(counts)))
    states = Counter(state for name in source.origins if (state := split_state(name)[1]) is not None)
    if states:
        typer.echo("optimizer: " + ", ".join(f"{count} {state}" for state, count in sorted(states.items())))
    if source.carried:
        typer.echo(f"carried beside: original scales of {len(source.carried)} weights")
    typer.echo("checksums: " + ("of every tensor, in a manifest" if source.digests else "none"))


def compare(a: Path, b: Path, config: Path | None, top: int, follow_links: bool) -> None:
    """Prints the tensors that differ; exit code 1 if there are any."""
    left, right = (_open(path, config, follow_links) for path in (a, b))
    with bar("comparing", compared_bytes(left)) as told:
        found = list(differences(left, right, told))
    settings = list(differing_settings(left.model.hf, right.model.hf))
    for key, ours, theirs in settings:
        typer.echo(f"config.json: {key}: {shown(ours)} and {shown(theirs)}")
    if not found:
        typer.echo(f"the same{' numbers' * bool(settings)}: {len(left.origins)} tensors")
        if settings:
            raise typer.Exit(1)
        return
    found.sort(key=lambda difference: (-difference.relative, difference.name))
    for difference in found[:top or None]:
        amount = f", by up to {difference.largest:.3g} ({difference.relative:.2%} of the largest number)" \
            if difference.largest else ""
        typer.echo(f"{difference.name}: {difference.what}{amount}")
    if top and len(found) > top:
        typer.echo(f"... and {len(found) - top} more")
    raise typer.Exit(1)


_NO_SETTINGS = {"architectures", "auto_map", "dtype", "torch_dtype", "quantization_config", "transformers_version",
                "use_cache", "_name_or_path"}
"""Keys of a config that say how a checkpoint was written, and nothing of what the model computes."""


def differing_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys that both configs have with other values: of a model that computes something else with the same tensors."""
    for key in sorted(a.keys() & b.keys() - _NO_SETTINGS):
        if a[key] != b[key]:
            yield key, a[key], b[key]


def _open(path: Path, config: Path | None, follow_links: bool) -> Source:
    given = None if config is None or (path / "config.json").exists() else config
    return open_checkpoint(path, None, given, follow_links)
