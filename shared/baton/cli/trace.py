"""`baton trace`: a recent request and where its time went, or the latest ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC
from typing import Annotated, Any, Final

import grpc
import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from baton.cli import connection, console, mesh
from baton.cli.render import partition_json
from baton.cli.waterfall import COLOURS, in_call_order, milliseconds, waterfall
from baton.client import ledger as client_ledger
from baton.client.errors import wrap
from baton.internal.v1 import observe_pb2, observe_pb2_grpc
from baton.v1 import inference_pb2

_TIMEOUT: Final = 5.0
_SHOWN_PARTS: Final = 2


def trace(
    request_id: Annotated[
        str, typer.Argument(help="Id of a request, or its beginning. Without it: the latest requests.")
    ] = "",
    admin: console.Admin = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Latest requests to list.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Show where the time of a recent request went.

    The router keeps the ledgers of its latest requests, also of those that failed or were cancelled.
    """
    address = mesh.admin_or_default(admin)
    with console.rpc_errors(address), grpc.insecure_channel(address) as channel:
        stub = observe_pb2_grpc.ObserveStub(channel)
        try:
            records = _fetch(stub, request_id, limit)
        except grpc.RpcError as error:
            raise wrap(error) from None
    if as_json:
        values = [_json(record) for record in records]
        print(json.dumps(values[0] if request_id else values))
    elif request_id:
        _show(records[0])
    else:
        console.out.print(_list(records))


def _fetch(stub: observe_pb2_grpc.ObserveStub, request_id: str, limit: int) -> Sequence[observe_pb2.RequestRecord]:
    if not request_id:
        return _latest(stub, limit)
    metadata = connection.chosen().admin_metadata
    try:
        request = observe_pb2.GetRecordRequest(request_id=request_id)
        return [stub.GetRecord(request, timeout=_TIMEOUT, metadata=metadata).record]
    except grpc.RpcError as error:
        # People copy the beginning of an id from a list. Whole ids go first: another may go on where one ends.
        found = _beginning(stub, request_id) if error.code() is grpc.StatusCode.NOT_FOUND else []
        if not found:
            raise
    if len(found) > 1:
        console.fail(f"{len(found)} recent requests begin with {request_id}")
    return found


def _beginning(stub: observe_pb2_grpc.ObserveStub, beginning: str) -> list[observe_pb2.RequestRecord]:
    return [record for record in _latest(stub, 1000) if record.request_id.startswith(beginning)]


def _latest(stub: observe_pb2_grpc.ObserveStub, limit: int) -> Sequence[observe_pb2.RequestRecord]:
    request = observe_pb2.ListRecordsRequest(limit=limit)
    return stub.ListRecords(request, timeout=_TIMEOUT, metadata=connection.chosen().admin_metadata).records


def _list(records: Sequence[observe_pb2.RequestRecord]) -> Table | Text:
    if not records:
        return Text("no requests yet", style="dim")
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for title, width in (("received", 8), ("request", 8), ("outcome", 9)):
        table.add_column(title, no_wrap=True, min_width=width)
    for title, width in (("tokens", 9), ("first, ms", 9), ("all, ms", 7)):
        table.add_column(title, justify="right", no_wrap=True, min_width=width)
    table.add_column("mostly", no_wrap=True, overflow="ellipsis")
    for record in records:
        ledger, usage = client_ledger.from_proto(record.summary.ledger), record.summary.usage
        mostly = Text()
        for entry in sorted(ledger.total.entries if ledger.total else (), key=lambda e: -e.duration_ns)[:_SHOWN_PARTS]:
            mostly.append("  " if mostly else "").append(
                f"{entry.hop} {entry.kind}", style=COLOURS.get(entry.kind, "white")
            )
        table.add_row(
            record.received.ToDatetime(UTC).astimezone().strftime("%H:%M:%S"),
            record.request_id[:8],
            Text(record.outcome, style="green" if record.outcome == "ok" else "yellow"),
            f"{usage.prompt_tokens} → {usage.completion_tokens}",
            milliseconds(ledger.first_token.total_ns) if ledger.first_token else "",
            milliseconds(ledger.total.total_ns) if ledger.total else "",
            mostly,
        )
    return table


def _show(record: observe_pb2.RequestRecord) -> None:
    summary = record.summary
    console.out.print(f"[bold]{escape(record.request_id)}[/]  {record.method}  {record.outcome}")
    facts = [f"{summary.usage.prompt_tokens} → {summary.usage.completion_tokens} tokens"]
    if summary.cache_status == inference_pb2.CACHE_STATUS_HIT:
        facts.append("from the response cache")
    if summary.prefill_placement == inference_pb2.PLACEMENT_REMOTE:
        facts.append(f"prefill remote, KV by {_transport(summary)}")
    elif summary.prefill_placement == inference_pb2.PLACEMENT_LOCAL:
        facts.append("prefill local")
    if summary.migrations:
        facts.append(f"moved {summary.migrations}×")
    console.out.print(Text(" · ".join(facts), style="dim"))
    console.out.print(waterfall(client_ledger.from_proto(summary.ledger)))


def _transport(summary: inference_pb2.Summary) -> str:
    return inference_pb2.Transport.Name(summary.transport).removeprefix("TRANSPORT_").lower()


def _json(record: observe_pb2.RequestRecord) -> dict[str, Any]:
    ledger, summary = client_ledger.from_proto(record.summary.ledger), record.summary
    return {
        "request_id": record.request_id,
        "method": record.method,
        "received": record.received.ToJsonString(),
        "outcome": record.outcome,
        "prompt_tokens": summary.usage.prompt_tokens,
        "completion_tokens": summary.usage.completion_tokens,
        "cache": inference_pb2.CacheStatus.Name(summary.cache_status).removeprefix("CACHE_STATUS_").lower(),
        "prefill_placement": inference_pb2.Placement.Name(summary.prefill_placement).removeprefix("PLACEMENT_").lower(),
        "transport": _transport(summary),
        "migrations": summary.migrations,
        "ledger": {"first_token": partition_json(ledger.first_token), "total": partition_json(ledger.total)},
        "in_call_order": [f"{e.hop} {e.kind}" for e in in_call_order(ledger.total.entries if ledger.total else ())],
    }
