"""An answer's usage and ledger as a person reads them. Pure: values in, rich renderables out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from baton.cli.waterfall import COLOURS, milliseconds
from baton.client import Answer, CacheStatus, FinishReason, Partition, Placement

_DOT: Final = " · "

_ENDED: Final = {
    FinishReason.STOP: "the model ended it",
    FinishReason.LENGTH: "length limit",
    FinishReason.STOP_STRING: "stop text",
    FinishReason.TOOL_CALLS: "tool call",
    FinishReason.UNKNOWN: "",
}


class Flow:
    """Parts with dots between them; a line that is too long breaks between its parts, not in them."""

    def __init__(self, parts: Sequence[Text]) -> None:
        self._parts = parts

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        line = Text()
        for part in self._parts:
            if line.cell_len and line.cell_len + len(_DOT) + part.cell_len > options.max_width:
                yield line
                line = Text()
            elif line.cell_len:
                line.append(_DOT, style="dim")
            line.append_text(part)
        yield line


def usage_line(answer: Answer, first_token_ns: int | None, elapsed_ns: int) -> Flow:
    """Token counts, the client's own times, and how the mesh served it, in one line."""
    usage = answer.usage
    cached = f" ({usage.cached_prompt_tokens} cached)" if usage.cached_prompt_tokens else ""
    parts = [f"{usage.prompt_tokens}{cached} → {usage.completion_tokens} tokens"]
    if first_token_ns is not None:
        parts.append(f"first after {milliseconds(first_token_ns)} ms")
    parts.append(f"all after {milliseconds(elapsed_ns)} ms")
    if first_token_ns is not None and usage.completion_tokens > 1 and elapsed_ns > first_token_ns:
        rate = (usage.completion_tokens - 1) / (elapsed_ns - first_token_ns) * 1e9
        parts.append(f"{rate:,.0f} tokens/s")
    if answer.cache in (CacheStatus.HIT, CacheStatus.COALESCED, CacheStatus.SEMANTIC):
        near = "" if answer.cache_similarity is None else f" {answer.cache_similarity:.3f}"
        parts.append(f"from the response cache ({answer.cache.name.lower()}{near})")
    elif answer.placement is Placement.REMOTE:
        parts.append(f"KV by {answer.transport.name.lower()}")
    elif answer.placement is Placement.LOCAL:
        parts.append("prefill local")
    if answer.migrations:
        parts.append(f"moved {answer.migrations}×")
    if answer.resumes:
        parts.append(f"resumed at another router {answer.resumes}×")
    if _ENDED[answer.finish_reason]:
        parts.append(_ENDED[answer.finish_reason])
    return Flow([Text(part, style="dim") for part in parts])


def ledger_line(answer: Answer) -> Flow | None:
    """The ledger in one line, largest parts first; None when the server sent none."""
    total = answer.ledger.total
    if total is None or total.total_ns <= 0:
        return None
    ranked = sorted(total.entries, key=lambda entry: -entry.duration_ns)
    shown = [entry for entry in ranked if entry.duration_ns >= 0.01 * total.total_ns][:5]
    parts = []
    for entry in shown:
        part = Text(f"{entry.hop} {entry.kind}", style=COLOURS.get(entry.kind, "white"))
        parts.append(part.append(f" {entry.duration_ns / total.total_ns:.0%}", style="dim"))
    return Flow(parts)


def answer_json(answer: Answer, first_token_ns: int | None, elapsed_ns: int) -> dict[str, Any]:
    """An answer as plain JSON values; times in nanoseconds."""
    return {
        "request_id": answer.request_id,
        "model": answer.model,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "seed": answer.seed,
        "finish_reason": answer.finish_reason.name.lower(),
        "usage": {
            "prompt_tokens": answer.usage.prompt_tokens,
            "cached_prompt_tokens": answer.usage.cached_prompt_tokens,
            "completion_tokens": answer.usage.completion_tokens,
            "speculated_tokens": answer.usage.speculated_tokens,
        },
        "cache": answer.cache.name.lower(),
        "cache_entry": answer.cache_entry,
        "cache_similarity": answer.cache_similarity,
        "prefill_placement": answer.placement.name.lower(),
        "transport": answer.transport.name.lower(),
        "migrations": answer.migrations,
        "client": {"first_token_ns": first_token_ns, "elapsed_ns": elapsed_ns},
        "ledger": {
            "first_token": partition_json(answer.ledger.first_token),
            "total": partition_json(answer.ledger.total),
        },
    }


def partition_json(partition: Partition | None) -> dict[str, Any] | None:
    """One partition of a ledger as plain JSON values."""
    if partition is None:
        return None
    return {
        "total_ns": partition.total_ns,
        "residual_ns": partition.residual_ns,
        "hidden_transfer_ns": partition.hidden_transfer_ns,
        "entries": [
            {"hop": entry.hop, "kind": entry.kind, "duration_ns": entry.duration_ns} for entry in partition.entries
        ],
    }
