"""The arithmetic of a step: packed forward, logits of the rows that need them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

from baton.engine.attention import attending
from baton.engine.errors import UnsupportedModel
from baton.engine.kernels.decode import DecodeKernel, decode_kernel
from baton.engine.kernels.flash import FlashKernel, flash_kernel
from baton.engine.loader import LoadedModel, forward
from baton.engine.messages import Role, SamplingParams
from baton.engine.pool import Pool
from baton.engine.request import Request
from baton.engine.scheduler import Work
from baton.engine.step import Step

# Largest difference of logits, as a share of their range, that rounding explains.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}
_TOLERANCE_OF_INT8 = 0.1  # in any element type: about 1 % in each linear layer


class Runner:
    """Runs steps of one model over one pool.

    Args:
        model: to run.
        pool: where its keys and values go.
        kernels: whether kernels compiled for this machine may be used.
        quantized: whether the model's weights are.
    """

    def __init__(self, model: LoadedModel, pool: Pool, *, kernels: bool = True, quantized: bool = False) -> None:
        self._model = model
        self._pool = pool
        self._kernel = _kernel(pool) if kernels else None
        self._quantized = quantized

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
        step = Step(self._pool, work, on_layer, self._kernel)
        with attending(step):
            logits = forward(self._model.module, step.input_ids, step.position_ids, step.sampled)
        return [w.request for w in step.work if w.samples], logits

    def self_test(self) -> bool:
        """Prove that chunks and single tokens through the pool, in every size of batch, give the model's own logits.

        Uses the slots, which are all free. Kernels differ by the number of rows, and one that is wrong at one size only
        has been seen: so every power of two up to the number of slots is run.

        Returns:
            Whether all of them gave the same bits: then a request's tokens do not depend on what it is computed with.

        Raises:
            UnsupportedModel: they do not: the model keeps a state, or attends in a way, that is not known here.
        """
        ids = self._model.reference_ids[: self._pool.layout.slot_tokens]
        edges = sorted({0, len(ids) // 2, max(0, len(ids) - 2), len(ids) - 1, len(ids)})
        probes = [self._probe(ids, slot) for slot in range(self._pool.layout.num_slots)]
        last = [self._check(probes[-1:], ids, 0, len(ids))]
        for start, stop in pairwise(edges):
            logits = self._check(probes[:1], ids, start, stop)
        last.append(logits)
        for probe in probes[1:]:
            self._pool.copy(0, probe.slot, len(ids))
        size = 2
        while size // 2 < len(probes):
            last.append(self._check(probes[:size], ids, len(ids) - 1, len(ids)))
            size *= 2
        for probe in probes:
            self._pool.release(probe.slot, clean=False)
        return all(torch.equal(logits, last[0].expand_as(logits)) for logits in last)

    def _probe(self, ids: list[int], slot: int) -> Request:
        request = Request.probe(ids, Role.GENERATE, SamplingParams(max_tokens=1))
        request.slot = slot
        return request

    def _check(self, requests: Sequence[Request], ids: list[int], start: int, stop: int) -> torch.Tensor:
        """Compute tokens [start, stop) of all requests in one step, compare their logits and return them."""
        for request in requests:
            request.tokens = ids[:stop]
        _, logits = self.run([Work(request, start, stop - start) for request in requests])
        expected = self._model.reference
        scale = max(1e-6, float(expected.max() - expected.min()))
        difference = float((logits - expected[stop - 1]).abs().max()) / scale
        tolerance = _TOLERANCE_OF_INT8 if self._quantized else _TOLERANCE[self._pool.keys[0].dtype]
        if not difference <= tolerance:
            name, rows = self._model.spec.architecture, len(requests) * (stop - start)
            raise UnsupportedModel(
                f"{name} gives other logits in a step of {rows} tokens than in one piece"
                f" (by {difference:.2g} of their range)"
            )
        return logits


def _kernel(pool: Pool) -> DecodeKernel | FlashKernel | None:
    """What serves attention in this pool on this machine."""
    in_pairs = all(keys.dtype == torch.bfloat16 and keys.shape[3] % 2 == 0 for keys in pool.keys)
    return (flash_kernel() if in_pairs else None) or decode_kernel()
