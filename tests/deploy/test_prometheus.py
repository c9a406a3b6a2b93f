"""A real Prometheus reads what `baton up` started with our rules, and every panel of the dashboard has data."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2
from tests.deploy.files import ROOT
from tests.fixtures.models import random_llama
from tests.fixtures.up import Up, running_up

PROMETHEUS = shutil.which("prometheus")
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "baton.json"


def configuration(up: Up, directory: Path) -> Path:
    """Our rules, every second, and the services' metrics endpoints as targets."""
    jobs: dict[str, list[str]] = {}
    for service in up.ready["services"]:
        jobs.setdefault(service["name"].partition("-")[0], []).append(service["metrics"])
    path = directory / "prometheus.yml"
    path.write_text(
        yaml.safe_dump(
            {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(ROOT / "deploy" / "prometheus" / "rules.yml")],
                "scrape_configs": [
                    {"job_name": job, "static_configs": [{"targets": targets}]} for job, targets in jobs.items()
                ],
            }
        )
    )
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def query(base: str, expression: str) -> list[Any]:
    def get() -> list[Any]:
        url = f"{base}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
        with urllib.request.urlopen(url, timeout=5) as answer:
            result = json.load(answer)["data"]["result"]
        assert isinstance(result, list)
        return result

    try:
        return await asyncio.to_thread(get)
    except OSError:
        return []


async def some_traffic(router: str, seconds: float) -> None:
    """Requests of all kinds: remote and local prefill, cache hits, cancels."""
    async with grpc.aio.insecure_channel(router) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        end = asyncio.get_running_loop().time() + seconds
        turn = 0
        while asyncio.get_running_loop().time() < end:
            turn += 1
            call = stub.StreamGenerate(
                inference_pb2.StreamGenerateRequest(
                    token_ids=sampling_pb2.TokenIds(
                        ids=[7 if turn % 4 == 0 else 5 + turn % 370] * (20 if turn % 2 else 120)
                    ),
                    sampling=sampling_pb2.SamplingParams(max_tokens=12, temperature=0, ignore_eos=True),
                ),
                timeout=30,
            )
            try:
                async for message in call:
                    if turn % 5 == 0 and message.WhichOneof("event") == "chunk":
                        call.cancel()
            except (grpc.aio.AioRpcError, asyncio.CancelledError):
                assert turn % 5 == 0


@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus on the PATH (Debian: apt install prometheus)")
async def test_every_panel_has_data(tmp_path: Path) -> None:
    assert PROMETHEUS is not None
    model = random_llama(tmp_path / "model")
    panels = json.loads(DASHBOARD.read_text())["panels"]
    wanted = {target["expr"] for panel in panels for target in panel.get("targets", ())}
    assert len(wanted) > 20
    # Where auto places prompts is up to the machine; the prefill panels need some there.
    async with running_up(tmp_path, model, "--prefill-placement", "threshold") as up:
        base = f"http://127.0.0.1:{free_port()}"
        process = await asyncio.create_subprocess_exec(
            PROMETHEUS,
            f"--config.file={configuration(up, tmp_path)}",
            f"--storage.tsdb.path={tmp_path / 'tsdb'}",
            f"--web.listen-address={base.removeprefix('http://')}",
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            traffic = asyncio.create_task(some_traffic(up.ready["router"], 25))
            missing = set(wanted)
            async with asyncio.timeout(40):
                while missing:
                    await asyncio.sleep(1)
                    # A rate needs two readings of what is counted; a NaN is no figure.
                    for expression in list(missing):
                        result = await query(base, expression)
                        if any(series["value"][1] != "NaN" for series in result):
                            missing.discard(expression)
                    if traffic.done() and not missing:
                        break
                    assert not traffic.done() or not missing, f"no data: {missing}"
            await traffic
            scraped = await query(base, "up")
            assert {series["metric"]["job"] for series in scraped} == {"router", "cache", "prefill", "decode"}
            assert all(series["value"][1] == "1" for series in scraped)
        finally:
            process.terminate()
            await process.wait()
            up.process.terminate()
            assert await asyncio.wait_for(up.process.wait(), 30) == 0
