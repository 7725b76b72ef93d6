# vlv with the shipped model, on a CPU or on a GPU:
#
#   docker build -t vlv .
#   docker build -t vlv:cuda --build-arg BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime --build-arg TORCH= .
#   docker run --rm -v "$PWD:/data" vlv caption /data/photos --output /data/captions.jsonl
ARG BASE=python:3.11-slim
FROM ${BASE}

# An empty TORCH keeps the build of the base image. TORCH_INDEX may name PyTorch's index of CPU wheels, without
# which pip takes the wheels with CUDA: several gigabytes that a CPU has no use for.
ARG TORCH="torch==2.13.0"
ARG TORCH_INDEX=""
ARG EXTRAS="train,data,eval"

WORKDIR /opt/vlv
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY src ./src
RUN if [ -n "$TORCH" ]; then pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$TORCH"; fi \
    && grep -v '^torch==' constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt ".[$EXTRAS]" \
    && rm /tmp/constraints.txt \
    && useradd --create-home vlv

USER vlv
WORKDIR /data
ENTRYPOINT ["vlv"]
CMD ["--help"]
