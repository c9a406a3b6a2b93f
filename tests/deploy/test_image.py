"""The Dockerfile and the two scripts that go with it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from baton.internal.v1 import observe_pb2, observe_pb2_grpc, worker_pb2
from tests.deploy.files import ROOT, env_file

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
HEALTH = ROOT / "deploy/image/health.py"


def stages() -> dict[str, list[str]]:
    """Instructions by stage, continuation lines joined."""
    found: dict[str, list[str]] = {"": []}
    stage = ""
    for line in re.sub(r"\\\n(\s*#.*\n)*\s*", " ", DOCKERFILE).splitlines():
        if begins := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            stage = begins[2]
            found[stage] = []
        if line and not line.startswith("#"):
            found[stage].append(line)
    return found


def test_base_image_is_the_one_pinned_in_env() -> None:
    assert f"ARG PYTHON_IMAGE={env_file()['PYTHON_IMAGE']}" in stages()[""]


def test_stages_start_from_the_base_image_or_each_other() -> None:
    for name, instructions in stages().items():
        for instruction in instructions:
            if instruction.startswith("FROM "):
                source = instruction.split()[1]
                assert source == "${PYTHON_IMAGE}" or source in stages(), name


@pytest.mark.parametrize(("image", "environment"), [("core", "core-environment"), ("worker", "worker-environment")])
def test_images_run_as_a_user_without_rights_and_without_a_shell(image: str, environment: str) -> None:
    instructions = stages()[image]
    assert "USER 10001:10001" in instructions
    assert 'ENTRYPOINT ["python", "-m"]' in instructions
    assert f"COPY --from={environment} /opt/baton /opt/baton" in instructions


def test_workers_have_the_compiled_kernels_and_no_compiler() -> None:
    assert "RUN python /src/build.py /kernels" in stages()["kernels"]
    worker = stages()["worker"]
    assert "COPY --from=kernels /kernels /usr/local/lib" in worker
    assert worker.index("RUN ldconfig") < worker.index("USER 10001:10001")
    assert [name for name, lines in stages().items() if any("gcc" in line for line in lines)] == ["kernels"]


def test_everything_copied_is_in_the_context() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        source
        for instructions in stages().values()
        for line in instructions
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists()
        assert any(source == path or source.startswith(f"{path}/") for path in allowed), source


def _requirements() -> ModuleType:
    spec = importlib.util.spec_from_file_location("image_requirements", ROOT / "deploy/image/requirements.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_core_has_no_torch_and_workers_have() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    requirements = _requirements().requirements
    core, engine, gpu = requirements(pyproject), requirements(pyproject, "engine"), requirements(pyproject, "gpu")
    assert core == tomllib.loads(pyproject)["project"]["dependencies"]
    assert not any(one.startswith("torch") for one in core)
    assert any(one.startswith("torch") for one in engine)
    assert set(engine) < set(gpu)
    assert not any(one.startswith("baton-mesh") for one in gpu)


class Router(observe_pb2_grpc.ObserveServicer):
    """Says of its workers what the test wants."""

    ready = True
    token = ""

    def WatchMesh(
        self, request: observe_pb2.WatchMeshRequest, context: grpc.ServicerContext
    ) -> Iterator[observe_pb2.WatchMeshResponse]:
        self.token = dict(context.invocation_metadata()).get("authorization", "")
        role = worker_pb2.WORKER_ROLE_DECODE if self.ready else worker_pb2.WORKER_ROLE_PREFILL
        worker = observe_pb2.WorkerView(state=worker_pb2.WatchResponse(role=role))
        yield observe_pb2.WatchMeshResponse(workers=[worker])


@pytest.fixture
def service() -> Iterator[tuple[int, health.HealthServicer, Router]]:
    """Port, health and router of a running server."""
    state, router = health.HealthServicer(), Router()
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        health_pb2_grpc.add_HealthServicer_to_server(state, server)
        observe_pb2_grpc.add_ObserveServicer_to_server(router, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield port, state, router
        server.stop(None).wait()


def check(port: int, *arguments: str) -> tuple[int, str]:
    """Exit code of the health check, and what it says."""
    environment = {
        "BATON_ADMIN_LISTEN": f"127.0.0.1:{port}",
        "BATON_ADMIN_TOKEN": "an operator's",
        "PATH": str(Path(sys.executable).parent),
    }
    done = subprocess.run(
        [sys.executable, str(HEALTH), *arguments], env=environment, capture_output=True, text=True, timeout=20
    )
    return done.returncode, done.stderr.strip()


def test_health_check_follows_the_service(service: tuple[int, health.HealthServicer, Router]) -> None:
    port, state, _ = service
    state.set("", health_pb2.HealthCheckResponse.SERVING)
    assert check(port) == (0, "")
    state.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    assert check(port) == (1, "not serving")


def test_health_check_of_a_router_wants_a_worker(service: tuple[int, health.HealthServicer, Router]) -> None:
    port, state, router = service
    state.set("", health_pb2.HealthCheckResponse.SERVING)
    assert check(port, "--model") == (0, "")
    assert router.token == "Bearer an operator's"
    router.ready = False
    assert check(port, "--model") == (1, "no worker")


def test_health_check_fails_where_nothing_listens() -> None:
    code, words = check(1)
    assert code == 1
    assert words.startswith("UNAVAILABLE")
