"""The events an engine tells, made of what it knows of its requests. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.engine.messages import (
    CachedBlocks,
    DebugState,
    FinishReason,
    KvReady,
    Output,
    PrefixChanges,
    Progress,
    Reserved,
    Role,
    StepReport,
)
from baton.engine.prefix import PrefixIndex
from baton.engine.request import Request, State
from baton.engine.scheduler import Plan, Scheduler, Work


def reserved(admitted: Sequence[Request], now_ns: int) -> list[Reserved]:
    """Slots the front may write into now."""
    return [Reserved(r.request_id, r.slot, now_ns - r.arrival_ns, r.hit) for r in admitted if r.state is State.RESERVED]


def already_there(admitted: Sequence[Request], layers: int) -> list[KvReady]:
    """What a prefix cache saves prompts computed for others: it may leave before anything is computed."""
    return [
        KvReady(r.request_id, r.slot, layer, r.start_token, r.hit)
        for r in admitted
        if r.role is Role.PREFILL and r.start_token < r.hit
        for layer in range(layers)
    ]


def kv_ready(work: Sequence[Work], layer: int) -> list[KvReady]:
    """Keys and values of a layer are there: those of prompts computed for others may leave."""
    return [
        KvReady(w.request.request_id, w.request.slot, layer, first, w.start + w.count)
        for w in work
        if w.request.role is Role.PREFILL and (first := max(w.start, w.request.start_token)) < w.start + w.count
    ]


def progress(request: Request) -> Progress:
    """A part of its prompt was computed."""
    return Progress(
        request_id=request.request_id,
        compute_ns=request.compute_ns,
        queue_ns=request.queue_ns,
        chunks=request.untold_chunks(),
    )


def output(request: Request, token_ids: list[int], reason: FinishReason | None) -> Output:
    """Its last tokens."""
    return Output(
        request_id=request.request_id,
        index=request.num_generated - len(token_ids),
        token_ids=token_ids,
        finish_reason=reason,
        compute_ns=request.compute_ns,
        queue_ns=request.queue_ns,
        preemptions=request.preemptions,
        cached_tokens=request.hit,
        chunks=request.untold_chunks(),
    )


def report(scheduler: Scheduler, capacity_tokens: int, step: int, plan: Plan, duration_ns: int) -> StepReport:
    """One step, or that there is nothing to do."""
    block, slots = scheduler.limits.block_tokens, scheduler.slots
    return StepReport(
        step=step,
        duration_ns=duration_ns,
        prefill_tokens=plan.prefill_tokens,
        decode_requests=plan.decode_requests,
        running=len(scheduler.holding),
        waiting=len(scheduler.waiting),
        used_tokens=slots.used_blocks * block,
        free_tokens=capacity_tokens - slots.used_blocks * block,
        preempted=len(plan.preempted),
        looked_up_tokens=plan.looked_up_tokens,
        hit_tokens=plan.hit_tokens,
        kept_slots=slots.kept,
        kept_tokens=slots.kept_blocks * block,
        attended_pairs=sum(w.count * w.start + w.count * (w.count + 1) // 2 for w in plan.work if not w.decodes),
        waiting_prompt_tokens=scheduler.waiting_prompt_tokens,
    )


def prefix_changes(prefixes: PrefixIndex) -> list[PrefixChanges]:
    """What the prefix cache got and lost since the last time; empty: nothing."""
    came, went = prefixes.changes()
    if not came and not went:
        return []
    added = [CachedBlocks(new.salt, new.parent, list(new.digests), list(new.tokens)) for new in came]
    return [PrefixChanges(block_tokens=prefixes.block_tokens, added=added, removed=went)]


def debug_state(
    scheduler: Scheduler, requests: Sequence[str], capacity_tokens: int, steps: int, token: int
) -> DebugState:
    """What the engine holds, and what it keeps."""
    block, slots = scheduler.limits.block_tokens, scheduler.slots
    return DebugState(
        token=token,
        requests=list(requests),
        free_slots=slots.free,
        total_slots=slots.total,
        used_tokens=slots.used_blocks * block,
        capacity_tokens=capacity_tokens,
        steps=steps,
        kept_slots=slots.kept,
        kept_tokens=slots.kept_blocks * block,
    )
