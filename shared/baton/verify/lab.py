"""A mesh for the experiment: every link goes through a proxy, every wall clock is wrong in its own way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from urllib.parse import unquote, urlsplit

from baton.cli.plan import Plan
from baton.cli.service_process import OnLog
from baton.cli.stack import Stack
from baton.verify.proxy import Connect, Proxy

CLOCK_SECONDS: Final = {"router": 0, "cache": 300, "prefill": -300, "decode": 600}
"""By how much each service's wall clock is off."""
STEP_SECONDS: Final = 0.01
"""Every step of every engine sleeps so long, delayed or not, as a host does while its accelerator computes. Without it
services and engines fight for a machine's few cores, a delay anywhere pauses that fight, and the fight is measured."""


@dataclass(slots=True)
class Lab:
    """A running mesh.

    Attributes:
        router: host:port.
        admin: host:port of its operators' port.
        links: "redis", "cache", "decode-0", "prefill-0": the proxy in front of each.
        directory: where the step files go.
    """

    router: str
    admin: str
    links: dict[str, Proxy]
    directory: Path

    def slow_steps(self, tier: str, seconds: float) -> None:
        """From now on every step of a tier's engine takes so much longer."""
        (self.directory / tier).write_text(str(STEP_SECONDS + seconds))

    def clear(self) -> None:
        """Nothing is wrong any more."""
        for proxy in self.links.values():
            proxy.forward.clear()
            proxy.backward.clear()
        for tier in ("prefill", "decode"):
            self.slow_steps(tier, 0)


@asynccontextmanager
async def running_lab(model: Path, on_log: OnLog = lambda process, line: None) -> AsyncIterator[Lab]:
    """Start the mesh; everything ends with the block."""
    links: dict[str, Proxy] = {}
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="baton-verify-")))

        async def relay(name: str, address: str) -> str:
            links[name] = await stack.enter_async_context(Proxy.to(_connector(address)))
            return f"redis://{links[name].address}" if name == "redis" else links[name].address

        shim = str(Path(__file__).parent / "shim")
        plan = Plan(
            model=model,
            prefill=1,
            decode=1,
            listen="127.0.0.1:0",
            redis_url="",
            drain_seconds=2.0,
            extra={
                # KV has to pass the link that is made slow.
                "decode": ("--local-prefill-tokens", "16", "--transport", "grpc"),
                # What is slow on purpose must not be given up on, nor passed over.
                "cache": ("--redis-timeout", "2", "--local-bytes", "0"),
                "router": ("--cache-timeout-seconds", "3"),
            },
            environment={
                service: {
                    "PYTHONPATH": shim,
                    "BATON_VERIFY_CLOCK_SECONDS": str(seconds),
                    "BATON_VERIFY_STEP_FILE": str(directory / service),
                }
                for service, seconds in CLOCK_SECONDS.items()
            },
        )
        mesh = Stack(plan, None, 120.0, on_log, relay)
        stack.push_async_callback(mesh.stop)
        running = await mesh.start()
        lab = Lab(running.router, running.services[0].admin, links, directory)
        lab.clear()
        yield lab


def _connector(address: str) -> Connect:
    """How to reach an address: host:port, or a redis or unix URL."""
    if address.startswith("unix://"):
        path = unquote(address.removeprefix("unix://").partition("?")[0])
        return lambda: asyncio.open_unix_connection(path)
    if "://" in address:
        parts = urlsplit(address)
        return lambda: asyncio.open_connection(parts.hostname, parts.port)
    host, _, port = address.rpartition(":")
    return lambda: asyncio.open_connection(host, int(port))
