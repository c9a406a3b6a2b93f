"""A report as a person reads it: a table on the terminal, a table in Markdown. Pure."""

from __future__ import annotations

from rich.table import Table

from baton.bench.report import LAG_LIMIT_NS, PERCENTILES, Distribution, Report

_COLUMNS = ("mean", *(f"p{percent}" for percent in PERCENTILES), "max")


def latency_rows(report: Report) -> list[tuple[str, list[str]]]:
    """(name, cells) of every latency, milliseconds."""
    named = (
        ("TTFT", report.ttft),
        ("ITL", report.itl),
        ("TPOT", report.tpot),
        ("end to end", report.e2e),
        ("generator lag", report.lag),
    )
    return [(name, _cells(distribution)) for name, distribution in named if distribution is not None]


def facts(report: Report) -> list[tuple[str, str]]:
    """(name, value) of everything that is one number."""
    errors = ", ".join(f"{count} {code}" for code, count in report.errors.items()) or "none"
    rows = [
        ("load", _load(report)),
        ("requests", f"{report.completed} of {report.requests} in {report.seconds:.1f} s"),
        ("errors", errors),
        ("requests/s", f"{report.requests_per_second:.2f}"),
        ("output tokens/s", f"{report.tokens_per_second:,.1f}"),
        ("prompt tokens cached", f"{report.cached_share:.0%} of {report.prompt_tokens:,}"),
    ]
    if report.response_cache_hits:
        rows.append(("response cache hits", str(report.response_cache_hits)))
    if report.good is not None:
        rows.append(("goodput", f"{report.goodput:.2f} requests/s ({report.good} of {report.requests} met all)"))
    return rows


def tables(report: Report) -> tuple[Table, Table]:
    """Facts, and latencies in milliseconds."""
    left = Table(box=None, padding=(0, 2), pad_edge=False, show_header=False)
    left.add_column(style="dim", no_wrap=True)
    left.add_column()
    for name, value in facts(report):
        left.add_row(name, value, style="red" if name == "errors" and report.errors else "")
    latencies = Table(box=None, padding=(0, 2), pad_edge=False, header_style="dim")
    latencies.add_column("milliseconds", no_wrap=True)
    for title in _COLUMNS:
        latencies.add_column(title, justify="right", no_wrap=True)
    for name, cells in latency_rows(report):
        late = name == "generator lag" and not report.lag_acceptable
        latencies.add_row(name, *cells, style="red" if late else "dim" if name == "generator lag" else "")
    return left, latencies


def markdown(report: Report) -> str:
    """Both tables in Markdown."""
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts(report)), ""]
    lines += [f"| ms | {' | '.join(_COLUMNS)} |", f"|---|{'---:|' * len(_COLUMNS)}"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in latency_rows(report)]
    return "\n".join(lines) + "\n"


def lag_refusal(report: Report) -> str:
    """Why a result with this much lag is none."""
    assert report.lag is not None
    return (
        f"the generator itself was late: lag p99 {report.lag.percentiles[99] / 1e6:.1f} ms,"
        f" more than {LAG_LIMIT_NS / 1e6:g} ms, so these numbers are not the server's"
    )


def _load(report: Report) -> str:
    load = report.load
    how = (
        f"open loop, {load.rate:g} requests/s" if load.rate is not None else f"closed loop, {load.concurrency} at once"
    )
    return f"{how}, {load.warmup} to warm up" if load.warmup else how


def _cells(distribution: Distribution) -> list[str]:
    values = [distribution.mean, *distribution.percentiles.values(), distribution.highest]
    return [f"{value / 1e6:,.2f}" for value in values]
