"""`megatron-ext inspect` and `megatron-ext diff`: what a checkpoint is, and where two differ, across formats."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import typer

from megatron_ext.checkpoint.convert import Source, open_checkpoint
from megatron_ext.checkpoint.convert.names import split_state
from megatron_ext.checkpoint.convert.verify import compared_bytes, differences
from megatron_ext.cli.convert import bar, describe, gigabytes

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads",
          "q_lora_rank", "kv_lora_rank", "num_experts_per_tok", "n_shared_experts", "tie_word_embeddings")


def report(path: Path, from_: str | None, config: Path | None, follow_links: bool) -> None:
    """Prints what the headers tell; a checkpoint that is not whole is refused with its first fault."""
    source = open_checkpoint(path, from_, config, follow_links)
    typer.echo(f"{path}: {describe(source)}")
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
    if not found:
        typer.echo(f"the same: {len(left.origins)} tensors")
        return
    found.sort(key=lambda difference: (-difference.relative, difference.name))
    for difference in found[:top or None]:
        amount = f", by up to {difference.largest:.3g} ({difference.relative:.2%} of the largest number)" \
            if difference.largest else ""
        typer.echo(f"{difference.name}: {difference.what}{amount}")
    if top and len(found) > top:
        typer.echo(f"... and {len(found) - top} more")
    raise typer.Exit(1)


def _open(path: Path, config: Path | None, follow_links: bool) -> Source:
    given = None if config is None or (path / "config.json").exists() else config
    return open_checkpoint(path, None, given, follow_links)
