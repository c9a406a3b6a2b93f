#!/usr/bin/env python
"""Measure the router's placement: first tokens, simulated, and what a decision takes here.

    scripts/measure_placement.py                # both
    scripts/measure_placement.py --only time    # the decision alone: a few seconds

The simulation is exact for its seeds; the decision is timed on this machine, with everything the router does for it but
the network: the prompt's digests, looking for them at every worker, and the ledger.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.router.simulation import COST, KEY, SCENES, Scene, run

from baton.internal.v1 import worker_pb2
from baton.worker.digests import BlockDigests
from baton_router.dispatch import BLOCK_TOKENS, Ask, Dispatcher
from baton_router.placement import Policy, Strategy
from baton_router.worker import Worker

POLICIES = {"prefix": Policy(), "hash": Policy(Strategy.HASH), "load": Policy(Strategy.LOAD)}


def simulated(scenes: dict[str, Scene], seeds: int, routers: int) -> None:
    """A line for each scene."""
    print(f"first token, p50 / p99 in ms, and share of prompt tokens found; {routers} router(s), {seeds} seeds")
    print(f"{'':22}" + "".join(f"{kind:>22}" for kind in POLICIES) + f"{'prefix to load, p99':>22}")
    for name, scene in scenes.items():
        cells, p99 = [], {}
        for kind, policy in POLICIES.items():
            outcomes = [run(scene, policy, seed, routers) for seed in range(seeds)]
            half, late = (sum(o.percentile(share) for o in outcomes) / seeds * 1e3 for share in (0.5, 0.99))
            p99[kind] = late
            cells.append(f"{half:.0f} / {late:.0f}  {sum(o.hit_share for o in outcomes) / seeds:4.0%}")
        row = "".join(f"{cell:>22}" for cell in cells)
        print(f"{name:22}{row}{p99['prefix'] / p99['load']:>22.2f}", flush=True)


def timed(workers: int, tokens: int, decisions: int) -> None:
    """Percentiles of one decision among so many workers, half of them of each tier."""
    rng, digests = random.Random(0), BlockDigests(KEY)
    tiers: dict[str, list[Worker]] = {"decode": [], "prefill": []}
    prompts = [[number, *range(tokens - 1)] for number in range(64)]
    chains = [digests.chain(b"", prompt, BLOCK_TOKENS) for prompt in prompts]
    for number in range(workers):
        tier = ("decode", "prefill")[number % 2]
        state = worker_pb2.WatchResponse(
            incarnation="1",
            model=worker_pb2.WorkerModel(fingerprint="m"),
            capacity=worker_pb2.Capacity(kv_tokens=1_000_000, slots=64),
            load=worker_pb2.Load(running=8, waiting_prompt_tokens=rng.randrange(4000), step_cost=COST.to_proto()),
        )
        worker = Worker(f"10.0.0.{number}:50051", "m", state)
        held = [block for chain in rng.sample(chains, 16) for block in chain]
        changes = worker_pb2.PrefixChanges(sequence=1, snapshot=True, block_tokens=BLOCK_TOKENS, added=held)
        worker.prefixes.take(changes, 1_000_000)
        tiers[tier].append(worker)
    dispatcher = Dispatcher(Policy(), KEY, tiers.__getitem__, rng)
    wall, busy = list[float](), list[float]()
    for _ in range(decisions):
        ask = Ask(fingerprint="m", token_ids=rng.choice(prompts), answer_tokens=256, salt=b"")
        began, worked = time.perf_counter(), time.thread_time()
        placed = dispatcher.place(ask)
        assert placed is not None
        with placed.holding() as computed:
            computed()
        busy.append((time.thread_time() - worked) * 1e3)
        wall.append((time.perf_counter() - began) * 1e3)
    for kind, took in (("processor", sorted(busy)), ("wall", sorted(wall))):
        figures = ", ".join(f"p{share} {took[len(took) * share // 100]:.2f}" for share in (50, 90, 99))
        print(f"a decision among {workers} workers, prompt of {tokens} tokens, {kind} time: {figures} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("simulation", "time"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--scene", choices=SCENES)
    parser.add_argument("--requests", type=int, help="of a scene; its own number by default")
    parser.add_argument("--routers", type=int, default=1, help="that place, each with a ledger of its own")
    parser.add_argument("--workers", type=int, default=32)
    args = parser.parse_args()
    if args.only != "simulation":
        for tokens in (256, 2048, 8192):
            timed(args.workers, tokens, 3000)
    if args.only != "time":
        scenes = {name: scene for name, scene in SCENES.items() if args.scene in (None, name)}
        if args.requests:
            scenes = {name: replace(scene, requests=args.requests) for name, scene in scenes.items()}
        simulated(scenes, args.seeds, args.routers)


if __name__ == "__main__":
    main()
