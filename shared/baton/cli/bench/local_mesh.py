"""A mesh of this machine's own, for as long as it is measured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from baton.bench.mesh_source import MeshSource
from baton.cli import console
from baton.cli.plan import Plan
from baton.cli.service_process import ServiceDied
from baton.cli.stack import Stack, StartTimeout
from baton.client.channel import CLIENT_CHANNEL_OPTIONS
from baton.v1 import inference_pb2_grpc

MESH_FAILURES: Final = (ServiceDied, StartTimeout, ValueError)
"""What measuring a mesh may end with: it does not start or stay, or has no room for what is asked of it."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """How a mesh is divided."""

    prefill_cpus: str | None
    """Cores of a prefill worker, "" for all; None: there is none, decode computes prompts."""
    decode_cpus: str = ""
    threads: int = 1
    """Of each engine."""
    decode_flags: tuple[str, ...] = ()
    """More flags of decode."""


def on_halves() -> Tiers:
    """Prefill and decode on half of the cores each; ends the command where there is only one."""
    cores = sorted(map(str, os.sched_getaffinity(0)), key=int)
    half = len(cores) // 2
    if not half:
        console.fail("prefill and decode need a core each: there is one", code=2)
    return Tiers(",".join(cores[:half]), ",".join(cores[half:]), threads=half)


@asynccontextmanager
async def local_mesh(model: Path, tiers: Tiers, engine: Mapping[str, str]) -> AsyncIterator[MeshSource]:
    """Start all services, give a source of streams through the router, stop them.

    Args:
        model: directory.
        tiers: which workers, on which cores.
        engine: more flags of both engine tiers, without dashes in front.

    Raises:
        ServiceDied, StartTimeout: it did not come up.
    """
    cpus = {"prefill": tiers.prefill_cpus, "decode": tiers.decode_cpus}
    extra = {service: ("--cpus", cores) for service, cores in cpus.items() if cores}
    extra["decode"] = (*extra.get("decode", ()), *tiers.decode_flags)
    plan = Plan(
        model=model,
        prefill=int(tiers.prefill_cpus is not None),
        decode=1,
        listen="127.0.0.1:0",
        redis_url="",
        engine={"threads": str(tiers.threads), **engine},
        extra=extra,
    )
    # Logs in files: to follow them here would take from the measurement.
    with tempfile.TemporaryDirectory(prefix="baton-bench-") as logs:
        stack = Stack(plan, Path(logs), 300.0, lambda service, entry: None)
        try:
            running = await stack.start()
            async with grpc.aio.insecure_channel(running.router, options=CLIENT_CHANNEL_OPTIONS) as channel:
                pids = {service.name: service.pid for service in stack.services if service.pid is not None}
                yield MeshSource(inference_pb2_grpc.InferenceStub(channel), pids=pids)
        finally:
            await stack.stop()
