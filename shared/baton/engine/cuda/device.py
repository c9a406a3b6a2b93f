"""Which device an engine runs on."""

from __future__ import annotations

import re

import torch

from baton.engine.errors import EngineError


def resolve(name: str) -> torch.device:
    """The device that `--device` names: cpu, cuda, or cuda:N.

    Raises:
        EngineError: there is no such device here; the message says what is missing.
    """
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise EngineError(f"device {name!r}: use cpu, cuda or cuda:N")
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise EngineError(f"device {name!r}: this torch ({torch.__version__}) was built without CUDA")
    if not torch.cuda.is_available():
        raise EngineError(f"device {name!r}: no CUDA device is to be seen; is the driver there?")
    index = int(match[1] or 0)
    if index >= torch.cuda.device_count():
        raise EngineError(f"device {name!r}: there are {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)
