"""docs/performance.md has a place for every table, and nothing else of it changes when one is rewritten."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from performance import PAGE, SECTIONS, replaced


def test_every_section_of_the_page_can_be_rewritten() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for section in SECTIONS:
        once = replaced(text, section, "| new |\n")
        assert f"<!-- {section} -->\n| new |\n<!-- /{section} -->" in once
        assert once.count("| new |") == 1
        assert replaced(once, section, "| new |") == once
        before, _, after = text.partition(f"<!-- {section} -->")
        assert once.startswith(before)
        assert once.endswith(after.partition(f"<!-- /{section} -->")[2])


def test_a_page_without_the_markers_is_left_alone() -> None:
    with pytest.raises(ValueError, match="engine"):
        replaced("# Page\n", "engine", "| new |")
