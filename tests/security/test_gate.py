"""However metadata are put together, a gate lets through who shows what it asks for, and nobody else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.rpc.access import DECLARED, Who
from baton.rpc.caller import Caller
from baton.rpc.errors import PermissionDenied, Unauthenticated
from baton.rpc.gate import Gate
from baton.rpc.mesh_token import MESH_HEADER

KEY, MESH, OPERATOR = "key", "m" * 32, "o" * 32
GATE = Gate(
    anonymous=Who.NOBODY,
    clients=[lambda sent: Caller("acme") if sent == KEY else None],
    peers=lambda: (MESH,),
    operators=lambda: (OPERATOR,),
)
SCHEMES = [f"{scheme}{value}" for scheme in ("", "Bearer ", "Basic ") for value in (KEY, MESH, OPERATOR, "")]
VALUES = st.sampled_from([*SCHEMES, b"Bearer"])
NAMES = st.sampled_from(["authorization", MESH_HEADER, "tenant", "x-authorization", "authorization-bin", "x-api-key"])


METHODS = st.sampled_from([*DECLARED, "/a.Service/Undeclared"])
BEARERS: dict[str | bytes, Who] = {f"Bearer {KEY}": Who.CLIENT, f"Bearer {OPERATOR}": Who.OPERATOR}


@given(method=METHODS, sent=st.lists(st.tuples(NAMES, VALUES), max_size=4))
def test_only_what_is_asked_for_lets_anybody_through(method: str, sent: list[tuple[str, str | bytes]]) -> None:
    proven = Who.NOBODY
    if [value for name, value in sent if name == MESH_HEADER] == [MESH]:
        proven |= Who.PEER
    bearers = [value for name, value in sent if name == "authorization"]
    if len(bearers) == 1:
        proven |= BEARERS.get(bearers[0], Who.NOBODY)
    wanted = DECLARED.get(method, Who.NOBODY)
    try:
        identity = GATE.examine(method, sent)
    except Unauthenticated:
        assert Who.ANYONE not in wanted
        return
    except PermissionDenied:
        assert not proven & wanted
        return
    assert Who.ANYONE in wanted or proven & wanted
    assert identity.caller.tenant == ("acme" if Who.CLIENT in proven and Who.ANYONE not in wanted else "")
