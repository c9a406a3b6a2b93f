"""compose.yaml and its layers: what they start is pinned, watched, configured as it can be, and has few rights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import baton
from baton.rpc.cannot_start import CannotStart
from baton.rpc.security import assemble, is_loopback
from baton.rpc.settings import ServiceSettings
from baton_cache.settings import CacheSettings
from baton_decode.settings import DecodeSettings
from baton_prefill.settings import PrefillSettings
from baton_router.settings import RouterSettings, targets
from baton_router.targets import check_target
from tests.deploy import files

SETTINGS: dict[str, type[ServiceSettings]] = {
    "baton_router": RouterSettings,
    "baton_cache": CacheSettings,
    "baton_prefill": PrefillSettings,
    "baton_decode": DecodeSettings,
}
ALL = files.services(*files.LAYERS)
CORE = files.services()
BATON = files.of_baton(ALL)

EXACT = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w.]+)?(@sha256:[0-9a-f]{64})?")
DURATION = re.compile(r"(\d+)s")

each_service = pytest.mark.parametrize("name", sorted(ALL))
each_of_baton = pytest.mark.parametrize("name", sorted(BATON))


def settings_of(name: str, monkeypatch: pytest.MonkeyPatch, layers: tuple[str, ...] = files.LAYERS) -> ServiceSettings:
    """The settings the service would start with."""
    service = files.services(*layers)[name]
    for variable, value in service["environment"].items():
        assert isinstance(value, str), f"{variable} is {value!r}: YAML made something else of it"
        monkeypatch.setenv(variable, value)
    return SETTINGS[service["command"][0]](_cli_parse_args=service["command"][1:])  # type: ignore[call-arg]


def test_all_parts_are_there() -> None:
    assert {"redis", "cache", "prefill", "decode", "router"} <= set(CORE)
    assert {"collector", "jaeger", "prometheus", "grafana"} == set(ALL) - set(CORE)


@pytest.mark.parametrize("name", [files.CORE, *files.LAYERS])
def test_every_variable_has_a_value(name: str) -> None:
    assert files.variables(name) <= {*files.env_file(), *files.GIVEN}


def test_every_value_is_used() -> None:
    used = set().union(*(files.variables(name) for name in (files.CORE, *files.LAYERS)))
    assert set(files.env_file()) == used - set(files.GIVEN) | {"COMPOSE_PROFILES"}


@each_service
def test_image_is_pinned(name: str) -> None:
    assert EXACT.fullmatch(ALL[name]["image"])


@each_of_baton
def test_own_images_carry_the_version(name: str) -> None:
    assert BATON[name]["image"].endswith(f":{baton.__version__}")
    assert BATON[name]["image"].startswith(f"baton-{BATON[name]['build']['target']}")


@pytest.mark.parametrize("name", [files.CORE, *files.LAYERS])
def test_ports_come_from_env_and_open_on_loopback(name: str) -> None:
    for service in files.raw(name)["services"].values():
        for port in service.get("ports", []):
            assert re.fullmatch(r"\$\{BIND_ADDRESS\}:\$\{[A-Z]+_PORT\}:\d+", port)
    assert files.env_file()["BIND_ADDRESS"] == "127.0.0.1"


@each_service
def test_health_is_checked_without_a_shell(name: str) -> None:
    check = ALL[name]["healthcheck"]
    assert check["test"][0] == "CMD"
    assert "curl" not in check["test"]
    assert {"interval", "timeout", "retries", "start_period"} <= set(check)


@each_service
def test_restarts_and_reaps(name: str) -> None:
    assert ALL[name]["restart"] == "unless-stopped"
    assert ALL[name]["init"] is True


@each_service
def test_has_no_rights_it_does_not_need(name: str) -> None:
    service = ALL[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert name in BATON or not service["user"].startswith("0")  # Baton's images say it themselves
    assert "privileged" not in service


@each_service
def test_waits_for_what_says_when_it_is_ready(name: str) -> None:
    for needed, how in ALL[name].get("depends_on", {}).items():
        assert how == {"condition": "service_healthy"}
        assert needed in ALL


@pytest.mark.parametrize("name", sorted(CORE))
def test_core_starts_alone(name: str) -> None:
    for service in (CORE[name], ALL[name]):
        assert set(service.get("depends_on", {})) <= set(CORE)


@each_of_baton
def test_starts_a_service_with_settings_it_has(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(name, monkeypatch)
    known = {f"BATON_{field.upper()}" for field in type(settings).model_fields}
    assert {variable for variable in BATON[name]["environment"] if variable.startswith("BATON_")} <= known
    assert settings.listen == "0.0.0.0:50051"
    assert settings.metrics_listen == "0.0.0.0:9464"


@each_of_baton
def test_says_that_nobody_is_asked_and_hides_operators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(name, monkeypatch)
    assert is_loopback(settings.admin_listen)
    assert assemble(settings, settings.listen, settings.metrics_listen).gate.anonymous is settings.serves
    assert {port.rpartition(":")[2] for port in BATON[name].get("ports", [])} <= {"50051"}
    for flag in ("allow_unauthenticated", "allow_unauthenticated_metrics"):
        with pytest.raises(CannotStart, match="whoever reaches"):
            assemble(settings.model_copy(update={flag: False}), settings.listen, settings.metrics_listen)


@each_of_baton
def test_traces_only_where_a_collector_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of(name, monkeypatch).otlp_endpoint == "collector:4317"
    monkeypatch.delenv("BATON_OTLP_ENDPOINT")
    monkeypatch.setenv("BATON_MODEL", "/models/some")
    assert settings_of(name, monkeypatch, layers=()).otlp_endpoint == ""


@each_of_baton
def test_drains_before_it_is_killed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grace = DURATION.fullmatch(BATON[name]["stop_grace_period"])
    assert grace is not None
    assert int(grace[1]) > settings_of(name, monkeypatch).drain_seconds + 5


@each_of_baton
def test_targets_are_names_on_the_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(name, monkeypatch)
    names = set(ALL).union(
        *(service.get("networks", {}).get("default", {}).get("aliases", []) for service in ALL.values())
    )
    asked = [settings.otlp_endpoint]
    if isinstance(settings, RouterSettings):
        asked += [settings.cache_target, *targets(settings.decode_targets), *targets(settings.prefill_targets)]
        # Every worker of a scaled tier is an address of its name.
        assert settings.decode_targets.startswith("dns:///")
        assert settings.prefill_targets.startswith("dns:///")
    if isinstance(settings, CacheSettings):
        asked.append(settings.redis_url.get_secret_value().removeprefix("redis://").partition("/")[0])
    for target in asked:
        check_target(target)
        assert target.removeprefix("dns:///").partition(":")[0] in names


def test_tiers_can_be_scaled() -> None:
    for name in ("prefill", "decode", "prefill-gpu", "decode-gpu"):
        assert "container_name" not in ALL[name]
        assert "ports" not in ALL[name]


@pytest.mark.parametrize("name", ["prefill", "decode", "prefill-gpu", "decode-gpu"])
def test_tiers_share_a_private_directory_in_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(name, monkeypatch)
    assert isinstance(settings, PrefillSettings | DecodeSettings)
    assert f"handoff:{settings.shm_dir}" in ALL[name]["volumes"]
    options = files.raw(files.CORE)["volumes"]["handoff"]["driver_opts"]
    assert options["type"] == "tmpfs"
    user = re.search(r"^USER (\d+):(\d+)$", (files.ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert user is not None
    assert {f"uid={user[1]}", f"gid={user[2]}", "mode=0700"} <= set(options["o"].split(","))


def test_cpu_is_the_default_and_gpu_a_profile() -> None:
    assert files.env_file()["COMPOSE_PROFILES"] == "cpu"
    for tier in ("prefill", "decode"):
        cpu, gpu = ALL[tier], ALL[f"{tier}-gpu"]
        assert cpu["profiles"] == ["cpu"]
        assert gpu["profiles"] == ["gpu"]
        assert gpu["command"] == cpu["command"]
        assert gpu["environment"] == {**cpu["environment"], "BATON_DEVICE": "cuda"}
        assert gpu["networks"]["default"]["aliases"] == [tier]
        assert gpu["build"]["args"]["ENGINE_EXTRA"] == "gpu"
        (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
    # Nothing may wait for a service whose profile is off.
    profiled = {name for name, service in ALL.items() if "profiles" in service}
    for service in ALL.values():
        assert not profiled & set(service.get("depends_on", {}))


def test_a_model_directory_reaches_every_service_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, service in BATON.items():
        if name == "cache":
            continue
        assert "/models/some:/model:ro" in service["volumes"]
        settings = settings_of(name, monkeypatch)
        assert isinstance(settings, RouterSettings | PrefillSettings | DecodeSettings)
        if isinstance(settings, RouterSettings):
            assert settings.models() == [("some", Path("/model"))]
        else:
            assert (str(settings.model), settings.served_name()) == ("/model", "some")
