"""The ledger finds delays of known size at known places, and the command line shows it."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import grpc
import pytest

from baton.v1 import inference_pb2, inference_pb2_grpc, ledger_pb2, sampling_pb2
from baton.verify.cases import CASES
from baton.verify.experiment import run_case
from baton.verify.lab import running_lab
from tests.fixtures.mesh import running_mesh
from tests.fixtures.models import random_llama


@pytest.mark.timeout(600)
async def test_injected_delays_land_where_they_belong(tmp_path: Path) -> None:
    """Every case of `baton verify-ledger`; wall clocks of the services are minutes apart meanwhile."""
    model = random_llama(tmp_path / "model", hidden=128, layers=4, context=2048)
    wrong = []
    async with running_lab(model) as lab:
        for case in CASES:
            finding = await run_case(lab, case, pairs=5, most_pairs=60)
            if not finding.holds or finding.residual > 0.001:
                wrong.append(finding)
    assert not wrong


async def test_the_time_spent_at_a_prefill_worker_that_was_lost_is_known(tmp_path: Path) -> None:
    """It told of its steps on the way; computed here again, the request is slower by them, and the ledger says so."""
    model = random_llama(tmp_path / "model", hidden=128, layers=4, context=2048)
    async with running_lab(model) as lab, grpc.aio.insecure_channel(lab.router) as channel:
        lab.slow_steps("prefill", 0.25)  # a thousand tokens are four steps
        call = inference_pb2_grpc.InferenceStub(channel).Generate(
            inference_pb2.GenerateRequest(
                token_ids=sampling_pb2.TokenIds(ids=[5 + i % 200 for i in range(1000)]),
                sampling=sampling_pb2.SamplingParams(max_tokens=4, ignore_eos=True),
                cache_control=inference_pb2.CacheControl(mode=inference_pb2.CACHE_MODE_BYPASS),
            ),
            timeout=30,
        )
        await asyncio.sleep(0.7)
        lab.links["prefill-0"].cut()
        summary = (await call).summary
    assert summary.prefill_placement == inference_pb2.PLACEMENT_LOCAL
    total = summary.ledger.total
    spent = {(entry.hop, entry.kind): entry.duration.ToNanoseconds() / 1e9 for entry in total.entries}
    assert sum(spent.values()) == pytest.approx(total.total.ToNanoseconds() / 1e9)
    assert spent[ledger_pb2.HOP_PREFILL, ledger_pb2.KIND_COMPUTE] >= 0.45  # two steps at least
    # From its last word on nothing is known but that it did not answer.
    assert spent[ledger_pb2.HOP_PREFILL, ledger_pb2.KIND_NETWORK] <= 0.45


async def test_trace_and_top_show_a_real_request(small_model: Path) -> None:
    async def baton(*arguments: str) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "baton.cli", *arguments,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 30)
        assert process.returncode == 0, err.decode()
        return out.decode()

    async with running_mesh(small_model) as mesh:
        admin = ("--admin", mesh.router.admin)
        await baton("generate", "y" * 100, "--target", mesh.router.address, "--max-tokens", "12", "--quiet")
        (listed,) = json.loads(await baton("trace", "--json", *admin))
        shown = await baton("trace", listed["request_id"][:8], *admin)
        assert "whole request" in shown
        assert "residual" in shown
        for hop in ("router", "decode", "prefill"):
            assert any(line.split()[:1] == [hop] for line in shown.splitlines()), shown
        entries = listed["ledger"]["total"]["entries"]
        assert sum(entry["duration_ns"] for entry in entries) == listed["ledger"]["total"]["total_ns"]
        state = json.loads(await baton("top", "--once", "--json", *admin))
        assert state["outcomes"] == {"ok": 1}
        assert {worker["tier"] for worker in state["workers"]} == {"prefill", "decode"}
        assert sum(state["shares"].values()) == pytest.approx(1)
        assert "where the time went" in await baton("top", "--once", *admin)
