"""Incremental search for stop strings in a growing text.

One Knuth-Morris-Pratt automaton per stop string (Knuth, Morris, Pratt 1977): every character is looked at once per stop
string, and a character is held back only while it may belong to a match. The result does not depend on how the text was
cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through until a stop string is complete.

    The match that is complete first wins; of several that are complete at the same character, the longest.

    Args:
        stops: stop strings, none of them empty. No stop strings: everything passes.
        include_stop: whether the matched stop string is passed as well.

    Raises:
        ValueError: a stop string is empty.
    """

    __slots__ = ("_held", "_include_stop", "_patterns", "_states", "stopped")

    def __init__(self, stops: Sequence[str], include_stop: bool = False) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty")
        self._patterns = [(stop, _borders(stop)) for stop in dict.fromkeys(stops)]
        self._states = [0] * len(self._patterns)
        self._include_stop = include_stop
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Add text.

        Returns:
            What may be shown now, and whether a stop string ended the text; after that nothing more comes out.
        """
        if self.stopped:
            return "", True
        if not self._patterns:
            return text, False
        whole = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            matched = self._step(char)
            if matched:
                self.stopped = True
                self._held = ""
                return whole[:end] if self._include_stop else whole[: end - matched], True
        keep = max(self._states)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep], False

    def flush(self) -> str:
        """The text is complete: what was held back. Nothing after a match."""
        held, self._held = self._held, ""
        self._states = [0] * len(self._patterns)
        return held

    def _step(self, char: str) -> int:
        """Feed one character; the length of the longest stop string complete with it, or 0."""
        longest = 0
        for i, (stop, borders) in enumerate(self._patterns):
            state = self._states[i]
            while state and stop[state] != char:
                state = borders[state - 1]
            if stop[state] == char:
                state += 1
            self._states[i] = state
            if state == len(stop):
                longest = max(longest, state)
        return longest


def _borders(pattern: str) -> list[int]:
    """For every prefix of the pattern, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = borders[length - 1]
        if pattern[i] == pattern[length]:
            length += 1
        borders[i] = length
    return borders
