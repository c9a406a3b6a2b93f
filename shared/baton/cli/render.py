"""An answer's usage and ledger as a person reads them. Pure: values in, rich renderables out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from baton.client import Answer, CacheStatus, FinishReason, Partition, Placement

_COLOURS: Final = {
    "compute": "green",
    "queue": "yellow",
    "network": "blue",
    "transfer": "magenta",
    "serialize": "cyan",
    "cache": "bright_blue",
    "tokenize": "bright_cyan",
    "stall": "red",
    "overhead": "bright_black",
    "unattributed": "bright_black",
}
_EIGHTHS: Final = " ▏▎▍▌▋▊▉"
_BAR_CELLS: Final = 36
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


def milliseconds(nanoseconds: float) -> str:
    """A duration in ms with three significant digits or so: 0.04, 1.23, 45.6, 789."""
    value = nanoseconds / 1e6
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


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
        parts.append(f"from the response cache ({answer.cache.name.lower()})")
    elif answer.placement is Placement.REMOTE:
        parts.append(f"KV by {answer.transport.name.lower()}")
    elif answer.placement is Placement.LOCAL:
        parts.append("prefill local")
    if answer.migrations:
        parts.append(f"moved {answer.migrations}×")
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
        part = Text(f"{entry.hop} {entry.kind}", style=_COLOURS.get(entry.kind, "white"))
        parts.append(part.append(f" {entry.duration_ns / total.total_ns:.0%}", style="dim"))
    return Flow(parts)


def ledger_bars(answer: Answer) -> RenderableType:
    """Both partitions as bars, or why there are none."""
    parts: list[RenderableType] = []
    for title, partition in (("to the first token", answer.ledger.first_token), ("whole request", answer.ledger.total)):
        if partition is not None:
            parts += [Text(), Text(f"{title}: {milliseconds(partition.total_ns)} ms", style="bold"), _bars(partition)]
            if partition.hidden_transfer_ns:
                hidden = milliseconds(partition.hidden_transfer_ns)
                parts.append(Text(f"besides, {hidden} ms of KV transfer hidden behind compute", style="dim"))
    if not parts:
        return Text("The server sent no ledger.", style="dim")
    return Group(*parts)


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
        "prefill_placement": answer.placement.name.lower(),
        "transport": answer.transport.name.lower(),
        "migrations": answer.migrations,
        "client": {"first_token_ns": first_token_ns, "elapsed_ns": elapsed_ns},
        "ledger": {
            "first_token": _partition_json(answer.ledger.first_token),
            "total": _partition_json(answer.ledger.total),
        },
    }


def bar(share: float, cells: int = _BAR_CELLS) -> str:
    """A horizontal bar of `share` (0 to 1) of `cells` characters, in eighths of one."""
    eighths = round(max(0.0, min(1.0, share)) * cells * 8)
    full, rest = divmod(eighths, 8)
    return "█" * full + (_EIGHTHS[rest] if rest else "")


def _bars(partition: Partition) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True, overflow="crop")
    rows = [(entry.hop, entry.kind, entry.duration_ns) for entry in partition.entries if entry.duration_ns]
    if partition.residual_ns:
        rows.append(("", "unattributed", partition.residual_ns))
    whole = max(1, partition.total_ns)
    previous = ""
    for hop, kind, duration in rows:
        colour = _COLOURS.get(kind, "white")
        share = duration / whole
        table.add_row(
            "" if hop == previous else hop,
            Text(kind, style=colour),
            f"{milliseconds(duration)} ms",
            f"{share:.1%}",
            Text(bar(share) or "▏", style=colour),
        )
        previous = hop
    return table


def _partition_json(partition: Partition | None) -> dict[str, Any] | None:
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
