"""Load a model directory, find out what it needs, and prove that it computes the same through our attention.

Weights come from safetensors only; code that a directory brings along is never run.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from baton.engine.attention import NAME
from baton.engine.config import EngineConfig, Quantization
from baton.engine.cuda.device import resolve
from baton.engine.errors import EngineError, UnsupportedModel
from baton.engine.layout import ModelSpec
from baton.engine.linear import int8_is_supported
from baton.engine.pool import TORCH_DTYPES
from baton.engine.prepare import prepare
from baton.engine.recording import record

# Entries of config.json that change without changing what is computed.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "attn_implementation")

# Entries that name code to load, from the directory or from a hub.
_CODE_KEYS = {"auto_map", "attn_implementation", "_attn_implementation", "experts_implementation"}

# Layers that keep a state other than keys and values: nothing here stores or hands it over.
_STATEFUL = ("linear_attention", "mamba", "recurrent", "conv", "hybrid")

# What comes out of loading a directory that is wrong in some way.
_BROKEN = (
    *(ValueError, LookupError, TypeError, AttributeError, ArithmeticError, OSError, ImportError, RuntimeError),
    *(StrictDataclassError, SafetensorError),
)

OnProgress = Callable[[str, float], None]


@dataclass(slots=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        module: its code and weights; attention goes to `baton.engine.attention`.
        spec: what others must know of it.
        reference: logits it gave with its own attention for `reference_ids`, float32 [tokens, vocabulary], on the
            CPU.
    """

    module: PreTrainedModel
    spec: ModelSpec
    reference_ids: list[int]
    reference: torch.Tensor


def load(config: EngineConfig, on_progress: OnProgress = lambda stage, fraction: None) -> LoadedModel:
    """Load `config.model`.

    Raises:
        UnsupportedModel: it cannot be served; the message says why.
        EngineError: there is no such device, or it cannot do what the configuration asks for.
    """
    directory = config.model
    device = resolve(config.device)
    if device.type != "cpu" and config.quantization is not Quantization.NONE:
        raise EngineError(f"{config.quantization} weights are for models on a CPU so far")
    if config.quantization is Quantization.INT8 and not int8_is_supported():
        raise EngineError("--quantization int8: torch has no int8 operators for this CPU")
    _check_directory(directory)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    on_progress("weights", 0.0)
    try:
        settings = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except _BROKEN as error:
        raise UnsupportedModel(f"{directory}: config.json cannot be read: {_first_line(error)}") from error
    _check_config(directory, settings)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=settings,
            dtype=TORCH_DTYPES[config.dtype],
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            # Whatever the directory asks for: names of hub kernels are code as well.
            attn_implementation="eager",
            output_loading_info=True,
        )
    except _BROKEN as error:
        raise UnsupportedModel(f"{directory}: the model cannot be loaded: {_first_line(error)}") from error
    module: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # transformers would go on with random numbers
        raise UnsupportedModel(f"{directory}: {len(missing)} weights are missing, among them {missing[0]}")
    module.eval()  # type: ignore[no-untyped-call]
    module.requires_grad_(False)
    module.to(device)  # type: ignore[arg-type]  # transformers types only the module's own overload
    on_progress("weights", 0.5)
    text_config = module.config.get_text_config()
    ids = [(7 * i * i + 3 * i + 5) % text_config.vocab_size for i in range(24)]
    with torch.inference_mode(), device:
        reference = forward(module, torch.tensor([ids]), torch.arange(len(ids)).view(1, -1), None)
        if not _switch(module):
            raise UnsupportedModel(f"{type(module).__name__} does not let its attention be replaced")
        layers = record(module, text_config)
        if device.type == "cpu":
            prepare(module, config, lambda: record(module, text_config))
    if not layers:
        raise UnsupportedModel(f"{type(module).__name__} has no attention that could be cached")
    spec = ModelSpec(
        name=directory.resolve().name,
        architecture=type(module).__name__,
        fingerprint=_fingerprint(
            directory, config.dtype.value, _eos(module), lambda done: on_progress("weights", 0.5 + done / 2)
        ),
        tokenizer_digest=_tokenizer_digest(directory),
        vocab_size=reference.shape[-1],
        max_context=getattr(text_config, "max_position_embeddings", None) or 2048,
        eos_token_ids=_eos(module),
        dtype=config.dtype,
        layers=layers,
    )
    return LoadedModel(module, spec, ids, reference.cpu())


def forward(
    module: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, rows: torch.Tensor | None
) -> torch.Tensor:
    """One forward of packed tokens.

    Args:
        module: the model.
        input_ids: int64 [1, T].
        position_ids: int64 [1, T].
        rows: int64 [R], rows whose logits are wanted; None: all.

    Returns:
        Logits, float32 [R, vocabulary].
    """
    arguments: dict[str, Any] = {}
    narrows = rows is not None and _takes_rows(type(module).forward)
    if narrows:
        arguments["logits_to_keep"] = rows
    out: torch.Tensor = module(
        input_ids=input_ids, position_ids=position_ids, past_key_values=None, use_cache=False, **arguments
    ).logits[0]
    return (out if rows is None or narrows else out[rows]).float()


@functools.cache
def _takes_rows(function: Callable[..., Any]) -> bool:
    """Whether a model's forward can be told which rows' logits are wanted."""
    return "logits_to_keep" in inspect.signature(function).parameters


def _check_directory(directory: Path) -> None:
    if not (directory / "config.json").is_file():
        raise UnsupportedModel(f"{directory}: no config.json in it")
    if not any(directory.glob("*.safetensors")):
        raise UnsupportedModel(f"{directory}: no safetensors in it; other weight formats can run code when loaded")
    for name in ("config.json", "tokenizer_config.json"):
        path = directory / name
        try:
            content = json.loads(path.read_bytes()) if path.is_file() else {}
        except ValueError as error:
            raise UnsupportedModel(f"{path}: not JSON: {error}") from error
        if not isinstance(content, dict):
            raise UnsupportedModel(f"{path}: not a JSON object")
        for key in _CODE_KEYS & content.keys():
            raise UnsupportedModel(f"{path}: {key} asks for code from elsewhere, which is never run")


def _check_config(directory: Path, config: Any) -> None:
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{directory}: {config.model_type} is an encoder-decoder; only decoders are served")
    text = config.get_text_config()
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    moving = _rope_types(text) & {"longrope", "dynamic"}
    if moving:
        raise UnsupportedModel(
            f"{directory}: {moving.pop()} position embeddings change with the longest request of a batch,"
            " so the same request would not always get the same tokens"
        )
    stateful = sorted(kind for kind in kinds if any(word in kind for word in _STATEFUL))
    if stateful:
        raise UnsupportedModel(f"{directory}: {config.model_type} has {stateful[0]} layers, whose state is not cached")


def _rope_types(config: Any) -> set[str]:
    """Kinds of rotary embeddings in a configuration, of all its layer types."""
    found = set()
    for entry in (getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)):
        if isinstance(entry, dict):
            for part in (entry, *(value for value in entry.values() if isinstance(value, dict))):
                found.add(str(part.get("rope_type") or part.get("type") or ""))
    return found


def _switch(module: PreTrainedModel) -> bool:
    try:
        module.set_attn_implementation(NAME)
    except ValueError:
        return False
    return bool(module.config.get_text_config()._attn_implementation == NAME)


def _eos(module: PreTrainedModel) -> tuple[int, ...]:
    for config in (module.generation_config, module.config.get_text_config()):
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return tuple(eos) if isinstance(eos, (list, tuple)) else (int(eos),)
    return ()


def _fingerprint(
    directory: Path, dtype: str, eos_token_ids: tuple[int, ...], on_progress: Callable[[float], None]
) -> str:
    """Equal exactly when the same request gives the same KV and the same answer.

    So it covers configuration, weights, element type, and the tokens that end an answer.
    """
    config = json.loads((directory / "config.json").read_bytes())
    for name in _VOLATILE:
        config.pop(name, None)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(config, sort_keys=True).encode())
    digest.update(dtype.encode())
    digest.update(json.dumps(sorted(eos_token_ids)).encode())
    paths = sorted(directory.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in paths) or 1
    done = 0
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
                done += len(block)
                on_progress(done / total)
    return digest.hexdigest()


def _tokenizer_digest(directory: Path) -> str:
    path = directory / "tokenizer.json"
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest() if path.is_file() else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
