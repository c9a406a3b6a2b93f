"""What is served here: the models, their limits as of now, and their tokenizers as an API."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from baton.rpc.errors import InvalidArgument, Unavailable
from baton.text.model import TextModel
from baton.v1 import inference_pb2
from baton_router.models import Models
from baton_router.placement import answers_of, prevailing_fingerprint
from baton_router.prompt import tokenize
from baton_router.sampling import default_sampling
from baton_router.settings import RouterSettings
from baton_router.validate import Limits, check_bytes, check_ids, check_messages
from baton_router.workers import WorkerView

_INLINE_IDS = 4096  # more take so long to decode that other streams would feel it


@dataclass(frozen=True, slots=True)
class Serving:
    """A model as the workers run it at one moment.

    Invariant: without a worker, `fingerprint` is empty and the limits are the model's own.
    """

    model: TextModel
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
    """The models this router serves."""

    def __init__(self, settings: RouterSettings, models: Models, view: WorkerView) -> None:
        self._settings = settings
        self._models = models
        self._view = view
        self._known: dict[str, Serving] = {}
        self._version = -1  # of the view, that what is known is of

    def named(self, name: str) -> TextModel:
        """The model a request names. Raises ModelNotFound: it is not served here."""
        return self._models.named(name, "model")

    def now(self, model: TextModel) -> Serving:
        """A model as most workers run it; a worker's context may be shorter than the model's."""
        if self._version != self._view.version:
            self._known.clear()
            self._version = self._view.version
        if model.name not in self._known:
            self._known[model.name] = self._look(model)
        return self._known[model.name]

    async def serving(self, name: str, deadline: float) -> Serving:
        """The model a request names, as `now`; without any worker it waits a moment for one that may come back.

        Args:
            name: of the model; empty: the first one.
            deadline: of the request, on the event loop's clock.

        Raises:
            ModelNotFound: it is not served here.
        """
        model = self.named(name)
        loop = asyncio.get_running_loop()
        end = min(loop.time() + self._settings.reattach_seconds, deadline)
        while not (serving := self.now(model)).ready and loop.time() < end:
            await self._view.wait_change(end - loop.time())
        return serving

    def list(self) -> inference_pb2.ListModelsResponse:
        """ListModels: the default first."""
        return inference_pb2.ListModelsResponse(models=[self._told(model) for model in self._models])

    def get_model(self, request: inference_pb2.GetModelRequest) -> inference_pb2.GetModelResponse:
        """GetModel. Raises ModelNotFound for another name."""
        return inference_pb2.GetModelResponse(model=self._told(self._models.named(request.name, "name")))

    async def tokenize(self, request: inference_pb2.TokenizeRequest) -> inference_pb2.TokenizeResponse:
        """Tokenize. Raises InvalidArgument or ModelNotFound, as Generate and Chat do; the context is no limit here."""
        model = self.named(request.model)
        limits = self.now(model).limits
        match request.WhichOneof("input"):
            case "text":
                check_bytes(request.ByteSize(), "text", limits)
                rendered = await tokenize(request.text, model, "text", limits)
            case "conversation":
                field = "conversation.messages"
                turns = check_messages(request.conversation.messages, field, limits)
                rendered = await tokenize(turns, model, field, limits)
            case _:
                raise InvalidArgument("input", "must be text or conversation")
        return inference_pb2.TokenizeResponse(token_ids=rendered.token_ids, rendered=rendered.text)

    async def detokenize(self, request: inference_pb2.DetokenizeRequest) -> inference_pb2.DetokenizeResponse:
        """Detokenize. Raises InvalidArgument or ModelNotFound."""
        model = self.named(request.model)
        limits = self.now(model).limits
        if len(request.token_ids) > limits.max_prompt_bytes:
            raise InvalidArgument("token_ids", f"must be at most {limits.max_prompt_bytes}")
        check_ids(request.token_ids, "token_ids", limits)
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        token_ids = list(request.token_ids)
        if len(token_ids) <= _INLINE_IDS:
            return inference_pb2.DetokenizeResponse(text=model.tokenizer.decode(token_ids, skip))
        text = await asyncio.to_thread(model.tokenizer.decode, token_ids, skip)
        return inference_pb2.DetokenizeResponse(text=text)

    def _look(self, model: TextModel) -> Serving:
        decode = self._view.decode(model.name)
        fingerprint = prevailing_fingerprint(decode) or ""
        worker = self._view.model(fingerprint)
        context, vocab_size = model.max_context, model.vocab_size
        return Serving(
            model=model,
            fingerprint=fingerprint if worker else "",
            answers=answers_of(fingerprint, (*decode, *self._view.prefill(model.name))) if worker else "",
            dtype=worker.dtype if worker else "",
            eos_token_ids=tuple(worker.eos_token_ids) if worker else model.eos_token_ids,
            limits=Limits(
                model_name=model.name,
                max_context=min(context, worker.max_context or context) if worker else context,
                vocab_size=min(vocab_size, worker.vocab_size or vocab_size) if worker else vocab_size,
                max_prompt_bytes=self._settings.max_prompt_bytes,
                max_messages=self._settings.max_messages,
            ),
        )

    def _told(self, model: TextModel) -> inference_pb2.Model:
        """A model, for clients."""
        serving = self.now(model)
        return inference_pb2.Model(
            name=model.name,
            max_context=serving.limits.max_context,
            vocab_size=serving.limits.vocab_size,
            default_sampling=default_sampling(model.defaults),
            chat=model.template is not None,
            fingerprint=serving.fingerprint,
            dtype=serving.dtype,
            ready=serving.ready,
        )
