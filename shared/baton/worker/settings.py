"""Settings of a service that owns an engine."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from baton.engine.config import EngineConfig
from baton.engine.layout import KvDtype
from baton.models import bundled_model
from baton.rpc.settings import ServiceSettings


class WorkerSettings(ServiceSettings):
    """Common to prefill and decode: the model and the size of its KV pool."""

    model: Path = Field(default_factory=bundled_model, description="model directory; default: the bundled tiny model")
    model_name: str = Field("", description="name clients call the model by; default: the directory's name")
    dtype: KvDtype = Field(KvDtype.FLOAT32, description="element type of weights and KV")
    device: str = Field("cpu", description="where the model runs; cpu is what there is so far")
    num_slots: int = Field(32, ge=1, le=4096, description="requests that can hold KV at once")
    slot_tokens: int = Field(0, ge=0, description="most tokens of one request; 0: the model's context, at most 2048")
    kv_tokens: int = Field(0, ge=0, description="KV tokens of all requests together; 0: num_slots x slot_tokens")
    step_tokens: int = Field(256, ge=1, description="token budget of one step: decode first, prompt chunks after")
    max_waiting: int = Field(256, ge=1, description="requests that may wait for the engine; more are refused")
    threads: int = Field(1, ge=1, description="CPU threads of the engine")
    load_timeout: float = Field(300.0, gt=0, description="seconds the model may take to load")

    engine_silence_seconds: float = Field(
        3.0,
        gt=0,
        description="an engine that does not answer for this long, and ten of its steps, is hung: the end",
    )

    def served_name(self) -> str:
        """The name clients call the model by."""
        return self.model_name or self.model.resolve().name

    def engine(self) -> EngineConfig:
        """The engine's configuration."""
        return EngineConfig(
            model=self.model,
            dtype=self.dtype,
            device=self.device,
            num_slots=self.num_slots,
            slot_tokens=self.slot_tokens,
            capacity_tokens=self.kv_tokens,
            step_tokens=self.step_tokens,
            max_waiting=self.max_waiting,
            threads=self.threads,
        )
