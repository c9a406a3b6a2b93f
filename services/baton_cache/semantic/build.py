"""Put the semantic cache together, if any tenant may use it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.rpc.service import CannotStart
from baton_cache.answers import Answers
from baton_cache.key import Keys
from baton_cache.names import Names
from baton_cache.semantic.encoder import Embeds, Encoder, EncoderUnusable
from baton_cache.semantic.index import OwnIndex
from baton_cache.semantic.redis_index import DetectedIndex, RedisIndex
from baton_cache.semantic.semantic import Policy, SemanticCache
from baton_cache.settings import CacheSettings
from baton_cache.store import Store

log = logging.getLogger(__name__)


@asynccontextmanager
async def semantic_cache(
    settings: CacheSettings, store: Store, names: Names, keys: Keys, answers: Answers
) -> AsyncIterator[SemanticCache | None]:
    """The semantic cache; None: it is for nobody, and then neither torch nor an encoder is needed.

    Raises:
        CannotStart: the encoder cannot be used.
    """
    if not settings.semantic_tenants:
        yield None
        return
    encoder = Encoder(_embedder(settings), settings.semantic_waiting, settings.semantic_timeout)
    policy = Policy(frozenset(settings.semantic_tenants), settings.semantic_threshold, settings.semantic_mode)
    most = settings.semantic_questions
    index = DetectedIndex(store, names, RedisIndex(store, names, most), OwnIndex(most))
    log.info("similar questions are answered", extra={"mode": policy.mode.value, "threshold": policy.threshold})
    with encoder.running():
        yield SemanticCache(policy, encoder, index, keys, answers)


def _embedder(settings: CacheSettings) -> Embeds:
    """The encoder, loaded and tried once.

    Raises:
        CannotStart: it cannot be.
    """
    try:
        # Here, because it brings torch along, which a cache without similar questions does not have.
        from baton_cache.semantic.embedder import Embedder
    except ImportError as error:
        raise CannotStart(
            f'--semantic-tenants needs torch and transformers ({error}): pip install "baton-mesh[semantic]"'
        ) from error
    try:
        embedder = Embedder(settings.semantic_encoder, settings.semantic_threads)
        embedder.embed("Is anybody there?")
    except EncoderUnusable as error:
        raise CannotStart(f"--semantic-encoder: {error}") from error
    return embedder
