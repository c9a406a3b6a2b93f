"""Settings of who may call a service, and of how it calls others. docs/security.md tells how they go together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings

from baton.rpc.access import Who
from baton.rpc.gate import Verify


class SecuritySettings(BaseSettings):
    """Common to all services."""

    serves: ClassVar[Who] = Who.PEER
    """Whom the service's port is for."""

    admin_listen: str = Field(
        "127.0.0.1:0",
        description="host:port of the operators' port, on loopback: state of the service, for `baton top` and the like",
    )
    admin_token: SecretStr = Field(
        SecretStr(""), description="what operators must send there; from the environment: BATON_ADMIN_TOKEN"
    )
    admin_token_file: Path | None = Field(None, description="file with that token")

    allow_unauthenticated: bool = Field(
        False, description="listen beyond loopback though nobody is asked who they are: on a private network only"
    )
    allow_unauthenticated_metrics: bool = Field(
        False, description="serve metrics beyond loopback; nobody is asked who they are there"
    )

    tls_cert: Path | None = Field(None, description="PEM certificate of this service, with its chain; given: TLS only")
    tls_key: Path | None = Field(None, description="its PEM private key")
    tls_client_ca: Path | None = Field(
        None, description="PEM certificates of those who may sign callers' certificates; given: callers must show one"
    )
    tls_client_names: str = Field(
        "", description="names (DNS or URI) of which a caller's certificate must have one, comma separated; empty: any"
    )

    mesh_ca: Path | None = Field(
        None, description="PEM certificates of those who may sign the services' that this one calls; given: TLS"
    )
    mesh_cert: Path | None = Field(None, description="PEM certificate to show them; default: tls_cert")
    mesh_key: Path | None = Field(None, description="its PEM private key; default: tls_key")
    mesh_tls_name: str = Field(
        "", description="name that their certificates must have; empty: the host of their target, or its address"
    )
    mesh_token: SecretStr = Field(
        SecretStr(""),
        description="secret that all services of the mesh know and show each other; from the environment: "
        "BATON_MESH_TOKEN",
    )
    mesh_token_file: Path | None = Field(
        None, description="file with that secret; two lines while it is replaced: the first is sent, both are taken"
    )

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        for name, cert, key in (("tls", self.tls_cert, self.tls_key), ("mesh", self.mesh_cert, self.mesh_key)):
            if (cert is None) != (key is None):
                raise ValueError(f"--{name}-cert, --{name}-key: one needs the other")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca: needs --tls-cert and --tls-key")
        if self.tls_client_names and self.tls_client_ca is None:
            raise ValueError("--tls-client-names: needs --tls-client-ca")
        if self.mesh_ca is None and (self.mesh_cert is not None or self.mesh_tls_name):
            raise ValueError("--mesh-cert, --mesh-key, --mesh-tls-name: need --mesh-ca")
        return self

    def clients(self) -> Sequence[Verify]:
        """What knows clients by their credentials; empty: nothing does.

        Raises:
            CannotStart: a file cannot be used.
        """
        return ()

    @classmethod
    def secret_in(cls, arguments: Sequence[str]) -> str | None:
        """The first flag among a command line's that gives a secret away: anyone on the machine can read flags."""
        for argument in arguments:
            flag = argument.partition("=")[0]
            field = cls.model_fields.get(flag.removeprefix("--").replace("-", "_"))
            if flag.startswith("--") and field is not None and field.annotation is SecretStr:
                return flag
        return None
