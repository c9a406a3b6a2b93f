"""A mesh as a source of streams, through its router; what its ledgers say is kept."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping

from baton.bench.load import Asking
from baton.bench.workload import Job
from baton.v1 import inference_pb2, inference_pb2_grpc, ledger_pb2


class MeshSource:
    """Answers prompts through a router. The response cache is bypassed.

    Args:
        stub: the router's.
        model: name of the model; empty where only one is served.
        pids: of its processes by name, where they are this machine's and known.

    Attributes:
        ledgers: of all answers that came to their end, in that order; whoever measures clears it.
        placements: likewise, where their prompts were computed.
    """

    def __init__(
        self, stub: inference_pb2_grpc.InferenceAsyncStub, model: str = "", pids: Mapping[str, int] | None = None
    ) -> None:
        self._stub = stub
        self.pids = dict(pids or {})
        self._asking = Asking(model=model)
        self.ledgers: list[ledger_pb2.LatencyLedger] = []
        self.placements: list[inference_pb2.Placement.ValueType] = []

    async def stream(self, prompt: tuple[int, ...], output_tokens: int) -> AsyncGenerator[int, None]:
        """See `Source`.

        Raises:
            grpc.aio.AioRpcError: the router refused or failed.
        """
        request = self._asking.request(Job(prompt, output_tokens, seed=0))
        call = self._stub.StreamGenerate(request, timeout=self._asking.timeout)
        try:
            async for message in call:
                event = message.WhichOneof("event")
                if event == "chunk" and message.chunk.token_ids:
                    yield len(message.chunk.token_ids)
                elif event == "summary":
                    self.ledgers.append(message.summary.ledger)
                    self.placements.append(message.summary.prefill_placement)
        finally:
            call.cancel()
