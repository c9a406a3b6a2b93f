"""Health check of a service's container: exit code 0 when the service in it serves.

`health.py` asks the service that listens on the port of BATON_LISTEN. With `--model` it must be a router that has a
worker for a model: only then can it answer.
"""

import os
import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.v1 import inference_pb2, inference_pb2_grpc

SECONDS = 2.0


def why_not(port: int, model: bool) -> str:
    """Why the service is not healthy; empty: it is."""
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
            if health.status != health_pb2.HealthCheckResponse.SERVING:
                return "not serving"
            if model:
                router = inference_pb2_grpc.InferenceStub(channel)
                models = router.ListModels(inference_pb2.ListModelsRequest(), timeout=SECONDS).models
                return "" if any(one.ready for one in models) else "no worker"
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
    return ""


if __name__ == "__main__":
    sys.exit(why_not(int(os.environ["BATON_LISTEN"].rpartition(":")[2]), "--model" in sys.argv[1:]) or 0)
