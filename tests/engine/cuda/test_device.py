"""A device that is not there is refused by a message that says what is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from baton.engine import loader
from baton.engine.config import EngineConfig, Quantization
from baton.engine.cuda.device import resolve
from baton.engine.errors import EngineError
from baton.engine.launch import launch
from baton.engine.loader import load


def test_the_cpu() -> None:
    assert resolve("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CUDA", "mps", "", "cuda:0 "])
def test_other_names(name: str) -> None:
    with pytest.raises(EngineError, match="use cpu, cuda or cuda:N"):
        resolve(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device(llama: Path) -> None:
    with pytest.raises(EngineError, match=r"built without CUDA|no CUDA device"):
        load(EngineConfig(model=llama, device="cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
async def test_a_worker_says_why_it_does_not_start(llama: Path) -> None:
    with pytest.raises(EngineError, match="device 'cuda:1': "):
        await launch(EngineConfig(model=llama, device="cuda:1"), lambda stage, done: None, 100)


def test_a_torch_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(EngineError, match="built without CUDA"):
        resolve("cuda")


def test_no_driver_and_too_few_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineError, match="driver"):
        resolve("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve("cuda:1") == torch.device("cuda", 1)
    assert resolve("cuda") == torch.device("cuda", 0)
    with pytest.raises(EngineError, match="there are 2"):
        resolve("cuda:2")


def test_weights_in_int8_are_for_the_cpu(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "resolve", lambda name: torch.device("cuda", 0))
    with pytest.raises(EngineError, match="int8 weights are for models on a CPU"):
        load(EngineConfig(model=llama, device="cuda", quantization=Quantization.INT8))
