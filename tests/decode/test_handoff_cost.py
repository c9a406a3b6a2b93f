"""What of a handoff was hidden behind computation, and what the request waited for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.handoff.cost import Handoff

ACCEPTED = 1_000_000  # by the receiver's clock; the sender's is another one


def test_a_fast_link_hides_what_it_takes() -> None:
    handoff = Handoff(accepted_ns=ACCEPTED)
    handoff.chunk(100, ACCEPTED + 103, ACCEPTED + 103)
    handoff.chunk(200, ACCEPTED + 204, ACCEPTED + 204)
    handoff.first_token(300, ACCEPTED + 300)
    assert handoff.hidden_ns == 3 + 4
    assert handoff.exposed_ns == 0


def test_chunks_that_wait_for_each_other_count_once() -> None:
    handoff = Handoff(accepted_ns=ACCEPTED)
    for arrived in (150, 200, 250):
        handoff.chunk(100, ACCEPTED + arrived, ACCEPTED + arrived)  # computed together, moved one after the other
    handoff.first_token(400, ACCEPTED + 400)
    assert handoff.hidden_ns == 150


def test_what_moved_after_the_token_was_sampled_is_exposed() -> None:
    handoff = Handoff(accepted_ns=ACCEPTED)
    handoff.chunk(100, ACCEPTED + 500, ACCEPTED + 500)
    handoff.first_token(300, ACCEPTED + 510)  # it stood in line behind that chunk
    handoff.chunk(290, ACCEPTED + 700, ACCEPTED + 700)
    handoff.done_ns = ACCEPTED + 705
    assert handoff.hidden_ns == 200
    assert handoff.behind_ns == 210
    assert handoff.exposed_ns == 210 + 195


def test_what_was_copied_here_moved_even_if_it_came_quicker_than_the_answer_before_it() -> None:
    handoff = Handoff(accepted_ns=ACCEPTED)
    handoff.chunk(100, ACCEPTED + 80, ACCEPTED + 90)
    handoff.chunk(100, ACCEPTED + 80, ACCEPTED + 95)
    handoff.first_token(300, ACCEPTED + 300)
    assert handoff.hidden_ns == 10 + 5


def test_without_chunks_there_is_no_handoff_to_wait_for() -> None:
    handoff = Handoff(accepted_ns=ACCEPTED)
    handoff.first_token(300, ACCEPTED + 390)  # slow on its way, but not behind KV
    assert (handoff.hidden_ns, handoff.exposed_ns) == (0, 0)


@given(
    gaps=st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=20),
    slow=st.integers(0, 5000),
)
def test_hidden_and_exposed_are_the_time_kv_moved(gaps: list[tuple[int, int]], slow: int) -> None:
    """Against the definition: instants at which some chunk is computed and not here yet, before and after the token."""
    handoff = Handoff(accepted_ns=ACCEPTED)
    computed, arrived, moving = 0, 0, []
    for to_compute, to_move in gaps:
        computed += to_compute
        arrived = max(arrived, computed) + to_move
        moving.append((computed, arrived))
        handoff.chunk(computed, ACCEPTED + arrived, ACCEPTED + arrived)
    sampled = computed + slow
    handoff.first_token(sampled, ACCEPTED + max(arrived, sampled))
    busy = {t for start, stop in moving for t in range(start, stop)}
    assert handoff.hidden_ns == sum(t < sampled for t in busy)
    assert handoff.behind_ns == sum(t >= sampled for t in busy)
