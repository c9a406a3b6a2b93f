"""Health check of a service's container: exit code 0 when the service in it serves.

`health.py` asks the operators' port, that of BATON_ADMIN_LISTEN: it is on loopback, and needs neither TLS nor a
client's key. With `--model` it must be a router that has a decode worker: only then can it answer.
"""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.internal.v1 import observe_pb2, observe_pb2_grpc, worker_pb2

SECONDS = 2.0


def credentials() -> tuple[tuple[str, str], ...]:
    """What the operators' port asks for, if it does."""
    token = os.environ.get("BATON_ADMIN_TOKEN", "")
    path = os.environ.get("BATON_ADMIN_TOKEN_FILE", "")
    if path:
        with open(path, encoding="utf-8") as file:
            token = file.readline()
    return (("authorization", f"Bearer {token.strip()}"),) if token.strip() else ()


def why_not(port: int, model: bool) -> str:
    """Why the service is not healthy; empty: it is."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
            if health.status != health_pb2.HealthCheckResponse.SERVING:
                return "not serving"
            if model:
                watch = observe_pb2_grpc.ObserveStub(channel).WatchMesh
                states = watch(observe_pb2.WatchMeshRequest(), timeout=SECONDS, metadata=credentials())
                workers = next(iter(states)).workers
                states.cancel()
                decode = worker_pb2.WORKER_ROLE_DECODE
                return "" if any(worker.state.role == decode for worker in workers) else "no worker"
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return ""


if __name__ == "__main__":
    sys.exit(why_not(int(os.environ["BATON_ADMIN_LISTEN"].rpartition(":")[2]), "--model" in sys.argv[1:]) or 0)
