"""Linear layers that read the same input become one product: Q, K and V, or gate and up.

Which layers these are is seen in a forward, not guessed from names: siblings in one module that were called one after
another with the very same tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from baton.engine.linear import Linear


class FusedLinear:
    """One product for several layers of the same input. It runs when the first is called; the others take their share.

    Args:
        linear: the layers' weights one below the other.
        sizes: outputs of each layer, in order.
    """

    def __init__(self, linear: Linear, sizes: Sequence[int]) -> None:
        self.linear = linear
        self.sizes = list(sizes)
        self._input: torch.Tensor | None = None
        self._shares: list[torch.Tensor | None] = [None] * len(self.sizes)

    def share(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Layer `index`'s output, [..., sizes[index]], a view."""
        if x is not self._input or self._shares[index] is None:
            self._input = x
            self._shares = list(self.linear(x).split_with_sizes(self.sizes, dim=-1))
        share = self._shares[index]
        self._shares[index] = None
        if all(other is None for other in self._shares):
            self._input = None  # nothing is kept beyond the step
        assert share is not None
        return share


class Share(Linear):
    """A layer that became part of a fused one."""

    def __init__(self, fused: FusedLinear, index: int, original: nn.Linear) -> None:
        super().__init__(original.weight)
        self.fused = fused
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self.fused.share(x, self.index)


def siblings(model: nn.Module, forward: Callable[[], object]) -> list[list[str]]:
    """Names of the linear layers that can be fused, group by group, in the order of their calls.

    Args:
        model: its layers are watched.
        forward: runs it once.
    """
    names: dict[nn.Module, str] = {m: name for name, m in model.named_modules() if type(m) is nn.Linear}
    calls: list[tuple[str, torch.Tensor]] = []

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        calls.append((names[module], inputs[0]))

    hooks = [module.register_forward_pre_hook(note) for module in names]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[str]] = []
    previous: torch.Tensor | None = None
    for name, x in calls:
        parent = name.rpartition(".")[0]
        if x is previous and groups[-1][0].rpartition(".")[0] == parent and name not in groups[-1]:
            groups[-1].append(name)
        else:
            groups.append([name])
        previous = x
    seen = [name for group in groups for name in group]
    # A layer called twice in a forward has a life that is not understood here.
    return [group for group in groups if len(group) > 1 and all(seen.count(name) == 1 for name in group)]
