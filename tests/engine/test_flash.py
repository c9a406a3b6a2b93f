"""The bfloat16 kernels: right against float64, and bitwise the same whatever a row is computed with."""

from __future__ import annotations

import random as numbers
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from baton.engine.attention import Call
from baton.engine.config import EngineConfig
from baton.engine.engine import Engine
from baton.engine.errors import EngineError
from baton.engine.kernels.flash import flash_kernel
from baton.engine.kernels.linear import PanelLinear, panel_linear
from baton.engine.kernels.panels import multiplies_pairs
from baton.engine.layout import KvDtype, LayerSpec
from baton.engine.messages import Role, SamplingParams
from baton.engine.request import Request
from baton.engine.scheduler import Work
from tests.fixtures.models import random_llama

pytestmark = pytest.mark.skipif(
    not multiplies_pairs() or flash_kernel() is None, reason="no compiler, or no CPU that multiplies bfloat16 in pairs"
)
SLOTS = 5


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def layer_of(outputs: int, inputs: int, *, bias: bool) -> tuple[PanelLinear, nn.Linear]:
    plain = nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    with torch.no_grad():
        plain.weight.copy_(random(outputs, inputs, seed=1))
        if bias:
            plain.bias.copy_(random(outputs, seed=2))
    layer = panel_linear(plain.weight.detach(), plain.bias.detach() if bias else None)
    assert layer is not None
    return layer, plain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("outputs", "inputs"), [(96, 80), (97, 2), (31, 64), (1, 130)])
@pytest.mark.parametrize("rows", [1, 2, 13, 14, 15, 29, 64, 257])
def test_linear(outputs: int, inputs: int, bias: bool, rows: int) -> None:
    layer, plain = layer_of(outputs, inputs, bias=bias)
    x = random(1, rows, inputs, seed=3)
    with torch.inference_mode():
        got, expected = layer(x), plain.double()(x.double())
    assert got.shape == (1, rows, outputs)
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-4)


def test_a_linear_row_is_bitwise_the_same_in_every_batch() -> None:
    layer, _ = layer_of(97, 256, bias=True)
    x = random(300, 256, seed=4)
    together = layer(x)
    for rows in (1, 2, 5, 13, 14, 15, 28, 29, 100):
        for first in (0, 7, 300 - rows):
            assert torch.equal(layer(x[first : first + rows]), together[first : first + rows])
    strided = random(300, 512, seed=5)[:, ::2]
    assert torch.equal(layer(strided), layer(strided.contiguous()))


def test_a_linear_layer_at_the_edges() -> None:
    layer, _ = layer_of(33, 64, bias=False)
    assert layer(random(0, 64, seed=0)).shape == (0, 33)
    x = random(3, 64, seed=6)
    clean = layer(x)
    x[1, 5] = torch.nan
    got = layer(x)
    assert got[1].isnan().all()
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    for wrong in (random(3, 63, seed=0), random(3, 64, seed=0).float()):
        with pytest.raises(ValueError, match="64 bfloat16 inputs"):
            layer(wrong)
    assert panel_linear(random(4, 63, seed=0), None) is None  # no pairs
    assert panel_linear(random(4, 64, seed=0).float(), None) is None


@dataclass
class Batch:
    """Segments of requests in a pool in which everything that no request may see is not a number."""

    layer: LayerSpec
    segments: list[tuple[int, int, int, int]]
    keys: torch.Tensor
    values: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    call: Call

    @classmethod
    def random(cls, seed: int) -> Batch:
        rng = numbers.Random(seed)
        kv_heads, groups = rng.choice([1, 2, 4]), rng.choice([1, 2, 3, 7, 60])
        key_dim, value_dim = rng.choice([2, 16, 24, 64, 80, 128]), rng.choice([1, 16, 48, 64, 100])
        window = rng.choice([0, 0, 5, 64, 90])
        layer = LayerSpec(
            key="0",
            heads=kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            window=window,
            chunk=0 if window else rng.choice([0, 0, 50]),
        )
        tokens = rng.choice([100, 200, 333])
        keys = torch.full((SLOTS, tokens, kv_heads, key_dim), torch.nan).bfloat16()
        values = torch.full((SLOTS, tokens, kv_heads, value_dim), torch.nan).bfloat16()
        segments, rows = [], 0
        for slot in rng.sample(range(SLOTS), rng.randint(1, SLOTS)):
            count = rng.choice([1, 1, 2, 5, 17, 60])
            start = rng.randint(0, tokens - count)
            first = layer.first_seen(start)
            keys[slot, first:start] = random(start - first, kv_heads, key_dim, seed=seed + 1)
            values[slot, first:start] = random(start - first, kv_heads, value_dim, seed=seed + 2)
            segments.append((slot, rows, count, start))
            rows += count
        # As model codes hand them over: views of [tokens, heads, dim].
        query = random(1, rows, kv_heads * groups, key_dim, seed=seed + 3).transpose(1, 2)
        key = random(1, rows, kv_heads, key_dim, seed=seed + 4).transpose(1, 2)
        value = random(1, rows, kv_heads, value_dim, seed=seed + 5).transpose(1, 2)
        sinks = rng.choice([None, torch.randn(kv_heads * groups, generator=torch.Generator().manual_seed(seed))])
        call = Call(rng.choice([None, 0.3]), rng.choice([None, 2.0]), sinks, None, 0)
        return cls(layer, segments, keys, values, query, key, value, call)

    def run(self, segments: list[tuple[int, int, int, int]], rows: slice = slice(None)) -> torch.Tensor:
        kernel = flash_kernel()
        assert kernel is not None
        parts = (t[:, :, rows] for t in (self.query, self.key, self.value))
        return kernel(*parts, self.keys, self.values, torch.tensor(segments), self.layer, self.call)[0]

    def expected(self) -> torch.Tensor:
        """In float64, token by token."""
        groups, outs = self.query.shape[1] // self.layer.heads, []
        scaling = self.layer.key_dim**-0.5 if self.call.scaling is None else self.call.scaling
        for slot, row, count, start in self.segments:
            for i in range(count):
                seen = slice(self.layer.first_seen(start + i), start + i + 1)
                k, v = (t[slot, seen].double().repeat_interleave(groups, 1) for t in (self.keys, self.values))
                scores = torch.einsum("hd,thd->ht", self.query[0, :, row + i].double(), k) * scaling
                if self.call.softcap is not None:
                    scores = torch.tanh(scores / self.call.softcap) * self.call.softcap
                if self.call.sinks is not None:
                    scores = torch.cat((scores, self.call.sinks.double()[:, None]), 1)
                weights = scores.softmax(1)[:, : k.shape[0]]
                outs.append(torch.einsum("ht,thd->hd", weights, v))
        return torch.stack(outs)


@pytest.mark.parametrize("seed", range(40))
def test_attention(seed: int) -> None:
    batch = Batch.random(seed)
    out = batch.run(batch.segments)
    for slot, row, count, start in batch.segments:
        for pool, new in ((batch.keys, batch.key), (batch.values, batch.value)):
            assert torch.equal(pool[slot, start : start + count].transpose(0, 1), new[0, :, row : row + count])
    torch.testing.assert_close(out.double(), batch.expected(), rtol=0.01, atol=0.01)
    for slot, row, count, start in batch.segments:  # alone, and cut into other pieces
        size = max(1, count // 3)
        for i in range(0, count, size):
            n = min(size, count - i)
            rows = slice(row + i, row + i + n)
            assert torch.equal(batch.run([(slot, 0, n, start + i)], rows), out[rows])


def test_what_is_not_a_number_stays_in_its_request() -> None:
    batch = Batch.random(3)
    clean = batch.run(batch.segments)
    _slot, row, _count, _start = batch.segments[0]
    batch.query[0, :, row] = torch.nan
    got = batch.run(batch.segments)
    assert got[row].isnan().all()
    rest = torch.arange(len(clean)) != row
    assert torch.equal(got[rest], clean[rest])


def test_another_element_type_than_the_pools_is_refused() -> None:
    batch = Batch.random(0)
    batch.query = batch.query.float()
    with pytest.raises(EngineError, match="float32"):
        batch.run(batch.segments)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    model = random_llama(tmp_path_factory.mktemp("model"), hidden=64, layers=3)
    config = EngineConfig(model=model, dtype=KvDtype.BFLOAT16, num_slots=20, slot_tokens=256)
    return Engine.load(config, lambda events: None)


def test_a_whole_model_gives_the_same_bits_in_every_chunk_and_batch(engine: Engine) -> None:
    """Its norms, its rotations and its activations work row by row as well."""
    assert engine.exact  # the self-test saw it, too
    rng = numbers.Random(0)
    runner = engine.runner

    def request(slot: int, ids: list[int]) -> Request:
        made = Request.probe(ids, Role.GENERATE, SamplingParams(max_tokens=1))
        made.slot = slot
        return made

    ids = [rng.randrange(5, 300) for _ in range(150)]
    whole = request(0, ids)
    _, expected = runner.run([Work(whole, 0, len(ids))])
    for sizes in ([149, 1], [75, 75], [1] * 150, [64, 64, 22], [7, 100, 43]):
        at, others = 0, [request(slot, [rng.randrange(5, 300) for _ in range(200)]) for slot in range(1, 16)]
        for step, size in enumerate(sizes):
            mates = [Work(other, step % 150, 1 + slot % 3) for slot, other in enumerate(others)]
            works = [Work(whole, at, size), *mates[: step % 16]]
            requests, logits = runner.run(works)
            at += size
        assert torch.equal(logits[requests.index(whole)], expected[0])


def test_without_the_kernels_torch_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("baton.engine.kernels.linear.multiplies_pairs", lambda: False)
    monkeypatch.setattr("baton.engine.kernels.flash.multiplies_pairs", lambda: False)
    from baton.engine.kernels import flash, linear

    flash.flash_kernel.cache_clear()
    linear._function.cache_clear()
    try:
        assert flash_kernel() is None
        assert panel_linear(random(4, 64, seed=0), None) is None
        config = EngineConfig(
            model=random_llama(tmp_path / "model"), dtype=KvDtype.BFLOAT16, num_slots=4, slot_tokens=64
        )
        assert not Engine.load(config, lambda events: None).exact
    finally:
        flash.flash_kernel.cache_clear()
        linear._function.cache_clear()
