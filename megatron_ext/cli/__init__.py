"""The command `megatron-ext`. One module per sub-command, imported when it runs, so that `--help` stays quick."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from megatron_ext.cli import schedule
from megatron_ext.config.errors import UserError


class _Commands(TyperGroup):
    """What is wrong with the user's input is said in one line, without a traceback; the exit code is 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `| head` has seen enough; typer ends quietly
        except (UserError, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(name="megatron-ext", cls=_Commands, no_args_is_help=True, add_completion=False,
                  pretty_exceptions_enable=False)
app.add_typer(schedule.app, name="schedule")


@app.callback()
def main() -> None:
    """The training system of DeepSeek-V3 as a DeepSpeed extension."""


@app.command()
def doctor() -> None:
    """Shows what this environment offers: versions, device, CPU kernels, run-time builds and locks left behind."""
    from megatron_ext.cli.doctor import report

    report()
