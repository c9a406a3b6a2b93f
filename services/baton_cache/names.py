"""What things are called in Redis. Pure.

Every name of one entry holds the entry in braces, the hash tag of Redis Cluster: they lie in one slot, so one script or
transaction may use them all. The entry begins with a tag of its tenant, so that a tenant's entries can be told by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_ENTRY: Final = re.compile(r"[0-9a-f]{16}-[0-9a-f]{64}")
_KINDS: Final = frozenset({"answer", "lead", "wanted", "chunks", "similar", "question"})
_GLOB: Final = re.compile(r"([\\*?\[\]])")


@dataclass(frozen=True, slots=True)
class Names:
    """Names that begin with a prefix.

    Args:
        prefix: without braces: they would be taken for the hash tag.
    """

    prefix: str

    def __post_init__(self) -> None:
        assert "{" not in self.prefix
        assert "}" not in self.prefix

    @property
    def answers(self) -> str:
        """What the names of all answers begin with, and no other name: changes of these are followed."""
        return f"{self.prefix}answer:"

    def answer(self, entry: str) -> str:
        """Where the answer of an entry lies. `entry` is `KeyDigests.name`."""
        return f"{self.answers}{{{entry}}}"

    def lead(self, entry: str) -> str:
        """Who generates the answer."""
        return f"{self.prefix}lead:{{{entry}}}"

    def wanted(self, entry: str) -> str:
        """Whether others wait for the answer."""
        return f"{self.prefix}wanted:{{{entry}}}"

    def chunks(self, entry: str) -> str:
        """The answer in the making."""
        return f"{self.prefix}chunks:{{{entry}}}"

    def similar(self, partition: str) -> str:
        """The vectors of the questions that differ in their wording only. `partition` is as long as an entry."""
        return f"{self.prefix}similar:{{{partition}}}"

    def question(self, partition: str, entry: str) -> str:
        """The question that an entry answers; in the slot of its partition."""
        return f"{self.prefix}question:{{{partition}}}{entry}"

    def tenant_pattern(self, tag: str) -> str:
        """Pattern of SCAN for all names of a tenant, of whatever kind; see `ours`. `tag` is `Keys.tenant_tag`."""
        return f"{_literal(self.prefix)}*:{{{tag}-*"

    def pattern(self) -> str:
        """Pattern of SCAN for all names, of whatever kind; see `ours`."""
        return f"{_literal(self.prefix)}*:{{*"

    def ours(self, name: str) -> bool:
        """Whether this is a name of ours: a pattern also takes those of a prefix that begins with this one."""
        return name.startswith(self.prefix) and name.removeprefix(self.prefix).partition(":{")[0] in _KINDS

    def entry(self, name: str) -> str | None:
        """The entry whose answer lies under a name; None: it is no answer's name."""
        entry = name[len(self.answers) + 1 : -1]
        return entry if name == self.answer(entry) and is_entry(entry) else None


def is_entry(text: str) -> bool:
    """Whether this is what an entry is called."""
    return _ENTRY.fullmatch(text) is not None


def _literal(text: str) -> str:
    """The pattern that only this text matches."""
    return _GLOB.sub(r"\\\1", text)
