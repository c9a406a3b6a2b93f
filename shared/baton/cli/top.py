"""`baton top`: the tiers, live."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any, Final

import grpc
import typer
from rich.columns import Columns
from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from baton.cli import connection, console, mesh
from baton.cli.waterfall import COLOURS, bar, milliseconds
from baton.client.errors import wrap
from baton.internal.v1 import observe_pb2, observe_pb2_grpc, worker_pb2
from baton.v1 import ledger_pb2

_GAUGE_CELLS: Final = 12
_SHARE_CELLS: Final = 60
_TIERS: Final = {worker_pb2.WORKER_ROLE_PREFILL: "prefill", worker_pb2.WORKER_ROLE_DECODE: "decode"}


def top(
    admin: console.Admin = None,
    interval: Annotated[float, typer.Option(min=0.1, max=60, help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Look once, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per look.")] = False,
) -> None:
    """Watch the mesh: load of every worker, rates, latencies, and where the time of requests goes.

    Rates, percentiles and shares are of the last ten seconds, as the router sees them. Ctrl-C ends it.
    """
    address = mesh.admin_or_default(admin)
    with console.rpc_errors(address), suppress(KeyboardInterrupt), grpc.insecure_channel(address) as channel:
        states = _states(channel, interval, once=once)
        if as_json:
            for state in states:
                print(json.dumps(to_json(state)), flush=True)
        elif once or not console.interactive():
            for state in states:
                console.out.print(screen(state, address))
        else:
            with Live(console=console.out, screen=True, auto_refresh=False) as live:
                for state in states:
                    live.update(screen(state, address), refresh=True)


def screen(state: observe_pb2.WatchMeshResponse, address: str) -> Group:
    """One look at the mesh."""
    seconds = state.window.ToNanoseconds() / 1e9
    head = Text.assemble((address, "bold"), (f"   last {seconds:.0f} s", "dim"))
    return Group(head, Text(), _rates(state, seconds), Text(), _workers(state), Text(), _time(state))


def to_json(state: observe_pb2.WatchMeshResponse) -> dict[str, Any]:
    """One look as plain values."""
    return {
        "window_seconds": state.window.ToNanoseconds() / 1e9,
        "in_flight": state.in_flight,
        "outcomes": dict(state.outcomes),
        "cache_hits": state.cache_hits,
        "coalesced": state.coalesced,
        "tokens_per_second": state.tokens_per_second,
        "ttft_ms": _percentiles_ms(state.time_to_first_token) if state.HasField("time_to_first_token") else None,
        "itl_ms": _percentiles_ms(state.inter_token) if state.HasField("inter_token") else None,
        "network_share": _shares(state).get("network", 0.0),
        "shares": _shares(state),
        "workers": [
            {
                "target": worker.target,
                "tier": _TIERS.get(worker.state.role, ""),
                "model": worker.model,
                "prefix_blocks": worker.prefix_blocks,
                "in_flight": worker.in_flight,
                "running": worker.state.load.running,
                "waiting": worker.state.load.waiting,
                "slots": worker.state.capacity.slots,
                "kv_used_tokens": worker.state.load.kv_used_tokens,
                "kv_tokens": worker.state.capacity.kv_tokens,
                "draining": worker.state.draining,
            }
            for worker in state.workers
        ],
        "unused_workers": [
            {"target": unused.target, "reason": unused.reason, "message": unused.message} for unused in state.unused
        ],
    }


def _states(channel: grpc.Channel, interval: float, *, once: bool) -> Iterator[observe_pb2.WatchMeshResponse]:
    request = observe_pb2.WatchMeshRequest(interval_ms=int(interval * 1000))
    call = observe_pb2_grpc.ObserveStub(channel).WatchMesh(request, metadata=connection.chosen().admin_metadata)
    try:
        for state in call:
            yield state
            if once:
                return
    except grpc.RpcError as error:
        raise wrap(error) from None
    finally:
        call.cancel()  # type: ignore[no-untyped-call]


def _rates(state: observe_pb2.WatchMeshResponse, seconds: float) -> Table:
    table = _grid("", "now", "per second", "p50", "p90", "p99")
    failed = {name: count for name, count in state.outcomes.items() if name != "ok"}
    table.add_row("requests", str(state.in_flight), f"{sum(state.outcomes.values()) / seconds:.1f}", "", "", "")
    table.add_row("tokens", "", f"{state.tokens_per_second:,.0f}", "", "", "")
    for name, field in (("TTFT, ms", "time_to_first_token"), ("ITL, ms", "inter_token")):
        row = ["", "", ""]
        if state.HasField(field):  # type: ignore[arg-type]
            row = [milliseconds(1e6 * value) for value in _percentiles_ms(getattr(state, field)).values()]
        table.add_row(name, "", "", *row)
    table.add_row("cache hits", "", f"{state.cache_hits / seconds:.1f}", "", "", "")
    table.add_row("coalesced", "", f"{state.coalesced / seconds:.1f}", "", "", "")
    for name, count in sorted(failed.items()):
        table.add_row(Text(escape(name), style="yellow"), "", f"{count / seconds:.1f}", "", "", "")
    return table


def _workers(state: observe_pb2.WatchMeshResponse) -> Table:
    table = _grid("worker", "tier", "queue", "batch", "KV", "sent here")
    for worker in sorted(state.workers, key=lambda w: (-w.state.role, w.target)):
        load, capacity = worker.state.load, worker.state.capacity
        share = load.kv_used_tokens / max(1, capacity.kv_tokens)
        gauge = Text(bar(share, _GAUGE_CELLS).ljust(_GAUGE_CELLS, "░"), style="green" if share < 0.9 else "yellow")
        gauge.append(f" {share:4.0%}", style="default")
        tier = Text(_TIERS.get(worker.state.role, "?"), style="dim")
        if len({seen.model for seen in state.workers}) > 1:
            tier.append(f" {worker.model}")
        if worker.state.draining:
            tier.append(" draining", style="yellow")
        batch = f"{load.running} of {capacity.slots}"
        table.add_row(worker.target, tier, str(load.waiting), batch, gauge, str(worker.in_flight))
    for unused in state.unused:
        table.add_row(unused.target, Text(f"not used: {unused.reason}", style="yellow"), "", "", "", "")
    if not state.workers:
        table.add_row(Text("none in view", style="yellow"), "", "", "", "", "")
    return table


def _time(state: observe_pb2.WatchMeshResponse) -> Group:
    """Where requests' time went, as one bar and its legend."""
    shares = _shares(state)
    line = Text()
    entries: list[Text] = []
    for kind, share in sorted(shares.items(), key=lambda item: -item[1]):
        colour = COLOURS.get(kind, "white")
        line.append("█" * round(share * _SHARE_CELLS), style=colour)
        entries.append(Text.assemble(("■ ", colour), f"{kind} {share:.1%}", no_wrap=True))
    if not shares:
        entries = [Text("no request ended in the window", style="dim")]
    # In columns: a line's end must not part a kind from its share.
    return Group(Text("where the time went", style="dim"), line, Columns(entries, padding=(0, 3)))


def _shares(state: observe_pb2.WatchMeshResponse) -> dict[str, float]:
    sums: dict[str, int] = {}
    for entry in state.ledger:
        kind = ledger_pb2.Kind.Name(entry.kind).removeprefix("KIND_").lower()
        sums[kind] = sums.get(kind, 0) + entry.duration.ToNanoseconds()
    whole = sum(sums.values())
    return {kind: duration / whole for kind, duration in sums.items()} if whole else {}


def _percentiles_ms(percentiles: observe_pb2.Percentiles) -> dict[str, float]:
    return {name: getattr(percentiles, name).ToNanoseconds() / 1e6 for name in ("p50", "p90", "p99")}


def _grid(*titles: str) -> Table:
    table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    for index, title in enumerate(titles):
        table.add_column(title, no_wrap=True, justify="left" if index == 0 or title in ("tier", "KV") else "right")
    return table
