"""Frames come out as they went in, however the stream is cut; what is no frame is refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.frames import LENGTH, MAX_FRAME, BrokenStream, Unframer, frame
from baton.engine.messages import (
    Commit,
    Release,
    Stop,
    Submit,
    command_decoder,
    command_encoder,
)
from tests.engine.conftest import a_submit

BODIES = st.lists(st.binary(max_size=40), max_size=8)


@given(bodies=BODIES, cuts=st.lists(st.integers(0, 400), max_size=30))
def test_any_cuts(bodies: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(frame, bodies))
    points = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    unframer = Unframer()
    found = [body for a, b in itertools.pairwise(points) for body in unframer.feed(stream[a:b])]
    assert found == bodies


@given(bodies=BODIES)
def test_a_frame_comes_out_with_its_last_byte(bodies: list[bytes]) -> None:
    unframer = Unframer()
    for body in bodies:
        data = frame(body)
        assert [unframer.feed(data[i : i + 1]) for i in range(len(data) - 1)] == [[]] * (len(data) - 1)
        assert unframer.feed(data[-1:]) == [body]


@given(before=BODIES, size=st.integers(MAX_FRAME + 1, 2**32 - 1))
def test_an_impossible_length_breaks_the_stream(before: list[bytes], size: int) -> None:
    unframer = Unframer()
    assert unframer.feed(b"".join(map(frame, before))) == before
    with pytest.raises(BrokenStream, match=str(size)):
        unframer.feed(LENGTH.pack(size))


def test_the_longest_frame_is_waited_for() -> None:
    assert Unframer().feed(LENGTH.pack(MAX_FRAME) + b"x") == []


def test_commands_survive_the_way() -> None:
    submit: Submit = a_submit("r", list(range(5000)), temperature=0.7, seed=2**64 - 1, logit_bias={3: -1.5})
    commands = [submit, Commit("r", [7]), Release("r"), Stop()]
    (body,) = Unframer().feed(frame(command_encoder.encode(commands)))
    assert command_decoder.decode(body) == commands
