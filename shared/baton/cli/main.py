"""The `baton` command: run the mesh, ask it, look at it, measure it."""

from __future__ import annotations

import typer

from baton import __version__
from baton.cli import bench, chat, generate, services, status, top, trace, up, verify

app = typer.Typer(
    name="baton",
    help="Serve language models from separate prefill and decode tiers, and see where every millisecond went.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"baton {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command("up", rich_help_panel="Mesh")(up.up)
app.command("status", rich_help_panel="Mesh")(status.status)
app.command("generate", rich_help_panel="Ask")(generate.generate)
app.command("chat", rich_help_panel="Ask")(chat.chat)
app.command("trace", rich_help_panel="Measure")(trace.trace)
app.command("top", rich_help_panel="Measure")(top.top)
app.command("verify-ledger", rich_help_panel="Measure")(verify.verify_ledger)
app.add_typer(bench.app, name="bench", rich_help_panel="Measure")
services.register(app)


def main() -> None:
    """Entry point of the console script."""
    app()
