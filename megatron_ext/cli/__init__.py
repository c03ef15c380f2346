"""The command `megatron-ext`. One module per sub-command, imported when it runs, so that `--help` stays quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from megatron_ext.cli import quantize, schedule
from megatron_ext.config.errors import UserError


class _Commands(TyperGroup):
    """What is wrong with the user's input is said in one line, without a traceback; the exit code is 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted; a conversion goes on when the same command is given again", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            raise  # `| head` has seen enough; typer ends quietly
        except (UserError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(name="megatron-ext", cls=_Commands, no_args_is_help=True, add_completion=False,
                  pretty_exceptions_enable=False)
app.add_typer(schedule.app, name="schedule")
app.command(epilog=quantize.EPILOG)(quantize.quantize)


@app.callback()
def main() -> None:
    """The training system of DeepSeek-V3 as a DeepSpeed extension."""


@app.command()
def doctor(kernels: Annotated[bool, typer.Option(
        "--kernels", help="Run every FP8 operator on every backend that can, and compare with the reference.")] = False,
) -> None:
    """Shows what this environment offers: versions, device, kernels, run-time builds and locks left behind."""
    from megatron_ext.cli.doctor import check_kernels, report

    report()
    if kernels and not check_kernels():
        raise typer.Exit(1)


@app.command("convert")
def convert_(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint, of any format.")],
    destination: Annotated[Path, typer.Argument(help="Folder to be made.")],
    to: Annotated[str, typer.Option(
        help="Its format: hf, deepseek, deepspeed (universal), dcp, megatron or megatron-legacy.")],
    from_: Annotated[str | None, typer.Option("--from", help="Format of the source; found out if not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp8 or fp32; as it is if not given.")] = None,
    config: Annotated[Path | None, typer.Option(help="Hugging Face config.json of a source without.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest file (hf, dcp, megatron).")] = "5GB",
    mp: Annotated[int, typer.Option(help="Model-parallel ranks (deepseek).")] = 1,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks (megatron-legacy).")] = 1,
    pp: Annotated[int, typer.Option(help="Pipeline stages (megatron-legacy).")] = 1,
    ep: Annotated[int, typer.Option(help="Expert-parallel ranks (megatron-legacy).")] = 1,
    spec: Annotated[str, typer.Option(help="Whose names norms get: te or local (megatron).")] = "te",
    names: Annotated[str, typer.Option(
        help="Whose names parameters get: megatron_ext or transformers (deepspeed).")] = "megatron_ext",
    optimizer: Annotated[str | None, typer.Option(
        help="Optimizer state: keep (default), drop, or carry beside the result if it has no place.")] = None,
    weights: Annotated[str, typer.Option(help="What is converted: model, master (FP32) or ema.")] = "model",
    workers: Annotated[int, typer.Option(help="Processes; 0 for as many as there are cores, at most 8.")] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Only says what would be done; reads no numbers.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Reads the result back and converts it back.")] = False,
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Reads through symbolic links.")] = False,
) -> None:
    """Converts a checkpoint: streamed in bounded memory, resumable, with a manifest of checksums."""
    from megatron_ext.checkpoint.convert.formats.layout import Options
    from megatron_ext.cli.convert import Choice, convert, parse_size

    settings = Options(parse_size(shard_size), mp, tp, pp, ep, spec, names)
    convert(source, destination, to, from_, config, settings, Choice(dtype, optimizer, weights), workers, plan,
            verify, follow_links)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a checkpoint, of any format.")],
    from_: Annotated[str | None, typer.Option("--from", help="Its format; found out if not given.")] = None,
    config: Annotated[Path | None, typer.Option(help="Hugging Face config.json of a checkpoint without.")] = None,
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Reads through symbolic links.")] = False,
) -> None:
    """Says what a checkpoint is: format, model, layers, dtypes, sizes, layout; reads no numbers."""
    from megatron_ext.cli.inspect import report

    report(path, from_, config, follow_links)


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="Folder of a checkpoint, of any format.")],
    b: Annotated[Path, typer.Argument(help="Folder of another, of any format.")],
    config: Annotated[Path | None, typer.Option(help="Hugging Face config.json of those without.")] = None,
    top: Annotated[int, typer.Option(help="How many tensors to name, the most different first; 0 for all.")] = 20,
    follow_links: Annotated[bool, typer.Option("--follow-links", help="Reads through symbolic links.")] = False,
) -> None:
    """Names the tensors in which two checkpoints differ, and by how much, across formats; exit code 1 if any does."""
    from megatron_ext.cli.inspect import compare

    compare(a, b, config, top, follow_links)
