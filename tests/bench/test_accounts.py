"""Where a first token's time went."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from baton.bench.accounts import FirstToken
from baton.v1 import ledger_pb2


def ms(value: int) -> Duration:
    return Duration(nanos=value * 1_000_000)


def test_what_neither_computes_nor_moves_bytes_is_orchestration() -> None:
    spent = (
        (ledger_pb2.KIND_COMPUTE, 50),
        (ledger_pb2.KIND_COMPUTE, 10),
        (ledger_pb2.KIND_NETWORK, 3),
        (ledger_pb2.KIND_TRANSFER, 4),
        (ledger_pb2.KIND_SERIALIZE, 2),
        (ledger_pb2.KIND_QUEUE, 5),
        (ledger_pb2.KIND_TOKENIZE, 1),
    )
    entries = [ledger_pb2.LedgerEntry(kind=kind, duration=ms(value)) for kind, value in spent]
    ledger = ledger_pb2.LatencyLedger(
        first_token=ledger_pb2.Partition(total=ms(80), entries=entries), total=ledger_pb2.Partition(total=ms(500))
    )
    # 5 in a queue, 1 of tokenizing, and 5 that nobody accounted for.
    assert FirstToken.of(ledger) == FirstToken(compute=60, wire=9, orchestration=11)
