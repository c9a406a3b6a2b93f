# The images of Baton, one Dockerfile:
#   docker build --target core   -t baton-core .      router and cache; no torch in it
#   docker build --target worker -t baton-worker .    prefill and decode (and whatever core runs)
# compose.yaml builds both.

ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
COPY constraints.txt ./
# One environment to build with, one that goes into the images: that one has no pip.
RUN python -m venv /build \
    && /build/bin/pip install --no-cache-dir -c constraints.txt hatchling \
    && python -m venv --without-pip /opt/baton
ENV PIP="/build/bin/pip --python /opt/baton/bin/python" \
    PIP_NO_CACHE_DIR=1
COPY pyproject.toml deploy/image/requirements.py ./


# --- the source as a wheel

FROM build AS wheel
COPY README.md LICENSE ./
COPY shared shared
COPY services services
RUN /build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist .


# --- what it needs, in layers that a change of the source leaves alone

FROM build AS core-needs
RUN python requirements.py >core.txt && python requirements.py jwt >>core.txt && $PIP install -c constraints.txt -r core.txt

FROM core-needs AS worker-needs
# The extra of pyproject.toml that the workers get: engine, or gpu.
ARG ENGINE_EXTRA=engine
# Where torch comes from: by default its builds for CPU, a tenth of the size. Empty: the registry's, which are for CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python requirements.py engine >engine.txt \
    && $PIP install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r engine.txt
# What another extra has on top may need torch to be built, so it comes after it and sees it.
RUN if [ "$ENGINE_EXTRA" != engine ]; then \
        python requirements.py "$ENGINE_EXTRA" >extra.txt \
        && $PIP install -c constraints.txt setuptools wheel ninja \
        && $PIP install -c constraints.txt --no-build-isolation -r extra.txt; \
    fi


# --- the engine's kernels in C, for the image has no compiler

FROM ${PYTHON_IMAGE} AS kernels
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY shared/baton/engine/kernels /src
RUN python /src/build.py /kernels


# --- environments

FROM core-needs AS core-environment
COPY --from=wheel /dist /dist
RUN $PIP install --no-deps /dist/*.whl
COPY deploy/image/health.py /opt/baton/health.py

FROM worker-needs AS worker-environment
COPY --from=wheel /dist /dist
RUN $PIP install --no-deps /dist/*.whl
COPY deploy/image/health.py /opt/baton/health.py


# --- images

FROM ${PYTHON_IMAGE} AS base
RUN groupadd --gid 10001 baton && useradd --uid 10001 --gid baton --home-dir /tmp --no-create-home baton
ENV PATH=/opt/baton/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp
WORKDIR /opt/baton

FROM base AS core
COPY --from=core-environment /opt/baton /opt/baton
USER 10001:10001
ENTRYPOINT ["python", "-m"]
CMD ["baton_router"]

FROM base AS worker
COPY --from=kernels /kernels /usr/local/lib
RUN ldconfig
COPY --from=worker-environment /opt/baton /opt/baton
# Models are directories; nothing is ever fetched from a hub.
ENV HF_HUB_OFFLINE=1
USER 10001:10001
ENTRYPOINT ["python", "-m"]
CMD ["baton_decode"]
