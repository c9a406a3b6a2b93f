"""Put the router together."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.internal.v1 import observe_pb2_grpc
from baton.rpc.channel import ChannelPool
from baton.rpc.retry_budget import RetryBudget
from baton.rpc.service import CannotStart, Runtime
from baton.text.model import TextModel
from baton.text.tokenizer import ModelFilesError
from baton.v1 import inference_pb2_grpc
from baton.worker.digests import new_key
from baton_router.admission import Admission
from baton_router.answering import Means
from baton_router.capacity import Capacity, WorkerReport
from baton_router.catalogue import Catalogue
from baton_router.dispatch import Dispatcher
from baton_router.fair_queue import Bounds
from baton_router.flight import Flights
from baton_router.generation import Tier
from baton_router.inference import InferenceServicer
from baton_router.model_queue import QueuePolicy
from baton_router.models import Models
from baton_router.observe import ObserveServicer
from baton_router.placement import Policy, Strategy
from baton_router.quotas import Quotas
from baton_router.replicas import Replicas
from baton_router.response_cache import ResponseCache
from baton_router.settings import RouterSettings, targets
from baton_router.targets import check_target
from baton_router.tenants import Tenants, TenantsFileError
from baton_router.transcript import RecordingServicer
from baton_router.workers import WorkerView

log = logging.getLogger(__name__)


@asynccontextmanager
async def build(settings: RouterSettings, runtime: Runtime) -> AsyncIterator[None]:
    """Load the tokenizer, watch the workers, register the servicer; on exit finish cache fills and close channels."""
    decode, prefill = targets(settings.decode_targets), targets(settings.prefill_targets)
    for target in [*decode, *prefill, *targets(settings.cache_target)]:
        check_target(target)
    try:
        models = Models([TextModel.load(directory, name) for name, directory in settings.models()])
        tenants = Tenants(settings.tenants_file)
    except (ModelFilesError, TenantsFileError) as error:
        raise CannotStart(str(error)) from error
    channels = ChannelPool(dialer=runtime.dialer)
    policy = Policy(settings.routing, settings.routing_slack_seconds, settings.routing_bound)
    key = new_key()
    tell = key if policy.strategy is Strategy.PREFIX else b""
    view = WorkerView(channels, models, settings.worker_silence_seconds, settings.resolve_seconds, tell)
    tier = Tier(
        view=view,
        dispatcher=Dispatcher(policy, key, view.tier, random.Random()),
        channels=channels,
        max_migrations=settings.max_migrations,
        reattach_seconds=settings.reattach_seconds,
        deadline_margin_seconds=settings.deadline_margin_seconds / 2,
        retries=RetryBudget(settings.retry_share),
    )
    replicas = Replicas(targets(settings.cache_target), settings.resolve_seconds)
    cache = ResponseCache(channels, replicas, settings.cache_timeout_seconds, settings.cache_similar_timeout_seconds)
    admission = Admission(
        _queue_policy(settings),
        tenants,
        lambda fingerprint: _capacity(view, fingerprint),
        settings.reattach_seconds,
    )
    quotas = Quotas(tenants, settings.max_in_flight, asyncio.get_running_loop().time)
    means = Means(tier, admission, cache, settings.max_request_seconds, settings.follow_silence_seconds)
    flights = Flights()
    catalogue = Catalogue(settings, models, view)
    try:
        async with (
            view.watching(decode, prefill),
            replicas.watched(),
            cache.filling(),
            flights.owned(),
            _reloading(tenants, settings),
        ):
            servicer_class = RecordingServicer if _records_prompts(settings) else InferenceServicer
            servicer = servicer_class(settings, catalogue, means, flights, quotas, runtime)
            inference_pb2_grpc.add_InferenceServicer_to_server(servicer, runtime.server)
            runtime.register("baton.v1.Inference")
            observe = ObserveServicer(servicer, view, runtime)
            observe_pb2_grpc.add_ObserveServicer_to_server(observe, runtime.admin)
            runtime.register_admin("baton.internal.v1.Observe")
            # So that the first request after start finds the workers; without any, requests get UNAVAILABLE.
            await catalogue.serving("", asyncio.get_running_loop().time() + settings.reattach_seconds)
            yield
    finally:
        await channels.close()


def _queue_policy(settings: RouterSettings) -> QueuePolicy:
    return QueuePolicy(
        bounds=Bounds(settings.max_queue_requests, settings.max_queue_tokens),
        max_queue_seconds=settings.max_queue_seconds,
        seconds_per_priority=settings.aging_seconds,
        prefill_ahead_seconds=settings.prefill_ahead_seconds,
    )


def _capacity(view: WorkerView, fingerprint: str) -> Capacity:
    """Of the workers of a model that take requests now."""
    states = [worker.state for worker in view.workers()]
    usable = [state for state in states if state.model.fingerprint == fingerprint and not state.draining]
    return Capacity.of(WorkerReport.of(state) for state in usable)


@asynccontextmanager
async def _reloading(tenants: Tenants, settings: RouterSettings) -> AsyncIterator[None]:
    """Look at the tenants' file from time to time, for the length of the block."""

    async def look() -> None:
        while True:
            await asyncio.sleep(settings.tenants_reload_seconds)
            tenants.reload()

    looking = asyncio.create_task(look())
    try:
        yield
    finally:
        looking.cancel()
        await asyncio.wait([looking])


def _records_prompts(settings: RouterSettings) -> bool:
    """Whether text goes into spans; nobody shall find out by accident."""
    if not settings.record_prompts:
        return False
    if not settings.otlp_endpoint:
        log.warning("--record-prompts does nothing: without --otlp-endpoint there are no traces")
        return False
    log.warning(
        "--record-prompts: the text of prompts and answers, up to %d bytes of each, is sent to %s with every sampled "
        "trace; whoever reads traces there reads them",
        settings.record_prompts_bytes,
        settings.otlp_endpoint,
    )
    return True
