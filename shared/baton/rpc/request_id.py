"""The request id that a client may choose: where it travels, and which ones are taken. No gRPC in here."""

from __future__ import annotations

import re
from typing import Final

HEADER: Final = "x-request-id"
"""Name of the metadata that carries it, in both directions."""

RULE: Final = "1 to 128 visible ASCII characters"

_USABLE: Final = re.compile(r"[!-~]{1,128}")


def usable(request_id: str) -> bool:
    """Whether it follows the rule: it goes into logs, trailers and other services' ids as it stands."""
    return _USABLE.fullmatch(request_id) is not None
