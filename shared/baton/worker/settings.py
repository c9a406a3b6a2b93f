"""Settings of a service that owns an engine."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from baton.engine.config import EngineConfig, Quantization
from baton.engine.layout import KvDtype
from baton.handoff.shm import default_directory
from baton.handoff.transport import TransportChoice
from baton.models import bundled_model
from baton.rpc.settings import ServiceSettings
from baton.worker.cpus import parse_cpus


class WorkerSettings(ServiceSettings):
    """Common to prefill and decode: the model and the size of its KV pool."""

    model: Path = Field(default_factory=bundled_model, description="model directory; default: the bundled tiny model")
    model_name: str = Field("", description="name clients call the model by; default: the directory's name")
    dtype: KvDtype = Field(KvDtype.FLOAT32, description="element type of weights and KV")
    device: str = Field("cpu", description="where the model runs: cpu, cuda or cuda:N")
    num_slots: int = Field(32, ge=1, le=4096, description="requests that can hold KV at once")
    slot_tokens: int = Field(0, ge=0, description="most tokens of one request; 0: the model's context, at most 2048")
    kv_tokens: int = Field(0, ge=0, description="KV tokens of all requests together; 0: num_slots x slot_tokens")
    step_tokens: int = Field(256, ge=1, description="token budget of one step: decode first, prompt chunks after")
    prefix_cache: bool = Field(
        True, description="keep what finished requests computed for later ones that begin alike, where memory is free"
    )
    max_waiting: int = Field(256, ge=1, description="requests that may wait for the engine; more are refused")
    threads: int = Field(1, ge=1, description="CPU threads of the engine")
    quantization: Quantization = Field(
        Quantization.NONE,
        description="int8: linear layers in steps of so few rows that it is faster here, on CPU; about 1 % off",
    )
    kernels: bool = Field(True, description="compiled kernels for this CPU, where they or a C compiler are installed")
    cpus: str = Field("", description="cores that the service and its engine have for themselves, as 0-3,8")
    load_timeout: float = Field(300.0, gt=0, description="seconds the model may take to load")

    transport: TransportChoice = Field(
        TransportChoice.AUTO,
        description="how KV moves between the tiers: the fastest way both ends share, or one way only, or not at all",
    )
    shm_dir: Path = Field(
        default_factory=default_directory,
        description="where prefill and decode services of one host meet for --transport shm; private, mode 0700",
    )

    engine_silence_seconds: float = Field(
        2.5,
        gt=0,
        description="an engine that does not answer for this long, and ten of its steps, is hung: the end. After half "
        "of it nothing new comes to it. Time in which it waited for a processor does not count",
    )

    @field_validator("cpus")
    @classmethod
    def _names_cores(cls, value: str) -> str:
        parse_cpus(value)
        return value

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
            prefix_cache=self.prefix_cache,
            threads=self.threads,
            quantization=self.quantization,
            kernels=self.kernels,
        )
