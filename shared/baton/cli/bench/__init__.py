"""`baton bench`: what a mesh does under load, and what engine, mesh and machine reach at best.

A sub-command is a file of this package and a line below. `baton bench --rate 8` is `baton bench load --rate 8`.
"""

from __future__ import annotations

from typing import Any, Final

import typer
from typer.core import TyperGroup

from baton.cli.bench import engine, handoff, limits, load, mesh, placement, stall, streaming

_DEFAULT: Final = "load"


class _LoadByDefault(TyperGroup):
    """A group whose flags, without a command's name, are the load generator's."""

    # Any: typer brings its own click along, or not, by version.
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args[:1] != ["--help"] and not (args and args[0] in self.commands):
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_LoadByDefault,
    help="Measure a mesh under load; or the engine, the mesh and the limits of this machine. Without a command: load.",
    rich_markup_mode="markdown",
)
app.command("load")(load.load)
app.command("limits")(limits.limits)
app.command("engine")(engine.engine)
app.command("handoff")(handoff.handoff)
app.command("stall")(stall.stall)
app.command("mesh")(mesh.mesh)
app.command("streaming")(streaming.streaming)
app.command("placement")(placement.placement)
