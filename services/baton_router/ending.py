"""Whether an answer that was cut off had in fact ended. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from baton.text.detokenize import Detokenizer
from baton.text.stops import StopMatcher
from baton.text.tokenizer import Tokenizer
from baton.v1 import sampling_pb2


def ending(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    delivered: Sequence[int],
    sampling: sampling_pb2.SamplingParams,
    eos_token_ids: Collection[int],
) -> sampling_pb2.FinishReason.ValueType | None:
    """How the delivered tokens ended the answer, or None: more must follow.

    A worker lost between its last token and its last word leaves such an answer; going on would add tokens to it. Its
    text is complete: held-back text goes out with the last token.
    """
    if not delivered:
        return None
    if sampling.stop:
        detokenizer = Detokenizer(tokenizer, prompt_ids, sampling.skip_special_tokens)
        matcher = StopMatcher(list(sampling.stop), sampling.include_stop)
        if matcher.push(detokenizer.push(delivered))[1]:
            return sampling_pb2.FINISH_REASON_STOP_STRING
    last = delivered[-1]
    if last in sampling.stop_token_ids or (last in eos_token_ids and not sampling.ignore_eos):
        return sampling_pb2.FINISH_REASON_STOP
    if len(delivered) >= sampling.max_tokens:
        return sampling_pb2.FINISH_REASON_LENGTH
    return None
