"""Models that come with Baton."""

from __future__ import annotations

from pathlib import Path


def bundled_model() -> Path:
    """Directory of the tiny model that comes with Baton: enough to run the whole mesh on a laptop's CPU.

    Raises:
        FileNotFoundError: this installation has no model in it.
    """
    directory = Path(__file__).parent / "tiny"
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"no bundled model in {directory}; name one with --model")
    return directory
