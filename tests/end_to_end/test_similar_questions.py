"""A question asked in other words, through real processes: answered by the stored answer, and flagged as such."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest

from baton.cli.redis_server import EmbeddedRedis
from baton.models import bundled_model
from tests.cache.semantic.conftest import needs_encoder
from tests.fixtures.mesh import running_mesh

pytestmark = [needs_encoder, pytest.mark.timeout(400)]

ASKED = "What is the capital of France?"
AGAIN = "Can you tell me the capital of France?"
OTHER = "What is the capital of Italy?"
PATIENT_CACHE = ("--semantic-tenants", '["*"]', "--semantic-timeout", "20", "--redis-timeout", "1")
PATIENT_ROUTER = ("--cache-timeout-seconds", "5", "--cache-similar-timeout-seconds", "30")


async def generate(address: str, text: str, *flags: str) -> tuple[dict[str, Any], str]:
    """`baton generate --chat`; what it says as JSON, or what it tells about it."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "baton.cli", "generate", "--target", address, "--chat", "--temperature", "0",
        "--max-tokens", "12", text, *flags,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, told = await process.communicate()
    assert process.returncode == 0, told.decode()
    return (json.loads(out) if "--json" in flags else {}), told.decode()


async def test_asked_in_other_words() -> None:
    redis_server = EmbeddedRedis()
    await asyncio.to_thread(redis_server.start)
    try:
        async with running_mesh(
            bundled_model(), redis_url=redis_server.url, cache_flags=PATIENT_CACHE, router_flags=PATIENT_ROUTER
        ) as mesh:
            address = mesh.router.address
            first, _ = await generate(address, ASKED, "--semantic", "--json")
            assert first["cache"] == "miss"
            exact, _ = await generate(address, ASKED, "--semantic", "--json")
            assert (exact["cache"], exact["text"], exact["cache_similarity"]) == ("hit", first["text"], None)
            similar, _ = await generate(address, AGAIN, "--semantic", "--json")
            assert (similar["cache"], similar["text"]) == ("semantic", first["text"])
            assert similar["cache_entry"] == exact["cache_entry"]
            assert 0.82 <= similar["cache_similarity"] < 1
            _, told = await generate(address, AGAIN, "--semantic", "--explain")
            assert "semantic 0." in told
            assert exact["cache_entry"][:16] in told
            # Not for who does not ask for it, and not for another question.
            assert (await generate(address, "Tell me, what is the capital of France?", "--json"))[0]["cache"] == "miss"
            assert (await generate(address, OTHER, "--semantic", "--json"))[0]["cache"] == "miss"
    finally:
        await asyncio.to_thread(redis_server.close)
