"""How fast the engine is on a device: decode, prefill, and KV on its way to the host, each beside its limit.

    python -m tests.bench.gpu --out DIRECTORY

Weights are random, in the shape of an 8B model, made on the device. Nothing is downloaded. Prints a Markdown table, and
writes it with the figures as JSON to DIRECTORY. `--device cpu --shape tiny` runs the same code where there is no
device, to see that it runs: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from baton.engine.config import EngineConfig
from baton.engine.cuda.device import resolve
from baton.engine.cuda.engine import DeviceEngine
from baton.engine.errors import EngineError
from baton.engine.layout import KvDtype
from baton.engine.loader import LoadedModel
from baton.engine.messages import Event, KvReady, Output, Release, Role, SamplingParams, Submit
from tests.fixtures.device_models import EIGHT_B, random_on_device

TINY: dict[str, Any] = {
    **EIGHT_B,
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    batches: tuple[int, ...]
    context: int  # tokens of each decoding request when the measurement begins
    steps: int  # decode steps timed
    prompts: tuple[int, ...]  # lengths of prompts
    repeats: int


SIZES = {
    "8b": Sizes((1, 2, 4, 8, 16, 32, 64), 512, 64, (512, 2048, 4096), 5),
    "tiny": Sizes((1, 4), 16, 4, (32,), 2),
}


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str
    value: float  # median
    lowest: float
    highest: float
    unit: str
    limit: float  # what the hardware would allow
    limit_is: str

    @property
    def share(self) -> float:
        """Of the limit."""
        return self.value / self.limit


class Bench:
    """One model on one device.

    Args:
        device: where.
        shape: of the model.
        sizes: how much is measured.
    """

    def __init__(self, device: torch.device, shape: dict[str, Any], sizes: Sizes) -> None:
        self.device = device
        self.sizes = sizes
        self.model: LoadedModel = random_on_device(device, KvDtype.BFLOAT16, **shape)
        self.events: list[Event] = []
        self.engine: DeviceEngine
        embedding = self.model.module.get_input_embeddings().weight
        parameters = [p for p in self.model.module.parameters() if p is not embedding]
        self.weight_bytes = sum(p.numel() * p.element_size() for p in parameters)
        # The last layer's logits are computed for one row of a prompt only.
        self.weights_of_a_row = sum(p.numel() for p in parameters) - embedding.numel()

    def serve(self, num_slots: int, slot_tokens: int) -> float:
        """Start an engine in place of the one before; seconds until it could serve."""
        if hasattr(self, "engine"):
            del self.engine
            gc.collect()  # it and what it emits to hold each other
        config = EngineConfig(
            model=Path(), dtype=KvDtype.BFLOAT16, num_slots=num_slots, slot_tokens=slot_tokens, step_tokens=2048
        )
        began = time.perf_counter()
        self.engine = DeviceEngine(config, self.model, self.events.extend)
        return time.perf_counter() - began

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, action: Callable[[], object]) -> float:
        """Seconds an action takes on the device."""
        self.synchronize()
        began = time.perf_counter()
        action()
        self.synchronize()
        return time.perf_counter() - began

    # ------------------------------------------------------------------------------------------ limits

    def memory_rate(self) -> float:
        """Bytes read per second, best of several copies, each byte of which is read once and written once."""
        count = 1 << (30 if self.device.type == "cuda" else 22)
        source, target = (torch.zeros(count, dtype=torch.uint8, device=self.device) for _ in range(2))
        return max(2 * count / self.timed(lambda: target.copy_(source)) for _ in range(10))

    def matrix_rate(self) -> float:
        """Floating-point operations per second of a large bfloat16 product, best of several."""
        n = 8192 if self.device.type == "cuda" else 256
        a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=self.device) for _ in range(2))
        return max(2 * n**3 / self.timed(lambda: a @ b) for _ in range(10))

    def host_rate(self) -> float:
        """Bytes per second from the device to page-locked host memory, in one large copy; best of several."""
        count = 1 << (28 if self.device.type == "cuda" else 22)
        source = torch.zeros(count, dtype=torch.uint8, device=self.device)
        target = torch.empty(count, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return max(count / self.timed(lambda: target.copy_(source, non_blocking=True)) for _ in range(5))

    # ----------------------------------------------------------------------------------------- figures

    def submit(self, name: str, length: int, role: Role, max_tokens: int) -> None:
        """A greedy request of random tokens."""
        tokens = torch.randint(1, self.model.spec.vocab_size, (length,)).tolist()
        sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        self.engine.handle(
            Submit(request_id=name, role=role, token_ids=tokens, num_prompt_tokens=length, sampling=sampling)
        )

    def drain(self) -> None:
        """Step until there is nothing to do."""
        while self.engine.has_work:
            self.engine.step()

    def given(self) -> int:
        """Tokens told of since the last call."""
        count = sum(len(event.token_ids) for event in self.events if isinstance(event, Output))
        self.events.clear()
        return count

    def decode(self, batch: int, memory_rate: float) -> Figure:
        """Tokens per second of so many running requests."""
        rates = []
        steps = self.sizes.steps
        for repeat in range(self.sizes.repeats):
            for i in range(batch):
                self.submit(f"{repeat}.{i}", self.sizes.context, Role.GENERATE, 3 * steps)
            outputs = 0
            while outputs < 2 * batch:  # all are past their prompts
                self.engine.step()
                outputs += self.given()
            began = time.perf_counter()
            for _ in range(steps):
                self.engine.step()
            rates.append(self.given() / (time.perf_counter() - began))
            for i in range(batch):
                self.engine.handle(Release(f"{repeat}.{i}"))
            self.drain()
            self.given()
        context = batch * (self.sizes.context + steps)
        read = self.weight_bytes + context * self.engine.layout.bytes_per_token
        return self.figure(
            f"decode, {batch} running, {self.sizes.context} tokens each", rates, "tokens/s",
            batch * memory_rate / read, "memory rate over bytes of weights and KV",
        )  # fmt: skip

    def prefill(self, length: int, matrix_rate: float) -> Figure:
        """Prompt tokens per second of one prompt."""
        rates = []
        for _ in range(self.sizes.repeats):
            self.submit("r", length, Role.GENERATE, 1)
            rates.append(length / self.timed(self.drain))
        return self.figure(
            f"prefill, {length} tokens", rates, "tokens/s", matrix_rate / (2 * self.weights_of_a_row),
            "matrix rate over operations of the linear layers",
        )  # fmt: skip

    def handoff(self, length: int, host_rate: float) -> list[Figure]:
        """KV to the host: alone, and what a prompt takes longer by for it."""
        size = length * self.engine.layout.bytes_per_token
        rates, slower = [], []
        for _ in range(self.sizes.repeats):
            self.submit("r", length, Role.GENERATE, 1)
            plain = self.timed(self.drain)
            self.submit("r", length, Role.PREFILL, 1)
            slower.append(plain / self.timed(self.drain))
            slot = next(event.slot for event in self.events if isinstance(event, KvReady))
            self.events.clear()

            def download(slot: int = slot) -> None:
                for layer in range(len(self.engine.layout.layers)):
                    self.engine.pool.download(layer, slot, 0, length)

            rates.append(size / self.timed(download) / 1e9)
            self.engine.handle(Release("r"))
        return [
            self.figure(f"KV of {length} tokens to the host", rates, "GB/s", host_rate / 1e9, "one pinned copy"),
            self.figure(f"speed of a prompt of {length} while its KV leaves", slower, "of without", 1.0, "no harm"),
        ]

    def figure(self, what: str, values: list[float], unit: str, limit: float, limit_is: str) -> Figure:
        """Median, lowest and highest."""
        return Figure(what, statistics.median(values), min(values), max(values), unit, limit, limit_is)

    def run(self) -> list[Figure]:
        """All of it."""
        memory, matrix, host = self.memory_rate(), self.matrix_rate(), self.host_rate()
        sizes = self.sizes
        self.ready_seconds = self.serve(max(sizes.batches), sizes.context + 4 * sizes.steps)
        self.graphs = self.engine.runner.graphs.sizes
        figures = [self.decode(batch, memory) for batch in sizes.batches]
        self.serve(2, max(sizes.prompts) + 2)
        figures += [self.prefill(length, matrix) for length in self.sizes.prompts]
        for length in self.sizes.prompts:
            figures += self.handoff(length, host)
        return figures


def table(figures: list[Figure]) -> str:
    """As Markdown."""
    lines = ["| what | median | lowest - highest | limit | share |", "|---|---|---|---|---|"]
    for f in figures:
        spread = f"{f.lowest:,.4g} - {f.highest:,.4g}"
        lines.append(
            f"| {f.what} | {f.value:,.4g} {f.unit} | {spread} | {f.limit:,.4g} ({f.limit_is}) | {f.share:.0%} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="tests.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=sorted(SIZES), default="8b")
    parser.add_argument("--out", type=Path, help="directory for gpu.json and gpu.md")
    options = parser.parse_args(arguments)
    try:
        device = resolve(options.device)
    except EngineError as error:
        print(error, file=sys.stderr)
        return 1
    bench = Bench(device, EIGHT_B if options.shape == "8b" else TINY, SIZES[options.shape])
    figures = bench.run()
    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "torch": torch.__version__,
        "attention": bench.engine.runner.attention.name,
        "graphs": bench.graphs,
        "page_locked": bench.engine.pool.registered,
        "shape": options.shape,
        "ready_seconds": bench.ready_seconds,
    }
    text = "\n".join(f"{name}: {value}" for name, value in about.items()) + "\n\n" + table(figures)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.md").write_text(text + "\n")
        rows = [{**asdict(f), "share": f.share} for f in figures]
        (options.out / "gpu.json").write_text(json.dumps({**about, "figures": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
