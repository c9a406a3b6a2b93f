"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

_INSTRUCTIONS: Final = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""Those that matrix products use."""
_REPOSITORY: Final = Path(__file__).parents[3]


def circumstances() -> dict[str, str]:
    """Date, commit, processor and versions, as far as they can be found out."""
    fields = _processor()
    flags = fields.get("flags", "").split()
    found = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "processor": fields.get("model name", platform.machine()),
        "cores": str(len(os.sched_getaffinity(0))),
        "instructions": " ".join(flag for flag in _INSTRUCTIONS if flag in flags),
        "python": platform.python_version(),
    }
    return {name: value for name, value in found.items() if value}


def _processor() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    try:
        entry = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in entry.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _commit() -> str:
    """Of the checkout this runs from, with a + when it was changed since; empty when it is none."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=_REPOSITORY,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
