"""What the cache would do with each labelled pair, and what that amounts to at a threshold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from baton_cache.semantic.encoder import Embeds
from baton_cache.semantic.guard import Rule, refusal
from semantic_pairs.bounds import lower, upper
from semantic_pairs.pairs import Pair

GRID = [round(0.5 + 0.01 * step, 2) for step in range(50)]
"""Thresholds tried."""
BOUND = 0.01
"""Share of different questions that may be taken for the same, with 95 % confidence."""
KEPT = 0.95
"""Of the true hits at the lowest threshold within the bound, those that must be left at the one chosen."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A pair, and what speaks for and against a hit."""

    pair: Pair
    similarity: float
    rule: Rule | None

    def hit(self, threshold: float, *, guarded: bool = True) -> bool:
        """Whether the cache would answer one with the other's answer."""
        return self.similarity >= threshold and not (guarded and self.rule is not None)


@dataclass(frozen=True, slots=True)
class Figures:
    """Hits among pairs that are the same, and among pairs that are not."""

    true_hits: int
    same: int
    false_hits: int
    different: int

    @property
    def recall(self) -> float:
        """Share of paraphrases found."""
        return self.true_hits / self.same if self.same else 0.0

    @property
    def recall_at_least(self) -> float:
        """With 95 % confidence."""
        return lower(self.true_hits, self.same) if self.same else 0.0

    @property
    def false_hits_at_most(self) -> float:
        """Share of different questions taken for the same, with 95 % confidence."""
        return upper(self.false_hits, self.different)


def judge_all(pairs: Iterable[Pair], encoder: Embeds, done: Callable[[], None] = lambda: None) -> list[Judged]:
    """Embed and judge every pair."""
    vectors = {}
    judged = []
    for pair in pairs:
        for text in (pair.one, pair.other):
            if text not in vectors:
                vectors[text] = encoder.embed(text)
        similarity = float(vectors[pair.one] @ vectors[pair.other])
        judged.append(Judged(pair, similarity, refusal(pair.one, pair.other)))
        done()
    return judged


def figures(judged: Sequence[Judged], threshold: float, *, guarded: bool = True) -> Figures:
    """What a threshold amounts to."""
    same = [one.hit(threshold, guarded=guarded) for one in judged if one.pair.same]
    different = [one.hit(threshold, guarded=guarded) for one in judged if not one.pair.same]
    return Figures(sum(same), len(same), sum(different), len(different))


def choose(judged: Sequence[Judged]) -> float | None:
    """The threshold: as high as keeps nearly all true hits, among those within the bound. None: there is none."""
    within = [threshold for threshold in GRID if figures(judged, threshold).false_hits_at_most <= BOUND]
    if not within:
        return None
    most = figures(judged, within[0]).true_hits
    return max(threshold for threshold in within if figures(judged, threshold).true_hits >= KEPT * most)


def groups_with_false_hits(judged: Sequence[Judged], threshold: float) -> tuple[int, int]:
    """Intents with a false hit, and all of them: pairs of one intent are not independent, intents are."""
    groups = {one.pair.group for one in judged}
    bad = {one.pair.group for one in judged if not one.pair.same and one.hit(threshold)}
    return len(bad), len(groups)


def rules(judged: Sequence[Judged], threshold: float, *, same: bool) -> Counter[str]:
    """What refused pairs that are near enough."""
    return Counter(
        one.rule.value
        for one in judged
        if one.pair.same is same and one.rule is not None and one.similarity >= threshold
    )
