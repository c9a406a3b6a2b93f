"""`baton up`: the whole mesh on this machine, until Ctrl-C."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import json
import os
import signal
import socket
import time
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final, TypeVar

import typer
from rich.markup import escape
from rich.table import Table

from baton.cli import console, mesh
from baton.cli.mesh import DEFAULT_TARGET, Mesh
from baton.cli.plan import BadSetting, Plan, parse_settings
from baton.cli.progress import Progress, readable
from baton.cli.service_process import ServiceDied
from baton.cli.stack import Stack, StartTimeout
from baton.models import bundled_model

_KILLED_BY_SECOND_CTRL_C: Final = 130
_SHOWN_LINES: Final = 15

T = TypeVar("T")


def up(
    context: typer.Context,
    prefill: Annotated[int, typer.Option(min=0, max=64, help="Prefill workers; 0: decode computes prompts.")] = 1,
    decode: Annotated[int, typer.Option(min=1, max=64, help="Decode workers.")] = 1,
    model: Annotated[
        Path | None, typer.Option(help="Model directory.", show_default="the bundled tiny model", metavar="DIR")
    ] = None,
    model_name: Annotated[str, typer.Option(help="Name clients call it by.", show_default="the directory's name")] = "",
    listen: Annotated[
        str, typer.Option(help="Where the router listens; port 0 takes a free one.", metavar="HOST:PORT")
    ] = DEFAULT_TARGET,
    redis_url: Annotated[
        str, typer.Option(envvar="BATON_REDIS_URL", help="Redis to use.", show_default="an embedded one")
    ] = "",
    dtype: Annotated[str | None, typer.Option(help="Element type of weights and KV: float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="Where the model runs: cpu, cuda or cuda:N.")] = None,
    num_slots: Annotated[int | None, typer.Option(help="Requests that can hold KV at once, per worker.")] = None,
    slot_tokens: Annotated[int | None, typer.Option(help="Most tokens of one request.")] = None,
    step_tokens: Annotated[int | None, typer.Option(help="Token budget of one engine step.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads per engine.")] = None,
    prefill_placement: Annotated[
        str | None,
        typer.Option(help="Where prompts are computed: auto, local, remote or threshold.", show_default="auto"),
    ] = None,
    local_prefill_tokens: Annotated[
        int | None, typer.Option(help="Prompts up to this long are computed by decode itself, whatever it costs.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other flag of a service; repeatable.", metavar="SERVICE.FLAG=VALUE"),
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(help="Addresses and pids are written here as JSON once all serve.")
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(help="Keep the services' logs here, a file each.")] = None,
    start_timeout: Annotated[float, typer.Option(min=1, help="Seconds until everything must serve.")] = 300.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Seconds running requests get to finish.")] = 10.0,
    tls: Annotated[
        bool, typer.Option("--tls", help="TLS everywhere, with a CA made for this mesh; needs the extra `tls`.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ready file's JSON once all serve.")] = False,
) -> None:
    """Run the whole mesh on this machine until Ctrl-C.

    Starts router, cache, prefill, decode and Redis on loopback, with the bundled model unless you name one.
    Ctrl-C stops everything and leaves nothing behind; a second Ctrl-C does not wait. Exit code 0 after a stop, 1 when a
    service failed.
    """
    source = context.get_parameter_source("redis_url")
    if "@" in redis_url and source is not None and source.name == "COMMANDLINE":
        console.fail("--redis-url: anyone on this machine can read flags; give it as BATON_REDIS_URL", code=2)
    try:
        extra = parse_settings(settings or [])
        directory = model or bundled_model()
    except (BadSetting, FileNotFoundError) as error:
        console.fail(str(error), code=2)
    if not (directory / "config.json").is_file():
        console.fail(f"{directory} holds no model: it has no config.json", code=2)
    if local_prefill_tokens is not None:
        flag = ("--local-prefill-tokens", str(local_prefill_tokens))
        extra["decode"] = (*flag, *extra.get("decode", ()))
    if prefill_placement is not None:
        extra["decode"] = ("--prefill-placement", prefill_placement, *extra.get("decode", ()))
    engine = {
        "dtype": dtype,
        "device": device,
        "num-slots": num_slots,
        "slot-tokens": slot_tokens,
        "step-tokens": step_tokens,
        "threads": threads,
    }
    plan = Plan(
        model=directory.resolve(),
        prefill=prefill,
        decode=decode,
        listen=listen,
        redis_url=redis_url,
        model_name=model_name,
        drain_seconds=drain_seconds,
        engine={name: str(value) for name, value in engine.items() if value is not None},
        extra=extra,
        tls=tls,
    )
    if tls and importlib.util.find_spec("cryptography") is None:
        console.fail(
            "--tls needs the extra `tls`, which is not installed: ./scripts/setup engine,redis-server,tls", code=2
        )
    _require_free(listen)
    if ready_file is not None and not ready_file.absolute().parent.is_dir():
        console.fail(f"--ready-file {ready_file}: there is no such directory", code=2)
    if log_dir is not None:
        try:
            log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            console.fail(f"--log-dir {log_dir}: {error.strerror}", code=2)
    raise typer.Exit(asyncio.run(_run(plan, log_dir, start_timeout, ready_file, as_json)))


async def _run(plan: Plan, log_dir: Path | None, start_timeout: float, ready_file: Path | None, as_json: bool) -> int:
    stop = asyncio.Event()
    progress = Progress(console.err)
    stack = Stack(plan, log_dir, start_timeout, progress.on_log)

    def on_signal() -> None:
        if stop.is_set():
            stack.kill()
            console.err.show_cursor(True)  # the progress display hides it
            os._exit(_KILLED_BY_SECOND_CTRL_C)
        stop.set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signum is signal.SIGHUP and signal.getsignal(signum) is signal.SIG_IGN:
            continue  # nohup: the terminal may go
        loop.add_signal_handler(signum, on_signal)

    written: list[Path] = []
    started = time.monotonic()
    try:
        with progress.starting(stack.services):
            running = await _unless(stop, stack.start())
        if running is None:
            return 0
        written = _announce(running, ready_file, as_json, time.monotonic() - started)
        died = await _unless(stop, stack.died())
        if died is None:
            return 0
        _report(died)
        return 1
    except ServiceDied as died:
        _report(died)
        return 1
    except (StartTimeout, OSError) as error:
        console.err.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    finally:
        stop.set()  # from here on another signal kills
        for path in written:
            mesh.remove(path, os.getpid())
        with progress.stopping(stack.services):
            await stack.stop()


async def _unless(stop: asyncio.Event, work: Coroutine[None, None, T]) -> T | None:
    """The result of `work`; None, and the work cancelled, when `stop` is set first."""
    working = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


def _announce(running: Mesh, ready_file: Path | None, as_json: bool, seconds: float) -> list[Path]:
    """Tell the world that the mesh serves. Returns the files to remove at the end."""
    written = []
    if ready_file is not None:
        mesh.write(ready_file, running)
        written.append(ready_file)
    with suppress(OSError):  # a convenience for the other commands: they can be told the address as well
        mesh.write(mesh.last_ready_file(), running)
        written.append(mesh.last_ready_file())
    if as_json:
        print(json.dumps(running.to_json()), flush=True)
        return written
    table = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    for title in ("service", "gRPC", "metrics"):
        table.add_column(title, no_wrap=True)
    table.add_column("pid", justify="right")
    for service in running.services:
        table.add_row(service.name, service.grpc, service.metrics, str(service.pid))
    console.err.print(
        f"[bold green]serving[/] [bold]{escape(running.model)}[/] at [bold]{running.router}[/]"
        f" [dim]after {seconds:.1f} s[/]\n"
    )
    console.err.print(table)
    target = "" if running.router == DEFAULT_TARGET else f" --target {running.router}"
    console.err.print(
        f'\n[dim]In another terminal:[/] baton generate "Once upon a time"{target}\n[dim]Ctrl-C stops everything.[/]',
        soft_wrap=True,
    )
    return written


def _report(died: ServiceDied) -> None:
    """Say which service ended, and what it said last."""
    console.err.print(f"[bold red]error:[/] {escape(str(died))}", soft_wrap=True)
    lines = list(died.process.last_lines)[-_SHOWN_LINES:]
    if lines:
        console.err.print("[dim]its last log lines:[/]")
    for line in lines:
        console.err.print(f"  {escape(readable(line))}", soft_wrap=True)


def _require_free(listen: str) -> None:
    """End the command now if the router's port is taken: before anything was loaded."""
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        console.fail(f"--listen {listen!r} is not HOST:PORT", code=2)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            console.fail(f"{listen} is taken", hint="Choose another with --listen, or 127.0.0.1:0 for a free one.")
        console.fail(f"cannot listen on {listen}: {error.strerror}")
