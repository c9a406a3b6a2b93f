"""Greedy fp32 tokens over pages equal `transformers` for every family that is served."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.engine.config import EngineConfig
from baton.engine.loader import load
from tests import model_zoo
from tests.engine.cuda.conftest import Paged
from tests.engine.test_families import check_answers


@pytest.mark.parametrize("family", model_zoo.FAMILIES)
def test_engine_equals_generate(family: str, tmp_path: Path) -> None:
    directory = model_zoo.build(family, tmp_path / family)
    paged = Paged(load(EngineConfig(model=directory)), step_tokens=16)
    check_answers(paged, directory)
    paged.check_pages()
