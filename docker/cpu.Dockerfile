# syntax=docker/dockerfile:1
# Esper for CPUs; see docs/clusters.md. From the root of the repository:
#   docker build -f docker/cpu.Dockerfile -t esper:cpu .
#   docker build -f docker/cpu.Dockerfile -t esper:cpu-acceleration --build-arg ACCELERATION=on .
ARG ACCELERATION=off

FROM python:3.11-slim-bookworm AS torch
# The compiler is for the engine of the hosts and for torch.compile, which compile when a run starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch==2.13.0

# Before the project is copied, whose changes would have torch-scatter compiled again; against the torch that it will meet.
FROM torch AS acceleration-off
RUN mkdir /wheels

FROM torch AS acceleration-on
RUN FORCE_ONLY_CPU=1 pip wheel --no-cache-dir --no-build-isolation --no-deps --wheel-dir /wheels 'torch-scatter>=2.1.2'

# hadolint ignore=DL3006
FROM acceleration-${ACCELERATION} AS wheels
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM torch
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels pip install --no-cache-dir /wheels/*.whl
# Its home and runs are writable for everyone, so that the image also runs as another user, who then has no name.
RUN useradd --uid 10001 --create-home esper && chmod 1777 /home/esper && install -d -m 1777 /work/runs
ENV HOME=/home/esper USER=esper PYTHONUNBUFFERED=1
WORKDIR /work
VOLUME /work/runs
USER 10001
# No shell between: the process gets SIGTERM itself, saves, and its exit code is the container's.
CMD ["python", "-m", "trainers.train"]
