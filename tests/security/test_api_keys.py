"""The file of API keys: what is in it lets in whom it says, and nothing else ever does."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.rpc import reloaded
from baton.rpc.api_keys import ApiKeys, digest_of, new_key, parse_keys
from baton.rpc.caller import Caller
from baton.rpc.reloaded import UnusableFile

KEY, OTHER = "bk_" + "a" * 40, "bk_" + "b" * 40


def test_a_line_for_each_key() -> None:
    text = f"""
    # whose is whose
    acme = {digest_of(KEY)}      # laptop
    acme = sha256:{digest_of(OTHER)}
    globex.eu-1={digest_of("x")}
    """
    assert parse_keys(text) == {digest_of(KEY): "acme", digest_of(OTHER): "acme", digest_of("x"): "globex.eu-1"}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (f"acme = {KEY}", "is not TENANT ="),
        (f"acme = {digest_of(KEY)[:-1]}", "is not TENANT ="),
        (f"acme = {digest_of(KEY)}0", "is not TENANT ="),
        (f"acme = {digest_of(KEY).upper()}", "is not TENANT ="),
        (f"acme = {digest_of(KEY)[:-1]}g", "is not TENANT ="),
        (f"acme = md5:{'0' * 32}", "is not TENANT ="),
        (f"acme = sha256:sha256:{digest_of(KEY)}", "is not TENANT ="),
        ("acme =", "is not TENANT ="),
        (f"= {digest_of(KEY)}", "is not TENANT ="),
        (digest_of(KEY), "is not TENANT ="),
        (f"acme = {digest_of('')}", "empty key"),
        (f"-acme = {digest_of(KEY)}", "name"),
        (f"* = {digest_of(KEY)}", "name"),
        (f"{'a' * 65} = {digest_of(KEY)}", "name"),
        (f"äcme = {digest_of(KEY)}", "name"),
        (f"one = {digest_of(OTHER)}", "stands above already"),
    ],
)
def test_one_wrong_line_makes_the_whole_file_unusable(line: str, why: str) -> None:
    with pytest.raises(UnusableFile, match=why) as caught:
        parse_keys(f"good = {digest_of(OTHER)}\n{line}\n")
    assert "line 2" in str(caught.value)
    for part in (KEY, digest_of(KEY), digest_of(OTHER)):
        assert part not in str(caught.value)


@given(st.text())
def test_whatever_a_file_holds_it_is_a_list_of_digests_or_unusable(text: str) -> None:
    try:
        found = parse_keys(text)
    except UnusableFile:
        return
    assert all(len(digest) == 64 and tenant for digest, tenant in found.items())


def test_keys_are_known_by_their_digests_alone(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"acme = {digest_of(KEY)}\n")
    keys = ApiKeys(file)
    assert keys.verify(KEY) == Caller("acme", f"key {digest_of(KEY)[:8]}")
    for wrong in ("", KEY[:-1], KEY + "a", KEY.upper(), digest_of(KEY), f"sha256:{digest_of(KEY)}", "acme", "\ud7ff"):
        assert keys.verify(wrong) is None


def test_a_new_file_counts_within_a_second_and_a_wrong_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reloaded, "LOOK_SECONDS", 0.0)
    file = tmp_path / "keys"

    def write(text: str) -> None:
        draft = tmp_path / "draft"
        draft.write_text(text)
        os.replace(draft, file)

    write(f"acme = {digest_of(KEY)}\n")
    keys = ApiKeys(file)
    write(f"globex = {digest_of(OTHER)}\n")
    assert keys.verify(KEY) is None
    assert keys.verify(OTHER) is not None
    for wrong in (f"globex = {OTHER}\n", "\x00\xff", f"acme = {digest_of(KEY)}\nnonsense"):
        write(wrong)
        assert keys.verify(OTHER) is not None, "the one before stays"
        assert keys.verify(KEY) is None
    file.unlink()
    assert keys.verify(OTHER) is not None
    write("")
    assert keys.verify(OTHER) is None, "an empty list is a list"
    assert OTHER not in caplog.text
    assert "line 1 is not TENANT =" in caplog.text


def test_new_keys_are_long_and_differ() -> None:
    one, two = new_key(), new_key()
    assert one != two
    assert len(one) >= 43
    assert digest_of(one) == hashlib.sha256(one.encode()).hexdigest()
