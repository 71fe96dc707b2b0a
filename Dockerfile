# The pinned environment of constraints.txt on a CUDA image; wheels of torch bring CUDA's libraries with them.
#
#   docker build --tag digit-ds .
#   docker run --gpus all --shm-size 8g --volume "$PWD":/data digit-ds digit-ds --help
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/digit_ds
COPY . .
# Fused kernels are not built: DeepSpeed compiles those that a run needs on the machine that has the GPU.
RUN DS_BUILD_OPS=0 make environment
ENV PATH=/opt/digit_ds/.venv/bin:$PATH
WORKDIR /data
CMD ["digit-ds", "--help"]
