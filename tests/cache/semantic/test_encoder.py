"""The encoder: vectors that mean something, in a bound of time and number, and a clear word when it cannot be used."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from baton_cache.semantic.encoder import Encoder, EncoderUnusable, NotEmbedded
from tests.cache.semantic.conftest import ENCODER, Letters, needs_encoder


async def test_too_slow_and_too_many() -> None:
    letters = Letters(seconds=0.3)
    encoder = Encoder(letters, most=2, timeout=0.05)
    with encoder.running():
        with pytest.raises(NotEmbedded, match="too slow"):
            await encoder.embed("a")
        with pytest.raises(NotEmbedded, match="too slow"):  # the first one is still computed
            await encoder.embed("b")
        with pytest.raises(NotEmbedded, match="too many"):
            await encoder.embed("c")
        letters.seconds = 0
        async with asyncio.timeout(10):
            while True:
                try:
                    vector = await encoder.embed("d")
                    break
                except NotEmbedded:
                    await asyncio.sleep(0.05)
        assert np.linalg.norm(vector) == pytest.approx(1)


async def test_the_event_loop_goes_on_meanwhile() -> None:
    encoder = Encoder(Letters(seconds=0.5), most=2, timeout=5)
    with encoder.running():
        waiting = asyncio.create_task(encoder.embed("a"))
        turns = 0
        while not waiting.done():
            await asyncio.sleep(0.01)
            turns += 1
        await waiting
    assert turns >= 5


async def test_failing_is_not_embedding_and_can_pass() -> None:
    letters = Letters()
    encoder = Encoder(letters, most=2, timeout=5)
    with encoder.running():
        letters.broken = True
        for _ in range(5):
            with pytest.raises(NotEmbedded, match="failed"):
                await encoder.embed("a")
            await asyncio.sleep(0)
        letters.broken = False
        async with asyncio.timeout(5):
            assert (await encoder.embed("a")).shape == (27,)


@needs_encoder
def test_what_is_alike_lies_near() -> None:
    from baton_cache.semantic.embedder import Embedder

    embedder = Embedder(ENCODER)
    cat, kitten, tax = (embedder.embed(text) for text in ("a cat sleeps", "a kitten is sleeping", "file your taxes"))
    assert cat.shape == (embedder.dimension,) == (384,)
    assert cat.dtype == np.float32
    assert np.linalg.norm(cat) == pytest.approx(1, abs=1e-5)
    assert cat @ kitten > 0.6 > 0.3 > cat @ tax
    assert np.linalg.norm(embedder.embed("word " * 5000)) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(embedder.embed("a cat sleeps"), cat)


@needs_encoder
def test_it_agrees_with_the_published_vectors_of_this_model() -> None:
    """Cosines of the model card's own kind of example, as sentence-transformers gives them."""
    from baton_cache.semantic.embedder import Embedder

    embedder = Embedder(ENCODER)
    one, same, other = (
        embedder.embed(text)
        for text in ("The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium.")
    )
    assert float(one @ same) == pytest.approx(0.6660, abs=2e-3)
    assert float(one @ other) == pytest.approx(0.1046, abs=2e-3)


@needs_encoder
def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    from baton_cache.semantic.embedder import Embedder

    with pytest.raises(EncoderUnusable, match="no directory"):
        Embedder(str(tmp_path / "nowhere"))
    with pytest.raises(EncoderUnusable, match=r"config\.json"):
        Embedder(str(tmp_path))
    copy = tmp_path / "copy"
    shutil.copytree(Embedder(ENCODER).directory, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(EncoderUnusable, match="code of its own"):
        Embedder(str(copy))
    (copy / "config.json").write_text(json.dumps(config))
    pooling = copy / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(EncoderUnusable, match="pooling"):
        Embedder(str(copy))
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True}))
    assert not np.allclose(Embedder(str(copy)).embed("a cat"), Embedder(ENCODER).embed("a cat"))
    (copy / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(EncoderUnusable):
        Embedder(str(copy))
    (copy / "model.safetensors").unlink()
    with pytest.raises(EncoderUnusable, match=r"model\.safetensors"):
        Embedder(str(copy))


def test_without_similar_questions_torch_is_never_imported(tmp_path: Path) -> None:
    program = """
import asyncio, sys
from tests.cache.conftest import an_answer, cache_key, running_cache

async def main():
    async with running_cache(f"unix://{sys.argv[1]}/no.sock", redis_timeout=0.1) as cache:
        await cache.lookup(cache_key())
        await cache.fill(cache_key(), an_answer())

asyncio.run(main())
found = {"torch", "transformers", "safetensors"} & set(sys.modules)
assert not found, found
"""
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=100, cwd=root)
