# One image for every role: `hpo serve`, `hpo worker`, `hpo launch`, `hpo dashboard`.
#   docker build -t hpo:0.1.0-cpu .                              CPU
#   docker build -t hpo:0.1.0-cuda --build-arg TORCH=cuda .      NVIDIA GPUs (run with --gpus all)
# CUDA's libraries come with torch itself, so both start from the same base. pip's default source has no CPU builds
# for Linux on x86-64: name one that has, and the image is a fifth of the size:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .
# For a driver older than 580 or a card older than Turing, the same with …/whl/cu126 and TORCH=cuda.
# The base is any Debian 12 with Python 3.11 to 3.13 and its venv module: tools/image.py makes one of Debian's packages.
ARG PYTHON_IMAGE=python:3.13.7-slim-bookworm
FROM ${PYTHON_IMAGE}

ARG TORCH=cpu
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS

# The kernel that trains LSTMs on a CPU is compiled by the first trial, for the processor that it finds: a prebuilt one
# would fit the builder's only. Without a compiler they train on torch's own LSTM.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc=4:12.2.* libc6-dev=2.36-* \
    && rm -rf /var/lib/apt/lists/*

# A plain user; what it may write: its home and the artifact store's mount point.
RUN useradd --create-home --uid 10001 hpo && install --directory --owner=hpo --group=hpo /artifacts

# What we depend on first: a change of the code does not install it again. Setuptools needs a folder for each package.
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY tools/setup.sh tools/
RUN mkdir -p hpo/dashboard hpo/launcher hpo/promote hpo/report hpo/service/pages hpo/study hpo/track hpo/trial hpo/worker \
        models/bundle models/data models/kernel models/training storage/server examples/data \
    && PIP_NO_CACHE_DIR=1 HPO_TORCH=${TORCH} sh tools/setup.sh s3,parquet,onnx
COPY hpo hpo
COPY models models
COPY storage storage
COPY examples examples
RUN .venv/bin/python -m compileall -q hpo models storage

ENV PATH=/app/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/hpo
ENTRYPOINT ["hpo"]
CMD ["worker"]
# Healthy: the packages load and the database answers.
HEALTHCHECK --interval=60s --timeout=10s --start-period=30s --retries=3 \
    CMD ["python", "-P", "-c", "from hpo.storage.database import database_url, wait_ready; wait_ready(database_url(), 5)"]
