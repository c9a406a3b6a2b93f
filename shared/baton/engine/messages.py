"""What a front and its engine say to each other: typed commands in, typed events out.

The front (asyncio, gRPC) and the engine (weights, KV pool, step loop) are two processes of one service on one host.
Messages are `msgspec` structs in MessagePack, batched per step. Both sides read the same CLOCK_MONOTONIC, so
timestamps may be compared between them (and with nobody else's).

Life of a request in the engine::

    Submit(GENERATE)  ─▶ [queued] ─▶ prefill chunks, Progress each ─▶ decode steps ─▶ Output ... Output(finish_reason)
    Submit(PREFILL)   ─▶ [queued] ─▶ as above, and KvReady per layer and chunk ─▶ Output(first token) ─▶ held
    Submit(RECEIVE)   ─▶ [queued for memory] ─▶ Reserved ─▶ front writes KV ─▶ Commit ─▶ decode steps ─▶ Output ...
                                                       └─▶ ComputeHere ─▶ as GENERATE

`Release` ends a request in any state, is idempotent, and is the only command that frees. After an Output with a
finish_reason or a Failed the engine has already freed everything itself, except for PREFILL, whose KV stays readable
until Release because the front may still be sending it.
"""

from __future__ import annotations

import enum

import msgspec

from baton.engine.layout import ModelSpec, PoolLayout


class Role(enum.StrEnum):
    """What the engine is asked to do with a request."""

    GENERATE = "generate"
    PREFILL = "prefill"
    RECEIVE = "receive"


class FinishReason(enum.StrEnum):
    """Why the engine ended a request by itself. Cancellation is never a finish reason."""

    STOP = "stop"  # an end-of-sequence or stop token was sampled (it is the last token of the output)
    LENGTH = "length"  # max_tokens reached, or the model's context is full


class FailureReason(enum.StrEnum):
    """Why the engine refused or gave up a request."""

    INVALID = "invalid"  # the request can never run: empty, too long, token id out of range
    OVERLOADED = "overloaded"  # the engine's bounded queue is full
    INTERNAL = "internal"  # a step failed; the message says how


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Resolved sampling settings: every default is already filled in.

    The token at absolute position p is a pure function of (logits, these settings, seed, p, tokens before p).
    """

    max_tokens: int  # generated tokens at most, >= 1; tokens delivered before a resume count
    min_tokens: int = 0  # end-of-sequence and stop tokens are masked until this many were generated
    temperature: float = 0.0  # 0 = greedy (argmax, lowest id wins ties)
    top_p: float = 1.0  # (0, 1]; 1 = off
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # [0, 1]; 0 = off
    repetition_penalty: float = 1.0  # > 0; over prompt and output (Keskar 2019); 1 = off
    presence_penalty: float = 0.0  # over output only, subtracted once per distinct token
    frequency_penalty: float = 0.0  # over output only, subtracted per occurrence
    logit_bias: dict[int, float] = {}  # token id -> added to the logit
    seed: int = 0  # unsigned 64 bit
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end-of-sequence ids
    ignore_eos: bool = False  # the model's end-of-sequence ids do not stop (stop_token_ids still do)


# ---------------------------------------------------------------------------------------------- commands


class Submit(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Start a request. `token_ids` is the prompt, plus the tokens already delivered when a request is resumed."""

    request_id: str
    role: Role
    token_ids: list[int]
    num_prompt_tokens: int  # token_ids[num_prompt_tokens:] are generated tokens of an earlier attempt
    sampling: SamplingParams
    start_token: int = 0  # PREFILL: KvReady is wanted for tokens [start_token, N) only
    priority: int = 0  # higher runs first; waiting requests age upwards
    prefix_cache: bool = True  # use the KV of earlier requests that began alike, and leave this one's to later ones
    cache_salt: bytes = b""  # whose: only requests with equal salts share anything


class Commit(msgspec.Struct, frozen=True, tag=True):
    """RECEIVE: the slot holds all KV of the N submitted tokens and of `token_ids` but the last.

    `token_ids` are those generated elsewhere, from position N on, at least one. The engine does not repeat them in an
    Output; if the last one ends the request, an Output with no tokens and the finish_reason follows.
    """

    request_id: str
    token_ids: list[int]


class ComputeHere(msgspec.Struct, frozen=True, tag=True):
    """RECEIVE: no foreign KV comes, compute in the reserved slot (short prompt, or the peer was lost).

    `token_ids` are those generated elsewhere before the peer was lost; the engine goes on after them.
    """

    request_id: str
    token_ids: list[int] = []


class Release(msgspec.Struct, frozen=True, tag=True):
    """End a request in whatever state it is and free all it holds. Idempotent; unknown ids are ignored.

    The front sends it only when nobody writes into the request's slot any more.
    """

    request_id: str


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Ask for a DebugState event."""

    token: int


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Leave the step loop and exit."""


Command = Submit | Commit | ComputeHere | Release | Inspect | Stop


# ------------------------------------------------------------------------------------------------ events


class Ready(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """First event of an engine: the model is loaded, checked and can serve."""

    spec: ModelSpec
    layout: PoolLayout
    capacity_tokens: int  # KV tokens the pool may hold over all requests (the scheduler's budget)
    max_context: int  # tokens of one request, prompt and output: what model, slot and pool all hold
    exact: bool  # tokens do not depend on batch or chunks, bit for bit, as far as the self-test saw
    pid: int


class Loading(msgspec.Struct, frozen=True, tag=True):
    """Progress while an engine starts: "weights", "pool", "warm-up", "self-test"."""

    stage: str
    fraction: float


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    """Instead of Ready: the engine cannot serve this model, and exits."""

    message: str


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """RECEIVE: slot `slot` of the pool is the request's; tokens [cached_tokens, N) may be written by the front now."""

    request_id: str
    slot: int
    queue_ns: int  # waited for memory
    cached_tokens: int = 0  # tokens [0, cached_tokens), less than N, are there already and must stay as they are


class KvReady(msgspec.Struct, frozen=True, tag=True):
    """PREFILL: K and V of tokens [start, stop) of layer `layer`, an index into the layout, lie in `slot` for good.

    What a prefix cache held is told of first, of all layers, as soon as the request has a slot.
    """

    request_id: str
    slot: int
    layer: int
    start: int
    stop: int


class PromptChunk(msgspec.Struct, frozen=True, array_like=True):
    """One step's share of a prompt: `tokens` of it were computed between two instants of CLOCK_MONOTONIC."""

    start_ns: int
    end_ns: int
    tokens: int


class Progress(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A step computed a part of a prompt that is not its last. The figures are those of Output, until now."""

    request_id: str
    compute_ns: int
    queue_ns: int
    chunks: list[PromptChunk]


class Output(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Tokens of one request from one step. `index` is the generated index of the first one, continuous from 0.

    `compute_ns` and `queue_ns` are cumulative since Submit: time in steps that served the request, and time admitted
    but not served. For a RECEIVE request both count from Commit or ComputeHere: its wait for memory is in Reserved, and
    its wait for KV is the front's own.
    """

    request_id: str
    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    compute_ns: int = 0
    queue_ns: int = 0
    preemptions: int = 0
    cached_tokens: int = 0  # the first ones of the submitted, that were not computed for it; after a preemption, of all
    chunks: list[PromptChunk] = []  # not told of yet: of the prompt, or recomputed after a preemption


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine refused or gave up a request; it holds nothing of it any more."""

    request_id: str
    reason: FailureReason
    message: str


class StepReport(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """One step of the loop, for load reports and metrics. Also sent once when the engine turns idle."""

    step: int
    duration_ns: int
    prefill_tokens: int  # prompt tokens computed in this step
    decode_requests: int  # requests that got a token in this step's decode part
    running: int
    waiting: int
    used_tokens: int  # KV tokens held, in whole blocks
    free_tokens: int
    preempted: int  # in this step
    looked_up_tokens: int = 0  # of requests admitted in this step, looked for in the prefix cache
    hit_tokens: int = 0  # of those, found
    kept_slots: int = 0  # free ones that keep a prefix
    kept_tokens: int = 0  # in these; they count as free
    attended_pairs: int = 0  # of prefill_tokens with the tokens they see: those before them in their requests, and they
    waiting_prompt_tokens: int = 0  # of queued and running requests, still to be computed here


class CachedBlocks(msgspec.Struct, frozen=True, array_like=True):
    """A run of blocks that lies in the prefix cache now and did not before.

    `digests` are this engine's, one per block, and mean nothing to anybody else. `parent` is that of the block before
    them; empty: they are the first ones of their prefix.
    """

    salt: bytes
    parent: bytes
    digests: list[bytes]
    token_ids: list[int]


class PrefixChanges(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What the prefix cache got and lost since the last time. A block is told after the one it follows."""

    block_tokens: int
    added: list[CachedBlocks]
    removed: list[bytes]


class DebugState(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Answer to Inspect: what the engine holds. After quiescence: no requests, all slots free, used_tokens 0.

    What free slots keep for later requests is nobody's, and told apart.
    """

    token: int
    requests: list[str]
    free_slots: int
    total_slots: int
    used_tokens: int
    capacity_tokens: int
    steps: int
    kept_slots: int = 0
    kept_tokens: int = 0


Event = (
    Ready
    | Loading
    | LoadFailed
    | Reserved
    | KvReady
    | Progress
    | Output
    | Failed
    | StepReport
    | PrefixChanges
    | DebugState
)

command_encoder = msgspec.msgpack.Encoder()
command_decoder = msgspec.msgpack.Decoder(list[Command])
event_encoder = msgspec.msgpack.Encoder()
event_decoder = msgspec.msgpack.Decoder(list[Event])
