"""The `baton` command: run the mesh, ask it, look at it, measure it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from baton import __version__
from baton.cli import bench, chat, connection, generate, new_key, services, status, top, trace, up, verify

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


def _file(flag: str, variable: str, says: str) -> Any:
    return typer.Option(flag, envvar=variable, help=says, metavar="FILE", show_default=False)


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
    tls: Annotated[bool, typer.Option("--tls", envvar="BATON_CLIENT_TLS", help="Talk TLS with the router.")] = False,
    ca: Annotated[
        Path | None, _file("--ca", "BATON_CLIENT_CA", "PEM: who may have signed the router's certificate; TLS.")
    ] = None,
    cert: Annotated[
        Path | None, _file("--cert", "BATON_CLIENT_CERT", "PEM: certificate to show the router; TLS.")
    ] = None,
    key: Annotated[Path | None, _file("--key", "BATON_CLIENT_KEY", "PEM: its private key.")] = None,
    server_name: Annotated[
        str,
        typer.Option(
            envvar="BATON_CLIENT_SERVER_NAME",
            help="Name that the router's certificate has, if not its host's.",
            metavar="NAME",
            show_default=False,
        ),
    ] = "",
    api_key_file: Annotated[
        Path | None,
        _file("--api-key-file", "BATON_API_KEY_FILE", "API key or JSON Web Token. Default: what BATON_API_KEY has."),
    ] = None,
    admin_token_file: Annotated[
        Path | None,
        _file(
            "--admin-token-file",
            "BATON_ADMIN_TOKEN_FILE",
            "What operators' ports ask for. Default: what BATON_ADMIN_TOKEN has.",
        ),
    ] = None,
) -> None:
    connection.choose(
        tls=tls,
        ca=ca,
        cert=cert,
        key=key,
        server_name=server_name,
        api_key_file=api_key_file,
        admin_token_file=admin_token_file,
    )


app.command("up", rich_help_panel="Mesh")(up.up)
app.command("new-key", rich_help_panel="Mesh")(new_key.new_key_command)
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
