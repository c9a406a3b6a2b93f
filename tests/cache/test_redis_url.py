"""A Redis URL says what it says, or is refused without being repeated."""

from __future__ import annotations

import itertools
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from redis.crc import key_slot

from baton_cache.layout import SLOTS, Layout, of_cluster_slots, of_sentinel
from baton_cache.redis_url import Address, Mode, RedisUrl, parse
from baton_cache.settings import CacheSettings

ONE = Address("one", 6379)


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("redis://one", RedisUrl(Mode.SINGLE, (ONE,))),
        ("redis://one:1/2", RedisUrl(Mode.SINGLE, (Address("one", 1),), db=2)),
        ("redis://one?db=2", RedisUrl(Mode.SINGLE, (ONE,), db=2)),
        ("redis://[::1]:7", RedisUrl(Mode.SINGLE, (Address("::1", 7),))),
        ("redis://[::1]", RedisUrl(Mode.SINGLE, (Address("::1", 6379),))),
        ("rediss://:p%40ss@one", RedisUrl(Mode.SINGLE, (ONE,), tls=True, password="p@ss")),
        ("redis://me:p:w@one", RedisUrl(Mode.SINGLE, (ONE,), username="me", password="p:w")),
        ("unix:///a/b%20c?db=3", RedisUrl(Mode.SINGLE, (Address(path="/a/b c"),), db=3)),
        ("unix://:pw@/a", RedisUrl(Mode.SINGLE, (Address(path="/a"),), password="pw")),
        (
            "redis+sentinel://a,b:5/mesh/4",
            RedisUrl(Mode.SENTINEL, (Address("a", 26379), Address("b", 5)), service="mesh", db=4),
        ),
        ("rediss+sentinel://u:p@a/mesh", RedisUrl(Mode.SENTINEL, (Address("a", 26379),), True, "mesh", 0, "u", "p")),
        ("redis+cluster://a:1,b:2", RedisUrl(Mode.CLUSTER, (Address("a", 1), Address("b", 2)))),
        ("rediss+cluster://a:1/0", RedisUrl(Mode.CLUSTER, (Address("a", 1),), tls=True)),
    ],
)
def test_what_is_said(url: str, meant: RedisUrl) -> None:
    assert parse(url) == meant


@pytest.mark.parametrize(
    "url",
    [
        "",
        "one",
        "http://:sesame@one",
        "redis://",
        "redis://:sesame@",
        "redis://:sesame@one:port",
        "redis://:sesame@one:0",
        "redis://:sesame@one:65536",
        "redis://:sesame@one:²",
        "redis://:sesame@one,two",
        "redis://:sesame@one/x",
        "redis://:sesame@one/1/2",
        "redis://:sesame@one/1?db=2",
        "redis://:sesame@one?password=sesame",
        "redis://:sesame@one?sesame",
        "redis://:sesame#1@one",
        "redis://[:sesame@one",
        "unix://:sesame@one",
        "unix://",
        "redis+sentinel://:sesame@one",
        "redis+sentinel://:sesame@one/",
        "redis+cluster://:sesame@one/1",
        "redis+cluster://:sesame@one,",
    ],
)
def test_what_is_refused(url: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 what is said is checked here
        parse(url)
    assert "sesame" not in str(refused.value)
    assert str(refused.value)
    with pytest.raises(ValidationError) as wrong:
        CacheSettings(redis_url=url)  # type: ignore[arg-type]
    assert "sesame" not in str(wrong.value)
    assert wrong.value.errors()[0]["loc"] == ("redis_url",)


@given(st.text())
def test_anything_is_parsed_or_refused(text: str) -> None:
    for url in (text, "redis://" + text, "redis+sentinel://" + text, "unix://" + text):
        try:
            assert parse(url).addresses
        except ValueError as error:
            assert len(str(error)) < 100  # noqa: PT017 both are fine


@given(username=st.text(), password=st.text())
def test_any_user_and_password_can_be_written(username: str, password: str) -> None:
    url = parse(f"redis://{quote(username, safe='')}:{quote(password, safe='')}@one")
    assert (url.username, url.password) == (username, password)


def test_a_password_is_not_shown() -> None:
    assert "sesame" not in repr(parse("redis://:sesame@one"))


@pytest.mark.parametrize(
    "settings",
    [
        {"redis_url": "redis://:sesame@one", "redis_password": "sesame"},
        {"redis_password": "sesame", "redis_password_file": "/sesame"},
        {"redis_url": "redis://me@one", "redis_username": "sesame"},
        {"redis_key_file": "/sesame", "redis_url": "rediss://one"},
        {"redis_ca_file": "/sesame"},
        {"key_secret": "sesame", "key_secret_file": "/sesame"},
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, str]) -> None:
    with pytest.raises(ValidationError, match="--") as wrong:
        CacheSettings(**settings)  # type: ignore[arg-type]
    assert "sesame" not in str(wrong.value)


@given(st.sets(st.integers(1, SLOTS - 1), max_size=6), st.data())
def test_every_slot_has_the_owner_it_was_given(cuts: set[int], data: st.DataObject) -> None:
    edges = [0, *sorted(cuts), SLOTS]
    ranges = [(first, end - 1, Address(str(first), 1)) for first, end in itertools.pairwise(edges)]
    kept = data.draw(st.lists(st.sampled_from(ranges), unique=True))
    layout = Layout.of_ranges(kept)
    assert layout.servers() == {address for *_, address in kept}
    name = data.draw(st.text())
    slot = key_slot(name.encode())
    assert layout.owner(name) == next((a for first, last, a in kept if first <= slot <= last), None)


def test_what_servers_tell() -> None:
    asked = Address("asked", 1)
    told = [[0, 99, [b"a", 5, b"id", []], [b"replica", 6, b"id"]], [100, SLOTS - 1, [b"", 7, b"id"]]]
    assert of_cluster_slots(told, asked).servers() == {Address("a", 5), Address("asked", 7)}
    assert of_sentinel([b"a", b"5"]) == Layout.of_one(Address("a", 5))
    for nonsense in (
        [[1]],
        [[b"x", 1, [b"a", 5]]],
        [1],
        [[0, 1, None]],
        [[-1, 5, [b"a", 5]]],
        [[0, 99999, [b"a", 5]]],
        5,
    ):
        with pytest.raises(ValueError):  # noqa: PT011 whatever it says
            of_cluster_slots(nonsense, asked)
    for nonsense in (None, [], [b"a"], 5, [5, 5], b"ab"):
        with pytest.raises(ValueError, match="no such master"):
            of_sentinel(nonsense)  # type: ignore[arg-type]
