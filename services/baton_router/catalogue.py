"""What is served here: the model, its limits as of now, and its tokenizer as an API."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from baton.rpc.errors import InvalidArgument, Unavailable
from baton.text.model import TextModel
from baton.v1 import inference_pb2
from baton_router.placement import answers_of, prevailing_fingerprint
from baton_router.prompt import tokenize
from baton_router.sampling import default_sampling
from baton_router.settings import RouterSettings
from baton_router.validate import Limits, check_bytes, check_ids, check_messages, check_model
from baton_router.workers import WorkerView

_INLINE_IDS = 4096  # more take so long to decode that other streams would feel it


@dataclass(frozen=True, slots=True)
class Serving:
    """The model as the workers run it at one moment.

    Invariant: without a worker, `fingerprint` is empty and the limits are the model's own.
    """

    fingerprint: str
    answers: str
    """What its answers depend on: the fingerprint, and how the workers have quantized the model."""
    dtype: str
    eos_token_ids: tuple[int, ...]
    limits: Limits

    @property
    def ready(self) -> bool:
        """Whether a decode worker runs it."""
        return bool(self.fingerprint)

    def require_worker(self) -> None:
        """Raises Unavailable unless a decode worker runs it."""
        if not self.ready:
            raise Unavailable("no decode worker can serve this now")


class Catalogue:
    """The one model this router serves."""

    def __init__(self, settings: RouterSettings, model: TextModel, view: WorkerView) -> None:
        self._settings = settings
        self._model = model
        self._view = view

    def now(self) -> Serving:
        """The model as most workers run it; a worker's context may be shorter than the model's."""
        fingerprint = prevailing_fingerprint(self._view.decode()) or ""
        worker = self._view.model(fingerprint)
        context, vocab_size = self._model.max_context, self._model.vocab_size
        return Serving(
            fingerprint=fingerprint if worker else "",
            answers=answers_of(fingerprint, (*self._view.decode(), *self._view.prefill())) if worker else "",
            dtype=worker.dtype if worker else "",
            eos_token_ids=tuple(worker.eos_token_ids) if worker else self._model.eos_token_ids,
            limits=Limits(
                model_name=self._model.name,
                max_context=min(context, worker.max_context or context) if worker else context,
                vocab_size=min(vocab_size, worker.vocab_size or vocab_size) if worker else vocab_size,
                max_prompt_bytes=self._settings.max_prompt_bytes,
                max_messages=self._settings.max_messages,
            ),
        )

    async def serving(self, deadline: float) -> Serving:
        """As `now`; without any worker it waits a moment for one that may come back.

        Args:
            deadline: of the request, on the event loop's clock.
        """
        loop = asyncio.get_running_loop()
        end = min(loop.time() + self._settings.reattach_seconds, deadline)
        while not (serving := self.now()).ready and loop.time() < end:
            await self._view.wait_change(end - loop.time())
        return serving

    def model(self) -> inference_pb2.Model:
        """The model, for clients."""
        serving = self.now()
        return inference_pb2.Model(
            name=self._model.name,
            max_context=serving.limits.max_context,
            vocab_size=serving.limits.vocab_size,
            default_sampling=default_sampling(self._model.defaults),
            chat=self._model.template is not None,
            fingerprint=serving.fingerprint,
            dtype=serving.dtype,
            ready=serving.ready,
        )

    def get_model(self, request: inference_pb2.GetModelRequest) -> inference_pb2.GetModelResponse:
        """GetModel. Raises ModelNotFound for another name."""
        check_model(request.name, "name", self.now().limits)
        return inference_pb2.GetModelResponse(model=self.model())

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> inference_pb2.TokenizeResponse:
        """Tokenize. Raises InvalidArgument or ModelNotFound, as Generate and Chat do; the context is no limit here."""
        limits = self.now().limits
        check_model(request.model, "model", limits)
        match request.WhichOneof("input"):
            case "text":
                check_bytes(request.ByteSize(), "text", limits)
                rendered = await tokenize(request.text, self._model, "text", limits)
            case "conversation":
                field = "conversation.messages"
                turns = check_messages(request.conversation.messages, field, limits)
                rendered = await tokenize(turns, self._model, field, limits)
            case _:
                raise InvalidArgument("input", "must be text or conversation")
        return inference_pb2.TokenizeResponse(token_ids=rendered.token_ids, rendered=rendered.text)

    async def detokenize(self, request: inference_pb2.DetokenizeRequest) -> inference_pb2.DetokenizeResponse:
        """Detokenize. Raises InvalidArgument or ModelNotFound."""
        limits = self.now().limits
        check_model(request.model, "model", limits)
        if len(request.token_ids) > limits.max_prompt_bytes:
            raise InvalidArgument("token_ids", f"must be at most {limits.max_prompt_bytes}")
        check_ids(request.token_ids, "token_ids", limits)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        token_ids = list(request.token_ids)
        if len(token_ids) <= _INLINE_IDS:
            return inference_pb2.DetokenizeResponse(text=self._model.tokenizer.decode(token_ids, skip))
        text = await asyncio.to_thread(self._model.tokenizer.decode, token_ids, skip)
        return inference_pb2.DetokenizeResponse(text=text)
