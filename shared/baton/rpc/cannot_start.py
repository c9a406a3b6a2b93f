"""Why a service does not start."""

from __future__ import annotations


class CannotStart(Exception):
    """The service cannot do its work with these settings; the message says why. Not a defect: no traceback."""
