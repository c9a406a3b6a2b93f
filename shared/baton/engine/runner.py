"""The arithmetic of a step: packed forward, logits of the rows that need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from baton.engine.attention import attending
from baton.engine.errors import UnsupportedModel
from baton.engine.loader import LoadedModel, forward
from baton.engine.messages import Role, SamplingParams
from baton.engine.pool import Pool
from baton.engine.request import Request
from baton.engine.scheduler import Work
from baton.engine.step import Step

# Largest difference of logits, as a share of their range, that rounding explains.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


class Runner:
    """Runs steps of one model over one pool."""

    def __init__(self, model: LoadedModel, pool: Pool) -> None:
        self._model = model
        self._pool = pool

    @torch.inference_mode()
    def run(
        self, work: Sequence[Work], on_layer: Callable[[int], None] = lambda layer: None
    ) -> tuple[list[Request], torch.Tensor]:
        """Compute a step.

        Args:
            work: what to compute; together at least one token.
            on_layer: called when all new keys and values of a layer lie in the pool.

        Returns:
            The requests that get a token, and their logits, float32 [requests, vocabulary], in the same order.
        """
        step = Step(self._pool, work, on_layer)
        with attending(step):
            logits = forward(self._model.module, step.input_ids, step.position_ids, step.sampled)
        return [w.request for w in step.work if w.samples], logits

    def self_test(self) -> None:
        """Prove that chunks and single tokens through the pool give the model's own logits. Uses slot 0, which is free.

        Raises:
            UnsupportedModel: they do not: the model keeps a state, or attends in a way, that is not known here.
        """
        ids, expected = self._model.reference_ids, self._model.reference
        limit = min(len(ids), self._pool.layout.slot_tokens)
        request = Request.probe(ids[:limit], Role.GENERATE, SamplingParams(max_tokens=1))
        request.slot = 0
        scale = max(1e-6, float(expected.max() - expected.min()))
        tolerance = _TOLERANCE[self._pool.keys[0].dtype]
        edges = sorted({0, limit // 2, max(0, limit - 2), limit - 1, limit})
        for start, stop in pairwise(edges):
            request.tokens = ids[:stop]
            _, logits = self.run([Work(request, start, stop - start)])
            difference = float((logits[0] - expected[stop - 1]).abs().max()) / scale
            if not difference <= tolerance:
                name = self._model.spec.architecture
                raise UnsupportedModel(
                    f"{name} gives other logits in chunks than in one piece (by {difference:.2g} of their range)"
                )
        self._pool.release(0, clean=False)
