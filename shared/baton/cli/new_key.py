"""`baton new-key`: an API key, and the line of the router's file that lets it in."""

from __future__ import annotations

from typing import Annotated

import typer

from baton.cli import console
from baton.rpc.api_keys import TENANT_RULE, digest_of, new_key, usable_tenant


def new_key_command(
    tenant: Annotated[str, typer.Argument(help="Whose it is: its limits, its caches.")],
) -> None:
    """Make an API key.

    The key goes to standard output, for its owner; the line for the file that `--api-keys` of the router names goes to
    standard error. Nothing is kept: who loses the key needs another one.
    """
    if not usable_tenant(tenant):
        console.fail(f"{tenant!r}: a tenant's name is {TENANT_RULE}", code=2)
    key = new_key()
    print(key)
    console.err.print(f"{tenant} = {digest_of(key)}", markup=False, soft_wrap=True)
