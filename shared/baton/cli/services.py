"""`baton router`, `baton cache`, `baton prefill`, `baton decode`: one service in the foreground.

Their flags are those of `python -m baton_router` and the others, --help included. `baton cache` has commands as well.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Final

import typer

from baton.cli import cache

_SERVICES: Final = {
    "router": "Run one router: the public API in front of the tiers.",
    "cache": "Run one cache service: the response cache in front of Redis. Or ask one: cache stats, flush, get.",
    "prefill": "Run one prefill worker: computes prompts and hands their KV over.",
    "decode": "Run one decode worker: batches and runs requests.",
}


def register(app: typer.Typer) -> None:
    """Add one command per service."""
    for name, summary in _SERVICES.items():
        app.command(
            name,
            help=summary,
            rich_help_panel="One service",
            add_help_option=False,
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )(_runner(name))


def command(service: str) -> list[str]:
    """The command line of a service, without flags. By name only: the library never imports a service."""
    return [sys.executable, "-m", f"baton_{service}"]


def _runner(name: str) -> Callable[[typer.Context], None]:
    def run(context: typer.Context) -> None:
        if name == "cache" and context.args[:1] and context.args[0] in cache.COMMANDS:
            cache.app(context.args, prog_name="baton cache")
        if importlib.util.find_spec(f"baton_{name}") is None:
            typer.echo(f"error: the {name} service is not installed", err=True)
            raise typer.Exit(2)
        line = [*command(name), *context.args]
        sys.stdout.flush()
        # The service takes this process over: signals, exit code and pid are its own.
        os.execv(line[0], line)

    return run
