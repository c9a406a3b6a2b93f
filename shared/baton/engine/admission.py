"""Which requests an engine takes at all, and which tokens it goes on after. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.engine.messages import FailureReason, Submit


def refusal(
    command: Submit, *, vocab_size: int, longest: int, known: bool, waiting: int, max_waiting: int
) -> tuple[FailureReason, str] | None:
    """Why a request cannot be taken; None: it can.

    Args:
        command: the request.
        vocab_size: of the model.
        longest: tokens one request may have, prompt and output.
        known: a request of this id is already here.
        waiting, max_waiting: requests in the queue, and how many fit.
    """
    count = len(command.token_ids)
    if not 1 <= command.num_prompt_tokens <= count:
        return FailureReason.INVALID, f"{count} tokens with a prompt of {command.num_prompt_tokens}"
    if count - command.num_prompt_tokens >= command.sampling.max_tokens:
        return FailureReason.INVALID, "max_tokens are already generated"
    if not 0 <= command.start_token < count:
        return FailureReason.INVALID, f"start_token {command.start_token} is not below {count}"
    if min(command.token_ids) < 0 or max(command.token_ids) >= vocab_size:
        return FailureReason.INVALID, f"a token id is outside the vocabulary of {vocab_size}"
    if count >= longest:
        return FailureReason.INVALID, f"{count} tokens leave no room in a context of {longest}"
    if known:
        return FailureReason.INVALID, f"request {command.request_id} is already here"
    if waiting >= max_waiting:
        return FailureReason.OVERLOADED, f"{max_waiting} requests are waiting already"
    return None


def impossible(token_ids: Sequence[int], *, have: int, vocab_size: int, longest: int) -> str | None:
    """Why a request cannot go on after tokens generated elsewhere; None: it can.

    Args:
        token_ids: those tokens.
        have: tokens it has.
        vocab_size: of the model.
        longest: tokens one request may have, prompt and output.
    """
    if any(not 0 <= token < vocab_size for token in token_ids):
        return "a token id generated elsewhere is outside the vocabulary"
    if have + len(token_ids) > longest:
        return "more tokens were generated elsewhere than the context holds"
    return None
