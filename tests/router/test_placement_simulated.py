"""What placement promises for first tokens, on a clock that only counts: everything is exact for a seed.

`scripts/measure_placement.py` runs more of it, and more requests.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from baton_router.placement import Policy, Strategy
from tests.router.simulation import SCENES, run

LOAD = Policy(Strategy.LOAD)
FIT = {"prefixes fit", "idle"}


@pytest.mark.parametrize("name", ["prefixes fit", "some fit", "few prefixes", "unique prompts", "bursts", "idle"])
def test_first_tokens_by_prefix_and_by_load(name: str) -> None:
    scene = replace(SCENES[name], requests=300 if name == "idle" else 600)
    ours, theirs = run(scene, Policy()), run(scene, LOAD)
    assert ours.percentile(0.99) <= (0.6 if name in FIT else 1.05) * theirs.percentile(0.99)
    assert ours.percentile(0.5) <= 1.05 * theirs.percentile(0.5)
    assert ours.hit_share >= 0.9 * theirs.hit_share


def test_without_events_the_beginning_is_nearly_as_good_where_prefixes_fit() -> None:
    scene = replace(SCENES["prefixes fit"], requests=600)
    by_hash, by_load = run(scene, Policy(Strategy.HASH)), run(scene, LOAD)
    assert by_hash.percentile(0.99) <= 0.6 * by_load.percentile(0.99)
    assert by_hash.hit_share > 1.2 * by_load.hit_share
