# syntax=docker/dockerfile:1
# Esper for NVIDIA GPUs; see docs/clusters.md. From the root of the repository:
#   docker build -f docker/cuda.Dockerfile -t esper:cuda .
#   docker build -f docker/cuda.Dockerfile -t esper:cuda-acceleration --build-arg ACCELERATION=on .
ARG ACCELERATION=off

# CUDA's version is that of the libraries which torch 2.13.0 brings along; of the image only the settings are needed by
# which containers get their GPUs and old drivers are refused.
FROM nvidia/cuda:13.0.3-base-ubuntu24.04 AS torch
# The compiler and Python's headers are for the engine of the hosts, for torch.compile and for Triton, which compile when
# a run starts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/esper
ENV PATH=/opt/esper/bin:$PATH
RUN pip install --no-cache-dir torch==2.13.0

# Before the project is copied, whose changes would have torch-scatter compiled again; against the torch that it will meet.
FROM torch AS acceleration-off
RUN mkdir /wheels

# Esper needs nothing of torch-scatter that is compiled for GPUs, so the CUDA toolkit is not needed either.
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
CMD ["python", "-m", "trainers.train", "runtime=cuda"]
