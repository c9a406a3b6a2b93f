"""Baton beside other engines: the same questions, in turn, on the same cores, all loaded side by side.

    python -m tests.bench.peers.compare --model DIR --vllm VENV [--rounds 3] [--only NAME;NAME]
        [--json FILE] [--markdown FILE] [--lock FILE]

Each engine runs in its own environment (docs/performance.md says how to make them) and waits, idle, for its turn: what
keeps cores busy even so is stopped meanwhile. Every
round asks every case of every engine, in an order that turns round each time; a run during which others used the
processors is made again. --preload names libraries that vLLM's documentation wants preloaded.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import json
import os
import signal
import sys
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import psutil

from tests.bench.peers.cases import CASES, READY, alone

QUIET: Final = 0.1
"""Cores that others may use in a run that counts."""
_TRIES: Final = 3
_LOADING: Final = 300.0
_ONE_CASE: Final = 300.0
"""Seconds."""
_ROOT: Final = Path(__file__).parents[3]


class PeerFailed(RuntimeError):
    """A runner ended, or said nothing for too long."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One engine in one arrangement."""

    name: str
    python: Path
    module: str
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    restless: bool = False
    """It keeps cores busy while it has nothing to do, and is stopped meanwhile."""


class Runner:
    """A peer's process."""

    def __init__(self, peer: Peer, process: asyncio.subprocess.Process) -> None:
        self.peer = peer
        self._process = process

    @classmethod
    async def start(cls, peer: Peer, model: Path, log: Path) -> Runner:
        """Load it.

        Raises:
            PeerFailed: it did not come up.
        """
        path = os.pathsep.join(str(_ROOT / part) for part in ("shared", "services", "."))
        with log.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *(str(peer.python), "-m", peer.module, "--model", str(model), "--asked", *peer.flags),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=file,
                cwd=_ROOT,
                env={**os.environ, "PYTHONPATH": path, **peer.environment},
            )
        runner = cls(peer, process)
        try:
            async with asyncio.timeout(_LOADING):
                while await runner._line() != READY:
                    pass
        except TimeoutError:
            await runner.stop()
            raise PeerFailed(f"{peer.name} was not loaded after {_LOADING:g} s; see {log}") from None
        runner._signal(signal.SIGSTOP)
        return runner

    async def ask(self, case: str, seed: int) -> dict[str, Any]:
        """One case.

        Raises:
            PeerFailed: it ended, or took too long.
        """
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(f"{case} {seed}\n".encode())
        try:
            async with asyncio.timeout(_ONE_CASE):
                # What else an engine prints is no result.
                while not (line := await self._line()).startswith('{"case"'):
                    pass
        except TimeoutError:
            raise PeerFailed(f"{self.peer.name} gave no answer to {case!r} in {_ONE_CASE:g} s") from None
        self._signal(signal.SIGSTOP)
        result: dict[str, Any] = json.loads(line)
        return result

    async def stop(self) -> None:
        """Let it end; it ends with its standard input."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        tree = self._tree()
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 60)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def _tree(self) -> list[psutil.Process]:
        """Itself and what it started, if that is still there."""
        try:
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: signal.Signals) -> None:
        for process in self._tree() if self.peer.restless else ():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    async def _line(self) -> str:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise PeerFailed(f"{self.peer.name} ended with status {await self._process.wait()}")
        return line.decode(errors="replace").strip()


async def compare(
    peers: list[Peer], model: Path, rounds: int, cases: tuple[str, ...], lock: Path | None, logs: Path
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Results by peer and case, one for each round; a peer that fails drops out, with a word on standard error."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {peer.name: {case: [] for case in cases} for peer in peers}
    async with AsyncExitStack() as stack:
        runners: list[Runner] = []
        for peer in peers:
            _say(f"loading {peer.name}")
            try:
                with alone(lock, fcntl.LOCK_SH):
                    runner = await Runner.start(peer, model, logs / f"{peer.name.replace(' ', '-')}.log")
            except PeerFailed as error:
                _say(str(error))
                continue
            stack.push_async_callback(runner.stop)
            runners.append(runner)
        for number in range(rounds + 1):
            with alone(lock):
                for case in cases:
                    for runner in runners[:: -1 if number % 2 else 1]:
                        try:
                            result = await _quietly(runner, case, 100 * number + CASES.index(case), number)
                        except PeerFailed as error:
                            _say(str(error))
                            runners.remove(runner)
                            continue
                        _say(f"round {number}: {runner.peer.name}: {json.dumps(result)}")
                        if number:
                            found[runner.peer.name][case].append(result)
    return found


async def _quietly(runner: Runner, case: str, seed: int, number: int) -> dict[str, Any]:
    """The first run, of a few, that nobody disturbed, or the least disturbed; any run in the round that warms up."""
    tried: list[dict[str, Any]] = []
    while len(tried) < (_TRIES if number else 1):
        tried.append(await runner.ask(case, seed + 10_000 * len(tried)))
        if tried[-1]["others"] <= QUIET:
            break
    return min(tried, key=lambda result: float(result["others"]))


def markdown(found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """The table: medians, the range in brackets for throughput."""
    lines = [
        "| engine | 1 stream, tokens/s (TTFT ms) | 8 streams, tokens/s (TTFT) | 16 streams, tokens/s (TTFT) "
        "| 2,048-token prefill, ms | 4 streams: gap, ms | worst gap as 2,048 tokens arrive, ms | their TTFT, ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, cases in found.items():
        cells = [name]
        for case in ("one", "eight", "sixteen"):
            speeds = sorted(result["tokens_per_second"] for result in cases.get(case, ()))
            if speeds:
                text = f"{median(speeds):,.0f} [{speeds[0]:,.0f}–{speeds[-1]:,.0f}]"
                cells.append(f"{text} ({_median(cases[case], 'ttft_ms')})")
            else:
                cells.append("–")
        cells.append(_median(cases.get("prefill", []), "ttft_ms"))
        mixed = cases.get("mixed", [])
        cells += [_median(mixed, key) for key in ("undisturbed_gap_ms", "worst_gap_ms", "ttft_ms")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _median(results: list[dict[str, Any]], key: str) -> str:
    return f"{median(result[key] for result in results):,.0f}" if results else "–"


def peers_of(arguments: argparse.Namespace) -> list[Peer]:
    """All peers whose environments are named, Baton's three arrangements first."""
    package = "tests.bench.peers"
    own = Path(sys.executable)
    peers = [
        Peer(f"Baton, {text}", own, f"{package}.baton_runner", ("--shape", shape))
        for shape, text in (("engine", "engine alone"), ("mesh", "mesh"), ("divided", "divided"))
    ]
    if arguments.vllm:
        python = arguments.vllm / "bin" / "python"
        preload = {"LD_PRELOAD": arguments.preload} if arguments.preload else {}
        peers.append(Peer("vLLM", python, f"{package}.vllm_runner", (), preload, restless=True))
        for kind in ("file", "nixl"):
            flags = ("--divided", kind)
            peers.append(
                Peer(f"vLLM, divided, {kind}", python, f"{package}.vllm_runner", flags, preload, restless=True)
            )
    return [peer for peer in peers if not arguments.only or peer.name in arguments.only.split(";")]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Parse, compare, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--vllm", type=Path, help="vLLM's virtual environment")
    parser.add_argument("--preload", help="LD_PRELOAD of vLLM")
    parser.add_argument("--only", help="names of the table's rows, with ; between them")
    parser.add_argument("--cases", type=lambda text: tuple(text.split(",")), default=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lock", type=Path, help="lock this file: shared while loading, alone while measuring")
    parser.add_argument("--logs", type=Path, default=Path(), help="directory for the engines' logs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    found = asyncio.run(
        compare(
            peers_of(arguments),
            arguments.model,
            arguments.rounds,
            arguments.cases,
            arguments.lock,
            arguments.logs,
        )
    )
    table = markdown(found)
    print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        arguments.markdown.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
