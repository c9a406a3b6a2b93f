"""Start a service's engine process, follow its loading, and end the service when the engine ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from prometheus_client import Counter, Gauge, Histogram

from baton.engine.client import EngineClient, EngineDied
from baton.engine.errors import EngineError
from baton.engine.messages import Failed, FailureReason, StepReport
from baton.rpc.errors import BatonError, InvalidArgument, Overloaded
from baton.rpc.service import CannotStart, Runtime
from baton.worker.cpus import BadCpus, parse_cpus, pin
from baton.worker.settings import WorkerSettings
from baton.worker.step_meter import StepMeter
from baton.worker.warm_up import warm_up

log = logging.getLogger(__name__)

STEP_SECONDS = Histogram(
    "baton_engine_step_seconds",
    "Duration of one engine step",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2),
)
BATCH = Histogram(
    "baton_engine_batch_size",
    "Requests that got a token in one step, of steps with any",
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
QUEUE_SECONDS = Histogram(
    "baton_engine_queue_seconds",
    "Time from a request's arrival at the engine until it had KV memory (decode) or began (prefill)",
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
RUNNING = Gauge("baton_engine_running_requests", "Requests in the running batch")
WAITING = Gauge("baton_engine_waiting_requests", "Requests waiting for a slot or memory")
KV_USED = Gauge("baton_kv_used_tokens", "KV tokens held")
KV_FREE = Gauge("baton_kv_free_tokens", "KV tokens free")
PREFIX_QUERIES = Counter(
    "baton_prefix_cache_query_tokens_total", "Tokens of admitted requests, looked for in the prefix cache"
)
PREFIX_HITS = Counter(
    "baton_prefix_cache_hit_tokens_total", "Of these, tokens that were there and so were not computed or fetched"
)
PREFIX_SLOTS = Gauge("baton_prefix_cache_slots", "Free KV slots that keep a prefix")
PREFIX_TOKENS = Gauge("baton_prefix_cache_tokens", "KV tokens in these; they count as free")
PREEMPTIONS = Counter("baton_preemptions_total", "Requests that lost their KV memory and were recomputed")


@asynccontextmanager
async def running_engine(settings: WorkerSettings, runtime: Runtime, meter: StepMeter) -> AsyncIterator[EngineClient]:
    """An engine that lives as long as the block, and has made a few steps. If its process dies, the service fails too.

    Args:
        settings: of the service.
        runtime: of the service.
        meter: learns of every step.
    """

    def progress(stage: str, fraction: float) -> None:
        log.info("loading", extra={"stage": stage, "fraction": round(fraction, 3)})

    async def stalled(so: bool) -> None:
        log.warning("the engine does not answer" if so else "the engine answers again")
        if not runtime.draining.is_set():
            await runtime.set_serving(not so)

    try:
        if cores := parse_cpus(settings.cpus):
            pin(cores)  # before the engine starts: it inherits them, and its threads do
        engine = await EngineClient.start(
            settings.engine(), on_progress=progress, timeout=settings.load_timeout, own_cores=bool(cores)
        )
    except (BadCpus, EngineError) as error:
        raise CannotStart(str(error)) from error
    log.info("self-test passed", extra={"exact": engine.exact})
    engine.on_report.append(meter.learn)
    watching = [asyncio.create_task(_fail_with(engine, runtime))]
    try:
        try:
            await warm_up(engine, meter, settings.step_tokens)
        except (EngineError, EngineDied) as error:
            raise CannotStart(str(error)) from error
        # Not before: while only short steps are known, the first long one would look like silence.
        watching.append(asyncio.create_task(engine.check_alive(settings.engine_silence_seconds, stalled)))
        engine.on_report.append(_record)
        yield engine
    finally:
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
        await engine.close()


def engine_error(failed: Failed) -> BatonError:
    """The engine's refusal in the mesh's terms."""
    match failed.reason:
        case FailureReason.INVALID:
            return InvalidArgument("token_ids", failed.message)
        case FailureReason.OVERLOADED:
            return Overloaded(failed.message)
        case FailureReason.INTERNAL:
            return BatonError(failed.message)


async def _fail_with(engine: EngineClient, runtime: Runtime) -> None:
    await engine.wait_dead()
    runtime.fail(engine.epitaph)


def _record(report: StepReport) -> None:
    if report.duration_ns:
        STEP_SECONDS.observe(report.duration_ns / 1e9)
    if report.decode_requests:
        BATCH.observe(report.decode_requests)
    RUNNING.set(report.running)
    WAITING.set(report.waiting)
    KV_USED.set(report.used_tokens)
    KV_FREE.set(report.free_tokens)
    PREFIX_SLOTS.set(report.kept_slots)
    PREFIX_TOKENS.set(report.kept_tokens)
    if report.looked_up_tokens:
        PREFIX_QUERIES.inc(report.looked_up_tokens)
        PREFIX_HITS.inc(report.hit_tokens)
    if report.preempted:
        PREEMPTIONS.inc(report.preempted)
