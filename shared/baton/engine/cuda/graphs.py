"""Decode steps as CUDA graphs: one per batch size, captured at start, replayed with other contents of its buffers.

A decode step launches some hundreds of small kernels; a graph launches them all at once. What it computes is fixed but
for the contents of its input buffers, so a step of B requests runs in the graph of the next larger size, and the rows
too many write to a page of nobody's.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from baton.engine.cuda.inputs import Inputs

Forward = Callable[[], torch.Tensor]
Capture = Callable[[Forward], tuple[Callable[[], None], torch.Tensor]]
"""Takes a forward; gives what runs it again, and the tensor its result is in then."""


def capture_sizes(limit: int) -> list[int]:
    """1, 2, 4, 8, then every multiple of 8 to 64, of 16 to 256, of 32 beyond, and `limit` itself; ascending."""
    if limit < 1:
        raise ValueError(f"batches of at most {limit}")
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, limit, 32)]
    return [*(size for size in sizes if size < limit), limit]


@dataclass(frozen=True, slots=True)
class Graph:
    """One captured batch size.

    Attributes:
        size: rows, each of one request.
        inputs: its buffers.
        replay: runs it.
        logits: float32 [size, vocabulary], overwritten by every replay.
    """

    size: int
    inputs: Inputs
    replay: Callable[[], None]
    logits: torch.Tensor


class Graphs:
    """The captured sizes."""

    def __init__(self, graphs: Iterable[Graph] = ()) -> None:
        self._graphs = sorted(graphs, key=lambda graph: graph.size)

    @property
    def sizes(self) -> list[int]:
        """Captured batch sizes, ascending."""
        return [graph.size for graph in self._graphs]

    def of(self, rows: int) -> Graph | None:
        """The smallest graph with at least so many rows; None: there is none."""
        index = bisect.bisect_left(self.sizes, rows)
        return self._graphs[index] if index < len(self._graphs) else None

    @classmethod
    def build(
        cls,
        sizes: Iterable[int],
        make_inputs: Callable[[int], Inputs],
        forward: Callable[[int, Inputs], torch.Tensor],
        capture: Capture,
    ) -> Graphs:
        """Capture every size, the largest first: the smaller ones then fit into its memory.

        Args:
            sizes: batch sizes.
            make_inputs: makes the buffers of a size.
            forward: computes the logits of a size from its buffers.
            capture: captures a forward.
        """
        graphs = []
        for size in sorted(sizes, reverse=True):
            inputs = make_inputs(size)
            # Bound as defaults: the graph runs it later.
            replay, logits = capture(lambda size=size, inputs=inputs: forward(size, inputs))  # type: ignore[misc]
            graphs.append(Graph(size, inputs, replay, logits))
        return cls(graphs)


class CudaCapture:
    """Captures on a CUDA device, all in one memory pool.

    Args:
        device: which.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, forward: Forward) -> tuple[Callable[[], None], torch.Tensor]:
        """Run once to warm up, then capture.

        Raises:
            RuntimeError: the forward does what a graph cannot hold, such as waiting for the device.
        """
        # The first run picks kernels and allocates their workspaces, which a capture must not.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                forward()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # Other threads may talk to the device meanwhile.
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            logits = forward()
        return graph.replay, logits
