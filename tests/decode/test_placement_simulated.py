"""The promise of auto: first tokens at most 10 % later, at the 95th percentile, than the better of always local and
always remote, over prompt lengths, running streams, arrival rates, and prefill services of any speed.

Two simulated workers take the time their costs say, on a clock that only counts; the service's own code decides, from
what it measures itself and from a view of the prefill worker that is 100 ms old.
"""

from __future__ import annotations

import pytest

from baton.worker.step_cost import StepCost
from baton_decode.placement import PrefillPlacement
from tests.decode.simulation import Scene, first_tokens

DECODE = StepCost(0.008, 0.0004, 0.009, 0.0004, 3e-9, 256)
ALLOWED = 1.1
SEEDS = (10, 11)


def scaled(factor: float) -> StepCost:
    """An engine that takes so many times as long for everything."""
    return StepCost(
        DECODE.decode_seconds * factor,
        DECODE.seconds_per_decode * factor,
        DECODE.prefill_seconds * factor,
        DECODE.seconds_per_token * factor,
        DECODE.seconds_per_pair * factor,
        DECODE.step_tokens,
    )


def p95(scene: Scene, mode: PrefillPlacement) -> float:
    """Of the requests of all seeds."""
    waited = sorted(second for seed in SEEDS for second in first_tokens(scene, mode, seed))
    return waited[-(-95 * len(waited) // 100) - 1]


@pytest.mark.parametrize("load", [0.15, 0.5, 0.9])
@pytest.mark.parametrize("streams", [0, 8])
@pytest.mark.parametrize("tokens", [32, 128, 512, 2048])
def test_first_tokens_are_about_as_early_as_with_the_better_of_both(tokens: int, streams: int, load: float) -> None:
    for speed, overhead in ((0.3, 0.004), (1.0, 0.015), (2.0, 0.004)):
        scene = Scene(tokens, streams, load, DECODE, scaled(speed), overhead=overhead)
        auto, local, remote = (p95(scene, mode) for mode in MODES)
        assert auto <= ALLOWED * min(local, remote), (scene, auto, local, remote)


MODES = (PrefillPlacement.AUTO, PrefillPlacement.LOCAL, PrefillPlacement.REMOTE)


def test_under_load_both_workers_do_better_than_either() -> None:
    scene = Scene(512, 4, 0.9, DECODE, DECODE)
    auto, local, remote = (p95(scene, mode) for mode in MODES)
    assert auto < 0.8 * min(local, remote)


def test_the_simulation_can_tell_good_from_bad() -> None:
    """Neither of the two ways is always the better one, so a choice that ignored the scene would fail above."""
    short = Scene(32, 0, 0.15, DECODE, scaled(2.0))
    long = Scene(2048, 8, 0.9, DECODE, DECODE)
    assert p95(short, PrefillPlacement.REMOTE) > ALLOWED * p95(short, PrefillPlacement.LOCAL)
    assert p95(long, PrefillPlacement.LOCAL) > ALLOWED * p95(long, PrefillPlacement.REMOTE)


def test_the_same_seed_gives_the_same_figures() -> None:
    scene = Scene(128, 4, 0.5, DECODE, DECODE)
    assert first_tokens(scene, PrefillPlacement.AUTO, 3) == first_tokens(scene, PrefillPlacement.AUTO, 3)
