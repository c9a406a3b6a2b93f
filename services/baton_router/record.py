"""What is known of one request when it is over, whatever its end: for metrics, its span, its trailers, and the ring."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from baton.telemetry import tracing
from baton.telemetry.tracing import Attribute
from baton.v1 import inference_pb2, ledger_pb2, sampling_pb2
from baton_router import metrics
from baton_router.account import Account
from baton_router.arrivals import Arrivals
from baton_router.metrics import word
from baton_router.outcome import OK, outcome_of
from baton_router.pulse import Pulse
from baton_router.validate import ResolvedRequest


class Record:
    """One request from receipt to end.

    Attributes:
        request_id: its id.
        method: of the public service.
        model: what answers it; empty until it is understood.
        started_ns: receipt, Unix time; for people, never subtracted from another host's.
        account: its time in the making.
        arrivals: the tokens that workers sent for it.
        outcome: "ok", "cancelled", or the reason of its error in lower case; empty while it runs.
        summary: its last message, filled in as things become known; the ledger is there at the end in any case.
    """

    __slots__ = ("_pulse", "account", "arrivals", "method", "model", "outcome", "request_id", "started_ns", "summary")

    def __init__(self, request_id: str, method: str, pulse: Pulse) -> None:
        self.request_id = request_id
        self.method = method
        self.model = ""
        self.started_ns = time.time_ns()
        self.account = Account()
        self.arrivals = Arrivals()
        self.outcome = ""
        self.summary = inference_pb2.Summary()
        self._pulse = pulse

    def resolved(self, request: ResolvedRequest, model: str) -> None:
        """It was understood."""
        self.model = model
        self.summary.usage.prompt_tokens = len(request.prompt_ids)
        tracing.set_call_attributes(_request_attributes(self.method, request, model))

    def coalesced(self, request_id: str) -> None:
        """It shares the generation of another request, and waits for it."""
        self.summary.cache_status = inference_pb2.CACHE_STATUS_COALESCED
        self.account.enter(ledger_pb2.KIND_QUEUE)
        tracing.set_call_attributes({"baton.coalesced_with": request_id})

    def arrived(self, tokens: int) -> None:
        """A worker sent tokens. Told where they come in: behind the buffer their pace is the client's."""
        if not tokens:
            return
        gap = self.arrivals.take(tokens, time.monotonic_ns())
        if gap is not None:
            metrics.INTER_TOKEN_SECONDS.observe(gap / 1e9)
        self._pulse.chunk(tokens, gap)

    def chunk(self, tokens: int) -> None:
        """A chunk of the answer goes to the client, wherever it is from."""
        self.summary.usage.completion_tokens += tokens

    def complete(self) -> inference_pb2.Summary:
        """The last message: it ended well, and its ledger is closed."""
        self.summary.ledger.CopyFrom(self.account.ledger())
        return self.summary

    @contextmanager
    def closing(self) -> Iterator[None]:
        """The request's life: whatever way the block is left, the outcome is noted and told."""
        try:
            yield
            self.outcome = OK
        except BaseException as error:
            self.outcome = outcome_of(error)
            raise
        finally:
            if not self.summary.HasField("ledger"):
                self.complete()
            metrics.record(self.method, self.model, self.outcome, self.summary, self.arrivals)
            self._pulse.ended(self.outcome, self.summary)
            tracing.set_call_attributes(_outcome_attributes(self))


def _request_attributes(method: str, request: ResolvedRequest, model: str) -> dict[str, Attribute]:
    """In the terms of OpenTelemetry's conventions for generative AI. Never the prompt."""
    sampling = request.sampling
    attributes: dict[str, Attribute] = {
        "gen_ai.operation.name": metrics.operation(method),
        "gen_ai.provider.name": metrics.PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
        "gen_ai.usage.input_tokens": len(request.prompt_ids),
    }
    if sampling.seed < 2**63:  # it is unsigned, attributes are signed 64 bit
        attributes["gen_ai.request.seed"] = sampling.seed
    return attributes


def _outcome_attributes(record: Record) -> dict[str, Attribute]:
    summary = record.summary
    attributes: dict[str, Attribute] = {
        "gen_ai.response.id": record.request_id,
        "gen_ai.usage.output_tokens": summary.usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": summary.usage.cached_prompt_tokens,
        "baton.outcome": record.outcome,
        "baton.cache": word(inference_pb2.CacheStatus.Name(summary.cache_status), 2),
        "baton.prefill": word(inference_pb2.Placement.Name(summary.prefill_placement), 1),
        "baton.migrations": summary.migrations,
    }
    if summary.finish_reason:
        reason = word(sampling_pb2.FinishReason.Name(summary.finish_reason), 2)
        attributes["gen_ai.response.finish_reasons"] = [reason]
    attributes |= _ledger_attributes("baton.ledger", summary.ledger.total)
    if summary.ledger.HasField("first_token"):
        attributes |= _ledger_attributes("baton.ledger.first_token", summary.ledger.first_token)
    return attributes


def _ledger_attributes(prefix: str, partition: ledger_pb2.Partition) -> dict[str, Attribute]:
    """A partition in milliseconds: its entries, and the sum of them and the residual."""
    attributes: dict[str, Attribute] = {
        f"{prefix}.total_ms": partition.total.ToNanoseconds() / 1e6,
        f"{prefix}.residual_ms": partition.residual.ToNanoseconds() / 1e6,
        f"{prefix}.hidden_transfer_ms": partition.hidden_transfer.ToNanoseconds() / 1e6,
    }
    for hop, kind, seconds in metrics.entries(partition):
        attributes[f"{prefix}.{hop}.{kind}_ms"] = seconds * 1e3
    return attributes
