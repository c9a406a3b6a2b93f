"""A mesh to break: real processes, a proxy in front of each, and the means to start again what was killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import psutil

from baton.verify.proxy import Link, Proxy
from tests.cache.redis_lab import Server, running
from tests.faults.checker import Held, leaks
from tests.faults.owners import has_open, inode_of
from tests.fixtures.mesh import Mesh, Service

CLIENT: Final = "client"
"""Who connects and is no service."""
UNKNOWN: Final = "unknown"
"""Who connects and was gone before it could be told."""
_SHIM: Final = Path(__file__).parent / "shim"
_QUIET_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class Topology:
    """What a mesh is made of.

    Attributes:
        flags: by tier or by service, what is added to its command line; a tier's come first.
        cache: whether there is a cache service, with a Redis of its own.
        wide: whether its model is the wider one, whose prompts take long enough to be waited for.
    """

    prefill: int = 2
    decode: int = 2
    routers: int = 1
    cache: bool = False
    flags: tuple[tuple[str, tuple[str, ...]], ...] = ()
    wide: bool = False

    def of(self, name: str) -> tuple[str, ...]:
        """The flags of one service."""
        tier = name.partition("-")[0]
        return tuple(flag for whose, flags in self.flags if whose in (tier, name) for flag in flags)

    @property
    def services(self) -> tuple[str, ...]:
        """Their names, in the order in which they can be started."""
        return (
            *(f"prefill-{i}" for i in range(self.prefill)),
            *(f"decode-{i}" for i in range(self.decode)),
            *(("cache",) if self.cache else ()),
            *(f"router-{i}" for i in range(self.routers)),
        )


@dataclass
class Bed:
    """A running mesh.

    Attributes:
        topology: what it is made of.
        mesh: the processes.
        proxies: in front of each service, by its name; "redis" too.
        stopped: processes that were frozen, and not yet continued.
        happened: what was done to it, and when: (monotonic seconds, text).
    """

    topology: Topology
    mesh: Mesh
    model: Path
    proxies: dict[str, Proxy] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    happened: list[tuple[float, str]] = field(default_factory=list)
    redis: Server | None = None
    warm: bool = False  # it has served: what services keep from their first requests on is there
    _addresses: dict[str, str] = field(default_factory=dict)
    _families: dict[str, list[psutil.Process]] = field(default_factory=dict)
    _starting: dict[int, str] = field(default_factory=dict)  # pids of services that are not ready yet
    _hang_file: Path = Path()

    def note(self, text: str) -> None:
        """Remember that something was done now."""
        self.happened.append((time.monotonic(), text))

    # ------------------------------------------------------------------------------------------ processes

    async def start(self, name: str) -> Service:
        """Start a service, or start it again at the address it had."""
        service = await self.mesh.start(
            name,
            *self._flags(name),
            listen=self._addresses.get(name, "127.0.0.1:0"),
            environment=self._environment(),
            on_start=lambda pid: self._starting.__setitem__(pid, name),
        )
        del self._starting[service.pid]
        self._addresses[name] = service.address
        self._families[name] = [psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)]
        return service

    def service(self, name: str) -> Service:
        return self.mesh.services[name]

    def alive(self, name: str) -> bool:
        return name in self.mesh.services and self.service(name).process.returncode is None

    def kill(self, name: str) -> None:
        """kill -9 of the front; its engine is to notice by itself."""
        self.note(f"kill {name}")
        self.service(name).kill()

    async def terminate(self, name: str, seconds: float = 60.0) -> int:
        """SIGTERM, and wait; returns the exit code."""
        self.note(f"terminate {name}")
        return await self.service(name).stop(seconds)

    def freeze(self, name: str) -> None:
        """SIGSTOP of a service and its engine."""
        self.note(f"freeze {name}")
        self.frozen.add(name)
        self._signal(name, signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """SIGCONT."""
        self.note(f"thaw {name}")
        self.frozen.discard(name)
        self._signal(name, signal.SIGCONT)

    def hang(self, name: str, seconds: float) -> None:
        """Hold the event loop of a service for so long."""
        self.note(f"hang {name}")
        self._hang_file.write_text(str(seconds))
        self.service(name).kill(signal.SIGUSR2)

    def stop_engine(self, name: str) -> None:
        """SIGSTOP the engine alone, as if its device did not answer."""
        self.note(f"stop the engine of {name}")
        for process in self._families[name][1:]:
            process.send_signal(signal.SIGSTOP)

    def continue_engine(self, name: str) -> None:
        """SIGCONT; its service may have ended meanwhile."""
        for process in self._families[name][1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    async def mend(self) -> None:
        """Everything is well again: links, processes."""
        for proxy in self.proxies.values():
            for link in proxy.links.values():
                link.clear()
        for name in list(self.frozen):
            self.thaw(name)
        async with asyncio.TaskGroup() as group:
            for name in self.topology.services:
                if not self.alive(name):
                    group.create_task(self.start(name))

    def orphans(self) -> list[str]:
        """Processes of services that are no more."""
        left: list[str] = []
        for name, family in self._families.items():
            if not self.alive(name):
                left += [f"{name}: {process}" for process in family[1:] if process.is_running() and _lives(process)]
        return left

    # ---------------------------------------------------------------------------------------------- links

    def link(self, source: str, target: str) -> Link:
        """From a service, or CLIENT, to another."""
        return self.proxies[target].link(source)

    def routers(self) -> list[str]:
        """Where clients ask."""
        return [self.proxies[name].address for name in self.topology.services if name.startswith("router")]

    def _sources(self, target: str) -> tuple[str, ...]:
        """Who may connect to a service."""
        tiers = {"router": (CLIENT,), "decode": ("router",), "prefill": ("router", "decode"), "cache": ("router",)}
        wanted = tiers.get(target.partition("-")[0], ("cache",))
        return tuple(name for name in (CLIENT, *self.topology.services) if name.partition("-")[0] in wanted)

    async def _who(self, target: str, port: int) -> str:
        """The one that connects to a service, from a port."""
        sources = self._sources(target)
        if len(sources) == 1:
            return sources[0]
        return await asyncio.to_thread(self._owner, sources, port)

    def _owner(self, sources: tuple[str, ...], port: int) -> str:
        inode = inode_of(port)
        for name in sources:
            pid = self._families[name][0].pid if name in self._families else None
            if pid is not None and has_open(pid, inode):
                return name
        for pid, name in self._starting.items():
            if has_open(pid, inode):
                return name
        return UNKNOWN

    # -------------------------------------------------------------------------------------------- holding

    async def held(self) -> dict[str, Held]:
        """What every service holds now."""
        told: dict[str, Held] = {}
        for name in self.topology.services:
            if not self.alive(name):
                continue
            service = self.service(name)
            if name.startswith(("prefill", "decode")):
                state = await service.debug_state()
                told[name] = Held(
                    incarnation=state.incarnation,
                    requests=len(state.engine_requests) + len(state.calls),
                    lacking_slots=state.total_slots - state.free_slots,
                    used_tokens=state.used_tokens,
                    tasks=state.tasks,
                    descriptors=state.open_files,
                    memory=psutil.Process(service.pid).memory_info().rss,
                )
            else:
                told[name] = Held(
                    incarnation=str(service.pid),
                    requests=await _in_flight(service),
                    descriptors=psutil.Process(service.pid).num_fds(),
                    memory=psutil.Process(service.pid).memory_info().rss,
                )
        return told

    async def quiesce(self, seconds: float = _QUIET_SECONDS, wanted: dict[str, Held] | None = None) -> dict[str, Held]:
        """Wait until nothing is held, and no more tasks and files than `wanted`; what is held then, or at the end."""
        end = time.monotonic() + seconds
        while True:
            held = await self.held()
            if (not leaks(wanted or {}, held) and not self.orphans()) or time.monotonic() > end:
                return held
            await asyncio.sleep(0.05)

    # ----------------------------------------------------------------------------------------------- rest

    def _flags(self, name: str) -> list[str]:
        def targets(tier: str) -> str:
            return ",".join(self.proxies[s].address for s in self.topology.services if s.startswith(tier))

        kind = name.partition("-")[0]
        flags = [] if kind == "cache" else ["--model", str(self.model)]
        if kind == "router":
            flags += ["--decode-targets", targets("decode")]
            if self.topology.prefill:
                flags += ["--prefill-targets", targets("prefill")]
            if self.topology.cache:
                flags += ["--cache-target", targets("cache")]
        if kind == "cache":
            flags += ["--redis-url", f"redis://{self.proxies['redis'].address}"]
        return [*flags, *self.topology.of(name)]

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(_SHIM), os.environ.get("PYTHONPATH", ""))))
        return {"PYTHONPATH": path, "BATON_FAULTS_HANG_FILE": str(self._hang_file)}

    def _signal(self, name: str, signum: signal.Signals) -> None:
        for process in self._families[name]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    async def _proxy(self, stack: AsyncExitStack, name: str) -> None:
        async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            address = self._addresses.get(name)
            if address is None:
                raise ConnectionRefusedError(name)
            host, _, port = address.rpartition(":")
            return await asyncio.open_connection(host, int(port))

        def who(port: int) -> Awaitable[str]:
            return self._who(name, port)

        self.proxies[name] = await stack.enter_async_context(Proxy.to(connect, who))


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def _in_flight(service: Service) -> int:
    """Requests a router serves, as its metrics tell; 0 for other services."""
    if not service.name.startswith("router"):
        return 0
    host, _, port = service.metrics.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
        async with asyncio.timeout(10):
            body = (await reader.read()).decode()
    finally:
        writer.close()
    for line in body.splitlines():
        if line.startswith("baton_requests_in_flight "):
            return int(float(line.split()[1]))
    raise AssertionError("the router tells nothing of requests in flight")


@contextlib.asynccontextmanager
async def running_bed(model: Path, topology: Topology) -> AsyncIterator[Bed]:
    """A mesh for the length of the block; nothing of it may be left."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(TemporaryDirectory(prefix="baton-faults-")))
        mesh = Mesh(directory)
        stack.push_async_callback(mesh.close)
        bed = Bed(topology, mesh, model, _hang_file=directory / "hang")
        for name in topology.services:
            await bed._proxy(stack, name)
        if topology.cache:
            bed.redis = Server(directory / "redis")
            stack.enter_context(running(bed.redis))
            bed._addresses["redis"] = f"127.0.0.1:{bed.redis.port}"
            await bed._proxy(stack, "redis")
        first = [name for name in topology.services if not name.startswith("router")]
        async with asyncio.TaskGroup() as group:
            for name in first:
                group.create_task(bed.start(name))
        async with asyncio.TaskGroup() as group:
            for name in topology.services:
                if name.startswith("router"):
                    group.create_task(bed.start(name))
        try:
            yield bed
        finally:
            for name in list(bed.frozen):
                bed.thaw(name)
