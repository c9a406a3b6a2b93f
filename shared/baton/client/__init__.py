"""Python client of Baton: `Client` for threads, `AsyncClient` for asyncio.

with Client("127.0.0.1:50051") as client:
    for chunk in client.stream("Once upon a time", max_tokens=32):
        print(chunk.text, end="")
"""

from baton.client.aio import AsyncAnswerStream, AsyncClient
from baton.client.answer import Answer, CacheStatus, Chunk, FinishReason, ModelInfo, Placement, Start, Transport, Usage
from baton.client.errors import BatonRpcError, FieldViolation
from baton.client.ledger import Entry, Ledger, Partition
from baton.client.request import CacheMode, Message, Options, Prompt, Role
from baton.client.security import Tls
from baton.client.sync import AnswerStream, Client

__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncClient",
    "BatonRpcError",
    "CacheMode",
    "CacheStatus",
    "Chunk",
    "Client",
    "Entry",
    "FieldViolation",
    "FinishReason",
    "Ledger",
    "Message",
    "ModelInfo",
    "Options",
    "Partition",
    "Placement",
    "Prompt",
    "Role",
    "Start",
    "Tls",
    "Transport",
    "Usage",
]
