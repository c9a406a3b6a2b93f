"""`baton status`: which models are served, and how every service is."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from baton.cli import console, mesh
from baton.cli.probe import TIERS, MeshState, ServiceState, probe
from baton.cli.waterfall import bar
from baton.client.failover import split_targets

_GAUGE_CELLS: Final = 5


def status(
    target: console.Target = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="A ready file of `baton up`, for the services behind the router.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show the models, and the health and load of every service.

    Exit code 1 when the router does not serve.
    """
    if ready_file is None:
        known = mesh.last()
    else:
        known = mesh.read(ready_file)
        if known is None:
            console.fail(f"{ready_file} is no ready file of `baton up`", code=2)
    address = split_targets(target)[0] if target else (known.router if known else mesh.DEFAULT_TARGET)
    if known is not None and known.router != address:
        known = None
    state = asyncio.run(probe(address, known))
    if as_json:
        print(json.dumps(state.to_json()))
    else:
        _show(state)
    raise typer.Exit(0 if state.serving else 1)


def _show(state: MeshState) -> None:
    if state.router.health == "unreachable":
        console.fail(
            f"nothing answers at {state.target}", hint="Start a mesh with `baton up`, or name a router with --target."
        )
    console.out.print(f"router [bold]{escape(state.target)}[/] ", _health(state.router.health))
    console.out.print()
    console.out.print(_models(state))
    if state.services:
        console.out.print()
        console.out.print(_services(state.services))
    for unused in state.view.unused if state.view is not None else ():
        console.out.print()
        console.out.print(f"[yellow]not used[/]: worker [bold]{escape(unused.target)}[/]: {escape(unused.message)}")


def _models(state: MeshState) -> Table:
    table = _table("model", "ready", "dtype", "chat")
    for title in ("context", "vocabulary", *(TIERS.values() if state.view is not None else ())):
        table.add_column(title, justify="right")
    for model in state.models:
        table.add_row(
            Text(model.name, style="bold"),
            Text("yes", style="green") if model.ready else Text("no worker", style="yellow"),
            model.dtype,
            "yes" if model.chat else "no",
            f"{model.max_context:,}",
            f"{model.vocab_size:,}",
            *(str(state.workers(model.name, tier)) for tier in TIERS.values() if state.view is not None),
        )
    return table


def _services(services: list[ServiceState]) -> Table:
    table = _table("service", "gRPC", "health")
    for title in ("running", "waiting"):
        table.add_column(title, justify="right")
    table.add_column("KV tokens", no_wrap=True)
    for state in services:
        row: list[str | Text] = [state.name, state.address, _health(state.health)]
        if state.load is not None:
            if state.load.draining:
                row[2] = Text("draining", style="yellow")
            load, capacity = state.load.load, state.load.capacity
            share = load.kv_used_tokens / max(1, capacity.kv_tokens)
            gauge = Text(bar(share, _GAUGE_CELLS).ljust(_GAUGE_CELLS, "░"), style="green" if share < 0.9 else "yellow")
            gauge.append(f" {load.kv_used_tokens:,}/{capacity.kv_tokens:,}", style="default")
            row += [f"{load.running}/{capacity.slots}", str(load.waiting), gauge]
        table.add_row(*row)
    return table


def _table(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    for title in titles:
        table.add_column(title, no_wrap=True)
    return table


def _health(health: str) -> Text:
    return Text(health, style="green" if health == "serving" else "red")
