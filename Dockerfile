# A CUDA machine with MegaBlocks built in: docs/megablocks.md, as one image.
#   docker build -t spannorm-suite .
#   docker run --gpus all -v "$PWD/runs:/workspace/runs" spannorm-suite experiment=moe_spannorm_gpu
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV DEBIAN_FRONTEND=noninteractive \
    PIP_NO_CACHE_DIR=1 \
    CUDA_HOME=/usr/local/cuda \
    PATH=/opt/venv/bin:$PATH

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes build-essential ca-certificates git ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

WORKDIR /workspace
COPY requirements.txt requirements-data.txt requirements-build.txt requirements-megablocks.txt ./
RUN pip install -r requirements.txt -r requirements-data.txt -r requirements-build.txt

# 8.0 for an A100, 9.0 for an H100 or H200, 10.0 for a B200
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0"
ARG MAX_JOBS=8
COPY core ./core
COPY tools/__init__.py tools/megablocks.py ./tools/
RUN TORCH_CUDA_ARCH_LIST="$TORCH_CUDA_ARCH_LIST" MAX_JOBS="$MAX_JOBS" python -m tools.megablocks

COPY . .
ENTRYPOINT ["python", "train.py"]
CMD ["--help"]
