"""`baton cache stats | flush | get`: look into the response cache, and empty it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Annotated, Final, TypeVar

import grpc
import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from baton.cli import connection, console, mesh
from baton.client.errors import BatonRpcError, wrap
from baton.internal.v1 import cache_admin_pb2, cache_admin_pb2_grpc
from baton.rpc.metadata_channel import MetadataChannel
from baton.v1 import sampling_pb2

COMMANDS: Final = ("stats", "flush", "get")

_QUICK: Final = 10.0
_FLUSH: Final = 600.0
"""Seconds. Millions of entries take a while."""

ResponseT = TypeVar("ResponseT", bound=Message)

app = typer.Typer(
    help="Look into the response cache, and empty it.", add_completion=False, pretty_exceptions_enable=False
)

Cache = Annotated[
    str | None,
    typer.Option(
        envvar="BATON_CACHE_ADMIN_TARGET",
        help="host:port of a cache service's operators' port. Default: that of the mesh `baton up` started last.",
        show_default=False,
        metavar="HOST:PORT",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


@app.command()
def stats(cache: Cache = None, as_json: AsJson = False) -> None:
    """Show what is stored, hit rates, and the Redis behind it.

    Exit code 1 when a Redis server does not answer.
    """
    target = _target(cache)
    found = _ask(target, lambda stub: stub.GetStats(cache_admin_pb2.GetStatsRequest(), timeout=_QUICK))
    if as_json:
        _print_json(found)
    else:
        _show(target, found)
    raise typer.Exit(0 if found.servers and all(server.reachable for server in found.servers) else 1)


@app.command()
def flush(
    tenant: Annotated[
        str | None, typer.Option(help='Whose entries to remove; "" is who names no tenant.', show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove the entries of all tenants.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask whether --all is meant.")] = False,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Remove entries from Redis, and with them the copies that cache services hold."""
    if everything == (tenant is not None):
        console.fail("say --tenant NAME, or --all", code=2)
    if everything and not yes:
        if not console.interactive():
            console.fail("--all needs --yes where nobody can be asked", code=2)
        typer.confirm("Remove the entries of all tenants?", abort=True)
    request = cache_admin_pb2.FlushRequest(tenant=tenant, all=everything)
    done = _ask(_target(cache), lambda stub: stub.Flush(request, timeout=_FLUSH))
    if as_json:
        _print_json(done)
    else:
        console.out.print(f"{done.removed:,} removed")


@app.command()
def get(
    key: Annotated[str, typer.Argument(help="Name of the entry, as responses tell it in `cache_entry`.")],
    text: Annotated[bool, typer.Option("--text", help="Show the answer's text as well.")] = False,
    cache: Cache = None,
    as_json: AsJson = False,
) -> None:
    """Show one entry."""
    request = cache_admin_pb2.GetEntryRequest(entry=key, text=text)
    entry = _ask(_target(cache), lambda stub: stub.GetEntry(request, timeout=_QUICK))
    if as_json:
        _print_json(entry)
        return
    finish = sampling_pb2.FinishReason.Name(entry.finish_reason).removeprefix("FINISH_REASON_").lower()
    ttl = f"{entry.ttl.ToTimedelta()}".partition(".")[0] if entry.HasField("ttl") else "none"
    _rows(
        ("finish reason", finish),
        ("tokens", f"{entry.usage.prompt_tokens:,} in, {entry.usage.completion_tokens:,} out"),
        ("chunks", f"{entry.chunks:,}"),
        ("time left", ttl),
        ("size", f"{_bytes(entry.stored_bytes)} ({_bytes(entry.answer_bytes)} before compression)"),
    )
    if text:
        console.out.print()
        console.out.print(console.printable(entry.text), markup=False, soft_wrap=True)


def _target(cache: str | None) -> str:
    if cache:
        return cache
    known = mesh.last()
    for service in known.services if known is not None else ():
        if service.service == "cache":
            return service.admin
    console.fail(
        "no cache service is known",
        hint="Name its operators' port with --cache HOST:PORT, or start a mesh with `baton up`.",
    )


def _ask(target: str, call: Callable[[cache_admin_pb2_grpc.CacheAdminAsyncStub], Awaitable[ResponseT]]) -> ResponseT:
    async def ask() -> ResponseT:
        metadata = connection.chosen().admin_metadata
        async with grpc.aio.insecure_channel(target) as bare:
            channel = MetadataChannel(bare, lambda: metadata)
            try:
                return await call(cache_admin_pb2_grpc.CacheAdminStub(channel))
            except grpc.aio.AioRpcError as error:
                raise wrap(error) from None

    try:
        return asyncio.run(ask())
    except BatonRpcError as error:
        if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
            console.fail(f"nothing answers at {target}", hint="Name a cache service with --cache HOST:PORT.")
        console.fail(console.describe(error, target))
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _print_json(message: Message) -> None:
    print(
        json.dumps(MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))
    )


def _show(target: str, found: cache_admin_pb2.GetStatsResponse) -> None:
    lookups, local = found.lookups, found.local
    hits = lookups.local_hits + lookups.redis_hits
    misses = lookups.absent + lookups.store_failed + lookups.corrupt
    console.out.print(f"cache [bold]{escape(target)}[/], {found.mode} Redis")
    console.out.print()
    _rows(
        ("lookups", f"{hits + misses:,} since it started {found.uptime.ToSeconds():,} s ago"),
        ("hits", f"{hits:,} ({_share(hits, hits + misses)}), {lookups.local_hits:,} of them from memory"),
        ("misses", f"{lookups.absent:,} absent, {lookups.store_failed:,} without Redis, {lookups.corrupt:,} broken"),
        ("in memory", _local(local)),
    )
    for server in found.servers:
        console.out.print()
        _show_server(server)
    if not found.servers:
        console.out.print(Text("no Redis server is known", style="red"))


def _local(local: cache_admin_pb2.CacheLocalTier) -> str:
    if not local.on:
        return "off" if not local.max_bytes else "off: Redis does not tell of changes now"
    return f"{local.entries:,} entries, {_bytes(local.bytes)} of {_bytes(local.max_bytes)}"


def _show_server(server: cache_admin_pb2.CacheServer) -> None:
    state = Text("answers", style="green") if server.reachable else Text("does not answer", style="red")
    if server.breaker_open:
        state.append(", left alone", style="yellow")
    console.out.print(f"redis [bold]{escape(server.address)}[/] ", state)
    if not server.reachable:
        return
    about = "about " if server.estimated else ""
    limit = _bytes(server.max_memory_bytes) if server.max_memory_bytes else "no limit"
    _rows(
        ("version", f"{server.version or 'not told'}, {server.role or 'role not told'}"),
        ("entries", f"{about}{server.entries:,} of {server.keys:,} keys, {about}{_bytes(server.entry_bytes)}"),
        ("memory", f"{_bytes(server.used_memory_bytes)} of {limit}, {server.eviction_policy or 'policy not told'}"),
        ("gone", f"{server.evicted_keys:,} evicted, {server.expired_keys:,} expired"),
    )
    if server.eviction_policy == "noeviction":
        console.out.print(
            Text(
                "  noeviction: once Redis is full, nothing more is stored. Set maxmemory-policy allkeys-lru.", "yellow"
            )
        )


def _rows(*rows: tuple[str, str]) -> None:
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for title, value in rows:
        table.add_row(title, Text(value))
    console.out.print(table)


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none asked"


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError
