"""Run one service: logs, traces, metrics, gRPC with health and reflection, and a graceful end on SIGTERM."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from pydantic import ValidationError
from pydantic_settings import CliApp

from baton import __version__
from baton.rpc.cannot_start import CannotStart as CannotStart
from baton.rpc.channel import PLAIN, server_options
from baton.rpc.dialer import Dialer
from baton.rpc.drain import Drain
from baton.rpc.hang_up import hang_up
from baton.rpc.health import Health
from baton.rpc.interceptor import RimInterceptor
from baton.rpc.reflection import add_reflection
from baton.rpc.security import Security, assemble
from baton.rpc.settings import ServiceSettings
from baton.telemetry import logs, metrics, tracing

log = logging.getLogger(__name__)

SettingsT = TypeVar("SettingsT", bound=ServiceSettings)

_LINGER_SECONDS: Final = 0.25  # in which callers who do not know yet are told to go elsewhere
_LAST_WORDS_SECONDS: Final = 0.5  # for a status to be written
_END_SECONDS: Final = 20.0  # after the drain, to free everything; then the process ends itself, and tells where it hung
_FLUSH_SECONDS: Final = 0.05  # for what was written to be on its way


class Runtime:
    """What a service gets to build itself: the servers to register on, health, and the ways to end.

    Args:
        name: of the service.
        server: for what others call.
        drain: of the calls of that server; default: a new one.
        admin: for what operators call; default: the same server.
        dialer: opens channels to other services.
    """

    def __init__(
        self,
        name: str,
        server: grpc.aio.Server,
        drain: Drain | None = None,
        admin: grpc.aio.Server | None = None,
        dialer: Dialer = PLAIN,
    ) -> None:
        self.name = name
        self.server = server
        self.admin = admin or server
        self.dialer = dialer
        self.drain = drain or Drain()
        self.draining = self.drain.begun  # set on SIGTERM: take nothing new
        self.health = Health(self.draining)
        self.service_names: list[str] = []
        self.admin_names: list[str] = []
        self.failure: str | None = None
        self.stopping = asyncio.Event()
        self.built = False  # the service is put together; from here on it drains before it ends

    def register(self, full_name: str) -> None:
        """Name a gRPC service ("baton.v1.Inference") for health and reflection."""
        self.service_names.append(full_name)

    def register_admin(self, full_name: str) -> None:
        """Name one that operators call."""
        self.admin_names.append(full_name)

    async def set_serving(self, serving: bool) -> None:
        """Health of the process and of each of its services."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in dict.fromkeys(["", *self.service_names, *self.admin_names]):
            await self.health.set(name, status)

    def fail(self, why: str) -> None:
        """End the process with exit code 1: it lost something it cannot live without."""
        self.failure = why
        self.stopping.set()


Build = Callable[[SettingsT, Runtime], AbstractAsyncContextManager[None]]


def main(name: str, settings_class: type[SettingsT], build: Build[SettingsT], argv: list[str] | None = None) -> int:
    """Entry point of a service process. `build` registers the servicers on entry and frees everything on exit."""
    arguments = sys.argv[1:] if argv is None else argv
    given_away = settings_class.secret_in(arguments)
    if given_away is not None:
        variable = given_away.removeprefix("--").replace("-", "_").upper()
        print(
            f"error: {given_away}: anyone on this machine can read flags; give it as BATON_{variable}, or in a file",
            file=sys.stderr,
        )
        return 2
    try:
        settings = CliApp.run(settings_class, cli_args=arguments, cli_exit_on_error=True)
    except ValidationError as error:
        for wrong in error.errors():
            option = "-".join(str(part) for part in wrong["loc"]).replace("_", "-")
            # What is wrong with several together names them itself.
            print(f"error: --{option}: {wrong['msg']}" if option else f"error: {wrong['msg']}", file=sys.stderr)
        return 2
    logs.configure(name, settings.log_level)
    if api_implementation.Type() != "upb":
        # The one in Python is slow, and recurses into what it parses as deep as a message goes.
        log.error("cannot start: protobuf runs on %r, not on upb", api_implementation.Type())
        return 1
    return asyncio.run(_run(name, settings, build))


async def _run(name: str, settings: SettingsT, build: Build[SettingsT]) -> int:
    tracing.configure(name, settings.otlp_endpoint, settings.trace_ratio)
    try:
        security = assemble(settings, settings.listen, settings.metrics_listen)
    except CannotStart as error:
        log.error("cannot start: %s", error)
        return 1
    drain = Drain()
    options = server_options(settings.caller_silence_seconds)
    server = grpc.aio.server(interceptors=[RimInterceptor(drain, security.gate)], options=options)
    # Operators are served to the end: they see how it goes.
    admin = grpc.aio.server(interceptors=[RimInterceptor(gate=security.admin_gate)], options=options)
    runtime = Runtime(name, server, drain, admin, security.dialer)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, runtime.stopping.set)
    exporter = metrics.serve(settings.metrics_listen)
    try:
        address = exporter.address if exporter else ""
        await _unless_stopped_before(runtime, _serve(settings, runtime, security, build, address))
    except CannotStart as error:
        log.error("cannot start: %s", error)
        return 1
    finally:
        if exporter:
            exporter.close()
        tracing.shutdown()
        faulthandler.cancel_dump_traceback_later()
    if runtime.failure:
        log.error("stopped: %s", runtime.failure)
        return 1
    log.info("stopped")
    return 0


async def _unless_stopped_before(runtime: Runtime, serving: Coroutine[Any, Any, None]) -> None:
    """Serve; if the process is told to stop while it still loads, which may take minutes, give that up."""
    task = asyncio.create_task(serving)
    stopping = asyncio.create_task(runtime.stopping.wait())
    await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not runtime.built:
        task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.result()


async def _serve(
    settings: SettingsT, runtime: Runtime, security: Security, build: Build[SettingsT], metrics_address: str
) -> None:
    async with build(settings, runtime):
        runtime.built = True
        port = await _start(runtime, runtime.server, runtime.service_names, settings.listen, security.credentials)
        admin_port = await _start(runtime, runtime.admin, runtime.admin_names, settings.admin_listen, None)
        await runtime.set_serving(True)
        # Everything alive now lives as long as the process: keep it out of every later collection.
        gc.collect()
        gc.freeze()
        ready = {
            "service": runtime.name,
            "version": __version__,
            "grpc": _address(settings.listen, port),
            "admin": _address(settings.admin_listen, admin_port),
            "metrics": metrics_address,
            "pid": os.getpid(),
        }
        log.info("serving", extra=ready)
        if settings.ready_file:
            write_atomically(settings.ready_file, json.dumps(ready))
        await runtime.stopping.wait()
        log.info("draining")
        faulthandler.dump_traceback_later(settings.drain_seconds + _END_SECONDS, exit=True)
        runtime.draining.set()
        await runtime.set_serving(False)
        # A service that lost its engine has nothing to finish, but its calls are to say so before they end.
        await drained(runtime, port, _LAST_WORDS_SECONDS if runtime.failure else settings.drain_seconds)
        await runtime.admin.stop(0)


async def drained(runtime: Runtime, port: int, seconds: float) -> None:
    """Finish the calls, or end them after so many seconds, then shut the server on that port down."""
    await runtime.drain.finish(seconds, 0.0 if runtime.failure else _LINGER_SECONDS)
    await asyncio.sleep(_FLUSH_SECONDS)
    hang_up(port)
    await runtime.server.stop(_LAST_WORDS_SECONDS)


async def _start(
    runtime: Runtime, server: grpc.aio.Server, names: list[str], listen: str, credentials: grpc.ServerCredentials | None
) -> int:
    """Bind and start one of the servers; returns its port.

    Raises:
        CannotStart: it cannot listen there.
    """
    health_pb2_grpc.add_HealthServicer_to_server(runtime.health, server)
    add_reflection([*names, health.SERVICE_NAME], server)
    try:
        port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    except RuntimeError:
        raise CannotStart(f"cannot listen on {listen}") from None
    await server.start()
    return port


def _address(listen: str, port: int) -> str:
    return f"{listen.rpartition(':')[0]}:{port}"


def write_atomically(path: Any, text: str) -> None:
    """A reader sees the whole text or no file."""
    draft = f"{path}.{os.getpid()}"
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(draft, path)
