"""The command `megatron-ext`. One module per sub-command, imported when it runs, so that `--help` stays quick."""

from __future__ import annotations

import typer

app = typer.Typer(name="megatron-ext", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """The training system of DeepSeek-V3 as a DeepSpeed extension."""


@app.command()
def doctor() -> None:
    """Shows what this environment offers: versions, device, CPU kernels, run-time builds and locks left behind."""
    from megatron_ext.cli.doctor import report

    report()
