"""The models one router serves: what clients call them, and which worker belongs to which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from baton.internal.v1 import worker_pb2
from baton.rpc.errors import ModelNotFound
from baton.text.model import TextModel
from baton_router.validate import check_name


class Models:
    """One or more models of different names; the first one is meant when none is named.

    Args:
        models: the default first.
    """

    def __init__(self, models: Sequence[TextModel]) -> None:
        assert models
        self._models = {model.name: model for model in models}
        assert len(self._models) == len(models)

    def __iter__(self) -> Iterator[TextModel]:
        return iter(self._models.values())

    def named(self, name: str, field: str) -> TextModel:
        """The model a request names; the first one if it names none.

        Raises:
            InvalidArgument: the name is too long to be one.
            ModelNotFound: it is not served here; says which are.
        """
        check_name(name, field)
        found = self._models.get(name) if name else next(iter(self))
        if found is None:
            names, verb = ", ".join(repr(model.name) for model in self), "are" if len(self._models) > 1 else "is"
            raise ModelNotFound(field, f"{name!r} is not served here; {names} {verb}")
        return found

    def of(self, model: worker_pb2.WorkerModel) -> TextModel | None:
        """The model a worker serves: the one with its tokenizer; of several with it, the one of its name."""
        alike = self.with_tokenizer(model.tokenizer_digest)
        if len(alike) == 1:
            return alike[0]
        return next((one for one in alike if one.name == model.name), None)

    def with_tokenizer(self, digest: str) -> list[TextModel]:
        """Models that turn text into the same ids."""
        return [model for model in self if model.tokenizer.digest == digest]


def parse_models(specs: Sequence[str], only_name: str) -> list[tuple[str, Path]]:
    """Names and directories.

    Args:
        specs: each a directory, whose name is the model's, or name=directory.
        only_name: of a single directory without a name; empty: the directory's.

    Raises:
        ValueError: a name without a directory, or twice the same one.
    """
    parsed: list[tuple[str, Path]] = []
    for spec in specs:
        name, equals, directory = spec.partition("=")
        if not equals or "/" in name or Path(spec).is_dir():
            name, directory = "", spec
        elif not (name and directory):
            raise ValueError(f"model {spec!r} is neither a directory nor name=directory")
        path = Path(directory)
        name = name or (only_name if len(specs) == 1 else "") or path.resolve().name
        if any(name == other for other, _ in parsed):
            raise ValueError(f"two models are called {name!r}; name them as in --model {name}-2={directory}")
        parsed.append((name, path))
    if not parsed:
        raise ValueError("no model is given")
    return parsed
