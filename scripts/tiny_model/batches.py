"""Documents as training batches: those of about one length side by side, in few different shapes.

Few shapes matter for speed: the CPU's matrix kernels are compiled for each shape they meet.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from tiny_model import corpus
from tiny_model.tokenizer import END, encode

IGNORED = -100
"""Target of positions that only fill up a shape."""
_LEARNED_STEP = 256

Encoded = tuple[list[int], list[bool]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents side by side.

    Attributes:
        ids: int64 [documents, length], padded at the right.
        positions: int64 [learned], where in the flattened `ids` the next token is to be learned.
        targets: int64 [learned], that next token, or `IGNORED`.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor


def batches(tokenizer: Tokenizer, seed: int, tokens: int, early: int) -> Iterator[Batch]:
    """An endless, seeded stream of batches of at most `tokens` tokens, padding included; see `corpus.documents`."""
    end = tokenizer.token_to_id(END)
    waiting: dict[int, list[Encoded]] = defaultdict(list)
    for document in corpus.documents(seed, early):
        encoded = encode(tokenizer, document)
        length = _padded(len(encoded[0]) - 1)
        group = waiting[length]
        group.append(encoded)
        if len(group) >= tokens // length:
            yield _batch(group, length, end)
            group.clear()


def _padded(length: int) -> int:
    """The length a document is padded to."""
    step = 8 if length <= 64 else 16 if length <= 128 else 64
    return -(-length // step) * step


def _batch(group: list[Encoded], length: int, end: int) -> Batch:
    ids = torch.full((len(group), length + 1), end)
    learned = torch.zeros((len(group), length + 1), dtype=torch.bool)
    for row, (row_ids, row_learned) in enumerate(group):
        ids[row, : len(row_ids)] = torch.tensor(row_ids)
        learned[row, : len(row_learned)] = torch.tensor(row_learned)
    positions = learned[:, 1:].flatten().nonzero().squeeze(1)
    targets = ids[:, 1:].flatten()[positions]
    filling = -len(positions) % _LEARNED_STEP
    return Batch(
        ids[:, :-1].contiguous(),
        torch.nn.functional.pad(positions, (0, filling)),
        torch.nn.functional.pad(targets, (0, filling), value=IGNORED),
    )
