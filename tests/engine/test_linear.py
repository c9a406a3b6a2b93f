"""Linear layers in other layouts compute what `nn.Linear` does; int8 is close to it, and the same in every batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from baton.engine import linear
from baton.engine.calibrate import Calibration
from baton.engine.config import EngineConfig, Quantization
from baton.engine.engine import Engine
from baton.engine.errors import EngineError
from baton.engine.fuse import FusedLinear, Share, siblings
from baton.engine.layout import KvDtype
from baton.engine.linear import Int8Linear, PackedLinear, SwitchedLinear
from baton.engine.prepare import prepare

ROWS = (1, 2, 3, 7, 16, 33, 64, 257)
DTYPES = (torch.float32, torch.bfloat16)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", ROWS)
def test_packed_weights_give_the_same_numbers(dtype: torch.dtype, bias: bool, rows: int) -> None:
    weight, offset = random(96, 80, dtype=dtype), random(96, seed=1, dtype=dtype) if bias else None
    x = random(1, rows, 80, seed=2, dtype=dtype)
    expected = nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
    with torch.inference_mode():
        got = PackedLinear(weight, offset)(x)
    assert got.dtype == dtype
    assert got.shape == (1, rows, 96)
    torch.testing.assert_close(
        got.double(),
        expected,
        rtol=2**-7 if dtype == torch.bfloat16 else 1e-5,
        atol=1e-1 * (dtype == torch.bfloat16) + 1e-4,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_close(dtype: torch.dtype) -> None:
    weight, bias, x = (
        random(96, 80, dtype=dtype),
        random(96, seed=1, dtype=dtype),
        random(1, 40, 80, seed=2, dtype=dtype),
    )
    with torch.inference_mode():
        got = Int8Linear(weight, bias)(x).float()
    expected = nn.functional.linear(x.float(), weight.float(), bias.float())
    assert float((got - expected).norm() / expected.norm()) < 0.015


def test_int8_fits_the_pairs_of_a_cpu_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    most = linear._INT8_MAX // 2
    assert 2 * (2 * most + 1) * linear._INT8_MAX < 2**15
    monkeypatch.setattr(linear, "_INPUT_MAX", most)
    weight, x = random(96, 80), random(1, 40, 80, seed=2)
    with torch.inference_mode():
        got = Int8Linear(weight, None)(x)
        assert Int8Linear(torch.ones(4, 80), None)(torch.ones(1, 80)).tolist() == [[80.0] * 4]
    expected = nn.functional.linear(x, weight)
    assert float((got - expected).norm() / expected.norm()) < 0.03


def test_a_row_in_int8_is_bitwise_the_same_in_every_batch() -> None:
    layer = Int8Linear(random(96, 80, dtype=torch.bfloat16), None)
    x = random(1, 64, 80, seed=2, dtype=torch.bfloat16) * torch.logspace(-3, 3, 64).view(1, -1, 1).bfloat16()
    with torch.inference_mode():
        together = layer(x)
        for rows in (1, 5, 16):
            for first in (0, 17, 64 - rows):
                assert torch.equal(layer(x[:, first : first + rows]), together[:, first : first + rows])


def test_int8_keeps_what_is_not_a_number_in_its_row() -> None:
    layer = Int8Linear(random(32, 16), None)
    x = random(1, 3, 16, seed=1)
    with torch.inference_mode():
        clean = layer(x)
        x[0, 1, 5] = torch.nan
        got = layer(x)
    assert got[0, 1].isnan().all()
    assert torch.equal(got[0, [0, 2]], clean[0, [0, 2]])


def test_few_rows_take_int8_and_many_the_weights_as_they_are() -> None:
    weight = random(32, 16)
    few, many = Int8Linear(weight, None), PackedLinear(weight, None)
    layer = SwitchedLinear(few, many, 4)
    with torch.inference_mode():
        for rows, expected in ((4, few), (5, many)):
            x = random(1, rows, 16, seed=rows)
            assert torch.equal(layer(x), expected(x))


class Attention(nn.Module):
    """Calls like those of model code."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 24, bias=bias)
        self.k_proj = nn.Linear(16, 8, bias=False)
        self.v_proj = nn.Linear(16, 8, bias=bias)
        self.o_proj = nn.Linear(24, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(q) + torch.cat((k, v), dim=-1)


def test_siblings_of_one_input_are_found() -> None:
    model = nn.Sequential(Attention(bias=True), Attention(bias=False))
    found = siblings(model, lambda: model(random(1, 3, 16)))
    assert found == [[f"{i}.{name}" for name in ("q_proj", "k_proj", "v_proj")] for i in (0, 1)]


def test_a_layer_called_twice_is_left_alone() -> None:
    class Twice(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + super().forward(x)

    model = Twice(bias=False)
    assert siblings(model, lambda: model(random(1, 3, 16))) == []


@pytest.mark.parametrize("bias", [True, False])
def test_a_prepared_model_computes_the_same(bias: bool) -> None:
    model = Attention(bias=bias)
    x = random(1, 5, 16)
    with torch.inference_mode():
        expected = model(x)
        prepare(model, EngineConfig(model=Path("unused")), lambda: model(x))
        assert isinstance(model.q_proj, Share)
        assert isinstance(model.o_proj, PackedLinear)
        assert model.q_proj.weight.dtype == torch.float32
        assert model.q_proj.weight.is_meta
        for _ in range(2):
            torch.testing.assert_close(model(x), expected)


def test_shares_follow_their_input() -> None:
    weight = random(12, 4)
    fused = FusedLinear(PackedLinear(weight, None), [8, 4])
    a, b = random(1, 2, 4, seed=1), random(1, 2, 4, seed=2)
    with torch.inference_mode():
        torch.testing.assert_close(fused.share(a, 0), a @ weight[:8].T)
        torch.testing.assert_close(fused.share(b, 1), b @ weight[8:].T)  # the first never asked for its share
        torch.testing.assert_close(fused.share(b, 0), b @ weight[:8].T)
        torch.testing.assert_close(fused.share(b, 0), b @ weight[:8].T)  # asked twice


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a shape was measured; every measurement says 16 rows."""
    calls: list[int] = []

    def measure(*_: object) -> int:
        calls.append(1)
        return 16

    monkeypatch.setattr("baton.engine.calibrate._measure", measure)
    return calls


def test_calibration_is_kept_on_disk(tmp_path: Path, measured: list[int]) -> None:
    config = EngineConfig(model=Path("unused"), quantization=Quantization.INT8)
    int8, packed = Int8Linear(random(32, 16), None), PackedLinear(random(32, 16), None)
    for _ in range(2):
        calibration = Calibration.open(config, tmp_path)
        assert calibration.rows(int8, packed) == calibration.rows(int8, packed) == 16
        calibration.save()
    assert len(measured) == 1
    other_threads = Calibration.open(EngineConfig(model=Path("unused"), threads=7), tmp_path)
    other_threads.rows(int8, packed)
    other_threads.save()
    assert len(measured) == 2
    assert Calibration.open(config, tmp_path).limits  # the first one's lines are still there


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": 1}'])
def test_a_broken_calibration_file_is_an_empty_one(tmp_path: Path, content: bytes, measured: list[int]) -> None:
    (tmp_path / "calibration.json").write_bytes(content)
    calibration = Calibration.open(EngineConfig(model=Path("unused")), tmp_path)
    assert calibration.rows(Int8Linear(random(32, 16), None), PackedLinear(random(32, 16), None)) == 16
    calibration.save()
    assert Calibration.open(EngineConfig(model=Path("unused")), tmp_path).limits


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, measured: list[int]) -> None:
    monkeypatch.setattr("baton.engine.calibrate.cache_directory", lambda: None)
    calibration = Calibration.open(EngineConfig(model=Path("unused")))
    assert calibration.rows(Int8Linear(random(32, 16), None), PackedLinear(random(32, 16), None)) == 16
    calibration.save()


@pytest.mark.parametrize("dtype", KvDtype)
def test_an_engine_in_int8_starts(
    llama: Path, dtype: KvDtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = EngineConfig(model=llama, dtype=dtype, quantization=Quantization.INT8, num_slots=4, slot_tokens=64)
    Engine.load(config, lambda events: None)
    assert measured


@pytest.fixture
def arm() -> Iterator[None]:
    """The quantized operators that torch has on ARM."""
    here = torch.backends.quantized.engine
    torch.backends.quantized.engine = "qnnpack"
    yield
    torch.backends.quantized.engine = here


def test_without_the_operators_int8_is_refused_by_name(arm: None, llama: Path) -> None:
    with pytest.raises(EngineError, match="--quantization int8"):
        Engine.load(EngineConfig(model=llama, quantization=Quantization.INT8), lambda events: None)
    Engine.load(EngineConfig(model=llama), lambda events: None)


def test_a_real_calibration_measures(tmp_path: Path) -> None:
    calibration = Calibration.open(EngineConfig(model=Path("unused")), tmp_path)
    weight = random(64, 64)
    assert calibration.rows(Int8Linear(weight, None), PackedLinear(weight, None)) in (0, 1, 4, 16, 64, 256)
