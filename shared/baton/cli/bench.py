"""`baton bench`."""


def bench() -> None:
    """Measure."""
