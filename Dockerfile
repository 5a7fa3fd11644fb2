# A CUDA machine with MegaBlocks built in: docs/megablocks.md, section CUDA 13, as one image.
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
COPY requirements.txt requirements-data.txt ./
RUN pip install -r requirements.txt -r requirements-data.txt setuptools==84.2.1 wheel==0.48.0 packaging==26.3

# 8.0 for an A100, 9.0 for an H100 or H200
ARG TORCH_CUDA_ARCH_LIST="8.0 9.0"
ARG MAX_JOBS=8
RUN CPATH="$(python -c 'import nvidia.cu13 as m; print(list(m.__path__)[0])')/include" \
    && export CPATH TORCH_CUDA_ARCH_LIST MAX_JOBS \
    && pip download --no-deps --no-build-isolation --no-binary megablocks --dest /tmp/build megablocks==0.10.0 \
    && tar xf /tmp/build/megablocks-0.10.0.tar.gz --directory /tmp/build \
    && sed -i -z 's/stream,\s*debug_synchronous/stream/g' /tmp/build/megablocks-0.10.0/csrc/cumsum.h \
    && pip install --no-deps --no-build-isolation /tmp/build/megablocks-0.10.0 stanford-stk==0.7.1 grouped_gemm==0.3.0 \
    && python -c "import megablocks.layers.dmoe, grouped_gemm" \
    && rm -rf /tmp/build

COPY . .
ENTRYPOINT ["python", "train.py"]
CMD ["--help"]
