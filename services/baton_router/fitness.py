"""Which workers a router can use, and why not the others. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from baton import __version__
from baton.internal.v1 import worker_pb2
from baton.worker.protocol import PROTOCOL
from baton_router.models import Models

TIERS = {worker_pb2.WORKER_ROLE_DECODE: "decode", worker_pb2.WORKER_ROLE_PREFILL: "prefill"}


class Unfit(enum.StrEnum):
    """Why a worker is not used."""

    PROTOCOL = "protocol"  # its release speaks another internal protocol
    ROLE = "role"  # it is of another tier than its target is listed for
    TOKENIZER = "tokenizer"  # it serves no model of this router
    MODEL = "model"  # it serves one of several with equal tokenizers, and its name does not tell which


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why, and the same in a sentence that says what is here and what is there."""

    unfit: Unfit
    message: str


def refusal(tier: str, state: worker_pb2.WatchResponse, models: Models) -> Refusal | None:
    """Why a worker listed for a tier is not used; None: it is."""
    if state.protocol != PROTOCOL:
        there = f"Baton {state.version or '(no version told)'} with internal protocol {state.protocol}"
        here = f"this router is Baton {__version__} with internal protocol {PROTOCOL}"
        return Refusal(Unfit.PROTOCOL, f"it is {there}; {here}")
    if TIERS.get(state.role) != tier:
        return Refusal(Unfit.ROLE, f"it is no {tier} worker but a {TIERS.get(state.role, 'stranger')}")
    if models.of(state.model) is not None:
        return None
    alike = models.with_tokenizer(state.model.tokenizer_digest)
    if alike:
        names = ", ".join(model.name for model in alike)
        told = f"it calls its model {state.model.name!r}, and {names} share its tokenizer"
        return Refusal(Unfit.MODEL, f"{told}: start it with --model-name one of these")
    digests = ", ".join(f"{model.name} {model.tokenizer.digest[:12]}" for model in models)
    there = f"{state.model.name} {state.model.tokenizer_digest[:12]}"
    return Refusal(Unfit.TOKENIZER, f"its tokenizer is none of this router's models': {there} there, {digests} here")
