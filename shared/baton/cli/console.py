"""What all commands share on the terminal: consoles, the --target option, and errors a person can act on."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Final, NoReturn

import grpc
import typer
from rich.console import Console
from rich.markup import escape

from baton.client import BatonRpcError
from baton.client.failover import split_targets

out: Final = Console(highlight=False)
"""Results."""
err: Final = Console(stderr=True, highlight=False)
"""Everything about the results: progress, usage, errors."""

_REORDERING: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _named(target: str | None) -> str | None:
    """Refuse a target without a name in it."""
    if target:
        try:
            split_targets(target)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
    return target


Target = Annotated[
    str | None,
    typer.Option(
        envvar="BATON_TARGET",
        callback=_named,
        help="host:port of the router, or of several with commas between them: when one is lost, the next goes on "
        "(status, top, trace and bench look at the first). "
        "Default: the mesh `baton up` started last, else 127.0.0.1:50051.",
        show_default=False,
        metavar="HOST:PORT[,...]",
    ),
]

Admin = Annotated[
    str | None,
    typer.Option(
        envvar="BATON_ADMIN_TARGET",
        help="host:port of the router's operators' port. Default: that of the mesh `baton up` started last, else "
        "127.0.0.1:50052.",
        show_default=False,
        metavar="HOST:PORT",
    ),
]


def fail(message: str, *, hint: str = "", code: int = 1) -> NoReturn:
    """Print an error and end the command."""
    err.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
    if hint:
        err.print(f"[dim]{escape(hint)}[/]", soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def rpc_errors(target: str) -> Iterator[None]:
    """Turn a failed call inside the block into a message and exit code 1, and Ctrl-C into exit code 130."""
    try:
        yield
    except BatonRpcError as error:
        fail(describe(error, target), hint=_hint(error))
    except KeyboardInterrupt:
        err.print("[dim]cancelled[/]")
        raise typer.Exit(130) from None


def describe(error: BatonRpcError, target: str) -> str:
    """One line, or one per wrong field."""
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        return f"nothing answers at {target}"
    if error.violations:
        return "\n".join(f"{violation.field}: {violation.description}" for violation in error.violations)
    return f"{error.message or error.code.name} ({error.reason or error.code.name})"


def _hint(error: BatonRpcError) -> str:
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        return "Start a mesh with `baton up`, or name a router with --target."
    parts = []
    if error.code is grpc.StatusCode.UNAUTHENTICATED:
        parts.append("Give a key in BATON_API_KEY or --api-key-file, an operator's in BATON_ADMIN_TOKEN.")
    if error.retry_after is not None:
        parts.append(f"Try again in {error.retry_after:g} s.")
    if error.request_id and error.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE):
        parts.append(f"Request id in the logs: {error.request_id}")
    return " ".join(parts)


def interactive() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout.isatty()


def printable(text: str) -> str:
    """Text of a model without what would command the terminal: control characters, and marks that reorder text."""
    return "".join(
        character
        for character in text
        if character in "\n\t" or (unicodedata.category(character) != "Cc" and character not in _REORDERING)
    )
