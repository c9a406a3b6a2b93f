"""Which request ids are taken: client and services ask the same rule."""

from __future__ import annotations

import pytest

from baton.client.request import metadata
from baton.rpc.request_id import HEADER, RULE, usable


@pytest.mark.parametrize("request_id", ["a", "!", "~", "a" * 128, "user-7/turn:3"])
def test_taken(request_id: str) -> None:
    assert usable(request_id)
    assert metadata({"request_id": request_id}, [("a", "b")]) == (("a", "b"), (HEADER, request_id))


@pytest.mark.parametrize("request_id", ["a" * 129, "a b", "a\n", "ä", "\x7f", "a\x00"])
def test_refused(request_id: str) -> None:
    assert not usable(request_id)
    with pytest.raises(ValueError, match=f"^request_id: must be {RULE}$"):
        metadata({"request_id": request_id}, [])


def test_none_chosen() -> None:
    assert not usable("")
    assert metadata({"request_id": ""}, [("a", "b")]) == metadata({}, [("a", "b")]) == (("a", "b"),)
