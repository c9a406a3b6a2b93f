"""The compose files as compose reads them: variables filled in from .env, layers on top of each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CORE = "compose.yaml"
LAYERS = ("compose.observability.yaml", "compose.model.yaml")
GIVEN = {"MODEL_DIR": "/models/some", "MODEL_NAME": "some"}
"""What compose.model.yaml wants from the command line."""

Service = dict[str, Any]

_VARIABLE = re.compile(r"\$\{(\w+)(?::\?[^}]*)?\}")


def env_file() -> dict[str, str]:
    """The variables of .env."""
    lines = (ROOT / ".env").read_text(encoding="utf-8").splitlines()
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def raw(name: str) -> dict[str, Any]:
    """A compose file as it is."""
    document = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def services(*layers: str) -> dict[str, Service]:
    """The services of compose.yaml with these layers on top."""
    merged: dict[str, Service] = {}
    for name in (CORE, *layers):
        for service, definition in raw(name)["services"].items():
            merged[service] = _merge(merged.get(service, {}), definition)
    filled: dict[str, Service] = _fill(merged)
    return filled


def of_baton(all_services: dict[str, Service]) -> dict[str, Service]:
    """Those that run a service of Baton."""
    return {name: service for name, service in all_services.items() if service["image"].startswith("baton-")}


def variables(name: str) -> set[str]:
    """The variables that a file uses."""
    return set(_VARIABLE.findall((ROOT / name).read_text(encoding="utf-8")))


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, dict) and isinstance(above, dict):
        return {key: _merge(below.get(key), above[key]) if key in above else below[key] for key in {**below, **above}}
    if isinstance(below, list) and isinstance(above, list):
        return [*below, *above]
    return above


def _fill(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _fill(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_fill(item) for item in value]
    if isinstance(value, str):
        return _VARIABLE.sub(lambda found: {**env_file(), **GIVEN}[found[1]], value)
    return value
