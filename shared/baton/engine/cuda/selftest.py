"""Proof, before anybody is served, that pages, chunks and every captured graph give the model's own logits."""

from __future__ import annotations

from itertools import pairwise

from baton.engine.cuda.runner import DeviceRunner
from baton.engine.errors import UnsupportedModel
from baton.engine.layout import KvDtype
from baton.engine.loader import LoadedModel
from baton.engine.messages import Role, SamplingParams
from baton.engine.request import Request
from baton.engine.scheduler import Work

# Largest difference of logits, as a share of their range, that rounding explains.
_TOLERANCE = {KvDtype.FLOAT32: 1e-3, KvDtype.BFLOAT16: 0.1}


def self_test(runner: DeviceRunner, model: LoadedModel) -> None:
    """Run the reference in chunks, then decode it at each captured batch size, at a different place in each row.

    Uses all slots, which are free.

    Raises:
        UnsupportedModel: the logits differ by more than rounding explains.
    """
    pool = runner.pool
    limit = min(len(model.reference_ids), pool.layout.slot_tokens)
    edges = sorted({0, limit // 2, max(0, limit - 2), limit - 1, limit})
    for start, stop in pairwise(edges):
        _compare(runner, model, [_work(model, 0, start, stop)], f"tokens {start} to {stop}")
    for size in runner.graphs.sizes if limit > 1 else ():
        works = []
        for slot in range(size):
            position = 1 + slot % (limit - 1) if slot else limit - 1
            pool.copy(0, slot, position)
            works.append(_work(model, slot, position, position + 1))
        _compare(runner, model, works, f"a decode step of {size}")
        if size > 1:  # the graph's last row is padding
            _compare(runner, model, works[:-1], f"a decode step of {size - 1}")
        for slot in range(1, size):
            pool.release(slot, clean=True)
    pool.release(0, clean=False)


def _work(model: LoadedModel, slot: int, start: int, stop: int) -> Work:
    request = Request.probe(model.reference_ids[:stop], Role.GENERATE, SamplingParams(max_tokens=1))
    request.slot = slot
    return Work(request, start, stop - start)


def _compare(runner: DeviceRunner, model: LoadedModel, works: list[Work], what: str) -> None:
    _, logits = runner.run(works)
    expected = model.reference[[w.start + w.count - 1 for w in works]]
    scale = max(1e-6, float(model.reference.max() - model.reference.min()))
    difference = float((logits.cpu() - expected).abs().max()) / scale
    if not difference <= _TOLERANCE[model.spec.dtype]:
        name = model.spec.architecture
        raise UnsupportedModel(
            f"{name} gives other logits for {what} than in one piece (by {difference:.2g} of their range)"
        )
