"""What is read from a run: pauses, detection, reclaim, goodput. Each function makes a check."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime

from tests.faults.history import Asked, History, Summed
from tests.faults.scenario import Check, Figure, Run

_LOST = ("is silent", "is not there", "lost a request")


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest rank; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def failed(limit: int = 0) -> Check:
    """Patient requests that did not end OK."""

    def check(run: Run) -> Figure:
        patient = [asked for asked in run.history.requests if asked.kind == "patient"]
        bad = sum(asked.code != "OK" for asked in patient)
        return Figure("failed", f"{limit} of {len(patient)}", f"{bad} of {len(patient)}", bad <= limit)

    return check


def moved() -> Check:
    """Requests that moved between decode workers: without any, the fault hit nobody."""

    def check(run: Run) -> Figure:
        migrations = sum(a.summed.migrations for r in run.history.requests for a in r.attempts if a.summed is not None)
        return Figure("migrations", "> 0", str(migrations), migrations > 0)

    return check


def remote() -> Check:
    """Requests whose prompt was computed by a prefill worker."""

    def check(run: Run) -> Figure:
        count = sum(a.summed.remote for r in run.history.requests for a in r.attempts if a.summed is not None)
        return Figure("prefilled remotely", "> 0", str(count), count > 0)

    return check


def longest_pause(limit: float | None = None) -> Check:
    """The longest silence in a stream of a patient client; without a limit only told."""
    wanted = "" if limit is None else f"<= {limit:g} s"

    def check(run: Run) -> Figure:
        pauses = [pause for asked in _patient(run.history) for _, pause in asked.gaps()]
        longest = max(pauses, default=0.0)
        return Figure("longest pause of a stream", wanted, f"{longest:.2f} s", limit is None or longest <= limit)

    return check


def detected(prefix: str, victim: str, limit: float) -> Check:
    """From a fault until a router or a decode worker first said that the victim is lost."""

    def check(run: Run) -> Figure:
        begun = run.when(prefix)
        found = min((at - begun for at in _losses(run, victim, begun)), default=None)
        value = "not told in any log" if found is None else f"{found:.2f} s"
        return Figure(f"{victim} detected after", f"<= {limit:g} s", value, found is not None and found <= limit)

    return check


def _losses(run: Run, victim: str, since: float) -> Iterator[float]:
    """When the others' logs say that something is wrong with a service."""
    address = run.bed.proxies[victim].address
    for name in run.bed.topology.services:
        if name == victim or not name.startswith(("router", "decode")):
            continue
        for line in run.bed.service(name).log.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            message = str(entry.get("message", ""))
            told = address in message and any(words in message for words in _LOST)
            if not told and not (victim.startswith("prefill") and "prefill lost" in message):
                continue
            at = datetime.strptime(entry["time"], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC).timestamp() - run.wall
            if at >= since - 0.002:
                yield max(at, since)


def reclaimed(limit: float = 0.25, *, by_deadline: bool = False) -> Check:
    """From a cancel, or a deadline that passed, until the workers said that they hold nothing of it, p99."""
    what = "a deadline" if by_deadline else "a cancel"

    def check(run: Run) -> Figure:
        assert run.sampler is not None
        times = list(run.sampler.freed_after(run.history, by_deadline=by_deadline))
        p50, p99 = percentile(times, 0.5), percentile(times, 0.99)
        value = f"{p99 * 1000:.0f} ms (p50 {p50 * 1000:.0f}, max {max(times, default=0) * 1000:.0f}; {len(times)} seen)"
        return Figure(
            f"blocks free after {what}, p99", f"<= {limit * 1000:.0f} ms", value, bool(times) and p99 <= limit
        )

    return check


def told_after_deadline(limit: float = 0.05) -> Check:
    """How long after its deadline a request's client has the status, p99."""

    def check(run: Run) -> Figure:
        late = [
            ended.at - attempt.deadline_at
            for asked in run.history.requests
            for attempt in asked.attempts
            if (ended := attempt.ended) is not None and ended.code == "DEADLINE_EXCEEDED"
        ]
        value = f"{percentile(late, 0.99) * 1000:.0f} ms (max {max(late, default=0) * 1000:.0f}; {len(late)} seen)"
        return Figure(
            "status after the deadline, p99", f"<= {limit * 1000:.0f} ms", value, percentile(late, 0.99) <= limit
        )

    return check


def spacing(limit: float, kinds: Sequence[str] = ("patient",)) -> Check:
    """Time between tokens of the undisturbed clients, p99, against the same load without the fault."""

    def check(run: Run) -> Figure:
        assert run.calm is not None
        calm = percentile(_gaps(run.calm, kinds), 0.99)
        now = percentile(_gaps(run.history, kinds), 0.99)
        ratio = now / calm if calm else 0.0
        value = f"{ratio:.2f}x ({now * 1000:.0f} to {calm * 1000:.0f} ms)"
        return Figure("others' time between tokens, p99", f"<= {limit:g}x", value, bool(calm) and ratio <= limit)

    return check


def freed(prefix: str, limit: float = 2.0) -> Check:
    """From a fault until workers stopped what belonged to calls that it ended, the longest."""

    def check(run: Run) -> Figure:
        assert run.sampler is not None
        begun = run.when(prefix)
        times = list(run.sampler.orphans_after(run.history, begun))
        value = f"{max(times, default=0.0):.2f} s ({len(times)} seen)"
        return Figure("orphaned work stops after", f"<= {limit:g} s", value, bool(times) and max(times) <= limit)

    return check


def told_after(prefix: str, limit: float) -> Check:
    """From a fault until each request that was under way, and failed for it, had its status; the longest."""

    def check(run: Run) -> Figure:
        begun = run.when(prefix)
        late = [
            attempt.ended.at - begun
            for asked in run.history.requests
            for attempt in asked.attempts
            if attempt.ended is not None and attempt.ended.code == "UNAVAILABLE" and attempt.asked_at <= begun
        ]
        value = f"{max(late, default=0.0):.2f} s ({len(late)} requests)"
        return Figure("UNAVAILABLE told after", f"<= {limit:g} s", value, max(late, default=0.0) <= limit)

    return check


def booked(limit: float = 0.9) -> Check:
    """Of what requests took longer than calmly, the share that their ledgers book as network or transfer."""

    def check(run: Run) -> Figure:
        assert run.calm is not None
        calm, now = _mean_seconds(run.calm), _mean_seconds(run.history)
        grown = {kind: now.get(kind, 0.0) - calm.get(kind, 0.0) for kind in {*calm, *now}}
        total = sum(grown.values())
        share = (grown.get("network", 0.0) + grown.get("transfer", 0.0)) / total if total > 0 else 0.0
        parts = ", ".join(
            f"{kind} {value * 1000:+.0f} ms" for kind, value in sorted(grown.items(), key=lambda g: -g[1])[:4]
        )
        return Figure(
            "of the delay booked as network or transfer", f">= {limit:.0%}", f"{share:.0%} ({parts})", share >= limit
        )

    return check


def _mean_seconds(history: History) -> dict[str, float]:
    """Mean of ledgers of remotely prefilled requests, by kind."""
    ledgers = [
        a.summed.seconds for r in history.requests for a in r.attempts if a.summed is not None and a.summed.remote
    ]
    kinds = {kind for ledger in ledgers for kind in ledger}
    return {kind: sum(ledger.get(kind, 0.0) for ledger in ledgers) / len(ledgers) for kind in kinds}


def _share(name: str, counts: Callable[[Summed], bool]) -> Check:
    """How many of the answers it holds for, calmly and under the fault; only told."""

    def check(run: Run) -> Figure:
        def count(history: History) -> str:
            answers = [a.summed for r in history.requests for a in r.attempts if a.summed is not None]
            return f"{sum(map(counts, answers))} of {len(answers)}"

        before = f"; calmly {count(run.calm)}" if run.calm else ""
        return Figure(name, "", f"{count(run.history)}{before}")

    return check


def share_remote() -> Check:
    """How many prompts were computed remotely; only told."""
    return _share("prefilled remotely", lambda summed: summed.remote)


def preempted(at_least: int = 1) -> Check:
    """Requests that lost their memory and were computed again; 0: that is told, and waiting instead is as good."""

    def check(run: Run) -> Figure:
        count = sum(a.summed.preemptions for r in run.history.requests for a in r.attempts if a.summed is not None)
        return Figure("preemptions", f">= {at_least}" if at_least else "", str(count), count >= at_least)

    return check


def throughput_of(row: str, share: float) -> Check:
    """Tokens per second, against those of another row's run."""

    def check(run: Run) -> Figure:
        other = run.earlier.get(row)
        ratio = run.goodput / other.goodput if other and other.goodput else 0.0
        value = f"{ratio:.0%} ({run.goodput:.0f} of {other.goodput:.0f} tokens/s)" if other else f"{row} was not run"
        return Figure(f"throughput against {row}", f">= {share:.0%}", value, ratio >= share)

    return check


def throughput() -> Check:
    """Tokens per second; only told."""
    return lambda run: Figure("throughput", "", f"{run.goodput:.0f} tokens/s")


def from_cache() -> Check:
    """Requests that the response cache answered; only told."""
    return _share("answered from the cache", lambda summed: summed.from_cache)


def first_token(share: float = 0.99) -> Check:
    """Time to first token, against the same load without the fault; only told."""

    def check(run: Run) -> Figure:
        now = percentile(_first_tokens(run.history), share)
        before = f"; calmly {percentile(_first_tokens(run.calm), share) * 1000:.0f} ms" if run.calm else ""
        return Figure(f"first token, p{share * 100:.0f}", "", f"{now * 1000:.0f} ms{before}")

    return check


def flips() -> Check:
    """Bytes flipped in handoffs; that none was served shows in the tokens."""

    def check(run: Run) -> Figure:
        count = sum(link.backward.flipped for proxy in run.bed.proxies.values() for link in proxy.links.values())
        return Figure("bytes flipped, and caught", "> 0", str(count), count > 0)

    return check


def memory(name: str, limit_mib: float = 64.0) -> Check:
    """By how much a service's resident memory grew."""

    def check(run: Run) -> Figure:
        grown = (run.after[name].memory - run.before[name].memory) / 2**20
        return Figure(f"memory of {name}", f"<= +{limit_mib:g} MiB", f"{grown:+.0f} MiB", grown <= limit_mib)

    return check


def cancelled(at_least: int) -> Check:
    """How many requests their clients cancelled in time."""

    def check(run: Run) -> Figure:
        codes = run.history.codes().get("CANCELLED", 0)
        return Figure("cancelled", f">= {at_least}", f"{codes} of {len(run.history.requests)}", codes >= at_least)

    return check


def _first_tokens(history: History) -> list[float]:
    return [seconds for asked in _patient(history) if (seconds := asked.first_token_seconds) is not None]


def code(kind: str, wanted: str, at_least: float = 1.0) -> Check:
    """Share of one kind of client's requests that end with a code."""

    def check(run: Run) -> Figure:
        theirs = [asked for asked in run.history.requests if asked.kind == kind]
        hits = sum(asked.code == wanted for asked in theirs)
        met = bool(theirs) and hits >= at_least * len(theirs)
        return Figure(f"{kind}: {wanted}", f">= {at_least:.0%}" if at_least else "", f"{hits} of {len(theirs)}", met)

    return check


def goodput(history: History, seconds: float) -> float:
    """Tokens of requests that ended OK within their deadline, per second."""
    return sum(len(asked.tokens) for asked in history.requests if asked.code == "OK") / max(seconds, 1e-9)


def _patient(history: History) -> list[Asked]:
    return [asked for asked in history.requests if asked.kind == "patient"]


def _gaps(history: History, kinds: Sequence[str]) -> list[float]:
    return [gap for asked in history.requests if asked.kind in kinds for _, gap in asked.gaps()]
