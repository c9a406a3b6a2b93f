"""The answer of one request as it grows: tokens, the text they complete, stop strings, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence

from baton.internal.v1 import decode_pb2
from baton.text.detokenize import Detokenizer
from baton.text.stops import StopMatcher
from baton.text.tokenizer import Tokenizer
from baton.v1 import sampling_pb2


class Answer:
    """Generated tokens and their text.

    What text is out after token i is a function of tokens 0..i alone, so a resumed answer goes on exactly where the
    lost one stopped: the delivered tokens are replayed and their text, which the client has, is dropped.

    Args:
        tokenizer: of the model.
        request: prompt, delivered tokens, stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, request: decode_pb2.GenerateRequest) -> None:
        sampling = request.sampling
        self._detokenizer = Detokenizer(tokenizer, list(request.token_ids), sampling.skip_special_tokens)
        self._stops = StopMatcher(list(sampling.stop), sampling.include_stop)
        self.token_ids: list[int] = []
        self.finish_reason = sampling_pb2.FINISH_REASON_UNSPECIFIED
        self.take(request.delivered_token_ids)

    @property
    def finished(self) -> bool:
        """Whether nothing more follows."""
        return self.finish_reason != sampling_pb2.FINISH_REASON_UNSPECIFIED

    def take(
        self,
        token_ids: Sequence[int],
        finish_reason: sampling_pb2.FinishReason.ValueType = sampling_pb2.FINISH_REASON_UNSPECIFIED,
    ) -> decode_pb2.Tokens:
        """Add tokens; a stop string in them ends the answer at the token that completed it.

        Returns:
            What to stream: the tokens that belong to the answer and the text they complete.
        """
        message = decode_pb2.Tokens(index=len(self.token_ids))
        pieces: list[str] = []
        for token_id in token_ids:
            self.token_ids.append(token_id)
            message.token_ids.append(token_id)
            text, stopped = self._stops.push(self._detokenizer.push([token_id]))
            pieces.append(text)
            if stopped:
                self.finish_reason = sampling_pb2.FINISH_REASON_STOP_STRING
                break
        else:
            if finish_reason != sampling_pb2.FINISH_REASON_UNSPECIFIED:
                pieces.append(self._end(finish_reason))
        message.text = "".join(pieces)
        return message

    def _end(self, finish_reason: sampling_pb2.FinishReason.ValueType) -> str:
        """Let go of the text held back. A stop string may only now be complete."""
        text, stopped = self._stops.push(self._detokenizer.flush())
        self.finish_reason = sampling_pb2.FINISH_REASON_STOP_STRING if stopped else finish_reason
        return text if stopped else text + self._stops.flush()
